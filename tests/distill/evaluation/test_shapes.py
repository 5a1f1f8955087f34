"""Shape metrics on shapes whose distances are known."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.evaluation import shapes


def box(size: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> trimesh.Trimesh:
    return trimesh.creation.box(size)


def apart(pred: trimesh.Trimesh, truth: trimesh.Trimesh, count: int = 20_000) -> shapes.Distances:
    return shapes.distances(shapes.sample_surface(pred, count), shapes.sample_surface(truth, count, seed=1))


def test_a_shape_is_at_no_distance_from_itself() -> None:
    found = apart(box(), box())
    assert shapes.chamfer_l1(found) < 1e-4
    assert shapes.chamfer_l2(found) < 1e-6
    assert shapes.f_score(found, 0.01) == pytest.approx(1.0, abs=1e-3)
    assert found.normal_agreement == pytest.approx(1.0, abs=5e-3)


def test_concentric_spheres_are_their_radii_apart() -> None:
    inner, outer = (trimesh.creation.icosphere(subdivisions=5, radius=radius) for radius in (0.4, 0.5))
    found = apart(inner, outer)
    assert shapes.chamfer_l1(found) == pytest.approx(0.1, abs=1e-3)
    assert shapes.chamfer_l2(found) == pytest.approx(2 * 0.01, abs=4e-4)
    assert shapes.f_score(found, 0.09) == 0
    assert shapes.f_score(found, 0.11) == 1
    assert found.normal_agreement > 0.99


def test_a_longer_box_is_at_the_analytic_distance() -> None:
    """One unit cube, one stretched by s along x: only the overhang beyond the cube's end is away from it."""
    cube, long = box(), box((2.0, 1.0, 1.0))
    found = apart(long, cube, 60_000)
    # Sides of the long box beyond |x| = 1/2: 4 sides x 1/2 on each end, area 2 x (4 x 1/2 x 1), mean distance 1/4
    # (flat sides lie beside the cube's edge), and two ends of area 1 at distance 1/2; whole area 10.
    assert found.to_truth.mean() == pytest.approx((4 * 0.25 + 2 * 0.5) / 10, rel=0.02)
    # The cube's ends lie inside: from each point the nearest long side, mean of min(y, 1-y, z, 1-z) = 1/6; of area 6.
    assert found.to_pred.mean() == pytest.approx(2 / 6 / 6, rel=0.02)


@given(st.floats(0.01, 100), st.integers(0, 5))
@settings(max_examples=8, deadline=None)
def test_scaling_both_changes_distances_alike(scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = (trimesh.creation.icosphere(subdivisions=2, radius=r) for r in (0.4, 0.5))
    one.vertices += rng.normal(size=3) * 0.1
    before = apart(one, other, 2000)
    for mesh in (one, other):
        mesh.apply_scale(scale)
    after = apart(one, other, 2000)
    assert shapes.chamfer_l1(after) == pytest.approx(
        scale * shapes.chamfer_l1(before), rel=1e-3
    )  # its closest points are to 1e-8
    assert shapes.f_score(after, 0.05 * scale) == pytest.approx(shapes.f_score(before, 0.05), abs=1e-3)


def test_unit_box() -> None:
    vertices = np.random.default_rng(0).normal(size=(50, 3)) * (3, 1, 2) + 7
    scaled = shapes.unit_box(vertices)
    assert np.ptp(scaled, axis=0).max() == pytest.approx(1)
    np.testing.assert_allclose(scaled.max(axis=0) + scaled.min(axis=0), 0, atol=1e-12)


@pytest.mark.parametrize("yaw_deg", [-170.0, -33.25, 0.0, 47.5, 120.0])
def test_a_turn_about_z_is_found(yaw_deg: float) -> None:
    wedge = trimesh.creation.box((1, 0.4, 0.3))
    wedge = trimesh.util.concatenate([wedge, trimesh.creation.icosphere(radius=0.2).apply_translation((0.5, 0.2, 0.1))])
    truth = shapes.sample_surface(wedge, 4000).points
    pred = shapes.turned(shapes.sample_surface(wedge, 4000, seed=1).points, -yaw_deg)
    found = shapes.best_yaw(pred, truth)
    assert abs((found - yaw_deg + 180) % 360 - 180) <= 1.0


def test_icp_finds_a_small_rigid_motion() -> None:
    wedge = trimesh.util.concatenate(
        [trimesh.creation.box((1, 0.4, 0.3)), trimesh.creation.icosphere(radius=0.2).apply_translation((0.5, 0.2, 0.1))]
    )
    truth = shapes.sample_surface(wedge, 10_000).points
    moved = trimesh.transformations.rotation_matrix(np.radians(8), (1, 0.3, 0.2))
    moved[:3, 3] = 0.03, -0.02, 0.04
    pred = trimesh.transform_points(shapes.sample_surface(wedge, 10_000, seed=1).points, moved)
    found = shapes.rigid_motion(pred, truth)
    np.testing.assert_allclose(found @ moved, np.eye(4), atol=0.02)
    assert np.linalg.det(found[:3, :3]) == pytest.approx(1)


def test_what_no_camera_sees_is_left_out() -> None:
    """A ball inside a closed box is in no picture."""
    hollow = trimesh.util.concatenate([box(), trimesh.creation.icosphere(radius=0.3)])
    seen = shapes.sample_visible(hollow, 5000)
    assert len(seen.points) == 5000
    assert np.abs(seen.points).max(axis=1).min() > 0.49  # on the box's sides
    everything = shapes.sample_surface(hollow, 5000)
    assert (np.linalg.norm(everything.points, axis=1) < 0.31).any()
    for axis in range(3):  # every side is seen, the underside too
        for side in (-0.5, 0.5):
            share = (np.abs(seen.points[:, axis] - side) < 1e-6).mean()
            assert share == pytest.approx(1 / 6, abs=0.03)
