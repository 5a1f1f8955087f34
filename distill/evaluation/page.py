"""evaluation.html: the means, and every object with its pictures, the worst first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import trimesh

from data.cameras import camera_rays, orbit_camera
from distill import report
from distill.evaluation.measure import Measured
from distill.mesh_views import first_hits
from distill.turntable import to_bytes

SHOWN_VIEWS = 8  # of each object
FULL = 60  # objects with pictures; the page would be too heavy with more, and the table has all
SHADED, FOV_DEG = 160, 30.0  # pixels a side of a picture of a shape
GOOD_HIGH = ("psnr", "ssim", "f_score", "volume_iou", "clip", "mask_iou", "normal")


def worst_first(metrics: dict[str, dict[str, float | None]]) -> tuple[list[str], str]:
    """Names by what judges best of what there is: PSNR, else Chamfer distance; objects without it first."""
    for name, sign in (("psnr", 1), ("chamfer_l1", -1), ("chamfer", -1), ("consistency_psnr", 1)):
        if any(values.get(name) is not None for values in metrics.values()):

            def key(one: str, name: str = name, sign: int = sign) -> tuple[bool, float]:
                value = metrics[one].get(name)
                return value is not None, sign * (value or 0.0)

            return sorted(metrics, key=key), name
    return list(metrics), "name"


def write_page(path: Path, told: dict[str, Any], measured: dict[str, Measured]) -> None:
    """told: what evaluation.json holds."""
    objects = told["objects"]
    order, by = worst_first(objects)
    names = list(told["means"])
    rows = [[n, *(_rounded(m[k]) for k in ("mean", "low", "high")), m["objects"]] for n, m in told["means"].items()]
    means = report.table(
        ["metric", "mean", "low", "high", "objects"], rows,
        "Mean over objects, with its 95 % interval: by bootstrap over objects, of fewer than ten by Student's t.",
    )  # fmt: skip
    sections = [("Means", means + "".join(report.paragraphs(f"Not measured: {n}: {why}") for n, why in
                                          told["not_measured"].items()))]  # fmt: skip
    if told["by_azimuth"]:
        found = told["by_azimuth"]
        points = list(zip(found["azimuth_deg"], found["psnr"], strict=True))
        title = f"PSNR by azimuth from the reference; spread {found['spread_db']:.2f} dB"
        sections.append(("By azimuth", report.line_chart({"PSNR": points}, title, "degrees", "dB")))
    every = [[name, *(_rounded(objects[name].get(n)) for n in names)] for name in order]
    sections.append(("Objects, worst first", report.table(["object", *names], every, f"Ordered by {by}.")))
    for name in order[:FULL]:
        figures = pictures_of(measured[name])
        if figures:
            sections.append((name, report.gallery(figures)))
    rules = "\n".join(f"{what}: {how}" for what, how in told["conventions"].items())
    settings = "\n".join(f"{key}: {value}" for key, value in told["settings"].items())
    sections.append(("What was measured", report.code(f"{rules}\n\n{settings}")))
    intro = (
        f"{len(order)} objects of {told['settings']['pred']} against {told['settings']['truth'] or 'nothing'}; "
        f"{told['protocol']}."
    )
    report.write(path, report.page("Evaluation", intro, sections))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def pictures_of(found: Measured) -> list[str]:
    figures = []
    if found.pictures is not None:
        count = found.pictures.shape[1]
        chosen = np.unique(np.linspace(0, count - 1, min(count, SHOWN_VIEWS)).round().astype(int))
        rows = [np.concatenate(list(to_bytes(row)), axis=1) for row in found.pictures[:, chosen]]
        grid = np.concatenate(rows)
        words = "above the prediction, below the ground truth" if len(rows) == 2 else "the prediction"
        figures.append(report.picture(grid, words, "views", scale=1.0))
    if found.meshes is not None:
        rows = [shaded(mesh) for mesh in found.meshes]
        figures.append(report.picture(np.concatenate(rows), "shapes: the prediction above", "shapes", scale=1.0))
    return figures


def shaded(mesh: trimesh.Trimesh, views: int = 4) -> np.ndarray:
    """(S, views * S, 3) uint8: the shape lit from the camera, from 4 sides."""
    low, high = mesh.bounds
    radius = float(np.linalg.norm(high - low)) / 2
    pictures = []
    for number in range(views):
        c2w = orbit_camera(30.0 + number * 360 / views, 20.0, radius / np.sin(np.radians(FOV_DEG / 2))).double()
        c2w[:3, 3] += (low + high) / 2
        seen = first_hits(mesh, c2w.float(), FOV_DEG, SHADED)
        rays = camera_rays(c2w, np.float64(FOV_DEG), SHADED, SHADED)[1].reshape(-1, 3).numpy()
        light = np.abs(np.einsum("ki,ki->k", np.asarray(mesh.face_normals)[seen.face], rays[seen.pixel]))
        picture = np.full((SHADED * SHADED, 3), 255, dtype=np.uint8)
        picture[seen.pixel] = (40 + 200 * light[:, None]).astype(np.uint8)
        pictures.append(picture.reshape(SHADED, SHADED, 3))
    return np.concatenate(pictures, axis=1)
