"""report.html of one or many distilled objects: what went in, what came out, and how it went, in one offline file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from data.files import read_json
from distill import report
from models.reference_image import on_white, read_picture

REFERENCE = 512  # pixels a side, at most, that a page shows of the reference
LOSSES = ("sds", "orientation", "sparsity", "opaque", "depth_variance")


def write_page(path: Path, outs: list[Path], failed: Mapping[str, str] | None = None) -> None:
    """outs: folders that distill/generate.py has finished; failed: of others, why they have no mesh, {out: words}."""
    sections = [(out.name, of_object(out)) for out in outs]
    if failed:
        rows = [[Path(out).name, words] for out, words in failed.items()]
        sections.insert(0, ("Without a mesh", report.table(["object", "reason"], rows, "Give the same command again.")))
    if len(outs) == 1:
        config = (outs[0] / "config.yaml").read_text()
        sections += [
            ("By azimuth", by_azimuth(outs[0])),
            ("Losses", losses(outs[0])),
            ("Configuration", report.code(config)),
        ]
    title = outs[0].name if len(outs) == 1 else f"{len(outs)} objects"
    intro = (
        "Distilled from one embedding each by score distillation; no pixel of the picture is used. The "
        "mesh can be turned; the video shows the NeRF that it was made from, colour beside normals."
    )
    report.write(path, report.page(title, intro, [("Overview", overview(outs)), *sections]))


def overview(outs: list[Path]) -> str:
    rows = []
    for out in outs:
        result: Any = read_json(out / "result.json", "result")
        seconds, mesh = result["seconds"], result["mesh"]
        minutes = round((seconds["distil"] + seconds["mesh"] + seconds["turntable"]) / 60, 2)
        rows.append([out.name, result["steps"], minutes, mesh["vertices"], mesh["faces"], mesh["watertight"],
                     number_of(result["isotropy"]["spread"]), result["device"]])  # fmt: skip
    headers = ["object", "steps", "minutes", "vertices", "faces", "watertight", "spread over azimuth", "device"]
    return report.table(headers, rows, "Minutes are of this start alone: distilling, mesh and turntable.")


def number_of(value: float | None) -> float:
    """JSON has no NaN: result.json has null where a number was not finite."""
    return math.nan if value is None else value


def of_object(out: Path) -> str:
    image = OmegaConf.load(out / "config.yaml").image  # none where an embedding was given
    figures = [
        report.glb_viewer(out / "mesh.glb", "mesh.glb: drag to turn"),
        report.video(out / "turntable.mp4", "the NeRF: colour beside normals"),
    ]
    if image is not None and Path(image).is_file():
        small = on_white(read_picture(Path(image)))
        small.thumbnail((REFERENCE, REFERENCE))
        figures.insert(0, report.picture(np.asarray(small), "the reference: only its embedding is used", "reference"))
    return report.gallery(figures)


def by_azimuth(out: Path) -> str:
    found: Any = read_json(out / "result.json", "result")["isotropy"]
    points = [(azimuth, number_of(error)) for azimuth, error in zip(found["azimuth_deg"], found["error"], strict=True)]
    title = f"what the model still wants changed, by azimuth from the front; spread {number_of(found['spread'])}"
    return report.line_chart({"error": points}, title, "degrees", "error")


def losses(out: Path) -> str:
    rows: Any = read_json(out / "losses.json", "losses")
    parts = []
    for name in LOSSES:
        points = [(float(row["step"]), float(row[name])) for row in rows if name in row]
        if points:
            parts.append(report.line_chart({name: points}, f"{name} loss", "step", "loss", log_y=True))
    return report.gallery(parts)
