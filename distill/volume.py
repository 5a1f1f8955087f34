"""From rays to pictures: an occupancy grid says where to look, the field is asked there, and the light is added up.

Only samples in occupied cells exist ("packed": one flat list for all rays, ordered by ray and then by distance), as in
nerfacc (arXiv 2305.04966).  distill.kernels has `march` and `volume_weights` for CUDA.
Memory is bounded by `samples_at_once`: rays are marched into a buffer of that size, as often as it takes; what cannot
be seen is dropped from it before the next part (`visible`: there rays end early), and of what remains no more than that
many samples are differentiated at once.  Nothing is lost when a buffer is full: the next rays go into the next one.
Shapes: R rays, N live samples, G grid cells a side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from conf.cli import check
from distill.backend import Backend, choose_backend
from distill.field import FieldSamples

Shade = Callable[[FieldSamples, Tensor, Tensor], Tensor]  # (samples, points (N, 3), ray (N,)) -> colour (N, 3)
Density = Callable[[Tensor], Tensor]  # points (N, 3) -> (N,)

WORTH_IT = 0.25  # hidden share from which on asking for all densities first is the cheaper way
MARCH_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}  # candidate samples looked up at once
QUERY_POINTS = {"cpu": 2**17, "cuda": 2**21}  # points asked of the field at once where no gradient is kept


@dataclass
class VolumeConfig:
    """Defaults: the released configuration, and threestudio's renderer where that is silent."""

    samples_per_ray: int = 512  # over the scene box's diagonal: they fix the step
    occupancy_resolution: int = 32  # cells a side (threestudio's nerfacc grid)
    occupancy_threshold: float = 0.01  # opacity of one step below which a cell is empty
    occupancy_decay: float = 0.95  # of a vertex's remembered density per update
    occupancy_every: int = 16  # steps between updates
    background: float = 1.0  # grey level behind the object: 1 is white
    stop_below: float = 1e-4  # training leaves out samples to which less of the light gets; 0: none
    # Opacity of one step below which a sample counts as empty (released: `prune_alpha_threshold`, with nerfacc's rule
    # that it is never above the grid's mean); 0: none does.
    prune_alpha: float = 0.01
    # Capacity of the sample buffer; views with more to differentiate are rendered in pieces, and each once more on the
    # way back.
    samples_at_once: int = 2**21

    def __post_init__(self) -> None:
        check(self.samples_per_ray >= 8, f"volume.samples_per_ray={self.samples_per_ray} must be at least 8")
        check(
            4 <= self.occupancy_resolution <= 512,
            f"volume.occupancy_resolution={self.occupancy_resolution} must be 4 to 512",
        )
        check(0 < self.occupancy_decay < 1, f"volume.occupancy_decay={self.occupancy_decay} must lie between 0 and 1")
        check(self.occupancy_every >= 1, f"volume.occupancy_every={self.occupancy_every} must be at least 1")
        check(0 <= self.background <= 1, f"volume.background={self.background} must lie in [0, 1]")
        check(0 <= self.stop_below < 1, f"volume.stop_below={self.stop_below} must lie in [0, 1)")
        check(0 <= self.prune_alpha < 1, f"volume.prune_alpha={self.prune_alpha} must lie in [0, 1)")
        check(
            self.samples_at_once >= max(1024, 2 * self.samples_per_ray),
            f"volume.samples_at_once={self.samples_at_once} must be at least 1024 and 2 * volume.samples_per_ray="
            f"{2 * self.samples_per_ray}: the buffer takes whole rays",
        )

    def step(self, bound: float) -> float:
        """Distance between samples, object units."""
        return 2 * bound * math.sqrt(3) / self.samples_per_ray


class OccupancyGrid:
    """Which cells of [-bound, bound]^3 can hold anything.

    Density is remembered at the (G + 1)^3 vertices, each probed at a random place within half a cell; a cell is live
    when one of its 8 vertices is.  So everything in a live cell or within half a cell of it has been seen.
    """

    def __init__(
        self, bound: float, config: VolumeConfig, device: str | torch.device = "cpu", backend: Backend | None = None
    ):
        self.backend = backend or choose_backend("torch", "cpu")
        self.bound, self.config, self.step = bound, config, config.step(bound)
        g = config.occupancy_resolution
        self.density = torch.zeros(g + 1, g + 1, g + 1, device=device)
        self.live = torch.ones(g, g, g, dtype=torch.bool, device=device)
        self.hidden, self.fresh = 0.0, True  # share of live samples that nobody sees, and whether to look again
        self.least_tau = 0.0  # optical depth of a step that is more than empty; known once there is a density
        self.low = torch.full((3,), -bound, device=device)  # box around the live cells
        self.high = torch.full((3,), bound, device=device)

    @torch.no_grad()
    def update(self, density: Density) -> None:
        """Remembers max(decayed memory, density now) and marks the live cells."""
        g, cell = self.config.occupancy_resolution, 2 * self.bound / self.config.occupancy_resolution
        axis = torch.arange(g + 1, device=self.density.device) * cell - self.bound
        points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).view(-1, 3)
        points = points + (torch.rand(points.shape) - 0.5).to(points) * cell
        now = query(density, points.clamp(-self.bound, self.bound)).view_as(self.density)
        self.density = torch.maximum(self.density * self.config.occupancy_decay, now)
        self.fresh = True
        self.mark()

    def mark(self) -> None:
        """Live cells from the remembered density; never more than threestudio's mean rule would keep."""
        opacity = F.max_pool3d(self.density[None, None] * self.step, kernel_size=2, stride=1)[0, 0]
        mean = float(opacity.mean())
        self.live = opacity > min(self.config.occupancy_threshold, mean)
        self.least_tau = -math.log1p(-min(self.config.prune_alpha, mean))
        self._bound_live_cells()

    def _bound_live_cells(self) -> None:
        cell = 2 * self.bound / self.config.occupancy_resolution
        if not bool(self.live.any()):
            self.low, self.high = torch.zeros_like(self.low), torch.zeros_like(self.high)
            return
        index = self.live.nonzero()
        self.low = index.amin(dim=0) * cell - self.bound
        self.high = (index.amax(dim=0) + 1) * cell - self.bound

    def lookup(self, points: Tensor) -> Tensor:
        """points (N, 3), world -> whether each lies in a live cell (N,)."""
        g = self.config.occupancy_resolution
        index = ((points + self.bound) * (g / (2 * self.bound))).long().clamp_(0, g - 1)
        return self.live[index[:, 0], index[:, 1], index[:, 2]]


def query(function: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """function(points) in bounded pieces."""
    return torch.cat([function(part) for part in points.split(QUERY_POINTS[points.device.type])])


class Samples(NamedTuple):
    """Live samples of R rays, ordered by ray, then by distance."""

    ray: Tensor  # (N,) int64
    t: Tensor  # (N,) distance from the ray's origin, object units


def box_ends(origins: Tensor, directions: Tensor, occupancy: OccupancyGrid) -> tuple[Tensor, Tensor, int]:
    """Where rays enter and leave the box around the live cells (R,); far <= near: never.  Steps of the longest way."""
    inverse = 1 / torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
    ends = torch.stack([(occupancy.low - origins) * inverse, (occupancy.high - origins) * inverse])  # (2, R, 3)
    near, far = ends.amin(dim=0).amax(dim=-1).clamp(min=0), ends.amax(dim=0).amin(dim=-1)
    longest = float((far - near).amax()) if len(origins) else 0.0
    return near, far, max(math.ceil(longest / occupancy.step), 0)


@torch.no_grad()
def march(
    origins: Tensor, directions: Tensor, occupancy: OccupancyGrid, jitter: Tensor, capacity: int
) -> Iterator[Samples]:
    """Samples one step apart along each ray, where the grid is live; whole rays with at most `capacity` at a time.

    Only a single ray may have more.  origins, unit directions (R, 3); jitter (R,) in [0, 1): where in its steps a ray's
    samples lie (0.5 the middles).
    """
    near, far, steps = box_ends(origins, directions, occupancy)
    (hit,) = (far > near).nonzero(as_tuple=True)
    if steps == 0:
        yield Samples(hit, near[:0])
        return
    candidates = min(capacity, MARCH_ELEMENTS[origins.device.type])
    for rays in hit.split(max(1, candidates // steps)):
        yield _march_some(rays, origins, directions, near, far, occupancy, jitter, steps)


def _march_some(
    rays: Tensor,
    origins: Tensor,
    directions: Tensor,
    near: Tensor,
    far: Tensor,
    occupancy: OccupancyGrid,
    jitter: Tensor,
    steps: int,
) -> Samples:
    g = occupancy.config.occupancy_resolution
    count = torch.arange(steps, device=origins.device, dtype=origins.dtype)
    t = near[rays, None] + (count + jitter[rays, None]) * occupancy.step  # (R, S)
    scale = g / (2 * occupancy.bound)
    index = torch.zeros_like(t, dtype=torch.int32)
    for axis in range(3):
        start = (origins[rays, axis, None] + occupancy.bound) * scale
        index = index * g + torch.addcmul(start, t, directions[rays, axis, None] * scale).to(torch.int32).clamp_(
            0, g - 1
        )
    live = occupancy.live.view(-1).index_select(0, index.view(-1)).view_as(t) & (t < far[rays, None])
    row, column = live.nonzero(as_tuple=True)
    return Samples(rays[row], t[row, column])


class VolumeWeights(torch.autograd.Function):
    """w_i = T_i (1 - exp(-tau_i)), T_i = exp(-sum_{j < i, same ray} tau_j)  (NeRF, arXiv 2003.08934, eq. 3).

    d L / d tau_i = g_i T_{i+1} - sum_{j > i, same ray} g_j w_j.  Sums run over all rays at once, so they are kept in
    fp64: in fp32 a ray at the end of the list would lose its digits to those before it.
    """

    @staticmethod
    def forward(ctx: Any, tau: Tensor, first: Tensor, last: Tensor) -> Tensor:
        total = tau.double().cumsum(0)
        before = total - tau
        before = before - before[first]
        after = before + tau
        weights = ((-before).exp() * -torch.expm1(-tau.double())).to(tau.dtype)
        ctx.save_for_backward(weights, (-after).exp().to(tau.dtype), last)
        return weights

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        weights, transmitted, last = ctx.saved_tensors
        running = (gradient * weights).double().cumsum(0)
        later = running[last] - running
        return (gradient * transmitted - later).to(gradient.dtype), None, None


def ray_ends(ray: Tensor, num_rays: int) -> tuple[Tensor, Tensor]:
    """ray (N,) ascending -> numbers of the first and of the last sample of each sample's ray (N,)."""
    counts = torch.bincount(ray, minlength=num_rays)
    ends = counts.cumsum(0)
    return (ends - counts)[ray], ends[ray] - 1


def volume_weights(density: Tensor, ray: Tensor, num_rays: int, step: float) -> Tensor:
    """density (N,), ray (N,) ascending -> each sample's share of its ray's colour (N,)."""
    if len(ray) == 0:
        return density
    return VolumeWeights.apply(density * step, *ray_ends(ray, num_rays))


@dataclass
class Rendering:
    """What R rays saw, and the samples it came from."""

    rgb: Tensor  # (R, 3), over the background
    opacity: Tensor  # (R,)
    depth: Tensor  # (R,) expected distance of what is seen, object units; 0 on empty rays
    normal: Tensor  # (R, 3) weighted sum of normals: shorter than 1 where transparent; zeros when not asked for
    depth_variance: Tensor  # (R,) of the distance of what is seen, object units squared; 0 on empty rays
    ray: Tensor  # (N,)
    t: Tensor  # (N,) distance of the sample from the ray's origin, object units
    weights: Tensor  # (N,)
    density: Tensor  # (N,)
    normals: Tensor  # (N, 3) or (0, 3)


def half_opaque_at(seen: Rendering, step: float) -> tuple[Tensor, Tensor]:
    """Where rays become half opaque: the sample in whose step each of K rays does (K,), and at what distance (K,).

    For samples in the middle of their steps, in which the density is constant.
    """
    total = seen.weights.double().cumsum(0)
    before = total - seen.weights
    before = before - before[ray_ends(seen.ray, len(seen.opacity))[0]]
    (sample,) = ((before < 0.5) & (before + seen.weights >= 0.5)).nonzero(as_tuple=True)
    inside = (2 * (1 - before[sample])).log() / seen.density[sample]
    return sample, seen.t[sample] + inside - step / 2


def albedo_only(samples: FieldSamples, points: Tensor, ray: Tensor) -> Tensor:
    return samples.albedo


def render(
    field: Callable[..., FieldSamples],
    occupancy: OccupancyGrid,
    origins: Tensor,
    directions: Tensor,
    jitter: Tensor,
    shade: Shade = albedo_only,
    normals: bool = True,
    density: Density | None = None,
) -> Rendering:
    """origins, unit directions (R, 3), jitter (R,) in [0, 1).

    density: the field's; with it, rays end behind opaque samples (`stop_below`) and empty ones are left out before the
    field is asked for colours, where that was worth its price when the occupancy grid was last updated.
    """
    assert origins.shape == directions.shape and jitter.shape == origins.shape[:1], (origins.shape, jitter.shape)
    samples = live_samples(origins, directions, occupancy, jitter, density)

    def some(rays: range, ray: Tensor, t: Tensor) -> Rendering:
        return render_samples(field, occupancy, origins, directions, rays, Samples(ray, t), shade, normals)

    pieces = in_pieces(samples, len(origins), occupancy.config.samples_at_once)
    if len(pieces) == 1:
        return some(*pieces[0])
    seen = [checkpoint(some, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return Rendering(*(torch.cat([getattr(one, part.name) for one in seen]) for part in fields(Rendering)))


@torch.no_grad()
def live_samples(
    origins: Tensor, directions: Tensor, occupancy: OccupancyGrid, jitter: Tensor, density: Density | None
) -> Samples:
    """All that is to be rendered; no more than `samples_at_once` are looked at together."""
    config = occupancy.config
    looks = density is not None and config.stop_below > 0 and (occupancy.fresh or occupancy.hidden > WORTH_IT)
    found, kept = 0, []
    for part in occupancy.backend.march(origins, directions, occupancy, jitter, config.samples_at_once):
        found += len(part.ray)
        kept.append(visible(part, density, origins, directions, occupancy) if looks and density else part)
    samples = Samples(torch.cat([part.ray for part in kept]), torch.cat([part.t for part in kept]))
    if looks:
        occupancy.fresh, occupancy.hidden = False, 1 - len(samples.ray) / max(found, 1)
    return samples


def visible(
    samples: Samples, density: Density, origins: Tensor, directions: Tensor, occupancy: OccupancyGrid
) -> Samples:
    """Without the samples to which less than `stop_below` of the light gets, and without empty ones."""
    if len(samples.ray) == 0:
        return samples
    points = origins[samples.ray] + directions[samples.ray] * samples.t[:, None]
    tau = query(density, points) * occupancy.step
    first, _ = ray_ends(samples.ray, len(origins))
    before = tau.double().cumsum(0) - tau
    kept = (before - before[first] < -math.log(occupancy.config.stop_below)) & (tau >= occupancy.least_tau)
    return Samples(samples.ray[kept], samples.t[kept])


def parts_of(ends: Tensor, most: int) -> list[tuple[range, int, int]]:
    """Whole rays with at most so many samples together (a single ray may have more), and where their samples lie.

    ends (R,): the running sum of the rays' numbers of samples -> (rays, first sample, one after the last) each.
    """
    known, parts, first, done = ends.cpu(), [], 0, 0
    while first < len(known):
        last = max(int(torch.searchsorted(known, done + most, right=True)), first + 1)
        stop = int(known[last - 1])
        parts.append((range(first, last), done, stop))
        first, done = last, stop
    return parts


def in_pieces(samples: Samples, rays: int, most: int) -> list[tuple[range, Tensor, Tensor]]:
    """`parts_of` these samples: (rays, ray (N,), t (N,)) each."""
    if len(samples.ray) <= most:
        return [(range(rays), *samples)]
    ends = torch.bincount(samples.ray, minlength=rays).cumsum(0)
    return [(part, samples.ray[begin:end], samples.t[begin:end]) for part, begin, end in parts_of(ends, most)]


def render_samples(
    field: Callable[..., FieldSamples],
    occupancy: OccupancyGrid,
    origins: Tensor,
    directions: Tensor,
    rays: range,
    samples: Samples,
    shade: Shade,
    normals: bool,
) -> Rendering:
    """What `rays` of all origins and directions (R, 3) see at their samples."""
    ray, t = samples
    points = origins[ray] + directions[ray] * t[:, None]
    asked = field(points, normals=normals)
    density = asked.density.masked_fill(asked.density * occupancy.step < occupancy.least_tau, 0.0)
    local = ray - rays.start
    weights = occupancy.backend.volume_weights(density, local, len(rays), occupancy.step)
    # colour (3), opacity, distance, normal (3): one segmented sum for all
    columns = [shade(asked, points, ray), torch.ones_like(t)[:, None], t[:, None]]
    columns += [asked.normal] if normals else []
    features = torch.cat(columns, dim=-1)
    sums = features.new_zeros(len(rays), features.shape[1]).index_add(0, local, weights[:, None] * features)
    opacity = sums[:, 3]
    covered = opacity.clamp(min=1e-5)
    depth = sums[:, 4] / covered
    # About the mean, since a difference of squares would lose the digits of a thin surface.  The mean itself needs no
    # gradient: at the mean the variance's slope in it is zero.
    spread = (t - depth.detach()[local]).square()
    return Rendering(
        rgb=sums[:, :3] + (1 - opacity[:, None]) * occupancy.config.background,
        opacity=opacity,
        depth=depth,
        normal=sums[:, 5:] if normals else origins.new_zeros(len(rays), 3),
        depth_variance=torch.zeros_like(opacity).index_add(0, local, weights * spread) / covered,
        ray=ray,
        t=t,
        weights=weights,
        density=density,
        normals=asked.normal,
    )
