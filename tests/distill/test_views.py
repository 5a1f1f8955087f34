from __future__ import annotations

import torch

from data.cameras import framing_distance
from distill.field import FieldSamples
from distill.views import Lighting, random_cameras, random_lighting, random_lights, shade


def test_sets_of_cameras() -> None:
    torch.manual_seed(0)
    c2w, fov = random_cameras(200, 4, (0, 30), (15, 60), (0.8, 1.0))
    position = c2w[..., :3, 3]
    azimuth = torch.rad2deg(torch.atan2(position[..., 1], position[..., 0]))
    assert torch.allclose(azimuth.diff(dim=1) % 360, torch.full((200, 3), 90.0), atol=1e-2)
    elevation = torch.rad2deg(torch.asin(position[..., 2] / position.norm(dim=-1)))
    framing = position.norm(dim=-1) / framing_distance(1.0, fov)
    for values, low, high in ((elevation, 0, 30), (fov, 15, 60), (framing, 0.8, 1.0)):
        assert torch.allclose(values, values[:, :1].expand(-1, 4), atol=1e-3)  # shared by a set
        assert values.min() >= low - 1e-3 and values.max() <= high + 1e-3
        assert values[:, 0].std() > 0.2 * (high - low)  # and spread over the range between sets
    assert (azimuth[:, 0] % 360).std() > 80


def test_lights_are_on_the_cameras_side_more_often_than_not() -> None:
    torch.manual_seed(0)
    c2w, _ = random_cameras(100, 4, (0, 30), (30, 40), (0.8, 1.0))
    light = random_lights(c2w)
    assert ((light * c2w[..., :3, 3]).sum(-1) > 0).float().mean() > 0.9
    assert light.norm(dim=-1).min() >= 0.8 and light.norm(dim=-1).max() <= 1.5


def test_the_lights_of_a_set_share_distance_and_offset() -> None:
    torch.manual_seed(0)
    c2w, _ = random_cameras(50, 4, (0, 30), (30, 40), (0.8, 1.0))
    light = random_lights(c2w)
    distance, camera = light.norm(dim=-1), c2w[..., :3, 3]
    assert torch.allclose(distance, distance[:, :1].expand(-1, 4), atol=1e-5) and distance[:, 0].std() > 0.1
    # (camera + offset) is along the light: two views of a set fix the offset, which the other two must have too
    towards = torch.nn.functional.normalize(light, dim=-1)
    across = torch.eye(3) - towards[..., :, None] * towards[..., None, :]
    equations = across.flatten(1, 2), -(across @ camera[..., None]).flatten(1, 2)
    offset = torch.linalg.lstsq(equations[0].double(), equations[1].double()).solution
    assert torch.allclose(equations[0].double() @ offset, equations[1].double(), atol=1e-5)
    assert (offset.std(dim=0) > 0.5).all() and (offset.std(dim=0) < 1.5).all()


def test_shading() -> None:
    samples = FieldSamples(torch.ones(2), torch.full((2, 3), 0.5), torch.tensor([[1.0, 0, 0], [-1, 0, 0]]))
    points, light = torch.zeros(2, 3), torch.tensor([[2.0, 0, 0]]).expand(2, 3)
    assert torch.equal(shade(samples, points, light, Lighting("albedo")), samples.albedo)
    lit = shade(samples, points, light, Lighting("diffuse", ambient=0.2))
    assert torch.allclose(lit[:, 0], torch.tensor([0.5, 0.1]))
    assert torch.allclose(shade(samples, points, light, Lighting("textureless", 0.2))[:, 0], torch.tensor([1.0, 0.2]))


def test_share_of_each_kind_of_light() -> None:
    torch.manual_seed(0)
    modes = [random_lighting(False, 0.75, 0.5).mode for _ in range(2000)]
    assert abs(modes.count("albedo") / 2000 - 0.25) < 0.04
    assert abs(modes.count("textureless") / 2000 - 0.375) < 0.04
    assert {random_lighting(True, 0.75, 0.5).mode for _ in range(20)} == {"albedo"}
