"""The albedo on a mesh: what the renderer would show there, at points, and as a picture that is wrapped round it.

Shapes: N points, X vertices, T triangles, S texels a side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import trimesh
from PIL import Image
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from distill.config import MeshConfig
from distill.field import FieldSamples
from distill.silhouette import filled
from distill.unwrap import Layout, UnwrapFailed, unwrap
from distill.volume import QUERY_POINTS, OccupancyGrid

SKIN = 1.5, 8.0  # marching-cubes cells before the surface whose colours count: at least, at most
OPACITY = 0.15  # that the density of the surface makes on that way, within these limits
BEFORE, SAMPLES = 3, 24  # samples before the surface, and in all
HALF_TEXEL = 0.5


@torch.no_grad()
def surface_albedo(
    field: Callable[..., FieldSamples],
    occupancy: OccupancyGrid,
    points: np.ndarray,
    normals: np.ndarray,
    cell: float,
    level: float,
) -> np.ndarray:
    """points and outward unit normals (N, 3), world, where the density is `level` -> (N, 3) uint8, sRGB.

    Volume rendering along the normal from a little before the surface far into it, since the picture of a field is a
    mixture of what lies in its skin and, where that is thin, behind.  Steps are the longer the thinner the field; cell:
    object units.
    """
    device = occupancy.live.device
    step = min(max(OPACITY / level, SKIN[0] * cell), SKIN[1] * cell) / BEFORE
    offsets = step * (BEFORE - torch.arange(SAMPLES, device=device))
    both = torch.from_numpy(np.concatenate([points, normals], axis=1).astype(np.float32)).to(device)
    colours = [
        _along_normals(field, occupancy, part[:, :3], part[:, 3:], offsets, step)
        for part in both.split(QUERY_POINTS[device.type] // SAMPLES)
    ]
    return (torch.cat(colours).clamp(0, 1) * 255).round().byte().cpu().numpy()


def _along_normals(
    field: Callable[..., FieldSamples],
    occupancy: OccupancyGrid,
    points: Tensor,
    normals: Tensor,
    offsets: Tensor,
    step: float,
) -> Tensor:
    """points, normals (N, 3), offsets (M,) along the normal from the outside to the inside -> (N, 3)."""
    places = (points[:, None] + offsets[:, None] * normals[:, None]).clamp(-occupancy.bound, occupancy.bound)
    places = places.view(-1, 3)
    asked = field(places, normals=False)
    tau = (asked.density * occupancy.lookup(places) * step).view(len(points), -1)
    before = tau.cumsum(dim=1) - tau
    weights = (-before).exp() * -torch.expm1(-tau)
    weights[:, BEFORE] += 1e-6  # the surface itself where there is next to nothing around it
    albedo = asked.albedo.view(len(points), -1, 3)
    return (weights[..., None] * albedo).sum(dim=1) / weights.sum(dim=1, keepdim=True)


class Texels(NamedTuple):
    """The places of the mesh that the picture shows, one for each texel that a chart touches; M of them."""

    number: np.ndarray  # (M,) row * S + column
    triangle: np.ndarray  # (M,)
    weights: np.ndarray  # (M, 3) of the triangle's corners


def texels_of(layout: Layout, size: int) -> Texels:
    """Every texel that a triangle touches belongs to the one in which its centre lies, or to which it is nearest."""
    corners = layout.uv[layout.triangles] * size
    owner, depth = np.full(size * size, -1), np.full(size * size, -np.inf)
    for triangle, texel, inside in filled(corners, size, margin=HALF_TEXEL):
        np.maximum.at(depth, texel, inside)
        first = inside >= depth[texel]
        owner[texel[first]] = triangle[first]
    (number,) = np.nonzero(owner >= 0)
    triangle = owner[number]
    centre = np.stack([number % size + 0.5, number // size + 0.5], axis=1)
    return Texels(number, triangle, corner_weights(corners[triangle], centre))


def corner_weights(corners: np.ndarray, points: np.ndarray) -> np.ndarray:
    """corners (M, 3, 2), points (M, 2) -> barycentric weights (M, 3) of the points, or of places inside near them."""
    a, b, c = corners.swapaxes(0, 1)
    whole = _cross(b - a, c - a)
    weights = np.stack([_cross(c - b, points - b), _cross(a - c, points - c), _cross(b - a, points - a)], axis=1)
    weights = np.maximum(weights / whole[:, None], 0)
    return weights / weights.sum(axis=1, keepdims=True)


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def bake(
    field: Callable[..., FieldSamples],
    occupancy: OccupancyGrid,
    mesh: trimesh.Trimesh,
    layout: Layout,
    size: int,
    cell: float,
    level: float,
) -> tuple[np.ndarray, float]:
    """The picture (S, S, 3) uint8, sRGB, row 0 at v = 0, and the share of it that charts cover.

    cell, level: as for `surface_albedo`.
    """
    number, triangle, weights = texels_of(layout, size)
    points, normals = (
        np.einsum("mi,mij->mj", weights, values[mesh.faces[triangle]])
        for values in (np.asarray(mesh.vertices), np.asarray(mesh.vertex_normals))
    )
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    picture, covered = np.zeros((size * size, 3), dtype=np.uint8), np.zeros(size * size, dtype=bool)
    picture[number] = surface_albedo(field, occupancy, points, normals, cell, level)
    covered[number] = True
    return dilated(picture.reshape(size, size, 3), covered.reshape(size, size)), float(covered.mean())


def dilated(picture: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """Every texel outside of covered (S, S) takes the nearest one's colour: filters and mipmaps reach over borders."""
    rows, columns = distance_transform_edt(~covered, return_distances=False, return_indices=True)
    return picture[rows, columns]


def textured(
    field: Callable[..., FieldSamples],
    occupancy: OccupancyGrid,
    mesh: trimesh.Trimesh,
    level: float,
    config: MeshConfig,
) -> tuple[trimesh.Trimesh, dict[str, Any]]:
    """The mesh with a picture of the albedo in place of colours at the vertices, and facts about it.

    level: the density on the mesh.  Vertices on the border of charts are there once a chart, with the same normal.
    Where no texture coordinates can be had, a warning and the mesh as it is.
    """
    if config.texture_size == 0:
        return mesh, {"texture": None}
    print(f"mesh: texture coordinates, for at most {config.unwrap_limit_s:g} s", flush=True)
    try:
        layout = unwrap(np.asarray(mesh.vertices), np.asarray(mesh.faces), config.texture_size, config.unwrap_limit_s)
    except UnwrapFailed as error:
        print(f"warning: colours at the vertices instead of a texture: xatlas: {error}", flush=True)
        return mesh, {"texture": None, "texture_failed": str(error)}
    cell = 2 * occupancy.bound / config.resolution
    print("mesh: baking its colours", flush=True)
    picture, covered = bake(field, occupancy, mesh, layout, config.texture_size, cell, level)
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(picture))
    upwards = np.stack([layout.uv[:, 0], 1 - layout.uv[:, 1]], axis=1)  # as trimesh, OBJ and Blender have it
    made = trimesh.Trimesh(
        mesh.vertices[layout.source],
        layout.triangles,
        vertex_normals=mesh.vertex_normals[layout.source],
        visual=trimesh.visual.TextureVisuals(uv=upwards, material=material),
        process=False,
    )
    facts = {"size": config.texture_size, "charts": layout.charts, "covered": covered, "vertices": len(layout.source)}
    return made, {"texture": facts}
