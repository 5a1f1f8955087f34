"""Views from an embedding and camera poses: DDIM with classifier-free guidance over all views at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from data.cameras import camera_conditioning
from models.autoencoder import decode_latents
from models.checkpoint import MultiViewModel
from models.multiview import predict_noise_output


@torch.no_grad()
def sample_views(
    model: MultiViewModel,
    context: Tensor,
    c2w: Tensor,
    guidance_scale: float = 10.0,
    guidance_rescale: float = 0.0,
    steps: int = 50,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """context (B, 1, D), c2w (B, V, 4, 4) -> pictures (B, V, 3, H, W) in [0, 1].

    guidance_scale 1 runs the conditional network alone; the unconditional context is zeros.  guidance_rescale: share of
    the rescaling that gives the guided prediction the conditional one's spread (arXiv 2305.08891, eq. 15-16).
    """
    b, v = c2w.shape[:2]
    weight = next(model.unet.parameters())
    camera = camera_conditioning(c2w).to(weight.device)
    context = context.to(weight.device)
    x = torch.randn(b, v, *model.latent_shape, generator=generator).to(weight.device)
    model.scheduler.set_timesteps(steps)
    for index, t in enumerate(model.scheduler.timesteps):
        times = torch.full((b,), int(t), device=weight.device)
        if guidance_scale == 1:
            output = predict_noise_output(model.unet, x, times, context, camera)
        else:
            both = predict_noise_output(
                model.unet,
                torch.cat([x, x]),
                torch.cat([times, times]),
                torch.cat([context, torch.zeros_like(context)]),
                torch.cat([camera, camera]),
            )
            conditional, unconditional = both.chunk(2)
            output = guide(conditional, unconditional, guidance_scale, guidance_rescale)
        x = model.scheduler.step(output, t, x, eta=eta, generator=generator).prev_sample
        if on_step is not None:
            on_step(index + 1)
    return decode_latents(model.vae, x.flatten(0, 1)).unflatten(0, (b, v)).cpu()


def guide(conditional: Tensor, unconditional: Tensor, scale: float, rescale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598, eq. 6), rescaled per object over all of its views (B, V, C, h, w)."""
    guided = unconditional + scale * (conditional - unconditional)
    if rescale > 0:
        dims = tuple(range(1, guided.ndim))
        spread = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
        guided = guided * (rescale * spread + 1 - rescale)
    return guided
