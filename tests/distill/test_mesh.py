from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from analytic_scenes import Ball, Snowman

from conf.cli import ConfigError
from data.files import UserError
from distill.config import MeshConfig
from distill.glb import linear_to_srgb, load_glb, save_glb, srgb_to_linear
from distill.manifold import faults
from distill.mesh import (
    LEVELS,
    best_level,
    density_volume,
    drop_floaters,
    extract_mesh,
    half_opaque,
    iso_density,
    isosurface,
)
from distill.silhouette import likeness, sight_of
from distill.volume import OccupancyGrid, VolumeConfig


def grid_of(scene: Ball) -> OccupancyGrid:
    torch.manual_seed(0)
    grid = OccupancyGrid(0.6, VolumeConfig(samples_per_ray=160))
    for _ in range(4):
        grid.update(scene.density)
    return grid


def half_opaque_radii(scene: Ball) -> tuple[float, float]:
    """Where a ray at the centre becomes half opaque, and how near to it the farthest ray that ever does passes.

    Distances from the centre, by integrating the density on the rays.
    """
    along = torch.linspace(-1, 1, 4001)
    passing = torch.linspace(0, 0.6, 601)
    points = torch.stack(torch.broadcast_tensors(along, passing[:, None], torch.zeros(())), dim=-1)
    tau = scene.density(points.view(-1, 3)).view(601, 4001).cumsum(dim=1) * (2 / 4000)
    front = along[(tau[0] < np.log(2)).sum()]
    return float(-front), float(passing[(tau[:, -1] > np.log(2)).nonzero().max()])


@pytest.mark.parametrize(
    ("radius", "density", "skin"), [(0.35, 200.0, 0.01), (0.45, 30.0, 0.02), (0.2, 1000.0, 0.005), (0.35, 4000, 0.001)]
)
def test_ball_has_its_radius_colours_and_axes(tmp_path: Path, radius: float, density: float, skin: float) -> None:
    scene = Ball(radius, density, skin)
    mesh, facts = extract_mesh(scene, grid_of(scene), MeshConfig(resolution=64, watertight=True))  # type: ignore[arg-type]
    r = np.linalg.norm(mesh.vertices, axis=1)
    front, border = half_opaque_radii(scene)  # a soft skin's pictures suit no single surface, but one between the two
    assert front < r.mean() < (front + border) / 2 and r.std() < 0.01
    assert facts["silhouette_iou"] > facts["depth_likeness"] > 0.6
    assert mesh.is_watertight and mesh.volume > 0 and facts["watertight"]  # positive: triangles face outwards
    save_glb(tmp_path / "mesh.glb", mesh)
    back = load_glb(tmp_path / "mesh.glb")
    front = back.vertices[:, 0] > 0.05
    assert (back.visual.vertex_colors[front, :3] == [255, 0, 0]).all()
    assert (back.visual.vertex_colors[back.vertices[:, 0] < -0.05, :3] == [0, 0, 255]).all()


def test_level_is_the_best_of_those_tried_and_within_their_range() -> None:
    for scene in (Ball(0.45, 30.0, 0.02), Snowman(density=2000.0, skin=0.004)):
        grid = grid_of(scene)
        density, sight = density_volume(scene, grid, 64), sight_of(scene, grid)  # type: ignore[arg-type]
        seen = iso_density(scene, grid)  # type: ignore[arg-type]
        best = best_level(density, seen, grid, sight, 0.02)
        assert LEVELS[0] * seen <= best <= LEVELS[-1] * seen
        score = likeness(*isosurface(density, best, 0.6), sight).depths
        others = [seen * share for share in LEVELS] + half_opaque(grid)
        for level in others:
            if LEVELS[0] * seen <= level < density.max():
                assert score >= likeness(*isosurface(density, level, 0.6), sight).depths


def test_half_opaque_is_what_it_says() -> None:
    grid = OccupancyGrid(0.6, VolumeConfig(samples_per_ray=160, occupancy_resolution=24))
    step, cell = half_opaque(grid)
    assert 1 - np.exp(-step * grid.step) == pytest.approx(0.5) and 1 - np.exp(-cell * 0.05) == pytest.approx(0.5)


@pytest.mark.parametrize("faces", [0, 3000, 800])
def test_decimated_mesh_stays_sound_and_near_the_surface(faces: int) -> None:
    scene = Snowman(density=4000.0, skin=0.001)
    grid = grid_of(scene)
    mesh, facts = extract_mesh(scene, grid, MeshConfig(resolution=80, faces=faces))  # type: ignore[arg-type]
    assert faults(mesh.vertices, mesh.faces) == {} and mesh.is_watertight and mesh.is_winding_consistent
    if faces:
        assert abs(len(mesh.faces) - faces) <= 0.02 * faces < facts["faces_before_decimation"]
    else:
        assert len(mesh.faces) == facts["faces_before_decimation"] == facts["faces"]
    points = trimesh.sample.sample_surface(mesh, 20_000, seed=0)[0]
    body = np.linalg.norm(points - [0.1, 0, -0.1], axis=1) - 0.3
    head = np.linalg.norm(points - [0.0, 0.1, 0.28], axis=1) - 0.18
    distance = np.abs(np.minimum(body, head))
    # a marching-cubes cell is 0.015; the silhouettes of a skin of 0.001 lie 0.006 outside
    assert distance.mean() < 0.009 and distance.max() < 0.03
    assert facts["silhouette_iou"] > 0.97


def test_gltf_axes_are_y_up_and_front_z(tmp_path: Path) -> None:
    """A bar along our +x (front) with its top on +z must lie along +z with its top on +y for a glTF viewer."""
    box = trimesh.creation.box(extents=(0.8, 0.1, 0.2))
    box.apply_translation((0.1, 0.02, 0.3))
    box.visual.vertex_colors = np.tile(np.array([[200, 100, 50, 255]], dtype=np.uint8), (8, 1))
    save_glb(tmp_path / "bar.glb", box)
    (seen,) = trimesh.load_scene(tmp_path / "bar.glb").geometry.values()
    assert np.allclose(seen.bounds.mean(axis=0), (0.02, 0.3, 0.1)) and np.allclose(seen.extents, (0.1, 0.2, 0.8))
    assert np.abs(load_glb(tmp_path / "bar.glb").visual.vertex_colors[0, :3].astype(int) - [200, 100, 50]).max() <= 2


def test_srgb_there_and_back() -> None:
    colours = np.arange(256, dtype=np.uint8)
    assert np.array_equal(linear_to_srgb(srgb_to_linear(colours)), colours)
    assert list(srgb_to_linear(np.array([0, 128, 255], dtype=np.uint8))) == [0, 14146, 65535]


def test_floaters_are_dropped() -> None:
    big, small = trimesh.creation.icosphere(3), trimesh.creation.icosphere(1)
    small.apply_translation((3, 0, 0))
    both = trimesh.util.concatenate([big, small])
    vertices, triangles = drop_floaters(both.vertices, both.faces, keep_share=0.1)
    assert len(triangles) == len(big.faces) and vertices[:, 0].max() < 1.1
    assert len(drop_floaters(both.vertices, both.faces, keep_share=0.0)[1]) == len(both.faces)


def test_level_lies_in_the_surface() -> None:
    scene = Snowman(density=400.0)
    level = iso_density(scene, grid_of(scene))  # type: ignore[arg-type]
    assert 10 < level < 399  # the mean over the box is below


def test_settings_that_cannot_work_are_refused() -> None:
    for wrong in ({"texture_size": 1000}, {"texture_size": 32}, {"faces": 10}, {"faces": -1}, {"unwrap_limit_s": 0}):
        with pytest.raises(ConfigError, match=f"mesh.{next(iter(wrong))}="):
            MeshConfig(**wrong)  # type: ignore[arg-type]
    assert MeshConfig(texture_size=0, faces=0).resolution == 256


def test_a_box_that_is_full_everywhere_is_a_closed_box() -> None:
    vertices, triangles = isosurface(np.full((9, 9, 9), 50.0), 2.0, 0.6)
    mesh = trimesh.Trimesh(*drop_floaters(vertices, triangles, 0.02), process=False)
    assert mesh.is_watertight and mesh.volume > 0 and np.allclose(mesh.extents, mesh.extents[0])
    assert 1.2 <= mesh.extents[0] <= 1.2 + 2 * 0.15
    with pytest.raises(UserError, match="the field is empty"):
        isosurface(np.full((9, 9, 9), 50.0), 60.0, 0.6)


def test_nothing_there_is_said_clearly() -> None:
    scene = Ball(density=0.05)
    with pytest.raises(UserError, match="the field is empty"):
        extract_mesh(scene, OccupancyGrid(0.6, VolumeConfig()), MeshConfig(resolution=32))  # type: ignore[arg-type]
