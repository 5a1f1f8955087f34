"""What a step of score distillation costs, and where: `python tests/benchmarks/bench_sds.py [--cuda] [--width 320]`.

The released configuration's two phases (64 px x 8 views, 256 px x 4 views with shading) with random networks. Renderer,
autoencoder, UNet and the way back are timed apart, and together against the renderer alone, in the same run.
On CUDA the defaults are the full size; on the CPU, smaller ones.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distill import distillation
from distill.config import GenerateConfig, ScheduleConfig
from distill.distillation import Scene, camera_ranges, step_together
from distill.field import FieldConfig
from distill.snapshot import new_run
from models.autoencoder import SD_VAE
from models.checkpoint import ExportInfo, MultiViewModel, make_scheduler
from models.config import UNetConfig
from models.multiview import build_unet


def random_model(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> MultiViewModel:
    channels = [options.width * times for times in (1, 2, 4, 4)]
    unet = build_unet(
        UNetConfig(None, channels, [max(c // 64, 1) for c in channels], 2, 1024, True), 4, options.image_size // 8
    )
    blocks = tuple(max(c * options.width // 320 // 32, 1) * 32 for c in SD_VAE["block_out_channels"])
    vae = AutoencoderKL(**(SD_VAE | {"block_out_channels": blocks}))
    vae.decoder = vae.post_quant_conv = None
    for part in (unet, vae):
        torch.nn.Module.to(part.requires_grad_(False).eval(), device=device, dtype=dtype)
    info = ExportInfo(options.image_size, 4, (0.0, 30.0), (15.0, 60.0), (0.8, 1.0), "mvdream", stage=2, step=0)
    encoder: Any = None  # the context is given
    return MultiViewModel(unet, vae, encoder, make_scheduler("epsilon", zero_terminal_snr=False), info)


class Clock:
    """Seconds of named parts; on CUDA it waits for them, so that they do not overlap."""

    def __init__(self, cuda: bool):
        self.cuda, self.seconds = cuda, defaultdict[str, float](float)

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            began = self.now()
            try:
                return function(*arguments, **more)
            finally:
                self.seconds[name] += self.now() - began

        return call


def phase(options: argparse.Namespace, model: MultiViewModel, number: int, progress: float) -> None:
    device = next(model.unet.parameters()).device
    config = GenerateConfig(checkpoint="", image="", out="", steps=10_000, schedule=ScheduleConfig(
        resolutions=[64, options.size], sets=[2, 1]), field=FieldConfig(log2_entries=options.log2_entries))  # fmt: skip
    config = replace(config, volume=replace(config.volume, samples_per_ray=options.samples))
    run = new_run(config, device)
    context = torch.randn(1, 1, 1024, device=device)
    scene, ranges = Scene(run, context, Path(), ""), camera_ranges(config, model.info)
    clock = Clock(options.cuda)
    parts = {"render_sets": "renderer", "encode_images": "autoencoder", "wanted_latents": "UNet"}
    kept = {name: getattr(distillation, name) for name in parts}
    for name, title in parts.items():
        setattr(distillation, name, clock.timed(title, kept[name]))
    totals, live = [], []
    if options.cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        for turn in range(options.steps + options.warm_up):
            if turn == options.warm_up:
                clock.seconds.clear()
            run.step = int(progress * config.steps) + turn
            began = clock.now()
            step_together([scene], model, ranges, config)
            if turn >= options.warm_up:
                totals.append(clock.now() - began)
                live.append(run.losses[-1]["samples"])
    finally:
        for name, function in kept.items():
            setattr(distillation, name, function)
    total = statistics.fmean(totals)
    shares = {name: seconds / len(totals) / total for name, seconds in clock.seconds.items()}
    shares["the rest: way back, optimizer"] = 1 - sum(shares.values())
    where = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    print(f"phase {number}: {statistics.median(totals):.4f} s a step (median), {1 / total:.2f} steps/s, "
          f"{total / (clock.seconds['renderer'] / len(totals)):.1f} times the renderer's forward pass; {where}; "
          f"{statistics.fmean(live) / 1e6:.2f} M live samples", flush=True)  # fmt: skip
    if options.cuda:
        print(f"  peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB; 5,000 such steps: "
              f"{5000 * total / 60:.1f} min", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--width", type=int, help="channels of the UNet's first block; 320 is full size")
    parser.add_argument("--image-size", type=int, help="pixels a side that the diffusion model takes")
    parser.add_argument("--size", type=int, help="pixels a side in the second phase")
    parser.add_argument("--samples", type=int, help="a ray")
    parser.add_argument("--log2-entries", type=int, help="of a hashed level")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    usual = {
        "width": (320, 32),
        "image_size": (256, 64),
        "size": (256, 64),
        "samples": (512, 48),
        "log2_entries": (19, 15),
        "steps": (50, 2),
    }
    for name, (cuda, cpu) in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, cuda if options.cuda else cpu)
    device = torch.device("cuda" if options.cuda else "cpu")
    torch.manual_seed(0)
    model = random_model(options, device, torch.bfloat16 if options.cuda else torch.float32)
    if options.compile:
        model.unet.compile()
        model.vae.encoder.compile()
    what = torch.cuda.get_device_name() if options.cuda else f"{os.cpu_count()} CPUs, {platform.machine()}"
    print(f"{datetime.date.today()}, {what}, torch {torch.__version__}; UNet of width {options.width} on pictures "
          f"of {options.image_size} px, rendered in 64 and {options.size}, {options.samples} a ray")  # fmt: skip
    phase(options, model, 1, 0.2)
    phase(options, model, 2, 0.7)


if __name__ == "__main__":
    main()
