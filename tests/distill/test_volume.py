from __future__ import annotations

import math

import pytest
import torch
from analytic_scenes import Ball, Snowman

from data.cameras import camera_rays, orbit_camera
from distill.field import Field, FieldConfig, FieldSamples
from distill.turntable import render_views, ring
from distill.volume import OccupancyGrid, VolumeConfig, march, render, volume_weights
from models.image_metrics import psnr


def grid_of(scene: Ball, bound: float = 0.6, samples: int = 128, cells: int = 24) -> OccupancyGrid:
    torch.manual_seed(0)
    grid = OccupancyGrid(bound, VolumeConfig(samples_per_ray=samples, occupancy_resolution=cells))
    for _ in range(4):
        grid.update(scene.density)
    return grid


def test_weights_equal_the_loop_over_samples() -> None:
    torch.manual_seed(0)
    ray = torch.tensor([0, 0, 0, 2, 2, 3])
    density = torch.rand(6, dtype=torch.float64) * 8
    expected = []
    for i in range(6):
        before = math.exp(-sum(0.1 * float(density[j]) for j in range(i) if ray[j] == ray[i]))
        expected.append(before * (1 - math.exp(-0.1 * float(density[i]))))
    assert torch.allclose(volume_weights(density, ray, 5, 0.1), torch.tensor(expected, dtype=torch.float64))


def test_weights_gradcheck() -> None:
    density = (torch.rand(9, dtype=torch.float64) * 5).requires_grad_()
    ray = torch.tensor([0, 0, 0, 0, 2, 2, 2, 5, 5])
    assert torch.autograd.gradcheck(lambda d: volume_weights(d, ray, 6, 0.2), (density,))


def test_many_rays_do_not_lose_digits() -> None:
    """The last of 20,000 opaque rays composites as exactly as the first."""
    density = torch.full((20_000, 32), 50.0)
    density[:, 3:] = torch.linspace(0.01, 3, 29)
    ray = torch.arange(20_000).repeat_interleave(32)
    weights = volume_weights(density.flatten(), ray, 20_000, 0.05).view(20_000, 32)
    assert torch.allclose(weights[0], weights[-1], rtol=1e-5, atol=1e-9)


def test_constant_density_follows_beer_lambert() -> None:
    """Opacity of a filled box crossed along x is 1 - exp(-sigma * 1.2); half of it lies before ln 2 / sigma."""
    sigma = 1.3
    grid = OccupancyGrid(0.6, VolumeConfig(samples_per_ray=4000))

    def filled(points: torch.Tensor, normals: bool = True) -> FieldSamples:
        return FieldSamples(torch.full((len(points),), sigma), torch.zeros(len(points), 3), torch.zeros(len(points), 3))

    origin, direction = torch.tensor([[-2.0, 0.1, 0.05]]), torch.tensor([[1.0, 0, 0]])
    seen = render(filled, grid, origin, direction, torch.tensor([0.5]))
    assert float(seen.opacity) == pytest.approx(1 - math.exp(-sigma * 1.2), abs=1e-3)
    assert float(seen.rgb[0, 0]) == pytest.approx(math.exp(-sigma * 1.2), abs=1e-3)  # white shows through
    mean = 1 / sigma - 1.2 * math.exp(-sigma * 1.2) / (1 - math.exp(-sigma * 1.2))
    assert float(seen.depth) == pytest.approx(1.4 + mean, abs=2e-3)


@pytest.mark.parametrize("scene", [Ball(), Snowman()])
def test_the_grid_drops_no_sample_that_matters(scene: Ball) -> None:
    grid = grid_of(scene)
    points = (torch.rand(200_000, 3) - 0.5) * 1.2
    dense = scene.density(points) * grid.step > grid.config.occupancy_threshold
    assert bool(grid.lookup(points)[dense].all())
    assert float(grid.live.float().mean()) < 0.35  # and it does drop most of the box


def test_march_keeps_exactly_the_live_samples() -> None:
    grid = grid_of(Ball())
    c2w = orbit_camera(torch.tensor([30.0]), torch.tensor([20.0]), torch.tensor(2.0))
    origins, directions = (x.reshape(-1, 3) for x in camera_rays(c2w, torch.tensor([40.0]), 16, 16))
    samples = march(origins, directions, grid, torch.full((256,), 0.5))
    points = origins[samples.ray] + directions[samples.ray] * samples.t[:, None]
    assert bool(grid.lookup(points).float().mean() > 0.999)  # all but rounding at cell borders
    assert bool((samples.ray.diff() >= 0).all())
    same = samples.ray.diff() == 0
    assert bool((samples.t.diff()[same] > 0.99 * grid.step).all())


def test_pruning_changes_no_picture() -> None:
    scene, full = Ball(), OccupancyGrid(0.6, VolumeConfig(samples_per_ray=256))
    c2w = ring(3, 20.0, 40.0, 0.6)
    pruned = render_views(scene, grid_of(scene, samples=256), c2w, 40.0, 32)
    whole = render_views(scene, full, c2w, 40.0, 32)
    assert float(psnr(pruned.rgb, whole.rgb).min()) > 30  # sampling starts elsewhere in the step; nothing else differs
    assert torch.allclose(pruned.opacity.mean(), whole.opacity.mean(), atol=3e-3)


def test_ball_seen_from_the_front_is_red_and_faces_us() -> None:
    scene = Ball()
    views = render_views(scene, grid_of(scene), ring(2, 0.0, 40.0, 0.6), 40.0, 33)
    assert torch.allclose(views.rgb[0, :, 16, 16], torch.tensor([1.0, 0, 0]), atol=0.02)
    assert torch.allclose(views.rgb[1, :, 16, 16], torch.tensor([0.0, 0, 1]), atol=0.02)
    assert views.normal[0, 0, 16, 16] > 0.98  # +x
    assert torch.allclose(views.rgb[0, :, 0, 0], torch.ones(3))
    distance = 0.6 / math.tan(math.radians(20))
    assert float(views.depth[0, 16, 16]) == pytest.approx(distance - 0.35, abs=0.03)


def test_empty_grid_renders_background() -> None:
    grid = OccupancyGrid(0.6, VolumeConfig())
    grid.update(lambda points: torch.zeros(len(points)))
    seen = render(Ball(), grid, torch.tensor([[2.0, 0, 0]]), torch.tensor([[-1.0, 0, 0]]), torch.tensor([0.5]))
    assert torch.equal(seen.rgb, torch.ones(1, 3)) and len(seen.ray) == 0


@pytest.mark.timeout(300)
def test_a_field_fitted_to_pictures_shows_unseen_views() -> None:
    """Photometric fit to 16 views of an analytic scene at 32 px; held-out views reach 24 dB."""
    torch.set_num_threads(1)
    scene = Snowman()
    truth = grid_of(scene, samples=192)
    seen_from = torch.cat([ring(8, -25.0, 40.0, 0.6), ring(8, 35.0, 40.0, 0.6)])
    held_out = orbit_camera(torch.tensor([20.0, 110, 200, 290]), torch.tensor([10.0, 0, 25, -10]), torch.tensor(1.65))
    target = render_views(scene, truth, seen_from, 40.0, 32).rgb.permute(0, 2, 3, 1).reshape(-1, 3)
    torch.manual_seed(0)
    field = Field(FieldConfig(bound=0.6, levels=5, log2_entries=13, base_resolution=8, max_resolution=48, hidden=16))
    grid = OccupancyGrid(0.6, VolumeConfig(samples_per_ray=64, occupancy_decay=0.7, occupancy_every=8))
    optimizer = torch.optim.AdamW(field.parameter_groups(0.02, 0.01), betas=(0.9, 0.99), eps=1e-15)
    origins, directions = (x.reshape(-1, 3) for x in camera_rays(seen_from, torch.full((16,), 40.0), 32, 32))
    for step in range(200):
        if step % 8 == 0:
            grid.update(field.density)
        pick = torch.randint(len(origins), (768,))
        seen = render(field, grid, origins[pick], directions[pick], torch.rand(768), normals=False)
        optimizer.zero_grad()
        torch.nn.functional.smooth_l1_loss(seen.rgb, target[pick], beta=0.1).backward()
        optimizer.step()
    reference = render_views(scene, truth, held_out, 40.0, 32).rgb
    result = float(psnr(render_views(field, grid, held_out, 40.0, 32).rgb, reference).mean())
    assert result > 24, f"held-out PSNR {result:.1f} dB"
