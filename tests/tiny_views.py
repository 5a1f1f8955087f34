"""Objects drawn with numpy, as data/render.py leaves them, for tests and benchmarks that need no Blender."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.cameras import framing_distance, orbit_camera

OBJECTS, SIZE = 4, 32


def draw_views(folder: Path, name: str = "object", seed: int = 0) -> None:
    """Objects whose colour tells the object and whose shading tells the azimuth."""
    rng = np.random.default_rng(seed)
    for number in range(OBJECTS):
        uid = f"{name}{number}"
        (folder / uid).mkdir(parents=True)
        colour = rng.uniform(40, 220, 3)
        views = []
        plan = [("ring", ring, i, 90.0 * i + 20 * ring) for ring in range(2) for i in range(4)]
        plan += [("eval", None, i, 90.0 * i) for i in range(4)]
        plan += [("reference", None, i, 20.0 * i) for i in range(2)] + [("eval_reference", None, 0, 10.0)]
        for index, (role, ring, i, azimuth) in enumerate(plan):
            y, x = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
            inside = (x**2 + y**2) < 0.15
            shade = 0.7 + 0.3 * np.cos(np.radians(azimuth) + 4 * x)
            rgba = np.concatenate([colour * shade[..., None], 255.0 * inside[..., None]], axis=-1).astype(np.uint8)
            Image.fromarray(rgba).save(folder / uid / f"{index:03d}.png")
            distance = framing_distance(0.58, 40.0)
            c2w = orbit_camera(torch.tensor(azimuth), torch.tensor(15.0), distance)
            views.append(
                {
                    "file": f"{index:03d}.png",
                    "role": role,
                    "ring": ring,
                    "index": i,
                    "azimuth_deg": azimuth,
                    "elevation_deg": 15.0,
                    "fov_deg": 40.0,
                    "distance": float(distance),
                    "c2w": c2w.tolist(),
                }
            )
        meta = {"uid": uid, "source": "test", "license": "CC0", "creator": "", "caption": uid, "category": "",
                "resolution": SIZE, "fingerprint": "", "views": views}  # fmt: skip
        (folder / uid / "meta.json").write_text(json.dumps(meta))
