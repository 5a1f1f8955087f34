"""How much the renderer's shortcuts are worth: `python tests/benchmarks/bench_nerf.py [--threads 2] [--size 64]`.

Each line is a ratio against a baseline measured in the same process, both as the median of interleaved repetitions.
The scene is a half-carved field of the demo's size seen by 4 views.  First, the peak memory of the released field.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from machine import header, peak_gib, usual_device

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.cameras import camera_rays
from distill.backend import choose_backend
from distill.field import Field, FieldConfig
from distill.hashgrid import density_with_slope, encode
from distill.turntable import ring
from distill.volume import OccupancyGrid, VolumeConfig, render


def medians(repeat: int, **calls: Callable[[], object]) -> dict[str, float]:
    """Seconds per call; the calls take turns, so that what else the machine does hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeat + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def show(what: str, baseline: str, seconds: dict[str, float]) -> None:
    (ours,) = (name for name in seconds if name != baseline)
    print(
        f"{what}: {ours} {seconds[ours] * 1e3:.0f} ms, {baseline} {seconds[baseline] * 1e3:.0f} ms: "
        f"{seconds[baseline] / seconds[ours]:.2f} times faster"
    )


def carve(field: Field, radius: float = 0.3) -> None:
    """Gives the field a solid ball, as after some training (fitting it would take minutes)."""
    field.config.blob_scale, field.config.blob_std = 40.0, radius


def memory(device: torch.device) -> None:
    """What rendering the released field with normals, and the way back, add to the peak: all cells live, whole rays."""
    backend = choose_backend("auto", device)
    field = Field(FieldConfig(), backend).to(device)
    optimizer = torch.optim.AdamW(field.parameters())
    a_ray = 295  # samples of a ray along an axis of the box
    small, large = (2**16, 2**18) if device.type == "cpu" else (2**19, 2**21)
    before, peaks = 0.0, []
    for capacity, samples in ((2048, 2048), (small, small), (small, large), (large, large)):
        volume = VolumeConfig(samples_at_once=capacity)
        grid = OccupancyGrid(field.config.bound, volume, device, backend)
        y, z = 1.8 * torch.rand(2, samples // a_ray) - 0.9
        origins = torch.stack([torch.full_like(y, -2.0), y, z], dim=1).to(device)
        directions = torch.tensor([[1.0, 0, 0]], device=device).expand_as(origins)
        seen = render(field, grid, origins, directions, torch.rand(len(y)).to(device), density=field.density)
        away = (seen.weights.detach() * (seen.normals * directions[seen.ray]).sum(-1).clamp(min=0) ** 2).mean()
        (seen.rgb.square().mean() + away + seen.depth_variance.mean()).backward()
        optimizer.step()
        peaks.append(peak_gib(device))
        if before:
            print(
                f"  {len(seen.ray):,} samples, {capacity:,} at once: {peaks[-1] - before:.2f} GiB above the field's own"
            )
        before = before or peaks[-1]
    print(f"  peak {peaks[-1]:.2f} GiB; a sample differentiated: {(peaks[3] - peaks[2]) * 2**30 / (large - small):.0f} "
          f"bytes; one in another piece: {(peaks[2] - peaks[1]) * 2**30 / (large - small):.0f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default=usual_device(), help="of the memory; the rest is of the CPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(header(torch.device("cpu")))
    print(f"memory on {options.device}, released field, normals, forward and backward:")
    memory(torch.device(options.device))  # first: the resident set's peak only ever rises

    small = FieldConfig(bound=0.6, levels=8, log2_entries=14, base_resolution=8, max_resolution=128, hidden=32)
    field = Field(small)
    carve(field)
    volume = VolumeConfig(samples_per_ray=64)
    pruned, full = OccupancyGrid(0.6, volume), OccupancyGrid(0.6, volume)
    for _ in range(2):
        pruned.update(field.density)
    origins, directions = (
        x.reshape(-1, 3)
        for x in camera_rays(ring(4, 15.0, 40.0, 0.6), torch.full((4,), 40.0), options.size, options.size)
    )
    jitter = torch.rand(len(origins))

    def step(grid: OccupancyGrid, normals: bool = True) -> Callable[[], int]:
        def call() -> int:
            field.zero_grad()
            seen = render(field, grid, origins, directions, jitter, normals=normals)
            loss = seen.rgb.square().mean()
            if normals:
                loss = (
                    loss
                    + (seen.weights.detach() * (seen.normals * directions[seen.ray]).sum(-1).clamp(min=0) ** 2).mean()
                )
            loss.backward()
            return len(seen.ray)

        return call

    print(f"{len(origins)} rays, {options.threads} threads: {step(pruned)()} live samples of {step(full)()}")
    seconds = medians(options.repeat, live=step(pruned), dense=step(full))
    show("rendering forward and backward with normals", "dense", seconds)
    print(f"  {len(origins) / seconds['live'] / 1e3:.0f} thousand rays/s")
    show("normals off", "normals", medians(options.repeat, off=step(pruned, False), normals=step(pruned)))

    points = torch.rand(40_000, 3)
    arguments = (field.table, field.density_in, field.density_out)

    def ours() -> None:
        field.zero_grad()
        features, raw, slope = density_with_slope(points, *arguments, field.layout)
        (features.sum() + raw.sum() + F.normalize(slope, dim=-1)[:, 0].sum()).backward()

    def autograd() -> None:
        field.zero_grad()
        inputs = points.clone().requires_grad_()
        features = encode(inputs, field.table, field.layout)
        raw = torch.relu(features @ field.density_in.T) @ field.density_out
        (slope,) = torch.autograd.grad(raw.sum(), inputs, create_graph=True)
        (features.sum() + raw.sum() + F.normalize(slope, dim=-1)[:, 0].sum()).backward()

    both = medians(options.repeat, fused=ours, double_backward=autograd)
    show(f"{len(points)} points: density, slope and their gradients", "double_backward", both)
    print(f"  {len(points) / both['fused'] / 1e3:.0f} thousand samples/s")


if __name__ == "__main__":
    main()
