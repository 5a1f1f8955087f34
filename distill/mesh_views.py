"""Pictures of a mesh as the cameras see it, unlit: its albedo over white, on any machine, without a graphics driver.

Shapes: V views, S pixels a side, K pixels that the mesh covers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import trimesh
from torch import Tensor

from data.cameras import camera_rays
from distill.glb import picture_of
from distill.silhouette import filled, project

SAMPLES = 2  # a side of each pixel: borders are as soft as the renderer's


class MeshViews(NamedTuple):
    """V pictures of the mesh."""

    rgb: Tensor  # (V, 3, S, S) in [0, 1], sRGB, over white
    opacity: Tensor  # (V, S, S) in [0, 1], the covered share of the pixel
    depth: Tensor  # (V, S, S) mean distance from the camera where it is covered, object units; 0 elsewhere


class Hits(NamedTuple):
    """What the rays through the centres of K pixels meet first."""

    pixel: np.ndarray  # (K,) row * S + column
    face: np.ndarray  # (K,)
    weights: np.ndarray  # (K, 3) barycentric
    distance: np.ndarray  # (K,) object units


def mesh_views(mesh: trimesh.Trimesh, c2w: Tensor, fov_deg: Tensor | float, size: int) -> MeshViews:
    """c2w (V, 4, 4) of cameras that have the whole mesh before them, fov_deg (V,) or one number, vertical."""
    fov = torch.as_tensor(fov_deg, dtype=torch.float32).expand(len(c2w))
    fine = size * SAMPLES
    pictures = np.zeros((len(c2w), fine * fine, 5), dtype=np.float32)
    for picture, pose, angle in zip(pictures, c2w.float(), fov.tolist(), strict=True):
        seen = first_hits(mesh, pose, angle, fine)
        picture[seen.pixel, :3] = colours_at(mesh, seen.face, seen.weights)
        picture[seen.pixel, 3], picture[seen.pixel, 4] = 1, seen.distance
    image = torch.from_numpy(pictures).view(len(c2w), size, SAMPLES, size, SAMPLES, 5).mean(dim=(2, 4))
    opacity = image[..., 3]
    rgb = image[..., :3] + 1 - opacity[..., None]
    return MeshViews(rgb.permute(0, 3, 1, 2), opacity, image[..., 4] / opacity.clamp(min=1e-6))


def first_hits(mesh: trimesh.Trimesh, c2w: Tensor, fov_deg: float, size: int) -> Hits:
    """c2w (4, 4) -> the nearest faces, either side, on the rays through the centres of size x size pixels."""
    vertices = np.asarray(mesh.vertices)
    corners = vertices[mesh.faces]
    rays = camera_rays(c2w, torch.tensor(fov_deg), size, size)
    origins, directions = (x.reshape(-1, 3).double().numpy() for x in rays)
    parts = []
    for face, pixel, _ in filled(project(vertices, c2w.double().numpy(), fov_deg, size)[mesh.faces], size):
        a, b, c = corners[face].swapaxes(0, 1)
        normal, toward = np.cross(b - a, c - a), directions[pixel]
        slope = np.einsum("ni,ni->n", toward, normal)
        distance = np.einsum("ni,ni->n", a - origins[pixel], normal) / np.where(slope == 0, np.inf, slope)
        parts.append((pixel, face, np.where(slope == 0, np.inf, distance)))
    pixel, face, distance = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((distance, pixel))
    first = order[np.unique(pixel[order], return_index=True)[1]]
    pixel, face, distance = pixel[first], face[first], distance[first]
    place = origins[pixel] + distance[:, None] * directions[pixel]
    return Hits(pixel, face, trimesh.triangles.points_to_barycentric(corners[face], place), distance)


def colours_at(mesh: trimesh.Trimesh, faces: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Colours (N, 3) in [0, 1], sRGB, of places on `faces` (N,) with barycentric `weights` (N, 3)."""
    picture, visual = picture_of(mesh), mesh.visual
    values: Any = getattr(visual, "vertex_colors", None) if picture is None else getattr(visual, "uv", None)
    mixed = np.einsum("ni,nij->nj", weights, np.asarray(values, dtype=np.float64)[mesh.faces[faces]])
    return mixed[:, :3] / 255 if picture is None else bilinear(picture, mixed)


def bilinear(picture: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """picture (H, W, 3) uint8, uv (N, 2) with v upwards, held at the border -> (N, 3) in [0, 1]."""
    height, width = picture.shape[:2]
    x, y = uv[:, 0] * width - 0.5, (1 - uv[:, 1]) * height - 0.5
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    colour = np.zeros((len(uv), 3))
    for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
        share = (x - column if dx else 1 - x + column) * (y - row if dy else 1 - y + row)
        texel = picture[np.clip(row + dy, 0, height - 1), np.clip(column + dx, 0, width - 1)]
        colour += share[:, None] * texel / 255
    return colour
