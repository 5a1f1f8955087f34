"""The loop that turns an embedding into a field by score distillation.

Only the embedding of the reference picture comes in here: no pixel of it can reach the loss.
Shapes: B sets, V views, C latent channels, h w latent size, H W pixels, R = B V H W rays, D embedding width.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.cameras import camera_conditioning, camera_rays
from data.files import UserError
from data.progress import Progress
from distill import sds
from distill.config import GenerateConfig
from distill.field import FieldSamples
from distill.preview import Preview
from distill.snapshot import FILE, Run, save_snapshot
from distill.stopping import StopSignals
from distill.views import Lighting, random_cameras, random_lighting, random_lights, shade
from distill.volume import Rendering, render
from models.autoencoder import encode_images
from models.checkpoint import MultiViewModel
from models.multiview import predict_noise_output
from monitor.monitor import Monitor

LOG_EVERY = 10  # steps


@dataclass
class CameraRanges:
    """Where cameras are drawn from: low and high."""

    elevation_deg: tuple[float, float]
    fov_deg: tuple[float, float]
    framing: tuple[float, float]  # distance * tan(fov / 2), object units

    @property
    def middle(self) -> tuple[float, float, float]:
        """elevation_deg, fov_deg, framing of the typical view."""
        return sum(self.elevation_deg) / 2, sum(self.fov_deg) / 2, sum(self.framing) / 2


def camera_ranges(config: GenerateConfig, info: Any) -> CameraRanges:
    """The configuration's, or where it is silent those of the checkpoint's training (`info`: ExportInfo)."""
    chosen = {n: tuple(getattr(config, n) or getattr(info, n)) for n in ("elevation_deg", "fov_deg", "framing")}
    return CameraRanges(**chosen)


def render_sets(
    run: Run, c2w: Tensor, fov_deg: Tensor, size: int, lighting: Lighting
) -> tuple[Tensor, Rendering, Tensor]:
    """c2w (B, V, 4, 4), fov_deg (B, V) -> pictures (B V, 3, H, W) in [0, 1], the rendering, ray directions (R, 3)."""
    device = run.occupancy.live.device
    lights = random_lights(c2w).view(-1, 3).to(device)
    origins, directions = (x.reshape(-1, 3) for x in camera_rays(c2w.to(device), fov_deg, size, size))

    def lit(samples: FieldSamples, points: Tensor, ray: Tensor) -> Tensor:
        return shade(samples, points, lights[ray // size**2] if lighting.needs_normals else lights[:0], lighting)

    jitter = torch.rand(len(origins)).to(device)
    seen = render(run.field, run.occupancy, origins, directions, jitter, shade=lit, density=run.field.density)
    return seen.rgb.view(-1, size, size, 3).permute(0, 3, 1, 2), seen, directions


@dataclass
class Look:
    """What one object shows at one step, and all that is drawn at random for it."""

    pictures: Tensor  # (B V, 3, S, S) in [0, 1], of the model's size
    seen: Rendering
    directions: Tensor  # (R, 3)
    c2w: Tensor  # (B, V, 4, 4)
    resolution: int  # that it was rendered in
    t: int  # timestep
    shift: int  # to the later one, with guidance.method=asd
    noise: Tensor  # (B, V, C, h, w)
    posterior: Tensor  # (B V, C, h, w): the autoencoder's own draw


def look(run: Run, model: MultiViewModel, ranges: CameraRanges, config: GenerateConfig) -> Look:
    """Renders the object from a few sets of cameras.  Every random draw is keyed by (seed, step)."""
    progress = run.step / config.steps
    torch.manual_seed((config.seed + 1) * 1_000_003 + run.step)
    size, sets = config.schedule.at(progress)
    c2w, fov_deg = random_cameras(sets, model.info.num_views, ranges.elevation_deg, ranges.fov_deg, ranges.framing)
    ambient_only = progress < config.light.ambient_share
    lighting = random_lighting(ambient_only, config.light.diffuse_prob, config.light.textureless_prob)
    pictures, seen, directions = render_sets(run, c2w, fov_deg, size, lighting)
    full = F.interpolate(pictures, (model.info.image_size,) * 2, mode="bilinear", align_corners=False)
    low, high = sds.timestep_range(
        progress, config.guidance.t_lowest, config.guidance.t_highest, config.guidance.anneal_share
    )
    t = int(torch.randint(low, high + 1, ()))
    shift = sds.asynchronous_shift(t, low, config.guidance.asd_share, float(torch.rand(())))
    noise, posterior = torch.randn(2, *c2w.shape[:2], *model.latent_shape).to(full)
    return Look(full, seen, directions, c2w, size, t, shift, noise, posterior.flatten(0, 1))


@torch.no_grad()
def wanted_latents(
    model: MultiViewModel,
    looks: list[Look],
    latents: Tensor,
    contexts: list[Tensor],
    config: GenerateConfig,
    unconditional: list[Tensor] | None = None,
) -> Tensor:
    """Where the latents (B, V, C, h, w) of all objects together should go, by what the model makes of noised ones.

    contexts, unconditional: (1, T, D) of each object; zeros stand for no condition where none is given (released).
    """
    scheduler: Any = model.scheduler
    kind, device = scheduler.config.prediction_type, latents.device
    sets = [len(one.c2w) for one in looks]
    t, shift = (
        torch.tensor([getattr(one, name) for one, count in zip(looks, sets, strict=True) for _ in range(count)])
        for name in ("t", "shift")
    )
    empty = [torch.zeros_like(one) for one in contexts] if unconditional is None else unconditional
    context, nothing = (
        torch.cat([one.expand(count, -1, -1) for one, count in zip(each, sets, strict=True)])
        for each in (contexts, empty)
    )
    noise = torch.cat([one.noise for one in looks])
    camera = camera_conditioning(torch.cat([one.c2w for one in looks]), model.info.camera).to(latents)

    def noised(timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = scheduler.alphas_cumprod[timesteps].to(latents)[:, None, None, None, None]
        return alpha_bar, sds.add_noise(latents, noise, alpha_bar)

    alpha_bar, noisy = noised(t)
    inputs, timesteps, conditions = [noisy, noisy], [t, t], [context, nothing]
    if config.guidance.method == "asd":
        later_bar, later = noised(t + shift)
        inputs, timesteps, conditions = [*inputs, later], [*timesteps, t + shift], [*conditions, context]
    outputs = predict_noise_output(
        model.unet,
        torch.cat(inputs),
        torch.cat(timesteps).to(device),
        torch.cat(conditions),
        torch.cat([camera] * len(inputs)),
    ).chunk(len(inputs))
    if config.guidance.method == "asd":
        conditional, free = (sds.predict_noise(noisy, out, alpha_bar, kind) for out in outputs[:2])
        guided = free + config.guidance.scale * (conditional - free)
        shifted = sds.predict_noise(later, outputs[2], later_bar, kind)
        return sds.asynchronous_target(latents, guided, shifted, alpha_bar)
    conditional, free = outputs
    return sds.reconstruction_target(
        noisy,
        conditional,
        free,
        alpha_bar,
        prediction_type=kind,
        guidance_scale=config.guidance.scale,
        std_rescale=config.guidance.std_rescale,
    )


def distillation_losses(
    runs: list[Run],
    model: MultiViewModel,
    contexts: list[Tensor],
    ranges: CameraRanges,
    config: GenerateConfig,
    unconditional: list[Tensor] | None = None,
) -> list[tuple[dict[str, Tensor], dict[str, float]]]:
    """Of each object at its step the weighted losses, and facts.  The diffusion model sees all objects in one batch."""
    # Look at the scenes
    looks = [look(run, model, ranges, config) for run in runs]

    # Ask the diffusion model what the pictures should have been
    pictures, posterior = (torch.cat([getattr(one, name) for one in looks]) for name in ("pictures", "posterior"))
    latents = encode_images(model.vae, pictures * 2 - 1, noise=posterior).unflatten(0, (-1, model.info.num_views))
    targets = wanted_latents(model, looks, latents.detach(), contexts, config, unconditional)

    # Pull each towards it, and keep the scenes well behaved
    sets = [len(one.c2w) for one in looks]
    results = []
    for run, one, own, target in zip(runs, looks, latents.split(sets), targets.split(sets), strict=True):
        weights = {
            "orientation": sds.ramp(run.step / config.steps, config.loss.orientation, config.loss.orientation_share),
            "sparsity": config.loss.sparsity,
            "opaque": config.loss.opaque,
            "depth_variance": config.loss.depth_variance,
        }
        losses = {"sds": config.loss.sds * sds.reconstruction_loss(own, target)}
        losses |= sds.regularization(one.seen, one.directions, weights)
        facts = {"t": one.t, "resolution": one.resolution, "opacity": one.seen.opacity.mean().item(),
                 "samples": len(one.seen.ray)}  # fmt: skip
        results.append((losses, facts))
    return results


def distil(
    run: Run,
    model: MultiViewModel,
    context: Tensor,
    config: GenerateConfig,
    identity: str,
    monitor: Monitor | None = None,
) -> int:
    """`distil_together` of one object.  UserError when its loss is no number any more."""
    scene = Scene(run, context, Path(config.out), identity, monitor)
    stopped_by = distil_together([scene], model, config)
    if scene.failed:
        raise UserError(scene.failed)
    return stopped_by


@dataclass
class Scene:
    """One of the objects that are distilled together."""

    run: Run
    context: Tensor  # (1, T, D)
    out: Path  # where its snapshots go
    identity: str
    monitor: Monitor | None = None
    unconditional: Tensor | None = None  # (1, T, D) that stands for no condition; zeros where there is none

    @property
    def failed(self) -> str:
        """Why it was given up."""
        return self.run.failed

    def save(self) -> None:
        """A disk that is full now may have room at the next snapshot, and the steps until then are not lost."""
        try:
            save_snapshot(self.out / FILE, self.run, self.identity)
        except UserError as error:
            print(f"warning: no snapshot of step {self.run.step}: {error}", file=sys.stderr, flush=True)


def distil_together(
    scenes: list[Scene],
    model: MultiViewModel,
    config: GenerateConfig,
    preview: Preview | None = None,
    stop: StopSignals | None = None,
) -> int:
    """Runs the steps that each object lacks.  Returns the signal that cut them short, or 0.

    An object whose loss is no number any more is given up, with a snapshot of its last sound step; the others go on.
    Where the GPU's memory is too small for all in one batch, they go in smaller ones.
    """
    ranges = camera_ranges(config, model.info)
    start, at_once = min(scene.run.step for scene in scenes), len(scenes)
    with contextlib.ExitStack() as stack:
        stop = stop or stack.enter_context(StopSignals())
        stack.enter_context(stop.patiently())
        progress = stack.enter_context(Progress("distil", config.steps, "step", start=start))
        while not stop.signal:
            going = [scene for scene in scenes if not scene.failed and scene.run.step < config.steps]
            if not going:
                break
            at_once = step_within_memory(going, model, ranges, config, at_once)
            sound = [scene.run for scene in going if not scene.failed and scene.run.losses]
            if sound:
                last = [run.losses[-1] for run in sound]
                means = {name: sum(one[name] for one in last) / len(last) for name in ("loss", "opacity")}
                progress.update(min(run.step for run in sound) - progress.done,
                                loss=f"{means['loss']:.3g}", opacity=f"{means['opacity']:.3f}")  # fmt: skip
            if preview is not None:
                preview.show({scene.out.name: scene.run for scene in scenes})
            for scene in going:
                if scene.run.step % config.snapshot_every == 0 or scene.failed:
                    scene.save()
        for scene in scenes:
            scene.save()
    return stop.signal


def step_within_memory(
    scenes: list[Scene], model: MultiViewModel, ranges: CameraRanges, config: GenerateConfig, at_once: int
) -> int:
    """One step of each, at most `at_once` in a batch.  Returns how many will do: half as many where memory ran out.

    A batch that ran out is tried again by the next call; objects may be a step apart.  One that does not fit alone is
    given up.
    """
    for group in (scenes[first : first + at_once] for first in range(0, len(scenes), at_once)):
        try:
            step_together(group, model, ranges, config)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
        else:
            continue
        for scene in group:  # outside of the except block, whose traceback holds the step's tensors
            scene.run.optimizer.zero_grad()
        torch.cuda.empty_cache()
        if len(group) > 1:
            print(f"note: {len(group)} objects at once need too much memory; {len(group) // 2} from now on", flush=True)
            return len(group) // 2
        group[0].run.failed = (
            f"step {group[0].run.step}: the GPU's memory does not suffice ({reason}); give the same command again "
            "where nothing else uses the GPU or with a lower volume.samples_at_once, or begin anew with lower "
            "schedule.resolutions or schedule.sets"
        )
    return at_once


def step_together(scenes: list[Scene], model: MultiViewModel, ranges: CameraRanges, config: GenerateConfig) -> None:
    """One step of each object's optimizer."""
    for run in (scene.run for scene in scenes):  # where is there anything to see
        if run.step % config.volume.occupancy_every == 0:
            torch.manual_seed((config.seed + 1) * 1_000_003 + run.step)
            run.occupancy.update(run.field.density)
    contexts = [scene.context for scene in scenes]
    empty = [torch.zeros_like(one.context) if one.unconditional is None else one.unconditional for one in scenes]
    found = distillation_losses([scene.run for scene in scenes], model, contexts, ranges, config, empty)
    totals = [torch.stack(list(losses.values())).sum() for losses, _ in found]
    for scene in scenes:
        scene.run.optimizer.zero_grad()
    torch.stack(totals).sum().backward()
    for scene, (losses, facts), total in zip(scenes, found, totals, strict=True):
        run = scene.run
        try:
            require_finite(run, losses)
        except UserError as error:
            run.failed = str(error)
            continue
        run.optimizer.step()
        run.losses.append({"step": run.step, "loss": total.item(), **{k: v.item() for k, v in losses.items()}, **facts})
        run.step += 1
        if scene.monitor is not None and run.step % LOG_EVERY == 0:
            scene.monitor.log(run.step, {name: value for name, value in run.losses[-1].items() if name != "step"})


def require_finite(run: Run, losses: dict[str, Tensor]) -> None:
    """UserError before a loss or gradient that is no number can reach the weights."""
    bad = [name for name, value in losses.items() if not bool(torch.isfinite(value))]
    bad = bad or [
        f"the gradient of {name}"
        for name, parameter in run.field.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad.sum()))
    ]
    if bad:
        raise UserError(
            f"step {run.step}: {', '.join(bad)} is not finite; give the same command again with a lower guidance.scale "
            "or optimizer.lr_grid or with dtype=float32, and it goes on from its last sound step"
        )
