from __future__ import annotations

import math

import pytest
import torch
from analytic_scenes import Ball, Snowman
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.cli import ConfigError
from data.cameras import camera_rays, orbit_camera
from distill.field import Field, FieldConfig, FieldSamples
from distill.turntable import render_views, ring
from distill.volume import (
    OccupancyGrid,
    Samples,
    VolumeConfig,
    albedo_only,
    in_pieces,
    live_samples,
    march,
    render,
    render_samples,
    volume_weights,
)
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
    (samples,) = march(origins, directions, grid, torch.full((256,), 0.5), 2**20)
    points = origins[samples.ray] + directions[samples.ray] * samples.t[:, None]
    assert bool(grid.lookup(points).float().mean() > 0.999)  # all but rounding at cell borders
    assert bool((samples.ray.diff() >= 0).all())
    same = samples.ray.diff() == 0
    assert bool((samples.t.diff()[same] > 0.99 * grid.step).all())


def test_pruning_changes_no_picture() -> None:
    scene, full = Ball(), OccupancyGrid(0.6, VolumeConfig(samples_per_ray=256))
    c2w = ring(3, 20.0, 40.0, 0.6)
    grid = grid_of(scene, samples=256)
    grid.least_tau = 0.0  # empty cells alone are left out
    pruned = render_views(scene, grid, c2w, 40.0, 32)
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


def small_field() -> Field:
    torch.manual_seed(0)
    field = Field(FieldConfig(bound=0.6, levels=4, log2_entries=10, base_resolution=4, max_resolution=32, hidden=16,
                              blob_scale=20.0, blob_std=0.3))  # fmt: skip
    torch.nn.init.uniform_(field.table, -0.5, 0.5)
    return field


def seen_with(field: Field, most: int, **more: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What 2 views of 24 px show with so many samples at once, and the gradients of a sum over all of it."""
    field.zero_grad()
    torch.manual_seed(0)
    grid = OccupancyGrid(0.6, VolumeConfig(samples_per_ray=128, samples_at_once=most, occupancy_resolution=16, **more))
    grid.update(field.density)
    rays = camera_rays(orbit_camera(torch.tensor([0.0, 130]), torch.tensor(20.0), 2.0), torch.full((2,), 40.0), 24, 24)
    origins, directions = (x.reshape(-1, 3) for x in rays)
    lights = torch.randn(len(origins), 3)

    def lit(samples: FieldSamples, points: torch.Tensor, ray: torch.Tensor) -> torch.Tensor:
        return samples.albedo * (samples.normal * lights[ray]).sum(dim=-1, keepdim=True).sigmoid()

    seen = render(field, grid, origins, directions, torch.rand(len(origins)), shade=lit, density=field.density)
    out = [seen.rgb, seen.opacity, seen.depth, seen.normal, seen.depth_variance, seen.weights, seen.normals]
    torch.manual_seed(1)
    sum((one * torch.randn(one.shape)).sum() for one in out).backward()
    return [*out, seen.ray], [p.grad.clone() for p in field.parameters()]


def test_in_pieces_it_is_the_same_picture_with_the_same_gradients() -> None:
    field = small_field()
    whole, parted = seen_with(field, 2**20), seen_with(field, 1024)
    assert len(whole[0][0]) == 1152 and len(whole[0][-1]) > 3 * 1024, "there are pieces"
    for one, other in zip(whole[0], parted[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(whole[1], parted[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 60))
def test_pieces_are_whole_rays_that_fit(counts: list[int], most: int) -> None:
    ray = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    samples = Samples(ray, torch.arange(len(ray)).float())
    pieces = in_pieces(samples, len(counts), most)
    assert [r for rays, _, _ in pieces for r in rays] == list(range(len(counts)))
    assert torch.equal(torch.cat([t for _, _, t in pieces]), samples.t)
    for rays, rows, _ in pieces:
        assert len(rows) <= most or len(rays) == 1
        assert all(int(row) in rays for row in rows)


def test_what_no_light_reaches_is_left_out_and_not_missed() -> None:
    field = small_field()
    field.config.blob_scale = 200.0  # opaque
    everything, stopped = seen_with(field, 2**20, stop_below=0.0), seen_with(field, 2**20, stop_below=1e-4)
    assert len(stopped[0][-1]) < 0.8 * len(everything[0][-1])
    for one, other in zip(everything[0][:4], stopped[0][:4], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


def rays_of(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    c2w, fov = ring(2, 15.0, 40.0, 0.6), torch.full((2,), 40.0)
    origins, directions = (x.reshape(-1, 3) for x in camera_rays(c2w, fov, size, size))
    return origins, directions


def test_a_buffer_that_is_full_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marched 1,024 samples at a time there are as many as at once, and no more than that are asked for together."""
    scene = Ball(skin=0.05)
    origins, directions = rays_of(20)
    jitter, asked = torch.rand(len(origins)), []

    def density(points: torch.Tensor) -> torch.Tensor:
        asked.append(len(points))
        return scene.density(points)

    found = []
    for capacity in (2**20, 1024):
        grid = grid_of(scene)
        grid.config.samples_at_once = capacity
        asked.clear()
        found.append(live_samples(origins, directions, grid, jitter, density))
        assert max(asked) <= capacity and grid.hidden > 0.1
    assert len(asked) > 5, "there are parts"
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_buffer_takes_whole_rays() -> None:
    with pytest.raises(ConfigError, match=r"must be at least 1024 and 2 \* volume.samples_per_ray=8000"):
        VolumeConfig(samples_per_ray=4000, samples_at_once=2048)


@pytest.mark.parametrize("dropped", [True, False])
def test_samples_below_the_threshold_count_as_empty(dropped: bool) -> None:
    """Whether they are left out beforehand or not: the same picture, and no gradient reaches them."""
    torch.manual_seed(0)
    grid = OccupancyGrid(0.6, VolumeConfig(samples_per_ray=64, occupancy_resolution=8, prune_alpha=0.05))
    grid.density += 50.0
    grid.mark()
    assert bool(grid.live.all())
    origins, directions = rays_of(8)
    jitter = torch.full((len(origins),), 0.5)
    density = torch.tensor([0.99, 1.01]) * -math.log1p(-0.05) / grid.step  # just below, just above
    values = density.clone().requires_grad_()

    def scene(points: torch.Tensor, normals: bool = True) -> FieldSamples:
        here = values[(points[:, 0] > 0).long()]
        return FieldSamples(here, torch.zeros(len(points), 3), torch.zeros(len(points), 3))

    seen = render(scene, grid, origins, directions, jitter, density=(lambda p: scene(p).density) if dropped else None)
    (marched,) = march(origins, directions, grid, jitter, 2**20)
    front = (origins[marched.ray] + directions[marched.ray] * marched.t[:, None])[:, 0] > 0
    assert len(seen.ray) == (int(front.sum()) if dropped else len(front))
    passed = torch.bincount(marched.ray[front], minlength=len(origins))
    assert torch.allclose(seen.opacity, 1 - torch.exp(-passed * density[1] * grid.step), atol=1e-5)
    seen.opacity.sum().backward()
    assert values.grad is not None and values.grad[0] == 0 and values.grad[1] != 0


def test_the_threshold_is_never_above_the_mean() -> None:
    """nerfacc's rule: a young field, thin everywhere, is not dropped as a whole."""
    grid = OccupancyGrid(0.6, VolumeConfig(samples_per_ray=64, occupancy_resolution=8))
    assert grid.least_tau == 0
    grid.density += 1e-3 / grid.step
    grid.mark()
    assert grid.least_tau == pytest.approx(1e-3, rel=1e-2)
    grid.density += 1.0 / grid.step
    grid.mark()
    assert grid.least_tau == pytest.approx(0.01005, rel=1e-3)


def test_depth_variance_keeps_its_digits_and_has_the_gradient_of_its_definition() -> None:
    """A surface three thousandths thick, ten units away: E[t^2] - E[t]^2 in fp32 would be rounding alone."""
    grid = OccupancyGrid(0.6, VolumeConfig(samples_per_ray=2000))
    sigma = (torch.tensor([0.3, 0.5, 0.2, 2.0]) / grid.step).requires_grad_()
    t = 10.0 + torch.tensor([0.0, 1e-3, 2e-3, 3e-3])

    def scene(points: torch.Tensor, normals: bool = True) -> FieldSamples:
        return FieldSamples(sigma, torch.zeros(4, 3), torch.zeros(4, 3))

    origin, direction = torch.tensor([[-10.0, 0, 0]]), torch.tensor([[1.0, 0, 0]])
    samples = Samples(torch.zeros(4, dtype=torch.int64), t)
    seen = render_samples(scene, grid, origin, direction, range(1), samples, albedo_only, False)
    seen.depth_variance.sum().backward()

    exact = sigma.detach().double().requires_grad_()
    tau = exact * grid.step
    weights = torch.exp(tau - tau.cumsum(0)) * (1 - torch.exp(-tau))
    mean = (weights * t).sum() / weights.sum()
    variance = (weights * (t - mean) ** 2).sum() / weights.sum()
    variance.backward()
    assert seen.depth_variance.item() == pytest.approx(variance.item(), rel=1e-2)  # t itself has digits up to 1e-6
    assert sigma.grad is not None and exact.grad is not None
    torch.testing.assert_close(sigma.grad.double(), exact.grad, rtol=1e-2, atol=0.0)
