from __future__ import annotations

import pytest
import torch

from conf.cli import ConfigError
from distill.field import Field, FieldConfig
from distill.hashgrid import encode


def small_field(dtype: torch.dtype = torch.float64) -> Field:
    torch.manual_seed(1)
    field = Field(FieldConfig(bound=0.7, levels=4, log2_entries=9, base_resolution=4, max_resolution=24, hidden=8))
    field.to(dtype)
    with torch.no_grad():
        field.table.normal_()
    return field


def test_starts_as_a_ball() -> None:
    field = Field(FieldConfig(levels=4, log2_entries=10, max_resolution=64))
    points = torch.tensor([[0.0, 0, 0], [0.5, 0, 0], [0, 0, -0.9]])
    # softplus(10 (1 - r / 0.5)) beside the still tiny network
    assert torch.allclose(field.density(points), torch.tensor([10.0, 0.6931, 3.35e-4]), atol=1e-2)
    assert torch.allclose(field(points[1:]).normal, torch.tensor([[1.0, 0, 0], [0, 0, -1]]), atol=1e-2)


def test_normals_are_minus_the_density_gradient() -> None:
    field = small_field()
    points = (torch.rand(40, 3, dtype=torch.float64) - 0.5).requires_grad_()
    unit = points / 1.4 + 0.5
    raw = torch.relu(encode(unit, field.table, field.layout) @ field.density_in.T) @ field.density_out
    sigma = torch.nn.functional.softplus(raw + 10 * (1 - points.norm(dim=-1) / 0.5))
    (slope,) = torch.autograd.grad(sigma.sum(), points)
    out = field(points.detach())
    assert torch.allclose(out.density, sigma, atol=1e-10)
    assert torch.allclose(out.normal, -slope / slope.norm(dim=-1, keepdim=True), atol=1e-9)


def test_normals_against_finite_differences() -> None:
    field = small_field()
    points, h = torch.rand(40, 3, dtype=torch.float64) - 0.5, 1e-6
    steps = h * torch.eye(3, dtype=torch.float64)
    log = lambda p: field.density(p).log()  # noqa: E731  same direction, better conditioned
    slope = torch.stack([(log(points + s) - log(points - s)) / (2 * h) for s in steps], dim=-1)
    normal = -slope / slope.norm(dim=-1, keepdim=True)
    assert ((normal * field(points).normal).sum(dim=-1) > 1 - 1e-6).double().mean() > 0.9  # but for cell borders


def test_normals_pass_gradients_to_every_density_parameter() -> None:
    field = small_field()
    field(torch.rand(16, 3, dtype=torch.float64) - 0.5).normal[:, 0].sum().backward()
    for parameter in (field.table, field.density_in, field.density_out):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


def test_bad_configurations_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"field\.bound=0\.2"):
        FieldConfig(bound=0.2)
    with pytest.raises(ConfigError, match="max_resolution"):
        FieldConfig(base_resolution=64, max_resolution=32)
