"""Training runs small enough for tests: the configuration, the commands, and what a run leaves."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from itertools import count
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from safetensors.torch import load_file
from warm import ROOT
from warm import Run as Ranks

from train import set_up as setting_up
from train.config import TrainConfig
from train.set_up import Run, watched


def tiny_overrides(folder: Path) -> list[str]:
    """The demo's configuration, smaller still."""
    return [
        "experiment=demo", f"data.shards={folder}/shards", "data.image_size=32",
        f"model.autoencoder.weights={folder}/parts/vae", "model.autoencoder.latent_channels=8",
        f"model.image_encoder.weights={folder}/parts/image_encoder", "model.unet.cross_attention_dim=8",
        "model.unet.block_out_channels=[32,64]", "model.unet.heads=[1,2]",
        "batch_size=4", "micro_batch_size=2", "log_every=1", "checkpoint_every=2",
        "validation.sample_objects=1", "validation.sample_steps=2", "steps=6",
    ]  # fmt: skip


def launch(stage: int, processes: int) -> list[str]:
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--num_machines", "1",
        "--main_process_port", "0", "--num_processes", str(processes), "--mixed_precision", "no",
        "--dynamo_backend", "no", f"train/stage{stage}.py",
    ]  # fmt: skip


def begin(tiny: Path, out: Path, *more: str, stage: int = 1, processes: int = 2, nodes: int = 1) -> Ranks:
    words = [f"train/stage{stage}.py", *tiny_overrides(tiny), f"out={out}", *more]
    log = next(f for n in count() if not (f := out.parent / f"log-{out.name}-{n}").exists())
    return Ranks(words, processes, log, nodes)


def begun(tiny: Path, out: Path, *more: str, steps: int = 2) -> Ranks:
    """Two ranks, as soon as so many steps are done and the first checkpoint is there."""
    run = begin(tiny, out, *more)
    deadline = time.monotonic() + 600
    while not any((out / "checkpoints").glob("step_*")) or len(losses(out)) < steps:
        alive = any(Path(f"/proc/{rank}").is_dir() for rank in run.ranks)
        assert alive and time.monotonic() < deadline, f"no checkpoint appeared\n{run.stdout}{run.stderr}"
        time.sleep(0.05)
    return run


def train(tiny: Path, out: Path, *more: str, stage: int = 1, processes: int = 2, nodes: int = 1) -> Ranks:
    return begin(tiny, out, *more, stage=stage, processes=processes, nodes=nodes).wait()


def composed(stage: int, tiny: Path, out: Path, *more: str) -> TrainConfig:
    """The configuration that the command would run with."""
    ConfigStore.instance().store(name=f"stage{stage}_schema", node=TrainConfig)
    with initialize_config_dir(str(ROOT / "conf" / "train"), version_base="1.3"):
        config = OmegaConf.to_object(compose(f"stage{stage}", [*tiny_overrides(tiny), f"out={out}", *more]))
    assert isinstance(config, TrainConfig)
    return config


def set_up(config: TrainConfig) -> Run | None:
    with watched(config) as watchdog:
        return setting_up.set_up(config, watchdog)


def losses(out: Path) -> list[tuple[int, float]]:
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]  # else it is being written
    return [(row["global_step"], row["loss"]) for row in rows if "loss" in row]


def weights_hash(out: Path) -> str:
    tensors = load_file(out / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
