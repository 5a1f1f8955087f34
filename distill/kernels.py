"""The renderer's three hot spots as Triton kernels for CUDA, with the numbers of the plain torch functions.

`density_with_slope` stands for distill.hashgrid's, `march` and `volume_weights` for distill.volume's.  The Triton that
comes with torch compiles them at first use; TRITON_INTERPRET=1 runs them on the CPU, for tests.  Table reads may be
16-bit; sums, gradients and transmittance are fp32.
Shapes: N points or samples, L levels, F features a level, H hidden units, T table entries, R rays, G grid cells a side.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from distill.hashgrid import MOST, PRIMES, GridLayout, _int32

if TYPE_CHECKING:
    from distill.volume import OccupancyGrid, Samples

INTERPRETED = triton.knobs.runtime.interpret
POINTS = 128  # a program's
RAYS = 128
SAMPLES = 64  # of a ray, at once


def _launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *given: Any, **constants: Any) -> None:
    """Runs a kernel on the device that holds `on`: Triton itself takes the current one, whatever its arguments."""
    with torch.cuda.device_of(on):
        kernel[grid](*given, **constants)


@triton.jit
def _numbers(axis, BLOCK: tl.constexpr):
    """A program's BLOCK numbers of points or rays, 64-bit: three times as many coordinates outgrow 32."""
    return tl.program_id(axis).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


# ---- hash grid ----


@triton.jit
def _locate(points, n, here, resolution, strides, offsets, entries, level, num_dense):
    """Position in the cell, and each axis' two numbers from which a corner's table row is built."""
    inside = here < n
    r = tl.load(resolution + level)
    x = tl.load(points + here * 3, mask=inside, other=0.0)
    y = tl.load(points + here * 3 + 1, mask=inside, other=0.0)
    z = tl.load(points + here * 3 + 2, mask=inside, other=0.0)
    most = 1.0 - 1e-6  # 1 itself belongs to the last cell
    x = tl.minimum(tl.maximum(x, 0.0), most) * r
    y = tl.minimum(tl.maximum(y, 0.0), most) * r
    z = tl.minimum(tl.maximum(z, 0.0), most) * r
    low_x, low_y, low_z = x.to(tl.int32), y.to(tl.int32), z.to(tl.int32)
    step = strides + level * 3
    step_x, step_y, step_z = tl.load(step), tl.load(step + 1), tl.load(step + 2)
    x0, y0, z0 = low_x * step_x, low_y * step_y, low_z * step_z
    x1, y1, z1 = x0 + step_x, y0 + step_y, z0 + step_z
    keep = tl.where(level < num_dense, -1, entries - 1)
    offset = tl.load(offsets + level)
    x0, x1 = (x0 & keep) + offset, (x1 & keep) + offset
    y0, y1, z0, z1 = y0 & keep, y1 & keep, z0 & keep, z1 & keep
    return x - low_x, y - low_y, z - low_z, x0, x1, y0, y1, z0, z1, r


@triton.jit
def _row(a, b, c, level, num_dense):
    return tl.where(level < num_dense, a + b + c, a ^ b ^ c)


@triton.jit
def _corner(table, row, f, inside, F: tl.constexpr):
    return tl.load(table + row.to(tl.int64) * F + f, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _interpolate(c000, c001, c010, c011, c100, c101, c110, c111, fx, fy, fz):
    """Trilinear value and its slope per cell, in the order of distill.hashgrid.interpolate."""
    dx00, dx01, dx10, dx11 = c100 - c000, c101 - c001, c110 - c010, c111 - c011
    x00, x01, x10, x11 = c000 + fx * dx00, c001 + fx * dx01, c010 + fx * dx10, c011 + fx * dx11
    dy0, dy1 = x10 - x00, x11 - x01
    xy0, xy1 = x00 + fy * dy0, x01 + fy * dy1
    dx0, dx1 = dx00 + fy * (dx10 - dx00), dx01 + fy * (dx11 - dx01)
    dz = xy1 - xy0
    return xy0 + fz * dz, dx0 + fz * (dx1 - dx0), dy0 + fz * (dy1 - dy0), dz


@triton.jit
def _encode(points, table, features, n, resolution, strides, offsets, entries, num_dense, L, F: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """features (N, L F) of a block of points at one level."""
    here, level = _numbers(0, BLOCK), tl.program_id(1)
    inside = here < n
    fx, fy, fz, x0, x1, y0, y1, z0, z1, _ = _locate(
        points, n, here, resolution, strides, offsets, entries, level, num_dense
    )
    for f in tl.static_range(F):
        value, _, _, _ = _interpolate(
            _corner(table, _row(x0, y0, z0, level, num_dense), f, inside, F),
            _corner(table, _row(x0, y0, z1, level, num_dense), f, inside, F),
            _corner(table, _row(x0, y1, z0, level, num_dense), f, inside, F),
            _corner(table, _row(x0, y1, z1, level, num_dense), f, inside, F),
            _corner(table, _row(x1, y0, z0, level, num_dense), f, inside, F),
            _corner(table, _row(x1, y0, z1, level, num_dense), f, inside, F),
            _corner(table, _row(x1, y1, z0, level, num_dense), f, inside, F),
            _corner(table, _row(x1, y1, z1, level, num_dense), f, inside, F),
            fx, fy, fz,
        )  # fmt: skip
        tl.store(features + here * (L * F) + level * F + f, value, mask=inside)


@triton.jit
def _slope(points, table, v, slopes, n, resolution, strides, offsets, entries, num_dense, L, F: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """slopes (N, 3) = J^T v of a block of points, with J = d features / d points and v (N, L F)."""
    here = _numbers(0, BLOCK)
    inside = here < n
    sx, sy, sz = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for level in range(L):
        fx, fy, fz, x0, x1, y0, y1, z0, z1, r = _locate(
            points, n, here, resolution, strides, offsets, entries, level, num_dense
        )
        for f in tl.static_range(F):
            _, dx, dy, dz = _interpolate(
                _corner(table, _row(x0, y0, z0, level, num_dense), f, inside, F),
                _corner(table, _row(x0, y0, z1, level, num_dense), f, inside, F),
                _corner(table, _row(x0, y1, z0, level, num_dense), f, inside, F),
                _corner(table, _row(x0, y1, z1, level, num_dense), f, inside, F),
                _corner(table, _row(x1, y0, z0, level, num_dense), f, inside, F),
                _corner(table, _row(x1, y0, z1, level, num_dense), f, inside, F),
                _corner(table, _row(x1, y1, z0, level, num_dense), f, inside, F),
                _corner(table, _row(x1, y1, z1, level, num_dense), f, inside, F),
                fx, fy, fz,
            )  # fmt: skip
            weight = r * tl.load(v + here * (L * F) + level * F + f, mask=inside, other=0.0)
            sx += weight * dx
            sy += weight * dy
            sz += weight * dz
    tl.store(slopes + here * 3, sx, mask=inside)
    tl.store(slopes + here * 3 + 1, sy, mask=inside)
    tl.store(slopes + here * 3 + 2, sz, mask=inside)


@triton.jit
def _add(d_table, row, f, value, inside, F: tl.constexpr):
    tl.atomic_add(d_table + row.to(tl.int64) * F + f, value, mask=inside, sem="relaxed")


@triton.jit
def _encode_backward(points, table, d_features, d_slopes, v, d_table, u, n, resolution, strides, offsets, entries,
                     num_dense, L, F: tl.constexpr, SLOPE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Adds to d_table (T, F), of a block of points at one level, what reaches it through the features (d_features
    (N, L F)) and, with SLOPE, through J^T v (d_slopes (N, 3)); then it also writes u = J d_slopes (N, L F).
    """
    here, level = _numbers(0, BLOCK), tl.program_id(1)
    inside = here < n
    fx, fy, fz, x0, x1, y0, y1, z0, z1, r = _locate(
        points, n, here, resolution, strides, offsets, entries, level, num_dense
    )
    r000, r001 = _row(x0, y0, z0, level, num_dense), _row(x0, y0, z1, level, num_dense)
    r010, r011 = _row(x0, y1, z0, level, num_dense), _row(x0, y1, z1, level, num_dense)
    r100, r101 = _row(x1, y0, z0, level, num_dense), _row(x1, y0, z1, level, num_dense)
    r110, r111 = _row(x1, y1, z0, level, num_dense), _row(x1, y1, z1, level, num_dense)
    gx, gy, gz = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if SLOPE:
        gx = r * tl.load(d_slopes + here * 3, mask=inside, other=0.0)
        gy = r * tl.load(d_slopes + here * 3 + 1, mask=inside, other=0.0)
        gz = r * tl.load(d_slopes + here * 3 + 2, mask=inside, other=0.0)
    for f in tl.static_range(F):
        place = here * (L * F) + level * F + f
        d_value = tl.load(d_features + place, mask=inside, other=0.0)
        sx, sy, sz = gx, gy, gz
        if SLOPE:
            _, dx, dy, dz = _interpolate(
                _corner(table, r000, f, inside, F), _corner(table, r001, f, inside, F),
                _corner(table, r010, f, inside, F), _corner(table, r011, f, inside, F),
                _corner(table, r100, f, inside, F), _corner(table, r101, f, inside, F),
                _corner(table, r110, f, inside, F), _corner(table, r111, f, inside, F), fx, fy, fz,
            )  # fmt: skip
            tl.store(u + place, dx * gx + dy * gy + dz * gz, mask=inside)
            weight = tl.load(v + place, mask=inside, other=0.0)
            sx, sy, sz = weight * gx, weight * gy, weight * gz
        # The adjoint of _interpolate, step by step: high gets f d_value + d_slope, low what is left of d_value.
        xy1 = fz * d_value + sz
        xy0 = d_value - xy1
        dx1, dy1 = fz * sx, fz * sy
        dx0, dy0 = sx - dx1, sy - dy1
        x10, x11 = fy * xy0 + dy0, fy * xy1 + dy1
        x00, x01 = xy0 - x10, xy1 - x11
        dx10, dx11 = fy * dx0, fy * dx1
        dx00, dx01 = dx0 - dx10, dx1 - dx11
        c100, c101, c110, c111 = fx * x00 + dx00, fx * x01 + dx01, fx * x10 + dx10, fx * x11 + dx11
        _add(d_table, r100, f, c100, inside, F)
        _add(d_table, r101, f, c101, inside, F)
        _add(d_table, r110, f, c110, inside, F)
        _add(d_table, r111, f, c111, inside, F)
        _add(d_table, r000, f, x00 - c100, inside, F)
        _add(d_table, r001, f, x01 - c101, inside, F)
        _add(d_table, r010, f, x10 - c110, inside, F)
        _add(d_table, r011, f, x11 - c111, inside, F)


@functools.cache
def _levels(layout: GridLayout, device: torch.device) -> tuple[Any, ...]:
    """What the kernels want to know of the layout: resolutions, strides (L, 3), offsets, entries, dense levels, L.

    Kept, since copies to the device would wait for it at every launch.
    """
    strides = [[1, r + 1, (r + 1) ** 2] for r in layout.resolutions[: layout.num_dense]]
    strides += [[_int32(prime) for prime in PRIMES]] * (len(layout.resolutions) - layout.num_dense)
    return (
        torch.tensor(layout.resolutions, dtype=torch.float32, device=device),
        torch.tensor(strides, dtype=torch.int32, device=device),
        torch.tensor(layout.offsets, dtype=torch.int32, device=device),
        layout.entries, layout.num_dense, len(layout.resolutions),
    )  # fmt: skip


def _features(points: Tensor, table: Tensor, layout: GridLayout) -> Tensor:
    n, width = len(points), len(layout.resolutions) * layout.features
    features = points.new_empty(n, width)
    if n:
        grid = (triton.cdiv(n, POINTS), len(layout.resolutions))
        _launch(_encode, grid, points, points, table, features, n, *_levels(layout, points.device),
                F=layout.features, BLOCK=POINTS)  # fmt: skip
    return features


def _slopes(points: Tensor, table: Tensor, v: Tensor, layout: GridLayout) -> Tensor:
    n, slopes = len(points), torch.empty_like(points)
    if n:
        grid = (triton.cdiv(n, POINTS),)
        _launch(_slope, grid, points, points, table, v, slopes, n, *_levels(layout, points.device),
                F=layout.features, BLOCK=POINTS)  # fmt: skip
    return slopes


def _table_gradient(
    points: Tensor, table: Tensor, d_features: Tensor, d_slopes: Tensor | None, v: Tensor | None, layout: GridLayout
) -> tuple[Tensor, Tensor | None]:
    """d_table (T, F) in fp32, and u = J d_slopes (N, L F) where slopes were asked for."""
    n, d_table = len(points), torch.zeros(table.shape, device=table.device)
    u = None if d_slopes is None else torch.empty_like(d_features)
    if n:
        grid = (triton.cdiv(n, POINTS), len(layout.resolutions))
        given = (points, table, d_features, d_slopes, v, d_table, u, n, *_levels(layout, points.device))
        _launch(_encode_backward, grid, points, *given, F=layout.features, SLOPE=u is not None, BLOCK=POINTS)
    return d_table, u


class Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, points: Tensor, table: Tensor, layout: GridLayout) -> Tensor:
        ctx.save_for_backward(points, table)
        ctx.layout = layout
        return _features(points.contiguous(), table, layout)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_features: Tensor) -> Any:
        points, table = ctx.saved_tensors
        d_features, points = d_features.contiguous(), points.contiguous()
        d_points, d_table = None, None
        if ctx.needs_input_grad[0]:  # none where a point outside the box was moved to its face
            moved = (points < 0) | (points > MOST)
            d_points = _slopes(points, table, d_features, ctx.layout).masked_fill(moved, 0.0)
        if ctx.needs_input_grad[1]:
            d_table = _table_gradient(points, table, d_features, None, None, ctx.layout)[0].to(table.dtype)
        return d_points, d_table, None


def encode(points: Tensor, table: Tensor, layout: GridLayout) -> Tensor:
    """points (N, 3) in [0, 1], table (T, F) -> features (N, L F) in fp32; differentiable, once, in both."""
    return Encode.apply(points, table, layout)


class DensityWithSlope(torch.autograd.Function):
    """As distill.hashgrid.DensityWithSlope, whose docstring has the mathematics.  The Jacobian is never stored."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        points, table, w1, w2, layout, slope, dtype = inputs
        points, table = points.contiguous(), table.to(dtype)
        features = _features(points, table, layout)
        hidden = features @ w1.T
        raw = hidden.relu() @ w2
        slopes = points.new_empty(0, 3)
        if slope:
            slopes = _slopes(points, table, ((hidden > 0).to(w2.dtype) * w2) @ w1, layout)
        ctx.save_for_backward(points, table, w1, w2, features)
        ctx.layout, ctx.slope = layout, slope
        return features, raw, slopes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_features: Tensor, d_raw: Tensor, d_slopes: Tensor) -> Any:
        points, table, w1, w2, features = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            raise NotImplementedError("density_with_slope has no gradient in the points; use encode")
        mask = (features @ w1.T > 0).to(w2.dtype)
        active = mask * w2
        v = active @ w1  # (N, L F): d raw / d features
        d_value = torch.addcmul(d_features, d_raw[:, None], v)
        given = d_slopes.contiguous() if ctx.slope else None
        d_table, u = _table_gradient(points, table, d_value, given, v, ctx.layout)
        y = d_raw[:, None] * features
        if u is not None:
            y += u
        return None, d_table, active.T @ y, (mask * (y @ w1.T)).sum(dim=0), None, None, None


def density_with_slope(
    points: Tensor,
    table: Tensor,
    w1: Tensor,
    w2: Tensor,
    layout: GridLayout,
    slope: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """distill.hashgrid.density_with_slope, with its shapes and gradients."""
    return DensityWithSlope.apply(points, table, w1, w2, layout, slope, dtype)


# ---- rays ----


@triton.jit(do_not_specialize=["first_ray", "rays", "steps"])  # or every other number would compile it again
def _march(origins, directions, near, far, jitter, live, counts, starts, ends, out_t, first_ray, rays, steps, step,
           bound, cells, WRITE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Counts the live samples of a block of rays, or writes their distances, each ray's from `starts` to `ends`.

    Both compilations need not round alike: what the second finds beyond `ends` belongs to the next ray and is left out.
    """
    ray = first_ray + _numbers(0, BLOCK)
    inside = ray < rays
    first, last = tl.load(near + ray, mask=inside, other=1.0), tl.load(far + ray, mask=inside, other=0.0)
    shift = tl.load(jitter + ray, mask=inside, other=0.0)
    scale = cells / (2 * bound)
    ax = (tl.load(origins + ray * 3, mask=inside, other=0.0) + bound) * scale
    ay = (tl.load(origins + ray * 3 + 1, mask=inside, other=0.0) + bound) * scale
    az = (tl.load(origins + ray * 3 + 2, mask=inside, other=0.0) + bound) * scale
    bx = tl.load(directions + ray * 3, mask=inside, other=0.0) * scale
    by = tl.load(directions + ray * 3 + 1, mask=inside, other=0.0) * scale
    bz = tl.load(directions + ray * 3 + 2, mask=inside, other=0.0) * scale
    count = tl.zeros([BLOCK], tl.int64)
    room = tl.zeros([BLOCK], tl.int64)
    start = tl.zeros([BLOCK], tl.int64)
    if WRITE:
        start = tl.load(starts + ray, mask=inside, other=0)
        room = tl.load(ends + ray, mask=inside, other=0) - start
        start -= tl.load(starts + first_ray)  # the buffer begins with that ray
    for s in range(steps):
        t = first + (s + shift) * step
        ix = tl.minimum(tl.maximum((ax + t * bx).to(tl.int32), 0), cells - 1)
        iy = tl.minimum(tl.maximum((ay + t * by).to(tl.int32), 0), cells - 1)
        iz = tl.minimum(tl.maximum((az + t * bz).to(tl.int32), 0), cells - 1)
        passes = inside & (t < last)
        there = tl.load(live + (ix * cells + iy) * cells + iz, mask=passes, other=0) != 0
        if WRITE:
            tl.store(out_t + start + count, t, mask=there & (count < room))
        count += there.to(tl.int64)
    if not WRITE:
        tl.store(counts + ray, count, mask=inside)


@torch.no_grad()
def march(
    origins: Tensor, directions: Tensor, occupancy: OccupancyGrid, jitter: Tensor, capacity: int
) -> Iterator[Samples]:
    """distill.volume.march: one pass counts, then one a part of the rays writes into a buffer of `capacity` samples."""
    from distill.volume import Samples, box_ends, parts_of

    near, far, steps = box_ends(origins, directions, occupancy)
    rays = len(origins)
    counts = torch.zeros(rays, dtype=torch.int64, device=origins.device)
    given = (origins.contiguous(), directions.contiguous(), near, far, jitter.contiguous(),
             occupancy.live.view(torch.uint8).contiguous())  # fmt: skip
    numbers = (steps, occupancy.step, occupancy.bound, occupancy.config.occupancy_resolution)
    grid = (triton.cdiv(max(rays, 1), RAYS),)
    _launch(_march, grid, origins, *given, counts, None, None, None, 0, rays, *numbers, WRITE=False, BLOCK=RAYS)
    ends = counts.cumsum(0)
    buffer = origins.new_empty(max(capacity, steps))  # a single ray may have more
    for part, begin, end in parts_of(ends, capacity):
        here = slice(part.start, part.stop)
        ray = torch.arange(part.start, part.stop, device=origins.device)
        ray = torch.repeat_interleave(ray, counts[here], output_size=end - begin)
        t = buffer[: end - begin]
        torch.index_select(far, 0, ray, out=t)  # a place no worse than others, should the second pass find fewer
        grid = (triton.cdiv(len(part), RAYS),)
        _launch(_march, grid, origins, *given, None, ends - counts, ends, t, part.start, part.stop, *numbers,
                WRITE=True, BLOCK=RAYS)  # fmt: skip
        yield Samples(ray, t.clone())


@triton.jit
def _opaque(tau):
    """1 - exp(-tau) without losing the digits of a small one."""
    return tl.where(tau < 1e-2, tau * (1 - tau * (0.5 - tau / 6)), 1 - tl.exp(-tau))


@triton.jit
def _weights(tau, starts, counts, weights, transmitted, BLOCK: tl.constexpr):
    """Of one ray: its samples' shares of its colour, and what each lets through of what comes to the ray's origin."""
    ray = tl.program_id(0)
    start, count = tl.load(starts + ray), tl.load(counts + ray)
    gathered = 0.0
    for first in range(0, count, BLOCK):
        here = first + tl.arange(0, BLOCK)
        inside = here < count
        depth = tl.load(tau + start + here, mask=inside, other=0.0)
        # a sum of what lies before, not the sum up to here less itself: a huge depth would leave no digits
        earlier = tl.load(tau + start + here - 1, mask=inside & (here > first), other=0.0)
        before = gathered + tl.cumsum(earlier, axis=0)
        tl.store(weights + start + here, tl.exp(-before) * _opaque(depth), mask=inside)
        tl.store(transmitted + start + here, tl.exp(-(before + depth)), mask=inside)
        gathered += tl.sum(depth, axis=0)


@triton.jit
def _weights_backward(gradient, weights, transmitted, starts, counts, d_tau, BLOCK: tl.constexpr):
    ray = tl.program_id(0)
    start, count = tl.load(starts + ray), tl.load(counts + ray)
    later = 0.0
    for number in range(0, tl.cdiv(count, BLOCK)):  # from the far end, so that no sum is taken away from another
        here = count - 1 - number * BLOCK - tl.arange(0, BLOCK)
        inside = here >= 0
        g = tl.load(gradient + start + here, mask=inside, other=0.0)
        share = g * tl.load(weights + start + here, mask=inside, other=0.0)
        behind = later + tl.cumsum(share, axis=0) - share
        through = tl.load(transmitted + start + here, mask=inside, other=0.0)
        tl.store(d_tau + start + here, g * through - behind, mask=inside)
        later += tl.sum(share, axis=0)


class VolumeWeights(torch.autograd.Function):
    """As distill.volume.VolumeWeights; each ray's sums are its own."""

    @staticmethod
    def forward(ctx: Any, tau: Tensor, starts: Tensor, counts: Tensor) -> Tensor:
        tau = tau.contiguous()
        weights, transmitted = torch.empty_like(tau), torch.empty_like(tau)
        _launch(_weights, (len(counts),), tau, tau, starts, counts, weights, transmitted, BLOCK=SAMPLES)
        ctx.save_for_backward(weights, transmitted, starts, counts)
        return weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weights, transmitted, starts, counts = ctx.saved_tensors
        d_tau = torch.empty_like(weights)
        given = (gradient.contiguous(), weights, transmitted, starts, counts, d_tau)
        _launch(_weights_backward, (len(counts),), d_tau, *given, BLOCK=SAMPLES)
        return d_tau, None, None


def volume_weights(density: Tensor, ray: Tensor, num_rays: int, step: float) -> Tensor:
    """distill.volume.volume_weights."""
    if len(ray) == 0:
        return density
    counts = torch.bincount(ray, minlength=num_rays)
    return VolumeWeights.apply(density * step, counts.cumsum(0) - counts, counts)
