"""A NeRF of pictures whose cameras are known: field and renderer without a diffusion model.

Shapes: V views, S pixels a side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data.cameras import camera_rays
from data.progress import Progress
from distill.backend import choose_backend
from distill.field import Field, FieldConfig
from distill.sds import depth_variance_loss
from distill.turntable import render_views
from distill.volume import OccupancyGrid, VolumeConfig, render
from models.image_metrics import psnr

LR_GRID, LR_NETWORK, LR_END = 0.02, 0.01, 0.05  # rates at the start; the share of them at the end
BOUND = 0.6


@dataclass
class FitConfig:
    steps: int = 1200
    rays: int = 4096  # a step
    depth_variance: float = 1.0  # weight of a thin surface, rising from a third of the run on
    opacity: float = 0.1  # weight of the pictures' alpha, where they have one
    levels: int = 10
    log2_entries: int = 16
    max_resolution: int = 512
    hidden: int = 32
    samples_per_ray: int = 256
    occupancy_resolution: int = 48


def fit(
    rgb: Tensor,
    alpha: Tensor | None,
    c2w: Tensor,
    fov_deg: Tensor,
    config: FitConfig,
    device: torch.device,
    seed: int = 0,
) -> tuple[Field, OccupancyGrid]:
    """rgb (V, 3, S, S) over white, alpha (V, S, S), both in [0, 1]; c2w (V, 4, 4); fov_deg (V,), vertical."""
    torch.manual_seed(seed)
    size, backend = rgb.shape[-1], choose_backend("auto", device)
    field = Field(
        FieldConfig(bound=BOUND, levels=config.levels, log2_entries=config.log2_entries, hidden=config.hidden,
                    max_resolution=config.max_resolution, blob_std=0.42), backend,
    ).to(device)  # fmt: skip
    volume = VolumeConfig(
        samples_per_ray=config.samples_per_ray, occupancy_resolution=config.occupancy_resolution, occupancy_decay=0.8,
        occupancy_every=16,
    )  # fmt: skip
    grid = OccupancyGrid(BOUND, volume, device, backend)
    groups = field.parameter_groups(LR_GRID, LR_NETWORK)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-15, weight_decay=1e-6)
    origins, directions = (x.reshape(-1, 3).to(device) for x in camera_rays(c2w, fov_deg, size, size))
    colours = rgb.permute(0, 2, 3, 1).reshape(-1, 3).to(device)
    opacity = None if alpha is None else alpha.reshape(-1).to(device)
    with Progress("fitting", config.steps, "step") as progress:
        for step in range(config.steps):
            if step % volume.occupancy_every == 0:
                grid.update(field.density)
            for group, rate in zip(optimizer.param_groups, (LR_GRID, LR_NETWORK), strict=True):
                group["lr"] = rate * LR_END ** (step / config.steps)
            rays = torch.randint(len(colours), (config.rays,), device=device)
            jitter = torch.rand(config.rays, device=device)
            seen = render(field, grid, origins[rays], directions[rays], jitter, normals=False, density=field.density)
            shown, wanted = seen.rgb, colours[rays]
            if opacity is not None:  # over backgrounds of any colour, or white parts of the object need not be there
                darker = torch.rand(config.rays, 3, device=device) - 1  # than white
                shown = shown + darker * (1 - seen.opacity[:, None])
                wanted = wanted + darker * (1 - opacity[rays, None])
            loss = (shown - wanted).square().mean()
            if opacity is not None:
                loss = loss + config.opacity * (seen.opacity - opacity[rays]).square().mean()
            thin = config.depth_variance * max(1.5 * step / config.steps - 0.5, 0)  # once there is a surface
            loss = loss + thin * depth_variance_loss(seen.depth_variance, seen.opacity)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress.update(1, loss=f"{float(loss.detach()):.5f}")
    return field, grid


def views_agree(rgb: Tensor, c2w: Tensor, fov_deg: Tensor, steps: int, device: torch.device, seed: int = 0) -> float:
    """How well a NeRF of every other view tells those between, in dB: are (V, 3, S, S) pictures of one object?"""
    known, asked = slice(0, None, 2), slice(1, None, 2)
    config = FitConfig(steps=steps, rays=1024, levels=8, log2_entries=14, max_resolution=128, samples_per_ray=96)
    field, grid = fit(rgb[known], None, c2w[known], fov_deg[known], config, device, seed)
    views = render_views(field, grid, c2w[asked], fov_deg[asked], rgb.shape[-1])
    return float(psnr(views.rgb, rgb[asked]).mean())
