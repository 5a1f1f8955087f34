"""Pictures of a finished field: single views, a strip, and a turning video; colour beside normals.

Shapes: V views, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import imageio.v2 as imageio
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.cameras import camera_rays, framing_distance, orbit_camera
from data.files import atomic_file
from data.progress import Progress
from distill.config import TurntableConfig
from distill.field import FieldSamples
from distill.volume import OccupancyGrid, render

RAYS_AT_ONCE = {"cpu": 2**14, "cuda": 2**18}


class Views(NamedTuple):
    """V pictures of the field, on the CPU."""

    rgb: Tensor  # (V, 3, H, W) in [0, 1]: albedo over the background
    normal: Tensor  # (V, 3, H, W) in [0, 1]: (n + 1) / 2 in world axes over white
    opacity: Tensor  # (V, H, W) in [0, 1]
    depth: Tensor  # (V, H, W) distance from the camera, object units; 0 where there is nothing


@torch.no_grad()
def render_views(
    field: Callable[..., FieldSamples], occupancy: OccupancyGrid, c2w: Tensor, fov_deg: Tensor | float, size: int
) -> Views:
    """c2w (V, 4, 4), fov_deg (V,) or one number, vertical -> pictures of size x size pixels."""
    device = occupancy.live.device
    fov = torch.as_tensor(fov_deg, dtype=torch.float32).expand(len(c2w))
    origins, directions = (x.reshape(-1, 3) for x in camera_rays(c2w.float().to(device), fov, size, size))
    parts, rays = [], 0
    with Progress("rendering", len(c2w), "view") as progress:
        for o, d in zip(*(x.split(RAYS_AT_ONCE[device.type]) for x in (origins, directions)), strict=True):
            parts.append(picture_of_rays(field, occupancy, o, d).cpu())
            rays += len(o)
            progress.update(rays // size**2 - progress.done)
    image = torch.cat(parts).view(len(c2w), size, size, 8).permute(0, 3, 1, 2)
    return Views(image[:, :3].clamp(0, 1), image[:, 3:6].clamp(0, 1), image[:, 6], image[:, 7])


def picture_of_rays(
    field: Callable[..., FieldSamples], occupancy: OccupancyGrid, origins: Tensor, directions: Tensor
) -> Tensor:
    """Rays (R, 3) -> (R, 8): colour, normal over white, opacity, depth, as in Views."""
    seen = render(field, occupancy, origins, directions, torch.full((len(origins),), 0.5, device=origins.device))
    length = seen.normal.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    normal = 1 + seen.opacity[:, None] * ((seen.normal / length + 1) / 2 - 1)
    return torch.cat([seen.rgb, normal, seen.opacity[:, None], seen.depth[:, None]], dim=-1)


def ring(count: int, elevation_deg: float, fov_deg: float, framing: float) -> Tensor:
    """`count` cameras on a circle, azimuth 0 (the front) first -> c2w (count, 4, 4)."""
    azimuth = torch.arange(count) * (360 / count)
    return orbit_camera(azimuth, torch.tensor(elevation_deg), framing_distance(framing, fov_deg))


def to_bytes(images: Tensor) -> np.ndarray:
    """(..., 3, H, W) in [0, 1] -> (..., H, W, 3) uint8."""
    return (images.clamp(0, 1) * 255).round().byte().movedim(-3, -1).cpu().numpy()


def save_strip(path: Path, views: Views) -> None:
    """PNG: one column a view; colour above normals."""
    rows = [np.concatenate(list(to_bytes(images)), axis=1) for images in (views.rgb, views.normal)]
    with atomic_file(path) as temporary:
        Image.fromarray(np.concatenate(rows, axis=0)).save(temporary)


def save_video(path: Path, views: Views, fps: int) -> None:
    """MP4 (H.264): one frame a view; colour beside normals."""
    frames = np.concatenate([to_bytes(views.rgb), to_bytes(views.normal)], axis=2)
    with atomic_file(path) as temporary:
        imageio.mimwrite(temporary, list(frames), fps=fps, codec="libx264", quality=8, macro_block_size=16)


def save_turntable(
    out: Path,
    field: Callable[..., FieldSamples],
    occupancy: OccupancyGrid,
    camera: tuple[float, float, float],
    config: TurntableConfig,
) -> None:
    """Writes out/turntable.mp4 and out/views.png.  camera: elevation_deg, fov_deg, framing."""
    fov = camera[1]
    save_video(
        out / "turntable.mp4",
        render_views(field, occupancy, ring(config.frames, *camera), fov, config.size),
        config.fps,
    )
    save_strip(out / "views.png", render_views(field, occupancy, ring(config.views, *camera), fov, config.size))
