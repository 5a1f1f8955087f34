"""Objaverse 1.0 (arXiv 2212.08051): 798,759 objects in the folder that its `objaverse` package downloads to.

    ~/.objaverse/hf-objaverse-v1/  object-paths.json.gz      {uid: "glbs/000-023/<uid>.glb"}
                                   metadata/000-023.json.gz  {uid: {"name", "license", "user", "faceCount", ...}}
                                   lvis-annotations.json.gz  {category: [uid, ...]}, of 46,207 of the objects
                                   glbs/000-023/<uid>.glb

`OBJAVERSE_HOME` names another folder than ~/.objaverse.  The package (`pip install '.[objaverse]'`) fetches what is
missing; without it, or with HF_HUB_OFFLINE=1, only what the folder holds is listed.  Nothing in the folder is trusted.
"""

from __future__ import annotations

import collections
import contextlib
import gc
import gzip
import importlib.util
import json
import os
import re
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.error import HTTPError

from data.assets import OBJAVERSE, Asset
from data.files import UserError, read_json
from data.processes import parallel
from data.progress import Progress

SOURCE = "Objaverse 1.0"
OBJECT_PATH = re.compile(r"glbs/(\d{3}-\d{3})/([A-Za-z0-9_-]{1,90})\.glb")
JSON_LIMIT = 2**30  # bytes of one unpacked .json.gz; the largest, object-paths.json.gz, has about 80 MB
UIDS_LIMIT = 2**30  # bytes of a list of UIDs
AHEAD = 64  # objects fetched before they are asked for
OFFLINE_AFTER = 16  # objects in a row that the network did not give
TRIES = 3
TIMEOUT_S = 60.0  # of a connection that gives nothing
# Sketchfab's names of the Creative Commons licences, all version 4.0 (https://sketchfab.com/licenses).
LICENSES = {
    "cc0": "CC0-1.0", "by": "CC-BY-4.0", "by-sa": "CC-BY-SA-4.0", "by-nd": "CC-BY-ND-4.0", "by-nc": "CC-BY-NC-4.0",
    "by-nc-sa": "CC-BY-NC-SA-4.0", "by-nc-nd": "CC-BY-NC-ND-4.0",
}  # fmt: skip
INSTALL = "pip install '.[objaverse]' where there is a network, or name the download folder in OBJAVERSE_HOME"


def download_folder() -> Path:
    return Path(os.environ.get("OBJAVERSE_HOME") or "~/.objaverse").expanduser() / "hf-objaverse-v1"


def list_objaverse(uids_file: Path | None = None, names: Sequence[str] = ()) -> list[Asset]:
    """The objects of Objaverse, or those in `uids_file`, or those in `names` of these, sorted by uid.

    Where nothing can be fetched, those whose GLB is not in the folder are left out and their number is said; else
    `Downloads` makes the files be there.  UserError for damaged files, and for UIDs that are not in Objaverse.
    """
    root = download_folder()
    given = read_uids(uids_file) if uids_file else []
    paths = read_object_paths(root)
    for uid in given:
        if uid not in paths:
            raise UserError(f"source={OBJAVERSE}:{uids_file}: {uid!r} is no UID of Objaverse 1.0; remove it")
    chosen = set(given) or paths.keys()
    for name in names:
        if name not in chosen:
            raise UserError(f"names: {name!r} is no UID of source={OBJAVERSE}:{uids_file or ''}; remove it")
    uids = sorted(set(names) or chosen)
    if not can_fetch():
        there = files_there(root)
        listed, uids = len(uids), [uid for uid in uids if paths[uid] in there]
        if len(uids) < listed:
            say(f"{listed - len(uids)} of {listed} objects are not in {root} and are left out; {INSTALL}")
    if not uids:
        raise UserError(f"source={OBJAVERSE}: {root} holds none of the objects asked for; {INSTALL}")
    folders: dict[str, list[str]] = {}
    for uid in uids:
        folders.setdefault(paths[uid].split("/")[1], []).append(uid)
    fetch_metadata(root, {folder: inside[0] for folder, inside in folders.items()})
    return sorted(read_metadata(root, folders, paths), key=lambda asset: asset.uid)


def read_metadata(root: Path, folders: dict[str, list[str]], paths: dict[str, str]) -> list[Asset]:
    """The objects of `folders`, {folder: uids}, with what the metadata says of them, read in parallel."""
    lvis = read_lvis(root)
    tasks = {}
    for number, (folder, inside) in enumerate(sorted(folders.items())):
        categories = {uid: lvis[uid] for uid in inside if uid in lvis}
        tasks[number] = (root, folder, {uid: paths[uid] for uid in inside}, categories)
    assets, unknown = [], 0
    several = len(tasks) > 4  # else starting processes costs more than it saves
    with Progress("objaverse metadata", len(tasks), "file", show=several) as progress:
        for _, (read, without) in parallel(read_metadata_file, tasks, 0 if several else 1):
            assets += read
            unknown += without
            progress.update()
    if unknown:
        say(f"of {unknown} of {len(assets)} objects {root}/metadata says nothing: licence and caption are unknown")
    return assets


def read_metadata_file(
    root: Path, folder: str, paths: dict[str, str], lvis: dict[str, list[str]]
) -> tuple[list[Asset], int]:
    """The objects of one folder, {uid: path below `root`}; and the number of those that its file does not know."""
    collecting = gc.isenabled()
    gc.disable()  # the collector would walk the file's million values again and again: a third of the time
    try:
        path = root / "metadata" / f"{folder}.json.gz"
        facts = read_gz_json(path) if path.exists() else {}
        assets = [
            _asset(uid, root / place, path, facts.get(uid, {}), lvis.get(uid, [])) for uid, place in paths.items()
        ]
        return assets, sum(uid not in facts for uid in paths)
    finally:
        if collecting:
            gc.enable()


def _asset(uid: str, path: Path, file: Path, facts: Any, lvis: list[str]) -> Asset:
    """`facts`: of one object, as Sketchfab's API gives them; null stands for unknown.  UserError for other types."""

    def typed(value: Any, key: str, kind: type) -> Any:
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise UserError(f"{file}: {uid}: {key}={str(value)[:80]!r} is no {kind.__name__}; fetch the file again")
        return kind() if value is None else value

    facts = typed(facts, "entry", dict)
    user = typed(facts.get("user"), "user", dict)
    categories = [typed(entry, "categories", dict) for entry in typed(facts.get("categories"), "categories", list)]
    names = [typed(entry.get("name"), "categories.name", str) for entry in categories]
    license_ = typed(facts.get("license"), "license", str)
    faces = facts.get("faceCount")
    return Asset(
        uid=uid,
        path=path,
        source=SOURCE,
        caption=_one_line(typed(facts.get("name"), "name", str)),
        category="; ".join(dict.fromkeys(_one_line(name).replace(";", ",") for name in (*lvis, *names) if name)),
        license=LICENSES.get(license_.strip().lower(), _one_line(license_)),
        creator=_one_line(typed(user.get("displayName") or user.get("username"), "user", str)),
        faces=None if faces is None else max(typed(faces, "faceCount", int), 0),
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())[:1000]


# --- what the folder holds ---


def read_uids(path: Path) -> list[str]:
    """UIDs of a .json list, or of a text file with one a line, where `#` begins a comment."""
    if path.is_file() and path.stat().st_size > UIDS_LIMIT:
        raise UserError(f"source={OBJAVERSE}:{path} has more than {UIDS_LIMIT} bytes and is no list of UIDs")
    if path.suffix == ".json":
        uids = read_json(path, f"source={OBJAVERSE}")
    else:
        try:
            uids = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"source={OBJAVERSE}:{path} cannot be read ({error}); name a list of UIDs") from None
        uids = [uid for uid in uids if uid]
    if not isinstance(uids, list) or not uids or not all(isinstance(uid, str) for uid in uids):
        raise UserError(f"source={OBJAVERSE}:{path} must hold UIDs: one a line, or a JSON list of strings")
    return uids


def read_gz_json(path: Path) -> dict[str, Any]:
    """A JSON object from a .json.gz of at most JSON_LIMIT bytes unpacked.  UserError naming the file otherwise."""
    try:
        with gzip.open(path, "rb") as file:
            content = file.read(JSON_LIMIT + 1)
        if len(content) > JSON_LIMIT:
            raise UserError(f"{path} unpacks to more than {JSON_LIMIT} bytes; it is not Objaverse's")
        value = json.loads(content)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, so that it is fetched again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object; delete it and fetch it again")
    return value


def read_object_paths(root: Path) -> dict[str, str]:
    """{uid: path below `root`}, each of which is known not to leave the folder."""
    path = root / "object-paths.json.gz"
    if not path.exists() and can_fetch():
        with package(root) as objaverse:
            objaverse.load_uids()
    if not path.exists():
        raise UserError(f"source={OBJAVERSE}: {path} does not exist; {INSTALL}")
    paths = read_gz_json(path)
    for uid, place in paths.items():
        match = OBJECT_PATH.fullmatch(place) if isinstance(place, str) else None
        if match is None or match[2] != uid:
            raise UserError(f"{path}: {uid!r}: {place!r} is not glbs/NNN-NNN/<uid>.glb; delete it and fetch it again")
    return paths


def read_lvis(root: Path) -> dict[str, list[str]]:
    """{uid: its LVIS categories}; empty where the folder has no such file and it cannot be fetched."""
    path = root / "lvis-annotations.json.gz"
    if not path.exists() and can_fetch():
        with package(root) as objaverse:
            objaverse.load_lvis_annotations()
    if not path.exists():
        say(f"{path} does not exist: LVIS categories are unknown")
        return {}
    categories: dict[str, list[str]] = {}
    for category, uids in read_gz_json(path).items():
        if not isinstance(uids, list) or not all(isinstance(uid, str) for uid in uids):
            raise UserError(f"{path}: {category!r} is no list of UIDs; delete it and fetch it again")
        for uid in uids:
            categories.setdefault(uid, []).append(category)
    return categories


def files_there(root: Path) -> set[str]:
    """Paths below `root` of the GLBs in it: one directory read a folder, no `stat` a file."""
    folders = sorted((root / "glbs").iterdir()) if (root / "glbs").is_dir() else []
    return {f"glbs/{folder.name}/{name}" for folder in folders if folder.is_dir() for name in os.listdir(folder)}


# --- what has to be fetched ---


def can_fetch() -> bool:
    return importlib.util.find_spec("objaverse") is not None and os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0")


@contextlib.contextmanager
def package(root: Path) -> Iterator[Any]:
    """The `objaverse` package, downloading to `root`; UserError when what it is asked for cannot be fetched."""
    import objaverse

    before, timeout = objaverse._VERSIONED_PATH, socket.getdefaulttimeout()
    objaverse._VERSIONED_PATH = str(root)  # it has no other way to name a folder
    objaverse.print = lambda *_, **__: None  # it prints a line for each object; this hides the built-in from it
    socket.setdefaulttimeout(TIMEOUT_S)  # it would wait for ever
    try:
        yield objaverse
    except OSError as error:  # urllib's errors are of this kind
        raise no_network(error) from None
    finally:
        objaverse._VERSIONED_PATH = before
        del objaverse.print
        socket.setdefaulttimeout(timeout)


def fetch_metadata(root: Path, example: dict[str, str]) -> None:
    """Fetches the missing of metadata/<folder>.json.gz.  example: {folder: the uid of one object in it}."""
    missing = {folder: uid for folder, uid in example.items() if not (root / f"metadata/{folder}.json.gz").exists()}
    if not missing or not can_fetch():
        return
    with Progress("fetching metadata", len(missing), "file") as progress:
        for folder, uid in missing.items():
            try:
                with package(root) as objaverse:
                    objaverse.load_annotations([uid])
            except BaseException:  # the package writes in place: half a file must not be taken for one
                (root / f"metadata/{folder}.json.gz").unlink(missing_ok=True)
                raise
            progress.update()


@dataclass(frozen=True)
class Fetched:
    asset: Asset
    is_new: bool = False  # it was not there before
    error: OSError | None = None  # why it cannot be had


class Downloads:
    """Iterates over `assets` as `Fetched`, in their order, fetching those of Objaverse that are missing.

    Threads may share it; they fetch up to AHEAD objects before they are asked for, so that the disk need not hold all.
    UserError where nothing can be fetched, or when the network gives nothing OFFLINE_AFTER times in a row.
    """

    def __init__(self, assets: Sequence[Asset], threads: int = 8):
        self._left = iter(assets)
        self._waiting: collections.deque[tuple[Asset, Future[OSError | None] | None]] = collections.deque()
        self._lock, self._failures = threading.Lock(), 0
        root = download_folder()
        there = files_there(root) if any(asset.source == SOURCE for asset in assets) else set()
        missing = [asset for asset in assets if asset.source == SOURCE and _place(asset) not in there]
        self.missing = {asset.uid for asset in missing}
        if missing and not can_fetch():
            raise UserError(
                f"source={OBJAVERSE}: {missing[0].path} and {len(missing) - 1} more are not there; {INSTALL}"
            )
        if missing:
            say(f"fetching {len(missing)} objects to {root} as they are needed")
        self._context = package(root) if missing else contextlib.nullcontext()
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> Self:
        self._objaverse = self._context.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)  # a download under way is waited for
        self._context.__exit__(None, None, None)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Fetched:
        with self._lock:
            while len(self._waiting) < AHEAD and (asset := next(self._left, None)) is not None:
                missing = asset.uid in self.missing
                self._waiting.append((asset, self._pool.submit(_download, self._objaverse, asset) if missing else None))
            if not self._waiting:
                raise StopIteration
            asset, future = self._waiting.popleft()
        if future is None:
            return Fetched(asset)
        error = future.result()
        with self._lock:
            self._failures = self._failures + 1 if error is not None and not is_refusal(error) else 0
            if self._failures >= min(OFFLINE_AFTER, len(self.missing)):
                raise no_network(error)
        return Fetched(asset, error is None, error)


def _place(asset: Asset) -> str:
    return f"glbs/{asset.path.parent.name}/{asset.path.name}"


def _download(objaverse: Any, asset: Asset) -> OSError | None:
    """Through the package's function for one object, which writes beside and renames.

    Its `load_objects` gives up all that is left at the first failure, and its pool of processes waits for ever when an
    error cannot be pickled.
    """
    for attempt in range(TRIES):
        try:
            objaverse._download_object(asset.uid, _place(asset), 0, 0)
            return None
        except OSError as failed:  # urllib's errors are of this kind
            error = failed
            if is_refusal(error):
                break
            time.sleep(2**attempt)
    return error


def no_network(error: OSError | None) -> UserError:
    return UserError(
        f"source={OBJAVERSE}: the network gives nothing ({error}); try again, or set HF_HUB_OFFLINE=1 to use what "
        f"{download_folder()} holds"
    )


def is_refusal(error: OSError) -> bool:
    """Whether the server answered that it does not give this object; anything else may pass."""
    return isinstance(error, HTTPError) and error.code in (401, 403, 404, 410)


def say(message: str) -> None:
    print(f"objaverse: {message}", file=sys.stderr, flush=True)
