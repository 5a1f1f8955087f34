from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh
from analytic_scenes import Ball

from data.cameras import camera_rays
from distill.silhouette import FOV_DEG, Sight, all_around, filled, likeness, nearest_depth, sight_of
from distill.volume import OccupancyGrid, VolumeConfig


def covered(corners: np.ndarray, size: int, margin: float = 0.0) -> np.ndarray:
    image = np.zeros(size * size, dtype=np.int64)
    for _, pixel, _ in filled(corners, size, margin):
        np.add.at(image, pixel, 1)
    return image.reshape(size, size)


def test_pixels_are_those_whose_centre_a_triangle_holds() -> None:
    """Against the definition, asked pixel by pixel; both windings, triangles partly and wholly outside."""
    corners = np.random.default_rng(0).uniform(-8, 40, (200, 3, 2))
    size = 32
    y, x = np.mgrid[:size, :size] + 0.5
    for triangle in corners:
        sides = [(b - a, a) for a, b in zip(triangle, np.roll(triangle, -1, axis=0), strict=True)]
        turns = np.stack([d[0] * (y - p[1]) - d[1] * (x - p[0]) for d, p in sides])
        expected = (turns > 0).all(axis=0) | (turns < 0).all(axis=0)
        assert np.array_equal(covered(triangle[None], size) > 0, expected)


def test_a_mosaic_covers_every_pixel_once() -> None:
    """Points at irrational places: no centre lies on a side."""
    ticks = np.linspace(-1, 25, 14) + np.sqrt(2) / 100
    a, b = np.meshgrid(ticks[:-1], ticks[:-1])
    corner = np.stack([a, b], axis=-1).reshape(-1, 2) + np.sqrt(3) / 70
    right, down = np.array([2.0, 0.0]), np.array([0.0, 2.0])
    halves = [np.stack([corner, corner + right, corner + down], 1),
              np.stack([corner + right, corner + right + down, corner + down], 1)]  # fmt: skip
    assert (covered(np.concatenate(halves), 24)[1:, 1:] == 1).all()


def test_margin_takes_what_a_triangle_touches() -> None:
    sliver = np.array([[[2.1, 2.1], [9.9, 2.2], [9.9, 2.15]]])
    assert covered(sliver, 12).sum() == 0
    touched = covered(sliver, 12, margin=0.5)
    assert touched[2, 2:10].all() and touched.sum() == 8
    assert covered(np.zeros((3, 3, 2)), 12, margin=0.5).sum() == 0  # no area, no inside


def grid_of(scene: Ball) -> OccupancyGrid:
    torch.manual_seed(0)
    grid = OccupancyGrid(0.6, VolumeConfig(samples_per_ray=400))
    for _ in range(4):
        grid.update(scene.density)
    return grid


def test_depth_of_a_ball_and_of_a_box_is_what_rays_meet() -> None:
    c2w = all_around(0.6)
    origins, directions = camera_rays(c2w, torch.full((len(c2w),), FOV_DEG), 96, 96)
    slope = -torch.einsum("vyxi,vi->vyx", directions, c2w[:, :3, 2])
    past = torch.linalg.cross(origins, directions).norm(dim=-1)
    ball = trimesh.creation.icosphere(5, 0.5)
    found = np.stack([nearest_depth(ball.vertices, ball.faces, pose, 96) for pose in c2w.numpy()])
    assert np.isfinite(found[past < 0.498]).all() and np.isinf(found[past > 0.501]).all()
    expected = slope * (-(origins * directions).sum(dim=-1) - (0.25 - past.square()).clamp(min=0).sqrt())
    assert np.abs(found - expected.numpy())[past < 0.45].max() < 2e-3
    low, high = (((sign * 0.3) - origins) / directions for sign in (-1, 1))
    near, far = torch.minimum(low, high).amax(-1), torch.maximum(low, high).amin(-1)
    box = trimesh.creation.box((0.6, 0.6, 0.6))
    found = np.stack([nearest_depth(box.vertices, box.faces, pose, 96) for pose in c2w.numpy()])
    hit = np.isfinite(found)
    assert (hit != (near < far).numpy()).mean() < 1e-4
    assert np.abs(found - (near * slope).numpy())[hit & (near < far).numpy()].max() < 1e-5


@pytest.mark.parametrize(("density", "skin"), [(4000.0, 0.001), (60.0, 0.02)])
def test_sight_is_where_half_of_the_light_is_gone(density: float, skin: float) -> None:
    """Against the density of a ball, integrated on every eighth ray in steps a sixteenth as long."""
    scene = Ball(0.35, density, skin)
    grid = grid_of(scene)
    sight = sight_of(scene, grid, 96)
    c2w = torch.from_numpy(sight.c2w)
    origins, directions = (x[:, 4::8, 4::8] for x in camera_rays(c2w, torch.full((len(c2w),), FOV_DEG), 96, 96))
    middle = -(origins * directions).sum(dim=-1)
    step = grid.step / 16
    along = torch.arange(-0.6, 0.6, step)
    past = torch.linalg.cross(origins, directions).norm(dim=-1)
    distance = torch.sqrt(past[..., None].square() + along.square())
    tau = (scene.density(distance[..., None]) * step).cumsum(dim=-1)
    expected = middle + along[(tau < np.log(2)).sum(dim=-1).clamp(max=len(along) - 1)]
    expected *= -torch.einsum("vyxi,vi->vyx", directions, c2w[:, :3, 2])
    found = sight.depth[:, 4::8, 4::8]
    inside = (past < 0.33).numpy()
    assert inside.any() and np.isinf(found[(past > 0.35 + 5 * skin).numpy()]).all()
    assert np.abs(found - expected.numpy())[inside].max() < grid.step


def test_likeness_falls_with_every_wrong_size() -> None:
    scene = Ball(0.35, 4000.0, 0.001)
    sight = sight_of(scene, grid_of(scene))
    balls = [trimesh.creation.icosphere(4, radius) for radius in (0.30, 0.33, 0.353, 0.38, 0.41)]
    for values in zip(*(likeness(ball.vertices, ball.faces, sight) for ball in balls), strict=True):
        assert np.argmax(values) == 2 and values[2] > 0.95 and values[0] < 0.8 and values[4] < 0.8


def test_a_dent_shows_in_depths_alone() -> None:
    """A ball whose cap is mirrored into it, against one whose cap is cut off, or mirrored and not as deep."""
    ball = trimesh.creation.icosphere(5, 0.4)
    x, cap = ball.vertices[:, 0], ball.vertices[:, 0] > 0.25
    c2w = all_around(0.45).double().numpy()

    def dented(share: float) -> np.ndarray:
        return np.column_stack([np.where(cap, 0.25 - share * (x - 0.25), x), ball.vertices[:, 1:]])

    depth = np.stack([nearest_depth(dented(1.0), ball.faces, pose) for pose in c2w])
    found = [likeness(dented(share), ball.faces, Sight(c2w, depth, far=0.1)) for share in (0.0, 0.5, 1.0)]
    assert all(alike.silhouettes > 0.99 for alike in found)
    assert found[0].depths + 0.02 < found[1].depths < found[2].depths - 0.02 and found[2].depths == 1
    nothing = np.zeros((0, 3), dtype=np.int64)
    assert likeness(ball.vertices, nothing, Sight(c2w, np.full_like(depth, np.inf), 0.1)) == (1, 1)
    assert likeness(ball.vertices, nothing, Sight(c2w, depth, 0.1)) == (0, 0)
