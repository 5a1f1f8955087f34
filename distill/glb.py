"""Meshes as files: binary glTF, and OBJ for programs that want it; with a texture, or with colours at the vertices.

Shapes: X vertices, T triangles.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, cast

import numpy as np
import trimesh
from PIL import Image

from data.files import atomic_file

# Our world is z up with the front on +x; glTF is y up with the front on +z: (x, y, z) -> (y, z, x).
TO_GLTF = np.array([[0.0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
# OpenGL's numbers, which glTF uses: linear between texels and mipmaps; charts do not repeat beyond the border.
SAMPLER = {"magFilter": 9729, "minFilter": 9987, "wrapS": 33071, "wrapT": 33071}
MATTE_MTL = "newmtl albedo\nKd 1 1 1\nKs 0 0 0\nillum 1\nmap_Kd {picture}\n"


def srgb_to_linear(colours: np.ndarray) -> np.ndarray:
    """uint8 to uint16, IEC 61966-2-1: eight bits would leave the dark colours a handful of steps."""
    c = colours / 255.0
    return np.round(65535 * np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)).astype(np.uint16)


def linear_to_srgb(colours: np.ndarray) -> np.ndarray:
    """uint16 to uint8, inverse of `srgb_to_linear`; what is given as uint8 has its 255 at 1."""
    c = colours / np.iinfo(colours.dtype).max
    return np.round(255 * np.where(c <= 0.0031308, c * 12.92, 1.055 * c ** (1 / 2.4) - 0.055)).astype(np.uint8)


def picture_of(mesh: trimesh.Trimesh) -> np.ndarray | None:
    """The texture (S, S, 3) uint8, sRGB; None where the mesh has colours at its vertices."""
    material = getattr(mesh.visual, "material", None)
    picture = getattr(material, "baseColorTexture", None)
    return None if picture is None else np.asarray(picture.convert("RGB"))


def in_gltf_axes(mesh: trimesh.Trimesh) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and unit normals (X, 3), y up and the front on +z."""
    turn = TO_GLTF[:3, :3].T
    return np.asarray(mesh.vertices) @ turn, np.asarray(mesh.vertex_normals) @ turn


def _named(name: str) -> Any:
    """Names for what the file holds, and a matte material: glTF's default is a metal, black with nothing to mirror."""

    def change(tree: dict[str, Any]) -> None:
        matte: dict[str, Any] = {"metallicFactor": 0.0, "roughnessFactor": 1.0}
        if "textures" in tree:
            matte["baseColorTexture"] = {"index": 0}
            tree["samplers"], tree["textures"][0]["sampler"] = [SAMPLER], 0
            tree["images"][0]["name"] = f"{name} albedo"
        tree["materials"] = [{"name": f"{name} albedo", "pbrMetallicRoughness": matte, "doubleSided": True}]
        for part in tree["meshes"]:
            part["name"] = name
            for primitive in part["primitives"]:
                primitive["material"] = 0
        for node in tree["nodes"]:
            if "mesh" in node:
                node["name"] = name

    return change


def _fine_colours(colours: np.ndarray) -> Any:
    """Puts colours (X, 4) uint8, sRGB, in place of COLOR_0, linear with 16 bits, for which trimesh knows no type."""
    linear = np.concatenate([srgb_to_linear(colours[:, :3]), colours[:, 3:].astype(np.uint16) * 257], axis=1)

    def change(buffers: dict[Any, bytes], tree: dict[str, Any]) -> None:
        number = tree["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"]
        accessor = list(tree["accessors"].values())[number]
        accessor |= {"componentType": 5123, "max": linear.max(axis=0).tolist(), "min": linear.min(axis=0).tolist()}
        buffers[list(buffers)[accessor["bufferView"]]] = linear.astype("<u2").tobytes()

    return change


def save_glb(path: Path, mesh: trimesh.Trimesh, name: str = "mesh") -> None:
    """Writes the mesh in glTF's axes and colour spaces, and reads it back.

    A texture goes in as PNG, sRGB by the standard; colours at vertices as COLOR_0, linear by the standard; never both,
    since readers multiply them.
    """
    vertices, normals = in_gltf_axes(mesh)
    visual: Any = mesh.visual
    fine = None if picture_of(mesh) is not None else _fine_colours(np.asarray(visual.vertex_colors))
    turned: Any = trimesh.Trimesh(vertices, mesh.faces, vertex_normals=normals, visual=visual, process=False)
    content: bytes = turned.export(
        file_type="glb", include_normals=True, tree_postprocessor=_named(name), buffer_postprocessor=fine
    )
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
    require_same(path, mesh, load_glb(path))


def require_same(path: Path, mesh: trimesh.Trimesh, back: trimesh.Trimesh) -> None:
    """RuntimeError when what was read back from `path` is not what was written."""
    if back.faces.shape != mesh.faces.shape or not np.allclose(back.bounds, mesh.bounds, atol=1e-4):
        raise RuntimeError(f"{path} does not read back as it was written: {back.bounds} instead of {mesh.bounds}")
    written, read = picture_of(mesh), picture_of(back)
    if written is None:
        return
    ours, theirs = (np.asarray(getattr(one.visual, "uv", None)) for one in (mesh, back))
    if read is None or not np.array_equal(written, read) or not np.allclose(ours, theirs, atol=1e-5):
        raise RuntimeError(f"{path} does not read back as it was written: its texture or coordinates differ")


def load_glb(path: Path) -> trimesh.Trimesh:
    """A mesh written by `save_glb`, back in world axes, with its texture or with sRGB vertex colours.

    trimesh.load(..., force="mesh") loses the colours: beside a material it keeps COLOR_0 as an attribute of the visual.
    """
    (mesh,) = trimesh.load_scene(path, process=False).geometry.values()
    visual: Any = mesh.visual
    if picture_of(mesh) is None:
        linear = np.asarray(visual.vertex_attributes["color"])
        opaque = (linear[:, 3:] / np.iinfo(linear.dtype).max * 255).astype(np.uint8)
        visual = trimesh.visual.ColorVisuals(
            vertex_colors=np.concatenate([linear_to_srgb(linear[:, :3]), opaque], axis=1)
        )
    back = TO_GLTF[:3, :3]
    return trimesh.Trimesh(
        mesh.vertices @ back, mesh.faces, vertex_normals=mesh.vertex_normals @ back, visual=visual, process=False
    )


def save_obj(path: Path, mesh: trimesh.Trimesh, name: str = "mesh") -> None:
    """Writes `path` and, for a textured mesh, an MTL and a PNG of the same name beside it; axes as in glTF.

    Positions are there once, so that programs see a closed surface in spite of the charts.  Colours at vertices follow
    the positions, sRGB: no standard, but what Blender and MeshLab read.
    """
    vertices, normals = in_gltf_axes(mesh)
    places, place = np.unique(vertices, axis=0, return_inverse=True)
    picture, visual = picture_of(mesh), cast(Any, mesh.visual)
    if picture is None:
        colours = np.empty((len(places), 3))
        colours[place] = np.asarray(visual.vertex_colors)[:, :3] / 255
        parts = [f"o {name}\n", _lines("v", "%.7g", np.concatenate([places, colours], axis=1))]
        corners = [place[mesh.faces], mesh.faces]
    else:
        parts = [f"mtllib {path.with_suffix('.mtl').name}\no {name}\n", _lines("v", "%.7g", places)]
        parts += [_lines("vt", "%.7g", np.asarray(visual.uv)), "usemtl albedo\n"]
        corners = [place[mesh.faces], mesh.faces, mesh.faces]
        with atomic_file(path.with_suffix(".png")) as temporary:
            Image.fromarray(picture).save(temporary)
        with atomic_file(path.with_suffix(".mtl")) as temporary:
            temporary.write_text(MATTE_MTL.format(picture=path.with_suffix(".png").name))
    parts.append(_lines("vn", "%.7g", normals))
    numbers = np.stack(corners, axis=-1) + 1  # (T, 3, 2 or 3): position, texture coordinate, normal
    joined = "%d//%d" if picture is None else "%d/%d/%d"
    parts.append(_lines("f", joined, numbers.reshape(len(numbers), -1), per_row=3))
    with atomic_file(path) as temporary:
        temporary.write_text("".join(parts))


def _lines(word: str, item: str, values: np.ndarray, per_row: int | None = None) -> str:
    """A line a row: the word and `per_row` items, which take the row's numbers in turn; one a number by default."""
    file = io.StringIO()
    np.savetxt(file, values, fmt=" ".join([word, *[item] * (per_row or values.shape[1])]))
    return file.getvalue()
