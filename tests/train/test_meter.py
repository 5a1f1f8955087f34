"""What a run says of itself is what it did."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_runs import composed
from torch.utils.flop_counter import FlopCounterMode

from models.multiview import predict_noise_output
from train.flops import flops_of_branches, meta_unet
from train.meter import BANDS, Meter
from train.objective import MULTI, REFERENCE, SINGLE


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1),
                                         rank=0, world_size=1)  # fmt: skip
    yield
    torch.distributed.destroy_process_group()


def test_losses_by_branch_and_by_noise(alone) -> None:
    meter = Meter(torch.device("cpu"), 1000, {SINGLE: 1e12, MULTI: 3e12}, 6e12)
    meter.add(SINGLE, torch.tensor([1.0, 3.0]), torch.tensor([0, 999]))
    meter.add(MULTI, torch.tensor([5.0, 7.0]), torch.tensor([249, 250]))
    meter.steps, meter.began = 2, meter.began - 1
    values = meter.report(views=4, steps_left=10)
    assert values["loss"] == 4 and values["loss/single"] == 2 and values["loss/multi"] == 6
    assert "loss/reference" not in values and BANDS == 4
    assert values["loss/t0-249"] == 3 and values["loss/t250-499"] == 7 and values["loss/t750-999"] == 3
    assert values["samples_per_s"] == pytest.approx(4, rel=0.2) and values["images_per_s"] == pytest.approx(16, rel=0.2)
    assert values["eta_s"] == pytest.approx(5, rel=0.2) and values["mfu"] == pytest.approx(8 / 6, rel=0.2)
    assert values["memory_gib"] > 0.05
    meter.add(SINGLE, torch.tensor([2.0]), torch.tensor([1]))
    assert meter.report(4, 9)["loss"] == 2, "it begins anew"


def test_flops_are_those_of_a_real_step(tiny, tmp_path) -> None:
    config = composed(2, tiny, tmp_path, "init_from=/nowhere", "objective.reference_probability=0.5")
    counted = flops_of_branches(config, tokens=1)
    assert list(counted) == [SINGLE, MULTI, REFERENCE]
    unet = meta_unet(config).to_empty(device="cpu").float()
    torch.manual_seed(0)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    size, channels, objects = 32 // config.model.autoencoder.downscale, config.model.autoencoder.latent_channels, 3
    for branch, views, batch in ((MULTI, 4, objects), (SINGLE, 1, 4 * objects), (REFERENCE, 5, objects)):
        given = torch.randn(batch, views, channels, size, size, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            predict_noise_output(
                unet,
                given,
                torch.zeros(batch, dtype=torch.long),
                torch.randn(batch, 1, 8),
                torch.randn(batch, views, 16),
            ).sum().backward()
        assert counter.get_total_flops() == pytest.approx(objects * counted[branch], rel=0.01)


def test_a_run_reports_it_all(quiet) -> None:
    rows = [json.loads(line) for line in (quiet / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    wanted = {"lr", "grad_norm", "samples_per_s", "images_per_s", "data_wait_share", "tflops_per_s_a_process", "eta_s",
              "memory_gib", "skipped_steps", "damaged_objects"}  # fmt: skip
    assert all(wanted <= set(row) for row in rows) and "mfu" not in rows[0]
    bands = {key for row in rows for key in row if key.startswith("loss/t")}
    assert len(bands) == BANDS and all(row["tflops_per_s_a_process"] > 0 for row in rows)
