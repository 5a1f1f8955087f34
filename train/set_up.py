"""Everything before the first step: what a run needs is checked, loaded and made here, cheapest checks first."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from omegaconf import OmegaConf

from data.files import UserError, atomic_file, require_writable
from data.shards import Cameras
from data.stream import Batch, ViewDataset, micro_batches
from models.checkpoint import ExportInfo, MultiViewModel, read_info
from models.image_encoder import ClipImageEncoder, count_tokens
from models.latents import encoders_mark
from monitor.facts import name_of_weights
from monitor.monitor import Monitor
from train.checkpoints import (
    STATE_BYTES,
    Checkpoints,
    TrainState,
    checkpoint_folders,
    identity,
    load_checkpoint,
    newest_checkpoint,
    newest_state,
    read_state,
    require_same_run,
    step_of,
)
from train.config import TrainConfig
from train.engine import WeightAverage, build_engine, prepare_environment, resolve_precision
from train.flops import flops_of_branches, peak_flops
from train.meter import Meter
from train.networks import empty_unet, frozen_parts, initial_unet, scheduler_of
from train.objective import Encoders, draw
from train.shard_history import Damage, open_dataset
from train.skips import Skips
from train.trainable import choose_trainable
from train.validation import held_out_dataset
from train.watchdog import Watchdog


def is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def print_main(words: str) -> None:
    if is_main():
        print(words, flush=True)


@dataclass
class Run:
    """What the loop works on."""

    config: TrainConfig
    folder: Path
    damage: Damage
    watchdog: Watchdog
    engine: Any  # DeepSpeedEngine around the UNet
    encoders: Encoders
    model: MultiViewModel  # frozen parts, schedule, and on rank 0 a UNet for the averaged weights
    dataset: ViewDataset
    held_out: ViewDataset | None  # what is validated on
    batches: Iterator[Batch]
    average: WeightAverage
    state: TrainState
    checkpoints: Checkpoints
    skips: Skips
    meter: Meter
    monitor: Monitor | None  # rank 0
    gathered_step: int = -1  # step whose averaged weights `model.unet` holds

    @property
    def is_main(self) -> bool:
        return bool(self.engine.global_rank == 0)


@contextlib.contextmanager
def watched(config: TrainConfig) -> Iterator[Watchdog]:
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    watchdog = Watchdog(Path(config.out), config.limits, rank, world)
    try:
        yield watchdog
    finally:
        watchdog.close()


def set_up(config: TrainConfig, watchdog: Watchdog) -> Run | None:
    """Everything before the first step, cheapest checks first.  None when the run had already ended."""
    folder = Path(config.out)
    marks = identity(config)
    if finished(config, folder, marks):
        print_main(f"stage {config.stage}: {folder}/export is finished (step {config.steps}); nothing to do")
        return None
    if config.init_from is not None:
        read_info(config.init_from)
    if config.init_from is None and config.model.unet.weights is None and not config.model.unet.from_scratch:
        raise UserError(
            "model.unet.weights is not set: this stage starts from a multi-view UNet, such as MVDream's in diffusers' "
            "format; give its folder, or model.unet.from_scratch=true"
        )
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
    last_state = newest_state(folder / "checkpoints")
    dataset, spans = open_dataset(config, folder, last_state, write=is_main())
    held_out = held_out_dataset(config, dataset)
    damage = Damage(folder / "damaged.jsonl", config.data, dataset.folder, dataset.manifest, is_main())
    print_main(f"stage {config.stage}: {len(dataset)} objects; loading the networks")
    vae, image_encoder = frozen_parts(config)
    for one in filter(None, (dataset, held_out)):
        require_own_latents(one, vae, image_encoder)
    unet = initial_unet(config)
    choose_trainable(unet, config)
    require_space(config, folder, unet)
    prepare_environment(config.cpu)
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / "config.yaml") as temporary:
            temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))

    print_main(f"stage {config.stage}: starting DeepSpeed; its first time on a machine, it compiles for a minute")
    # The averaged weights are gathered into a UNet of their own.  Its frozen weights stay in fp32, as they came.
    averaged = copy.deepcopy(unet) if is_main() and config.trainable != "all" else empty_unet(config)
    accelerator, engine = build_engine(config, unet)
    average = WeightAverage(engine, config.optim.weight_average_decay)
    state = TrainState(spans)
    require_one_manifest(spans[-1].manifest, marks["data.shards"])
    require_one_precision(marks["precision"])
    newest = newest_checkpoint(folder / "checkpoints")
    if newest is not None:
        found = read_state(newest)
        if found is not None and found != last_state:  # a damaged one was passed over
            dataset, spans = open_dataset(config, folder, found, write=False)
        state = load_checkpoint(newest, engine, average, spans)
        print_main(f"stage {config.stage}: going on from {newest}")
    model = MultiViewModel(
        averaged,
        vae.to(accelerator.device),
        image_encoder.to(accelerator.device),
        scheduler_of(config.model),
        export_info(config, dataset.manifest.cameras),
    )
    batch, micro, world, rank = config.batch_size, config.micro_batch_size, engine.world_size, engine.global_rank
    shape, steps = (config.data.num_views, *model.latent_shape), model.scheduler.config.num_train_timesteps
    noise = partial(draw, config.objective, config.seed, shape=shape, steps=steps, references=dataset.num_references)
    run = Run(
        config=config,
        folder=folder,
        damage=damage,
        watchdog=watchdog,
        engine=engine,
        encoders=Encoders(model.vae, model.image_encoder),
        model=model,
        dataset=dataset,
        held_out=held_out,
        batches=micro_batches(dataset, batch, micro, rank, world, state.batch, config.data.workers, noise),
        average=average,
        state=state,
        checkpoints=Checkpoints(folder / "checkpoints", engine, average, marks, config, state.step),
        skips=Skips(config.max_skipped, scaled=resolve_precision(config.precision) == "fp16"),
        meter=Meter(
            engine.device,
            model.scheduler.config.num_train_timesteps,
            flops_of_branches(config, count_tokens(model.image_encoder)),
            peak_flops(engine.device, resolve_precision(config.precision)),
        ),
        monitor=watch(config, folder, state.step, marks) if is_main() else None,
    )
    dist.barrier()  # W&B may take its time: until it is there no rank's first step has begun
    return run


def watch(config: TrainConfig, folder: Path, step: int, marks: dict[str, Any]) -> Monitor:
    """Of a run that goes on from `step`, with what it is made from."""
    monitor = Monitor(folder, config.wandb, config.name, f"stage{config.stage}", asdict(config), step)
    shards = Path(config.data.shards).name
    monitor.artifact(shards, "shards", config.data.shards, made=False, about={"manifest": marks["data.shards"]})
    if config.init_from is not None:
        monitor.artifact(name_of_weights(config.init_from), "checkpoint", config.init_from, made=False, about={})
    return monitor


def require_one_manifest(read: str, before: str) -> None:
    """UserError unless all ranks have read the same list of shards.  Collective."""
    everyone: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    dist.all_gather_object(everyone, (read, before))
    if len({mark for pair in everyone for mark in pair}) > 1:
        raise UserError("data.shards: the list of shards has changed while the run was starting; start it again")


def require_one_precision(precision: str) -> None:
    """UserError unless precision=auto is the same on all machines.  Collective."""
    everyone = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, precision)
    if len(set(everyone)) > 1:
        raise UserError(f"precision=auto is {' and '.join(sorted(set(everyone)))} on this run's machines; choose one")


def require_own_latents(dataset: ViewDataset, vae: Any, image_encoder: ClipImageEncoder) -> None:
    """UserError for latents that other encoders made."""
    manifest = dataset.manifest
    if manifest.kind == "latents" and manifest.encoders != encoders_mark(vae, image_encoder):
        raise UserError(
            f"{dataset.folder.describe()} holds latents of other encoders than model.autoencoder and "
            "model.image_encoder name; make them again with data/precompute.py, or give the networks that made them"
        )


def finished(config: TrainConfig, folder: Path, marks: dict[str, Any]) -> bool:
    """Whether `folder` holds this run's last checkpoint and export.  UserError when it holds another run's."""
    found = checkpoint_folders(folder / "checkpoints")
    if config.resume == "never" and found:
        raise UserError(f"{folder} has checkpoints already and resume=never; choose another name= or out=")
    whole = [path for path in found if read_state(path) is not None]
    if not whole:
        return False
    require_same_run(whole[-1], config, marks)
    if step_of(whole[-1]) != config.steps or not (folder / "export" / "isotropic3d.json").is_file():
        return False
    return read_info(folder / "export").step == config.steps  # else it is that of a shorter run


def require_space(config: TrainConfig, folder: Path, unet: Any) -> None:
    """UserError when the disk cannot hold the checkpoints that are still to come."""
    state_mb = sum(p.numel() for p in unet.parameters() if p.requires_grad) * STATE_BYTES // 2**20
    # While one is written there is one more than are kept.
    to_come = config.keep_checkpoints + 1 - len(checkpoint_folders(folder / "checkpoints"))
    require_writable(folder, needed_mb=64 + state_mb * to_come)


def export_info(config: TrainConfig, cameras: Cameras) -> ExportInfo:
    return ExportInfo(
        image_size=config.data.image_size,
        num_views=config.data.num_views,
        elevation_deg=cameras.elevation_deg,
        fov_deg=cameras.fov_deg,
        framing=cameras.framing,
        camera=config.model.camera,
        stage=config.stage,
        step=0,  # set when the weights are gathered
    )
