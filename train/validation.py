"""What the model has learned: the loss on held-out objects, and sampled views beside the ground truth.

The running mean of weights is looked at, which is what is exported; seeds are fixed, so that figures of different steps
and runs can be compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.files import UserError
from data.shards import DamagedSample, read_manifest
from data.sources import ShardFolder
from data.stream import StoredObject, ViewDataset, collate, views_of
from models.autoencoder import decode_latents
from models.checkpoint import MultiViewModel
from models.image_encoder import embed_image
from models.image_metrics import psnr, ssim
from models.sampling import sample_views
from train.config import TrainConfig
from train.objective import MULTI, REFERENCE, SINGLE, Encoders, training_loss

SEED = 0  # of order, noise and timesteps, whatever the run's
MOST_DAMAGED = 64  # objects that are passed over in search of some to show


def held_out_dataset(config: TrainConfig, trained_on: ViewDataset) -> ViewDataset | None:
    """UserError when an object of `validation.shards` is also trained on, or when they cannot be read alike."""
    if config.validation.shards is None:
        return None
    folder = ShardFolder(config.validation.shards, config.data.cache)
    size, manifest = config.data.image_size, read_manifest(folder)
    where = f"validation.shards: {folder.describe()}"
    seen = {key for shard in trained_on.manifest.shards for key in shard.keys}
    both = [key for shard in manifest.shards for key in shard.keys if key in seen]
    if both:
        raise UserError(
            f"{where} holds {len(both)} of the objects trained on, such as {both[0]}; render and pack select.split=val "
            "for it, and select.split=train for data.shards"
        )
    if manifest.kind == "latents" and manifest.resolution != size:
        raise UserError(
            f"{where} are latents of {manifest.resolution} px and data.image_size={size}; give such of {size}"
        )
    references = config.model.ema.references if config.objective.reference_probability > 0 else 1
    dataset = ViewDataset(folder, size, config.data.num_views, SEED, references)
    _ = dataset[0]  # views that do not fit are named before anything is built
    return dataset


@torch.no_grad()
def held_out_losses(model: MultiViewModel, dataset: ViewDataset, config: TrainConfig) -> dict[str, float]:
    """Mean loss of each branch in use over the first `validation.loss_objects` places of the held-out stream.

    Conditions are never dropped.  Where there are fewer objects, they come again with other views and noise.
    """
    objective = replace(config.objective, condition_dropout=0.0)
    branches = [MULTI]
    if objective.single_view_probability > 0:
        branches.append(SINGLE)
    if objective.reference_probability > 0:
        branches.append(REFERENCE)
    encoders, count = Encoders(model.vae, model.image_encoder), config.validation.loss_objects
    losses: dict[str, list[Tensor]] = {branch: [] for branch in branches}
    for first in range(0, count, config.micro_batch_size):
        places = range(first, min(first + config.micro_batch_size, count))
        batch = collate([dataset[place] for place in places])
        for branch in branches:
            loss, _ = training_loss(
                model.unet, encoders, model.scheduler, batch, branch, objective, config.model, model.latent_shape, SEED
            )
            losses[branch].append(loss)
    return {f"loss/{branch}": float(torch.cat(values).double().mean()) for branch, values in losses.items()}


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


def sample_grid(
    model: MultiViewModel, dataset: ViewDataset, objects: int, steps: int, guidance: float
) -> tuple[dict[str, float], Image.Image]:
    """Of the first `objects` objects the samples' mean `psnr` in dB and `ssim`, and a picture.

    Two rows an object: reference and sampled views, over the ground truth.
    """
    rows: list[Tensor] = []
    measured: dict[str, list[Tensor]] = {"psnr": [], "ssim": []}
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
            generator=torch.Generator().manual_seed(SEED),
        )[0]
        measured["psnr"].append(psnr(sampled, truth))
        measured["ssim"].append(ssim(sampled, truth))
        rows.append(torch.cat([reference, *sampled], dim=2))
        rows.append(torch.cat([torch.ones_like(reference), *truth], dim=2))
    if not rows:
        raise UserError(f"the first {last} objects of {dataset.folder.describe()} are all damaged; copy them again")
    grid = (torch.cat(rows, dim=1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    figures = {name: float(torch.cat(values).double().mean()) for name, values in measured.items()}
    return figures, Image.fromarray(grid)
