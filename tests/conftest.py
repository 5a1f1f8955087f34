"""A tiny data set and the small frozen networks, made once, without Blender."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from data.packing import pack

sys.path.insert(0, str(Path(__file__).parent))

from tiny_views import draw_views
from warm import Run

# Files that take minutes, the longest first: begun last, one worker would be at them alone.
LONG = (
    "slurm/test_jobs.py", "train/test_other_engines.py", "train/test_surviving.py", "train/test_training.py",
    "slurm/test_study.py", "demo/test_demo.py", "distill/test_many.py", "slurm/test_pipeline.py",
    "train/test_engine.py", "slurm/test_sweep.py", "distill/test_kernels.py", "train/test_try_run.py",
    "distill/test_generate.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {Path(__file__).parent / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path, len(LONG)))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with shards/ and parts/{vae,image_encoder}."""
    folder = tmp_path_factory.mktemp("tiny")
    draw_views(folder / "views")
    pack(folder / "views", folder / "shards", shard_mb=0.08)
    words = ["models/small.py", f"shards={folder}/shards", f"out={folder}/parts", "image_size=32",
             "latent_channels=8", "embed_dim=8"]  # fmt: skip
    made = Run(words, 1, folder / "log").wait()
    assert made.returncode == 0, made.stderr
    return folder
