"""Configurations that cannot work are refused by name before anything is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conf.cli import ConfigError
from models.config import ImageEncoderConfig, LoraConfig, ModelConfig, UNetConfig
from train.config import DataConfig, DeepSpeedConfig, ObjectiveConfig, OptimConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TrainConfig(stage=3), "stage=3"),
        (lambda: TrainConfig(stage=1, objective=ObjectiveConfig(reference_probability=0.5)), "needs stage=2"),
        (lambda: TrainConfig(data=DataConfig(image_size=100)), "data.image_size=100 must be a multiple of 64"),
        (lambda: TrainConfig(precision="fp8"), "precision=fp8"),
        (lambda: TrainConfig(steps=0), "steps=0"),
        (lambda: ObjectiveConfig(condition_dropout=2), "objective.condition_dropout=2"),
        (lambda: OptimConfig(schedule="linear"), "optim.schedule=linear"),
        (lambda: DeepSpeedConfig(zero_stage=4), "deepspeed.zero_stage=4"),
        (lambda: DeepSpeedConfig(zero_stage=0, offload_optimizer=True), "offload_optimizer"),
        (lambda: TrainConfig(trainable="biases"), "trainable=biases"),
        (lambda: TrainConfig(trainable="lora"), "there are none to start from"),
        (lambda: LoraConfig(rank=0), "lora.rank=0"),
        (lambda: ImageEncoderConfig(tokens="all"), "model.image_encoder.tokens=all"),
        (lambda: ImageEncoderConfig(preprocess="none"), "model.image_encoder.preprocess=none"),
        (lambda: ModelConfig(zero_terminal_snr=True), "zero_terminal_snr"),
        (lambda: UNetConfig(heads=[1]), "model.unet.heads"),
        (lambda: UNetConfig(block_out_channels=[33], heads=[1]), "multiple of 32"),
    ],
)
def test_impossible_values(make, words) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        make()


def test_batch_must_divide(monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="batch_size=64 does not divide among 3 processes"):
        _ = TrainConfig().accumulation
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert TrainConfig().accumulation == 2


def command(*overrides: str, stage: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"train/stage{stage}.py", *overrides],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.lrr=1"], "unknown key optim.lrr; the nearest known key is optim.lr"),
        (["+optm.lr=1"], "unknown key optm; the nearest known key is optim"),
        (["optim.betas=[0.9]"], "optim.betas=[0.9] must be two numbers"),
        (["model.autoencoder.downscale=0"], "model.autoencoder.downscale=0 must be at least 1"),
        (["validation.sample_steps=1000"], "validation.sample_steps=1000 must be below"),
        (["precision=fp16", "deepspeed=zero0"], "precision=fp16 with deepspeed.zero_stage=0"),
        (["compile=inductor", "deepspeed=zero3"], "compile does not go with deepspeed.zero_stage=3"),
        (["model.ema.downscales=[16]"], "names resolutions that the UNet has not"),
        (["optim.lr=fast"], "optim.lr: "),
        (["experiment=nope"], "Available options in 'experiment'"),
        (["experiment=demo", "data.shards=/nowhere"], "/nowhere"),
        (["experiment=demo", "batch_size=3"], "batch_size=3 does not divide"),
        (["experiment=demo", "out=/proc/nowhere"], "cannot write"),
    ],
)
def test_errors_are_one_line_with_the_remedy(overrides, words, tmp_path) -> None:
    done = command(f"out={tmp_path}/run", *overrides)
    assert done.returncode == 2
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in error
    assert "Traceback" not in done.stderr


def test_help_lists_the_keys() -> None:
    done = command("--help")
    assert done.returncode == 0
    for key in ("condition_dropout", "zero_stage", "experiment: demo, embedding_size, paper"):
        assert key in done.stdout
