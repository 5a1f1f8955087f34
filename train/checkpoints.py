"""Checkpoints to resume from: a folder appears whole or not at all, and the old go only after the new has come.

    checkpoints/step_00001000/  state.json  engine/ (DeepSpeed)  weight_average_rank0.safetensors ...

Order, noise, dropout and branches are functions of the batch's number (see data.stream, train.objective), so that is
all the state there is beside the engine's and the average's.  state.json has the SHA-256 of every file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors import SafetensorError

from data.files import UserError, content_mark, fsync_folder, read_json, write_json
from data.shards import manifest_bytes, mark
from data.sources import ShardFolder
from train.config import TrainConfig
from train.engine import WeightAverage, all_agree, resolve_precision
from train.resharding import local_slices, read_slices, resharded
from train.shard_history import SavedSpan, as_json

if TYPE_CHECKING:  # it imports DeepSpeed, which reads the environment
    from train.checkpoint_files import CheckpointFiles

FORMAT = "isotropic3d-checkpoint/4"
STATE_BYTES = 18  # a parameter: weight in bf16, and in fp32 its master, Adam's two moments and the running average


@dataclass
class TrainState:
    spans: list[SavedSpan]  # which objects the stream holds, from which position on
    step: int = 0  # optimizer steps done
    skipped: int = 0  # batches that left no step, since a gradient was not finite
    seconds: float = 0.0  # training time of all sessions
    loss_sums: list[list[float]] = field(default_factory=list)  # of what was not yet reported (train.meter)

    @property
    def batch(self) -> int:
        """Number of the next batch; with the seed, this is the position in the stream and of all randomness."""
        return self.step + self.skipped


def identity(config: TrainConfig) -> dict[str, Any]:
    """All that the course of a run depends on but its length; a checkpoint is only resumed by a run of the same.

    Dotted keys, so that the first difference can be named.
    """
    free = {"name", "out", "resume", "wandb", "cpu", "dry_run", "dry_run_processes", "steps", "keep_checkpoints",
            "max_skipped", "limits", "milestone_every", "micro_batch_size", "tryrun", "end_after",
            "validation", "profile", "gradient_checkpointing", "compile"}  # fmt: skip
    settings = {k: v for k, v in asdict(config).items() if k not in free and not k.startswith(("log_", "checkpoint_"))}
    settings["data"] = settings["data"] | dict.fromkeys(("workers", "shards", "cache", "max_damaged", "on_change"))
    settings["lora"] = settings["lora"] if config.trainable == "lora" else None
    settings["steps"] = config.steps if config.optim.schedule == "cosine" else None
    settings["precision"] = resolve_precision(config.precision, config.cpu)
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


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def checkpoint_folders(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first.  A folder gets its final name only when it is whole."""
    named = [p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", p.name) and (p / "state.json").is_file()]
    return sorted(named)


def read_state(path: Path) -> dict[str, Any] | None:
    """A checkpoint's state.json; None where it is damaged.  UserError where this machine cannot read it."""
    try:
        saved = json.loads((path / "state.json").read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    except OSError as error:
        raise unreadable(path, "state.json", error) from None
    if not isinstance(saved, dict) or saved.get("mark") != mark_of(saved) or saved.get("step") != step_of(path):
        return None
    return saved


def mark_of(saved: dict[str, Any]) -> str:
    """A hash of all of state.json but the hash itself."""
    rest = {name: value for name, value in saved.items() if name != "mark"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def newest_state(folder: Path) -> dict[str, Any]:
    """The state.json of the newest checkpoint that has a whole one; {} where there is none."""
    states = (read_state(path) for path in reversed(checkpoint_folders(folder)))
    return next((saved for saved in states if saved is not None), {})


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; damaged ones after it are set aside under another name, and said.  Collective.

    Each rank reads its share of the files, and all of them must be as they were written.  UserError when there are
    checkpoints and none is whole, or one cannot be read here, or is damaged for one rank and whole for another: then
    none is touched.
    """
    damaged: dict[str, str] = {}
    names = [[path.name for path in checkpoint_folders(folder)]]
    dist.broadcast_object_list(names, src=0)  # as rank 0 sees them, so that all load the same
    for name in reversed(names[0]):
        found = damaged_files(folder / name, dist.get_rank(), dist.get_world_size())
        everyone: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        wrong = [line for one in everyone for line in one]
        require_for_all(folder / name, wrong)
        if not wrong:
            if dist.get_rank() == 0:
                set_aside(folder, damaged)
            dist.barrier()
            return folder / name
        damaged[name] = wrong[0]
    if damaged:
        words = "; ".join(f"{name}: {why}" for name, why in damaged.items())
        raise UserError(f"{folder}: none is whole ({words}); restore one, or choose another name= or out=")
    return None


def require_for_all(path: Path, wrong: list[str]) -> None:
    """UserError where not all ranks see what is `wrong`, as with a mount that is stale.  Collective."""
    if not wrong:
        return
    mine = (socket.gethostname(), sorted(set(damaged_files(path, 0, 1, only=wrong)) & set(wrong)))
    everyone: list[tuple[str, list[str]]] = [("", [])] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for line in wrong:
        hosts = {seen: sorted({host for host, lines in everyone if (line in lines) is seen}) for seen in (True, False)}
        if hosts[False]:
            raise UserError(
                f"checkpoint {path}: {line} on {', '.join(hosts[True]) or 'a machine'}, but is whole on "
                f"{', '.join(hosts[False])}; mend that file system and start again, the checkpoint stays as it is"
            )


def set_aside(folder: Path, damaged: dict[str, str]) -> None:
    """Under another name; those of former times go, since each is as large as a checkpoint."""
    for former in folder.glob("damaged_step_*") if damaged else ():
        shutil.rmtree(former, ignore_errors=True)
    for name, why in damaged.items():
        aside = folder / f"damaged_{name}"
        os.replace(folder / name, aside)
        print(f"warning: {folder / name} is damaged ({why}) and set aside as {aside.name}", flush=True)


def damaged_files(path: Path, rank: int, world: int, only: list[str] | None = None) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files; or of those alone that lines of it, `only`, name.

    UserError where one cannot be read though it is there: this machine's fault, which others may not have.
    """
    saved = read_state(path)
    if saved is None:
        return ["state.json is not what was written"]
    files = sorted(saved["files"].items())
    if only is not None:
        files = [(name, mark) for name, mark in files if any(line.startswith(f"{name} ") for line in only)]
    wrong = []
    for name, expected in files[rank::world]:
        try:
            with open(path / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    wrong.append(f"{name} is not what was written")
        except FileNotFoundError:
            wrong.append(f"{name} is missing")
        except OSError as error:
            raise unreadable(path, name, error) from None
    return wrong


def unreadable(path: Path, name: str, error: OSError) -> UserError:
    words = f"checkpoint {path}: {name} cannot be read on {socket.gethostname()}: {error.strerror}"
    return UserError(f"{words}; mend that and start again, the checkpoint stays as it is")


class Checkpoints:
    """The checkpoints that a run writes; every rank has one and calls the same methods at the same steps.

    `begin` takes a copy of the state, a thread of each rank writes it, and `finish` makes it a checkpoint once all
    ranks' threads are done.  Without `checkpoint_in_background`, `begin` does it all, without the copy.
    """

    def __init__(
        self,
        folder: Path,
        engine: Any,
        average: WeightAverage,
        identity: dict[str, Any],
        config: TrainConfig,
        saved: int,
    ):
        self.folder, self.engine, self.average, self.identity = folder, engine, average, identity
        self.every, self.keep, self.milestone_every = (
            config.checkpoint_every,
            config.keep_checkpoints,
            config.milestone_every,
        )
        self.background = config.checkpoint_in_background
        self.saved = saved  # step of the newest whole one
        self.pending: dict[str, Any] | None = None  # state.json of the one that is being written
        self.files: CheckpointFiles = engine.checkpoint_engine
        if engine.global_rank == 0:
            for left in folder.glob(".step_*"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self.files.writing

    def begin(self, state: TrainState) -> None:
        """Of the state as it is now.  One that could not be written is said, nothing of it stays, and the former do.

        Nothing to do where the step is saved already: batches that were left out after it are left out again.
        """
        self.finish()
        if state.step == self.saved:
            return
        final, temporary = self.paths(state.step)
        self.files.begin(self.background)
        # Frozen weights are not saved: they come from where the run started.  ZeRO-3 holds shards.
        trained = [p for p in self.engine.module.parameters() if p.requires_grad]
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in trained)
        frozen = len(trained) < len(list(self.engine.module.parameters()))
        megabytes = parameters * STATE_BYTES // 2**20
        free = shutil.disk_usage(self.folder if self.folder.is_dir() else self.folder.parent).free // 2**20
        if free <= megabytes:
            self.files.errors.append(f"it needs about {megabytes} MiB and {free} MiB are free")
        elif self.engine.global_rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            self.files.makedirs(str(temporary))
        if not agreed(final, temporary, self.files.errors):
            return
        self.engine.save_checkpoint(str(temporary), tag="engine", save_latest=False, exclude_frozen_parameters=frozen)
        if self.engine.global_rank == 0 or not replicated(self.engine):
            slices = local_slices(self.engine)
            self.files.save_tensors(
                {f"{i:05d}": t for i, t in enumerate(self.average.average) if t is not None},
                temporary / average_file(self.engine.global_rank),
                {f"{i:05d}": str(place[0]) for i, place in enumerate(slices) if place is not None},
            )
        self.pending = {
            "format": FORMAT,
            "step": state.step,
            "skipped": state.skipped,
            "seconds": state.seconds,
            "loss_sums": state.loss_sums,
            "spans": as_json(state.spans),
            "updates": self.average.updates,
            "world_size": self.engine.world_size,
            "zero_stage": self.engine.zero_optimization_stage(),
            "identity": self.identity,
        }
        self.files.start()
        if not self.background:
            self.finish()

    def finish(self) -> None:
        """Waits for what `begin` began; the newest `keep_checkpoints` and the milestones stay.  Nothing without one."""
        if self.pending is None:
            return
        content, self.pending = self.pending, None
        final, temporary = self.paths(content["step"])
        self.files.wait()
        written = {str(path.relative_to(temporary)): value for path, value in self.files.written.items()}
        everyone: list[dict[str, str]] = [{}] * self.engine.world_size
        dist.all_gather_object(everyone, written)
        if not agreed(final, temporary, self.files.errors):
            return
        if self.engine.global_rank == 0:
            content["files"] = {name: value for one in everyone for name, value in one.items()}
            try:
                for inside in (temporary / "engine", temporary):
                    fsync_folder(inside)
                write_json(temporary / "state.json", content | {"mark": mark_of(content)})
                delete_whole(final)
                os.replace(temporary, final)
                fsync_folder(self.folder)
            except (OSError, UserError) as error:
                self.files.errors.append(str(error))
        if not agreed(final, temporary, self.files.errors):
            return
        self.saved = content["step"]
        if self.engine.global_rank == 0:
            self.delete_old()

    def due(self, step: int) -> bool:
        return step % self.every == 0 or self.milestone(step)

    def milestone(self, step: int) -> bool:
        return self.milestone_every > 0 and step % self.milestone_every == 0

    def delete_old(self) -> None:
        for old in checkpoint_folders(self.folder)[: -self.keep]:
            if not self.milestone(step_of(old)):
                try:
                    delete_whole(old)
                except OSError as error:
                    print(f"warning: {old} cannot be deleted: {error.strerror}; delete it by hand", flush=True)

    def paths(self, step: int) -> tuple[Path, Path]:
        """Where the checkpoint will be, and where it is while it is written."""
        return self.folder / f"step_{step:08d}", self.folder / f".step_{step:08d}.tmp"


def delete_whole(path: Path) -> None:
    """Takes its name first, so that a run killed meanwhile leaves no half checkpoint of that name.  OSError."""
    if path.is_dir():
        going = path.with_name(f".{path.name}.old")
        shutil.rmtree(going, ignore_errors=True)
        os.replace(path, going)
        shutil.rmtree(going)


def agreed(final: Path, temporary: Path, errors: list[str]) -> bool:
    """Whether no rank has an error; else rank 0 says the first one, and what was written is removed.  Collective."""
    everyone: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, errors)
    failed = [f"rank {rank}: {one[0]}" for rank, one in enumerate(everyone) if one]
    if failed and dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        print(
            f"warning: checkpoint {final} could not be written ({failed[0]}); training goes on, and the one before it "
            "stays; free disk space before the next",
            flush=True,
        )
    return not failed


def replicated(engine: Any) -> bool:
    """Whether every rank holds all of the average, so that rank 0 alone writes it."""
    return bool(engine.zero_optimization_stage() == 0)


def average_file(rank: int) -> str:
    return f"weight_average_rank{rank}.safetensors"


def load_checkpoint(path: Path, engine: Any, average: WeightAverage, spans: list[SavedSpan]) -> TrainState:
    """Puts engine and average into the state saved at `path`; `spans` hold from there on.  Every rank must call it."""
    saved = read_json(path / "state.json", "checkpoint")
    whole = all(parameter.requires_grad for parameter in engine.module.parameters())
    same_world = saved["world_size"] == engine.world_size
    with contextlib.nullcontext(path) if same_world else resharded(path, engine) as folder:
        loaded, _ = engine.load_checkpoint(str(folder), tag="engine", load_module_strict=whole)
    places = {f"{i:05d}": place for i, place in enumerate(local_slices(engine)) if place is not None}
    ranks = [0] if replicated(engine) else [engine.global_rank] if same_world else range(saved["world_size"])
    try:
        pieces = read_slices([path / average_file(rank) for rank in ranks], places)
    except (SafetensorError, OSError, KeyError, ValueError):
        pieces = None
    if not all_agree(loaded is not None and pieces is not None, engine.device):
        raise UserError(
            f"checkpoint {path}: a rank's part is missing or damaged; delete it to go on from the one before"
        )
    assert pieces is not None
    for index, piece in pieces.items():
        held = average.average[int(index)]
        assert held is not None
        held.copy_(piece.view_as(held))
    average.updates = saved["updates"]
    return TrainState(
        spans, saved["step"], saved["skipped"], saved["seconds"], saved.get("loss_sums", [])
    )  # fmt: skip
