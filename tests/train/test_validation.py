"""Validation on held-out objects: its figures are what they say, and training does not notice it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from tiny_runs import composed, losses, set_up, train, weights_hash
from tiny_views import draw_views

from data.files import UserError
from data.packing import pack
from data.stream import ViewDataset, collate
from models.checkpoint import load_export
from train.objective import MULTI, Encoders, training_loss
from train.validation import SEED, held_out_dataset, held_out_losses, sample_grid


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("held_out")
    draw_views(folder / "views", "unseen", seed=7)
    pack(folder / "views", folder / "shards")
    return folder / "shards"


def test_figures_of_held_out_objects_and_the_same_training(quiet, tiny, held_out, tmp_path) -> None:
    out = tmp_path / "stage1"
    given = ["validation.every=3", f"validation.shards={held_out}", "validation.loss_objects=6"]
    done = train(tiny, out, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    looks = [row for row in rows if "validation/psnr" in row]
    assert [row["global_step"] for row in looks] == [3, 6]
    names = {"validation/loss/multi", "validation/loss/single", "validation/psnr", "validation/ssim"}
    assert all(set(row) == names | {"global_step"} for row in looks)
    assert all(math.isfinite(row[name]) for row in looks for name in names)
    assert looks[0]["validation/loss/multi"] != looks[1]["validation/loss/multi"]
    assert losses(out) == losses(quiet) and weights_hash(out) == weights_hash(quiet)

    # The last ones again, from the export; CPUs round otherwise with another number of threads.
    config = composed(1, tiny, out, *given)
    model = load_export(out / "export")
    dataset = held_out_dataset(config, ViewDataset(config.data.shards, 32, 4, 0))
    assert dataset is not None
    again = held_out_losses(model, dataset, config)
    assert again == {name: pytest.approx(looks[1][f"validation/{name}"], rel=1e-4) for name in again}
    assert {f"validation/{name}" for name in again} == {name for name in names if "loss" in name}


def test_loss_is_the_mean_over_objects_whatever_the_micro_batch(quiet, tiny, held_out, tmp_path) -> None:
    model = load_export(quiet / "export")
    given = [f"validation.shards={held_out}", "validation.loss_objects=5", "objective.condition_dropout=1"]
    by_micro_batch = []
    for micro in (1, 2, 4):
        config = composed(1, tiny, tmp_path / "run", *given, f"micro_batch_size={micro}")
        dataset = held_out_dataset(config, ViewDataset(config.data.shards, 32, 4, 0))
        assert dataset is not None
        by_micro_batch.append(held_out_losses(model, dataset, config)["loss/multi"])
    assert by_micro_batch == [pytest.approx(by_micro_batch[0], rel=1e-4)] * 3
    kept = replace(config.objective, condition_dropout=0.0)
    batch = collate([dataset[place] for place in range(5)])
    encoders = Encoders(model.vae, model.image_encoder)
    with torch.no_grad():
        each, _ = training_loss(
            model.unet, encoders, model.scheduler, batch, MULTI, kept, config.model, model.latent_shape, SEED
        )
    assert by_micro_batch[0] == pytest.approx(float(each.mean()), rel=1e-4), "conditions are never dropped"


def test_psnr_and_ssim_are_those_of_the_picture(quiet, tiny) -> None:
    model = load_export(quiet / "export")
    dataset = ViewDataset(f"{tiny}/shards", 32, 4, 0)
    found, picture = sample_grid(model, dataset, objects=2, steps=2, guidance=2.0)
    assert sample_grid(model, dataset, 2, 2, 2.0)[0] == found, "seeds are fixed"
    grid = np.asarray(picture) / 255
    assert grid.shape == (4 * 32, 5 * 32, 3)
    tiles = grid.reshape(4, 32, 5, 32, 3).swapaxes(1, 2)  # row, column
    pairs = [(tiles[row][view], tiles[row + 1][view]) for row in (0, 2) for view in range(1, 5)]
    psnr = np.mean([-10 * np.log10(np.mean((a - b) ** 2)) for a, b in pairs])
    ssim = np.mean([
        structural_similarity(a, b, channel_axis=2, data_range=1, gaussian_weights=True, sigma=1.5,
                              use_sample_covariance=False)
        for a, b in pairs
    ])  # fmt: skip
    assert found["psnr"] == pytest.approx(psnr, abs=0.1)  # the picture has 8 bits
    assert found["ssim"] == pytest.approx(ssim, abs=0.06)  # skimage's windows reach over the border


def test_what_does_not_fit_is_named_before_any_network_is_loaded(tiny, held_out, tmp_path) -> None:
    for shards, message in (
        (f"{tiny}/shards", r"holds 4 of the objects trained on, such as object\d; .*select\.split=val"),
        (f"{tmp_path}/nowhere", "nowhere"),
        (f"{tiny}/views", "has no manifest.json"),
    ):
        with pytest.raises(UserError, match=message):
            set_up(composed(1, tiny, tmp_path / "run", f"validation.shards={shards}"))
    with pytest.raises(UserError, match="no 4 equally spaced"):
        draw_views(tmp_path / "few", "few")
        drop_rings(tmp_path / "few")
        pack(tmp_path / "few", tmp_path / "packed")
        set_up(composed(1, tiny, tmp_path / "run", f"validation.shards={tmp_path}/packed"))


def drop_rings(views: Path) -> None:
    """Leaves an uneven ring of 3 views of each object."""
    for path in views.glob("*/meta.json"):
        meta = json.loads(path.read_text())
        ring = [view for view in meta["views"] if view["role"] == "ring"]
        meta["views"] = [view for view in meta["views"] if view["role"] != "ring"] + ring[:3]
        path.write_text(json.dumps(meta))
