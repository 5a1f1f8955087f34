"""Whatever marching cubes and decimation make of noise comes out as a closed surface with one side."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh
from scipy.ndimage import gaussian_filter

from distill.manifold import areas, decimated, faults, large_pieces, signed_volumes, sound
from distill.mesh import isosurface


def sponge(seed: int, smooth: float, cells: int = 40) -> tuple[np.ndarray, np.ndarray]:
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(cells,) * 3), smooth)
    return large_pieces(*sound(*isosurface(np.exp(noise / noise.std()), 1.2, 0.5)), 0.02)


@pytest.mark.parametrize(("seed", "smooth"), [(0, 0.4), (1, 1.0), (2, 2.0)])
@pytest.mark.parametrize("share", [0.5, 0.1, 0.02])
def test_fewer_triangles_still_close(seed: int, smooth: float, share: float) -> None:
    vertices, triangles = sponge(seed, smooth)
    assert faults(vertices, triangles) == {}
    fewer = decimated(vertices, triangles, int(share * len(triangles)), 0.02)
    assert faults(*fewer) == {} and len(fewer[1]) < 0.8 * len(triangles)
    mesh = trimesh.Trimesh(*fewer, process=False)
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.volume > 0


def test_what_touches_comes_apart() -> None:
    """Two cubes with a common edge, and two with a common corner: each edge has two faces, each corner one fan."""
    for shift in ((1, 1, 0), (1, 1, 1)):
        two = [trimesh.creation.box(), trimesh.creation.box()]
        two[1].apply_translation(shift)
        joined = trimesh.util.concatenate(two)
        joined.merge_vertices()
        assert len(joined.vertices) == (14 if shift == (1, 1, 0) else 15)
        vertices, triangles = sound(joined.vertices, joined.faces)
        assert faults(vertices, triangles) == {} and len(vertices) == 16 and len(triangles) == 24
        assert len(np.unique(vertices.round(5), axis=0)) == 16  # not in one place either
        assert trimesh.Trimesh(vertices, triangles, process=False).body_count == 2


def test_an_edge_that_joins_its_ends_twice_is_parted() -> None:
    """A ring of four cubes round an edge, two of them left out, with a roof and a floor that join their fans."""
    filled = np.zeros((4, 4, 5))
    filled[1, 1, 1:4] = filled[2, 2, 1:4] = 1
    filled[1:3, 1:3, 0] = filled[1:3, 1:3, 4] = 1
    boxes = trimesh.voxel.ops.matrix_to_marching_cubes(np.pad(filled, 1))
    vertices, triangles = sound(boxes.vertices, boxes.faces)
    assert faults(vertices, triangles) == {}


def test_folds_cancel_and_faults_are_counted() -> None:
    box = trimesh.creation.box()
    assert faults(box.vertices, box.faces) == {}
    fold = np.concatenate([box.faces, box.faces[:1, ::-1], box.faces[:1], [[0, 0, 1]]])
    assert {"shared by three or more", "twice", "flat"} <= set(faults(box.vertices, fold))
    vertices, triangles = sound(box.vertices, fold)
    assert faults(vertices, triangles) == {} and len(triangles) == 12
    assert faults(box.vertices, box.faces[1:]) == {"open": 3}
    turned = box.faces.copy()
    turned[0] = turned[0, ::-1]
    assert faults(box.vertices, turned) == {"turned over": 3}


def test_an_open_surface_stays_open_and_is_decimated() -> None:
    ball = trimesh.creation.icosphere(4)
    half = ball.faces[ball.triangles_center[:, 2] > 0]
    vertices, triangles = large_pieces(*sound(ball.vertices, half), 0.0)
    assert set(faults(vertices, triangles)) == {"open"}
    fewer = decimated(vertices, triangles, 400, 0.0)
    assert set(faults(*fewer)) == {"open"} and len(fewer[1]) < 500


def test_nothing_is_left_of_nothing_and_of_hollows() -> None:
    none = np.zeros((0, 3), dtype=np.int64)
    hollow = trimesh.creation.icosphere(1)
    hollow.invert()
    for vertices, triangles in ((hollow.vertices, none), (hollow.vertices, hollow.faces)):
        assert [len(part) for part in large_pieces(vertices, triangles, 0.02)] == [0, 0]
    assert [len(part) for part in sound(hollow.vertices, none)] == [0, 0]
    assert [len(part) for part in sound(hollow.vertices, np.array([[0, 0, 1]]))] == [0, 0]


def test_hollows_and_crumbs_go() -> None:
    ball, hollow, crumb = (trimesh.creation.icosphere(n, r) for n, r in ((4, 1.0), (4, 0.5), (1, 0.1)))
    hollow.invert()
    crumb.apply_translation((2, 0, 0))
    whole = trimesh.util.concatenate([ball, hollow, crumb])
    vertices, triangles = large_pieces(whole.vertices, whole.faces, 0.05)
    assert len(triangles) == len(ball.faces)
    assert signed_volumes(vertices, triangles).sum() == pytest.approx(ball.volume)
    assert areas(vertices, triangles).sum() == pytest.approx(ball.area)
