"""What a step looks at: random sets of cameras around the object, and the light they see it in.

Shapes: B sets, V views of a set, N samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data.cameras import framing_distance, orbit_camera
from distill.field import FieldSamples

Range = tuple[float, float]


def _uniform(low_high: Range, *shape: int) -> Tensor:
    low, high = low_high
    return low + (high - low) * torch.rand(*shape)


def random_cameras(
    sets: int, num_views: int, elevation_deg: Range, fov_deg: Range, framing: Range
) -> tuple[Tensor, Tensor]:
    """Sets of views 360 / V degrees apart with a random start azimuth; the rest is shared within a set.

    (released: random_multiview.py, `camera_distance_range` relative to the field of view).
    Returns c2w (B, V, 4, 4) and the vertical field of view in degrees (B, V).
    """
    start = 360 * torch.rand(sets, 1)
    azimuth = start + torch.arange(num_views) * (360 / num_views)
    elevation, fov = _uniform(elevation_deg, sets, 1), _uniform(fov_deg, sets, 1)
    distance = framing_distance(_uniform(framing, sets, 1), fov)
    return orbit_camera(azimuth, elevation, distance), fov.expand(sets, num_views)


def random_lights(c2w: Tensor) -> Tensor:
    """A point light near each camera's direction, 0.8 to 1.5 object units away.

    The cameras of a set share their light's distance and its offset from the camera.  c2w (B, V, 4, 4) -> (B, V, 3)
    (DreamFusion, arXiv 2209.14988, app. A.2; released, as MVDream: random_multiview.py, `light_distance_range`).
    """
    position, sets = c2w[..., :3, 3], len(c2w)
    direction = F.normalize(position + torch.randn(sets, 1, 3), dim=-1)
    return direction * _uniform((0.8, 1.5), sets, 1, 1)


@dataclass
class Lighting:
    """One step's light, the same for all of its views (threestudio: diffuse_with_point_light_material.py)."""

    mode: str  # "albedo", "diffuse" or "textureless"
    ambient: float = 1.0  # share of the light that comes from everywhere

    @property
    def needs_normals(self) -> bool:
        return self.mode != "albedo"


def random_lighting(ambient_only: bool, diffuse_prob: float, textureless_prob: float) -> Lighting:
    """Soft shading: the share of ambient light is uniform in [0, 1]."""
    lit, bare, point = torch.rand(3).tolist()
    if ambient_only or lit > diffuse_prob:
        return Lighting("albedo")
    return Lighting("textureless" if bare < textureless_prob else "diffuse", ambient=1 - point)


def shade(samples: FieldSamples, points: Tensor, light: Tensor, lighting: Lighting) -> Tensor:
    """Lambertian colour under a point light.  points and light (N, 3), world -> (N, 3) in [0, 1]."""
    if lighting.mode == "albedo":
        return samples.albedo
    towards = F.normalize(light - points, dim=-1)
    facing = (samples.normal * towards).sum(dim=-1, keepdim=True).clamp(min=0)
    irradiance = lighting.ambient + (1 - lighting.ambient) * facing
    return irradiance.expand_as(samples.albedo) if lighting.mode == "textureless" else samples.albedo * irradiance
