from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from data.cameras import camera_rays, framing_distance, orbit_camera
from distill.mesh_views import SAMPLES, bilinear, colours_at, first_hits, mesh_views


def two_boxes() -> trimesh.Trimesh:
    """A red box before a larger blue one, seen from +x, each face with its own vertices."""
    near, far = trimesh.creation.box((0.2, 0.2, 0.2)), trimesh.creation.box((0.2, 0.6, 0.6))
    near.apply_translation((0.3, 0, 0))
    far.apply_translation((-0.2, 0, 0))
    colours = np.repeat([[255, 0, 0, 255], [0, 0, 255, 255]], [len(near.vertices), len(far.vertices)], axis=0)
    both = trimesh.util.concatenate([near, far])
    both.visual = trimesh.visual.ColorVisuals(both, vertex_colors=colours.astype(np.uint8))
    return both


def nearest_hit(triangles: np.ndarray, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """triangles (T, 3, 3), rays (R, 3) -> distances (R,), infinite where nothing is met."""
    a, b, c = triangles.swapaxes(0, 1)
    across = np.cross(directions[:, None], c - a)
    determinant = np.einsum("tj,rtj->rt", b - a, across)
    with np.errstate(divide="ignore", invalid="ignore"):
        from_a = origins[:, None] - a
        u = np.einsum("rtj,rtj->rt", from_a, across) / determinant
        turned = np.cross(from_a, b - a)
        v = np.einsum("rj,rtj->rt", directions, turned) / determinant
        t = np.einsum("tj,rtj->rt", c - a, turned) / determinant
    return np.where((u >= 0) & (v >= 0) & (u + v <= 1) & (t > 0), t, np.inf).min(axis=1)


@pytest.mark.parametrize(("azimuth", "elevation"), [(0.0, 0.0), (37.0, 25.0), (200.0, -40.0), (90.0, 80.0)])
def test_first_hits_are_those_of_a_ray_tracer(azimuth: float, elevation: float) -> None:
    """Every ray against every triangle (Moeller and Trumbore 1997)."""
    mesh = trimesh.creation.icosphere(subdivisions=2, radius=0.3) + two_boxes()
    c2w = orbit_camera(torch.tensor([azimuth]), torch.tensor([elevation]), framing_distance(0.6, 40.0))[0]
    size = 40
    seen = first_hits(mesh, c2w, 40.0, size)
    origins, directions = (x.reshape(-1, 3).double().numpy() for x in camera_rays(c2w, torch.tensor(40.0), size, size))
    nearest = nearest_hit(np.asarray(mesh.triangles), origins, directions)
    ours = np.full(size * size, np.inf)
    ours[seen.pixel] = seen.distance
    differs = ~np.isclose(nearest, ours, atol=1e-6)
    assert 200 < np.isfinite(ours).sum() < 1000
    assert differs.sum() <= 2, "a ray through a border may hit or miss it"
    places = np.einsum("ni,nij->nj", seen.weights, mesh.vertices[mesh.faces[seen.face]])
    assert np.allclose(places, origins[seen.pixel] + seen.distance[:, None] * directions[seen.pixel], atol=1e-9)


def test_nearer_faces_hide_those_behind_over_white() -> None:
    c2w = orbit_camera(torch.tensor([0.0, 180.0]), torch.tensor([0.0, 0.0]), torch.tensor(3.0))
    seen = mesh_views(two_boxes(), c2w, 30.0, 65)
    assert seen.rgb.shape == (2, 3, 65, 65) and seen.opacity.shape == seen.depth.shape == (2, 65, 65)
    front, back = seen.rgb[:, :, 32, 32]
    assert front.tolist() == [1, 0, 0] and back.tolist() == [0, 0, 1]
    assert seen.rgb[0, :, 32, 23].tolist() == [0, 0, 1] and seen.rgb[0, :, 0, 0].tolist() == [1, 1, 1]
    assert float(seen.depth[0, 32, 32]) == pytest.approx(2.6, abs=1e-3) and seen.depth[0, 0, 0] == 0
    assert float(seen.depth[1, 32, 32]) == pytest.approx(2.7, abs=1e-3)
    aslant = mesh_views(
        two_boxes(), orbit_camera(torch.tensor([20.0]), torch.tensor([30.0]), torch.tensor(3.0)), 30.0, 65
    )
    border = (aslant.opacity > 0) & (aslant.opacity < 1)
    assert border.any() and set((aslant.opacity[border] * SAMPLES**2).tolist()) <= set(range(1, SAMPLES**2))


def test_texture_is_upright() -> None:
    """v upwards, row 0 of the picture on top: a quad that faces +x, its texture red above and left of green."""
    quad = np.array([[0, -0.5, -0.5], [0, 0.5, -0.5], [0, 0.5, 0.5], [0, -0.5, 0.5]])
    picture = np.zeros((4, 4, 3), dtype=np.uint8)
    picture[:2, :2] = 255, 0, 0
    picture[2:, 2:] = 0, 255, 0
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(picture))
    uv = np.array([[0, 0], [1, 0], [1, 1], [0, 1.0]])
    mesh = trimesh.Trimesh(quad, [[0, 1, 2], [0, 2, 3]], process=False,
                           visual=trimesh.visual.TextureVisuals(uv=uv, material=material))  # fmt: skip
    c2w = orbit_camera(torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor(3.0))
    seen = mesh_views(mesh, c2w, 30.0, 64).rgb[0]
    assert seen[:, 24, 24].tolist() == [1, 0, 0] and seen[:, 40, 40].tolist() == [0, 1, 0]
    assert seen[:, 24, 40].tolist() == [0, 0, 0]


def test_bilinear_sampling() -> None:
    picture = np.arange(16, dtype=np.uint8).reshape(4, 4, 1).repeat(3, axis=2)
    assert np.allclose(bilinear(picture, np.array([[0.125, 0.875], [0.25, 0.75]]))[:, 0] * 255, [0, 2.5])


def test_colours_of_vertices_are_mixed() -> None:
    mesh = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]], process=False,
                           vertex_colors=np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=np.uint8))  # fmt: skip
    assert np.allclose(colours_at(mesh, np.array([0]), np.array([[0.5, 0.3, 0.2]])), [[0.5, 0.3, 0.2]])
