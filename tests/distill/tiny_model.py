"""A checkpoint too small to be of use, and settings to distil with it in seconds."""

from __future__ import annotations

import sys
from pathlib import Path

from distill.config import GenerateConfig, ScheduleConfig
from distill.field import FieldConfig
from distill.volume import VolumeConfig

ROOT = Path(__file__).resolve().parents[2]
FIELD = {"bound": 0.6, "levels": 3, "log2_entries": 9, "base_resolution": 4, "max_resolution": 16, "hidden": 8}
TINY = [
    *(f"field.{key}={value}" for key, value in FIELD.items()),
    "volume.samples_per_ray=32", "volume.occupancy_resolution=16", "schedule.resolutions=[12,16]",
    "schedule.sets=[2,1]", "mesh.resolution=24", "mesh.texture_size=64", "turntable.frames=3",
    "turntable.size=32", "turntable.views=2",
    "device=cpu", "dtype=float32",
]  # fmt: skip


def config(out: Path, steps: int = 8) -> GenerateConfig:
    return GenerateConfig(
        checkpoint="c", image="i", out=str(out), steps=steps, snapshot_every=3,
        schedule=ScheduleConfig(resolutions=[12, 16], sets=[2, 1]), field=FieldConfig(**FIELD),
        volume=VolumeConfig(samples_per_ray=32, occupancy_resolution=16, occupancy_every=4),
    )  # fmt: skip


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "distill" / "generate.py"), *arguments]
