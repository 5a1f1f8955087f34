"""Are field, renderer and mesh right, apart from score distillation?  Fits a NeRF to real renders of each object.

    python data/render.py source=library.sh3f "names=[a,b,c,d,e]" out=views resolution=128 samples=32 depth=true \
      rings=3 views_per_ring=8 references=1 eval_views=8 "elevation_deg=[-20,60]"
    python tests/benchmarks/fit_nerf.py views

Of each object: PSNR on the ring that was never fitted, and the F-score at 2 % of the bounding sphere's diameter between
the mesh and the true surface that the cameras see (their depth pictures). Exits with 1 below 28 dB or 0.95 on average.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from PIL import Image
from scipy.spatial import cKDTree
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.cameras import camera_rays
from data.stream import views_of
from distill.backend import choose_backend
from distill.config import MeshConfig
from distill.field import Field, FieldConfig
from distill.mesh import extract_mesh
from distill.sds import depth_variance_loss
from distill.turntable import render_views
from distill.volume import OccupancyGrid, VolumeConfig, render
from models.image_metrics import psnr

NEAR = 0.02  # of the bounding sphere's diameter, which is 1 object unit
POINTS = 400_000  # on the mesh


def pictures(folder: Path, views: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RGBA (V, H, W, 4) in [0, 1], straight; depth (V, H, W); c2w (V, 4, 4); fov_deg (V,)."""
    scale = json.loads((folder / "meta.json").read_text())["depth_scale"]
    rgba = [np.asarray(Image.open(folder / view["file"]), dtype=np.float32) / 255 for view in views]
    depth = [np.asarray(Image.open(folder / view["depth"])).astype(np.float32) * scale for view in views]
    c2w, fov = (torch.tensor([view[name] for view in views], dtype=torch.float32) for name in ("c2w", "fov_deg"))
    return torch.from_numpy(np.stack(rgba)), torch.from_numpy(np.stack(depth)), c2w, fov


def fit(rgba: Tensor, c2w: Tensor, fov_deg: Tensor, options: argparse.Namespace) -> tuple[Field, OccupancyGrid]:
    torch.manual_seed(0)
    size, device = rgba.shape[1], torch.device(options.device)
    backend = choose_backend("auto", device)
    field = Field(
        FieldConfig(bound=0.6, levels=options.levels, log2_entries=options.log2_entries, max_resolution=512, hidden=32,
                    blob_std=0.42), backend,
    ).to(device)  # fmt: skip
    config = VolumeConfig(samples_per_ray=256, occupancy_resolution=48, occupancy_decay=0.8, occupancy_every=16)
    grid = OccupancyGrid(0.6, config, device, backend)
    optimizer = torch.optim.AdamW(field.parameter_groups(0.02, 0.005), betas=(0.9, 0.99), eps=1e-15, weight_decay=1e-6)
    origins, directions = (x.reshape(-1, 3).to(device) for x in camera_rays(c2w, fov_deg, size, size))
    wanted = rgba.reshape(-1, 4).to(device)
    for step in range(options.steps):
        if step % config.occupancy_every == 0:
            grid.update(field.density)
        for group, rate in zip(optimizer.param_groups, (0.02, 0.005), strict=True):
            group["lr"] = rate * 0.05 ** (step / options.steps)
        rays = torch.randint(len(wanted), (options.rays,), device=device)
        jitter = torch.rand(options.rays, device=device)
        seen = render(field, grid, origins[rays], directions[rays], jitter, normals=False, density=field.density)
        alpha = wanted[rays, 3:]
        colour = wanted[rays, :3] * alpha + 1 - alpha
        loss = (seen.rgb - colour).square().mean() + 0.1 * (seen.opacity - alpha[:, 0]).square().mean()
        thin = options.depth_variance * max(2 * step / options.steps - 1, 0)  # once there is a surface
        loss = loss + thin * depth_variance_loss(seen.depth_variance, seen.opacity)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return field, grid


def surface_seen(alpha: Tensor, depth: Tensor, c2w: Tensor, fov_deg: Tensor) -> np.ndarray:
    """Points (P, 3) where the cameras' rays meet the true surface."""
    size = alpha.shape[1]
    origins, directions = camera_rays(c2w, fov_deg, size, size)
    forward = -c2w[:, None, None, :3, 2]
    along = depth / (directions * forward).sum(dim=-1)
    points = origins + directions * along[..., None]
    return points[(alpha > 0.99) & (depth > 0)].numpy()


def seen_of(points: np.ndarray, c2w: Tensor, fov_deg: Tensor, size: int) -> np.ndarray:
    """Those of dense points (P, 3) on a surface that one of the cameras sees: nearest in their pixel, or nearly."""
    seen = np.zeros(len(points), dtype=bool)
    for pose, fov in zip(c2w.numpy(), fov_deg.numpy(), strict=True):
        local = (points - pose[:3, 3]) @ pose[:3, :3]
        focal = size / 2 / np.tan(np.radians(fov) / 2)
        x, y = (
            np.floor(size / 2 + sign * focal * local[:, i] / -local[:, 2]).astype(int) for i, sign in ((0, 1), (1, -1))
        )
        inside = (x >= 0) & (x < size) & (y >= 0) & (y < size)
        pixel = np.where(inside, y * size + x, size * size)
        nearest = np.full(size * size + 1, np.inf)
        np.minimum.at(nearest, pixel, -local[:, 2])
        seen |= inside & (-local[:, 2] < nearest[pixel] + NEAR)
    return points[seen]


def f_score(found: np.ndarray, true: np.ndarray) -> tuple[float, float, float]:
    """F-score, precision, recall at NEAR."""
    precision = float((cKDTree(true).query(found)[0] < NEAR).mean())
    recall = float((cKDTree(found).query(true)[0] < NEAR).mean())
    return 2 * precision * recall / max(precision + recall, 1e-9), precision, recall


def measure(folder: Path, options: argparse.Namespace) -> tuple[float, float]:
    meta = json.loads((folder / "meta.json").read_text())
    rgba, depth, c2w, fov = pictures(folder, views_of(meta, "ring"))
    began = time.monotonic()
    field, grid = fit(rgba, c2w, fov, options)
    seconds = time.monotonic() - began
    held_out, held_depth, held_c2w, held_fov = pictures(folder, views_of(meta, "eval"))
    alpha = held_out[..., 3:]
    truth = (held_out[..., :3] * alpha + 1 - alpha).permute(0, 3, 1, 2)
    views = render_views(field, grid, held_c2w, held_fov, rgba.shape[1])
    quality = float(psnr(views.rgb, truth).mean())
    mesh, _ = extract_mesh(field, grid, MeshConfig(resolution=options.resolution))
    true = np.concatenate([surface_seen(rgba[..., 3], depth, c2w, fov),
                           surface_seen(held_out[..., 3], held_depth, held_c2w, held_fov)])  # fmt: skip
    on_mesh = np.asarray(trimesh.sample.sample_surface(mesh, POINTS, seed=0)[0])
    found = seen_of(on_mesh, torch.cat([c2w, held_c2w]), torch.cat([fov, held_fov]), rgba.shape[1])
    score, precision, recall = f_score(found, true)
    print(f"{folder.name:20} {quality:6.1f} dB   F {score:.3f} (precision {precision:.3f}, recall {recall:.3f})"
          f"   {seconds:5.0f} s, {len(mesh.faces)} faces", flush=True)  # fmt: skip
    return quality, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("views", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rays", type=int, default=4096)
    parser.add_argument("--depth-variance", type=float, default=1.0, help="weight: a thin surface, not a fog")
    parser.add_argument("--levels", type=int, default=10)
    parser.add_argument("--log2-entries", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=160, help="cells of marching cubes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    what = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} CPUs, {platform.machine()}"
    print(f"{datetime.date.today()}, {what}, torch {torch.__version__}; {options.steps} steps of {options.rays} rays")
    found = [measure(path.parent, options) for path in sorted(options.views.glob("*/meta.json"))]
    quality, score = (statistics.fmean(values) for values in zip(*found, strict=True))
    print(f"{'mean':20} {quality:6.1f} dB   F {score:.3f}")
    raise SystemExit(int(quality < 28 or score < 0.95))


if __name__ == "__main__":
    main()
