"""The Triton kernels against plain torch, in Triton's interpreter; on a GPU the same tests run compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill import hashgrid, volume
from distill.hashgrid import GridLayout, grid_layout
from distill.volume import OccupancyGrid, Samples, VolumeConfig

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="is what is started here")
def test_in_the_interpreter() -> None:
    """Triton decides when it is imported, so these tests run in a process of their own."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-5000:]


pytestmark = []
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter")
if INTERPRETED or DEVICE == "cuda":
    from distill import kernels


def parts(features: int, points: int, finest: int = 64) -> tuple[GridLayout, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    layout = grid_layout(levels=5, features=features, log2_entries=8, base=4, finest=finest)
    assert 0 < layout.num_dense < 5  # both kinds of level
    table = torch.randn(layout.rows, features)
    x = torch.rand(points, 3)
    x[: min(points, 4)] = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0.25, 0.5, 0.75], [-0.1, 1.1, 0.5]])[:points]
    w1, w2 = torch.randn(6, 5 * features), torch.randn(6)
    return layout, *(one.to(DEVICE) for one in (x, table, w1, w2))


def whole(parts: Iterable[Samples]) -> Samples:
    none = Samples(torch.zeros(0, dtype=torch.int64, device=DEVICE), torch.zeros(0, device=DEVICE))
    return Samples(*(torch.cat(column) for column in zip(none, *parts, strict=True)))


@runs_kernels
@pytest.mark.parametrize(("features", "points"), [(1, 1), (2, 300), (4, 129), (2, 0)])
@pytest.mark.parametrize("slope", [True, False])
def test_density_and_slope(features: int, points: int, slope: bool) -> None:
    """Values, and all gradients: in the table and both layers."""
    layout, x, table, w1, w2 = parts(features, points)
    found = []
    for function in (hashgrid.density_with_slope, kernels.density_with_slope):
        given = [one.clone().requires_grad_() for one in (table, w1, w2)]
        out = function(x, *given, layout, slope)
        torch.manual_seed(1)
        seeds = [torch.randn(one.shape).to(DEVICE) for one in out]
        sum((one * seed).sum() for one, seed in zip(out, seeds, strict=True)).backward()
        found.append([*out, *(one.grad for one in given)])
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3 if plain.ndim > 1 else 1e-4)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reads_of_16_bits(dtype: torch.dtype) -> None:
    """The same rounding as plain torch's; gradients reach the fp32 table."""
    layout, x, table, w1, w2 = parts(2, 100)
    found = []
    for function in (hashgrid.density_with_slope, kernels.density_with_slope):
        given = table.clone().requires_grad_()
        features, raw, slopes = function(x, given, w1, w2, layout, True, dtype)
        (features.sum() + raw.sum() + slopes.sum()).backward()
        found.append((features, raw, given.grad))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)
    assert found[1][2].dtype == torch.float32


@runs_kernels
def test_encoding_has_gradients_in_table_and_position() -> None:
    layout, x, table, _, _ = parts(2, 200, finest=16)
    inside = x[4:]  # away from the faces, on which one backend may see one cell and the other its neighbour
    way = torch.tensor([[1.0, 0, 0], [0, -1, 0], [0, 0, 1.5]], device=DEVICE)
    outside = inside[:60] + way.repeat(20, 1)
    x = torch.cat([inside, outside])  # in one coordinate: the gradient in the others stays
    assert ((outside < 0) | (outside > 1)).sum() >= 60
    found = []
    for function in (hashgrid.encode, kernels.encode):
        points, weights = x.clone().requires_grad_(), table.clone().requires_grad_()
        out = function(points, weights, layout)
        torch.manual_seed(1)
        (out * torch.randn(out.shape).to(DEVICE)).sum().backward()
        found.append((out, points.grad, weights.grad))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)
    moved = found[1][1][len(inside) :][(outside < 0) | (outside > 1)]
    assert torch.equal(moved, torch.zeros_like(moved))


@runs_kernels
@pytest.mark.parametrize(("rays", "capacity"), [(1, 2**20), (200, 2**20), (200, 100), (200, 1)])
def test_marching(rays: int, capacity: int) -> None:
    """Also rays that miss the box, that lie in it, and that are parallel to its faces; buffers that are too small."""
    torch.manual_seed(0)
    grid = OccupancyGrid(0.6, VolumeConfig(samples_per_ray=64, occupancy_resolution=12), DEVICE)
    grid.density = torch.rand(13, 13, 13).to(DEVICE).square() * (torch.rand(13, 13, 13) < 0.05).to(DEVICE) * 9
    grid.mark()
    assert 0 < int(grid.live.sum()) < grid.live.numel()
    origins = torch.randn(rays, 3)
    origins = 1.5 * origins / origins.norm(dim=-1, keepdim=True)
    towards = torch.rand(rays, 3) - 0.5 - origins
    if rays > 3:
        origins[0], towards[0] = torch.tensor([2.0, 0, 0]), torch.tensor([0.0, 1, 0])  # misses
        origins[1], towards[1] = torch.tensor([0.01, 0.02, -2.0]), torch.tensor([0.0, 0, 1])
        origins[2] = torch.zeros(3)
    directions = (towards / towards.norm(dim=-1, keepdim=True)).to(DEVICE)
    given = (origins.to(DEVICE), directions, grid, torch.rand(rays).to(DEVICE), capacity)
    plain, ours = whole(volume.march(*given)), whole(parts := list(kernels.march(*given)))
    assert all(len(part.ray) <= capacity or len(part.ray.unique()) == 1 for part in parts)
    assert (len(parts) > 1) == (len(ours.ray) > capacity)
    # A sample on a cell's face may be rounded to either side.
    assert abs(len(plain.ray) - len(ours.ray)) <= max(1, len(plain.ray) // 1000)
    if len(plain.ray) == len(ours.ray):
        assert torch.equal(plain.ray, ours.ray)
        torch.testing.assert_close(ours.t, plain.t, rtol=1e-5, atol=1e-6)


@runs_kernels
def test_marching_an_empty_grid() -> None:
    grid = OccupancyGrid(0.6, VolumeConfig(samples_per_ray=64), DEVICE)
    grid.mark()
    there = torch.ones(5, 3, device=DEVICE)
    none = torch.ones(0, 3, device=DEVICE)
    for function in (volume.march, kernels.march):
        assert len(whole(function(there, -there / 3**0.5, grid, torch.rand(5).to(DEVICE), 100)).ray) == 0
        assert [len(part.ray) for part in function(none, none, grid, none[:, 0], 100)] in ([], [0])


@runs_kernels
def test_passes_that_disagree_write_nothing_into_the_next_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pass that counts and the one that writes are two programs, which may round differently."""
    grid = OccupancyGrid(0.6, VolumeConfig(samples_per_ray=32), DEVICE)  # all live
    origins = torch.tensor([[-2.0, 0.1 * i, 0.05] for i in range(3)], device=DEVICE)
    given = (origins, torch.tensor([[1.0, 0, 0]] * 3, device=DEVICE), grid, torch.full((3,), 0.5, device=DEVICE), 1000)
    right = whole(kernels.march(*given))
    launch = kernels._launch

    def miscounted(kernel: Any, size: tuple[int, ...], on: Tensor, *given: Any, **constants: Any) -> None:
        launch(kernel, size, on, *given, **constants)
        if not constants["WRITE"]:
            given[6][1] -= 1  # of the counts
            given[6][2] += 1

    monkeypatch.setattr(kernels, "_launch", miscounted)
    ours = whole(kernels.march(*given))
    for ray, more in ((0, 0), (1, -1), (2, 1)):
        known, found = (one.t[one.ray == ray] for one in (right, ours))
        assert len(found) == len(known) + more
        assert torch.equal(found[: len(known)], known[: len(found)])
    assert 1.4 <= float(ours.t[-1]) <= 2.61, "the sample too many lies in the box as well"


@runs_kernels
def test_an_opaque_sample_spoils_none_of_its_neighbours() -> None:
    """exp(tau - sum of tau) would have no digits left where one tau is huge."""
    density = torch.full((100,), 0.5, device=DEVICE)
    density[10], density[70] = 1e9, 1e6
    ray = torch.tensor([0] * 40 + [1] * 60, device=DEVICE)
    ours, plain = (one.volume_weights(density, ray, 2, 0.1) for one in (kernels, volume))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(ours[10], torch.exp(torch.tensor(-0.5, device=DEVICE)), rtol=1e-5, atol=0.0)


@runs_kernels
def test_the_layout_is_sent_to_the_device_once() -> None:
    layout, x, table, _, _ = parts(2, 10)
    first = kernels._levels(layout, x.device)
    kernels.encode(x, table, grid_layout(levels=5, features=2, log2_entries=8, base=4, finest=64))
    assert kernels._levels(layout, x.device) is first


@runs_kernels
def test_every_kernel_runs_on_the_device_of_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which in a child process is the first, wherever the tensors are."""
    device = torch.device("cuda", torch.cuda.device_count() - 1) if DEVICE == "cuda" else torch.device("cpu")
    guarded: list[torch.device] = []
    guard = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda on: guarded.append(on.device) or guard(on))
    layout, x, table, w1, w2 = (one if isinstance(one, GridLayout) else one.to(device) for one in parts(2, 30))
    points, weights = x.requires_grad_(), table.requires_grad_()
    kernels.encode(points, weights, layout).sum().backward()
    assert len(guarded) == 3  # features, gradients in the position and in the table
    out = kernels.density_with_slope(x.detach(), weights, w1, w2, layout)
    (out[1].sum() + out[2].sum()).backward()
    assert len(guarded) == 6
    grid = OccupancyGrid(0.6, VolumeConfig(samples_per_ray=32), device)
    there = torch.ones(3, 3, device=device)
    samples = whole(kernels.march(there, -there / 3**0.5, grid, there[:, 0] / 2, 1000))
    assert len(samples.ray) > 0 and len(guarded) == 8
    density = torch.ones(len(samples.ray), device=device).requires_grad_()
    kernels.volume_weights(density, samples.ray, 3, 0.1).sum().backward()
    assert len(guarded) == 10 and set(guarded) == {density.device}


@runs_kernels
def test_weights_and_their_gradient() -> None:
    """Rays without samples, with one, with more than a program looks at at once; clear and opaque ones."""
    torch.manual_seed(0)
    counts = [0, 1, 300, 0, 64, 65, 0]
    ray = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(DEVICE)
    density = (10 ** (4 * torch.rand(len(ray)) - 3)).to(DEVICE)
    found = []
    for function in (volume.volume_weights, kernels.volume_weights):
        given = density.clone().requires_grad_()
        weights = function(given, ray, len(counts), 0.05)
        torch.manual_seed(1)
        (weights * torch.randn(len(ray)).to(DEVICE)).sum().backward()
        found.append((weights, given.grad))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)
    assert len(kernels.volume_weights(density[:0], ray[:0], 3, 0.05)) == 0


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="of machines without CUDA")
def test_triton_without_a_gpu_is_refused() -> None:
    from data.files import UserError
    from distill.backend import choose_backend

    with pytest.raises(UserError, match="needs a CUDA device and this is cpu; set backend=torch"):
        choose_backend("triton", "cpu")
    assert choose_backend("auto", "cpu").name == "torch"
