"""Pictures of what the model has learned: reference, sampled views, and the ground truth they are to match."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.files import UserError, atomic_file
from data.shards import DamagedSample
from data.stream import StoredObject, ViewDataset, views_of
from models.autoencoder import decode_latents
from models.checkpoint import MultiViewModel
from models.image_encoder import embed_image
from models.sampling import sample_views


def validation_views(meta: dict[str, Any], num_views: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A reference and `num_views` equally spaced posed views, from those never trained on where the object has such."""
    references = views_of(meta, "eval_reference") or views_of(meta, "reference")
    posed = views_of(meta, "eval") or [view for view in views_of(meta, "ring") if view["ring"] == 0]
    stride = max(len(posed) // num_views, 1)
    return references[0], posed[::stride][:num_views]


def shown(
    model: MultiViewModel, stored: StoredObject, reference_view: dict[str, Any], posed: list[dict[str, Any]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference (3, H, W) and views (V, 3, H, W) in [0, 1], and the reference's context (1, T, D).

    Of latents that were computed ahead, what the autoencoder makes of their means.
    """
    if stored.kind == "latents":
        mean, _ = stored.moments([reference_view, *posed]).chunk(2, dim=1)
        device = next(model.vae.parameters()).device
        pictures = decode_latents(model.vae, mean.to(device) * model.vae.config["scaling_factor"]).cpu()
        return pictures[0], pictures[1:], stored.embedding(reference_view)[None]
    reference = stored.image(reference_view)
    truth = torch.stack([stored.image(view) for view in posed])
    return reference, truth, embed_image(model.image_encoder, reference[None])


MOST_DAMAGED = 64  # objects that are passed over in search of some to show


def sample_grid(
    model: MultiViewModel, dataset: ViewDataset, path: Path, objects: int, steps: int, guidance: float, seed: int
) -> float:
    """Writes the grid for the first `objects` objects as PNG; returns the samples' mean PSNR in dB.

    Two rows an object: reference and sampled views, over the ground truth.
    """
    rows: list[Tensor] = []
    psnrs: list[float] = []
    number, last = 0, min(len(dataset), objects + MOST_DAMAGED)
    while len(rows) < 2 * objects and number < last:
        number += 1
        try:
            with dataset.open(number - 1) as stored:
                reference_view, posed = validation_views(stored.meta, dataset.num_views)
                reference, truth, context = shown(model, stored, reference_view, posed)
                c2w = stored.cameras(posed)
        except DamagedSample:
            continue
        sampled = sample_views(
            model,
            context,
            c2w[None],
            guidance_scale=guidance,
            steps=steps,
            generator=torch.Generator().manual_seed(seed),
        )[0]
        errors = (sampled - truth).square().flatten(1).mean(dim=1)
        psnrs += [-10 * math.log10(max(float(error), 1e-10)) for error in errors]
        rows.append(torch.cat([reference, *sampled], dim=2))
        rows.append(torch.cat([torch.ones_like(reference), *truth], dim=2))
    if not rows:
        raise UserError(f"the first {last} objects of {dataset.folder.describe()} are all damaged; copy them again")
    grid = (torch.cat(rows, dim=1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    with atomic_file(path) as temporary:
        Image.fromarray(grid).save(temporary)
    return sum(psnrs) / len(psnrs)
