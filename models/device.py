"""Where inference runs."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from data.files import UserError


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """The device, and the precision of the diffusion model there.  UserError when the device is not there.

    device: torch's name, or auto: CUDA where there is one.  dtype: float32, bfloat16, or auto: bfloat16 on CUDA.
    """
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        if chosen.type == "cuda" and chosen.index is not None:
            torch.cuda.set_device(chosen)  # Triton's kernels start on the current device, wherever their tensors are
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device} cannot be used ({str(error).splitlines()[0]}); use auto or cpu") from None
    if dtype == "auto":
        return chosen, torch.bfloat16 if chosen.type == "cuda" else torch.float32
    return chosen, getattr(torch, dtype)


def no_compiler() -> str | None:
    """Why Triton, and with it torch.compile on CUDA, cannot build its launchers here; None where it can."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "there is no C compiler (gcc, clang, or the one that CC names)"
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        return f"Python's headers are missing ({headers}/Python.h)"
    return None
