"""Are field, renderer and mesh right, apart from score distillation?  Fits a NeRF to real renders of each object.

    python data/render.py source=library.sh3f "names=[a,b,c,d,e]" out=views resolution=128 samples=32 \
      rings=3 views_per_ring=8 references=1 eval_views=8 "elevation_deg=[-20,60]"
    python tests/benchmarks/fit_nerf.py views library.sh3f

Of each object: PSNR on the ring that was never fitted, and the F-score at 2 % of the bounding sphere's diameter between
what the fitted cameras see of the mesh and of the object's own file. Exits with 1 below 28 dB or 0.95 on average.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.assets import Asset, list_assets
from data.stream import views_of
from distill.config import MeshConfig
from distill.evaluation.shapes import Samples, distances, f_score, sample_surface
from distill.fitting import FitConfig, fit
from distill.mesh import extract_mesh
from distill.mesh_views import first_hits
from distill.silhouette import project
from distill.turntable import render_views
from models.image_metrics import psnr

NEAR = 0.02  # of the bounding sphere's diameter, which is 1 object unit
POINTS = 200_000  # on all of a mesh
SIGHT = 256  # pixels a side of the pictures that tell which of them the cameras see


def pictures(folder: Path, views: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RGB over white (V, 3, S, S), alpha (V, S, S), c2w (V, 4, 4), fov_deg (V,)."""
    files = [np.asarray(Image.open(folder / view["file"]), dtype=np.float32) / 255 for view in views]
    rgba = torch.from_numpy(np.stack(files)).permute(0, 3, 1, 2)
    c2w, fov = (torch.tensor([view[name] for view in views], dtype=torch.float32) for name in ("c2w", "fov_deg"))
    return rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:], rgba[:, 3], c2w, fov


def true_mesh(asset: Asset) -> trimesh.Trimesh:
    """The file's shape where data/blender_worker.py puts it: z up, front on +x, in a sphere of radius 0.5."""
    mesh: Any = trimesh.load(asset.path, force="mesh", process=False, skip_materials=True)
    mesh.remove_unreferenced_vertices()
    vertices = (np.asarray(mesh.vertices) @ np.reshape(asset.rotation, (3, 3)).T)[:, [2, 0, 1]]
    vertices = vertices - (vertices.max(axis=0) + vertices.min(axis=0)) / 2
    return trimesh.Trimesh(vertices * (0.5 / np.linalg.norm(vertices, axis=1).max()), mesh.faces, process=False)


def seen_by(mesh: trimesh.Trimesh, c2w: Tensor, fov_deg: Tensor) -> Samples:
    """Points that the cameras see: what they do not, such as the underside of a cake, no picture tells."""
    samples = sample_surface(mesh, POINTS)
    seen = np.zeros(POINTS, dtype=bool)
    for pose, fov in zip(c2w, fov_deg.tolist(), strict=True):
        hits = first_hits(mesh, pose, fov, SIGHT)
        depth = np.zeros(SIGHT * SIGHT)
        depth[hits.pixel] = hits.distance
        column, row = np.clip(np.floor(project(samples.points, pose.numpy(), fov, SIGHT)).astype(int), 0, SIGHT - 1).T
        away = np.linalg.norm(samples.points - pose[:3, 3].numpy(), axis=1)
        seen |= away < depth[row * SIGHT + column] + NEAR / 2  # two pixels' width
    return Samples(*(column[seen] for column in samples))


def measure(folder: Path, asset: Asset, options: argparse.Namespace) -> tuple[float, float]:
    meta = json.loads((folder / "meta.json").read_text())
    config = FitConfig(steps=options.steps, rays=options.rays)
    rgb, alpha, c2w, fov = pictures(folder, views_of(meta, "ring"))
    began = time.monotonic()
    field, grid = fit(rgb, alpha, c2w, fov, config, torch.device(options.device))
    seconds = time.monotonic() - began
    truth, _, held_c2w, held_fov = pictures(folder, views_of(meta, "eval"))
    quality = float(psnr(render_views(field, grid, held_c2w, held_fov, truth.shape[-1]).rgb, truth).mean())
    mesh, _ = extract_mesh(field, grid, MeshConfig(resolution=options.resolution))
    apart = distances(*(seen_by(shape, c2w, fov) for shape in (mesh, true_mesh(asset))))
    score = f_score(apart, NEAR)
    print(f"{folder.name:20} {quality:6.1f} dB   F {score:.3f} (precision {(apart.to_truth < NEAR).mean():.3f}, recall "
          f"{(apart.to_pred < NEAR).mean():.3f})   {seconds:5.0f} s, {len(mesh.faces)} faces", flush=True)  # fmt: skip
    return quality, score


def main() -> None:
    usual = FitConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("views", type=Path)
    parser.add_argument("library", help="what they were rendered from, as data/render.py's source")
    parser.add_argument("--steps", type=int, default=usual.steps)
    parser.add_argument("--rays", type=int, default=usual.rays)
    parser.add_argument("--resolution", type=int, default=MeshConfig().resolution, help="cells of marching cubes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    what = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} CPUs, {platform.machine()}"
    print(f"{datetime.date.today()}, {what}, torch {torch.__version__}; {options.steps} steps of {options.rays} rays")
    folders = [path.parent for path in sorted(options.views.glob("*/meta.json"))]
    found = []
    with tempfile.TemporaryDirectory(prefix="isotropic3d-fit-") as cache:
        assets = {asset.uid: asset for asset in list_assets(options.library, cache, [f.name for f in folders])}
        for folder in folders:
            found.append(measure(folder, assets[folder.name], options))
    quality, score = (statistics.fmean(values) for values in zip(*found, strict=True))
    print(f"{'mean':20} {quality:6.1f} dB   F {score:.3f}")
    raise SystemExit(int(quality < 28 or score < 0.95))


if __name__ == "__main__":
    main()
