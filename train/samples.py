"""Pictures of what the model has learned: reference, sampled views, and the ground truth they are to match."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.files import atomic_file
from data.stream import ViewDataset, views_of
from models.checkpoint import MultiViewModel
from models.image_encoder import embed_image
from models.sampling import sample_views


def validation_views(meta: dict[str, Any], num_views: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A reference and `num_views` equally spaced posed views, from those never trained on where the object has such."""
    references = views_of(meta, "eval_reference") or views_of(meta, "reference")
    posed = views_of(meta, "eval") or [view for view in views_of(meta, "ring") if view["ring"] == 0]
    stride = max(len(posed) // num_views, 1)
    return references[0], posed[::stride][:num_views]


def sample_grid(
    model: MultiViewModel, dataset: ViewDataset, path: Path, objects: int, steps: int, guidance: float, seed: int
) -> float:
    """Writes the grid for the first `objects` objects as PNG; returns the samples' mean PSNR in dB.

    Two rows an object: reference and sampled views, over the ground truth.
    """
    rows: list[Tensor] = []
    psnrs: list[float] = []
    for number in range(min(objects, len(dataset.index))):
        members, meta = dataset.read(number)
        reference_view, posed = validation_views(meta, dataset.num_views)
        reference = dataset.image(members, reference_view)
        truth = torch.stack([dataset.image(members, view) for view in posed])
        c2w = torch.tensor([view["c2w"] for view in posed], dtype=torch.float32)
        sampled = sample_views(
            model,
            embed_image(model.image_encoder, reference[None]),
            c2w[None],
            guidance_scale=guidance,
            steps=steps,
            generator=torch.Generator().manual_seed(seed),
        )[0]
        errors = (sampled - truth).square().flatten(1).mean(dim=1)
        psnrs += [-10 * math.log10(max(float(error), 1e-10)) for error in errors]
        rows.append(torch.cat([reference, *sampled], dim=2))
        rows.append(torch.cat([torch.ones_like(reference), *truth], dim=2))
    grid = (torch.cat(rows, dim=1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    with atomic_file(path) as temporary:
        Image.fromarray(grid).save(temporary)
    return sum(psnrs) / len(psnrs)
