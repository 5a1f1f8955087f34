"""The hash grid against its definition point by point, and its hand-written backward against autograd."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from distill import hashgrid
from distill.hashgrid import GridLayout, density_with_slope, encode, grid_layout


def naive_encode(point: list[float], table: Tensor, layout: GridLayout) -> list[float]:
    """Instant-NGP, sec. 3, for one point, in plain Python."""
    out: list[float] = []
    for level, r in enumerate(layout.resolutions):
        cell = [min(math.floor(c * r), r - 1) for c in point]
        frac = [c * r - k for c, k in zip(point, cell, strict=True)]
        value = [0.0] * layout.features
        for corner in itertools.product((0, 1), repeat=3):
            vertex = [k + b for k, b in zip(cell, corner, strict=True)]
            weight = math.prod(f if b else 1 - f for f, b in zip(frac, corner, strict=True))
            if (r + 1) ** 3 <= layout.entries:
                row = vertex[0] + vertex[1] * (r + 1) + vertex[2] * (r + 1) ** 2
            else:
                row = 0
                for k, prime in zip(vertex, (1, 2654435761, 805459861), strict=True):
                    row ^= (k * prime) % 2**32
                row %= layout.entries
            for f in range(layout.features):
                value[f] += weight * float(table.detach()[layout.offsets[level] + row, f])
        out += value
    return out


def parts(features: int = 2, points: int = 23) -> tuple[GridLayout, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    layout = grid_layout(levels=5, features=features, log2_entries=8, base=4, finest=32)
    assert 0 < layout.num_dense < 5  # both kinds of level
    table = torch.randn(layout.rows, features, dtype=torch.float64, requires_grad=True)
    w1 = torch.randn(6, 5 * features, dtype=torch.float64, requires_grad=True)
    w2 = torch.randn(6, dtype=torch.float64, requires_grad=True)
    return layout, torch.rand(points, 3, dtype=torch.float64), table, w1, w2


@pytest.mark.parametrize("features", [1, 2, 4])
def test_encoding_is_the_definition(features: int) -> None:
    layout, points, table, w1, w2 = parts(features)
    points[0], points[1] = torch.zeros(3), torch.ones(3)
    expected = torch.tensor([naive_encode(p.tolist(), table, layout) for p in points], dtype=torch.float64)
    assert torch.allclose(encode(points, table, layout)[2:], expected[2:], atol=1e-9)
    # the far faces are reached up to the 1e-6 by which points are kept inside
    assert torch.allclose(density_with_slope(points, table, w1, w2, layout)[0], expected, atol=1e-3)


def test_resolutions_and_layout() -> None:
    layout = grid_layout(levels=16, features=2, log2_entries=19, base=16, finest=4096)
    assert layout.resolutions[0] == 16 and layout.resolutions[-1] == 4096
    assert layout.resolutions[1] / 16 == pytest.approx(1.447269, abs=0.05)
    rows = [hashgrid.locate(torch.rand(64, 3), layout)[0]]
    assert all(r.min() >= 0 and r.max() < layout.rows for r in rows)
    spans = sorted(
        (start, start + min((r + 1) ** 3, layout.entries))
        for start, r in zip(layout.offsets, layout.resolutions, strict=True)
    )
    assert spans[0][0] == 0 and spans[-1][1] == layout.rows
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


def test_gradcheck_of_the_plain_encoding_in_table_and_position() -> None:
    layout, points, table, _, _ = parts(points=3)
    points.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, t: encode(p, t, layout), (points, table))
    assert torch.autograd.gradgradcheck(lambda p, t: encode(p, t, layout), (points, table), fast_mode=True)


def test_gradcheck_of_the_fused_density_and_slope() -> None:
    layout, points, table, w1, w2 = parts(points=3)
    assert torch.autograd.gradcheck(lambda t, a, b: density_with_slope(points, t, a, b, layout), (table, w1, w2))
    assert torch.autograd.gradcheck(
        lambda t, a, b: density_with_slope(points, t, a, b, layout, False)[:2], (table, w1, w2)
    )


@pytest.mark.parametrize("features", [2, 3])
def test_fused_pass_equals_double_backward(monkeypatch: pytest.MonkeyPatch, features: int) -> None:
    """Values, slope and every gradient, over several chunks with a partial last one."""
    monkeypatch.setitem(hashgrid.CHUNK, "cpu", 8)
    layout, points, table, w1, w2 = parts(features)
    points.requires_grad_()
    plain = encode(points, table, layout)
    raw = torch.relu(plain @ w1.T) @ w2
    (slope,) = torch.autograd.grad(raw.sum(), points, create_graph=True)
    fused = density_with_slope(points.detach(), table, w1, w2, layout)
    for ours, theirs in zip(fused, (plain, raw, slope), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)
    seeds = [torch.randn_like(x) for x in (plain, raw, slope)]
    expected = torch.autograd.grad(
        sum((x * s).sum() for x, s in zip((plain, raw, slope), seeds, strict=True)), (table, w1, w2)
    )
    got = torch.autograd.grad(sum((x * s).sum() for x, s in zip(fused, seeds, strict=True)), (table, w1, w2))
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-10)


def test_points_are_constants_and_none_is_allowed() -> None:
    layout, points, table, w1, w2 = parts()
    with pytest.raises(NotImplementedError, match="encode"):
        density_with_slope(points.requires_grad_(), table, w1, w2, layout)[1].sum().backward()
    features, raw, slope = density_with_slope(points[:0].detach(), table, w1, w2, layout)
    assert features.shape == (0, 10) and raw.shape == (0,) and slope.shape == (0, 3)
    (features.sum() + raw.sum() + slope.sum()).backward()
