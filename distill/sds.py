"""Score distillation for a multi-view model: pure functions of tensors.

Sources: the released code (github.com/pkunliu/Isotropic3D, threestudio/models/guidance/multiview_diffusion_guidance.py,
named "released" below), MVDream (arXiv 2308.16512, sec. 3.2 and appendix) and DreamFusion (arXiv 2209.14988).
Shapes: B sets, V views, C latent channels, h w latent size, R rays, N samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from distill.volume import Rendering


def ramp(progress: float, ends: Sequence[float], share: float) -> float:
    """From ends[0] to ends[1], linear over the first `share` of the run, then constant (released: `C(...)`)."""
    start, end = ends
    return start + (end - start) * min(progress / share, 1.0)


def timestep_range(
    progress: float, lowest: Sequence[float], highest: Sequence[float], share: float, num_timesteps: int = 1000
) -> tuple[int, int]:
    """The timesteps noise is drawn from at `progress` in [0, 1], both inclusive.

    lowest, highest: (start, end) as shares of `num_timesteps`; released: 0.98 -> 0.02 and 0.98 -> 0.50 over 80 %.
    """
    # 1e-6: 0.98 * 1000 must not become 979 by rounding down
    low, high = (int(num_timesteps * ramp(progress, ends, share) + 1e-6) for ends in (lowest, highest))
    return low, max(low, high)


def add_noise(latents: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """DDPM's forward process (arXiv 2006.11239, eq. 4); alpha_bar is a scalar: one t for all views (released)."""
    return alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise


def predict_x0(noisy: Tensor, output: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The clean latents that a network output speaks of (arXiv 2006.11239, eq. 15; v: arXiv 2202.00512, app. D)."""
    if prediction_type == "epsilon":
        return (noisy - (1 - alpha_bar).sqrt() * output) / alpha_bar.sqrt()
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt() * noisy - (1 - alpha_bar).sqrt() * output
    raise ValueError(f"prediction_type {prediction_type} is neither epsilon nor v_prediction")


def predict_noise(noisy: Tensor, output: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The noise that a network output speaks of (v: arXiv 2202.00512, app. D)."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        return alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * noisy
    raise ValueError(f"prediction_type {prediction_type} is neither epsilon nor v_prediction")


def reconstruction_target(
    noisy: Tensor,
    conditional: Tensor,
    unconditional: Tensor,
    alpha_bar: Tensor,
    prediction_type: str,
    guidance_scale: float,
    std_rescale: float,
) -> Tensor:
    """x0 under classifier-free guidance, with its spread pulled back to the conditional one's.

    noisy and both outputs (B, V, C, h, w).  The spread is that of a whole set of V views (released:
    `recon_std_rescale`; MVDream, appendix; arXiv 2305.08891, eq. 15-16).
    """
    guided = unconditional + guidance_scale * (conditional - unconditional)
    x0 = predict_x0(noisy, guided, alpha_bar, prediction_type)
    if std_rescale == 0:
        return x0
    plain = predict_x0(noisy, conditional, alpha_bar, prediction_type)
    dims = (1, 2, 3, 4)
    factor = (plain.std(dims, keepdim=True) + 1e-8) / (x0.std(dims, keepdim=True) + 1e-8)
    return std_rescale * factor * x0 + (1 - std_rescale) * x0


def asynchronous_shift(t: int, lowest: int, share: float, chance: float, num_timesteps: int = 1000) -> int:
    """How far beyond t the rendering's own noise is predicted: uniform up to `share` of t's height over `lowest`.

    chance in [0, 1).  (ScaleDreamer, arXiv 2407.02040; its configuration for MVDream has a share of 0.1.)
    """
    return min(int(share * (t - lowest) * chance), num_timesteps - 1 - t)


def asynchronous_target(latents: Tensor, guided: Tensor, shifted: Tensor, alpha_bar: Tensor) -> Tensor:
    """Where Asynchronous Score Distillation pulls the latents: against (1 - alpha_bar) (guided - shifted).

    guided: noise predicted at t under classifier-free guidance; shifted: at a later t, conditional alone, which stands
    for the noise of the renderings' own distribution (ScaleDreamer, arXiv 2407.02040), for which VSD (arXiv 2305.16213,
    whose weight this is) fine-tunes a network.
    """
    return latents - (1 - alpha_bar) * (guided - shifted)


def reconstruction_loss(latents: Tensor, target: Tensor) -> Tensor:
    """0.5 |x - x0|^2 per picture (released: `recon_loss`; MVDream, sec. 3.2, eq. 2).

    Its gradient in the latents is (x - x0) / (B V): for epsilon prediction at scale 1 and no rescaling that is
    sqrt((1 - alpha_bar) / alpha_bar) (epsilon' - epsilon) / (B V), SDS with that weight.
    """
    pictures = latents.shape[0] * latents.shape[1]
    return 0.5 * F.mse_loss(latents, target.detach(), reduction="sum") / pictures


def orientation_loss(weights: Tensor, normals: Tensor, directions: Tensor, opacity: Tensor) -> Tensor:
    """Visible normals must not turn away from the camera (Ref-NeRF, arXiv 2112.03907, eq. 11).

    weights (N,), normals and ray directions (N, 3), opacity (R,); per covered ray, weights held fixed (threestudio).
    """
    away = (normals * directions).sum(dim=-1).clamp(min=0)
    return (weights.detach() * away.square()).sum() / (opacity > 0).sum().clamp(min=1)


def sparsity_loss(opacity: Tensor) -> Tensor:
    """threestudio's `loss_sparsity`."""
    return (opacity.square() + 0.01).sqrt().mean()


def opaque_loss(opacity: Tensor) -> Tensor:
    """Binary entropy of the opacity (threestudio's `loss_opaque`)."""
    clamped = opacity.clamp(1e-3, 1 - 1e-3)
    return F.binary_cross_entropy(clamped, clamped)


def depth_variance_loss(depth_variance: Tensor, opacity: Tensor) -> Tensor:
    """Mean over mostly covered rays of the variance of the distance, weights divided by the opacity.

    (HiFA, arXiv 2305.18766, eq. 12; threestudio's `loss_z_variance` of nerf_volume_renderer.py's `z_variance`.)
    """
    covered = (opacity > 0.5).to(depth_variance.dtype)
    return (depth_variance * covered).sum() / covered.sum().clamp(min=1)


def regularization(picture: Rendering, directions: Tensor, weights: dict[str, float]) -> dict[str, Tensor]:
    """The weighted losses that look at the scene alone; a weight of 0 costs nothing.  directions (R, 3)."""
    terms = {
        "orientation": lambda: orientation_loss(
            picture.weights, picture.normals, directions[picture.ray], picture.opacity
        ),
        "sparsity": lambda: sparsity_loss(picture.opacity),
        "opaque": lambda: opaque_loss(picture.opacity),
        "depth_variance": lambda: depth_variance_loss(picture.depth_variance, picture.opacity),
    }
    return {name: weight * terms[name]() for name, weight in weights.items() if weight != 0}
