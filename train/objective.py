"""What both stages minimise: denoise the views of an object given its image embedding and cameras.

Branch a (single view) treats the views as separate pictures without camera; branch b folds them; in stage 2 the clean
reference view may join the fold (EMA) and never reaches the loss (Isotropic3D, arXiv 2403.10395, sec. 3.2).
All randomness is keyed by (seed, purpose, step or position), so it does not depend on ranks, workers or resuming.
Shapes: B objects, V views, C latent channels, h w latent size, T tokens of width D of the embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from data.cameras import camera_conditioning
from data.stream import Batch, keyed_generator
from models.autoencoder import encode_images
from models.config import ModelConfig
from models.image_encoder import ClipImageEncoder, embed_image
from models.multiview import predict_noise_output, predict_with_references
from train.config import ObjectiveConfig

SINGLE, MULTI, REFERENCE = "single", "multi", "reference"


@dataclass
class Encoders:
    """The frozen networks in front of the UNet; never prepared by the engine, no optimizer state."""

    vae: Any
    image_encoder: ClipImageEncoder


@dataclass
class Draws:
    """The random part of one batch."""

    timesteps: Tensor  # (B,) int64: one for all views of an object
    noise: Tensor  # (B, V, C, h, w)
    posterior: Tensor  # (B, V + R, C, h, w): the autoencoder's own draw, for the views and the references
    drop: Tensor  # (B,) bool: condition dropped


def choose_branch(config: ObjectiveConfig, seed: int, step: int) -> str:
    """The branch of a step, the same on every rank, so that no rank waits for another's longer sequence."""
    single, reference = keyed_generator(seed, "branch", step).random(2)
    if single < config.single_view_probability:
        return SINGLE
    return REFERENCE if reference < config.reference_probability else MULTI


def draw(
    config: ObjectiveConfig, seed: int, positions: list[int], shape: tuple[int, ...], steps: int, references: int = 1
) -> Draws:
    """One object's draws depend on (seed, its position in the stream) alone.  shape (V, C, h, w)."""
    timesteps, noise, posterior, drop = [], [], [], []
    for position in positions:
        generator = keyed_generator(seed, "objective", position)
        timesteps.append(int(generator.integers(steps)))
        drop.append(bool(generator.random() < config.condition_dropout))
        pixels = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
        with_references = (shape[0] + references, *shape[1:])
        posterior.append(torch.from_numpy(generator.standard_normal(with_references, dtype=np.float32)))
        if config.offset_noise > 0:  # crosslabs.org/blog/diffusion-with-offset-noise
            offset = generator.standard_normal((*shape[:2], 1, 1), dtype=np.float32)
            pixels = pixels + config.offset_noise * torch.from_numpy(offset)
        noise.append(pixels)
    return Draws(torch.tensor(timesteps), torch.stack(noise), torch.stack(posterior), torch.tensor(drop))


def snr_weight(alphas_cumprod: Tensor, gamma: float | None, prediction_type: str) -> Tensor:
    """Loss weight of each timestep in float32: min-SNR-gamma (arXiv 2303.09556, eq. 9) or ones."""
    if gamma is None:
        return torch.ones_like(alphas_cumprod)
    snr = alphas_cumprod / (1 - alphas_cumprod)
    divisor = snr if prediction_type == "epsilon" else snr + 1
    return snr.clamp(max=gamma) / divisor.clamp(min=1e-8)


def encode_batch(vae: Any, batch: Batch, noise: Tensor) -> Tensor:
    """Scaled latents of the views and of as many references as `noise` (B, V + R, C, h, w) is for, drawn with it."""
    (b, count), device = noise.shape[:2], noise.device
    if batch.moments is not None:  # encoded ahead
        mean, log_variance = batch.moments[:, :count].to(device).chunk(2, dim=2)
        return (mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * noise) * vae.config["scaling_factor"]
    assert batch.images is not None and batch.references is not None
    views = batch.images.shape[1]
    pictures = torch.cat([batch.images, batch.references[:, : count - views] * 2 - 1], dim=1).to(device)
    return encode_images(vae, pictures.flatten(0, 1), noise=noise.flatten(0, 1)).unflatten(0, (b, count))


def embed_batch(image_encoder: ClipImageEncoder, batch: Batch, device: torch.device) -> Tensor:
    """Context (B, T, D) of each object's first reference."""
    if batch.embeddings is not None:
        return batch.embeddings.to(device)
    assert batch.references is not None
    return embed_image(image_encoder, batch.references[:, 0].to(device))


def training_loss(
    unet: Any,
    encoders: Encoders,
    scheduler: DDIMScheduler,
    batch: Batch,
    branch: str,
    config: ObjectiveConfig,
    model: ModelConfig,
    latent_shape: tuple[int, int, int],
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Loss (B,) of each object in float32, and its timestep (B,).  The references' prediction is cut off before it."""
    (b, v), r = batch.c2w.shape[:2], batch.reference_c2w.shape[1]
    device = next(unet.parameters()).device
    with torch.no_grad():
        draws: Draws = batch.drawn or draw(
            config, seed, batch.positions, (v, *latent_shape), scheduler.config.num_train_timesteps, r
        )
        timesteps, noise, posterior = draws.timesteps.to(device), draws.noise.to(device), draws.posterior.to(device)
        with_references = r if branch == REFERENCE else 0
        encoded = encode_batch(encoders.vae, batch, posterior[:, : v + with_references])
        latents, references = encoded.split([v, with_references], dim=1)
        context = embed_batch(encoders.image_encoder, batch, device)
        context = context * (~draws.drop.to(device))[:, None, None]  # unconditional = zeros, as in the released code
        per_view = timesteps.repeat_interleave(v)
        noisy = scheduler.add_noise(latents.flatten(0, 1), noise.flatten(0, 1), per_view).unflatten(0, (b, v))
        if scheduler.config.prediction_type == "epsilon":
            target = noise
        else:
            target = scheduler.get_velocity(latents.flatten(0, 1), noise.flatten(0, 1), per_view).unflatten(0, (b, v))
        camera = camera_conditioning(batch.c2w.to(device), model.camera)
        if branch == REFERENCE:
            reference_camera = camera_conditioning(batch.reference_c2w.to(device), model.camera)

    if branch == SINGLE:  # each view its own object, camera vector zero (MVDream's 2D batches)
        flat = noisy.flatten(0, 1)[:, None]
        output = predict_noise_output(
            unet, flat, per_view, context.repeat_interleave(v, 0), torch.zeros_like(camera).flatten(0, 1)[:, None]
        ).reshape(noisy.shape)
    elif branch == REFERENCE:
        output = predict_with_references(
            unet, noisy, timesteps, context, camera, references, reference_camera, model.ema
        )
    else:
        output = predict_noise_output(unet, noisy, timesteps, context, camera)

    alpha_bar = scheduler.alphas_cumprod.to(device)[timesteps]
    weight = snr_weight(alpha_bar, config.min_snr_gamma, scheduler.config.prediction_type)
    squared = (output.float() - target.float()).square().flatten(1).mean(dim=1)
    return squared * weight, timesteps
