"""A window of steps recorded by torch's profiler: what the device and the CPU did, and for how long."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from data.files import atomic_file
from train.config import ProfileConfig

ROWS = 40  # of the table


class Steps(Protocol):
    def step(self) -> None: ...


class NoProfile:
    def step(self) -> None:
        pass


@contextlib.contextmanager
def profiled(config: ProfileConfig, folder: Path, is_main: bool) -> Iterator[Steps]:
    """Call `step()` after each step.  Rank 0 writes trace.json.gz (Perfetto, chrome://tracing) and operators.txt."""
    if config.steps == 0 or not is_main:
        yield NoProfile()
        return
    folder.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.is_available()

    def write(profiler: profile) -> None:
        with atomic_file(folder / "trace.json.gz") as temporary:
            profiler.export_chrome_trace(str(temporary))
        order = "self_cuda_time_total" if gpu else "self_cpu_time_total"
        with atomic_file(folder / "operators.txt") as temporary:
            temporary.write_text(profiler.key_averages().table(sort_by=order, row_limit=ROWS))
        print(f"profile: {config.steps} steps in {folder}/trace.json.gz and operators.txt", flush=True)

    warm_up = min(config.after, 1)
    plan = schedule(wait=config.after - warm_up, warmup=warm_up, active=config.steps, repeat=1)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities, schedule=plan, on_trace_ready=write, profile_memory=True) as profiler:
        yield profiler
