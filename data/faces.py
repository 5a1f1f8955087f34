"""Face counts read from 3D files without loading them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

JSON_LIMIT = 64 * 2**20  # bytes of a glTF's JSON
TEXT_LIMIT = 1024 * 2**20  # bytes of an OBJ file, which has to be read whole
PLY_HEADER_LIMIT = 2**16  # bytes


def count_faces(path: Path) -> int | None:
    """Faces of a file: triangles of a .glb or .gltf, each mesh as often as a node shows it; polygons of a .obj or .ply.

    Of a .glb, .gltf and .ply only the header is read, and believed.  None for what cannot be told cheaply: .fbx,
    damaged files, files beyond the limits above.
    """
    readers = {".glb": _glb, ".gltf": _gltf, ".obj": _obj, ".ply": _ply}
    reader = readers.get(path.suffix.lower())
    try:
        return reader(path) if reader else None
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None  # damaged, which Blender will say in full when it is rendered


def _glb(path: Path) -> int:
    """Header and JSON chunk: https://registry.khronos.org/glTF/specs/2.0/glTF-2.0.html#binary-gltf-layout."""
    with open(path, "rb") as file:
        head = file.read(20)
        length = int.from_bytes(head[12:16], "little")
        if head[:4] != b"glTF" or head[16:20] != b"JSON" or length > JSON_LIMIT:
            raise ValueError("no binary glTF 2.0")
        return _triangles(json.loads(file.read(length)))


def _gltf(path: Path) -> int:
    with open(path, "rb") as file:
        content = file.read(JSON_LIMIT + 1)
    if len(content) > JSON_LIMIT:
        raise ValueError("too large")
    return _triangles(json.loads(content))


def _triangles(gltf: dict[str, Any]) -> int:
    shown = [node["mesh"] for node in gltf.get("nodes", []) if "mesh" in node]
    per_mesh = [_mesh_triangles(gltf, mesh) for mesh in gltf.get("meshes", [])]
    if any(not 0 <= mesh < len(per_mesh) for mesh in shown):
        raise ValueError("a node shows a mesh that does not exist")
    return sum(per_mesh[mesh] for mesh in shown)


def _mesh_triangles(gltf: dict[str, Any], mesh: dict[str, Any]) -> int:
    total = 0
    for primitive in mesh["primitives"]:
        accessor = primitive.get("indices", primitive["attributes"].get("POSITION"))
        count = gltf["accessors"][accessor]["count"]
        if not isinstance(count, int) or count < 0 or accessor < 0:
            raise ValueError("no count")
        mode = primitive.get("mode", 4)
        total += count // 3 if mode == 4 else max(count - 2, 0) if mode in (5, 6) else 0  # strips and fans; else lines
    return total


def _obj(path: Path) -> int:
    if path.stat().st_size > TEXT_LIMIT:
        raise ValueError("too large")
    with open(path, "rb") as file:
        return sum(line.lstrip()[:2] in (b"f ", b"f\t") for line in file)


def _ply(path: Path) -> int:
    """http://paulbourke.net/dataformats/ply/: the header names every element and its number."""
    with open(path, "rb") as file:
        header, mark, _ = file.read(PLY_HEADER_LIMIT).partition(b"end_header")
    found = re.findall(rb"^element[ \t]+face[ \t]+(\d{1,18})[ \t]*\r?$", header, re.MULTILINE)
    if not header.startswith(b"ply") or not mark or len(found) > 1:
        raise ValueError("no PLY")
    count = int(found[0]) if found else 0  # a cloud of points
    if 4 * count > os.path.getsize(path):
        raise ValueError("more faces than the file can hold")
    return count
