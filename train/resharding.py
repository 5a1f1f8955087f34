"""A checkpoint of another number of processes: DeepSpeed's universal format for the engine, slices for the average."""

from __future__ import annotations

import argparse
import contextlib
import io
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from data.files import UserError


@contextlib.contextmanager
def resharded(path: Path, engine: Any) -> Iterator[Path]:
    """A folder that this engine loads its state from, whatever world saved `path`.  Collective; it is removed again."""
    if not list((path / "engine").glob("*optim_states.pt")):  # every rank had all of it
        yield path
        return
    folder = path.parent / f".{path.name}.universal"
    failed: list[str | None] = [None]
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        failed = [convert(path / "engine", folder / "engine")]
    dist.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise UserError(f"checkpoint {path} could not be brought to {dist.get_world_size()} processes: {failed[0]}")
    engine._config.load_universal_checkpoint = True
    try:
        yield folder
    finally:
        engine._config.load_universal_checkpoint = False
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder)


def convert(source: Path, target: Path) -> str | None:
    """What went wrong, or None."""
    from deepspeed.checkpoint.ds_to_universal import main

    from train.checkpoint_files import CheckpointFiles  # imports DeepSpeed, which reads the environment

    safe = CheckpointFiles()
    choices = argparse.Namespace(
        input_folder=str(source), output_folder=str(target), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    try:
        for file in sorted(source.glob("*.pt")):  # DeepSpeed unpickles them freely; what holds code stops here
            safe.load(str(file), map_location="meta")
        target.mkdir(parents=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            main(choices)
    except (
        OSError, RuntimeError, ValueError, KeyError, AssertionError, pickle.UnpicklingError, BrokenProcessPool
    ) as error:  # fmt: skip
        shutil.rmtree(target.parent, ignore_errors=True)
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
    return None


def local_slices(engine: Any) -> list[tuple[int, int] | None]:
    """Where in each flattened parameter this rank's master lies, (start, length); None where it has none.

    In the order of `train.engine.local_masters`, and of its lengths: ZeRO-3 pads the last rank's.
    """
    slices: list[tuple[int, int] | None] = []
    for parameter in engine.module.parameters():
        if not parameter.requires_grad:
            slices.append(None)
        elif hasattr(parameter, "ds_id"):  # ZeRO-3
            length = parameter.ds_tensor.ds_numel
            slices.append((engine.global_rank * length, length))
        elif getattr(parameter, "_hp_mapping", None) is not None:  # ZeRO-1 and 2
            address = parameter._hp_mapping.lp_fragment_address
            slices.append((address.start, address.numel))
        elif hasattr(engine.optimizer, "bf16_groups") or engine.zero_optimization_stage() > 0:
            slices.append(None)
        else:
            slices.append((0, parameter.numel()))
    return slices


def read_slices(files: list[Path], wanted: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """The wanted (start, length) of each flattened tensor, put together from files that hold other slices of it.

    A file's metadata says where each of its slices starts.  Beyond all slices is padding: zeros.
    """
    result = {name: torch.zeros(length) for name, (_, length) in wanted.items()}
    for path in files:
        with safe_open(str(path), "pt") as file:
            starts = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118  safe_open is no dict
                if name not in wanted:
                    continue
                start, (begin, length) = int(starts[name]), wanted[name]
                piece = file.get_tensor(name).flatten()
                first, last = max(start, begin), min(start + len(piece), begin + length)
                if first < last:
                    result[name][first - begin : last - begin] = piece[first - start : last - start]
    return result
