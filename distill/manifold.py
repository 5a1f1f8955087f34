"""Triangles made a closed surface that modellers and game engines accept, and fewer of them.

A surface is sound when each side of a triangle belongs to exactly one other triangle, which runs through it the other
way, and no triangle is flat or there twice.  Shapes: X vertices, T triangles.
Half-edge 3 t + i of triangle t goes from its corner i to corner i + 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import fast_simplification
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

FLAT = 1e-14  # object units squared: triangles with less area vanish in 32-bit coordinates
NUDGE = 0.01  # of the way to the middle of its triangles that a vertex moves away from its twin

Surface = tuple[np.ndarray, np.ndarray]  # vertices (X, 3), triangles (T, 3)


def half_edges(triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vertices where each half-edge starts and ends, (3 T,) each."""
    return triangles.ravel(), np.roll(triangles, -1, axis=1).ravel()


def areas(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """(T,) object units squared."""
    a, b, c = vertices[triangles].swapaxes(0, 1)
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2


def signed_volumes(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """(T,) of the tetrahedra with the origin: over a closed outward surface they add up to its volume."""
    a, b, c = vertices[triangles].swapaxes(0, 1)
    return np.einsum("ij,ij->i", a, np.cross(b, c)) / 6


def faults(vertices: np.ndarray, triangles: np.ndarray) -> dict[str, int]:
    """How often each thing is wrong; empty for a sound surface.  "open" alone is a surface with a border."""
    start, end = half_edges(triangles)
    key = np.minimum(start, end) * len(vertices) + np.maximum(start, end)
    _, edge, count = np.unique(key, return_inverse=True, return_counts=True)
    balance = np.bincount(edge, weights=np.where(start < end, 1, -1))
    found = {
        "open": int((count == 1).sum()),
        "shared by three or more": int((count > 2).sum()),
        "turned over": int(((count == 2) & (balance != 0)).sum()),
        "twice": len(triangles) - len(np.unique(np.sort(triangles, axis=1), axis=0)),
        "flat": int((areas(vertices.astype(np.float32).astype(np.float64), triangles) < FLAT).sum()),
    }
    return {name: number for name, number in found.items() if number}


def without_folds(triangles: np.ndarray) -> np.ndarray:
    """Without triangles that name a vertex twice, and without pairs that cover each other back to back."""
    a, b, c = triangles.T
    kept = triangles[(a != b) & (b != c) & (c != a)]
    a, b, c = kept.T
    _, same = np.unique(np.sort(kept, axis=1), axis=0, return_inverse=True)
    up = np.sign(a - b) * np.sign(b - c) * np.sign(c - a) > 0  # whether the corners are an even permutation
    ups, downs = (np.bincount(same, weights=side).astype(np.int64) for side in (up, ~up))
    order = np.lexsort((up, same))
    side = 2 * same[order] + up[order]
    rank = np.empty(len(kept), dtype=np.int64)  # among those of the same corners and side
    rank[order] = np.arange(len(kept)) - np.searchsorted(side, side)
    return kept[rank >= np.minimum(ups, downs)[same]]


def partners(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """For each half-edge the one of the neighbouring triangle, (3 T,); -1 on a border.

    Where more than two triangles meet at an edge, those that enclose a piece of the inside are neighbours, so that
    bodies that only touch come apart.
    """
    start, end = half_edges(triangles)
    key = np.minimum(start, end) * len(vertices) + np.maximum(start, end)
    order = np.argsort(key, kind="stable")
    _, first, count = np.unique(key[order], return_index=True, return_counts=True)
    partner = np.full(len(key), -1)
    one, other = order[first[count == 2]], order[first[count == 2] + 1]
    opposite = start[one] == end[other]
    partner[one[opposite]], partner[other[opposite]] = other[opposite], one[opposite]
    for f, n in zip(first[count > 2], count[count > 2], strict=True):
        around = order[f : f + n]
        tips = vertices[triangles[around // 3, (around + 2) % 3]]
        low, high = sorted((start[around[0]], end[around[0]]))
        for here, there in matched(vertices[low], vertices[high], tips, start[around] == low):
            partner[around[here]], partner[around[there]] = around[there], around[here]
    return partner


def matched(low: np.ndarray, high: np.ndarray, tips: np.ndarray, forwards: np.ndarray) -> Iterator[tuple[int, int]]:
    """Neighbours among the triangles round the edge from `low` to `high` (3,): their numbers in `tips` (N, 3).

    forwards (N,): whether a triangle runs through the edge from low to high.  Seen along the edge, the inside follows
    anticlockwise on a triangle that runs backwards, and precedes one that runs forwards: brackets round the inside.
    """
    axis, arms = high - low, tips - low
    right = np.cross(axis, arms[0])
    angle = np.arctan2(arms @ right * np.linalg.norm(axis), arms @ np.cross(right, axis))
    ring = np.argsort(angle, kind="stable").tolist()
    waiting: list[int] = []
    done: set[int] = set()
    for one in (*ring, *ring):  # twice: the first bracket may close behind the last
        if one in done or one in waiting:
            continue
        if not forwards[one]:
            waiting.append(one)
        elif waiting:
            done |= {one, waiting[-1]}
            yield one, waiting.pop()


def separated(vertices: np.ndarray, triangles: np.ndarray, partner: np.ndarray) -> Surface:
    """A vertex for each fan of neighbouring triangles: what touches in a point or along an edge is two surfaces then.

    Twins move apart a little, so that programs that join vertices in one place do not undo it.
    """
    (half,) = np.nonzero(partner >= 0)
    other = partner[half]
    ends = np.concatenate([half, following(half)]), np.concatenate([following(other), other])
    graph = coo_array((np.ones(len(ends[0]), dtype=bool), ends), shape=(triangles.size,) * 2)
    fans, fan = connected_components(graph, directed=False)
    source = np.empty(fans, dtype=np.int64)
    source[fan] = triangles.ravel()
    apart = vertices[source]
    twin = np.bincount(source, minlength=len(vertices))[source] > 1
    middles = vertices[triangles].mean(axis=1).repeat(3, axis=0)
    sums = np.stack([np.bincount(fan, weights=axis, minlength=fans) for axis in middles.T], axis=1)
    middle = sums / np.bincount(fan, minlength=fans)[:, None]
    apart[twin] += NUDGE * (middle - apart)[twin]
    return apart, fan.reshape(-1, 3).astype(np.int64)


def parted_edges(vertices: np.ndarray, triangles: np.ndarray, partner: np.ndarray) -> Surface:
    """A new vertex in the middle of each edge but one that joins the same two vertices.

    Such edges remain where a surface touches itself along an edge and both ends lie in one fan.
    """
    start, end = half_edges(triangles)
    key = np.minimum(start, end) * len(vertices) + np.maximum(start, end)
    _, edge, count = np.unique(key, return_inverse=True, return_counts=True)
    (crowded,) = np.nonzero((count[edge] > 2) & (partner > np.arange(len(key))))
    _, kept = np.unique(edge[crowded], return_index=True)
    middles, middle_of = [vertices], {}
    for half in np.delete(crowded, kept).tolist():
        other = int(partner[half])
        middle = (vertices[start[half]] + vertices[end[half]]) / 2
        tips = vertices[triangles[[half // 3, other // 3], [(half + 2) % 3, (other + 2) % 3]]]
        middle_of[half] = middle_of[other] = len(vertices) + len(middles) - 1
        middles.append((middle + NUDGE * (tips.mean(axis=0) - middle))[None])
    split = sorted({half // 3 for half in middle_of})
    parts = [np.delete(triangles, split, axis=0)]
    for number in split:
        halves = range(3 * number, 3 * number + 3)
        outline = [v for half in halves for v in (int(start[half]), middle_of.get(half, -1)) if v >= 0]
        first = next(i for i, v in enumerate(outline) if v >= len(vertices))
        hub, *others = outline[first:] + outline[:first]
        parts.append(np.array([[hub, a, b] for a, b in pairwise(others)]))
    return np.concatenate(middles), np.concatenate(parts)


def following(half: np.ndarray) -> np.ndarray:
    """The next half-edge of the same triangle."""
    return half - half % 3 + (half + 1) % 3


def sound(vertices: np.ndarray, triangles: np.ndarray) -> Surface:
    """The same surface without folds, and with twins for vertices and edges where it touches itself."""
    triangles = without_folds(triangles)
    if not len(triangles):
        return vertices[:0], triangles
    partner = partners(vertices, triangles)
    return parted_edges(*separated(vertices, triangles, partner), partner)


def large_pieces(vertices: np.ndarray, triangles: np.ndarray, keep_share: float) -> Surface:
    """The connected pieces with at least `keep_share` of the largest one's triangles, less hollows inside of bodies.

    A hollow is a piece that encloses a negative volume: its triangles face inwards and nobody sees them.  Nothing is
    left of hollows alone.
    """
    if not len(triangles):
        return vertices[:0], triangles
    edges = np.concatenate([triangles[:, :2], triangles[:, 1:]])
    graph = coo_array((np.ones(len(edges), dtype=bool), edges.T), shape=(len(vertices),) * 2)
    _, piece = connected_components(graph, directed=False)
    of_triangle = piece[triangles[:, 0]]
    body = np.bincount(of_triangle, weights=signed_volumes(vertices, triangles)) > 0
    sizes = np.bincount(of_triangle) * body
    kept = triangles[(body & (sizes >= keep_share * sizes.max()))[of_triangle]]
    used = np.unique(kept)
    renumber = np.zeros(len(vertices), dtype=np.int64)
    renumber[used] = np.arange(len(used))
    return vertices[used], renumber[kept]


def decimated(vertices: np.ndarray, triangles: np.ndarray, faces: int, keep_share: float) -> Surface:
    """About `faces` triangles, or more where fewer would not be sound; the surface itself, with a warning, at worst.

    Quadric error metric (Garland and Heckbert 1997), by fast-simplification.
    """
    aim, before = faces, set(faults(vertices, triangles))
    while 0 < aim < len(triangles):
        # Taking apart what touches can leave crumbs; a whole piece keeps a similar share of the triangles.
        fewer = large_pieces(*sound(*simplified(vertices, triangles, aim)), keep_share / 4)
        if len(fewer[1]) and set(faults(*fewer)) <= before:
            return fewer
        print(f"warning: the mesh would not be sound with {aim} faces: {faults(*fewer)}", flush=True)
        aim *= 2
    if faces and aim > faces:
        print(f"warning: the mesh keeps its {len(triangles)} faces instead of mesh.faces={faces}", flush=True)
    return vertices, triangles


def simplified(vertices: np.ndarray, triangles: np.ndarray, faces: int) -> Surface:
    points, fewer = fast_simplification.simplify(
        np.ascontiguousarray(vertices, dtype=np.float64), np.ascontiguousarray(triangles), target_count=faces
    )[:2]
    return np.asarray(points, dtype=np.float64), np.asarray(fewer, dtype=np.int64)
