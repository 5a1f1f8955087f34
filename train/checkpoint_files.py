"""What a checkpoint's files are written and read with: through to the disk, with their hashes, and nothing is run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors import SafetensorError

# All that DeepSpeed's files hold beside tensors and plain values.
SAFE = [fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler]


class CheckpointFiles(CheckpointEngine):
    """DeepSpeed's way to its files.

    A write that fails is kept in `errors` and not raised, so that this rank comes to the barriers in which the others
    wait, and all can agree that there is no checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = "isotropic3d"
        self.begin()

    def begin(self) -> None:
        self.errors: list[str] = []
        self.written: dict[Path, str] = {}  # path: its SHA-256

    def write(self, path: str | Path, save: Callable[[str], None]) -> None:
        """save(path), then fsync and hash."""
        try:
            save(str(path))
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
                self.written[Path(path)] = hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
            self.errors.append(f"{path}: {str(error).splitlines()[0]}")

    def save(self, state_dict: Any, path: str) -> None:
        self.write(path, lambda target: torch.save(state_dict, target))

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(SAFE):
            return torch.load(path, map_location=map_location, weights_only=True)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.errors.append(f"{path}: {error}")

    def create(self, info: Any) -> None:
        pass

    def commit(self, info: Any) -> bool:
        return True
