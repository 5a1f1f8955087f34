"""The dry run of the full-size model, and its figures against ones known from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from models.config import ImageEncoderConfig, ModelConfig, UNetConfig
from train.config import DataConfig, DeepSpeedConfig, ObjectiveConfig, TrainConfig
from train.dry_run import build, state_bytes, training_cost

ROOT = Path(__file__).resolve().parents[2]


def test_full_size_costs_what_was_counted_elsewhere() -> None:
    """SD 2.1's UNet with 4-view attention at 256 px: 204 GFLOP a picture forward, 2.45 TFLOP a sample with backward."""
    config = TrainConfig(gradient_checkpointing=False)
    forward, both, _, kept = training_cost(config, build(config))
    assert forward / 4 / 1e9 == pytest.approx(204, rel=0.03)
    assert both / 1e12 == pytest.approx(2.45, rel=0.03)
    checkpointed = TrainConfig(gradient_checkpointing=True)
    _, recomputed, _, less = training_cost(checkpointed, build(checkpointed))
    assert recomputed > both * 1.2, "the forward pass is computed again"
    assert 0 < less < kept / 3


def test_the_reference_is_a_fifth_view() -> None:
    plain, with_reference = (
        training_cost(config, build(config))[0]
        for config in (
            TrainConfig(stage=2, data=DataConfig(image_size=64)),
            TrainConfig(stage=2, data=DataConfig(image_size=64), objective=ObjectiveConfig(reference_probability=0.5)),
        )
    )
    assert with_reference / plain == pytest.approx(5 / 4, rel=0.02)


def test_an_adapter_has_little_state() -> None:
    """Rank 16 on four layers of each of the two attentions in 16 blocks: counted by hand from MVDream's widths."""
    config = TrainConfig(trainable="lora", init_from="none")
    trained = sum(p.numel() for p in build(config).unet.parameters() if p.requires_grad)
    blocks = {320: 5, 640: 5, 1280: 6}
    # self-attention: 4 layers w -> w; cross-attention: 2 of w -> w and 2 of 1024 -> w
    assert trained == sum(n * 16 * (4 * 2 * w + 2 * 2 * w + 2 * (1024 + w)) for w, n in blocks.items())
    assert sum(state_bytes(10**9, 10**6, 0, 8, False).values()) == 2e9 + 18e6


def test_patch_tokens_and_another_width() -> None:
    unet = UNetConfig(embedding_dim=1280)
    model = ModelConfig(unet=unet, image_encoder=ImageEncoderConfig(tokens="patches"))
    small = DataConfig(image_size=64)
    config, plain = TrainConfig(model=model, data=small), TrainConfig(data=small)
    networks = build(config)
    assert networks.unet.encoder_hid_proj.weight.shape == (1024, 1280)
    assert training_cost(config, networks)[0] > training_cost(plain, build(plain))[0]


def test_zero_shards_what_it_says() -> None:
    whole = state_bytes(10**9, 10**9, 0, 8, False)
    assert sum(whole.values()) == 20e9
    assert sum(state_bytes(10**9, 10**9, 1, 8, False).values()) == 4e9 + 2e9
    assert sum(state_bytes(10**9, 10**9, 2, 8, False).values()) == 2e9 + 2e9 / 8 + 2e9
    assert sum(state_bytes(10**9, 10**9, 3, 8, False).values()) == pytest.approx(20e9 / 8)
    assert sum(state_bytes(10**9, 10**9, 2, 8, True).values()) == 2e9 + 2e9 / 8


@pytest.mark.parametrize(
    "launcher", [[sys.executable], [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]]
)
def test_the_command(launcher) -> None:
    done = subprocess.run(
        [*launcher, "train/stage2.py", "experiment=paper", "dry_run=true", "dry_run_processes=8", "init_from=nowhere"],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"unet +867\.6 M", done.stdout)
    for words in ("TFLOP", "GiB", "8 processes x 8 x 1", "checkpoint nowhere is not a folder", "remedy:"):
        assert words in done.stdout, done.stdout


def test_offload_needs_sharding_in_the_plan() -> None:
    assert DeepSpeedConfig(zero_stage=1, offload_optimizer=True).offload_optimizer
