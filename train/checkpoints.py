"""Checkpoints to resume from: a folder appears whole or not at all, and the old go only after the new has come.

    checkpoints/step_00001000/  state.json  engine/ (DeepSpeed)  weight_average_rank0.safetensors ...

Order, noise, dropout and branches are functions of the step (see data.stream, train.objective), so the step is all the
state there is beside the engine's and the average's.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.files import UserError, content_mark, fsync_folder, read_json, write_json
from data.shards import manifest_bytes, mark
from data.sources import ShardFolder
from train.config import TrainConfig
from train.engine import WeightAverage, all_agree
from train.shard_history import SavedSpan, as_json

FORMAT = "isotropic3d-checkpoint/2"
STATE_BYTES = 18  # a parameter: weight in bf16, and in fp32 its master, Adam's two moments and the running average


@dataclass
class TrainState:
    spans: list[SavedSpan]  # which objects the stream holds, from which position on
    step: int = 0  # optimizer steps done; with the seed, this is the position in the stream and of all randomness
    seconds: float = 0.0  # training time of all sessions


def identity(config: TrainConfig) -> dict[str, Any]:
    """All that the course of a run depends on but its length; a checkpoint is only resumed by a run of the same.

    Dotted keys, so that the first difference can be named.
    """
    free = {"name", "out", "resume", "wandb", "cpu", "dry_run", "dry_run_processes", "steps", "keep_checkpoints"}
    settings = {
        k: v
        for k, v in asdict(config).items()
        if k not in free and not k.startswith(("log_", "sample_", "checkpoint_"))
    }
    settings["data"] = settings["data"] | dict.fromkeys(("workers", "shards", "cache", "max_damaged", "on_change"))
    settings["lora"] = settings["lora"] if config.trainable == "lora" else None
    settings["steps"] = config.steps if config.optim.schedule == "cosine" else None
    files: dict[str, Path] = {}
    if config.init_from is not None:
        files["init_from"] = Path(config.init_from) / "unet" / "diffusion_pytorch_model.safetensors"
    model = config.model
    for part, weights in (
        ("unet", model.unet.weights), ("autoencoder", model.autoencoder.weights),
        ("image_encoder", model.image_encoder.weights),
    ):  # fmt: skip
        if weights is not None:  # frozen weights come from there again when the run goes on
            path = Path(weights)
            # By content: a folder may be mounted elsewhere the next time.
            files[f"model.{part}.weights"] = path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path
    marks = {name: content_mark(path) for name, path in files.items() if path.is_file()}
    marks["data.shards"] = mark(manifest_bytes(ShardFolder(config.data.shards)))

    def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        pairs = [flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v} for k, v in value.items()]
        return {k: v for pair in pairs for k, v in pair.items()}

    return flat(settings) | marks


def require_same_run(path: Path, config: TrainConfig, current: dict[str, Any]) -> None:
    """UserError naming the first value in which the checkpoint's run differs from this one, or when it is longer."""
    saved = read_json(path / "state.json", "checkpoint")
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {path}: state.json is not of format {FORMAT}, but of another version of this project, "
            "which it resumes with; here, give another name= or out="
        )
    before = saved.get("identity", {})
    for key in sorted(current.keys() | before.keys()):
        old, new = before.get(key), current.get(key)
        if key == "data.shards" and old != new and config.data.on_change == "adopt":
            continue
        if old != new:
            also = "; data.on_change=adopt takes changed shards from the next epoch on" if key == "data.shards" else ""
            raise UserError(
                f"{path} was trained with another {key} ({old} then, {new} now); choose another name= or out=, "
                f"or give the former value{also}"
            )
    if saved["step"] > config.steps:
        raise UserError(f"{path} is beyond steps={config.steps}; choose another name= or out=, or more steps")


def checkpoint_folders(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first.  A folder gets its final name only when it is whole."""
    named = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", p.name) and (p / "state.json").is_file()]
    return sorted(named)


def newest_state(folder: Path) -> dict[str, Any]:
    """The state.json of the newest whole checkpoint; {} where there is none."""
    found = checkpoint_folders(folder)
    saved = read_json(found[-1] / "state.json", "checkpoint") if found else {}
    return saved if isinstance(saved, dict) else {}


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint as rank 0 sees it, so that all ranks load the same.  Every rank must call it."""
    names = [path.name for path in checkpoint_folders(folder)]
    newest = [names[-1] if names else ""]
    dist.broadcast_object_list(newest, src=0)
    return folder / newest[0] if newest[0] else None


def save_checkpoint(
    folder: Path, engine: Any, average: WeightAverage, state: TrainState, keep: int, run: dict[str, Any]
) -> None:
    """Every rank must call it; `run` is its `identity`.  UserError when it cannot be written."""
    final = folder / f"step_{state.step:08d}"
    temporary = folder / f".step_{state.step:08d}.tmp"
    remedy = "free disk space and start again: the run goes on from the checkpoint before it"
    # Frozen weights are not saved: they come from where the run started.  ZeRO-3 holds shards.
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in trained)
    frozen = len(trained) < len(list(engine.module.parameters()))
    megabytes = parameters * STATE_BYTES // 2**20
    free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free // 2**20
    if not all_agree(free > megabytes, engine.device):  # while all ranks can still say so
        raise UserError(f"checkpoint {final} needs about {megabytes} MiB and {free} MiB are free; {remedy}")
    if engine.global_rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    try:
        engine.save_checkpoint(str(temporary), tag="engine", save_latest=False, exclude_frozen_parameters=frozen)
        tensors = {f"{i:05d}": t for i, t in enumerate(average.average) if t is not None}
        save_file(tensors, str(temporary / f"weight_average_rank{engine.global_rank}.safetensors"))
    except (OSError, RuntimeError, SafetensorError) as error:
        # The others wait inside DeepSpeed's save, where no vote reaches them: this rank ends, and the launcher them.
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"checkpoint {final} could not be written by rank {engine.global_rank} ({error}); {remedy}"
        ) from None
    dist.barrier()  # every rank's files are there, so that rank 0 can bring all of them to the disk
    if engine.global_rank == 0:
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        write_json(
            temporary / "state.json",
            {
                "format": FORMAT,
                "step": state.step,
                "seconds": state.seconds,
                "spans": as_json(state.spans),
                "updates": average.updates,
                "world_size": engine.world_size,
                "zero_stage": engine.zero_optimization_stage(),
                "identity": run,
            },
        )
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        fsync_folder(folder)
        for old in checkpoint_folders(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(path: Path, engine: Any, average: WeightAverage, spans: list[SavedSpan]) -> TrainState:
    """Puts engine and average into the state saved at `path`; `spans` hold from there on.  Every rank must call it."""
    saved = read_json(path / "state.json", "checkpoint")
    for key, current in (("world_size", engine.world_size), ("zero_stage", engine.zero_optimization_stage())):
        if saved[key] != current:
            raise UserError(
                f"checkpoint {path} was saved with {key}={saved[key]} and this run has {current}; "
                f"resume with {saved[key]}, or start from its weights with init_from=<export folder>"
            )
    whole = all(parameter.requires_grad for parameter in engine.module.parameters())
    loaded, _ = engine.load_checkpoint(str(path), tag="engine", load_module_strict=whole)
    shard = path / f"weight_average_rank{engine.global_rank}.safetensors"
    ok = loaded is not None and shard.is_file()
    try:
        saved_average = load_file(str(shard)) if ok else {}
    except (SafetensorError, OSError):
        ok, saved_average = False, {}
    wanted = {f"{i:05d}": t.shape for i, t in enumerate(average.average) if t is not None}
    ok = ok and {name: tensor.shape for name, tensor in saved_average.items()} == wanted
    if not all_agree(ok, engine.device):
        raise UserError(
            f"checkpoint {path}: a rank's part is missing or damaged; delete it to go on from the one before"
        )
    for index, tensor in saved_average.items():
        held = average.average[int(index)]
        assert held is not None
        held.copy_(tensor)
    average.updates = saved["updates"]
    return TrainState(spans, step=saved["step"], seconds=saved["seconds"])
