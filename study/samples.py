"""2D samples of held-out objects, judged against all of them and against what needs no model.

    python -m study.samples runs/study/both-0-stage2/export runs/study/views_val runs/study/samples/both-0 \
      --size 64 --guidance 1.5 --steps 10 --nearest runs/study/views_nearest

Writes samples.json, the views as <uid>/NNN.png (numbered as the ground truth's), references/ and a picture.
Shapes: O objects, V views.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.files import UserError, atomic_folder, read_json, write_json
from data.stream import views_of
from demo.proof import Truth, load_truth, sample_all
from distill.turntable import to_bytes
from models.checkpoint import load_export
from models.image_metrics import psnr, ssim

SHOWN = 12  # objects in the picture, evenly spread from the best to the worst


def against(views: Tensor, truth: Truth) -> Tensor:
    """Mean PSNR in dB of (K, V, 3, S, S) against each object's renders: (K, O)."""
    return torch.stack([torch.stack([psnr(one, other).mean() for other in truth.views]) for one in views])


def judged(found: Tensor, truth: Truth, nearest: Tensor, uids: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """By uid.  found (K, V, 3, S, S): pictures of `uids`, or of all; nearest (O, V, 3, S, S): renders of the nearest
    object that was trained on."""
    others = {"white": torch.ones_like(truth.views), "mean_object": truth.views.mean(dim=0).expand_as(truth.views),
              "nearest_trained": nearest}  # fmt: skip
    recognised = {name: against(pictures, truth).argmax(dim=1) for name, pictures in others.items()}
    told = {}
    for uid, views, row in zip(uids or truth.uids, found, against(found, truth), strict=True):
        number = truth.uids.index(uid)
        real = truth.views[number]
        told[uid] = {
            "psnr": float(row[number]),
            "ssim": float(ssim(views, real).mean()),
            "identified": bool(row.argmax() == number),
            "rank": int((row > row[number]).sum()) + 1,
            "by_view": psnr(views, real).tolist(),
            **{name: float(psnr(pictures[number], real).mean()) for name, pictures in others.items()},
            **{f"{name}_by_view": psnr(pictures[number], real).tolist() for name, pictures in others.items()},
            **{f"{name}_identified": bool(best[number] == number) for name, best in recognised.items()},
        }
    return told


def nearest_views(folder: Path, table: Path, truth: Truth, size: int) -> Tensor:
    nearest: Any = read_json(table, "nearest objects")
    known = load_truth(folder, size)
    if not torch.allclose(known.c2w, truth.c2w, atol=1e-5):
        raise UserError(
            f"{folder} was rendered from other cameras than the held-out objects; remove it and start again"
        )
    return torch.stack([known.views[known.uids.index(nearest[uid]["nearest"])] for uid in truth.uids])


def azimuths_deg(truth: Truth, held_out: Path) -> Tensor:
    """(O, V): of each view, from the object's reference."""
    metas: list[Any] = [read_json(held_out / uid / "meta.json", "views") for uid in truth.uids]
    references = torch.tensor([views_of(meta, "eval_reference")[0]["c2w"] for meta in metas])
    views, reference = (torch.rad2deg(torch.atan2(c2w[:, 1, 3], c2w[:, 0, 3])) for c2w in (truth.c2w, references))
    return views - reference[:, None]


def resized(views: Tensor, size: int) -> Tensor:
    """(O, V, 3, S, S) in [0, 1] -> (O, V, 3, size, size): the mean over areas when it is smaller, else bicubic."""
    mode = "area" if size <= views.shape[-1] else "bicubic"
    return F.interpolate(views.flatten(0, 1), (size, size), mode=mode).clamp(0, 1).unflatten(0, views.shape[:2])


def write(out: Path, sampled: Tensor, truth: Truth, held_out: Path, told: dict[str, Any]) -> None:
    with atomic_folder(out) as temporary:
        (temporary / "references").mkdir()
        for uid, views, reference in zip(truth.uids, sampled, truth.reference, strict=True):
            meta: Any = read_json(held_out / uid / "meta.json", "views")
            posed = sorted(views_of(meta, "eval"), key=lambda view: view["index"])
            (temporary / uid).mkdir()
            for picture, view in zip(to_bytes(views), posed, strict=True):
                Image.fromarray(picture).save(temporary / uid / view["file"])
            Image.fromarray(to_bytes(reference[None])[0]).save(temporary / "references" / f"{uid}.png")
        ranked = sorted(told["objects"], key=lambda uid: -told["objects"][uid]["psnr"])
        chosen = [ranked[i] for i in np.unique(np.linspace(0, len(ranked) - 1, SHOWN).round().astype(int))]
        rows = []
        for uid in chosen:
            number = truth.uids.index(uid)
            for first, views in ((truth.reference[number], sampled[number]),
                                 (torch.ones_like(truth.reference[number]), truth.views[number])):  # fmt: skip
                rows.append(np.concatenate(list(to_bytes(torch.cat([first[None], views]))), axis=1))
        Image.fromarray(np.concatenate(rows)).save(temporary / "samples.png")
        write_json(temporary / "samples.json", told | {"shown": chosen})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("export", "held_out", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--size", type=int, required=True, help="pixels a side in which all is compared")
    parser.add_argument("--guidance", type=float, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--nearest", type=Path, required=True, help="views; nearest.json lies beside them")
    options = parser.parse_args()
    model = load_export(options.export)
    info, parameters = model.info, sum(weight.numel() for weight in model.unet.parameters())
    del model
    own = load_truth(options.held_out, info.image_size)
    sampled = sample_all(options.export, own, info.num_views, options.guidance, options.steps)
    truth = load_truth(options.held_out, options.size)
    same = resized(sampled, options.size)
    nearest = nearest_views(options.nearest, options.nearest.parent / "nearest.json", truth, options.size)
    objects = judged(same, truth, nearest)
    for one, azimuths in zip(objects.values(), azimuths_deg(truth, options.held_out).tolist(), strict=True):
        one["azimuth_deg"] = azimuths
    told = {"objects": objects, "image_size": info.image_size, "guidance": options.guidance, "steps": options.steps,
            "parameters": parameters}  # fmt: skip
    write(options.out, same, truth, options.held_out, told)
    values = told["objects"].values()
    print(json.dumps({k: round(float(np.mean([v[k] for v in values])), 3) for k in ("psnr", "ssim", "identified")}))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
