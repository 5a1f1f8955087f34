"""Real renders with a real Blender: world axes, front, lens, determinism, and what happens when processes die."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from data.blender_pool import check_blender, find_blender, script_command
from data.cameras import camera_rays
from data.files import UserError
from data.render_ledger import LEDGER
from data.rendering import RADIUS, RenderConfig, render_all

ROOT = Path(__file__).parents[2]
SMALL = {"resolution": 32, "samples": 1, "rings": 1, "views_per_ring": 4, "references": 1, "eval_views": 0}
# Boxes in the world's axes: where they must appear, and their colours.
BOXES = {
    "red": ((1.0, 0, 0), (220, 20, 20)),
    "green": ((0, 0.7, 0), (20, 200, 20)),
    "blue": ((0, 0, 0.8), (20, 20, 220)),
}
WORLD_FROM_GLTF = np.array([[0, 0, 1], [1, 0, 0], [0, 1, 0]])  # front +Z to +x, up +Y to +z, so +X to +y
WORLD_FROM_PLY = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])  # front -y to +x, up +z


@pytest.fixture(scope="session", autouse=True)
def blender() -> Path:
    found = find_blender()  # an error says to run `make blender`
    check_blender(found)
    return found


def boxes(world_from_file: np.ndarray, name: str) -> list[trimesh.Trimesh]:
    """The three boxes in a file's axes, as vertex-coloured (ply) or material-coloured (others) meshes."""
    meshes = []
    for at, colour in BOXES.values():
        mesh = trimesh.creation.box((0.3, 0.3, 0.3))
        mesh.apply_translation(at)
        mesh.vertices = mesh.vertices @ world_from_file  # the inverse of a rotation, applied to rows
        if name.endswith(".ply"):
            mesh.visual.vertex_colors = np.tile([*colour, 255], (len(mesh.vertices), 1))
        else:
            linear = [round(255 * (c / 255) ** 2.2) for c in colour]  # glTF factors are linear
            material = trimesh.visual.material.PBRMaterial(baseColorFactor=[*linear, 255], metallicFactor=0)
            mesh.visual = trimesh.visual.TextureVisuals(material=material)
        meshes.append(mesh)
    return meshes


def write_boxes(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    trimesh.Scene(boxes(WORLD_FROM_GLTF, "a.glb")).export(folder / "plain.glb")
    turned = trimesh.Scene(boxes(WORLD_FROM_GLTF, "a.glb"))
    turned.apply_transform(trimesh.transformations.rotation_matrix(np.radians(70), [0, 1, 0]))
    turned.export(folder / "turned.glb")
    trimesh.util.concatenate(boxes(WORLD_FROM_PLY, "a.ply")).export(folder / "points.ply")
    (folder / "assets.json").write_text(json.dumps({"turned": {"front_yaw_deg": 70}}))


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory, blender: Path) -> Path:
    folder = tmp_path_factory.mktemp("boxes")
    write_boxes(folder / "in")
    render_all(
        RenderConfig(
            source=str(folder / "in"),
            out=str(folder / "out"),
            resolution=96,
            samples=8,
            rings=1,
            views_per_ring=8,
            references=2,
            eval_views=0,
            elevation_deg=[20, 40],
            fov_deg=[40, 60],
            framing=[0.58, 0.8],
        )
    )
    return folder / "out"


def world_boxes() -> tuple[np.ndarray, np.ndarray, float]:
    """Corners (3, 8, 3) and centres (3, 3) after centring and scaling as the conventions say, and the scale."""
    corners = np.array([[-1, -1, -1], [1, 1, 1]]) * 0.15
    corners = np.array([[corners[i, 0], corners[j, 1], corners[k, 2]] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    centres = np.array([at for at, _ in BOXES.values()])
    points = centres[:, None] + corners
    middle = (points.min(axis=(0, 1)) + points.max(axis=(0, 1))) / 2
    scale = RADIUS / np.linalg.norm(points - middle, axis=-1).max()
    return (points - middle) * scale, (centres - middle) * scale, float(scale)


def expected_hits(origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Which box each ray (H, W, 3) surely meets first, by the slab method; -1 where none, or near an edge."""
    points, _, _ = world_boxes()

    def entries(grown: float) -> np.ndarray:
        """(3, H, W): distance at which each box, grown by so many object units, is entered; inf where it is missed."""
        found = []
        for box in points:
            slabs = np.stack([box.min(axis=0) - grown - origin, box.max(axis=0) + grown - origin])
            t = slabs[:, None, None] / (directions + 1e-9)
            enter, leave = t.min(axis=0).max(axis=-1), t.max(axis=0).min(axis=-1)
            found.append(np.where(enter < leave, enter, np.inf))
        return np.stack(found)

    shrunk, grown = entries(-0.012), entries(0.012)  # about a pixel
    first = shrunk.argmin(axis=0)
    others = np.where(np.arange(3)[:, None, None] == first, np.inf, grown).min(axis=0)
    return np.where(np.isfinite(shrunk.min(axis=0)) & (others > shrunk.min(axis=0)), first, -1)


@pytest.mark.parametrize("uid", ["plain", "turned", "points"])
def test_colours_appear_where_the_cameras_say(rendered: Path, uid: str) -> None:
    """Every pixel whose ray surely meets a box shows its colour: proves axes, front, c2w, fov, centring and scale."""
    meta = json.loads((rendered / uid / "meta.json").read_text())
    seen = np.zeros(3, dtype=int)
    for view in meta["views"]:
        picture = np.asarray(Image.open(rendered / uid / view["file"])).astype(int)
        origin, rays = camera_rays(torch.tensor(view["c2w"]), torch.tensor(view["fov_deg"]), 96, 96)
        hits = expected_hits(origin[0, 0].numpy(), rays.numpy())
        seen += [int((hits == number).sum()) for number in range(3)]
        assert picture[..., 3][hits >= 0].min() > 200, view["file"]
        assert np.array_equal(picture[..., :3].argmax(axis=-1)[hits >= 0], hits[hits >= 0]), view["file"]
    assert seen.min() > 500, seen


def test_nothing_is_drawn_where_no_ray_meets(rendered: Path) -> None:
    """The silhouette of the sphere around the boxes bounds the alpha, and the picture's border is empty."""
    for folder in (path.parent for path in rendered.glob("*/meta.json")):
        meta = json.loads((folder / "meta.json").read_text())
        for view in meta["views"]:
            alpha = np.asarray(Image.open(folder / view["file"]))[..., 3]
            assert alpha[[0, -1]].max() == 0 and alpha[:, [0, -1]].max() == 0
            origin, rays = camera_rays(torch.tensor(view["c2w"]), torch.tensor(view["fov_deg"]), 96, 96)
            missed = torch.linalg.cross(origin, rays).norm(dim=-1) > RADIUS + 0.02
            assert alpha[missed.numpy()].max(initial=0) == 0


def test_meta_holds_what_its_readers_expect(rendered: Path) -> None:
    metas = [json.loads(path.read_text()) for path in sorted(rendered.glob("*/meta.json"))]
    assert [meta["uid"] for meta in metas] == ["plain", "points", "turned"]
    for meta in metas:
        assert set(meta) == {
            "uid", "source", "license", "creator", "caption", "category", "resolution", "faces", "light", "device",
            "fingerprint", "views",
        }  # fmt: skip
        assert meta["faces"] == {"plain": 36, "turned": 36, "points": 36}[meta["uid"]]
        roles = [view["role"] for view in meta["views"]]
        assert roles == ["ring"] * 8 + ["reference"] * 2 + ["eval_reference"]


@pytest.fixture(scope="module")
def snowman(tmp_path_factory: pytest.TempPathFactory, blender: Path) -> Path:
    """A folder with one parametric object."""
    folder = tmp_path_factory.mktemp("parametric")
    words = [*script_command(blender, ROOT / "data" / "parametric.py"), str(folder), "snowman"]
    subprocess.run(words, check=True, capture_output=True)
    return folder


def small(source: Path, out: Path, **changes: Any) -> RenderConfig:
    return RenderConfig(**(SMALL | {"source": str(source), "out": str(out)} | changes))


def stamps(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in sorted(folder.iterdir())}


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_rendering_again_is_equal_and_resuming_renders_nothing(snowman: Path, tmp_path: Path) -> None:
    render_all(small(snowman, tmp_path / "a", samples=4))
    render_all(small(snowman, tmp_path / "b", samples=4))
    assert contents(tmp_path / "a" / "snowman") == contents(tmp_path / "b" / "snowman")
    before = stamps(tmp_path / "a" / "snowman")
    render_all(small(snowman, tmp_path / "a", samples=4))
    assert stamps(tmp_path / "a" / "snowman") == before
    render_all(small(snowman, tmp_path / "a", samples=2))
    assert stamps(tmp_path / "a" / "snowman") != before
    assert len((tmp_path / "a" / LEDGER).read_text().splitlines()) == 2


def test_a_front_view_shows_the_front(snowman: Path, tmp_path: Path) -> None:
    """The carrot is orange and in front: seen from azimuth 0 and hidden from 180."""
    settings = {"eval_views": 2, "eval_elevation_deg": 0, "resolution": 96, "samples": 8}
    render_all(small(snowman, tmp_path, **settings))
    meta = json.loads((tmp_path / "snowman" / "meta.json").read_text())
    orange = []
    for view in meta["views"]:
        if view["role"] == "eval":
            r, g, b, a = np.moveaxis(np.asarray(Image.open(tmp_path / "snowman" / view["file"])).astype(int), -1, 0)
            orange.append(int(((a > 200) & (r - g > 40) & (g - b > 40)).sum()))
    assert orange[0] > 3 and orange[1] == 0, orange


def test_bad_objects_cost_themselves_only(tmp_path: Path) -> None:
    write_boxes(tmp_path / "in")
    (tmp_path / "in" / "broken.glb").write_bytes(b"glTF" + bytes(50))
    (tmp_path / "in" / "faceless.obj").write_text("v 0 0 0\nv 1 0 0\n")
    (tmp_path / "in" / "invisible.obj").write_text("mtllib i.mtl\nusemtl i\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    (tmp_path / "in" / "i.mtl").write_text("newmtl i\nKd 1 1 1\nd 0\n")
    render_all(small(tmp_path / "in", tmp_path / "out", processes=2))
    ledger = {line["uid"]: line for line in map(json.loads, (tmp_path / "out" / LEDGER).read_text().splitlines())}
    assert {uid: line["status"] for uid, line in ledger.items()} == {
        "plain": "rendered", "turned": "rendered", "points": "rendered", "broken": "failed", "faceless": "failed",
        "invisible": "rejected",
    }  # fmt: skip
    assert "no faces" in ledger["faceless"]["reason"] and "nearly empty" in ledger["invisible"]["reason"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir()) == ["plain", "points", "turned"]


def test_an_object_that_takes_too_long_fails(snowman: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="took longer than object_limit_s=1"):
        render_all(small(snowman, tmp_path, object_limit_s=1, samples=60000))
    assert not (tmp_path / "snowman").exists()


def start_render(source: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    words = [f"{key}={value}" for key, value in (SMALL | {"views_per_ring": 40, "samples": 16}).items()]
    words += [f"source={source}", f"out={out}", "processes=1", *more]
    return subprocess.Popen([sys.executable, "data/render.py", *words], cwd=ROOT, stderr=subprocess.PIPE)


def wait_for(what: Callable[[], Any], limit_s: float = 120) -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := what()):
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)
    return found


def children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_worker_costs_its_object_and_a_rerun_mends_it(tmp_path: Path) -> None:
    write_boxes(tmp_path / "in")
    process = start_render(tmp_path / "in", tmp_path / "out")
    wait_for(lambda: list((tmp_path / "out").glob(".plain.*.tmp/003.png")))
    (worker,) = children(process.pid)
    os.kill(worker, signal.SIGKILL)
    _, words = process.communicate(timeout=200)
    assert process.returncode == 0 and b"plain failed: Blender ended with status -9" in words, words
    assert sorted(p.parent.name for p in (tmp_path / "out").glob("*/meta.json")) == ["points", "turned"]
    kept = stamps(tmp_path / "out" / "turned")
    again = start_render(tmp_path / "in", tmp_path / "out")
    _, words = again.communicate(timeout=200)
    assert again.returncode == 0 and b"1 failed before with the same settings: not tried again" in words, words
    assert not (tmp_path / "out" / "plain").exists()
    again = start_render(tmp_path / "in", tmp_path / "out", "retry=true")
    assert again.communicate(timeout=200) and again.returncode == 0
    assert len(list((tmp_path / "out" / "plain").glob("*.png"))) == 42
    assert stamps(tmp_path / "out" / "turned") == kept


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_or_interrupted_renderer_leaves_no_workers(snowman: Path, tmp_path: Path, number: int) -> None:
    process = start_render(snowman, tmp_path)
    wait_for(lambda: list(tmp_path.glob(".snowman.*.tmp/001.png")))
    (worker,) = children(process.pid)
    process.send_signal(number)
    _, words = process.communicate(timeout=60)
    wait_for(lambda: not is_running(worker), 20)
    # On a busy machine the object may have come to its end before the signal: there whole, or not there.
    assert (tmp_path / "snowman").exists() == (tmp_path / "snowman" / "meta.json").exists()
    if number == signal.SIGINT and process.returncode != 0:
        assert process.returncode == 130 and b"goes on from here" in words
        assert not list(tmp_path.glob(".snowman*"))
    again = start_render(snowman, tmp_path)
    assert again.communicate(timeout=200) and again.returncode == 0
    assert (tmp_path / "snowman" / "meta.json").exists() and not list(tmp_path.glob(".snowman*"))
