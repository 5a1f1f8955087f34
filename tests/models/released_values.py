"""Rebuilds the checkpoint, and the inputs, whose outputs the released modules were recorded with.

released_w32.safetensors: what MVDream's and Isotropic3D's modules computed, in fp32 on a CPU, for a small random model;
released_w32_names.json: that model's tensors by their released names.  Weights and inputs follow from their names.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    value = draw(name, shape)
    if len(shape) == 1:
        return 1 + 0.1 * value if name.endswith("weight") else 0.1 * value
    return value / math.prod(shape[1:]) ** 0.5


def released_checkpoint() -> dict[str, Tensor]:
    names = json.loads((FOLDER / "released_w32_names.json").read_text())["tensors"]
    return {name: fill(name, tuple(shape)) for name, shape in names.items()}
