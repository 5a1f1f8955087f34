"""Run on two ranks by test_engine.py: what `take_step` does to weights and optimizer, for each engine."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from train.config import DeepSpeedConfig, TrainConfig
from train.engine import WeightAverage, build_engine, local_masters, prepare_environment, take_step

ENGINES = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16", "fp16")]
ENGINES.remove((0, "fp16"))  # refused by the configuration
STEPS = (0, "nan", 1, "inf", 2)  # number of the batch; nan and inf: spoiled, in rank 1's second micro-batch alone


def batch(number: int, micro: int, rank: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * number + 10 * micro + rank))


def state(engine: Any) -> str:
    """Of this rank's masters and Adam's moments."""
    digest = hashlib.sha256()
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    moments = [t for one in optimizer.state.values() for k, t in sorted(one.items()) if torch.is_tensor(t)]
    for tensor in [*(m for m in local_masters(engine) if m is not None), *moments]:
        digest.update(tensor.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def run(stage: int, precision: str, steps: tuple[Any, ...]) -> dict[str, Any]:
    torch.manual_seed(0)
    config = TrainConfig(
        cpu=True, precision=precision, batch_size=16, micro_batch_size=4, deepspeed=DeepSpeedConfig(zero_stage=stage)
    )
    network = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
    AcceleratorState._reset_state()
    _, engine = build_engine(config, network)
    average = WeightAverage(engine, 0.5)
    kind = next(engine.module.parameters()).dtype
    applied, unchanged = [], []
    masters = [None if m is None else m.detach().clone() for m in local_masters(engine)]
    means = [None if m is None else m.double() for m in masters]  # of the average, by its definition
    for number, step in enumerate(steps):
        before = state(engine)
        for micro in range(config.accumulation):
            spoiled = isinstance(step, str)
            x = batch(number if spoiled else step, micro, dist.get_rank()).to(kind)
            loss = (engine(x) - x).float().square().mean()
            if spoiled and dist.get_rank() == 1 and micro == 1:
                loss = loss * float(step)
            engine.backward(loss)
            updated = take_step(engine, config.optim.clip_norm)
            assert updated or micro == 1, "before the last micro-batch there is nothing to leave out"
        applied.append(updated)
        if updated:
            average.update()
            decay = min(0.5, (1 + average.updates) / (10 + average.updates))
            means = [None if mean is None else mean.lerp(master.detach().double(), 1 - decay)
                     for mean, master in zip(means, local_masters(engine), strict=True)]  # fmt: skip
        else:
            unchanged.append(state(engine) == before)
    off = [float((mean - held).abs().max()) for mean, held in zip(means, average.average, strict=True)
           if mean is not None and mean.numel()]  # fmt: skip
    before = state(engine)
    gathered = average.gather()
    assert state(engine) == before, "gathering leaves the masters as they were"
    return {
        "average_off": max(off, default=0.0),
        "gathered": [v for t in gathered.values() for v in t.flatten().tolist()] if gathered is not None else None,
        "applied": applied, "unchanged": unchanged, "state": state(engine), "updates": average.updates,
        "running": [engine.zero_optimization_stage(), str(kind)],
    }  # fmt: skip


if __name__ == "__main__":
    prepare_environment(cpu=True)
    found: dict[str, Any] = {}
    for stage, precision in ENGINES:
        if precision == "fp16" and not get_accelerator().is_fp16_supported():
            found[f"{stage} {precision}"] = None  # of DeepSpeed, on most CPUs
            continue
        found[f"{stage} {precision}"] = {
            "spoiled": run(stage, precision, STEPS), "quiet": run(stage, precision, (0, 1, 2)),
        }  # fmt: skip
    Path(sys.argv[1], f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
