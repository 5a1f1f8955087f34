"""Assets: the 3D objects of a folder or of a Sweet Home 3D library, listed with what is known of each."""

from __future__ import annotations

import difflib
import hashlib
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data.files import UserError, atomic_folder, read_json

SUFFIXES = (".glb", ".gltf", ".obj", ".ply")
CATALOG = "PluginFurnitureCatalog.properties"
MEMBER_LIMIT = 256 * 2**20  # bytes of one unpacked file
OBJECT_LIMIT = 1024 * 2**20  # bytes of one unpacked object
CATALOG_LIMIT = 16 * 2**20
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class Asset:
    """One 3D object.  `uid` holds only [A-Za-z0-9_-], unique in its source: it names a folder and a shard key.

    front_yaw_deg: where the object's front faces, counter-clockwise seen from above from the file's front (glTF +Z).
    rotation: 3x3 row-major, in the file's y-up axes, applied before anything else.
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


def list_assets(source: str | Path, cache: str | Path | None = None, names: Sequence[str] = ()) -> list[Asset]:
    """The objects of `source`, a folder of .glb/.gltf/.obj/.ply files (searched in depth) or a .sh3f library, by uid.

    names: keep only these (uid or file name without suffix); cache: where a library is unpacked, beside it by default.
    A folder may hold `assets.json`, {file or uid: {"caption", "category", "license", "creator", "front_yaw_deg"}}.
    """
    source = Path(source).expanduser()
    if not source.exists():
        raise UserError(
            f"source={source} does not exist; give a folder of {' '.join(SUFFIXES)} files or a .sh3f library"
        )
    if source.is_dir():
        assets = select(list_folder(source), names, source)
    elif source.suffix.lower() in {".sh3f", ".zip"}:
        folder = Path(cache) if cache is not None else source.with_name(f".{source.name}.unpacked")
        assets = list_library(source, folder, names)
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
    stems = [str(PurePosixPath(path).with_suffix("")) for path in paths]
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


def list_folder(folder: Path) -> list[Asset]:
    hidden = lambda path: any(part.startswith(".") for part in path.relative_to(folder).parts)  # noqa: E731
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file() and not hidden(p))
    known: dict[str, dict[str, Any]] = {}
    if (folder / "assets.json").exists():
        known = read_json(folder / "assets.json", "assets.json")
    if not isinstance(known, dict) or not all(isinstance(facts, dict) for facts in known.values()):
        raise UserError(f"{folder / 'assets.json'} must be a JSON object of objects, one per file name or uid")
    names = [path.relative_to(folder).as_posix() for path in paths]
    assets = []
    for path, name, uid in zip(paths, names, safe_uids(names), strict=True):
        facts = known.get(name, known.get(uid, {}))
        yaw = facts.get("front_yaw_deg", 0)
        if isinstance(yaw, bool) or not isinstance(yaw, int | float) or not -360 <= yaw <= 360:
            raise UserError(f"{folder / 'assets.json'}: {name}: front_yaw_deg={yaw!r} is not a number of degrees")
        caption = str(facts.get("caption", "")) or re.sub(r"[_\W]+", " ", path.stem).strip()
        category, license_, creator = (str(facts.get(key, "")) for key in ("category", "license", "creator"))
        assets.append(Asset(uid, path, str(folder), caption, category, license_, creator, front_yaw_deg=float(yaw)))
    return assets


# --- Sweet Home 3D libraries: a zip of OBJ, MTL and textures with a catalogue in Java's .properties format ---


def parse_properties(text: str) -> dict[str, str]:
    """Java's .properties: `key=value` lines, `#` and `!` comments, a trailing backslash continues, \\uXXXX escapes."""
    values = {}
    for raw in re.sub(r"\\\r?\n[ \t]*", "", text).splitlines():
        line = raw.strip()
        if not line or line[0] in "#!":
            continue
        key, _, value = line.partition("=")
        value = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), value.strip())
        values[key.strip()] = re.sub(r"\\(.)", r"\1", value)
    return values


def list_library(path: Path, cache: Path, names: Sequence[str] = ()) -> list[Asset]:
    """The objects of a .sh3f library; each one's folder is unpacked into `cache`."""
    try:
        with zipfile.ZipFile(path) as archive:
            facts = read_catalog(archive, path)
            entries = {i: facts[f"model#{i}"].lstrip("/") for i in _catalog_numbers(facts)}
            entries = {i: model for i, model in entries.items() if model.lower().endswith(SUFFIXES)}
            uids = dict(zip(entries, safe_uids([PurePosixPath(m).name for m in entries.values()]), strict=True))
            listed = [
                _library_asset(facts, i, uids[i], cache / uids[i] / PurePosixPath(m).name) for i, m in entries.items()
            ]
            chosen = select(listed, names, path)
            models = {uids[i]: model for i, model in entries.items()}
            for asset in chosen:
                unpack_model(archive, path, models[asset.uid], asset.path.parent)
            return chosen
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise UserError(f"source={path} is not a readable .sh3f library (a zip): {error}; fetch it again") from None


def read_catalog(archive: zipfile.ZipFile, path: Path) -> dict[str, str]:
    try:
        member = archive.getinfo(CATALOG)
    except KeyError:
        raise UserError(f"source={path} holds no {CATALOG}, so it is not a Sweet Home 3D library") from None
    if member.file_size > CATALOG_LIMIT:
        raise UserError(f"source={path}: {CATALOG} has {member.file_size} bytes, more than {CATALOG_LIMIT}")
    return parse_properties(archive.read(member).decode("latin-1"))


def _catalog_numbers(facts: dict[str, str]) -> list[str]:
    return [key.removeprefix("model#") for key in facts if re.fullmatch(r"model#\d+", key)]


def _library_asset(facts: dict[str, str], number: str, uid: str, path: Path) -> Asset:
    rotation = facts.get(f"modelRotation#{number}", "").split()
    return Asset(
        uid=uid,
        path=path,
        source=facts.get("id", ""),
        caption=facts.get(f"name#{number}", uid),
        category=facts.get(f"category#{number}", ""),
        license=facts.get(f"license#{number}", facts.get("license", "")),
        creator=facts.get(f"creator#{number}", ""),
        rotation=tuple(float(x) for x in rotation) if len(rotation) == 9 else IDENTITY,
    )


def unpack_model(archive: zipfile.ZipFile, path: Path, model: str, folder: Path) -> None:
    """Copies the members beside `model` (its OBJ, MTL and textures) flat into `folder`, whole or not at all.

    Only the last part of a member's name is used, so no member can land elsewhere.
    """
    parent = PurePosixPath(model).parent
    members = [m for m in archive.infolist() if not m.is_dir() and PurePosixPath(m.filename).parent == parent]
    if model not in {member.filename for member in members}:
        raise UserError(f"source={path}: its catalogue names {model}, which it does not hold; fetch it again")
    names = [PurePosixPath(member.filename).name for member in members]
    if any(name in {"", ".", ".."} or "\\" in name or "\0" in name for name in names):
        raise UserError(f"source={path}: {parent} holds a file with an unsafe name; this library cannot be used")
    for member in members:
        if member.file_size > MEMBER_LIMIT:
            raise UserError(
                f"source={path}: {member.filename} unpacks to {member.file_size} bytes, over {MEMBER_LIMIT}"
            )
    if sum(member.file_size for member in members) > OBJECT_LIMIT:
        raise UserError(f"source={path}: {parent} unpacks to more than {OBJECT_LIMIT} bytes")
    if folder.is_dir() and all(
        (folder / name).is_file() and (folder / name).stat().st_size == member.file_size
        for name, member in zip(names, members, strict=True)
    ):
        return
    with atomic_folder(folder) as temporary:
        for name, member in zip(names, members, strict=True):
            with archive.open(member) as source, open(temporary / name, "wb") as target:
                shutil.copyfileobj(source, target)  # zipfile stops at file_size, which was checked
