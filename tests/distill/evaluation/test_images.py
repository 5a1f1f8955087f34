"""Picture metrics beyond PSNR and SSIM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data.files import UserError
from distill.evaluation.images import janus_index, load_lpips, mask_iou, masked_psnr, plain_features


def test_psnr_within_a_mask_ignores_what_is_outside() -> None:
    truth = torch.rand(2, 3, 8, 8)
    mask = torch.zeros(2, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 2:6] = True
    worse = truth + 0.1
    assert masked_psnr(worse, truth, mask).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)
    outside = torch.where(mask[:, None], worse, torch.zeros_like(worse))
    assert masked_psnr(outside, truth, mask).tolist() == pytest.approx([20.0, 20.0], abs=1e-3)
    assert masked_psnr(worse, truth, torch.zeros_like(mask)).isnan().all()


def test_mask_iou() -> None:
    a, b = torch.zeros(3, 4, 4, dtype=torch.bool), torch.zeros(3, 4, 4, dtype=torch.bool)
    a[0, :2], b[0, 1:3] = True, True
    a[1] = True
    assert mask_iou(a, b).tolist() == pytest.approx([1 / 3, 0.0, 1.0])


def test_two_faces_have_a_high_janus_index() -> None:
    azimuth = torch.arange(8) * 45.0
    turning = torch.stack([torch.cos(torch.deg2rad(azimuth)), torch.sin(torch.deg2rad(azimuth))], dim=1)
    same = torch.tensor([[1.0, 0.0]]).expand(8, 2)
    assert janus_index(same, azimuth) == pytest.approx(1.0)
    # cosines of 90, 135, 180, 225, 270 degrees
    assert janus_index(turning, azimuth) == pytest.approx((0 - 0.7071 - 1 - 0.7071 + 0) / 5, abs=1e-3)
    assert janus_index(same[:2], torch.tensor([100.0, 190.0])) is None  # no front
    assert janus_index(same[:2], torch.tensor([0.0, 45.0])) is None  # nothing behind


def test_features_without_an_encoder_tell_pictures_apart() -> None:
    white, half = torch.ones(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
    half[..., :16] = 0
    features = plain_features(torch.cat([half, half.flip(-1), half * 0.5 + 0.5, white]))
    cosine = features @ features[0]
    assert cosine.tolist() == pytest.approx([1, 0, 1, 0], abs=1e-5)


def random_backbone(kind: str, path: Path) -> Path:
    import torchvision

    torch.manual_seed(0)
    torch.save(getattr(torchvision.models, {"alex": "alexnet", "vgg": "vgg16"}[kind])().state_dict(), path)
    return path


def test_lpips_is_zero_for_equal_pictures_and_rises_with_their_difference(tmp_path: Path) -> None:
    measure = load_lpips("alex", str(random_backbone("alex", tmp_path / "weights.pth")))
    picture = torch.rand(1, 3, 64, 64)
    noise = torch.randn_like(picture)
    values = [float(measure(picture, (picture + s * noise).clamp(0, 1))[0]) for s in (0, 0.05, 0.2)]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[0] < values[1] < values[2]


def test_lpips_without_its_backbone_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a file"):
        load_lpips("alex", str(tmp_path / "none.pth"))
    (tmp_path / "wrong.pth").write_bytes(b"no weights at all")
    with pytest.raises(UserError, match="is not alex's weights"):
        load_lpips("alex", str(tmp_path / "wrong.pth"))
