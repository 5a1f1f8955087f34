"""The networks of an ldm checkpoint: which of its tensors are whose, and their names here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "image_encoder": "ClipImageEncoder"}
WEIGHTS = "diffusion_pytorch_model.safetensors"
# What an ldm checkpoint holds beside the model: schedules that are computed again, training's leftovers, text towers.
LEFTOVERS = (
    "betas", "alphas_cumprod*", "sqrt_*", "log_one_minus_alphas_cumprod", "posterior_*", "logvar", "lvlb_weights",
    "scale_factor", "model_ema.*", "first_stage_model.loss.*", "cond_stage_model.*",
)  # fmt: skip


@dataclass
class Part:
    """One network of the checkpoint, and which of its tensors is which."""

    name: str
    config: dict[str, Any]
    tensors: dict[str, Any] = field(default_factory=dict)  # by diffusers' names
    missing: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)  # ldm name: diffusers name, shape
    unexpected: list[str] = field(default_factory=list)  # ldm names


def part_of(name: str) -> str | None:
    """Which network an ldm tensor belongs to."""
    from models.released import PREFIXES

    if name.startswith(PREFIXES["image_encoder"]):
        return "image_encoder"
    if matches(name, LEFTOVERS):
        return None
    return next((part for part, prefix in PREFIXES.items() if name.startswith(prefix)), None)


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def pairs_of(name: str, config: Mapping[str, Any]) -> Any:
    from models import released

    if name == "unet":
        return released.unet_pairs(config["layers_per_block"], [b != "DownBlock2D" for b in config["down_block_types"]])
    if name == "vae":
        return released.vae_pairs(len(config["block_out_channels"]), config["layers_per_block"])
    return None  # the names are the same


def ldm_names_of(name: str, config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, str]:
    """diffusers name -> ldm name without prefix."""
    from models import released

    pairs = pairs_of(name, config)
    if pairs is None:
        return {key: key.removeprefix("visual.") for key in keys}
    found = released.renamed(keys, released.swapped(pairs))
    assert set(found) == set(keys), sorted(set(keys) - set(found))[:5]
    return found


def empty(part: Part) -> Any:
    """The network without memory."""
    import diffusers
    import torch

    from models.image_encoder import ClipImageEncoder

    kind = ClipImageEncoder if part.name == "image_encoder" else getattr(diffusers, PARTS[part.name])
    with torch.device("meta"):
        return kind(**part.config)
