"""Many objects, some of them bad, on many processes: limits, verdicts that hold, parts of an array, really killed."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image

from data.assets import list_assets
from data.blender_pool import BlenderProcess, ObjectRejected, check_blender, find_blender, script_command
from data.files import UserError
from data.render_ledger import LEDGER
from data.rendering import RenderConfig, render_all, render_object

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "data" / "blender_worker.py"
SMALL = {"resolution": 32, "samples": 1, "rings": 1, "views_per_ring": 4, "references": 1, "eval_views": 0}
COLOURS = {"a": (200, 30, 30), "b": (30, 200, 30), "e": (30, 30, 200), "f": (200, 200, 30)}  # two in each part of two


def config(source: Path, out: Path, **changes: Any) -> RenderConfig:
    return RenderConfig(**(SMALL | {"source": str(source), "out": str(out), "processes": 1} | changes))


@pytest.fixture(scope="module")
def cones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four cones."""
    folder = tmp_path_factory.mktemp("cones")
    for name, colour in COLOURS.items():
        mesh = trimesh.creation.cone(0.5, 1)
        mesh.visual.face_colors = np.tile([*colour, 255], (len(mesh.faces), 1))
        mesh.export(folder / f"{name}.glb")
    return folder


def verdicts(out: Path) -> list[tuple[str, str]]:
    paths = sorted(out.glob("render_ledger*.jsonl"))
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return [(line["uid"], line["status"]) for line in lines]


def pictures(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.glob("[!.]*/*"))}


def bomb(path: Path, side: int = 20000) -> None:
    """A GLB of one triangle whose texture of `side` x `side` one-bit pixels takes kilobytes packed and GiB unpacked."""
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(b"\0" + bytes(side // 8)) for _ in range(side)) + packer.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">2I5B", side, side, 1, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    points = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], dtype="<f4").tobytes()
    places = np.array([[0, 0], [1, 0], [0, 1]], dtype="<f4").tobytes()
    binary = points + places + png + bytes(-len(png) % 4)
    gltf = {
        "asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "TEXCOORD_0": 1}, "material": 0}]}],
        "materials": [{"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}],
        "textures": [{"source": 0}], "images": [{"bufferView": 2, "mimeType": "image/png"}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3", "min": [0, 0, 0], "max": [1, 1, 0]},
            {"bufferView": 1, "componentType": 5126, "count": 3, "type": "VEC2"},
        ],
        "bufferViews": [
            {"buffer": 0, "byteOffset": 0, "byteLength": 36}, {"buffer": 0, "byteOffset": 36, "byteLength": 24},
            {"buffer": 0, "byteOffset": 60, "byteLength": len(png)},
        ],
        "buffers": [{"byteLength": len(binary)}],
    }  # fmt: skip
    text = json.dumps(gltf).encode()
    text += b" " * (-len(text) % 4)
    body = struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary
    path.write_bytes(struct.pack("<4s2I", b"glTF", 2, 12 + len(body)) + body)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_object_that_takes_too_much_memory_fails_alone(cones: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "z.glb").write_bytes((cones / "a.glb").read_bytes())
    bomb(tmp_path / "in" / "bomb.glb")
    assert (tmp_path / "in" / "bomb.glb").stat().st_size < 200_000
    render_all(config(tmp_path / "in", tmp_path / "out", object_limit_gb=1))
    assert verdicts(tmp_path / "out") == [("bomb", "failed"), ("z", "rendered")]
    assert "more than object_limit_gb=1" in (tmp_path / "out" / LEDGER).read_text()


def test_an_object_with_too_many_faces_is_rejected(cones: Path, tmp_path: Path) -> None:
    (asset,) = list_assets(cones, names=["a"])
    blender = BlenderProcess(find_blender())
    settings = config(cones, tmp_path)
    try:
        with pytest.raises(ObjectRejected, match=r"has 64 faces, outside any..63"):
            render_object(settings, asset, "", "CPU", blender, lambda: None, [None, 63])
        with pytest.raises(ObjectRejected, match=r"has 64 faces, outside 65..100"):
            render_object(settings, asset, "", "CPU", blender, lambda: None, [65, 100])
        assert not list(tmp_path.glob("a"))
        render_object(settings, asset, "", "CPU", blender, lambda: None, [64, 64])
    finally:
        blender.close()
    assert json.loads((tmp_path / "a" / "meta.json").read_text())["faces"] == 64


@pytest.mark.slow
def test_verdicts_hold_until_settings_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ball that just fits touches the border of pictures of eight pixels."""
    (tmp_path / "in").mkdir()
    trimesh.creation.icosphere(subdivisions=3).export(tmp_path / "in" / "ball.glb")
    (tmp_path / "in" / "broken.glb").write_bytes(b"glTF" + bytes(50))
    coarse = {"resolution": 8, "fov_deg": [40, 40], "framing": [0.54, 0.54], "samples": 4}
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no object could be rendered"):
        render_all(config(tmp_path / "in", out, **coarse))
    assert verdicts(out) == [("ball", "rejected"), ("broken", "failed")]
    assert "touches the border of 000.png" in (out / LEDGER).read_text() and not (out / "ball").exists()
    with pytest.raises(UserError):
        render_all(config(tmp_path / "in", out, **coarse))
    assert "1 failed and 1 rejected before with the same settings" in capsys.readouterr().err
    assert len(verdicts(out)) == 2
    render_all(config(tmp_path / "in", out, **coarse, reject_border=False))  # a limit changed: both tried
    assert verdicts(out)[2:] == [("ball", "rendered"), ("broken", "failed")]
    render_all(config(tmp_path / "in", out, **coarse, reject_border=False, retry=True))  # what is rendered is kept
    assert verdicts(out)[4:] == [("broken", "failed")]
    with pytest.raises(UserError):
        render_all(config(tmp_path / "in", out, **(coarse | {"samples": 5})))
    assert verdicts(out)[5:] == [("ball", "rejected"), ("broken", "failed")]
    assert not (out / "ball").exists()  # pictures of the former settings are not left among the new ones
    page = (out / "contact_sheet.html").read_text()
    assert "touches the border" in page and "<td>broken" in page and "<img" not in page


def test_fbx_is_read(tmp_path: Path) -> None:
    """A red box towards the front, as Blender exports it, is nearer to a camera in front than a green one behind it."""
    script = tmp_path / "export.py"
    script.write_text(
        "import bpy, sys\n"
        "bpy.ops.wm.read_factory_settings(use_empty=True)\n"
        "for name, y, colour in (('red', -1, (1, 0, 0, 1)), ('green', 1, (0, 1, 0, 1))):\n"
        "    bpy.ops.mesh.primitive_cube_add(size=1, location=(0, y, 0))\n"
        "    material = bpy.data.materials.new(name)\n"
        "    material.use_nodes = True\n"
        "    material.node_tree.nodes['Principled BSDF'].inputs['Base Color'].default_value = colour\n"
        "    bpy.context.object.data.materials.append(material)\n"
        "bpy.ops.export_scene.fbx(filepath=sys.argv[-1])\n"
    )
    blender = find_blender()
    subprocess.run([*script_command(blender, script), str(tmp_path / "b.fbx")], check=True, capture_output=True)
    (tmp_path / "views").mkdir()
    view = {"c2w": [[0, 0, 1, 3], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], "fov_deg": 40}  # on +x, the front
    back = {"c2w": [[0, 0, -1, -3], [-1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], "fov_deg": 40}
    job = {
        "uid": "b", "path": str(tmp_path / "b.fbx"), "front_yaw_deg": 0, "rotation": [1, 0, 0, 0, 1, 0, 0, 0, 1],
        "faces": [None, None], "device": "CPU", "resolution": 32, "samples": 4, "denoise": False, "max_bounces": 2,
        "diffuse_bounces": 1, "glossy_bounces": 1, "light": {"sky": 1, "suns": []}, "depth_scale": 1,
        "folder": str(tmp_path / "views"), "views": [view | {"file": "0.png"}, back | {"file": "1.png"}],
    }  # fmt: skip
    (tmp_path / "jobs").write_text(json.dumps(job) + "\n")
    command = [*script_command(blender, WORKER), str(tmp_path / "results"), str(tmp_path / "jobs")]
    subprocess.run(command, check=True, capture_output=True)
    last = json.loads((tmp_path / "results").read_text().splitlines()[-1])
    assert last == {"uid": "b", "status": "done", "faces": 12}, last
    for name, channel in (("0.png", 0), ("1.png", 1)):
        pixel = np.asarray(Image.open(tmp_path / "views" / name))[16, 16].astype(int)
        assert pixel[3] > 200 and pixel[channel] > 100 + pixel[1 - channel], (name, pixel)


@pytest.mark.slow
def test_a_gpu_that_is_not_there_is_said_before_any_work(cones: Path, tmp_path: Path) -> None:
    version, device = check_blender(find_blender(), "cpu")
    assert version.startswith("blender ") and device == "CPU"
    if check_blender(find_blender())[1] != "CPU":
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=r"device=gpu: Cycles finds no GPU here .*; give device=cpu"):
        render_all(config(cones, tmp_path / "out", device="gpu"))
    assert not list((tmp_path / "out").iterdir())


def start(source: Path, out: Path, *more: str, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    words = [f"{key}={value}" for key, value in SMALL.items()]
    words += [f"source={source}", f"out={out}", "processes=1", *more]
    return subprocess.Popen(
        [sys.executable, "data/render.py", *words],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        env=os.environ | (environment or {}),
    )


def wait_for(what: Callable[[], Any], limit_s: float = 120) -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := what()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
    return found


@pytest.mark.slow
def test_tasks_of_an_array_share_a_folder(cones: Path, tmp_path: Path) -> None:
    """Two tasks at the same time, one of them killed and repeated, leave what one process would."""
    out = tmp_path / "out"
    arrays = [
        {"SLURM_ARRAY_TASK_ID": f"{i}", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "2"} for i in (1, 2)
    ]
    tasks = [start(cones, out, "views_per_ring=40", environment=array) for array in arrays]
    wait_for(lambda: list(out.glob(".?.*.tmp/001.png")))
    tasks[0].kill()
    tasks[0].wait()
    again = start(cones, out, "views_per_ring=40", environment=arrays[0])
    for task in (tasks[1], again):
        _, words = task.communicate(timeout=300)
        assert task.returncode == 0, words
    assert (out / LEDGER.replace(".", "-00000.")).exists() and (out / LEDGER.replace(".", "-00001.")).exists()
    render_all(config(cones, tmp_path / "alone", views_per_ring=40))
    assert pictures(out) == pictures(tmp_path / "alone")
    before = verdicts(out)
    render_all(config(cones, out, views_per_ring=40))  # one process of all objects takes them over
    assert verdicts(out) == before and not list(out.glob(".*.tmp"))


def wait_until_working(process: subprocess.Popen[bytes], out: Path) -> None:
    lock = out / ".lock"
    wait_for(lambda: (lock.exists() and lock.read_text() == str(process.pid)) or process.poll() is not None)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_renderer_killed_again_and_again_finishes_exactly(cones: Path, tmp_path: Path) -> None:
    chance = random.Random(4)
    render_all(config(cones, tmp_path / "alone", views_per_ring=12))
    out = tmp_path / "out"
    for _ in range(5):
        process = start(cones, out, "views_per_ring=12")
        wait_until_working(process, out)
        time.sleep(chance.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    process = start(cones, out, "views_per_ring=12")
    _, words = process.communicate(timeout=300)
    assert process.returncode == 0 and b"4 of 4 objects are in" in words, words
    assert pictures(out) == pictures(tmp_path / "alone")
    assert not [path for path in out.glob(".*") if path.suffix in {".tmp", ".old"}]
