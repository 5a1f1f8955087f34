from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from analytic_scenes import Ball, Snowman

from data.files import UserError
from distill.config import MeshConfig
from distill.mesh import drop_floaters, extract_mesh, iso_density, linear_to_srgb, load_glb, save_glb, srgb_to_linear
from distill.volume import OccupancyGrid, VolumeConfig


def grid_of(scene: Ball) -> OccupancyGrid:
    torch.manual_seed(0)
    grid = OccupancyGrid(0.6, VolumeConfig(samples_per_ray=160))
    for _ in range(4):
        grid.update(scene.density)
    return grid


@pytest.mark.parametrize(("radius", "density", "skin"), [(0.35, 200.0, 0.01), (0.45, 30.0, 0.02), (0.2, 1000.0, 0.005)])
def test_ball_has_its_radius_colours_and_axes(tmp_path: Path, radius: float, density: float, skin: float) -> None:
    scene = Ball(radius, density, skin)
    mesh, facts = extract_mesh(scene, grid_of(scene), MeshConfig(resolution=64))  # type: ignore[arg-type]
    r = np.linalg.norm(mesh.vertices, axis=1)
    assert abs(r.mean() - radius) < 0.02 and r.std() < 0.01
    assert mesh.is_watertight and mesh.volume > 0 and facts["watertight"]  # positive: triangles face outwards
    save_glb(tmp_path / "mesh.glb", mesh)
    back = load_glb(tmp_path / "mesh.glb")
    front = back.vertices[:, 0] > 0.05
    assert (back.visual.vertex_colors[front, :3] == [255, 0, 0]).all()
    assert (back.visual.vertex_colors[back.vertices[:, 0] < -0.05, :3] == [0, 0, 255]).all()


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
    assert np.abs(linear_to_srgb(srgb_to_linear(colours)).astype(int) - colours)[64:].max() <= 2
    assert list(srgb_to_linear(np.array([0, 128, 255], dtype=np.uint8))) == [0, 55, 255]


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


def test_nothing_there_is_said_clearly() -> None:
    scene = Ball(density=0.05)
    with pytest.raises(UserError, match="the field is empty"):
        extract_mesh(scene, OccupancyGrid(0.6, VolumeConfig()), MeshConfig(resolution=32))  # type: ignore[arg-type]
