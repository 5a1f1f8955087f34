"""Who does the renderer's heavy work: plain torch, which runs anywhere and defines the numbers, or Triton on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from data.files import UserError

BACKENDS = ("auto", "torch", "triton")


class Backend(NamedTuple):
    """Functions of the same shapes, numbers and gradients in both."""

    name: str
    density_with_slope: Callable[..., Any]  # distill.hashgrid
    march: Callable[..., Any]  # distill.volume
    volume_weights: Callable[..., Any]  # distill.volume


def choose_backend(name: str, device: str | torch.device) -> Backend:
    """name: torch, triton, or auto, which takes triton on a CUDA device.  UserError where triton cannot run."""
    kind = torch.device(device).type
    if name == "torch" or (name == "auto" and kind != "cuda"):
        from distill import hashgrid, volume

        return Backend("torch", hashgrid.density_with_slope, volume.march, volume.volume_weights)
    try:
        from distill import kernels
    except ImportError as error:
        raise UserError(f"backend={name} on {kind}: {error}; install triton, or set backend=torch") from None
    if kind != "cuda" and not kernels.INTERPRETED:
        raise UserError(f"backend=triton needs a CUDA device and this is {kind}; set backend=torch")
    return Backend("triton", kernels.density_with_slope, kernels.march, kernels.volume_weights)
