"""What the benchmarks of distill/ say of the machine they ran on, and how they measure there."""

from __future__ import annotations

import datetime
import os
import resource
import time
from pathlib import Path

import torch


def usual_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = lines[0].partition(":")[2].strip() if lines else "unknown processor"
    return f"{os.cpu_count()} CPUs, {model}, {torch.get_num_threads()} threads"


def header(device: torch.device) -> str:
    return f"{datetime.date.today()}, {name_of(device)}, torch {torch.__version__}"


def is_h100(device: torch.device) -> bool:
    """The device that the aims in seconds are meant for; elsewhere they are not judged."""
    return device.type == "cuda" and "H100" in torch.cuda.get_device_name(device)


def now(device: torch.device) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_gib(device: torch.device) -> float:
    """Of this process since its start: what torch took from the GPU, or the largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
