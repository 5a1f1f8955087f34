"""From the field to a mesh: an iso level where the rendering becomes opaque, marching cubes, a GLB file.

Shapes: P grid points, X vertices, T triangles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from skimage.measure import marching_cubes
from torch import Tensor

from data.cameras import camera_rays, orbit_camera
from data.files import UserError, atomic_file
from data.progress import Progress
from distill.config import MeshConfig
from distill.field import Field
from distill.volume import OccupancyGrid, query, render

# Our world is z up with the front on +x; glTF is y up with the front on +z: (x, y, z) -> (y, z, x).
TO_GLTF = np.array([[0.0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
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
    # opacity gathered on the ray up to and with each sample, and up to the one before
    total = seen.weights.double().cumsum(0)
    counts = torch.bincount(seen.ray, minlength=len(origins))
    first = (counts.cumsum(0) - counts)[seen.ray]
    gathered = total - (total - seen.weights)[first]
    crossing = (gathered >= 0.5) & (gathered - seen.weights < 0.5)
    return float(seen.density[crossing].quantile(0.25))


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


def isosurface(density: np.ndarray, level: float, bound: float) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (X, 3), world, and outward triangles (T, 3).  Across a surface the logarithm is nearly linear."""
    height = np.log(np.maximum(density, 1e-3 * level) / level)
    height = np.pad(height, 1, constant_values=height.min())  # closed even where the object touches the box
    if height.max() <= 0:
        raise UserError(EMPTY)
    vertices, triangles, _, _ = marching_cubes(height, 0.0, gradient_direction="ascent")  # outward winding
    cell = 2 * bound / (density.shape[0] - 1)
    return (vertices - 1) * cell - bound, triangles


def drop_floaters(vertices: np.ndarray, triangles: np.ndarray, keep_share: float) -> tuple[np.ndarray, np.ndarray]:
    """Keeps the connected pieces with at least `keep_share` of the largest one's triangles."""
    edges = np.concatenate([triangles[:, :2], triangles[:, 1:]])
    graph = coo_array((np.ones(len(edges), dtype=bool), edges.T), shape=(len(vertices),) * 2)
    _, piece = connected_components(graph, directed=False)
    sizes = np.bincount(piece[triangles[:, 0]])
    kept = triangles[(sizes >= keep_share * sizes.max())[piece[triangles[:, 0]]]]
    used = np.unique(kept)
    renumber = np.zeros(len(vertices), dtype=np.int64)
    renumber[used] = np.arange(len(used))
    return vertices[used], renumber[kept]


def extract_mesh(field: Field, occupancy: OccupancyGrid, config: MeshConfig) -> tuple[trimesh.Trimesh, dict[str, Any]]:
    """The field's surface in world axes with sRGB vertex colours, and facts about it."""
    level = iso_density(field, occupancy)
    vertices, triangles = isosurface(density_volume(field, occupancy, config.resolution), level, occupancy.bound)
    faces_found = len(triangles)
    vertices, triangles = drop_floaters(vertices, triangles, config.keep_share)
    points = torch.from_numpy(vertices.astype(np.float32)).to(occupancy.live.device)
    with torch.no_grad():
        colours = query(lambda part: field(part, normals=False).albedo, points)
    mesh = trimesh.Trimesh(
        vertices, triangles, vertex_colors=(colours.clamp(0, 1) * 255).round().byte().cpu().numpy(), process=False
    )
    facts = {
        "iso_density": level,
        "vertices": len(vertices),
        "faces": len(triangles),
        "floater_faces_dropped": faces_found - len(triangles),
        "watertight": bool(mesh.is_watertight),
        "extent": mesh.extents.tolist(),
    }
    return mesh, facts


def srgb_to_linear(colours: np.ndarray) -> np.ndarray:
    """uint8 to uint8, IEC 61966-2-1."""
    c = colours / 255.0
    return np.round(255 * np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)).astype(np.uint8)


def linear_to_srgb(colours: np.ndarray) -> np.ndarray:
    """uint8 to uint8, inverse of `srgb_to_linear` up to rounding."""
    c = colours / 255.0
    return np.round(255 * np.where(c <= 0.0031308, c * 12.92, 1.055 * c ** (1 / 2.4) - 0.055)).astype(np.uint8)


def _matte(tree: dict[str, Any]) -> None:
    """glTF's default material is a metal, black without a surrounding to mirror: make it matte."""
    tree["materials"] = [
        {"name": "albedo", "pbrMetallicRoughness": {"metallicFactor": 0.0, "roughnessFactor": 1.0}, "doubleSided": True}
    ]
    for part in tree["meshes"]:
        for primitive in part["primitives"]:
            primitive["material"] = 0


def save_glb(path: Path, mesh: trimesh.Trimesh) -> None:
    """Writes the mesh in glTF's axes and colour space (COLOR_0 is linear by the standard), and reads it back."""
    exported: Any = mesh.copy()
    colours = np.asarray(exported.visual.vertex_colors).copy()
    exported.apply_transform(TO_GLTF)
    colours[:, :3] = srgb_to_linear(colours[:, :3])
    exported.visual.vertex_colors = colours
    content: bytes = exported.export(file_type="glb", tree_postprocessor=_matte)
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
    back = load_glb(path)
    if back.faces.shape != mesh.faces.shape or not np.allclose(back.bounds, mesh.bounds, atol=1e-4):
        raise RuntimeError(f"{path} does not read back as it was written: {back.bounds} instead of {mesh.bounds}")


def load_glb(path: Path) -> trimesh.Trimesh:
    """A mesh written by `save_glb`, back in world axes with sRGB vertex colours.

    trimesh.load(..., force="mesh") loses the colours: beside a material it keeps COLOR_0 as an attribute of the visual.
    """
    (mesh,) = trimesh.load_scene(path, process=False).geometry.values()
    visual: Any = mesh.visual
    colours = np.asarray(visual.vertex_attributes["color"]).copy()
    colours[:, :3] = linear_to_srgb(colours[:, :3])
    vertices = trimesh.transform_points(mesh.vertices, TO_GLTF.T)
    return trimesh.Trimesh(vertices, mesh.faces, vertex_colors=colours, process=False)
