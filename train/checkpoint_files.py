"""What a checkpoint's files are written and read with: through to the disk, with their hashes, and nothing is run."""

from __future__ import annotations

import copy
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors.torch import save_file
from torch import Tensor

# All that DeepSpeed's files hold beside tensors and plain values.
SAFE = [fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler]


class CheckpointFiles(CheckpointEngine):
    """DeepSpeed's way to its files, which are written at once or, from copies in memory, by a thread.

    A write that fails is kept in `errors` and not raised, so that this rank comes to the barriers in which the others
    wait, and all can agree that there is no checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = "isotropic3d"
        self.thread: threading.Thread | None = None
        self.begin(background=False)

    def begin(self, background: bool) -> None:
        self.background = background
        self.errors: list[str] = []
        self.written: dict[Path, str] = {}  # path: its SHA-256
        self.later: list[Callable[[], None]] = []
        self.handed_in: set[Path] = set()

    def start(self) -> None:
        """Lets the thread begin with what was handed in."""
        # Not a daemon: an interpreter that ends waits for it, and does not pull memory from under torch.save.
        self.thread = threading.Thread(target=self._write_later, name="checkpoint")
        self.thread.start()

    def _write_later(self) -> None:
        while self.later:
            self.later.pop(0)()  # and with it goes its copy

    @property
    def writing(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def wait(self) -> None:
        """For the thread; what it has not written is an error."""
        if self.thread is not None:
            self.thread.join()
        lacking = sorted(self.handed_in - self.written.keys())
        if lacking and not self.errors:
            self.errors.append(f"{lacking[0]} was not written")

    def write(self, path: Path, save: Callable[[str], None]) -> None:
        """save(path), then fsync and hash."""
        try:
            save(str(path))
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
                self.written[path] = hashlib.file_digest(file, "sha256").hexdigest()
        except Exception as error:  # whatever it is, the others wait
            self.errors.append(f"{path}: {next(iter(str(error).splitlines()), type(error).__name__)}")

    def save(self, state_dict: Any, path: str) -> None:
        self.hand_in(state_dict, Path(path), torch.save)

    def save_tensors(self, tensors: dict[str, Tensor], path: Path, words: dict[str, str]) -> None:
        """As safetensors, with `words` as the file's metadata."""
        self.hand_in(tensors, path, lambda content, target: save_file(content, target, words))

    def hand_in(self, content: Any, path: Path, save: Callable[[Any, str], None]) -> None:
        self.handed_in.add(path)
        if not self.background:
            self.write(path, lambda target: save(content, target))
            return
        try:
            taken = copied(content)
        except (RuntimeError, MemoryError) as error:
            self.errors.append(
                f"no memory for a copy of what goes to {path} ({next(iter(str(error).splitlines()), '')}); set "
                "checkpoint_in_background=false"
            )
            return
        self.later.append(lambda: self.write(path, lambda target: save(taken, target)))

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


def copied(value: Any) -> Any:
    """The same with its tensors on the CPU, in memory of their own."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(one) for one in value)
    return copy.deepcopy(value)
