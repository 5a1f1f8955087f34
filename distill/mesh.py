"""From the field to a mesh: the iso level nearest to where rays become half opaque, marching cubes, fewer triangles.

Shapes: P grid points, X vertices, T triangles.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import trimesh
from skimage.measure import marching_cubes
from torch import Tensor

from data.cameras import camera_rays, orbit_camera
from data.files import UserError
from data.progress import Progress
from distill.config import MeshConfig
from distill.field import Field
from distill.glb import load_glb, save_glb
from distill.manifold import Surface, decimated, large_pieces, sound
from distill.silhouette import Sight, likeness, sight_of
from distill.texture import surface_albedo
from distill.volume import OccupancyGrid, half_opaque_at, query, render

__all__ = ["extract_mesh", "load_glb", "save_glb"]  # files are made and read in distill/glb.py
LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the density that looking rays find, tried against the pictures
FINER = (2**0.5, 2**0.25)  # ratios between the best of them and those tried next
TRIED_CELLS = 128  # marching-cubes cells a side, at most, for the meshes that are only tried
FAINT = 1e-3  # of the level: as little density as nothing at all
BESIDE = 0.01  # least |log density / level| at a grid vertex: a surface just there has triangles without area
EMPTY = (
    "the field is empty: no ray is as much as half covered, so there is no mesh; the optimisation lost the object. "
    "Try another seed, a lower guidance.scale, or more steps"
)


@torch.no_grad()
def iso_density(field: Field, occupancy: OccupancyGrid, size: int = 64) -> float:
    """The density where looking rays become half opaque: of all that do, in 12 views, the lower quartile.

    That is the surface one sees.  (The mean density follows how much empty space the box holds; the level with the
    rendered silhouettes lies further out, since grazing rays gather opacity in the soft skin of the object.)
    UserError when no ray becomes half opaque.
    """
    elevation = torch.tensor([-20.0, 10.0, 40.0]).repeat_interleave(4)
    c2w = orbit_camera(torch.arange(12) * 30.0 * 7, elevation, torch.tensor(2.2 * occupancy.bound / 0.6))
    rays = camera_rays(c2w.to(occupancy.live.device), torch.full((12,), 40.0), size, size)
    origins, directions = (x.reshape(-1, 3) for x in rays)
    jitter = torch.full((len(origins),), 0.5, device=origins.device)
    seen = render(field, occupancy, origins, directions, jitter, normals=False)
    if not bool((seen.opacity > 0.5).any()):
        raise UserError(EMPTY)
    sample, _ = half_opaque_at(seen, occupancy.step)
    return float(seen.density[sample].quantile(0.25))


@torch.no_grad()
def density_volume(field: Field, occupancy: OccupancyGrid, resolution: int) -> np.ndarray:
    """Density at the (resolution + 1)^3 vertices of the scene box, 0 where the occupancy grid says so."""
    axis = torch.linspace(-occupancy.bound, occupancy.bound, resolution + 1, device=occupancy.live.device)

    def masked(points: Tensor) -> Tensor:
        density = torch.zeros(len(points), device=points.device)
        live = occupancy.lookup(points)
        density[live] = field.density(points[live])
        return density

    slabs = []
    with Progress("density", resolution + 1, "plane") as progress:
        for x in axis:
            plane = torch.stack(torch.meshgrid(x[None], axis, axis, indexing="ij"), dim=-1).view(-1, 3)
            slabs.append(query(masked, plane))
            progress.update()
    return torch.stack(slabs).view(resolution + 1, resolution + 1, resolution + 1).cpu().numpy()


def isosurface(density: np.ndarray, level: float, bound: float, stride: int = 1) -> Surface:
    """Vertices (X, 3), world, and outward triangles (T, 3).  Across a surface the logarithm is nearly linear.

    stride: uses every so many vertices of the grid a side.  UserError when nothing is as dense as `level`.
    """
    coarse = density[::stride, ::stride, ::stride]
    height = np.log(np.maximum(coarse, FAINT * level) / level)
    height = np.where(np.abs(height) < BESIDE, np.copysign(BESIDE, height), height)
    if height.max() <= 0:
        raise UserError(EMPTY)
    height = np.pad(height, 1, constant_values=math.log(FAINT))  # closed even where the object touches the box
    vertices, triangles, _, _ = marching_cubes(height, 0.0, gradient_direction="ascent")  # outward winding
    cell = 2 * bound / (density.shape[0] - 1) * stride
    return (vertices.astype(np.float64) - 1) * cell - bound, triangles.astype(np.int64)


def drop_floaters(vertices: np.ndarray, triangles: np.ndarray, keep_share: float) -> Surface:
    """A sound surface of the pieces with at least `keep_share` of the largest one's triangles, without hollows."""
    return large_pieces(*sound(vertices, triangles), keep_share)


def half_opaque(occupancy: OccupancyGrid) -> list[float]:
    """Densities at which one step, and one cell of the occupancy grid, take half of the light."""
    return [math.log(2) / length for length in (occupancy.step, 2 * occupancy.bound / occupancy.live.shape[0])]


def best_level(density: np.ndarray, seen: float, occupancy: OccupancyGrid, sight: Sight, keep_share: float) -> float:
    """Of some levels round `seen`, the one whose mesh lies most nearly where the pictures' rays become half opaque.

    Then its neighbours at smaller and smaller ratios, but never beyond the outermost of LEVELS.
    """
    stride = math.ceil((len(density) - 1) / TRIED_CELLS)
    highest = float(density[::stride, ::stride, ::stride].max())
    scores: dict[float, float] = {}

    def attempt(levels: list[float]) -> float:
        for level in levels:
            if level < highest and seen * LEVELS[0] <= level <= seen * LEVELS[-1] and level not in scores:
                surface = isosurface(density, level, occupancy.bound, stride)
                scores[level] = likeness(*large_pieces(*surface, keep_share), sight).depths
        return max(scores, key=lambda level: scores[level], default=min(seen, highest / 2))

    best = attempt([*(seen * share for share in LEVELS), *half_opaque(occupancy)])
    for ratio in FINER:
        best = attempt([best / ratio, best * ratio])
    return best


def extract_mesh(field: Field, occupancy: OccupancyGrid, config: MeshConfig) -> tuple[trimesh.Trimesh, dict[str, Any]]:
    """The field's surface in world axes with sRGB vertex colours, and facts about it.

    No edge has three faces and all faces look outwards.  UserError when the field is empty, or when the surface does
    not close and `config.watertight` asks for it.
    """
    seen = iso_density(field, occupancy)
    density = density_volume(field, occupancy, config.resolution)
    sight = sight_of(field, occupancy)
    print("mesh: choosing its level", flush=True)
    level = best_level(density, seen, occupancy, sight, config.keep_share)
    found = isosurface(density, level, occupancy.bound)
    whole = drop_floaters(*found, config.keep_share)
    if not len(whole[1]):
        raise UserError(
            "no body is left of the field's surface, only hollows; try another mesh.resolution, or more steps"
        )
    print(f"mesh: {len(whole[1])} faces, of which {config.faces or 'all'} are kept", flush=True)
    vertices, triangles = decimated(*whole, config.faces, config.keep_share)
    mesh = trimesh.Trimesh(vertices, triangles, process=False)
    if config.watertight and not mesh.is_watertight:
        raise UserError(
            "mesh.watertight: marching cubes left the surface open; try another mesh.resolution, mesh.faces=0, or "
            "mesh.watertight=false"
        )
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=vertex_colours(field, occupancy, mesh, level, config))
    alike = likeness(vertices, triangles, sight)
    facts = {
        "iso_density": level,
        "silhouette_iou": alike.silhouettes,
        "depth_likeness": alike.depths,
        "vertices": len(vertices),
        "faces": len(triangles),
        "faces_before_decimation": len(whole[1]),
        "floater_faces_dropped": max(len(found[1]) - len(whole[1]), 0),
        "watertight": bool(mesh.is_watertight),
        "extent": mesh.extents.tolist(),
    }
    return mesh, facts


def vertex_colours(
    field: Field, occupancy: OccupancyGrid, mesh: trimesh.Trimesh, level: float, config: MeshConfig
) -> np.ndarray:
    """(X, 3) uint8, sRGB."""
    cell = 2 * occupancy.bound / config.resolution
    return surface_albedo(field, occupancy, np.asarray(mesh.vertices), np.asarray(mesh.vertex_normals), cell, level)
