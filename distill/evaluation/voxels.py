"""What of a grid lies inside a mesh, and how much of it two meshes share.

Shapes: T triangles; grids are (N, N, N) with x first.
"""

from __future__ import annotations

import numpy as np

from distill.silhouette import cells_of_rectangles

MIXED = 0.1  # share of uneven lines from which faces are taken to look either way


def volume_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Cells in both / cells in either; 0 where neither has any, since then nothing was found to be alike."""
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 0.0


def inside(corners: np.ndarray, size: int, low: float, step: float) -> np.ndarray:
    """corners (T, 3, 3) -> (size,)*3 bool: grid points low + i * step inside by the majority of the three axes.

    Along each axis a point is inside when more triangles before it face one way than the other, so that what two parts
    that face the same way share is inside too.  A line that does not come out even meets faces that are turned or gone:
    there an odd number before the point counts, and everywhere when many lines do not.  Where a mesh is open the axes
    disagree; two of three are right unless the hole is large.
    """
    votes = np.zeros((size, size, size), dtype=np.int8)
    for axis in range(3):
        order = [axis, (axis + 1) % 3, (axis + 2) % 3]  # this axis first
        wound, passed = (crossings(corners[..., order], size, low, step, facing) for facing in (True, False))
        uneven = wound[-1] != 0
        if uneven.sum() > MIXED * (passed[-1] > 0).sum():
            uneven[:] = True
        within = np.where(uneven, passed[:-1] % 2 == 1, wound[:-1] != 0)
        votes += np.transpose(within, np.argsort(order)).astype(np.int8)
    return votes >= 2


def crossings(corners: np.ndarray, size: int, low: float, step: float, facing: bool) -> np.ndarray:
    """corners (T, 3, 3) -> (size + 1, size, size): how many triangles the line from -x to the grid point crosses.

    The last of x is the whole line.  facing: those that face one way less those that face the other.

    Points on an edge of the projected triangles go to one side by symbolic perturbation, so that neighbours neither
    share nor miss them; a triangle at i lies before the points i and beyond (Batty's SDFGen, which mesh2sdf wraps).
    """
    grid = (corners.astype(np.float64) - low) / step
    first = np.clip(np.ceil(grid[..., 1:].min(axis=1)), 0, size - 1).astype(np.int64)
    last = np.clip(np.floor(grid[..., 1:].max(axis=1)), 0, size - 1).astype(np.int64)
    crossed = np.zeros((size + 1) * size * size)
    for face, y, z in cells_of_rectangles(first, last):
        a, b, c = (grid[face, i, 1:] - np.stack([y, z], axis=1) for i in range(3))
        (sign_a, twice_a), (sign_b, twice_b), (sign_c, twice_c) = side(b, c), side(c, a), side(a, b)
        hit = (sign_a != 0) & (sign_a == sign_b) & (sign_a == sign_c)
        wa, wb, wc = twice_a[hit], twice_b[hit], twice_c[hit]
        total = wa + wb + wc
        xa, xb, xc = grid[face[hit], :, 0].T
        x = wa / total * xa + wb / total * xb + wc / total * xc  # rounded as there: a side may lie on the grid
        place = np.clip(np.ceil(x), 0, size).astype(np.int64)
        way = sign_a[hit] if facing else np.ones(len(place))
        crossed += np.bincount((place * size + y[hit]) * size + z[hit], weights=way, minlength=len(crossed))
    return crossed.reshape(size + 1, size, size).cumsum(axis=0)


def side(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sign and value of twice the area of (0, a, b), a and b (K, 2); the sign is 0 only where a equals b."""
    twice = a[:, 1] * b[:, 0] - a[:, 0] * b[:, 1]
    tie = np.where(a[:, 1] == b[:, 1], np.sign(a[:, 0] - b[:, 0]), np.sign(b[:, 1] - a[:, 1]))
    return np.where(twice == 0, tie, np.sign(twice)), twice


def mesh2sdf_inside(vertices: np.ndarray, triangles: np.ndarray, size: int = 64) -> np.ndarray:
    """What `mesh2sdf.compute(vertices, triangles, size) < 0` says (mesh2sdf 1.1.0): grid points -1 + i * 2 / size.

    Vertices in fp32, parity along x alone, and points at a distance of exactly 0 do not count as inside: flat sides of
    a unit box lie on the grid, so their distance is worked out in fp32, operation by operation as there.
    """
    corners = vertices.astype(np.float32)[triangles]
    step = np.float32(2.0) / np.float32(size)
    found = crossings(corners, size, -1.0, float(step), facing=False)[:-1] % 2 == 1
    found[on_surface(corners, size, step)] = False
    return found


def on_surface(corners: np.ndarray, size: int, step: np.float32) -> np.ndarray:
    """corners (T, 3, 3) fp32 -> (size,)*3 bool: grid points whose fp32 distance to a triangle is 0."""
    grid = (corners.astype(np.float64) + 1) / float(step)
    slack = 1e-3
    first = np.clip(np.ceil(grid.min(axis=1) - slack), 0, size - 1).astype(np.int64)
    last = np.clip(np.floor(grid.max(axis=1) + slack), -1, size - 1).astype(np.int64)
    spans = np.maximum(last - first + 1, 0)
    found = np.zeros((size, size, size), dtype=bool)
    for face, x, rest in cells_of_rectangles(
        np.stack([first[:, 0], 0 * first[:, 0]], axis=1),
        np.stack([last[:, 0], spans[:, 1] * spans[:, 2] - 1], axis=1),
    ):
        y, z = first[face, 1] + rest // spans[face, 2], first[face, 2] + rest % spans[face, 2]
        place = np.stack([x, y, z], axis=1)
        zero = distance_is_zero((place.astype(np.float32) * step - np.float32(1)), corners[face])
        found[tuple(place[zero].T)] = True
    return found


def distance_is_zero(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """fp32 points (K, 3), corners (K, 3, 3): SDFGen's point_triangle_distance == 0."""
    f32 = np.float32

    def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1]) + a[:, 2] * b[:, 2]

    def segment(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        along = q - p
        share = (dot(q - points, along).astype(np.float64) / dot(along, along).astype(np.float64)).astype(f32)
        share = np.clip(share, f32(0), f32(1))[:, None]
        return (points == share * p + (f32(1) - share) * q).all(axis=1)

    one, two, three = corners.swapaxes(0, 1)
    a, b, c = one - three, two - three, points - three
    aa, bb, ab, ac, bc = dot(a, a), dot(b, b), dot(a, b), dot(a, c), dot(b, c)
    with np.errstate(invalid="ignore", divide="ignore"):
        over = f32(1) / np.maximum(aa * bb - ab * ab, f32(1e-30))
        first, second = over * (bb * ac - ab * bc), over * (aa * bc - ab * ac)
        third = f32(1) - first - second
        in_plane = first[:, None] * one + second[:, None] * two + third[:, None] * three
        within = (first >= 0) & (second >= 0) & (third >= 0)
        sides = [segment(one, two), segment(one, three), segment(two, three)]
    clamped = np.where(first > 0, sides[0] | sides[1], np.where(second > 0, sides[0] | sides[2], sides[1] | sides[2]))
    return np.where(within, (points == in_plane).all(axis=1), clamped)
