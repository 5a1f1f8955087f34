"""Camera conventions, against analytic values and the released code's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from data.cameras import camera_conditioning, camera_rays, framing_distance, orbit_angles, orbit_camera

# MVDream's get_camera(4, elevation=15), recorded from the released code (mvdream/camera_utils.py).
C, S = 0.9659258, 0.2588190
MVDREAM_ELEVATION_15 = torch.tensor(
    [
        [1, 0, 0, 0, 0, S, -C, -C, 0, C, S, S, 0, 0, 0, 1],
        [0, -S, C, C, 1, 0, 0, 0, 0, C, S, S, 0, 0, 0, 1],
        [-1, 0, 0, 0, 0, -S, C, C, 0, C, S, S, 0, 0, 0, 1],
        [0, S, -C, -C, -1, 0, 0, 0, 0, C, S, S, 0, 0, 0, 1],
    ]
)


def test_conditioning_is_mvdreams() -> None:
    c2w = orbit_camera(torch.arange(4) * 90.0, torch.tensor(15.0), torch.tensor(1.7))
    torch.testing.assert_close(camera_conditioning(c2w), MVDREAM_ELEVATION_15, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("convention", "recorded"),
    [
        ("mvdream", "get_camera_mvdream_4_elev15"),
        ("isotropic3d_released_2d", "get_camera_isotropic3d_4_elev15"),
        ("isotropic3d_released_sds", "get_camera_isotropic3d_sds_4_elev15"),
    ],
)
def test_conventions_are_the_recorded_ones(convention: str, recorded: str) -> None:
    c2w = orbit_camera(torch.arange(4) * 90.0, torch.tensor(15.0), torch.tensor(1.7))
    expected = load_file(Path(__file__).parents[1] / "models" / "released_w32.safetensors")[recorded]
    torch.testing.assert_close(camera_conditioning(c2w, convention), expected, atol=1e-6, rtol=0)
    batched = camera_conditioning(c2w.expand(3, 4, 4, 4), convention)
    torch.testing.assert_close(batched, expected.expand(3, 4, 16), atol=1e-6, rtol=0)


def test_unknown_conventions_are_refused() -> None:
    with pytest.raises(ValueError, match="'other' must be one of mvdream"):
        camera_conditioning(torch.eye(4)[None], "other")


@given(st.floats(0, 359.9), st.floats(-89, 89), st.floats(0.1, 50))
@settings(deadline=None)
def test_angles_are_the_inverse_of_the_orbit(azimuth: float, elevation: float, distance: float) -> None:
    c2w = orbit_camera(torch.tensor(azimuth), torch.tensor(elevation), distance)
    found = orbit_angles(c2w)
    assert abs((float(found[0]) - azimuth + 180) % 360 - 180) < 2e-2 and abs(float(found[1]) - elevation) < 2e-2


@given(st.floats(-720, 720), st.floats(-89, 89), st.floats(0.1, 50))
@settings(deadline=None)
def test_orbit_looks_at_the_origin(azimuth: float, elevation: float, distance: float) -> None:
    c2w = orbit_camera(*(torch.tensor(x, dtype=torch.float64) for x in (azimuth, elevation, distance))).double()
    rotation, position = c2w[:3, :3], c2w[:3, 3]
    assert torch.allclose(rotation @ rotation.T, torch.eye(3, dtype=torch.float64), atol=1e-5)
    assert torch.linalg.det(rotation) == pytest.approx(1, abs=1e-5)
    assert position.norm() == pytest.approx(distance, rel=1e-5)
    assert torch.allclose(-rotation[:, 2], -position / distance, atol=1e-5), "looks along -z, at the origin"
    assert rotation[2, 1] > 0, "world z is up in the picture"
    assert abs(rotation[2, 0]) < 1e-6, "the horizon is level"


def test_named_azimuths() -> None:
    positions = orbit_camera(torch.tensor([0.0, 90.0]), torch.tensor(0.0), torch.tensor(2.0))[:, :3, 3]
    torch.testing.assert_close(positions, torch.tensor([[2.0, 0, 0], [0, 2, 0]]), atol=1e-6, rtol=0)


@given(st.floats(1, 170), st.integers(1, 40), st.integers(1, 40))
@settings(deadline=None, max_examples=50)
def test_rays(fov_deg: float, height: int, width: int) -> None:
    c2w = orbit_camera(torch.tensor(30.0), torch.tensor(20.0), torch.tensor(2.0))
    origins, directions = camera_rays(c2w, torch.tensor(fov_deg), height, width)
    assert origins.shape == directions.shape == (height, width, 3)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(height, width))
    local = directions @ c2w[:3, :3]  # back into the camera
    assert (local[..., 2] < 0).all()
    slope = local[..., :2] / -local[..., 2:]
    tangent = float(torch.tan(torch.deg2rad(torch.tensor(fov_deg)) / 2))
    assert slope[0, 0, 1] == pytest.approx(tangent * (1 - 1 / height), rel=2e-3, abs=1e-5), "row 0 is the top"
    assert slope[0, -1, 0] == pytest.approx(tangent * (1 - 1 / width) * width / height, rel=2e-3, abs=1e-5)


def test_framing_fills_half_the_picture() -> None:
    distance = framing_distance(0.6, 40.0)
    assert distance * torch.tan(torch.deg2rad(torch.tensor(20.0))) == pytest.approx(0.6)


def test_a_camera_at_the_origin_has_no_direction() -> None:
    with pytest.raises(ValueError, match="origin"):
        camera_conditioning(torch.eye(4))
