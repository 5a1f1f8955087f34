"""Multi-view attention on the stock diffusers UNet, and Explicit Multi-view Attention (EMA).

MVDream is `diffusers.UNet2DConditionModel` with the camera as class label and self-attention over all views of an
object: (b v) l c -> b (v l) c before attention and back after it (MVDream, arXiv 2308.16512, sec. 3.1).  EMA
(Isotropic3D, arXiv 2403.10395, sec. 3.2) puts the noise-free reference view inside the same fold; it adds no parameter.
Shapes: B objects, V views, C latent channels, h w latent size, D embedding width.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from models.config import UNetConfig

CAMERA_FLOATS = 16


class MultiViewAttention(AttnProcessor2_0):
    """Self-attention over the tokens of all `num_views` views of an object; cross-attention stays per view."""

    def __call__(  # type: ignore[override]
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        num_views: int = 1,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None or num_views == 1:
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        images, tokens, channels = hidden_states.shape
        assert images % num_views == 0, f"{images} images do not divide into objects of {num_views} views"
        folded = hidden_states.reshape(images // num_views, num_views * tokens, channels)
        return super().__call__(attn, folded, None, *args, **kwargs).reshape(images, tokens, channels)


def build_unet(config: UNetConfig, latent_channels: int, latent_size: int) -> UNet2DConditionModel:
    """The MVDream network (or a smaller one of its kind) with random weights, on torch's current default device."""
    attends = [*([True] * (len(config.block_out_channels) - 1)), config.attention_in_last_block]
    unet = UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(config.block_out_channels),
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        layers_per_block=config.layers_per_block,
        attention_head_dim=tuple(config.heads),  # diffusers' name for the number of heads
        cross_attention_dim=config.cross_attention_dim,
        use_linear_projection=True,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=CAMERA_FLOATS,
    )
    unet.set_attn_processor(MultiViewAttention())
    return unet


def predict_noise_output(unet: Any, latents: Tensor, timesteps: Tensor, context: Tensor, camera: Tensor) -> Tensor:
    """Raw network output (epsilon or v, as the model was trained) for all views of each object.

    latents (B, V, C, h, w), timesteps (B,) or (B, V), context (B, 1, D), camera (B, V, 16) -> (B, V, C, h, w).
    """
    b, v = latents.shape[:2]
    assert context.shape[0] == b and camera.shape[:2] == (b, v), (latents.shape, context.shape, camera.shape)
    if timesteps.ndim == 1:
        timesteps = timesteps[:, None].expand(b, v)
    dtype = unet.conv_in.weight.dtype
    sample = latents.flatten(0, 1).to(dtype)
    if sample.dtype == torch.bfloat16:  # tensor cores and AMX want channels last; fp32 on CPUs does not
        sample = sample.contiguous(memory_format=torch.channels_last)
    output = unet(
        sample,
        timesteps.reshape(-1),
        encoder_hidden_states=context.repeat_interleave(v, dim=0).to(dtype),
        class_labels=camera.flatten(0, 1).to(dtype),
        cross_attention_kwargs={"num_views": v},
        return_dict=False,
    )[0]
    return output.unflatten(0, (b, v)).to(latents.dtype)


def predict_with_reference(
    unet: Any,
    latents: Tensor,
    timesteps: Tensor,
    context: Tensor,
    camera: Tensor,
    reference: Tensor,
    reference_timestep: str = "shared",
) -> Tensor:
    """EMA: the clean reference latent (B, C, h, w) joins the V noisy views; only the V targets' output is returned.

    reference_timestep: "shared" gives the reference the noisy views' timestep, "zero" gives it 0.  Its camera vector is
    all zeros (both not stated in the paper; "shared" and zeros are ImageDream's, arXiv 2312.02201, pixel controller).
    Other arguments and the result as in `predict_noise_output`.
    """
    assert timesteps.ndim == 1, timesteps.shape
    own = timesteps if reference_timestep == "shared" else torch.zeros_like(timesteps)
    views = latents.shape[1]
    output = predict_noise_output(
        unet,
        torch.cat([latents, reference[:, None]], dim=1),
        torch.cat([timesteps[:, None].expand(-1, views), own[:, None]], dim=1),
        context,
        torch.cat([camera, torch.zeros_like(camera[:, :1])], dim=1),
    )
    return output[:, :views]
