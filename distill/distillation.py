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


@torch.no_grad()
def denoised(
    model: MultiViewModel, latents: Tensor, context: Tensor, c2w: Tensor, config: GenerateConfig, t: int
) -> Tensor:
    """What the model makes of the noised latents (B, V, C, h, w): guided x0.  context (1, T, D)."""
    sets = len(latents)
    scheduler: Any = model.scheduler
    alpha_bar = scheduler.alphas_cumprod[t].to(latents)
    noisy = sds.add_noise(latents, torch.randn(latents.shape).to(latents), alpha_bar)
    camera = camera_conditioning(c2w, model.info.camera).to(latents)
    conditional, unconditional = predict_noise_output(
        model.unet,
        torch.cat([noisy, noisy]),
        torch.full((2 * sets,), t, device=latents.device),
        torch.cat([context.expand(sets, -1, -1), torch.zeros_like(context).expand(sets, -1, -1)]),
        torch.cat([camera, camera]),
    ).chunk(2)
    return sds.reconstruction_target(
        noisy,
        conditional,
        unconditional,
        alpha_bar,
        prediction_type=scheduler.config.prediction_type,
        guidance_scale=config.guidance.scale,
        std_rescale=config.guidance.std_rescale,
    )


def distillation_loss(
    run: Run, model: MultiViewModel, context: Tensor, ranges: CameraRanges, config: GenerateConfig
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The weighted losses of step `run.step`, and facts about it.  Every random draw is keyed by (seed, step)."""
    progress = run.step / config.steps
    torch.manual_seed((config.seed + 1) * 1_000_003 + run.step)

    # Look at the scene from a few sets of cameras
    size, sets = config.schedule.at(progress)
    c2w, fov_deg = random_cameras(sets, model.info.num_views, ranges.elevation_deg, ranges.fov_deg, ranges.framing)
    ambient_only = progress < config.light.ambient_share
    lighting = random_lighting(ambient_only, config.light.diffuse_prob, config.light.textureless_prob)
    pictures, seen, directions = render_sets(run, c2w, fov_deg, size, lighting)

    # Ask the diffusion model what the pictures should have been
    full = F.interpolate(pictures, (model.info.image_size,) * 2, mode="bilinear", align_corners=False)
    latents = encode_images(model.vae, full * 2 - 1, sample=True).unflatten(0, c2w.shape[:2])
    low, high = sds.timestep_range(
        progress, config.guidance.t_lowest, config.guidance.t_highest, config.guidance.anneal_share
    )
    t = int(torch.randint(low, high + 1, ()))
    target = denoised(model, latents.detach(), context, c2w, config, t)

    # Pull towards it, and keep the scene well behaved
    losses = {"sds": config.loss.sds * sds.reconstruction_loss(latents, target)}
    weights = {
        "orientation": sds.ramp(progress, config.loss.orientation, config.loss.orientation_share),
        "sparsity": config.loss.sparsity,
        "opaque": config.loss.opaque,
        "depth_variance": config.loss.depth_variance,
    }
    losses |= sds.regularization(seen, directions, weights)
    facts = {"t": t, "resolution": size, "opacity": seen.opacity.mean().item(), "samples": len(seen.ray)}
    return losses, facts


def distil(
    run: Run,
    model: MultiViewModel,
    context: Tensor,
    config: GenerateConfig,
    identity: str,
    monitor: Monitor | None = None,
) -> int:
    """Runs the steps that are left.  Returns the signal that cut them short, or 0.

    context (1, T, D).  Snapshots go to `config.out`; UserError when the loss is no number any more.
    """
    ranges = camera_ranges(config, model.info)
    snapshot = Path(config.out) / FILE
    with StopSignals() as stop, Progress("distil", config.steps, "step", start=run.step) as progress:
        while run.step < config.steps and not stop.signal:
            # Where is there anything to see
            if run.step % config.volume.occupancy_every == 0:
                torch.manual_seed((config.seed + 1) * 1_000_003 + run.step)
                run.occupancy.update(run.field.density)

            # One step
            losses, facts = distillation_loss(run, model, context, ranges, config)
            total = torch.stack(list(losses.values())).sum()
            run.optimizer.zero_grad()
            total.backward()
            require_finite(run, losses)
            run.optimizer.step()

            # Keep account
            run.losses.append(
                {"step": run.step, "loss": total.item(), **{k: v.item() for k, v in losses.items()}, **facts}
            )
            run.step += 1
            progress.update(1, loss=f"{total.item():.3g}", opacity=f"{facts['opacity']:.3f}")
            if monitor is not None and run.step % LOG_EVERY == 0:
                monitor.log(run.step, {name: value for name, value in run.losses[-1].items() if name != "step"})
            if run.step % config.snapshot_every == 0:
                save_snapshot(snapshot, run, identity)
        save_snapshot(snapshot, run, identity)
    return stop.signal


def require_finite(run: Run, losses: dict[str, Tensor]) -> None:
    """UserError before a loss or gradient that is no number can reach the weights."""
    bad = [name for name, value in losses.items() if not bool(torch.isfinite(value))]
    bad += [
        f"gradient of {name}"
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
