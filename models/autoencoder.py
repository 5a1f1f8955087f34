"""Pictures to latents and back: SD's VAE, or the small linear codec that stands in for it where no weights are.

Both answer to the same calls (`encode(x).latent_dist`, `decode(z).sample`, `config.scaling_factor`), so nothing
outside this file asks which one it holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from data.files import UserError
from models.folders import class_name, load_network

# stabilityai/stable-diffusion-2-1-base, vae/config.json: what a dry run builds without weights.
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 768,
    "scaling_factor": 0.18215,
}
LOG_VARIANCE = -20.0  # the codec is deterministic: its posterior is a point


class PatchCodec(ModelMixin, ConfigMixin):
    """Linear autoencoder: every p x p patch is projected on `latent_channels` principal components.

    encode (N, 3, H, W) in [-1, 1] -> latents (N, C, H/p, W/p) of about unit variance; decode is its pseudo-inverse.
    """

    @register_to_config
    def __init__(self, patch_size: int = 8, latent_channels: int = 16, scaling_factor: float = 1.0):
        super().__init__()
        self.encoder = nn.Conv2d(3, latent_channels, patch_size, stride=patch_size)
        self.decoder = nn.ConvTranspose2d(latent_channels, 3, patch_size, stride=patch_size)

    @apply_forward_hook
    def encode(self, images: Tensor, return_dict: bool = True) -> AutoencoderKLOutput:
        mean = self.encoder(images)
        moments = torch.cat([mean, torch.full_like(mean, LOG_VARIANCE)], dim=1)
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(moments))

    @apply_forward_hook
    def decode(self, latents: Tensor, return_dict: bool = True) -> DecoderOutput:
        return DecoderOutput(sample=self.decoder(latents))


@torch.no_grad()
def fit_patch_codec(images: Tensor, patch_size: int, latent_channels: int) -> PatchCodec:
    """The codec of least squared error on images (N, 3, H, W) in [-1, 1]: PCA of their patches.

    Component i is divided by std_i^(1/2) (half-way to whitening: the fine components stay audible above the noise
    without drowning the coarse ones), then all by one number that makes the mean variance 1.
    """
    patches = F.unfold(images, patch_size, stride=patch_size).transpose(1, 2).flatten(0, 1).double()
    mean = patches.mean(dim=0)
    variance, basis = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    order = variance.argsort(descending=True)[:latent_channels]
    if len(order) < latent_channels or float(variance[order[-1]]) <= 0:
        raise UserError(
            f"the pictures' patches have fewer than {latent_channels} independent components; "
            "use more pictures, larger patches or fewer latent channels"
        )
    std, basis = variance[order].sqrt(), basis[:, order].T  # (C,), (C, 3 p p)
    gain = std.rsqrt()
    gain = gain / (gain * std).square().mean().sqrt()
    codec = PatchCodec(patch_size, latent_channels)
    codec.encoder.weight.copy_((gain[:, None] * basis).unflatten(1, (3, patch_size, patch_size)))
    codec.encoder.bias.copy_(-gain * (basis @ mean))
    codec.decoder.weight.copy_((basis / gain[:, None]).unflatten(1, (3, patch_size, patch_size)))
    # A transposed convolution has one bias per colour, so the mean patch enters through the mean colour; the rest of it
    # (its variation inside a patch) is tiny for natural pictures and counted in the reconstruction error.
    codec.decoder.bias.copy_(mean.unflatten(0, (3, -1)).mean(dim=1))
    return codec


def load_autoencoder(folder: str | Path, variant: str | None = None) -> AutoencoderKL | PatchCodec:
    """The autoencoder in a diffusers folder, frozen, in fp32.  UserError when it is not one."""
    return load_network(autoencoder_kind(folder), folder, "autoencoder", variant).requires_grad_(False).eval()


def autoencoder_kind(folder: str | Path) -> Any:
    kinds: dict[str | None, Any] = {"AutoencoderKL": AutoencoderKL, "PatchCodec": PatchCodec}
    name = class_name(folder, "autoencoder")
    if name not in kinds:
        raise UserError(f"autoencoder: {folder} holds {name!r}; it must be one of AutoencoderKL, PatchCodec")
    return kinds[name]


def downscale_of(vae: Any) -> int:
    """Pixels per latent cell and side."""
    return int(vae.config.get("patch_size") or 2 ** (len(vae.config["block_out_channels"]) - 1))


def encode_images(vae: Any, images: Tensor, sample: bool = True, noise: Tensor | None = None) -> Tensor:
    """images (N, 3, H, W) in [-1, 1] -> latents (N, C, h, w) times the scaling factor; differentiable.

    sample: draw from the posterior (as the released code does) rather than take its mode; `noise` (N, C, h, w) is the
    standard normal draw to use, for training that must be repeatable.
    """
    posterior = vae.encode(images.to(next(vae.parameters()).dtype)).latent_dist
    if noise is not None:
        latents = posterior.mean + posterior.std * noise.to(posterior.mean.dtype)
    else:
        latents = posterior.sample() if sample else posterior.mode()
    return latents.to(images.dtype) * vae.config.scaling_factor


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Scaled latents (N, C, h, w) -> images (N, 3, H, W), clamped to [0, 1]."""
    weight = next(vae.parameters())
    images = vae.decode((latents / vae.config.scaling_factor).to(weight.dtype)).sample
    return (images.to(latents.dtype) / 2 + 0.5).clamp(0, 1)
