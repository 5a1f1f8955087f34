"""Other papers' protocols: each convention held against an independent way to the same number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial.distance import cdist
from torchmetrics.image import StructuralSimilarityIndexMeasure

from data.files import UserError
from distill.evaluation import presets


def ball(radius: float, subdivisions: int = 4) -> trimesh.Trimesh:
    return trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)


def test_syncdreamer_scales_the_truth_and_not_the_prediction() -> None:
    found = presets.syncdreamer_mesh(ball(0.4), ball(3.0))
    assert found["chamfer"] == pytest.approx(0.1, abs=2e-3)  # 0.5 - 0.4: the truth in a unit box has radius 0.5
    assert found["volume_iou"] == pytest.approx((0.4 / 0.5) ** 3, abs=0.01)
    same = presets.syncdreamer_mesh(ball(0.5), ball(3.0))
    assert same["chamfer"] < 2e-3
    assert same["volume_iou"] > 0.99


def test_syncdreamer_turns_the_truth() -> None:
    bar = trimesh.creation.box((1, 0.3, 0.2))
    turned = bar.copy().apply_transform(trimesh.transformations.rotation_matrix(np.radians(40), (0, 0, 1)))
    pred = trimesh.creation.box((1, 0.3, 0.2))
    # A box turned back by 40 degrees has the unit box of the turned one, so it is smaller by their ratio.
    pred.apply_scale(1 / np.ptp(turned.vertices, axis=0).max())
    assert presets.syncdreamer_mesh(pred, turned, truth_yaw_deg=40)["chamfer"] < 3e-3
    assert presets.syncdreamer_mesh(pred, turned)["chamfer"] > 0.03


def test_syncdreamer_refuses_a_mesh_that_its_cameras_are_in() -> None:
    with pytest.raises(UserError, match=r"reaches 1\.2 from it"):
        presets.syncdreamer_mesh(ball(1.2), ball(0.5))


def test_what_the_16_cameras_see_lies_where_rays_meet_the_mesh() -> None:
    """Points of a triangle facing the camera, away from edges, against trimesh's ray caster."""
    mesh = ball(0.45, subdivisions=5)
    for number in (0, 5):
        c2w = presets.camera_16(number)
        depth, mask = presets.flat_depth(np.asarray(mesh.vertices), np.asarray(mesh.faces), c2w)
        rows, columns = np.nonzero(mask)
        chosen = np.random.default_rng(0).permutation(len(rows))[:200]
        rows, columns = rows[chosen], columns[chosen]
        local = np.stack([(columns + 0.5 - 128) / 280, -(rows + 0.5 - 128) / 280, -np.ones(len(rows))], axis=1)
        directions = local @ c2w[:3, :3].T
        # A ball: the first meeting of the ray with it, by the quadratic formula.
        origin = c2w[:3, 3]
        a, b = (directions**2).sum(1), directions @ origin
        root = b**2 - a * (origin @ origin - 0.45**2)
        well_inside = root > 0.02
        away = (-b - np.sqrt(np.maximum(root, 0))) / a
        np.testing.assert_allclose(depth[rows, columns][well_inside], away[well_inside], atol=2e-3)


def test_depth_pictures_are_preferred_to_the_mesh() -> None:
    """16-bit depth of a small ball beside a large one as mesh: the distance is that to the pictures."""
    small = ball(0.3)
    pictures = []
    for number in range(16):
        depth, mask = presets.flat_depth(np.asarray(small.vertices), np.asarray(small.faces), presets.camera_16(number))
        low, high = presets.DEPTH_RANGE
        pictures.append(
            np.where(mask, (np.where(mask, depth, low) - low) / (high - low) * 65535, 65535).astype(np.uint16)
        )
    found = presets.syncdreamer_mesh(ball(0.3), ball(0.5), np.stack(pictures))
    assert found["chamfer"] < 2e-3
    with pytest.raises(UserError, match="16 of 256 x 256"):
        presets.points_of_depth(np.zeros((3, 8, 8), dtype=np.uint16))


def test_thinning_has_one_point_a_voxel() -> None:
    points = np.random.default_rng(0).random((500, 3)).astype(np.float32)
    thin = presets.thinned(points, 0.25)
    start = points.min(axis=0) - 0.125
    cells = {tuple(np.floor((p - start) / 0.25).astype(int)) for p in points.astype(np.float64)}
    assert len(thin) == len(cells)
    members = [p for p in points if tuple(np.floor((p - start) / 0.25).astype(int)) == (1, 1, 1)]
    assert (np.abs(thin - np.mean(members, axis=0)).max(axis=1) < 1e-6).any()


def test_eschernet_judges_corners() -> None:
    coarse, fine = trimesh.creation.box(), trimesh.creation.box().subdivide().subdivide()
    other = trimesh.creation.icosphere(subdivisions=2, radius=0.5)

    def brute(a: trimesh.Trimesh, b: trimesh.Trimesh) -> float:
        away = cdist(np.asarray(a.vertices), np.asarray(b.vertices))
        return (away.min(axis=0).mean() + away.min(axis=1).mean()) / 2

    for mesh in (coarse, fine):
        assert presets.eschernet_mesh(mesh, other)["chamfer"] == pytest.approx(brute(mesh, other), abs=1e-6)
    assert presets.eschernet_mesh(coarse, fine)["chamfer"] > 0.1  # one shape, other triangles
    assert presets.eschernet_mesh(coarse, fine)["volume_iou"] == 1


def test_eschernet_scales_both() -> None:
    found = presets.eschernet_mesh(ball(0.1), ball(5.0))
    assert found["chamfer"] < 1e-6
    assert found["volume_iou"] > 0.999


def rgba(seed: int, size: int = 256) -> np.ndarray:
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (size, size, 4), dtype=np.uint8)
    picture[: size // 2, :, 3] = 0
    picture[size // 2 :, : size // 2, 3] = 255
    return picture


def test_syncdreamer_blends_over_white_in_floating_point() -> None:
    a, b = rgba(0), rgba(1)
    over = []
    for picture in (a, b):
        colour, alpha = picture[..., :3] / 255.0, picture[..., 3:] / 255.0
        over.append(colour * alpha + 1 - alpha)
    found = presets.syncdreamer_view(a, b)
    assert found["psnr"] == pytest.approx(-10 * np.log10(np.mean((over[0] - over[1]) ** 2)), abs=1e-4)
    ours, true = (torch.from_numpy(x).permute(2, 0, 1)[None].float() for x in over)
    assert found["ssim"] == pytest.approx(float(StructuralSimilarityIndexMeasure()(ours, true)), abs=1e-5)


def test_eschernet_whitens_only_what_is_fully_clear() -> None:
    picture = rgba(2)
    seen = presets.eschernet_picture(picture)
    assert (seen[:128] == 255).all()
    partly = picture[..., 3] > 0
    assert (np.abs(seen[partly].astype(int) - picture[..., :3][partly]) <= 1).all()  # as it is, not blended
    error = np.mean((presets.eschernet_picture(picture[..., :3]).astype(float) - seen) ** 2)
    assert presets.eschernet_view(picture, picture)["psnr"] == pytest.approx(10 * np.log10(255**2 / error), abs=1e-6)
    equal = presets.eschernet_view(picture[..., :3], picture[..., :3])
    assert equal["psnr"] > 300 and equal["ssim"] == pytest.approx(1)
