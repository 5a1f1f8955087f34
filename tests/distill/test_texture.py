from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from analytic_scenes import Ball, Snowman

from data.cameras import framing_distance, orbit_camera
from distill.config import MeshConfig
from distill.glb import picture_of
from distill.mesh import extract_mesh
from distill.mesh_views import colours_at, mesh_views
from distill.silhouette import filled
from distill.texture import dilated, surface_albedo, texels_of, textured
from distill.turntable import render_views
from distill.unwrap import Layout, UnwrapFailed, run_limited, unwrap
from distill.volume import OccupancyGrid, VolumeConfig
from models.image_metrics import psnr

SIZE = 256


def grid_of(scene: Ball) -> OccupancyGrid:
    torch.manual_seed(0)
    grid = OccupancyGrid(0.6, VolumeConfig(samples_per_ray=256))
    for _ in range(4):
        grid.update(scene.density)
    return grid


@pytest.fixture(scope="module")
def snowman() -> tuple[Snowman, OccupancyGrid, trimesh.Trimesh, trimesh.Trimesh, dict]:
    """The scene, its grid, its mesh with colours at the vertices, the textured one, and the facts of both."""
    scene, config = Snowman(density=2000.0, skin=0.004), MeshConfig(resolution=96, faces=4000, texture_size=SIZE)
    grid = grid_of(scene)
    plain, facts = extract_mesh(scene, grid, config)  # type: ignore[arg-type]
    made, about = textured(scene, grid, plain, facts["iso_density"], config)
    return scene, grid, plain, made, facts | about


def layout_of(plain: trimesh.Trimesh, limit_s: float = 120) -> Layout:
    return unwrap(np.asarray(plain.vertices), np.asarray(plain.faces), SIZE, limit_s)


def test_charts_lie_in_the_picture_and_do_not_overlap(snowman: tuple) -> None:
    layout = layout_of(snowman[2])
    assert layout.uv.min() >= 0 and layout.uv.max() <= 1
    assert np.array_equal(layout.source[layout.triangles], snowman[2].faces)
    owners = np.zeros(SIZE * SIZE, dtype=int)
    for _, texel, inside in filled(layout.uv[layout.triangles] * SIZE, SIZE):
        np.add.at(owners, texel[inside > 0.05], 1)  # of a texel: charts may touch
    assert owners.max() == 1 and owners.mean() > 0.4


def test_every_filtered_sample_of_a_chart_is_baked(snowman: tuple) -> None:
    """Places all over each triangle: the texel they lie in belongs to that triangle or to a neighbour in its chart."""
    layout = layout_of(snowman[2])
    owned = np.zeros(SIZE * SIZE, dtype=bool)
    owned[texels_of(layout, SIZE).number] = True
    weights = np.random.default_rng(0).dirichlet((0.3, 0.3, 0.3), (len(layout.triangles), 20))
    places = np.einsum("tki,tij->tkj", weights, layout.uv[layout.triangles] * SIZE).reshape(-1, 2)
    x, y = np.clip(places.astype(int), 0, SIZE - 1).T
    assert owned[y * SIZE + x].all()


def test_texture_gives_back_the_colour_of_its_place(snowman: tuple) -> None:
    scene, _, _, made, facts = snowman
    assert facts["texture"]["size"] == SIZE and facts["texture"]["vertices"] == len(made.vertices)
    rng = np.random.default_rng(0)
    faces, weights = rng.integers(len(made.faces), size=20_000), rng.dirichlet((1, 1, 1), 20_000)
    places = np.einsum("ni,nij->nj", weights, made.vertices[made.faces[faces]])
    true = scene(torch.from_numpy(places).float(), normals=False).albedo.numpy()
    error = np.abs(colours_at(made, faces, weights) - true)
    # the colour changes by up to 3.6 an object unit: 0.03 is less than 0.01 of an object unit
    assert error.mean() < 0.012 and np.quantile(error, 0.99) < 0.05 and error.max() < 0.12


def test_textured_mesh_keeps_shape_normals_and_closes_when_welded(snowman: tuple) -> None:
    _, _, plain, made, facts = snowman
    assert np.array_equal(made.triangles, plain.triangles) and facts["watertight"]
    welded = made.copy()
    welded.merge_vertices(merge_tex=True, merge_norm=True)
    assert welded.is_watertight and len(welded.vertices) == len(plain.vertices)
    twins = np.unique(made.vertices, axis=0, return_inverse=True)[1]
    for axis in range(3):  # one normal a place: no shading seams along the charts
        low, high = np.full(twins.max() + 1, 9.0), np.full(twins.max() + 1, -9.0)
        np.minimum.at(low, twins, made.vertex_normals[:, axis])
        np.maximum.at(high, twins, made.vertex_normals[:, axis])
        assert (high - low).max() < 1e-6


def test_dilation_leaves_no_border_at_any_mipmap(snowman: tuple) -> None:
    picture = np.zeros((64, 64, 3), dtype=np.uint8)
    covered = np.zeros((64, 64), dtype=bool)
    covered[10:20, 10:50] = covered[40:50, 30:40] = True
    picture[10:20, 10:50], picture[40:50, 30:40] = (200, 10, 10), (10, 200, 10)
    full = dilated(picture, covered)
    assert np.array_equal(full[covered], picture[covered]) and (full.max(axis=-1) == 200).all()
    made = picture_of(snowman[3]).astype(float)
    assert made.min() > 8  # the scene's darkest albedo is 0.05
    while len(made) > 8:
        made = made.reshape(len(made) // 2, 2, len(made) // 2, 2, 3).mean(axis=(1, 3))
        assert made.min() > 8


def test_short_ray_shows_what_the_renderer_shows() -> None:
    """A thin coat of red round blue: the point on the surface is red alone, the rendered picture a mixture."""

    class Coated(Ball):
        def __call__(self, points: torch.Tensor, normals: bool = True):
            samples = super().__call__(points, normals)
            inner = (points.norm(dim=-1, keepdim=True) < 0.335).float()
            return samples._replace(albedo=torch.cat([1 - inner, 0 * inner, inner], dim=-1))

    scene = Coated(0.35, 60.0, 0.002)
    grid = grid_of(scene)
    c2w = orbit_camera(torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor(3.0))
    seen = render_views(scene, grid, c2w, 40.0, 33).rgb[0, :, 16, 16]
    point, normal = np.array([[0.35, 0, 0]]), np.array([[1.0, 0, 0]])
    found = surface_albedo(scene, grid, point, normal, cell=0.02, level=30.0)[0] / 255
    assert 0.2 < seen[0] < 0.8  # neither coat nor core alone
    assert np.abs(found - seen.numpy()).max() < 0.15


def test_pictures_of_the_mesh_are_those_of_the_field(snowman: tuple) -> None:
    """The project's bar is a loss of 2 dB: here against the field's own views, which a perfect mesh would repeat."""
    scene, grid, plain, made, facts = snowman
    c2w = orbit_camera(
        torch.tensor([20.0, 140.0, 260.0]), torch.tensor([15.0, -10.0, 40.0]), framing_distance(0.6, 40.0)
    )
    field = render_views(scene, grid, c2w, 40.0, 128)
    textured_mesh, by_vertex = mesh_views(made, c2w, 40.0, 128), mesh_views(plain, c2w, 40.0, 128)
    assert facts["silhouette_iou"] > 0.93
    assert float(psnr(textured_mesh.rgb, field.rgb).min()) > 24
    inner = (textured_mesh.opacity == 1) & (field.opacity > 0.99)
    for one in range(3):
        ours, vertex, truth = (x.rgb[one][:, inner[one]][None, :, None] for x in (textured_mesh, by_vertex, field))
        assert float(psnr(ours, truth)) > 32
        assert float(psnr(ours, truth)) > float(psnr(vertex, truth)) - 0.5


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_time_limit_kills_a_hanging_child_and_its_children(tmp_path: Path) -> None:
    program = (
        "import os, pathlib, subprocess, sys, time\n"
        "below = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(tmp_path / 'pids')!r}).write_text(f'{{os.getpid()}} {{below.pid}}')\n"
        "time.sleep(600)\n"
    )
    with pytest.raises(UnwrapFailed, match=r"longer than mesh\.unwrap_limit_s=3"):
        run_limited([sys.executable, "-c", program], tmp_path / "log", limit_s=3)
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    deadline = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2 and not any(map(alive, pids))


def test_child_ends_with_a_killed_parent(tmp_path: Path) -> None:
    note = str(tmp_path / "pid")
    hang = f"import os, pathlib, time; pathlib.Path({note!r}).write_text(str(os.getpid())); time.sleep(600)"
    program = (
        "import sys; from pathlib import Path; from distill.unwrap import run_limited\n"
        f"run_limited([sys.executable, '-c', {hang!r}], Path({str(tmp_path / 'log')!r}), 600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    pid = int((tmp_path / "pid").read_text())
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


@pytest.mark.parametrize("why", ["time", "missing", "crash"])
def test_without_coordinates_the_vertices_keep_their_colours(
    snowman: tuple, tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scene, grid, plain, _, facts = snowman
    fake = {"time": "", "missing": "raise ModuleNotFoundError(\"No module named 'xatlas'\")",
            "crash": "import os; os.abort()"}[why]  # fmt: skip
    if fake:  # PYTHONPATH comes before what is installed
        (tmp_path / "xatlas.py").write_text(fake)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config = MeshConfig(resolution=96, texture_size=SIZE, unwrap_limit_s=0.01 if why == "time" else 120)
    mesh, about = textured(scene, grid, plain, facts["iso_density"], config)
    _, *said = capsys.readouterr().out.splitlines()  # the first says that the coordinates are being made
    words = {"time": "longer than mesh.unwrap_limit_s=0.01", "missing": "No module named 'xatlas'", "crash": "signal 6"}
    assert len(said) == 1 and said[0].startswith("warning: colours at the vertices") and words[why] in said[0]
    assert mesh is plain and about["texture"] is None and words[why] in about["texture_failed"]
    assert os.listdir(tmp_path) == (["xatlas.py"] if fake else [])


def test_no_texture_when_none_is_wanted(snowman: tuple) -> None:
    scene, grid, plain, _, facts = snowman
    assert textured(scene, grid, plain, facts["iso_density"], MeshConfig(texture_size=0)) == (plain, {"texture": None})
