"""Memory of a process for ZeRO 0 to 3: `python tests/benchmarks/memory.py [--width 64] [--processes 2] [--cuda]`.

For each stage the engine is built around the UNet in bf16, takes two steps, and says what it holds between steps and at
most within one, beside what `dry_run=true` computes of weights, gradients, masters and averages.  Held: the bytes of
all tensors of the process (on CUDA: what its allocator has given out).  On the CPU a step's most is not known: memory
that has been freed stays with the process.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from ranks import measured_by_ranks  # noqa: E402

MIB = 2**20


def tensor_bytes() -> int:
    """Of all tensors that Python can reach, shared storage counted once."""
    import torch

    found = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor) and one.device.type != "meta":
            for tensor in filter(lambda t: t is not None, (one, one.grad if one.is_leaf else None)):
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def measure(options: argparse.Namespace) -> None:
    """One rank: a line of JSON."""
    import torch

    from models.multiview import predict_noise_output
    from train.config import DeepSpeedConfig, TrainConfig
    from train.dry_run import state_bytes
    from train.engine import WeightAverage, build_engine, prepare_environment, take_step
    from train.networks import initial_unet

    prepare_environment(cpu=not options.cuda)
    config = TrainConfig(cpu=not options.cuda, precision="bf16", batch_size=int(os.environ["WORLD_SIZE"]),
                         micro_batch_size=1, deepspeed=DeepSpeedConfig(zero_stage=options.zero_stage))  # fmt: skip
    channels = [options.width * times for times in (1, 2, 4, 4)]
    config.model.unet.block_out_channels = channels
    config.model.unet.heads = [max(c // 64, 1) for c in channels]
    unet = initial_unet(config)
    count = sum(p.numel() for p in unet.parameters())
    _, engine = build_engine(config, unet)
    average = WeightAverage(engine, 0.999)
    device, width = engine.device, config.model.unet.cross_attention_dim
    for _ in range(2):
        x, timesteps = torch.randn(1, 4, 4, 32, 32, device=device), torch.full((1,), 500, device=device)
        context, camera = torch.randn(1, 1, width, device=device), torch.randn(1, 4, 16, device=device)
        output = predict_noise_output(engine, x, timesteps, context, camera)
        engine.backward((output.float() - x).square().mean())
        take_step(engine, config.optim.clip_norm)
        average.update()
    del output, x
    gc.collect()
    held = torch.cuda.memory_allocated() if options.cuda else tensor_bytes()
    most = torch.cuda.max_memory_allocated() if options.cuda else None
    parts = state_bytes(count, count, options.zero_stage, engine.world_size, False)
    print(json.dumps({"parameters": count, "held": held, "most": most, "computed": sum(parts.values()),
                      "gradients": parts["gradients, bf16"]}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64, help="channels of the first block; 320 is full size")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--zero-stage", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.zero_stage is not None:
        measure(options)
        return
    import torch

    what = torch.cuda.get_device_name() if options.cuda else "CPU"
    print(f"{datetime.date.today()}, {what}, {platform.machine()}, torch {torch.__version__}, bf16, width "
          f"{options.width}, {options.processes} processes; MiB a process")  # fmt: skip
    print(f"{'':8}{'held':>10}{'at most':>10}{'computed':>10}{'of it gradients':>17}")
    for stage in range(4):
        found = measured_by_ranks(options.processes, ["--zero-stage", str(stage)])
        most = f"{found['most'] / MIB:.0f}" if found["most"] is not None else "-"
        held, computed, gradients = (found[name] / MIB for name in ("held", "computed", "gradients"))
        print(f"ZeRO-{stage}  {held:10.0f}{most:>10}{computed:10.0f}{gradients:17.0f}", flush=True)


if __name__ == "__main__":
    main()
