"""Sweet Home 3D libraries: a zip of OBJ, MTL and textures with a catalogue in Java's .properties format."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from data.assets import IDENTITY, SUFFIXES, Asset, safe_uids, select
from data.files import UserError, atomic_folder

CATALOG = "PluginFurnitureCatalog.properties"
MEMBER_LIMIT = 256 * 2**20  # bytes of one unpacked file
OBJECT_LIMIT = 1024 * 2**20  # bytes of one unpacked object
CATALOG_LIMIT = 16 * 2**20


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
