"""Which of the UNet's weights are trained: all, those of some layers, or a low-rank adapter beside them."""

from __future__ import annotations

import re
from typing import Any

import torch

from models.lora import add_adapter
from train.config import TrainConfig

# The layer that maps the image embedding is new with every run that has one, and so trained with any part.
PARTS = {"attention": r"\.attn[12]\.|^encoder_hid_proj", "cross_attention": r"\.attn2\.|^encoder_hid_proj"}


def choose_trainable(unet: Any, config: TrainConfig) -> None:
    """Sets requires_grad; with `trainable=lora` adds the adapter, its first factor random by the seed."""
    if config.trainable == "lora":
        torch.manual_seed(config.seed)
        add_adapter(unet, config.lora)  # freezes all else
        if unet.encoder_hid_proj is not None:
            unet.encoder_hid_proj.requires_grad_(True)
    elif config.trainable != "all":
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(bool(re.search(PARTS[config.trainable], name)))
