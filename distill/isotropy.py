"""Is an object as good from behind as from the front?  What the diffusion model still wants changed, by azimuth.

The paper is named after it: the conditioning is an embedding alone, so that no view is favoured (arXiv 2403.10395).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.cameras import camera_conditioning
from distill import sds
from distill.distillation import CameraRanges
from distill.snapshot import Run
from distill.turntable import render_views, ring
from models.autoencoder import encode_images
from models.checkpoint import MultiViewModel
from models.multiview import predict_noise_output

STARTS = 4  # sets of views, turned against each other
TIMESTEPS = (200, 400, 600)


@torch.no_grad()
def isotropy(run: Run, model: MultiViewModel, context: Tensor, ranges: CameraRanges, size: int) -> dict[str, Any]:
    """Mean squared distance of each view's latents to the model's conditional x0, with fixed noise.

    context (1, T, D).  Returns azimuth_deg (from the front), error of each, and spread: their standard deviation over
    their mean, 0 where all azimuths are alike.  None where the model gives no finite number.
    """
    scheduler: Any = model.scheduler
    views, device = model.info.num_views, run.occupancy.live.device
    c2w = ring(STARTS * views, *ranges.middle)
    rgb = render_views(run.field, run.occupancy, c2w, ranges.middle[1], size).rgb.to(device)
    rgb = F.interpolate(rgb, (model.info.image_size,) * 2, mode="bilinear", align_corners=False)
    latents = encode_images(model.vae, rgb * 2 - 1, sample=False)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)
    errors = torch.zeros(STARTS * views)
    for start in range(STARTS):
        chosen = torch.arange(start, STARTS * views, STARTS)
        own = latents[chosen.to(device)][None]
        camera = camera_conditioning(c2w[chosen][None], model.info.camera).to(latents)
        for t in TIMESTEPS:
            alpha_bar = scheduler.alphas_cumprod[t].to(latents)
            noisy = sds.add_noise(own, noise[chosen.to(device)][None], alpha_bar)
            output = predict_noise_output(model.unet, noisy, torch.full((1,), t, device=device), context, camera)
            x0 = sds.predict_x0(noisy, output, alpha_bar, scheduler.config.prediction_type)
            errors[chosen] += (x0 - own).float().square().mean(dim=(0, 2, 3, 4)).cpu() / len(TIMESTEPS)
    azimuths = [360 * number / len(errors) for number in range(len(errors))]
    spread = float(errors.std(correction=0) / errors.mean().clamp(min=1e-12))
    return {
        "azimuth_deg": azimuths,
        "error": [round(error, 6) if math.isfinite(error) else None for error in errors.tolist()],
        "spread": round(spread, 4) if math.isfinite(spread) else None,
    }
