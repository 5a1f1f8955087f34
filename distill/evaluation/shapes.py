"""How alike two shapes are.  Plain functions of points and meshes; lengths in the units of what is given.

Shapes: P, Q points; X vertices, T triangles.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import trimesh
from scipy.spatial import cKDTree

from data.cameras import orbit_camera
from data.files import UserError
from distill.silhouette import FOV_DEG, all_around, nearest_depth, project

YAW_STEP_DEG = 5.0
COARSE_POINTS = 2_000  # for the search over rotations
NEIGHBOURS = 4
SIGHT = 512  # pixels a side of the pictures that tell what can be seen


class Samples(NamedTuple):
    """P points on a surface, uniform in area."""

    points: np.ndarray  # (P, 3)
    normals: np.ndarray  # (P, 3) unit, of the triangle
    corners: np.ndarray  # (P, 3, 3) of the triangle


def unit_box(vertices: np.ndarray) -> np.ndarray:
    """(X, 3) -> the longest side of the bounding box 1, its centre at the origin (SyncDreamer, eval_mesh.py)."""
    scaled = vertices * (1 / np.max(vertices.max(axis=0) - vertices.min(axis=0)))
    return scaled - (scaled.max(axis=0) + scaled.min(axis=0))[None] / 2


def in_box_of(points: np.ndarray, vertices: np.ndarray) -> np.ndarray:
    """Points (P, 3) of the mesh of these vertices (X, 3) -> where they lie when it is brought into a unit box."""
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    return (points - (low + high) / 2) / (high - low).max()


def sample_surface(mesh: trimesh.Trimesh, count: int, seed: int = 0) -> Samples:
    """`count` points on all of the surface, inside parts too."""
    points, faces = trimesh.sample.sample_surface(mesh, count, seed=seed)[:2]
    return Samples(np.asarray(points), np.asarray(mesh.face_normals)[faces], np.asarray(mesh.triangles)[faces])


def sample_visible(mesh: trimesh.Trimesh, count: int, seed: int = 0) -> Samples:
    """As `sample_surface`, but only points that some of 12 cameras outside and all around see: the skin of the object.

    What one cannot see (a seat's underside that lies on its frame, parts inside) is in many assets and in no picture.
    """
    vertices = np.asarray(mesh.vertices)
    centre = (vertices.max(axis=0) + vertices.min(axis=0)) / 2
    radius = float(np.linalg.norm(vertices - centre, axis=1).max())
    c2w = all_around(radius).double().numpy()
    c2w[:, :3, 3] += centre
    below = orbit_camera(0.0, -80.0, radius / np.sin(np.radians(FOV_DEG / 2))).double().numpy()[None]
    below[:, :3, 3] += centre
    poses = np.concatenate([c2w, below])
    depths = [nearest_depth(vertices, np.asarray(mesh.faces), pose, SIGHT) for pose in poses]

    def seen(points: np.ndarray) -> np.ndarray:
        found = np.zeros(len(points), dtype=bool)
        for pose, depth in zip(poses, depths, strict=True):
            x, y = np.clip(np.floor(project(points, pose, FOV_DEG, SIGHT)).astype(int), 0, SIGHT - 1).T
            away = -((points - pose[:3, 3]) @ pose[:3, 2])
            found |= away < depth[y, x] + 4 * radius / SIGHT  # two pixels' width
        return found

    kept: list[Samples] = []
    total, drawn = 0, 0
    while total < count:
        more = sample_surface(mesh, 2 * count, seed + drawn)
        which = seen(more.points)
        if not which.any() or drawn == 50:
            raise UserError("a mesh whose surface no camera around it sees cannot be compared")
        kept.append(Samples(*(column[which] for column in more)))
        total, drawn = total + int(which.sum()), drawn + 1
    return Samples(*(np.concatenate(column)[:count] for column in zip(*kept, strict=True)))


class Distances(NamedTuple):
    """From the points on each of two surfaces to the other surface."""

    to_truth: np.ndarray  # (P,)
    to_pred: np.ndarray  # (Q,)
    normal_agreement: float  # mean |cosine| between the normals of the pairs, both ways, in [0, 1]


def distances(pred: Samples, truth: Samples) -> Distances:
    to_truth, one = to_surface(pred, truth)
    to_pred, other = to_surface(truth, pred)
    return Distances(to_truth, to_pred, float(one.mean() + other.mean()) / 2)


def to_surface(samples: Samples, surface: Samples) -> tuple[np.ndarray, np.ndarray]:
    """Distances (P,) to the nearest of the triangles of the NEIGHBOURS nearest points, and |cosine| (P,) with it.

    To points alone the distance of a shape to itself would be that between neighbouring points.
    """
    _, nearest = cKDTree(surface.points).query(samples.points, k=NEIGHBOURS)
    size = float(np.ptp(surface.corners, axis=(0, 1)).max())  # trimesh's tolerances are absolute
    asked = np.repeat(samples.points, NEIGHBOURS, axis=0) / size
    foot = trimesh.triangles.closest_point(surface.corners[nearest.ravel()] / size, asked)
    away = size * np.linalg.norm(foot - asked, axis=1).reshape(nearest.shape)
    best = away.argmin(axis=1)
    rows = np.arange(len(best))
    normals = surface.normals[nearest[rows, best]]
    return away[rows, best], np.abs(np.einsum("pi,pi->p", samples.normals, normals))


def chamfer_l1(found: Distances) -> float:
    """Mean of both directions' mean distances (Mescheder et al. 2019, without their factor)."""
    return float(found.to_truth.mean() + found.to_pred.mean()) / 2


def chamfer_l2(found: Distances) -> float:
    """Sum of both directions' mean squared distances (Fan et al. 2017, divided by the number of points)."""
    return float(np.square(found.to_truth).mean() + np.square(found.to_pred).mean())


def f_score(found: Distances, near: float) -> float:
    """Harmonic mean of the shares of points within `near` of the other shape (Knapitsch et al. 2017)."""
    precision, recall = float((found.to_truth < near).mean()), float((found.to_pred < near).mean())
    return 2 * precision * recall / max(precision + recall, 1e-12)


def moved(motion: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(4, 4) rigid motion of points (P, 3)."""
    return points @ motion[:3, :3].T + motion[:3, 3]


def turned(points: np.ndarray, yaw_deg: float) -> np.ndarray:
    """Points (P, 3) turned about z."""
    angle = np.radians(yaw_deg)
    c, s = np.cos(angle), np.sin(angle)
    return points @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]).T


def best_yaw(pred: np.ndarray, truth: np.ndarray, vertices: np.ndarray | None = None) -> float:
    """Degrees about z that bring pred (P, 3) nearest to truth (Q, 3), by Chamfer distance; to a quarter of a degree.

    vertices (X, 3): of the mesh that pred lies on, which is brought into a unit box after the turn; None: it is not.
    """
    rng = np.random.default_rng(0)
    few = pred[rng.permutation(len(pred))[:COARSE_POINTS]]
    against = truth[rng.permutation(len(truth))[:COARSE_POINTS]]
    tree = cKDTree(against)

    def cost(yaw: float) -> float:
        moved = turned(few, yaw)
        if vertices is not None:
            moved = in_box_of(moved, turned(vertices, yaw))
        return float(tree.query(moved)[0].mean() + cKDTree(moved).query(against)[0].mean())

    best = min(np.arange(-180, 180, YAW_STEP_DEG), key=cost)
    for step in (YAW_STEP_DEG / 5, YAW_STEP_DEG / 20):
        best = min(best + step * np.arange(-5, 6), key=cost)
    return float(best)


def rigid_motion(pred: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(4, 4) that brings pred (P, 3), which lies nearly right, to truth (Q, 3): iterative closest points, unscaled."""
    rng = np.random.default_rng(0)
    few = pred[rng.permutation(len(pred))[: 4 * COARSE_POINTS]]
    return np.asarray(
        trimesh.registration.icp(few, truth, threshold=1e-7, max_iterations=60, reflection=False, scale=False)[0]
    )
