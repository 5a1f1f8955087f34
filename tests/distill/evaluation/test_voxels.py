"""What lies inside a mesh."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from distill.evaluation.measure import shared_volume
from distill.evaluation.voxels import inside, mesh2sdf_inside, volume_iou


def filled(mesh: trimesh.Trimesh, size: int = 64) -> np.ndarray:
    return inside(np.asarray(mesh.triangles), size, -1.0, 2 / size)


def test_a_ball_has_its_volume() -> None:
    ball = trimesh.creation.icosphere(subdivisions=4, radius=0.7)
    share = filled(ball).mean() * 8
    assert share == pytest.approx(4 / 3 * np.pi * 0.7**3, rel=0.01)


def test_points_are_inside_where_the_winding_number_says_so() -> None:
    """A ring and a ball beside it, turned, so that no side lies on the grid."""
    mesh = trimesh.util.concatenate(
        [
            trimesh.creation.annulus(0.3, 0.8, 0.5),
            trimesh.creation.icosphere(radius=0.15).apply_translation((0, 0, 0.7)),
        ]
    )
    mesh.apply_transform(trimesh.transformations.rotation_matrix(0.7, (1, 2, 3)))
    grid = -1 + np.stack(np.meshgrid(*[np.arange(20)] * 3, indexing="ij"), axis=-1).reshape(-1, 3) / 10
    # The sum of the solid angles of all triangles (van Oosterom and Strackee 1983) is 4 pi inside and 0 outside.
    a, b, c = (np.asarray(mesh.triangles)[:, i] - grid[:, None] for i in range(3))
    la, lb, lc = (np.linalg.norm(x, axis=-1) for x in (a, b, c))
    over = np.einsum("pti,pti->pt", a, np.cross(b, c))
    under = la * lb * lc + (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
    winding = 2 * np.arctan2(over, under).sum(axis=1) / (4 * np.pi)
    ours = inside(np.asarray(mesh.triangles), 20, -1.0, 0.1).ravel()
    assert np.array_equal(ours, winding > 0.5)
    assert 0.05 < ours.mean() < 0.5


def test_a_hole_is_outvoted() -> None:
    ball = trimesh.creation.icosphere(subdivisions=4, radius=0.7)
    whole = filled(ball)
    top = np.asarray(ball.triangles_center)[:, 2] > 0.68
    open_ball = trimesh.Trimesh(ball.vertices, ball.faces[~top], process=False)
    assert volume_iou(filled(open_ball), whole) > 0.998


@pytest.mark.parametrize("shift", [0.0, 0.25, 0.5])
def test_shifted_boxes_share_what_they_share(shift: float) -> None:
    one, other = trimesh.creation.box(), trimesh.creation.box().apply_translation((shift, 0, 0))
    assert shared_volume(one, other, 96) == pytest.approx((1 - shift) / (1 + shift), abs=0.02)


def test_nothing_in_common_and_nothing_at_all() -> None:
    one = np.zeros((4, 4, 4), dtype=bool)
    assert volume_iou(one, one) == 0.0
    other = one.copy()
    other[0] = True
    assert volume_iou(other, ~other) == 0.0
    assert volume_iou(other, other) == 1.0


def test_sides_on_the_grid_do_not_count_as_mesh2sdf_has_it() -> None:
    """A unit box at the origin: its sides lie on grid points -0.5 and 0.5, of which mesh2sdf counts neither."""
    box = trimesh.creation.box()
    found = mesh2sdf_inside(np.asarray(box.vertices), np.asarray(box.faces), 64)
    assert int(found.sum()) == 31**3


def test_what_two_parts_share_is_inside() -> None:
    """Two boxes that overlap by half against the one box that they fill; and a hollow of its own sides stays hollow."""
    left, right = (trimesh.creation.box().apply_translation((x, 0, 0)) for x in (-0.25, 0.25))
    both = trimesh.util.concatenate([left, right])
    assert shared_volume(both, trimesh.creation.box((1.5, 1, 1)), 64) > 0.999
    ring = trimesh.creation.torus(0.6, 0.25)
    turned = ring.faces.copy()
    turned[::2] = turned[::2, ::-1]  # half of them face inwards
    mixed = trimesh.Trimesh(ring.vertices, turned, process=False)
    assert volume_iou(filled(mixed), filled(ring)) > 0.99
    hollow = trimesh.creation.icosphere(radius=0.4)
    hollow.invert()
    shell = trimesh.util.concatenate([trimesh.creation.icosphere(radius=0.8), hollow])
    share = filled(shell).sum() / filled(trimesh.creation.icosphere(radius=0.8)).sum()
    assert share == pytest.approx(1 - 0.5**3, abs=0.01)
