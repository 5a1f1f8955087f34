"""Bytes that a process sends a step, for ZeRO 0 to 3: `python tests/benchmarks/traffic.py [--width 32]`.

Processes that believe themselves on different nodes train a UNet in bf16, so that all goes through the loopback device,
whose counter is read; nothing else may use it meanwhile.  Beside it what ZeRO's paper says (arXiv 1910.02054, sec. 7):
of W bytes of weights, 2 W (N - 1) / N for stages 0 to 2, and 3 W (N - 1) / N for stage 3.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ranks import measured_by_ranks  # noqa: E402

MIB = 2**20


def sent() -> int:
    """Bytes that the loopback device has sent."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def measure(options: argparse.Namespace) -> None:
    """One rank: rank 0 prints a line of JSON."""
    import torch
    import torch.distributed as dist

    from models.multiview import predict_noise_output
    from train.config import DeepSpeedConfig, TrainConfig
    from train.engine import build_engine, prepare_environment, take_step
    from train.networks import initial_unet

    prepare_environment(cpu=True)
    world = int(os.environ["WORLD_SIZE"])
    config = TrainConfig(cpu=True, precision="bf16", batch_size=world * options.accumulation, micro_batch_size=1,
                         deepspeed=DeepSpeedConfig(zero_stage=options.zero_stage))  # fmt: skip
    channels = [options.width * times for times in (1, 2, 4, 4)]
    config.model.unet.block_out_channels = channels
    config.model.unet.heads = [max(c // 64, 1) for c in channels]
    unet = initial_unet(config)
    weights = 2 * sum(p.numel() for p in unet.parameters())
    _, engine = build_engine(config, unet)
    width, begin = config.model.unet.cross_attention_dim, 0
    for step in range(1 + options.steps):
        if step == 1:  # the first sets things up
            dist.barrier()
            begin = sent()
        for _ in range(options.accumulation):
            x = torch.randn(1, 4, 4, 32, 32)
            output = predict_noise_output(
                engine, x, torch.full((1,), 500), torch.randn(1, 1, width), torch.randn(1, 4, 16)
            )
            engine.backward((output.float() - x).square().mean())
            take_step(engine, config.optim.clip_norm)
    dist.barrier()
    if engine.global_rank == 0:
        print(json.dumps({"weights": weights, "sent": (sent() - begin) / options.steps / world}))
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32, help="channels of the first block; 320 is full size")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--zero-stage", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.zero_stage is not None:
        measure(options)
        return
    import torch

    print(f"{datetime.date.today()}, CPU, {platform.machine()}, torch {torch.__version__}, bf16, "
          f"width {options.width}, {options.processes} processes, {options.accumulation} micro-batches; "
          "MiB a process and step")  # fmt: skip
    print(f"{'':8}{'weights':>10}{'sent':>10}{'by the paper':>14}")
    for stage in range(4):
        found = measured_by_ranks(options.processes, ["--zero-stage", str(stage)], apart=True)
        share = (options.processes - 1) / options.processes
        paper = found["weights"] * (2 if stage < 3 else 3) * share
        print(f"ZeRO-{stage}  {found['weights'] / MIB:10.1f}{found['sent'] / MIB:10.1f}{paper / MIB:14.1f}", flush=True)


if __name__ == "__main__":
    main()
