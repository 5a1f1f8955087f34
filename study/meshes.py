"""Distilled held-out objects, judged like the 2D samples: pictures of the field and of its textured mesh.

    python -m study.meshes runs/study/meshes/stage2-0-1.5 runs/study/views_val runs/study/judged/stage2-0-1.5 \
      --size 64 --nearest runs/study/views_nearest --samples runs/study/samples/both-0

Writes meshes.json, and for each object a picture of four rows: the truth beside the reference, 2D samples, field, mesh.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.files import UserError, atomic_folder, write_json
from demo.proof import Truth, load_truth, render_distilled
from distill.glb import load_glb
from distill.mesh_views import mesh_views
from distill.turntable import to_bytes
from study.samples import judged, nearest_views


def pictures_of(folder: Path, truth: Truth) -> tuple[Tensor, Tensor]:
    """Field and mesh at the held-out poses, each (V, 3, S, S)."""
    mesh = load_glb(folder / "mesh.glb")
    return render_distilled(folder, truth), mesh_views(mesh, truth.c2w, truth.fov_deg, truth.views.shape[-1]).rgb


def load_samples(folder: Path) -> Tensor:
    """(V, 3, S, S) in [0, 1], as study/samples.py wrote them."""
    pictures = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))])
    return torch.from_numpy(pictures).movedim(-1, 1).float() / 255


def rows_of(reference: Tensor, *rows: Tensor) -> np.ndarray:
    """The reference (3, S, S) left of the first row; rows (V, 3, S, S), one under the other."""
    blank = torch.ones_like(reference)
    first = [reference] + [blank] * (len(rows) - 1)
    return np.concatenate([
        np.concatenate(list(to_bytes(torch.cat([left[None], row]))), axis=1)
        for left, row in zip(first, rows, strict=True)
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("distilled", "held_out", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--size", type=int, required=True, help="pixels a side in which all is compared")
    parser.add_argument("--nearest", type=Path, required=True, help="views; nearest.json lies beside them")
    parser.add_argument("--samples", type=Path, required=True, help="2D samples of the same objects, for the pictures")
    options = parser.parse_args()
    truth = load_truth(options.held_out, options.size)
    nearest = nearest_views(options.nearest, options.nearest.parent / "nearest.json", truth, options.size)
    uids = sorted(path.parent.name for path in options.distilled.glob("*/mesh.glb"))
    if not uids:
        raise UserError(f"{options.distilled} holds no <uid>/mesh.glb; distil first")
    pairs = [pictures_of(options.distilled / uid, truth) for uid in uids]
    fields, meshes = (torch.stack(pictures) for pictures in zip(*pairs, strict=True))
    told = {"field": judged(fields, truth, nearest, uids), "mesh": judged(meshes, truth, nearest, uids)}
    with atomic_folder(options.out) as temporary:
        for uid, field, mesh in zip(uids, fields, meshes, strict=True):
            number = truth.uids.index(uid)
            samples = load_samples(options.samples / uid)
            picture = rows_of(truth.reference[number], truth.views[number], samples, field, mesh)
            Image.fromarray(picture).save(temporary / f"{uid}.png")
        write_json(temporary / "meshes.json", told)
    for kind, objects in told.items():
        means = {key: float(np.mean([one[key] for one in objects.values()])) for key in ("psnr", "ssim", "identified")}
        print(kind, json.dumps({key: round(mean, 3) for key, mean in means.items()}))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
