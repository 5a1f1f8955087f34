"""What a mesh and a field show in the same pictures: the depth of triangles and of half opacity, compared.

Shapes: V views, X vertices, T triangles, K (triangle, pixel) pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from data.cameras import camera_rays, orbit_camera
from distill.field import FieldSamples
from distill.turntable import RAYS_AT_ONCE
from distill.volume import OccupancyGrid, half_opaque_at, render

VIEWS, FOV_DEG, SIZE = 12, 40.0, 128
STEPS_APART = 6  # of the renderer: as far as depths may be apart
CELLS_AT_ONCE = 2**22  # of rectangles, listed together


class Sight(NamedTuple):
    """V pictures of where rays become half opaque, and the cameras they were taken with."""

    c2w: np.ndarray  # (V, 4, 4)
    depth: np.ndarray  # (V, S, S) along the view axis, object units; infinite where a ray never does
    far: float  # depths this far apart have nothing in common


def all_around(radius: float) -> torch.Tensor:
    """Cameras on all sides, below and above, that a ball of `radius` object units just fills -> c2w (VIEWS, 4, 4)."""
    elevation = torch.tensor([-20.0, 10.0, 40.0, 70.0]).repeat(VIEWS // 4)
    azimuth = torch.arange(VIEWS) * (360 / VIEWS)
    return orbit_camera(azimuth, elevation, radius / math.sin(math.radians(FOV_DEG / 2)))


@torch.no_grad()
def sight_of(field: Callable[..., FieldSamples], occupancy: OccupancyGrid, size: int = SIZE) -> Sight:
    """Where rays become half opaque, in views that the box around the live cells fills."""
    device = occupancy.live.device
    radius = float(torch.maximum(occupancy.low.abs(), occupancy.high.abs()).norm())
    c2w = all_around(max(radius, 1e-3))
    rays = camera_rays(c2w.to(device), torch.full((VIEWS,), FOV_DEG, device=device), size, size)
    away = []
    for o, d in zip(*(x.reshape(-1, 3).split(RAYS_AT_ONCE[device.type]) for x in rays), strict=True):
        seen = render(field, occupancy, o, d, torch.full((len(o),), 0.5, device=device), normals=False)
        sample, distance = half_opaque_at(seen, occupancy.step)
        part = torch.full((len(o),), math.inf, dtype=torch.float64, device=device)
        part[seen.ray[sample]] = distance
        away.append(part)
    slope = -torch.einsum("vyxi,vi->vyx", rays[1], c2w[:, :3, 2].to(device))
    depth = torch.cat(away).view_as(slope) * slope
    return Sight(c2w.numpy(), depth.cpu().numpy(), STEPS_APART * occupancy.step)


def project(points: np.ndarray, c2w: np.ndarray, fov_deg: float, size: int) -> np.ndarray:
    """points (X, 3), world, in front of the camera c2w (4, 4) -> (X, 2) in pixels: x right, y down from the corner."""
    local = (points - c2w[:3, 3]) @ c2w[:3, :3]
    focal = size / 2 / math.tan(math.radians(fov_deg) / 2)
    return size / 2 + focal * local[:, :2] * (1, -1) / -local[:, 2:]


def filled(corners: np.ndarray, size: int, margin: float = 0.0) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pixels that triangles cover: (triangle (K,), pixel (K,), depth inside (K,)) piece by piece.

    corners (T, 3, 2) in pixels, either winding; pixel = y * size + x.  A pixel counts when its centre lies in the
    triangle, or, with `margin`, when the square of that half side round its centre touches it (exact but for sharp
    corners, where it may take one too many).  Depth inside: distance of the centre to the nearest side, negative
    outside.
    """
    low = np.clip(np.ceil(corners.min(axis=1) - 0.5 - margin), 0, size).astype(np.int64)
    high = np.clip(np.floor(corners.max(axis=1) - 0.5 + margin), -1, size - 1).astype(np.int64)
    along = np.roll(corners, -1, axis=1) - corners
    twice = along[:, 0, 0] * along[:, 1, 1] - along[:, 0, 1] * along[:, 1, 0]  # signed area
    length = np.linalg.norm(along, axis=2)
    # unit normals of the sides that point inwards; a triangle without area has no inside
    inward = np.stack([-along[..., 1], along[..., 0]], axis=-1) * np.sign(twice)[:, None, None]
    inward /= np.maximum(length, 1e-12)[..., None]
    slack = margin * np.abs(inward).sum(axis=-1)
    high[twice == 0] = -1
    for triangle, y, x in cells_of_rectangles(low[:, ::-1], high[:, ::-1]):
        inside = np.full(len(triangle), np.inf)
        kept = np.ones(len(triangle), dtype=bool)
        for side in range(3):
            start, normal = corners[triangle, side], inward[triangle, side]
            distance = (x + 0.5 - start[:, 0]) * normal[:, 0] + (y + 0.5 - start[:, 1]) * normal[:, 1]
            kept &= distance >= -slack[triangle, side]
            inside = np.minimum(inside, distance)
        yield triangle[kept], (y * size + x)[kept], inside[kept]


def cells_of_rectangles(first: np.ndarray, last: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """first, last (T, 2), inclusive -> (rectangle (K,), row (K,), column (K,)) of every cell, piece by piece."""
    spans = np.maximum(last - first + 1, 0)
    count = spans.prod(axis=1)
    ends = count.cumsum()
    start = 0
    while start < len(count):
        done = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, done + CELLS_AT_ONCE, side="right")), start + 1)
        which = np.repeat(np.arange(start, stop), count[start:stop])
        place = np.arange(len(which)) - (ends - count)[which] + done
        yield which, first[which, 0] + place // spans[which, 1], first[which, 1] + place % spans[which, 1]
        start = stop


def nearest_depth(vertices: np.ndarray, triangles: np.ndarray, c2w: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Distance along the view axis to the first triangle, either side, (size, size); infinite where there is none.

    For a camera c2w (4, 4) with the whole mesh before it.
    """
    flat = project(vertices, c2w, FOV_DEG, size)[triangles]
    nearness = (-1 / ((vertices - c2w[:3, 3]) @ c2w[:3, 2]))[triangles]  # linear on the screen, unlike the distance
    nearest = np.zeros(size * size)
    for face, pixel, _ in filled(flat, size):
        weights = flat_weights(flat[face], np.stack([pixel % size + 0.5, pixel // size + 0.5], axis=1))
        np.maximum.at(nearest, pixel, np.einsum("ki,ki->k", weights, nearness[face]))
    return np.divide(1, nearest, out=np.full(size * size, np.inf), where=nearest > 0).reshape(size, size)


def flat_weights(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Barycentric coordinates (K, 3) of points (K, 2) in triangles (K, 3, 2) that have an area."""
    a, b, c = corners.swapaxes(0, 1)

    def area(p: np.ndarray, q: np.ndarray, r: np.ndarray) -> np.ndarray:
        return (q[:, 0] - p[:, 0]) * (r[:, 1] - p[:, 1]) - (r[:, 0] - p[:, 0]) * (q[:, 1] - p[:, 1])

    parts = np.stack([area(points, b, c), area(a, points, c), area(a, b, points)], axis=1)
    return parts / parts.sum(axis=1, keepdims=True)


class Likeness(NamedTuple):
    """How alike a mesh and a field are in the same pictures, in [0, 1]; 1 where neither is in any."""

    silhouettes: float  # pixels that both cover / pixels that either covers, over all views together
    depths: float  # the same, but a pixel that both cover counts the less the further apart their depths are


def likeness(vertices: np.ndarray, triangles: np.ndarray, sight: Sight) -> Likeness:
    size = sight.depth.shape[-1]
    depth = np.stack([nearest_depth(vertices, triangles, pose, size) for pose in sight.c2w])
    covered, opaque = np.isfinite(depth), np.isfinite(sight.depth)
    either, both = int((covered | opaque).sum()), covered & opaque
    if not either:
        return Likeness(1.0, 1.0)
    apart = np.abs(depth[both] - sight.depth[both])
    return Likeness(int(both.sum()) / either, float(np.maximum(1 - apart / sight.far, 0).sum()) / either)
