"""What a run of score distillation costs, and where: `python tests/benchmarks/bench_sds.py`.

The released configuration's schedule (64 px x 8 views, then 256 px x 4 views with shading) with random networks. On
CUDA it is run as it stands, all 10,000 steps at full size, compiled as distill/generate.py does, and judged on an H100:
10 minutes, 24 GiB, and how far it is from the floor. On the CPU a small one, of which some steps all over the schedule.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from machine import header, is_h100, now, peak_gib, usual_device

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distill import distillation
from distill.config import GenerateConfig
from distill.distillation import Scene, camera_ranges, step_together
from distill.field import FieldConfig
from distill.snapshot import new_run
from models.autoencoder import SD_VAE
from models.checkpoint import ExportInfo, MultiViewModel, make_scheduler
from models.config import UNetConfig
from models.multiview import build_unet

AIM_MIN, AIM_GIB = 10, 24
FLOOR_S = 71  # 57 PFLOP of UNet and autoencoder at the 800 TFLOP/s that an H100 reaches in bf16
OTHER = "the rest"


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
    """Seconds of named parts; it waits for the device, so that they do not overlap.  Off, it leaves the step alone."""

    def __init__(self, device: torch.device):
        self.device, self.on, self.last = device, False, 0.0
        self.seconds = defaultdict[str, float](float)

    def lap(self, name: str) -> None:
        """What has passed since the last lap belongs to `name`."""
        moment = now(self.device)
        self.seconds[name] += moment - self.last
        self.last = moment

    def timed(self, before: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if self.on:
                self.lap(before)
            answer = function(*arguments, **more)
            if self.on:
                self.lap(name)
            return answer

        return call

    def marked(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        """`encode_images` that also tells when its pictures' gradient is there."""

        def call(vae: Any, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
            if self.on:
                images.register_hook(lambda gradient: self.lap("losses, autoencoder's way back"))
            return encode(vae, images, noise=noise)

        return call


def run_through(options: argparse.Namespace, model: MultiViewModel, device: torch.device) -> float:
    """Steps all over the schedule, every one or some; returns the seconds that all of it takes, or would take."""
    config = GenerateConfig(checkpoint="", image="", out="", steps=10_000,
                            field=FieldConfig(log2_entries=options.log2_entries))  # fmt: skip
    config.schedule.resolutions[-1] = options.size
    config.volume.samples_per_ray = options.samples
    run = new_run(config, device)
    scene = Scene(run, torch.randn(1, 1, 1024, device=device), Path(), "")
    ranges, clock = camera_ranges(config, model.info), Clock(device)
    distillation.render_sets = clock.timed(OTHER, "renderer", distillation.render_sets)
    distillation.encode_images = clock.timed(OTHER, "autoencoder", clock.marked(distillation.encode_images))
    distillation.wanted_latents = clock.timed(OTHER, "UNet", distillation.wanted_latents)
    stride = max(config.steps // options.steps, 1)
    seconds, parts = defaultdict[int, list[float]](list), defaultdict[int, dict[str, float]](dict)
    live = defaultdict[int, list[float]](list)
    began = now(device)
    for turn in range(options.steps):
        step = turn * stride + turn % config.volume.occupancy_every * (stride > 1)  # the grid's update in its turn
        phase = sum(step / config.steps >= share for share in config.schedule.milestones)
        first = phase not in live
        if first and stride > 1:  # compilation, allocation: of 10,000 steps it would be next to nothing
            run.step = step
            step_together([scene], model, ranges, config)
        run.step = step
        clock.on = turn % options.watch == 0
        clock.seconds.clear()
        clock.last = start = now(device)
        step_together([scene], model, ranges, config)
        if scene.failed:
            raise SystemExit(f"step {step}: {scene.failed}")
        if clock.on:
            clock.lap("renderer's way back, optimizer")
            for name, value in clock.seconds.items():
                parts[phase][name] = parts[phase].get(name, 0) + value
        seconds[phase].append(now(device) - start)
        live[phase].append(run.losses[-1]["samples"])
        if len(run.losses) % 1000 == 0:
            print(f"  step {step}: {now(device) - began:.0f} s", flush=True)
    ends = [0.0, *config.schedule.milestones, 1.0]
    total = 0.0
    for phase, times in sorted(seconds.items()):
        size, sets = config.schedule.resolutions[phase], config.schedule.sets[phase]
        whole = statistics.fmean(times) * (ends[phase + 1] - ends[phase]) * config.steps
        total += whole
        watched = sum(parts[phase].values())
        where = ", ".join(f"{name} {value / watched:.0%}" for name, value in parts[phase].items())
        print(f"phase {phase + 1}, {sets * model.info.num_views} views of {size} px: {1 / statistics.fmean(times):.2f} "
              f"steps/s (median {statistics.median(times):.4f} s), {whole / 60:.1f} min of the run; {where}; "
              f"{statistics.fmean(live[phase]) / 1e6:.2f} M samples, at most {max(live[phase]) / 1e6:.2f}",
              flush=True)  # fmt: skip
    return now(device) - began if stride == 1 else total


def judge(total: float, device: torch.device, full: bool) -> bool:
    """Says whether the aims are met; only a full-size run on an H100 can miss them."""
    peak = peak_gib(device)
    print(f"10,000 steps: {total / 60:.1f} min; peak memory {peak:.1f} GiB")
    if not (full and is_h100(device)):
        print(f"aims ({AIM_MIN} min, {AIM_GIB} GiB, floor {FLOOR_S} s): judged at full size on an H100 alone")
        return True
    for what, met in ((f"{AIM_MIN} min", total < 60 * AIM_MIN), (f"{AIM_GIB} GiB", peak < AIM_GIB)):
        print(f"aim of {what}: {'met' if met else 'missed'}")
    print(f"{total / FLOOR_S:.1f} times the floor of {FLOOR_S} s for the diffusion half")
    return total < 60 * AIM_MIN and peak < AIM_GIB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=usual_device())
    parser.add_argument("--width", type=int, help="channels of the UNet's first block; 320 is full size")
    parser.add_argument("--image-size", type=int, help="pixels a side that the diffusion model takes")
    parser.add_argument("--size", type=int, help="pixels a side in the last phase")
    parser.add_argument("--samples", type=int, help="a ray")
    parser.add_argument("--log2-entries", type=int, help="of a hashed level")
    parser.add_argument("--steps", type=int, help="that are run, evenly over the schedule's 10,000")
    parser.add_argument("--watch", type=int, help="every so many steps the parts are timed, which slows the step")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    usual = {
        "width": (320, 32),
        "image_size": (256, 64),
        "size": (256, 64),
        "samples": (512, 48),
        "log2_entries": (19, 15),
        "steps": (10_000, 16),
        "watch": (50, 1),
    }
    full = cuda and all(getattr(options, name) is None for name in usual)
    for name, (large, small) in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, large if cuda else small)
    torch.manual_seed(0)
    model = random_model(options, device, torch.bfloat16 if cuda else torch.float32)
    compiled = cuda and not options.no_compile  # as distill/generate.py with compile=auto
    if compiled:
        model.unet.compile()
        model.vae.encoder.compile()
    print(f"{header(device)}; UNet of width {options.width} on pictures of {options.image_size} px, rendered in 64 and "
          f"{options.size}, {options.samples} a ray, {'compiled' if compiled else 'not compiled'}; {options.steps} of "
          "10,000 steps", flush=True)  # fmt: skip
    total = run_through(options, model, device)
    raise SystemExit(int(not judge(total, device, full and compiled)))


if __name__ == "__main__":
    main()
