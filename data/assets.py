"""Assets: the 3D objects of a folder, of Objaverse or of a Sweet Home 3D library, listed with what is known of each."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import UserError, read_json

SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".fbx")
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
OBJAVERSE = "objaverse"  # the source that is no path; ./objaverse is a folder of that name


@dataclass(frozen=True, slots=True)
class Asset:
    """One 3D object.  `uid` holds only [A-Za-z0-9_-], unique in its source: it names a folder and a shard key.

    path: of the file, which for Objaverse may have to be fetched first (data/objaverse_assets.py).
    category: several are parted by `; `.
    license: an SPDX identifier where the source lets one be told, else the source's own words; empty: unknown.
    front_yaw_deg: where the object's front faces, counter-clockwise seen from above from the file's front (glTF +Z).
    rotation: 3x3 row-major, in the file's y-up axes, applied before anything else.
    faces: as the source says; None: not known (data/faces.py counts them in the file).
    """

    uid: str
    path: Path
    source: str
    caption: str
    category: str
    license: str
    creator: str
    front_yaw_deg: float = 0.0
    rotation: tuple[float, ...] = IDENTITY
    faces: int | None = None


def list_assets(source: str | Path, cache: str | Path | None = None, names: Sequence[str] = ()) -> list[Asset]:
    """The objects of `source`, sorted by uid.  UserError when it holds none or cannot be read.

    source: a folder of .glb/.gltf/.obj/.ply/.fbx files (searched in depth), a .sh3f library, `objaverse` (all of
    Objaverse 1.0) or `objaverse:UIDS`, where UIDS is a text file of one UID a line or a .json list of them.
    names: keep only these (uid or file name without suffix); cache: where a library is unpacked, beside it by default.
    A folder may hold `assets.json`, {file or uid: {"caption", "category", "license", "creator", "faces",
    "front_yaw_deg"}}.  No file but such lists is opened.
    """
    from data import objaverse_assets, sweethome  # here, since both take Asset from this file

    if isinstance(source, str) and source.partition(":")[0] == OBJAVERSE:
        uids = source.partition(":")[2]
        return objaverse_assets.list_objaverse(Path(uids).expanduser() if uids else None, names)
    source = Path(source).expanduser()
    if not source.exists():
        raise UserError(
            f"source={source} does not exist; give a folder of {' '.join(SUFFIXES)} files, a .sh3f library, "
            f"{OBJAVERSE} or {OBJAVERSE}:UIDS.txt"
        )
    if source.is_dir():
        assets = select(list_folder(source), names, source)
    elif source.suffix.lower() in {".sh3f", ".zip"}:
        folder = Path(cache) if cache is not None else source.with_name(f".{source.name}.unpacked")
        assets = sweethome.list_library(source, folder, names)
    else:
        raise UserError(
            f"source={source} is neither a folder nor a .sh3f library; put the object into a folder and name that"
        )
    if not assets:
        raise UserError(f"source={source} holds no {' '.join(SUFFIXES)} files; give another folder")
    return assets


def safe_uids(paths: Sequence[str]) -> list[str]:
    """A uid for each relative posix path: its parts joined by `__`, without the suffix.

    A short hash of the path is added wherever that would be ambiguous, so that no two paths share a uid, not even on a
    file system that ignores case.
    """
    stems = [os.path.splitext(path)[0] for path in paths]
    plain = [re.sub(r"[^A-Za-z0-9_-]", "_", stem.replace("/", "__"))[:64] for stem in stems]
    counts = Counter(uid.lower() for uid in plain)
    uids = []
    for path, stem, uid in zip(paths, stems, plain, strict=True):
        exact = uid.replace("__", "/") == stem and uid.strip("_-") == uid
        digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:10]
        uids.append(uid if exact and counts[uid.lower()] == 1 else f"{uid.strip('_-')}-{digest}".strip("-"))
    return uids


def select(assets: Iterable[Asset], names: Sequence[str], source: Path) -> list[Asset]:
    """Those of `assets` that `names` names, sorted by uid; all when it is empty.  An unknown name is an error."""
    assets = sorted(assets, key=lambda asset: asset.uid)
    if not names:
        return assets
    known: dict[str, list[Asset]] = {}
    for asset in assets:
        for key in {asset.uid, asset.path.stem}:
            known.setdefault(key, []).append(asset)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            remedy = f"near it: {', '.join(near)}" if near else f"it holds for instance {', '.join(sorted(known)[:5])}"
            raise UserError(f"names: {source} holds no object {name!r}; {remedy}")
    wanted = {asset.uid for name in names for asset in known[name]}
    return [asset for asset in assets if asset.uid in wanted]


def walk_assets(folder: Path) -> list[str]:
    """Relative posix paths of the 3D files in `folder`, in depth, hidden ones left out.

    One directory read a folder and no `stat` a file but for symbolic links; links to folders are not followed.
    """
    found, waiting = [], [""]
    while waiting:
        inside = waiting.pop()
        try:
            with os.scandir(folder / inside) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(f"{inside}{entry.name}/")
                    elif entry.name.lower().endswith(SUFFIXES) and entry.is_file():
                        found.append(inside + entry.name)
        except OSError as error:
            raise UserError(f"source: {folder / inside} cannot be listed: {error.strerror}; allow reading it") from None
    return sorted(found)


def list_folder(folder: Path) -> list[Asset]:
    known: dict[str, Any] = {}
    if (folder / "assets.json").exists():
        known = read_json(folder / "assets.json", "assets.json")
    if not isinstance(known, dict) or not all(isinstance(facts, dict) for facts in known.values()):
        raise UserError(f"{folder / 'assets.json'} must be a JSON object of objects, one per file name or uid")
    names, source = walk_assets(folder), str(folder)
    return [
        _folder_asset(folder, name, uid, source, known.get(name) or known.get(uid) or {})
        for name, uid in zip(names, safe_uids(names), strict=True)
    ]


def _folder_asset(folder: Path, name: str, uid: str, source: str, facts: dict[str, Any]) -> Asset:
    def refuse(key: str, value: object, kind: str) -> UserError:
        return UserError(f"{folder / 'assets.json'}: {name}: {key}={value!r} is not {kind}")

    yaw, faces = facts.get("front_yaw_deg", 0), facts.get("faces")
    if isinstance(yaw, bool) or not isinstance(yaw, int | float) or not -360 <= yaw <= 360:
        raise refuse("front_yaw_deg", yaw, "a number of degrees")
    if faces is not None and (isinstance(faces, bool) or not isinstance(faces, int) or faces < 0):
        raise refuse("faces", faces, "a number of faces")
    stem = os.path.splitext(name.rpartition("/")[2])[0]
    caption = str(facts.get("caption", "")) or re.sub(r"[_\W]+", " ", stem).strip()
    category, license_, creator = (str(facts.get(key, "")) for key in ("category", "license", "creator"))
    return Asset(uid, folder / name, source, caption, category, license_, creator, float(yaw), faces=faces)
