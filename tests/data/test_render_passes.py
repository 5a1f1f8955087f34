"""Normals, depth and light of a really rendered sphere against the ray through each pixel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from data.cameras import camera_rays
from data.rendering import RADIUS, RenderConfig, render_all

pytestmark = pytest.mark.slow
SIZE = 64
SMALL = {"resolution": SIZE, "rings": 2, "views_per_ring": 4, "references": 1, "eval_views": 0, "processes": 1}


@pytest.fixture(scope="module")
def sphere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The views of a sphere, whose scaled surface is that of radius RADIUS around the origin."""
    folder = tmp_path_factory.mktemp("sphere")
    (folder / "in").mkdir()
    mesh = trimesh.creation.icosphere(subdivisions=5, radius=3)
    mesh.export(folder / "in" / "sphere.glb", include_normals=True)
    settings = {"normals": True, "depth": True, "samples": 16, "fov_deg": [20, 50], "framing": [0.6, 0.7]}
    render_all(RenderConfig(source=str(folder / "in"), out=str(folder / "out"), **(SMALL | settings)))  # type: ignore[arg-type]
    return folder / "out" / "sphere"


def expected(view: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether each pixel's ray meets the sphere well away from its outline; normal (H, W, 3) and depth (H, W)."""
    c2w = torch.tensor(view["c2w"], dtype=torch.float64)
    origins, rays = (x.numpy() for x in camera_rays(c2w, torch.tensor(view["fov_deg"]).double(), SIZE, SIZE))
    nearest = (-origins * rays).sum(-1)
    room = RADIUS**2 - ((origins + nearest[..., None] * rays) ** 2).sum(-1)
    points = origins + (nearest - np.sqrt(np.maximum(room, 0)))[..., None] * rays
    seen = (points - origins) @ c2w[:3, :3].numpy()
    normals = points / RADIUS @ c2w[:3, :3].numpy()
    return (room > 0) & (normals[..., 2] > 0.5), normals, -seen[..., 2]


def test_normals_and_depth_are_those_of_the_sphere(sphere: Path) -> None:
    meta = json.loads((sphere / "meta.json").read_text())
    assert meta["faces"] == 20480
    for view in meta["views"]:
        sure, normals, depth = expected(view)
        assert sure.sum() > 300
        alpha = np.asarray(Image.open(sphere / view["file"]))[..., 3]
        coded = np.asarray(Image.open(sphere / view["normal"]))
        assert coded.dtype == np.uint8 and coded.shape == (SIZE, SIZE, 4)
        assert np.abs(coded[..., 3].astype(int) - alpha).max() <= 1
        found = coded[..., :3] / 255 * 2 - 1
        assert np.abs(found - normals)[sure].max() < 0.06, view["file"]
        with Image.open(sphere / view["depth"]) as picture:
            assert picture.mode == "I;16"
            steps = np.asarray(picture)
        # The pass holds the first sample, anywhere in its pixel: up to a pixel away, on a slope of up to 60 deg.
        pixel = 2 * view["distance"] * np.tan(np.radians(view["fov_deg"]) / 2) / SIZE
        error = (steps * meta["depth_scale"] - depth)[sure]
        assert np.abs(error).max() < 2 * pixel and np.abs(error.mean()) < 0.1 * pixel, view["file"]
        assert steps[alpha == 0].max() == 0 and steps[sure].min() > 0
        assert view["distance"] + RADIUS < 65535.5 * meta["depth_scale"]


def test_pictures_are_the_same_with_and_without_normals(sphere: Path, tmp_path: Path) -> None:
    settings = {"samples": 16, "fov_deg": [20, 50], "framing": [0.6, 0.7]}
    source = str(sphere.parents[1] / "in")
    render_all(RenderConfig(source=source, out=str(tmp_path), **(SMALL | settings)))  # type: ignore[arg-type]
    meta = json.loads((tmp_path / "sphere" / "meta.json").read_text())
    assert "depth_scale" not in meta and not list((tmp_path / "sphere").glob("*_*.png"))
    for view in meta["views"]:
        assert "normal" not in view and "depth" not in view
        assert (tmp_path / "sphere" / view["file"]).read_bytes() == (sphere / view["file"]).read_bytes()


def test_sampled_light_shines_from_where_meta_says(sphere: Path, tmp_path: Path) -> None:
    """Of two suns the stronger one's side is brighter, in sRGB values of a white sphere seen from around."""
    render_all(
        RenderConfig(
            source=str(sphere.parents[1] / "in"), out=str(tmp_path), light="sampled", sky_strength=[0.1, 0.2],
            sun_strength=[0.5, 1.5], normals=True, samples=16, seed=3, **SMALL,  # type: ignore[arg-type]
        )
    )  # fmt: skip
    meta = json.loads((tmp_path / "sphere" / "meta.json").read_text())
    assert 0.1 <= meta["light"]["sky"] <= 0.2 and len(meta["light"]["suns"]) == 2
    towards = np.array([np.array(sun["towards"]) * sun["strength"] for sun in meta["light"]["suns"]])
    np.testing.assert_allclose([np.linalg.norm(sun["towards"]) for sun in meta["light"]["suns"]], 1, atol=1e-9)
    agreement = []
    for view in meta["views"]:
        picture = np.asarray(Image.open(tmp_path / "sphere" / view["file"])).astype(float)
        sure, normals, _ = expected(view)
        world = normals @ np.array(view["c2w"])[:3, :3].T
        irradiance = np.maximum(world @ towards.T, 0).sum(-1)
        agreement.append(np.corrcoef(irradiance[sure], picture[..., :3].mean(-1)[sure])[0, 1])
    assert np.median(agreement) > 0.9, agreement
