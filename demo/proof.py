"""Did it work?  Posed views that were never trained on, against the renders of every object and two baselines.

    python -m demo.proof runs/demo cactus

Writes proof.json and the pictures of the report.  Shapes: O objects, V views, H W pixels.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.files import UserError, atomic_file, read_json, write_json
from data.progress import Progress
from data.shards import decode_image
from data.stream import composite, views_of
from distill.glb import load_glb
from distill.mesh_views import mesh_views
from distill.snapshot import load_result
from distill.turntable import render_views, to_bytes
from models.checkpoint import load_export
from models.image_encoder import embed_image
from models.image_metrics import psnr
from models.sampling import sample_views
from train.config import TrainConfig

DISTILLED_DB = 2.0  # the distilled object must beat both baselines by this
MESH_DB = 2.0  # pictures of the mesh may be worse than the field's by this
SAMPLES_DB = 3.0  # and the 2D samples, on average over objects, by this
LEAST_VIEWS = 8
MANY_STEPS = 20  # what the samples are worth when they are not drawn near their mean; told, not judged


@dataclass
class Truth:
    """What was rendered of each object and kept from training."""

    uids: list[str]
    reference: Tensor  # (O, 3, H, W)
    views: Tensor  # (O, V, 3, H, W)
    c2w: Tensor  # (V, 4, 4), the same cameras for all objects
    fov_deg: Tensor  # (V,)


def load_truth(folder: Path, size: int) -> Truth:
    metas = [read_json(path, "views") for path in sorted(folder.glob("*/meta.json"))]
    if len(metas) < 2:
        raise UserError(f"{folder} holds {len(metas)} rendered objects; identification needs at least 2")

    def picture(meta: dict[str, Any], view: dict[str, Any]) -> Tensor:
        return composite(decode_image((folder / meta["uid"] / view["file"]).read_bytes(), size))

    posed = [sorted(views_of(meta, "eval"), key=lambda view: view["index"]) for meta in metas]
    c2w = torch.tensor([[view["c2w"] for view in views] for views in posed], dtype=torch.float32)
    if not torch.allclose(c2w, c2w[:1].expand_as(c2w), atol=1e-5):
        raise UserError(f"{folder}: the objects' eval views have different cameras; render them with one setting")
    return Truth(
        uids=[meta["uid"] for meta in metas],
        reference=torch.stack([picture(meta, views_of(meta, "eval_reference")[0]) for meta in metas]),
        views=torch.stack([torch.stack([picture(m, v) for v in views]) for m, views in zip(metas, posed, strict=True)]),
        c2w=c2w[0],
        fov_deg=torch.tensor([view["fov_deg"] for view in posed[0]]),
    )


def against_all(views: Tensor, truth: Truth) -> list[float]:
    """Mean PSNR in dB of (V, 3, H, W) against each object's renders."""
    return [float(psnr(views, other).mean()) for other in truth.views]


def baselines(truth: Truth) -> dict[str, list[float]]:
    """Mean PSNR in dB of an all-white picture and of the mean over objects, for each object."""
    mean = truth.views.mean(dim=0)
    white = torch.ones_like(mean)
    return {
        "white": [float(psnr(white, views).mean()) for views in truth.views],
        "mean object": [float(psnr(mean, views).mean()) for views in truth.views],
    }


def sample_all(checkpoint: Path, truth: Truth, num_views: int, guidance: float, steps: int) -> Tensor:
    """2D samples of every object from its reference's embedding and the poses alone: (O, V, 3, H, W).

    The V poses are drawn in interleaved sets of `num_views`, equally spaced as in training.
    """
    total, sets = len(truth.c2w), len(truth.c2w) // num_views
    if total < LEAST_VIEWS:
        raise UserError(f"{total} posed views judge nothing; render with eval_views={LEAST_VIEWS} or more")
    if total % num_views:
        raise UserError(f"{total} posed views do not divide into sets of {num_views}; render with another eval_views")
    model = load_export(checkpoint)
    sampled = torch.zeros_like(truth.views)
    with torch.no_grad():
        context = embed_image(model.image_encoder, truth.reference)
    with Progress("sampling", len(truth.uids) * sets, "set") as progress:
        for number in range(len(truth.uids)):
            for start in range(sets):
                chosen = list(range(start, total, sets))[:num_views]
                sampled[number, chosen] = sample_views(
                    model,
                    context[number : number + 1],
                    truth.c2w[None, chosen],
                    guidance_scale=guidance,
                    steps=steps,
                    generator=torch.Generator().manual_seed(number),
                )[0]
                progress.update()
    return sampled


def render_distilled(folder: Path, truth: Truth) -> Tensor:
    """The distilled field at the held-out poses: (V, 3, H, W)."""
    result, _ = load_result(folder)
    return render_views(result.field, result.occupancy, truth.c2w, truth.fov_deg, truth.views.shape[-1]).rgb


def judge(truth: Truth, sampled: Tensor, distilled: Tensor, meshed: Tensor, uid: str) -> dict[str, Any]:
    """Everything the report's verdict rests on.  distilled, meshed: (V, 3, H, W) of the field and of its mesh."""
    base = baselines(truth)
    best = [max(values) for values in zip(*base.values(), strict=True)]
    samples = [against_all(views, truth) for views in sampled]
    own = [row[i] for i, row in enumerate(samples)]
    number = truth.uids.index(uid)
    field, mesh = against_all(distilled, truth), against_all(meshed, truth)
    margins = [a - b for a, b in zip(own, best, strict=True)]
    checks = {
        "distilled object is nearest to its own renders": int(np.argmax(field)) == number,
        f"distilled object beats both baselines by {DISTILLED_DB:g} dB": field[number] - best[number] >= DISTILLED_DB,
        "the mesh is nearest to the object's own renders": int(np.argmax(mesh)) == number,
        f"pictures of the mesh are within {MESH_DB:g} dB of the field's": field[number] - mesh[number] <= MESH_DB,
        "2D samples of every object are nearest to its own renders": all(
            int(np.argmax(row)) == i for i, row in enumerate(samples)
        ),
        "2D samples of every object beat both baselines": min(margins) > 0,
        f"2D samples beat both baselines by {SAMPLES_DB:g} dB on average": float(np.mean(margins)) >= SAMPLES_DB,
    }
    return {
        "objects": truth.uids,
        "views": len(truth.c2w),
        "baselines_db": base,
        "samples_db": samples,
        "samples_margin_db": margins,
        "samples_margin_mean_db": float(np.mean(margins)),
        "distilled": uid,
        "distilled_db": field,
        "mesh_db": mesh,
        "distilled_margin_db": field[number] - best[number],
        "checks": {name: bool(ok) for name, ok in checks.items()},
        "passed": bool(all(checks.values())),
    }


def save_rows(path: Path, rows: list[Tensor]) -> None:
    """PNG of rows (V, 3, H, W), one under the other."""
    grid = np.concatenate([np.concatenate(list(to_bytes(row)), axis=1) for row in rows], axis=0)
    with atomic_file(path) as temporary:
        Image.fromarray(grid).save(temporary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="the demo's folder")
    parser.add_argument("uid", help="the distilled object")
    arguments = parser.parse_args()
    out: Path = arguments.out
    from omegaconf import OmegaConf

    saved = OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.load(out / "stage2" / "config.yaml"))
    training = OmegaConf.to_object(saved)
    assert isinstance(training, TrainConfig)
    truth = load_truth(out / "views", training.data.image_size)
    if arguments.uid not in truth.uids:
        raise UserError(f"no rendered object is called {arguments.uid}; there are {', '.join(truth.uids)}")
    checkpoint, views, guidance = out / "stage2" / "export", training.data.num_views, training.validation.guidance
    few = training.validation.sample_steps
    sampled = sample_all(checkpoint, truth, views, guidance, few)
    many = sample_all(checkpoint, truth, views, guidance, MANY_STEPS)
    distilled = render_distilled(out / "distill", truth)
    mesh = load_glb(out / "distill" / "mesh.glb")
    meshed = mesh_views(mesh, truth.c2w, truth.fov_deg, truth.views.shape[-1]).rgb
    pictures = out / "pictures"
    for uid, reference, views, real in zip(truth.uids, truth.reference, sampled, truth.views, strict=True):
        blank = torch.ones_like(reference)[None]
        save_rows(pictures / "samples" / f"{uid}.png", [torch.cat([reference[None], views]), torch.cat([blank, real])])
    save_rows(pictures / "distilled.png", [distilled, meshed, truth.views[truth.uids.index(arguments.uid)]])
    proof = judge(truth, sampled, distilled, meshed, arguments.uid)
    proof["sample_steps"] = few
    proof["samples_margin_mean_db_by_steps"] = {
        few: proof["samples_margin_mean_db"],
        MANY_STEPS: judge(truth, many, distilled, meshed, arguments.uid)["samples_margin_mean_db"],
    }
    write_json(out / "proof.json", proof)
    print(json.dumps(proof["checks"], indent=1), flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
