"""Views from an embedding and camera poses, with classifier-free guidance over all views at once.

Shapes: B objects, V views, C latent channels, h w latent size, T tokens of width D of the embedding, H W
pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from data.cameras import camera_conditioning
from models.autoencoder import decode_latents
from models.checkpoint import MultiViewModel
from models.multiview import predict_noise_output

Generators = torch.Generator | list[torch.Generator] | None


@torch.no_grad()
def sample_latents(
    unet: Any,
    scheduler: Any,
    context: Tensor,
    c2w: Tensor,
    *,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
    steps: int = 50,
    eta: float = 0.0,
    generator: Generators = None,
    latents: Tensor | None = None,
    latent_size: int | None = None,
    convention: str = "mvdream",
    device: torch.device | None = None,
    on_step: Callable[[int, int, Tensor], Tensor] | None = None,
) -> Tensor:
    """context (B, T, D), c2w (B, V, 4, 4) -> latents (B, V, C, h, w), scaled as the UNet sees them.

    guidance_scale 1 runs the conditional network alone; the unconditional context is zeros.  guidance_rescale: share of
    the rescaling that gives the guided prediction the conditional one's spread (arXiv 2305.08891, eq. 15-16).
    eta: DDIM's share of fresh noise, where the scheduler knows it.  latents: the standard normal noise to start from.
    latent_size: another h = w than the UNet was trained at; nothing in it depends on position.
    on_step(index, timestep, latents) returns the latents to go on with.
    """
    device = device or next(unet.parameters()).device  # offloaded parameters are not where the work is done
    camera = camera_conditioning(c2w, convention).to(device)
    context = context.to(device)
    size = latent_size or unet.config.sample_size
    shape = (*c2w.shape[:2], unet.config.in_channels, size, size)
    if latents is None:
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
    elif latents.shape != shape:
        raise ValueError(f"latents of shape {tuple(latents.shape)} must be {shape}")
    scheduler.set_timesteps(steps, device=device)
    x = latents.to(device, torch.float32) * scheduler.init_noise_sigma
    known = inspect.signature(scheduler.step).parameters
    more = {key: value for key, value in (("eta", eta), ("generator", generator)) if key in known}
    for index, t in enumerate(scheduler.timesteps):
        times = t.expand(len(c2w))
        seen = scheduler.scale_model_input(x, t)
        if guidance_scale == 1:
            output = predict_noise_output(unet, seen, times, context, camera)
        else:
            both = predict_noise_output(
                unet,
                torch.cat([seen, seen]),
                torch.cat([times, times]),
                torch.cat([context, torch.zeros_like(context)]),
                torch.cat([camera, camera]),
            )
            conditional, unconditional = both.chunk(2)
            output = guide(conditional, unconditional, guidance_scale, guidance_rescale)
        x = scheduler.step(output, t, x, **more).prev_sample
        if on_step is not None:
            x = on_step(index, int(t), x)
    return x


def sample_views(
    model: MultiViewModel,
    context: Tensor,
    c2w: Tensor,
    guidance_scale: float,
    steps: int = 50,
    generator: Generators = None,
) -> Tensor:
    """context (B, T, D), c2w (B, V, 4, 4) -> pictures (B, V, 3, H, W) in [0, 1], on the CPU."""
    latents = sample_latents(
        model.unet, model.scheduler, context, c2w, guidance_scale=guidance_scale, steps=steps, generator=generator,
        convention=model.info.camera,
    )  # fmt: skip
    return decode_latents(model.vae, latents.flatten(0, 1)).unflatten(0, c2w.shape[:2]).cpu()


def guide(conditional: Tensor, unconditional: Tensor, scale: float, rescale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598, eq. 6), rescaled per object over all of its views (B, V, C, h, w)."""
    guided = unconditional + scale * (conditional - unconditional)
    if rescale > 0:
        dims = tuple(range(1, guided.ndim))
        spread = conditional.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
        guided = guided * (rescale * spread + 1 - rescale)
    return guided
