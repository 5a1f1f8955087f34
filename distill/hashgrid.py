"""Multi-resolution hash grid (Instant-NGP, arXiv 2201.05989, sec. 3) and the density network read from it.

`encode` is the plain, twice differentiable definition.  `density_with_slope` computes the same features, the density
network and its exact spatial slope in one pass over the table, with a hand-written backward: one gather and one
scatter a step, no double backward.  distill.kernels has the same for CUDA.
Shapes: N points, L levels, F features a level, H hidden units, T table entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PRIMES = (1, 2654435761, 805459861)  # arXiv 2201.05989, eq. 4
MOST = 1 - 1e-6  # of a coordinate: 1 itself belongs to the last cell
CHUNK = {"cpu": 2048, "cuda": 2**20}  # points worked on at once: as many as the CPU's cache holds


@dataclass(frozen=True)
class GridLayout:
    """Where each level lives in one table.  Hashed ones come first: their offsets are multiples of `entries`."""

    resolutions: tuple[int, ...]  # cells a side, coarse to fine
    entries: int  # table entries of a hashed level, a power of two
    features: int

    @property
    def dense(self) -> tuple[bool, ...]:
        """Levels whose (r + 1)^3 vertices all fit are indexed directly."""
        return tuple((r + 1) ** 3 <= self.entries for r in self.resolutions)

    @property
    def num_dense(self) -> int:
        return sum(self.dense)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First table row of each level."""
        hashed = len(self.resolutions) - self.num_dense
        row, dense_offsets = hashed * self.entries, []
        for r in self.resolutions[: self.num_dense]:
            dense_offsets.append(row)
            row += (r + 1) ** 3
        return tuple(dense_offsets) + tuple(i * self.entries for i in range(hashed))

    @property
    def rows(self) -> int:
        hashed = len(self.resolutions) - self.num_dense
        return hashed * self.entries + sum((r + 1) ** 3 for r in self.resolutions[: self.num_dense])


def grid_layout(levels: int, features: int, log2_entries: int, base: int, finest: int) -> GridLayout:
    """Resolutions grow geometrically from `base` to `finest` cells a side (arXiv 2201.05989, eq. 2-3)."""
    growth = math.exp((math.log(finest) - math.log(base)) / max(levels - 1, 1))
    resolutions = tuple(math.floor(base * growth**level + 1e-6) for level in range(levels))
    return GridLayout(resolutions, 2**log2_entries, features)


def _int32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def locate(points: Tensor, layout: GridLayout) -> tuple[Tensor, Tensor]:
    """points (N, 3) in [0, 1] -> table rows of the 8 corners (2, 2, 2, L, N) int32 (x, y, z; low then high), and the
    position inside the cell (3, L, N) in [0, 1].
    """
    device, split = points.device, layout.num_dense
    resolution = torch.tensor(layout.resolutions, dtype=points.dtype, device=device)[:, None]
    inside = points.T.clamp(0, MOST)[:, None]
    scaled = inside * resolution  # (3, L, N)
    low = scaled.detach().to(torch.int32)
    fraction = scaled.frac()
    # A vertex's row is built from one number per axis: added up where the level is dense, xored where it is hashed.
    strides = [[1, r + 1, (r + 1) ** 2] for r in layout.resolutions[:split]]
    strides += [[_int32(prime) for prime in PRIMES]] * (len(layout.resolutions) - split)
    stride = torch.tensor(strides, dtype=torch.int32, device=device).T[..., None]  # (3, L, 1)
    offset = torch.tensor(layout.offsets, dtype=torch.int32, device=device)[:, None]
    ends = torch.empty(2, *low.shape, dtype=torch.int32, device=device)
    torch.mul(low, stride, out=ends[0])
    torch.add(ends[0], stride, out=ends[1])
    ends[:, :, split:].bitwise_and_(layout.entries - 1)
    ends[:, 0] += offset  # of a hashed level a multiple of `entries`: xor leaves it alone
    rows = torch.empty(2, 2, 2, *low.shape[1:], dtype=torch.int32, device=device)
    x, y, z = ends[:, 0, :split], ends[:, 1, :split], ends[:, 2, :split]
    torch.add((x[:, None] + y)[:, :, None], z, out=rows[..., :split, :])
    x, y, z = ends[:, 0, split:], ends[:, 1, split:], ends[:, 2, split:]
    torch.bitwise_xor((x[:, None] ^ y)[:, :, None], z, out=rows[..., split:, :])
    return rows, fraction


def gather(table: Tensor, rows: Tensor) -> Tensor:
    """table (T, F), rows (..., N) -> (..., N * F): a point's features side by side."""
    flat = rows.reshape(-1)
    if table.shape[1] == 2:  # one 8-byte load for the pair: 3 times faster than rows of two on a CPU
        values = torch.view_as_real(torch.view_as_complex(table).index_select(0, flat))
    else:
        values = table.index_select(0, flat)
    return values.reshape(*rows.shape[:-1], rows.shape[-1] * table.shape[1])


def scatter_add(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """Adds values (..., N * F) to table (T, F) in place, at rows (..., N)."""
    flat, features = rows.reshape(-1), table.shape[1]
    if features == 2:
        pairs = torch.view_as_complex(values.reshape(-1, 2))
        torch.view_as_complex(table).index_add_(0, flat, pairs)
    else:
        table.index_add_(0, flat, values.reshape(-1, features))


def encode(points: Tensor, table: Tensor, layout: GridLayout) -> Tensor:
    """points (N, 3) in [0, 1], table (T, F) -> features (N, L F); differentiable, twice, in both."""
    rows, fraction = locate(points, layout)
    weights = torch.stack([1 - fraction, fraction])  # (2, 3, L, N)
    weights = weights[:, None, None, 0] * weights[None, :, None, 1] * weights[None, None, :, 2]
    values = table[rows.long()] * weights[..., None]  # (2, 2, 2, L, N, F)
    return values.sum(dim=(0, 1, 2)).transpose(0, 1).flatten(1)


def interpolate(corners: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """Trilinear interpolation and its slope.

    corners (2, 2, 2, L, M), position in the cell f (3, L, M) -> value (L, M), slope (3, L, M) per cell.
    """
    dx = corners[1] - corners[0]
    x = torch.addcmul(corners[0], f[0], dx)
    dy = x[1] - x[0]
    xy = torch.addcmul(x[0], f[1], dy)
    dx_y = torch.lerp(dx[0], dx[1], f[1])
    dz = xy[1] - xy[0]
    value = torch.addcmul(xy[0], f[2], dz)
    slope = torch.stack([torch.lerp(dx_y[0], dx_y[1], f[2]), torch.lerp(dy[0], dy[1], f[2]), dz])
    return value, slope


def interpolate_transposed(d_value: Tensor, d_slope: Tensor, f: Tensor) -> Tensor:
    """Adjoint of `interpolate`: gradients (L, M) and (3, L, M) -> gradient of the corners (2, 2, 2, L, M).

    Each step undoes one `value = low + f (high - low)`, `slope = high - low`: high gets f d_value + d_slope, low what
    is left of d_value.
    """
    _, levels, m = d_slope.shape
    xy = d_value.new_empty(2, levels, m)
    torch.addcmul(d_slope[2], f[2], d_value, out=xy[1])
    torch.sub(d_value, xy[1], out=xy[0])
    dx_y, dy = d_value.new_empty(2, levels, m), d_value.new_empty(2, levels, m)
    for part, d in ((dx_y, d_slope[0]), (dy, d_slope[1])):
        torch.mul(f[2], d, out=part[1])
        torch.sub(d, part[1], out=part[0])
    x, dx = d_value.new_empty(2, 2, levels, m), d_value.new_empty(2, 2, levels, m)
    torch.addcmul(dy, f[1], xy, out=x[1])
    torch.sub(xy, x[1], out=x[0])
    torch.mul(f[1], dx_y, out=dx[1])
    torch.sub(dx_y, dx[1], out=dx[0])
    corners = d_value.new_empty(2, 2, 2, levels, m)
    torch.addcmul(dx, f[0], x, out=corners[1])
    torch.sub(x, corners[1], out=corners[0])
    return corners


def _by_level(x: Tensor, levels: int) -> Tensor:
    """(N, L F) -> (L, N F)."""
    return x.unflatten(1, (levels, -1)).transpose(0, 1).flatten(1)


def _by_point(x: Tensor, points: int) -> Tensor:
    """(..., L, N F) -> (..., N, L F)."""
    return x.unflatten(-1, (points, -1)).transpose(-3, -2).flatten(-2)


class DensityWithSlope(torch.autograd.Function):
    """raw = w2 . relu(W1 e(x)) with e the hash grid, and d raw / dx = J^T W1^T (w2 * [W1 e > 0]), J = d e / dx.

    The slope is linear in the table for a fixed activation pattern, so that its gradient is first order too:
    with v = W1^T (w2 * mask), u = J d_slope and y = u + d_raw e,
        dW1 = (w2 * mask)^T y,   dw2 = sum_N mask * (y W1^T),   d_features += d_raw v,
    and the corners receive the adjoint of interpolation applied to (d_features, d_slope (x) v).
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        points, table, w1, w2, layout, slope, dtype = inputs
        table = table.to(dtype or table.dtype).to(table.dtype)
        n, levels, chunk = len(points), len(layout.resolutions), CHUNK[points.device.type]
        scale = torch.tensor(layout.resolutions, dtype=points.dtype, device=points.device)[:, None]
        features, raw = points.new_empty(n, w1.shape[1]), points.new_empty(n)
        slopes = points.new_empty(n, 3) if slope else points.new_empty(0, 3)
        kept: list[Tensor] = []
        for start in range(0, n, chunk):
            here = slice(start, start + chunk)
            rows, f = _locate_features(points[here], layout)
            value, jacobian = interpolate(gather(table, rows), f)  # (L, N F), (3, L, N F)
            features[here] = _by_point(value, rows.shape[-1])
            hidden = features[here] @ w1.T
            torch.mv(hidden.relu(), w2, out=raw[here])
            if slope:
                v = _by_level(((hidden > 0).to(w2.dtype) * w2) @ w1, levels).mul_(scale)
                slopes[here] = (jacobian * v).sum(dim=1).unflatten(-1, (rows.shape[-1], -1)).sum(dim=-1).T
            where = (rows, f) if points.device.type == "cpu" else ()  # there memory is cheaper than integer arithmetic
            kept += [*where, jacobian] if slope else where
        ctx.save_for_backward(points, table, w1, w2, features, *kept)
        ctx.layout, ctx.slope = layout, slope
        return features, raw, slopes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_features: Tensor, d_raw: Tensor, d_slopes: Tensor) -> Any:
        points, table, w1, w2, features, *all_kept = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            raise NotImplementedError("density_with_slope has no gradient in the points; use encode")
        a_chunk = (2 if points.device.type == "cpu" else 0) + int(ctx.slope)  # tensors kept of each
        layout, levels, chunk = ctx.layout, len(ctx.layout.resolutions), CHUNK[points.device.type]
        scale = torch.tensor(layout.resolutions, dtype=points.dtype, device=points.device)[:, None]
        d_table, d_w1, d_w2 = torch.zeros_like(table), torch.zeros_like(w1), torch.zeros_like(w2)
        for index, start in enumerate(range(0, len(points), chunk)):
            here = slice(start, start + chunk)
            kept = all_kept[index * a_chunk : (index + 1) * a_chunk]
            rows, f = kept[:2] if len(kept) >= 2 else _locate_features(points[here], layout)
            mask = (features[here] @ w1.T > 0).to(w2.dtype)
            active = mask * w2
            v = active @ w1  # (N, L F): d raw / d features
            y = d_raw[here, None] * features[here]
            d_value = _by_level(torch.addcmul(d_features[here], d_raw[here, None], v), levels)
            d_slope = d_value.new_zeros(3, *d_value.shape)
            if ctx.slope:
                d = d_slopes[here].T.repeat_interleave(layout.features, dim=-1)[:, None] * scale  # (3, L, N F)
                y += _by_point((kept[-1] * d).sum(dim=0), rows.shape[-1])
                torch.mul(d, _by_level(v, levels), out=d_slope)
            d_w1.addmm_(active.T, y)
            d_w2 += (mask * (y @ w1.T)).sum(dim=0)
            scatter_add(d_table, rows, interpolate_transposed(d_value, d_slope, f))
        return None, d_table, d_w1, d_w2, None, None, None


def _locate_features(points: Tensor, layout: GridLayout) -> tuple[Tensor, Tensor]:
    """`locate`, the position repeated for each feature: rows (2, 2, 2, L, N), position (3, L, N F)."""
    rows, fraction = locate(points, layout)
    return rows, fraction.repeat_interleave(layout.features, dim=-1)


def density_with_slope(
    points: Tensor,
    table: Tensor,
    w1: Tensor,
    w2: Tensor,
    layout: GridLayout,
    slope: bool = True,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """points (N, 3) in [0, 1], table (T, F), w1 (H, L F), w2 (H,).

    Returns features (N, L F), raw density (N,) and its slope d raw / d points (N, 3), or (0, 3) when not asked for.
    Differentiable in table, w1 and w2; the points are constants.  dtype: that the table is rounded to as it is read.
    """
    assert points.ndim == 2 and points.shape[1] == 3, points.shape
    assert table.shape == (layout.rows, layout.features), (table.shape, layout)
    return DensityWithSlope.apply(points, table, w1, w2, layout, slope, dtype)
