"""The loop that turns an embedding into a field by score distillation.

Only the embedding of the reference picture comes in here: no pixel of it can reach the loss.
Shapes: B sets, V views, C latent channels, h w latent size, H W pixels, R = B V H W rays, D embedding width.
"""

from __future__ import annotations

import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
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
from distill.views import Lighting, random_cameras, random_lighting, random_lights, shade
from distill.volume import Rendering, render
from models.autoencoder import encode_images
from models.checkpoint import MultiViewModel
from models.multiview import predict_noise_output
from monitor.monitor import Monitor

LOG_EVERY = 10  # steps
LEAVE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # of schedulers, which want the machine


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
    model: MultiViewModel, looks: list[Look], latents: Tensor, contexts: list[Tensor], config: GenerateConfig
) -> Tensor:
    """Where the latents (B, V, C, h, w) of all objects together should go, by what the model makes of noised ones.

    contexts: (1, T, D) of each object.
    """
    scheduler: Any = model.scheduler
    kind, device = scheduler.config.prediction_type, latents.device
    sets = [len(one.c2w) for one in looks]
    t, shift = (
        torch.tensor([getattr(one, name) for one, count in zip(looks, sets, strict=True) for _ in range(count)])
        for name in ("t", "shift")
    )
    context = torch.cat([one.expand(count, -1, -1) for one, count in zip(contexts, sets, strict=True)])
    noise = torch.cat([one.noise for one in looks])
    camera = camera_conditioning(torch.cat([one.c2w for one in looks]), model.info.camera).to(latents)

    def noised(timesteps: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = scheduler.alphas_cumprod[timesteps].to(latents)[:, None, None, None, None]
        return alpha_bar, sds.add_noise(latents, noise, alpha_bar)

    alpha_bar, noisy = noised(t)
    inputs, timesteps, conditions = [noisy, noisy], [t, t], [context, torch.zeros_like(context)]
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
        conditional, unconditional = (sds.predict_noise(noisy, out, alpha_bar, kind) for out in outputs[:2])
        guided = unconditional + config.guidance.scale * (conditional - unconditional)
        shifted = sds.predict_noise(later, outputs[2], later_bar, kind)
        return sds.asynchronous_target(latents, guided, shifted, alpha_bar)
    conditional, unconditional = outputs
    return sds.reconstruction_target(
        noisy,
        conditional,
        unconditional,
        alpha_bar,
        prediction_type=kind,
        guidance_scale=config.guidance.scale,
        std_rescale=config.guidance.std_rescale,
    )


def distillation_losses(
    runs: list[Run], model: MultiViewModel, contexts: list[Tensor], ranges: CameraRanges, config: GenerateConfig
) -> list[tuple[dict[str, Tensor], dict[str, float]]]:
    """Of each object at its step the weighted losses, and facts.  The diffusion model sees all objects in one batch."""
    # Look at the scenes
    looks = [look(run, model, ranges, config) for run in runs]

    # Ask the diffusion model what the pictures should have been
    pictures, posterior = (torch.cat([getattr(one, name) for one in looks]) for name in ("pictures", "posterior"))
    latents = encode_images(model.vae, pictures * 2 - 1, noise=posterior).unflatten(0, (-1, model.info.num_views))
    targets = wanted_latents(model, looks, latents.detach(), contexts, config)

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
    failed: str = ""  # why it was given up

    def save(self) -> None:
        save_snapshot(self.out / FILE, self.run, self.identity)


def distil_together(
    scenes: list[Scene], model: MultiViewModel, config: GenerateConfig, preview: Preview | None = None
) -> int:
    """Runs the steps that each object lacks.  Returns the signal that cut them short, or 0.

    An object whose loss is no number any more is given up, with a snapshot of its last sound step; the others go on.
    """
    ranges = camera_ranges(config, model.info)
    start = min(scene.run.step for scene in scenes)
    with StopSignals() as stop, Progress("distil", config.steps, "step", start=start) as progress:
        while not stop.signal:
            going = [scene for scene in scenes if not scene.failed and scene.run.step < config.steps]
            if not going:
                break
            step_together(going, model, ranges, config)
            last = [scene.run.losses[-1] for scene in going if not scene.failed]
            if last:
                means = {name: sum(one[name] for one in last) / len(last) for name in ("loss", "opacity")}
                progress.update(min(scene.run.step for scene in going if not scene.failed) - progress.done,
                                loss=f"{means['loss']:.3g}", opacity=f"{means['opacity']:.3f}")  # fmt: skip
            if preview is not None:
                preview.show({scene.out.name: scene.run for scene in scenes})
            for scene in going:
                if scene.run.step % config.snapshot_every == 0 or scene.failed:
                    scene.save()
        for scene in scenes:
            scene.save()
    return stop.signal


def step_together(scenes: list[Scene], model: MultiViewModel, ranges: CameraRanges, config: GenerateConfig) -> None:
    """One step of each object's optimizer."""
    for run in (scene.run for scene in scenes):  # where is there anything to see
        if run.step % config.volume.occupancy_every == 0:
            torch.manual_seed((config.seed + 1) * 1_000_003 + run.step)
            run.occupancy.update(run.field.density)
    contexts = [scene.context for scene in scenes]
    found = distillation_losses([scene.run for scene in scenes], model, contexts, ranges, config)
    totals = [torch.stack(list(losses.values())).sum() for losses, _ in found]
    for scene in scenes:
        scene.run.optimizer.zero_grad()
    torch.stack(totals).sum().backward()
    for scene, (losses, facts), total in zip(scenes, found, totals, strict=True):
        run = scene.run
        try:
            require_finite(run, losses)
        except UserError as error:
            scene.failed = str(error)
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
            f"step {run.step}: {', '.join(bad)} is not finite; lower guidance.scale or optimizer.lr_grid, or set "
            "dtype=float32; the last snapshot is sound"
        )


class StopSignals:
    """The first Ctrl-C or one of LEAVE asks the loop to end after its step; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.signal = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, *LEAVE)}
        return self

    def note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, self.before[signal.SIGINT])
        print(f"signal {number}: ending after this step; a second Ctrl-C stops at once", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
