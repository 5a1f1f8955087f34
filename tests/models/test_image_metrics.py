from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from models.image_metrics import mean_over_views, psnr, ssim


def test_psnr() -> None:
    a = torch.zeros(2, 3, 16, 16)
    b = a.clone()
    b[1] += 0.1
    assert psnr(a, b).tolist() == pytest.approx([100.0, 20.0], abs=1e-4)
    assert mean_over_views(psnr(a, b)) == pytest.approx(60, abs=1e-4)


def test_ssim_is_scikit_images() -> None:
    torch.manual_seed(0)
    a = torch.rand(3, 24, 31, dtype=torch.float64)
    b = (a + 0.1 * torch.randn_like(a)).clamp(0, 1)
    _, theirs = structural_similarity(
        a.numpy(), b.numpy(), channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, full=True, truncate=3.34,
    )  # fmt: skip
    inside = np.asarray(theirs)[:, 5:-5, 5:-5].mean()
    assert float(ssim(a, b)) == pytest.approx(float(inside), abs=1e-6)
    assert float(ssim(a, a)) == pytest.approx(1.0)
