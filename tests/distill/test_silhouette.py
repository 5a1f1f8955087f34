from __future__ import annotations

import numpy as np
import torch
import trimesh
from analytic_scenes import Ball

from data.cameras import camera_rays
from distill.silhouette import FOV_DEG, all_around, filled, opacity_masks, silhouette_iou, silhouettes
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


def test_silhouette_of_a_ball_and_of_a_box_is_what_rays_meet() -> None:
    c2w = all_around(0.6)
    origins, directions = camera_rays(c2w, torch.full((len(c2w),), FOV_DEG), 96, 96)
    nearest = torch.linalg.cross(origins, directions).norm(dim=-1).numpy()
    ball = trimesh.creation.icosphere(5, 0.5)
    found = silhouettes(ball.vertices, ball.faces, c2w.numpy(), 96)
    assert (found[nearest < 0.498]).all() and not found[nearest > 0.501].any()
    low, high = (((sign * 0.3) - origins) / directions for sign in (-1, 1))
    near, far = torch.minimum(low, high).amax(-1), torch.maximum(low, high).amin(-1)
    box = trimesh.creation.box((0.6, 0.6, 0.6))
    found = silhouettes(box.vertices, box.faces, c2w.numpy(), 96)
    assert (found != (near < far).numpy()).mean() < 1e-4


def test_iou_falls_with_every_wrong_size() -> None:
    torch.manual_seed(0)
    scene, grid = Ball(0.35, 4000.0, 0.001), OccupancyGrid(0.6, VolumeConfig(samples_per_ray=400))
    for _ in range(4):
        grid.update(scene.density)
    masks = opacity_masks(scene, grid)
    ious = []
    for radius in (0.30, 0.33, 0.353, 0.38, 0.41):
        ball = trimesh.creation.icosphere(4, radius)
        ious.append(silhouette_iou(ball.vertices, ball.faces, masks))
    assert np.argmax(ious) == 2 and ious[2] > 0.98 and ious[0] < 0.8 and ious[4] < 0.8
