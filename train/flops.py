"""What the UNet computes, counted op by op on the meta device, and what devices can do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.multiview import CAMERA_FLOATS, build_unet, predict_noise_output
from train.config import TrainConfig
from train.objective import MULTI, REFERENCE, SINGLE
from train.trainable import choose_trainable

# Dense FLOP/s in bf16 and fp16 by vendor's data sheet, by a part of the device's name; the first that fits.
PEAKS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H20": 148e12, "A100": 312e12,
    "A800": 312e12, "L40S": 362e12, "A40": 150e12, "A6000": 155e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
    "V100": 125e12,
}  # fmt: skip


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of matrix products; None where it is not known, as on CPUs and in fp32."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def meta_unet(config: TrainConfig) -> Any:
    size = config.data.image_size // config.model.autoencoder.downscale
    with torch.device("meta"):
        unet = build_unet(config.model.unet, config.model.autoencoder.latent_channels, size)
        nn.Module.to(unet, torch.bfloat16)  # diffusers' own has words about weights, of which there are none
        choose_trainable(unet, config)
    return unet.train()


def forward_on_meta(config: TrainConfig, unet: nn.Module, branch: str, tokens: int) -> torch.Tensor:
    """One object's prediction by a UNet on the meta device; tokens: of the image embedding."""
    auto, views = config.model.autoencoder, config.data.num_views
    size = config.data.image_size // auto.downscale
    meta: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
    # Single views are objects of one view; the references join the views.
    objects, folded = (views, 1) if branch == SINGLE else (1, views)
    folded += config.model.ema.references if branch == REFERENCE else 0
    return predict_noise_output(
        unet,
        torch.empty(objects, folded, auto.latent_channels, size, size, **meta, requires_grad=True),
        torch.zeros(objects, dtype=torch.long, device="meta"),
        torch.empty(objects, tokens, config.model.unet.embedding_dim or config.model.unet.cross_attention_dim, **meta),
        torch.empty(objects, folded, CAMERA_FLOATS, **meta),
    )


def flops_of_branches(config: TrainConfig, tokens: int) -> dict[str, float]:
    """FLOPs of one object's forward and backward pass on each branch that the run takes.

    Without what gradient checkpointing computes twice: those are no use to the training.
    """
    probabilities = config.objective
    multi = probabilities.single_view_probability < 1
    taken = {
        SINGLE: probabilities.single_view_probability > 0,
        MULTI: multi and probabilities.reference_probability < 1,
        REFERENCE: multi and probabilities.reference_probability > 0,
    }
    unet, flops = meta_unet(config), {}
    for branch in [branch for branch, is_taken in taken.items() if is_taken]:
        with FlopCounterMode(display=False) as counter:
            forward_on_meta(config, unet, branch, tokens).sum().backward()
        flops[branch] = float(counter.get_total_flops())
    return flops
