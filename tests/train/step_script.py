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

from train.config import DeepSpeedConfig, OptimConfig, TrainConfig
from train.engine import WeightAverage, build_engine, local_masters, prepare_environment, take_step

ENGINES = [(stage, precision, "") for stage in range(4) for precision in ("fp32", "bf16", "fp16")]
ENGINES.remove((0, "fp16", ""))  # refused by the configuration
ENGINES += [(2, "fp32", "offload"), (2, "bf16", "offload"), (3, "fp32", "offload"), (3, "bf16", "offload_all")]
CLIP_NORM = 1e-3  # far below the gradients' norm
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


def steps_counted(engine: Any) -> list[float]:
    """By Adam, of each parameter."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return sorted({float(one["step"]) for one in optimizer.state.values() if "step" in one})


def clipped_norm(engine: Any, beta: float, sharded: bool) -> float:
    """Of the gradient that Adam has seen at its first step: its first moment is (1 - beta) of it."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    moments = [one["exp_avg"] for one in optimizer.state.values() if "exp_avg" in one]
    squares = torch.stack([(m.float() / (1 - beta)).square().sum() for m in moments]).sum()
    if sharded:
        dist.all_reduce(squares)
    return float(squares.sqrt())


def start(
    stage: int, precision: str, offload: str, clip_norm: float = 1.0
) -> tuple[TrainConfig, Any, dict[str, Tensor]]:
    """The engine, and the network's weights in fp32 before it had them."""
    torch.manual_seed(0)
    config = TrainConfig(
        cpu=True, precision=precision, batch_size=16, micro_batch_size=4, optim=OptimConfig(clip_norm=clip_norm),
        deepspeed=DeepSpeedConfig(
            zero_stage=stage, offload_optimizer=bool(offload), offload_parameters=offload == "offload_all"
        ),
    )  # fmt: skip
    network = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
    weights = {name: tensor.detach().clone() for name, tensor in network.named_parameters()}
    AcceleratorState._reset_state()
    return config, build_engine(config, network)[1], weights


def clip(stage: int, precision: str, offload: str) -> float:
    config, engine, _ = start(stage, precision, offload, CLIP_NORM)
    for micro in range(config.accumulation):
        x = batch(0, micro, dist.get_rank()).to(next(engine.module.parameters()).dtype)
        engine.backward((engine(x) - x).float().square().mean())
        take_step(engine, config.optim.clip_norm)
    return clipped_norm(engine, config.optim.betas[0], stage > 0)


def run(stage: int, precision: str, offload: str, steps: tuple[Any, ...]) -> dict[str, Any]:
    config, engine, weights = start(stage, precision, offload)
    average = WeightAverage(engine, 0.5)
    before_all = average.gather()  # the average of nothing yet: the masters as they start
    exact = before_all is None or all(torch.equal(before_all[name], weights[name]) for name in weights)
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
        "starts_exact": exact,
        "average_off": max(off, default=0.0),
        "gathered": [v for t in gathered.values() for v in t.flatten().tolist()] if gathered is not None else None,
        "applied": applied, "unchanged": unchanged, "state": state(engine), "updates": average.updates,
        "counted": steps_counted(engine),
        "running": [engine.zero_optimization_stage(), str(kind)],
    }  # fmt: skip


if __name__ == "__main__":
    prepare_environment(cpu=True)
    found: dict[str, Any] = {}
    for engine in ENGINES:
        name = " ".join(map(str, engine)).strip()
        if "fp16" in engine and not get_accelerator().is_fp16_supported():
            found[name] = None  # of DeepSpeed, on most CPUs
            continue
        found[name] = {"spoiled": run(*engine, STEPS), "quiet": run(*engine, (0, 1, 2)), "clipped": clip(*engine)}
    Path(sys.argv[1], f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
