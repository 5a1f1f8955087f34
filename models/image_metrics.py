"""How alike two pictures are.  Plain functions of images (..., 3, H, W) in [0, 1]; they return one number a picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PERFECT_DB = 100.0  # what psnr says of identical pictures


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, at most PERFECT_DB: (..., 3, H, W) -> (...)."""
    assert images.shape == reference.shape, (images.shape, reference.shape)
    error = (images - reference).square().mean(dim=(-3, -2, -1))
    return (-10 * torch.log10(error.clamp(min=1e-30))).clamp(max=PERFECT_DB)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13): Gaussian window of 11, sigma 1.5: (..., 3, H, W) -> (...).

    Windows lie inside the picture, as in the paper; pictures must be at least 11 pixels a side.
    """
    assert images.shape == reference.shape and min(images.shape[-2:]) >= 11, (images.shape, reference.shape)
    offset = torch.arange(11, dtype=images.dtype, device=images.device) - 5
    line = torch.exp(-offset.square() / (2 * 1.5**2))
    window = torch.outer(line, line)
    window = (window / window.sum()).expand(3, 1, 11, 11)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=3)

    a, b = images.reshape(-1, *images.shape[-3:]), reference.reshape(-1, *images.shape[-3:])
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.mean(dim=(-3, -2, -1)).view(images.shape[:-3])


def mean_over_views(values: Tensor) -> float:
    """(V,) -> mean."""
    return float(values.double().mean())
