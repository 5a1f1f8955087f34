"""The radiance field: where the scene is dense and what colour it has there.

World coordinates as in data/cameras.py; the scene box is [-bound, bound]^3.  Shapes: N points, L levels, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.cli import check
from distill.backend import Backend, choose_backend
from distill.hashgrid import grid_layout


@dataclass
class FieldConfig:
    """Defaults: the released configuration (isotropic3d-shading.yaml)."""

    bound: float = 1.0  # half the side of the scene box, object units; objects lie within 0.5
    levels: int = 16
    features: int = 2  # per level
    log2_entries: int = 19  # table entries of a hashed level
    base_resolution: int = 16  # cells a side of the coarsest level
    max_resolution: int = 4096  # and of the finest
    hidden: int = 64  # units of the one hidden layer of either network (threestudio's VanillaMLP)
    blob_scale: float = 10.0  # density before softplus at the origin, beside the network's
    blob_std: float = 0.5  # radius at which the blob's share is zero, object units
    table_reads: str = "float32"  # what the table is rounded to as it is read: float32, float16 or bfloat16

    def __post_init__(self) -> None:
        check(self.bound >= 0.5, f"field.bound={self.bound} must be at least 0.5: objects reach that far")
        check(
            self.levels >= 1 and self.features >= 1,
            f"field.levels={self.levels} and features={self.features} must be >= 1",
        )
        check(self.hidden >= 1, f"field.hidden={self.hidden} must be at least 1")
        check(8 <= self.log2_entries <= 24, f"field.log2_entries={self.log2_entries} must be 8 to 24")
        check(
            2 <= self.base_resolution <= self.max_resolution,
            f"field.base_resolution={self.base_resolution} must be 2 to field.max_resolution={self.max_resolution}",
        )
        check(self.blob_std > 0, f"field.blob_std={self.blob_std} must be positive")
        check(
            self.table_reads in ("float32", "float16", "bfloat16"),
            f"field.table_reads={self.table_reads} must be float32, float16 or bfloat16",
        )


class FieldSamples(NamedTuple):
    """What the field says of N points."""

    density: Tensor  # (N,) per object unit
    albedo: Tensor  # (N, 3) in [0, 1]
    normal: Tensor  # (N, 3) unit, out of the object; (0, 3) when not asked for


class Field(nn.Module):
    """density = softplus(network + blob_scale (1 - |x| / blob_std)), albedo = sigmoid(network).

    The blob is threestudio's `blob_magic3d` (Magic3D, arXiv 2211.10440, sec. 3.1): optimisation starts from a ball.
    """

    def __init__(self, config: FieldConfig, backend: Backend | None = None):
        super().__init__()
        self.config, self.backend = config, backend or choose_backend("torch", "cpu")
        self.reads = getattr(torch, config.table_reads)
        self.layout = grid_layout(
            config.levels, config.features, config.log2_entries, config.base_resolution, config.max_resolution
        )
        width = config.levels * config.features
        self.table = nn.Parameter(torch.empty(self.layout.rows, config.features).uniform_(-1e-4, 1e-4))
        self.density_in = nn.Parameter(torch.empty(config.hidden, width))
        self.density_out = nn.Parameter(torch.empty(config.hidden))
        nn.init.kaiming_uniform_(self.density_in, a=math.sqrt(5))  # torch's own for nn.Linear
        nn.init.uniform_(self.density_out, -1 / math.sqrt(config.hidden), 1 / math.sqrt(config.hidden))
        self.albedo = nn.Sequential(
            nn.Linear(width, config.hidden, bias=False), nn.ReLU(), nn.Linear(config.hidden, 3, bias=False)
        )

    def _density(self, points: Tensor, slope: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """points (N, 3), world -> features (N, L F), density (N,), slope of the raw density (N, 3), radius (N, 1)."""
        unit = (points / (2 * self.config.bound) + 0.5).clamp(0, 1)
        features, raw, raw_slope = self.backend.density_with_slope(
            unit, self.table, self.density_in, self.density_out, self.layout, slope, self.reads
        )
        radius = points.norm(dim=-1, keepdim=True)
        bias = self.config.blob_scale * (1 - radius[:, 0] / self.config.blob_std)
        return features, F.softplus(raw + bias), raw_slope / (2 * self.config.bound), radius

    def density(self, points: Tensor) -> Tensor:
        """points (N, 3), world -> (N,)."""
        return self._density(points, slope=False)[1]

    def forward(self, points: Tensor, normals: bool = True) -> FieldSamples:
        """points (N, 3), world, inside the scene box."""
        features, density, slope, radius = self._density(points, slope=normals)
        albedo = torch.sigmoid(self.albedo(features))
        if not normals:
            return FieldSamples(density, albedo, points.new_empty(0, 3))
        # Softplus rises, so the density's own slope points the same way as that of its argument.
        blob_slope = -self.config.blob_scale / self.config.blob_std * points / radius.clamp(min=1e-6)
        return FieldSamples(density, albedo, -F.normalize(slope + blob_slope, dim=-1))

    def parameter_groups(self, lr_grid: float, lr_network: float) -> list[dict]:
        """For the optimizer: the table and the networks learn at different rates."""
        networks = [self.density_in, self.density_out, *self.albedo.parameters()]
        return [{"params": [self.table], "lr": lr_grid}, {"params": networks, "lr": lr_network}]
