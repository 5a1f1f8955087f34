"""The training loop of both stages.  A stage differs by its values: which branches it mixes and what it starts from."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist

from data.files import UserError
from data.processes import REQUEUE, locked
from data.progress import Progress
from models.checkpoint import save_export
from train.config import OptimConfig, TrainConfig
from train.engine import OnEveryRank, any_rank, memory_explained, take_step
from train.interruption import Interruption, peers_needed
from train.objective import choose_branch, training_loss
from train.profiling import profiled
from train.set_up import Run, is_main, print_main, set_up, watched
from train.validation import held_out_losses, sample_grid


def train(config: TrainConfig) -> None:
    """Trains to `config.steps`, from the newest checkpoint if there is one, and writes `export/`."""
    with locked(Path(config.out)) if is_main() else contextlib.nullcontext():
        run_to_the_end(config)


def run_to_the_end(config: TrainConfig) -> None:
    with peers_needed(), memory_explained(config), watched(config) as watchdog:
        run = set_up(config, watchdog)
        if run is None:
            return
        try:
            run_steps(run)
        except UserError as error:
            if isinstance(error, OnEveryRank):  # what is being written becomes a checkpoint
                run.watchdog.enter("checkpoint", "the checkpoint that was being written")
                run.checkpoints.finish()
            alert(run, "stopped", str(error), "ERROR")
            if run.monitor is not None:
                run.monitor.close(status=2)
            raise


def run_steps(run: Run) -> None:
    config, state, checkpoints = run.config, run.state, run.checkpoints
    interruption = Interruption()
    run.meter.reset()
    if run.is_main and run.state.loss_sums:
        run.meter.restore(run.state.loss_sums)
    with (
        Progress(f"stage {config.stage}", config.steps, "step", state.step, show=run.is_main) as progress,
        profiled(config.profile, run.folder / "profile", run.is_main) as profiler,
    ):
        first = state.step
        picture_is_missing = run.is_main and first > 0 and not picture_of(run).is_file()
        if due(run) and any_rank([picture_is_missing], run.engine.device)[0]:  # it ended before it was validated
            validate(run)
        while state.step < config.steps:
            began = time.monotonic()
            updated = optimize(run)
            state.seconds += time.monotonic() - began
            last = updated and state.step == config.steps
            if last or (updated and state.step % config.log_every == 0):
                progress.facts["loss"] = f"{report(run)['loss']:.4f}"
            progress.update(int(updated))
            profiler.step()

            # Save while training goes on, or end where that was asked for.
            noted = interruption.noted or (updated and state.step - first == config.end_after)
            asked_to_end, writing = any_rank([noted, checkpoints.writing], run.engine.device)
            if not writing and checkpoints.pending is not None:
                run.watchdog.enter("checkpoint", f"the end of the checkpoint of step {checkpoints.pending['step']}")
                checkpoints.finish()
            if last or asked_to_end or (updated and checkpoints.due(state.step)):
                save(run, wait=last or asked_to_end)
            if asked_to_end and not last:
                end_early(run)

            if updated and due(run):
                validate(run)
    export(run)
    close(run)
    interruption.close()
    if checkpoints.saved < config.steps:
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
        updated = take_step(engine, config.optim.clip_norm)
        of_objects.append((batch.keys, loss.detach(), timesteps))
    if not updated:
        words = run.skips.note(state, [(keys, loss) for keys, loss, _ in of_objects])
        alert(run, "a step was left out", words, "WARN")
        return False
    for _, losses, timesteps in of_objects:
        run.meter.add(branch, losses, timesteps)
    run.meter.steps += 1
    run.average.update()
    run.skips.in_a_row = 0
    state.step += 1
    return True


def save(run: Run, wait: bool) -> None:
    """A checkpoint, begun or whole.  Collective."""
    run.watchdog.enter("checkpoint", f"the checkpoint of step {run.state.step}")
    run.state.loss_sums = run.meter.totals()
    run.checkpoints.begin(run.state)
    if wait:
        run.checkpoints.finish()


def end_early(run: Run) -> None:
    """Exits with REQUEUE.  Collective."""
    saved = run.checkpoints.saved
    kept = f"saved at step {saved}" if run.state.step else "nothing to save yet"
    words = f"asked to end; {kept}, and the same command goes on"
    alert(run, "asked to end", words)
    close(run)
    print_main(f"stage {run.config.stage}: {words}")
    raise SystemExit(REQUEUE)


def alert(run: Run, title: str, words: str, level: str = "INFO") -> None:
    if run.monitor is not None:
        run.monitor.alert(title, words, level)


def close(run: Run) -> None:
    if run.monitor is not None:
        run.monitor.close()
    dist.destroy_process_group()


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


def due(run: Run) -> bool:
    """Whether the step is one after which the run is validated."""
    every, step = run.config.validation.every, run.state.step
    return step > 0 and (step == run.config.steps or (every > 0 and step % every == 0))


def picture_of(run: Run) -> Path:
    return run.folder / "samples" / f"step_{run.state.step:08d}.png"


def validate(run: Run) -> None:
    """Loss on held-out objects, and sampled views beside the ground truth: by rank 0, for which the others wait.

    What fails there is said, and training goes on.
    """
    began = time.monotonic()
    run.watchdog.enter("checkpoint", f"the validation of step {run.state.step}")
    fill_averaged_weights(run)
    if run.is_main:
        try:
            held_out_figures(run)
        except (UserError, OSError, RuntimeError, ValueError) as error:
            words = f"the validation of step {run.state.step} failed: {error}"
            print(f"warning: {words}; training goes on", flush=True)
            alert(run, "validation failed", words, "WARN")
        run.model.unet.to("cpu")
    dist.barrier()
    run.meter.began += time.monotonic() - began  # its rates are of training


def held_out_figures(run: Run) -> None:
    """Of rank 0."""
    config, step = run.config.validation, run.state.step
    if run.monitor is not None:
        run.model.unet.to(run.engine.device)  # for this time only: the weights in training need the memory
        values: dict[str, float] = {}
        if run.held_out is not None:
            values |= held_out_losses(run.model, run.held_out, run.config)
        figures, picture = sample_grid(
            run.model, run.held_out or run.dataset, config.sample_objects, config.sample_steps, config.guidance
        )
        kind = "samples" if run.held_out is None else "validation"
        run.monitor.log(step, {f"{kind}/{name}": value for name, value in (values | figures).items()})
        run.monitor.picture(step, kind, picture_of(run), picture)  # reference, then sampled views over ground truth


def export(run: Run) -> None:
    """The finished checkpoint.  Collective."""
    run.watchdog.enter("checkpoint", "the export")
    fill_averaged_weights(run)
    if run.is_main:
        save_export(run.folder / "export", run.model)
        assert run.monitor is not None
        name = f"{run.config.name}-stage{run.config.stage}"
        run.monitor.artifact(name, "checkpoint", str(run.folder / "export"), True, {"step": run.state.step})
        alert(run, "finished", f"step {run.state.step}; {run.folder / 'export'}")
        print(f"stage {run.config.stage}: exported {run.folder / 'export'}", flush=True)
    dist.barrier()
