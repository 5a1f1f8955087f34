"""The files as others read them: the JSON chunk by hand, trimesh, and OBJ line by line."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image

from distill import report
from distill.glb import TO_GLTF, load_glb, picture_of, save_glb, save_obj


def bar() -> trimesh.Trimesh:
    """Longest along our +x, its front, and off the origin; its picture red on top and blue below."""
    box = trimesh.creation.box(extents=(0.8, 0.1, 0.2))
    box.apply_translation((0.1, 0.02, 0.3))
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    picture[:32, :, 0] = picture[32:, :, 2] = 220
    uv = np.stack([np.linspace(0.1, 0.9, 8), (box.vertices[:, 2] - 0.2) / 0.2], axis=1)
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(picture))
    box.visual = trimesh.visual.TextureVisuals(uv=uv, material=material)
    return box


def chunks(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    magic, version, length = struct.unpack_from("<4sII", content)
    assert magic == b"glTF" and version == 2 and length == len(content)
    (size,) = struct.unpack_from("<I", content, 12)
    return json.loads(content[20 : 20 + size]), content[28 + size :]


def values(tree: dict[str, Any], binary: bytes, number: int) -> np.ndarray:
    accessor = tree["accessors"][number]
    view = tree["bufferViews"][accessor["bufferView"]]
    kind = {5126: np.float32, 5125: np.uint32, 5123: np.uint16}[accessor["componentType"]]
    width = {"VEC3": 3, "VEC2": 2, "SCALAR": 1}[accessor["type"]]
    start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
    return np.frombuffer(binary, kind, accessor["count"] * width, start).reshape(-1, width)


def test_textured_glb_by_hand(tmp_path: Path) -> None:
    box = bar()
    save_glb(tmp_path / "bar.glb", box, "fork lift")
    tree, binary = chunks(tmp_path / "bar.glb")
    (part,), (material,) = tree["meshes"], tree["materials"]
    (primitive,) = part["primitives"]
    assert part["name"] == "fork lift" and material["name"] == "fork lift albedo" and material["doubleSided"]
    assert any(node.get("name") == "fork lift" and "mesh" in node for node in tree["nodes"])
    assert material["pbrMetallicRoughness"] == {
        "metallicFactor": 0.0, "roughnessFactor": 1.0, "baseColorTexture": {"index": 0}}  # fmt: skip
    assert set(primitive["attributes"]) == {"POSITION", "NORMAL", "TEXCOORD_0"}  # COLOR_0 would darken the texture
    assert tree["asset"]["version"] == "2.0" and not tree.get("extensionsRequired")
    (image,) = tree["images"]
    view = tree["bufferViews"][image["bufferView"]]
    start = view.get("byteOffset", 0)
    assert image["mimeType"] == "image/png"
    picture = np.asarray(Image.open(io.BytesIO(binary[start : start + view["byteLength"]])).convert("RGB"))
    assert np.array_equal(picture, picture_of(box))
    places, normals, uv = (
        values(tree, binary, primitive["attributes"][n]) for n in ("POSITION", "NORMAL", "TEXCOORD_0")
    )
    assert np.allclose(np.ptp(places, axis=0), (0.1, 0.2, 0.8), atol=1e-6)  # y up, front +z
    assert np.allclose(places, box.vertices @ TO_GLTF[:3, :3].T, atol=1e-6)
    assert np.allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
    assert ((places - places.mean(axis=0)) * normals > 0).all()  # outwards
    assert uv.min() >= 0 and uv.max() <= 1
    top = uv[places[:, 1] > places[:, 1].mean()]  # v runs downwards in glTF: the top of the bar shows the first rows
    assert np.allclose(top[:, 1], 0, atol=1e-6)


def test_read_back_in_world_axes_with_texture_or_colours(tmp_path: Path) -> None:
    box = bar()
    save_glb(tmp_path / "bar.glb", box)
    back = load_glb(tmp_path / "bar.glb")
    assert np.allclose(back.vertices, box.vertices, atol=1e-6) and np.array_equal(back.faces, box.faces)
    assert np.allclose(back.visual.uv, box.visual.uv, atol=1e-6)
    assert np.array_equal(picture_of(back), picture_of(box))
    assert np.allclose(back.vertex_normals, box.vertex_normals, atol=1e-5)
    box.visual = trimesh.visual.ColorVisuals(box, vertex_colors=np.tile(np.uint8([[200, 100, 50, 255]]), (8, 1)))
    save_glb(tmp_path / "plain.glb", box, "plain")
    back = load_glb(tmp_path / "plain.glb")
    assert picture_of(back) is None
    assert (back.visual.vertex_colors == [200, 100, 50, 255]).all()
    tree, _ = chunks(tmp_path / "plain.glb")
    assert "COLOR_0" in tree["meshes"][0]["primitives"][0]["attributes"] and "textures" not in tree


def test_colours_at_vertices_are_linear_with_16_bits(tmp_path: Path) -> None:
    """All 256 shades come back, the dark ones too; the file says what it holds, and viewers of ours read it."""
    shades = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    corners = np.random.default_rng(0).random((256, 3))
    mesh = trimesh.Trimesh(corners, np.arange(254)[:, None] + [0, 1, 2], process=False)
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=shades)
    save_glb(tmp_path / "grey.glb", mesh)
    tree, binary = chunks(tmp_path / "grey.glb")
    accessor = tree["accessors"][tree["meshes"][0]["primitives"][0]["attributes"]["COLOR_0"]]
    assert (accessor["componentType"], accessor["normalized"], accessor["type"]) == (5123, True, "VEC4")
    view = tree["bufferViews"][accessor["bufferView"]]
    assert view["byteLength"] == 256 * 8 and view["byteOffset"] % 4 == 0
    linear = np.frombuffer(binary, "<u2", 1024, view["byteOffset"]).reshape(256, 4)
    assert linear[128, 0] == round(65535 * ((128 / 255 + 0.055) / 1.055) ** 2.4) and (linear[:, 3] == 65535).all()
    assert accessor["max"] == linear.max(axis=0).tolist() and accessor["min"] == linear.min(axis=0).tolist()
    assert np.array_equal(load_glb(tmp_path / "grey.glb").visual.vertex_colors[:, :3], shades)
    assert "254 triangles, 256 vertices" in report.glb_viewer(tmp_path / "grey.glb", "greys")


def test_names_that_could_collide_are_kept(tmp_path: Path) -> None:
    for name in ("world", "", 'Grüße/"x"'):
        save_glb(tmp_path / "a.glb", bar(), name)
        assert chunks(tmp_path / "a.glb")[0]["meshes"][0]["name"] == name


def test_the_report_shows_a_textured_mesh(tmp_path: Path) -> None:
    """The viewer draws baseColorTexture from the file's own bytes; nothing is fetched."""
    save_glb(tmp_path / "bar.glb", bar())
    assert "12 triangles, 8 vertices" in report.glb_viewer(tmp_path / "bar.glb", "a bar")


@pytest.mark.parametrize("picture", [True, False])
def test_obj_loads_with_its_material(tmp_path: Path, picture: bool) -> None:
    box = bar()
    if not picture:
        box.visual = trimesh.visual.ColorVisuals(box, vertex_colors=np.tile(np.uint8([[200, 100, 50, 255]]), (8, 1)))
    save_obj(tmp_path / "bar.obj", box, "bar")
    assert sorted(p.name for p in tmp_path.iterdir()) == (["bar.mtl", "bar.obj", "bar.png"] if picture else ["bar.obj"])
    text = (tmp_path / "bar.obj").read_text()
    assert text.count("\nv ") == 8 and text.count("\nf ") == 12
    back = trimesh.load(tmp_path / "bar.obj", force="mesh", process=False)
    assert np.allclose(back.extents, (0.1, 0.2, 0.8), atol=1e-6) and back.volume == pytest.approx(box.volume)
    if picture:
        assert np.array_equal(np.asarray(back.visual.material.image.convert("RGB")), picture_of(box))
        top = back.vertices[:, 1] > back.vertices[:, 1].mean()
        assert np.allclose(back.visual.uv[top, 1], 1, atol=1e-6)  # v runs upwards in OBJ
    else:
        assert (back.visual.vertex_colors[:, :3] == [200, 100, 50]).all()
