"""The training loop of both stages.  A stage differs by its values: which branches it mixes and what it starts from."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from data.files import UserError, atomic_file, read_json, require_writable
from data.processes import die_with_parent, locked
from data.progress import Progress
from data.shards import Cameras
from data.stream import Batch, ViewDataset, micro_batches
from models.checkpoint import ExportInfo, MultiViewModel, read_info, save_export
from models.image_encoder import ClipImageEncoder, count_tokens
from models.latents import encoders_mark
from train.checkpoints import (
    STATE_BYTES,
    TrainState,
    checkpoint_folders,
    identity,
    load_checkpoint,
    newest_checkpoint,
    newest_state,
    require_same_run,
    save_checkpoint,
)
from train.config import OptimConfig, TrainConfig
from train.engine import (
    WeightAverage,
    build_engine,
    memory_explained,
    prepare_environment,
    resolve_precision,
    take_step,
)
from train.flops import flops_of_branches, peak_flops
from train.interruption import REQUEUE, Interruption
from train.meter import Meter
from train.monitor import Monitor
from train.networks import empty_unet, frozen_parts, initial_unet, scheduler_of
from train.objective import Encoders, choose_branch, training_loss
from train.samples import sample_grid
from train.shard_history import Damage, open_dataset
from train.skips import Skips
from train.trainable import choose_trainable
from train.watchdog import Watchdog


def train(config: TrainConfig) -> None:
    """Trains to `config.steps`, from the newest checkpoint if there is one, and writes `export/`."""
    with locked(Path(config.out)) if is_main() else contextlib.nullcontext():
        run_to_the_end(config)


def is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def print_main(words: str) -> None:
    if is_main():
        print(words, flush=True)


def run_to_the_end(config: TrainConfig) -> None:
    with memory_explained(config), watched(config) as watchdog:
        run = set_up(config, watchdog)
        if run is not None:
            run_steps(run)


def run_steps(run: Run) -> None:
    config, state = run.config, run.state
    interruption = Interruption()
    saved = state.step
    run.meter.reset()
    with Progress(f"stage {config.stage}", config.steps, "step", state.step, show=run.is_main) as progress:
        while state.step < config.steps:
            began = time.monotonic()
            updated = optimize(run)
            state.seconds += time.monotonic() - began
            if not updated:
                continue

            if state.step % config.log_every == 0 or state.step == config.steps:
                progress.facts["loss"] = f"{report(run)['loss']:.4f}"
            progress.update(1)

            # Save; end where that was asked for; look at samples.
            last, asked_to_end = state.step == config.steps, interruption.agreed(run.engine.device)
            if last or asked_to_end or state.step % config.checkpoint_every == 0:
                saved = state.step if save(run) else saved
            if asked_to_end and not last:
                end_early(run, saved)
            if last or (config.sample_every and state.step % config.sample_every == 0):
                sample(run)
    export(run)
    close(run)
    interruption.close()
    if saved < config.steps:
        raise UserError(
            f"{run.folder}/export is whole, but the last checkpoint could not be written; free disk space and give "
            "the same command again to write it"
        )


def optimize(run: Run) -> bool:
    """One step of the optimizer, on all ranks.  False when it was left out, since a gradient was not finite."""
    config, state, engine = run.config, run.state, run.engine

    # Branch, data and noise are functions of the batch's number, the learning rate of the step's.
    branch = choose_branch(config.objective, config.seed, state.batch)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(config.optim, state.step, config.steps)

    # Accumulate gradients over the micro-batches; the engine reduces, clips and updates at the last.
    of_objects: list[tuple[list[str], torch.Tensor, torch.Tensor]] = []
    for _ in range(config.accumulation):
        run.watchdog.enter("step", f"the data of step {state.step + 1}")
        with run.meter.waiting():
            batch = next(run.batches)
        run.damage.note(batch.damaged)
        run.watchdog.enter("step", f"step {state.step + 1}")
        loss, timesteps = training_loss(
            engine, run.encoders, run.model.scheduler, batch, branch, config.objective, config.model,
            run.model.latent_shape, config.seed,
        )  # fmt: skip
        engine.backward(loss.mean())
        updated = take_step(engine)
        of_objects.append((batch.keys, loss.detach(), timesteps))
    if not updated:
        run.skips.note(state, [(keys, loss) for keys, loss, _ in of_objects])
        return False
    for _, losses, timesteps in of_objects:
        run.meter.add(branch, losses, timesteps)
    run.meter.steps += 1
    run.average.update()
    run.skips.in_a_row = 0
    state.step += 1
    return True


def save(run: Run) -> bool:
    """A checkpoint; False when it could not be written.  Collective."""
    config, state = run.config, run.state
    run.watchdog.enter("checkpoint", f"the checkpoint of step {state.step}")
    keep, milestone = config.keep_checkpoints, config.milestone_every
    return save_checkpoint(run.checkpoints, run.engine, run.average, state, keep, run.identity, milestone)


def end_early(run: Run, saved: int) -> None:
    """Exits with REQUEUE.  Collective."""
    close(run)
    print_main(
        f"stage {run.config.stage}: asked to end; saved at step {saved}, and the same command goes on from there"
    )
    raise SystemExit(REQUEUE)


def close(run: Run) -> None:
    if run.monitor is not None:
        run.monitor.close()
    dist.destroy_process_group()


@dataclass
class Run:
    """What the loop works on."""

    config: TrainConfig
    folder: Path
    identity: dict[str, Any]  # what a checkpoint must share to be resumed
    damage: Damage
    watchdog: Watchdog
    engine: Any  # DeepSpeedEngine around the UNet
    encoders: Encoders
    model: MultiViewModel  # frozen parts, schedule, and on rank 0 a UNet for the averaged weights
    dataset: ViewDataset
    batches: Iterator[Batch]
    average: WeightAverage
    state: TrainState
    skips: Skips
    meter: Meter
    monitor: Monitor | None  # rank 0
    gathered_step: int = -1  # step whose averaged weights `model.unet` holds

    @property
    def is_main(self) -> bool:
        return bool(self.engine.global_rank == 0)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


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
    die_with_parent()
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
    last_state = newest_state(folder / "checkpoints")
    dataset, spans = open_dataset(config, folder, last_state, write=is_main())
    damage = Damage(folder / "damaged.jsonl", config.data, dataset.folder, dataset.manifest, is_main())
    print_main(f"stage {config.stage}: {len(dataset)} objects; loading the networks")
    vae, image_encoder = frozen_parts(config)
    require_own_latents(dataset, vae, image_encoder)
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
    newest = newest_checkpoint(folder / "checkpoints")
    if newest is not None:
        if read_json(newest / "state.json", "checkpoint") != last_state:  # a damaged one was passed over
            dataset, spans = open_dataset(config, folder, newest_state(folder / "checkpoints"), write=False)
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
    return Run(
        config=config,
        folder=folder,
        identity=marks,
        damage=damage,
        watchdog=watchdog,
        engine=engine,
        encoders=Encoders(model.vae, model.image_encoder),
        model=model,
        dataset=dataset,
        batches=micro_batches(dataset, batch, micro, rank, world, state.batch, config.data.workers),
        average=average,
        state=state,
        skips=Skips(config.max_skipped),
        meter=Meter(
            engine.device,
            model.scheduler.config.num_train_timesteps,
            flops_of_branches(config, count_tokens(model.image_encoder)),
            peak_flops(engine.device, resolve_precision(config.precision)),
        ),
        monitor=Monitor(config, folder, state.step) if is_main() else None,
    )


def require_one_manifest(read: str, before: str) -> None:
    """UserError unless all ranks have read the same list of shards.  Collective."""
    everyone: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    dist.all_gather_object(everyone, (read, before))
    if len({mark for pair in everyone for mark in pair}) > 1:
        raise UserError("data.shards: the list of shards has changed while the run was starting; start it again")


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
    if not found:
        return False
    require_same_run(found[-1], config, marks)
    return found[-1].name == f"step_{config.steps:08d}" and (folder / "export" / "isotropic3d.json").is_file()


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


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Linear warm-up, then constant, or cosine to zero at `steps`."""
    rate = config.lr * min(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
    return rate


def report(run: Run) -> dict[str, float]:
    """What happened since the last report.  Collective."""
    config, step = run.config, run.state.step
    values = run.meter.report(config.data.num_views, config.steps - step) | {
        "lr": learning_rate(config.optim, step - 1, config.steps),
        "grad_norm": float(run.engine.get_global_grad_norm() or 0.0),
        "skipped_steps": float(run.state.skipped),
        "damaged_objects": float(run.damage.gather(run.is_main)),
    }
    if run.monitor is not None:
        run.monitor.log(step, values)
    return values


def fill_averaged_weights(run: Run) -> None:
    """Puts the averaged weights into `run.model.unet` on rank 0.  Collective."""
    if run.gathered_step == run.state.step:
        return
    weights = run.average.gather()
    if weights is not None:
        run.model.unet.load_state_dict(weights, strict=run.config.trainable == "all", assign=True)
        run.model.unet.requires_grad_(False).eval()
    run.model.info.step = run.state.step
    run.gathered_step = run.state.step


def sample(run: Run) -> None:
    """A grid of sampled views beside the ground truth, drawn by rank 0 while the others wait.  Collective."""
    run.watchdog.enter("checkpoint", f"the samples of step {run.state.step}")
    fill_averaged_weights(run)
    if run.monitor is not None:
        device = next(run.model.vae.parameters()).device
        run.model.unet.to(device)  # for the time of the sampling only: the weights in training need the memory
        path = run.folder / "samples" / f"step_{run.state.step:08d}.png"
        psnr = sample_grid(
            run.model,
            run.dataset,
            path,
            run.config.sample_objects,
            run.config.sample_steps,
            run.config.sample_guidance,
            run.config.seed,
        )
        run.model.unet.to("cpu")
        run.monitor.image(run.state.step, "samples", path, "reference, then sampled views over ground truth")
        run.monitor.log(run.state.step, {"samples/psnr": psnr})
    dist.barrier()


def export(run: Run) -> None:
    """The finished checkpoint.  Collective."""
    run.watchdog.enter("checkpoint", "the export")
    fill_averaged_weights(run)
    if run.is_main:
        save_export(run.folder / "export", run.model)
        print(f"stage {run.config.stage}: exported {run.folder / 'export'}", flush=True)
    dist.barrier()
