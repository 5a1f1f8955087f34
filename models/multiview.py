"""Multi-view attention on the stock diffusers UNet, and Explicit Multi-view Attention (EMA).

MVDream is `diffusers.UNet2DConditionModel` with the camera as class label and self-attention over all views of an
object: (b v) l c -> b (v l) c before attention and back after it (MVDream, arXiv 2308.16512, sec. 3.1).  EMA
(Isotropic3D, arXiv 2403.10395, sec. 3.2) puts the noise-free reference view inside the same fold; it adds no parameter.
Shapes: B objects, V views, C latent channels, h w latent size, T tokens of width D of the image embedding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from models.config import EmaConfig, UNetConfig

CAMERA_FLOATS = 16


class MultiViewAttention(AttnProcessor2_0):
    """Self-attention over the tokens of all views of an object; cross-attention stays per view.

    Passed to the UNet as `cross_attention_kwargs`: num_views, the noisy views of an object; num_references, the clean
    ones that stand after them in the batch; ema, how the two meet; latent_tokens, the tokens of a view at full
    resolution (only needed where `ema.downscales` chooses levels).
    """

    def __call__(  # type: ignore[override]
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        num_views: int = 1,
        num_references: int = 0,
        ema: EmaConfig | None = None,
        latent_tokens: int = 0,
        **kwargs: Any,
    ) -> Tensor:
        views = num_views + num_references
        if encoder_hidden_states is not None or views == 1:
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        images, tokens, channels = hidden_states.shape
        assert images % views == 0, f"{images} images do not divide into objects of {views} views"
        folded = hidden_states.reshape(images // views, views * tokens, channels)
        attend = partial(super().__call__, attn)
        if num_references == 0:
            return attend(folded, None, *args, **kwargs).reshape(images, tokens, channels)
        assert ema is not None, "references need a configuration of EMA"
        targets, references = folded.split([num_views * tokens, num_references * tokens], dim=1)
        if ema.downscales is not None and round((latent_tokens / tokens) ** 0.5) not in ema.downscales:
            parts = attend(targets, None, *args, **kwargs), attend(references, None, *args, **kwargs)
        elif not ema.reads_views:
            parts = attend(targets, folded, *args, **kwargs), attend(references, None, *args, **kwargs)
        else:
            return attend(folded, None, *args, **kwargs).reshape(images, tokens, channels)
        return torch.cat(parts, dim=1).reshape(images, tokens, channels)


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
        encoder_hid_dim=config.embedding_dim,
        encoder_hid_dim_type=None if config.embedding_dim is None else "text_proj",
    )
    if config.embedding_dim is not None:
        unet.encoder_hid_proj = embedding_layer(config.embedding_dim, config.cross_attention_dim)
    unet.set_attn_processor(MultiViewAttention())
    return unet


def embedding_layer(width: int, cross_attention_dim: int) -> torch.nn.Linear:
    """For an image embedding of another width.  At first its scale is kept, and zeros (unconditional) stay zeros."""
    layer = torch.nn.Linear(width, cross_attention_dim)
    torch.nn.init.orthogonal_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    return layer


def embedding_width(unet: Any) -> int:
    """D, the width of the image embedding that the UNet takes."""
    return int(unet.config.encoder_hid_dim or unet.config.cross_attention_dim)


def predict_noise_output(
    unet: Any,
    latents: Tensor,
    timesteps: Tensor,
    context: Tensor,
    camera: Tensor,
    num_references: int = 0,
    ema: EmaConfig | None = None,
) -> Tensor:
    """Raw network output (epsilon or v, as the model was trained) for all views of each object.

    latents (B, V, C, h, w), timesteps (B,) or (B, V), context (B, T, D), camera (B, V, 16) -> (B, V, C, h, w).
    The last `num_references` of the V are clean references, which meet the others as `ema` says.
    """
    b, v = latents.shape[:2]
    assert context.shape[0] == b and camera.shape[:2] == (b, v), (latents.shape, context.shape, camera.shape)
    if timesteps.ndim == 1:
        timesteps = timesteps[:, None].expand(b, v)
    dtype = unet.conv_in.weight.dtype
    sample = latents.flatten(0, 1).to(dtype)
    if sample.dtype == torch.bfloat16:  # tensor cores and AMX want channels last; fp32 on CPUs does not
        sample = sample.contiguous(memory_format=torch.channels_last)
    attention: dict[str, Any] = {"num_views": v - num_references}
    if num_references:
        tokens = latents.shape[-2] * latents.shape[-1]
        attention |= {"num_references": num_references, "ema": ema, "latent_tokens": tokens}
    output = unet(
        sample,
        timesteps.reshape(-1),
        encoder_hidden_states=context.repeat_interleave(v, dim=0).to(dtype),
        class_labels=camera.flatten(0, 1).to(dtype),
        cross_attention_kwargs=attention,
        return_dict=False,
    )[0]
    return output.unflatten(0, (b, v)).to(latents.dtype)


def predict_with_references(
    unet: Any,
    latents: Tensor,
    timesteps: Tensor,
    context: Tensor,
    camera: Tensor,
    references: Tensor,
    reference_camera: Tensor,
    ema: EmaConfig,
) -> Tensor:
    """EMA: clean reference latents (B, R, C, h, w) join the V noisy views; only the V targets' output is returned.

    timesteps (B,), reference_camera (B, R, 16); other arguments and the result as in `predict_noise_output`.  With
    R = 0 it is plain multi-view attention.
    """
    assert timesteps.ndim == 1, timesteps.shape
    views, count = latents.shape[1], references.shape[1]
    own = timesteps if ema.timestep == "shared" else torch.zeros_like(timesteps)
    told = reference_camera if ema.camera == "own" else torch.zeros_like(reference_camera)
    output = predict_noise_output(
        unet,
        torch.cat([latents, references], dim=1),
        torch.cat([timesteps[:, None].expand(-1, views), own[:, None].expand(-1, count)], dim=1),
        context,
        torch.cat([camera, told], dim=1),
        count,
        ema,
    )
    return output[:, :views]
