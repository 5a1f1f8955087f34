"""Analytic scenes that answer to the same calls as a Field."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.field import FieldSamples


class Ball:
    """Density `density` inside `radius`, falling to 0 over `skin`; the +x half red, the rest blue."""

    def __init__(self, radius: float = 0.35, density: float = 200.0, skin: float = 0.01):
        self.radius, self.inside, self.skin = radius, density, skin

    def density(self, points: Tensor) -> Tensor:
        return self.inside * torch.sigmoid((self.radius - points.norm(dim=-1)) / self.skin)

    def __call__(self, points: Tensor, normals: bool = True) -> FieldSamples:
        front = (points[:, :1] > 0).to(points.dtype)
        albedo = torch.cat([front, torch.zeros_like(front), 1 - front], dim=-1)
        return FieldSamples(self.density(points), albedo, F.normalize(points, dim=-1) if normals else points[:0])


class Snowman(Ball):
    """Two overlapping balls whose colour varies smoothly in space."""

    def density(self, points: Tensor) -> Tensor:
        body = (points - points.new_tensor([0.1, 0, -0.1])).norm(dim=-1) - 0.3
        head = (points - points.new_tensor([0.0, 0.1, 0.28])).norm(dim=-1) - 0.18
        return self.inside * torch.sigmoid(-torch.minimum(body, head) / self.skin)

    def __call__(self, points: Tensor, normals: bool = True) -> FieldSamples:
        return FieldSamples(
            self.density(points),
            0.5 + 0.45 * torch.sin(8 * points + points.new_tensor([0.0, 1.0, 2.0])),
            F.normalize(points, dim=-1) if normals else points[:0],
        )
