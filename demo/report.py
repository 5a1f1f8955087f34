"""report.html of the demo: what went in, what came out, and whether it is good enough, in one offline file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.files import read_json
from distill import report

LOSSES_SHOWN = ("sds", "orientation")


def verdict(proof: dict[str, Any]) -> tuple[bool, str]:
    """(passed, words)."""
    number = proof["objects"].index(proof["distilled"])
    baselines = {name: values[number] for name, values in proof["baselines_db"].items()}
    compared = ", ".join(f"{name} {value:.1f}" for name, value in baselines.items())
    words = (
        f"{proof['distilled']} distilled: {proof['distilled_db'][number]:.1f} dB on {proof['views']} held-out views, "
        f"its mesh {proof['mesh_db'][number]:.1f} dB ({compared}); "
        f"2D samples of {len(proof['objects'])} objects: {proof['samples_margin_mean_db']:+.1f} dB over the better "
        "baseline on average"
    )
    failed = [name for name, ok in proof["checks"].items() if not ok]
    return proof["passed"], words + (f". Missed: {'; '.join(failed)}" if failed else "")


def read_lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def stage_charts(out: Path) -> str:
    parts = []
    for stage in ("stage1", "stage2"):
        rows = read_lines(out / stage / "metrics.jsonl")
        names = sorted({key for row in rows for key in row if key.startswith("loss/")})
        series = {
            name.removeprefix("loss/"): [(row["global_step"], row[name]) for row in rows if name in row]
            for name in names
        }
        parts.append(report.line_chart(series, f"{stage}: loss per branch", "step", "loss"))
    return report.gallery(parts)


def distillation_charts(out: Path) -> str:
    rows = read_json(out / "distill" / "losses.json", "losses")
    parts = []
    for name in LOSSES_SHOWN:
        points = [(float(i), float(row[name])) for i, row in enumerate(rows) if name in row]
        if points:
            parts.append(report.line_chart({name: points}, f"distillation: {name} loss", "step", "loss", log_y=True))
    return report.gallery(parts)


def metrics_tables(proof: dict[str, Any]) -> str:
    objects = proof["objects"]
    rows = []
    for i, uid in enumerate(objects):
        distilled = proof["distilled_db"][i]
        base = [values[i] for values in proof["baselines_db"].values()]
        rows.append(
            [uid, *base, proof["samples_db"][i][i], proof["samples_margin_db"][i], distilled, proof["mesh_db"][i]]
        )
    headers = ["object", *proof["baselines_db"], "2D samples", "margin", f"NeRF of {proof['distilled']}", "its mesh"]
    return (
        report.table(
            headers,
            [[round(cell, 2) if isinstance(cell, float) else cell for cell in row] for row in rows],
            f"Mean PSNR in dB over {proof['views']} posed views that were never trained on.",
            highlight=objects.index(proof["distilled"]),
        )
        + report.matrix(objects, proof["samples_db"], "2D samples (rows) against every object's renders, dB.")
        + report.table(
            ["DDIM steps", "margin, dB"],
            [[steps, round(margin, 2)] for steps, margin in proof["samples_margin_mean_db_by_steps"].items()],
            "2D samples over the better baseline, mean over objects, by the number of sampling steps.",
        )
        + report.table(["check", "passed"], [[name, ok] for name, ok in proof["checks"].items()], "The demo's bars.")
    )


def timings(out: Path) -> str:
    rows = []
    for path in sorted((out / "steps").glob("*.json"), key=lambda p: p.stat().st_mtime):
        record = read_json(path, "step record")
        rows.append([path.stem, record["seconds"], record["peak_mib"], " ".join(record["command"])])
    return report.table(["step", "seconds", "MiB, largest process", "command"], rows, "What each step took.")


def write_demo_report(out: Path) -> Path:
    proof = read_json(out / "proof.json", "proof")
    ok, words = verdict(proof)
    uid = proof["distilled"]
    samples = [
        report.picture(
            out / "pictures" / "samples" / f"{name}.png",
            f"{name}: reference and {proof['views']} sampled views, over the renders they should match",
            f"sampled views of {name}",
            scale=2,
        )
        for name in proof["objects"]
    ]
    sections = [
        ("Verdict", report.verdict(ok, words)),
        (
            "From one picture to a mesh",
            report.gallery(
                [
                    report.picture(out / "reference.png", "the reference: only its embedding is used", "reference"),
                    report.video(out / "distill" / "turntable.mp4", "the distilled NeRF: colour beside normals"),
                    report.glb_viewer(out / "distill" / "mesh.glb", "mesh.glb: drag to turn"),
                ]
            )
            + report.picture(
                out / "pictures" / "distilled.png",
                f"{uid}: the NeRF and its mesh at held-out poses, over the renders they should match",
                "NeRF and mesh over ground truth",
                scale=2,
            ),
        ),
        ("Views sampled from the embedding and poses alone", "".join(samples)),
        ("Metrics", metrics_tables(proof)),
        ("Losses", stage_charts(out) + distillation_charts(out)),
        ("Timings", timings(out)),
        (
            "Configuration",
            "".join(
                f"<details><summary>{name}</summary>{report.code((out / name / 'config.yaml').read_text())}</details>"
                for name in ("stage1", "stage2", "distill")
            ),
        ),
    ]
    sampling = proof["sample_steps"]
    intro = (
        "Real objects were rendered, packed into shards, and a small multi-view diffusion model was trained on them "
        "from scratch in two stages; one object was then distilled from the embedding of one picture.\n\n"
        "The model is tiny and has seen only these objects, from other poses and in other pictures than the ones shown "
        "here: this shows that the whole road works, not how well a full-size model generalises. Its image encoder is "
        "a random network whose last layer was fitted to tell these objects apart, its autoencoder is linear, views "
        f"are drawn in {sampling} DDIM steps without guidance, close to the model's mean picture."
    )
    path = out / "report.html"
    report.write(path, report.page("Isotropic3D demo", intro, sections))
    return path
