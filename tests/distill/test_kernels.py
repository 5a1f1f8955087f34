"""The Triton kernels against plain torch, in Triton's interpreter; on a GPU the same tests run compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill import hashgrid, volume
from distill.hashgrid import GridLayout, grid_layout
from distill.volume import OccupancyGrid, VolumeConfig

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
    x = x[4:]  # inside the box, away from its faces
    found = []
    for function in (hashgrid.encode, kernels.encode):
        points, weights = x.clone().requires_grad_(), table.clone().requires_grad_()
        out = function(points, weights, layout)
        torch.manual_seed(1)
        (out * torch.randn(out.shape).to(DEVICE)).sum().backward()
        found.append((out, points.grad, weights.grad))
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-3)


@runs_kernels
@pytest.mark.parametrize("rays", [1, 200])
def test_marching(rays: int) -> None:
    """Also rays that miss the box, that lie in it, and that are parallel to its faces."""
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
    given = (origins.to(DEVICE), directions, grid, torch.rand(rays).to(DEVICE))
    plain, ours = volume.march(*given), kernels.march(*given)
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
    assert len(kernels.march(there, -there / 3**0.5, grid, torch.rand(5).to(DEVICE)).ray) == 0
    none = torch.ones(0, 3, device=DEVICE)
    assert len(kernels.march(none, none, grid, none[:, 0]).ray) == 0


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
