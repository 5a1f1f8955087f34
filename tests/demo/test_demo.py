"""The whole road with real parts, in its smallest form: apt's objects, Blender, DeepSpeed, SDS, mesh, report."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill.mesh import load_glb

ROOT = Path(__file__).resolve().parents[2]


RENDER = ["resolution=32", "samples=1", "rings=1", "views_per_ring=4", "references=2", "eval_views=8", "limit=3",
          "names=[cactus,teddyBear,cupcake]"]  # fmt: skip
TRAIN = ["steps=2", "batch_size=2", "micro_batch_size=1", "data.image_size=32", "model.autoencoder.latent_channels=8",
         "model.unet.cross_attention_dim=8", "validation.sample_steps=2", "validation.sample_objects=1",
         "model.unet.block_out_channels=[32,64]", "model.unet.heads=[1,2]"]  # fmt: skip
GENERATE = ["steps=3", "schedule.resolutions=[16,32]", "mesh.resolution=32", "turntable.frames=4", "turntable.size=32"]


def overrides(step: str, *values: str) -> str:
    """One step's own overrides as Hydra takes them: a list of quoted strings."""
    return f"{step}=[{','.join(repr(value) for value in values)}]"


def command(out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "demo/run.py", f"out={out}",
        overrides("render", *RENDER),
        overrides("small", "image_size=32", "latent_channels=8", "embed_dim=8"),
        overrides("stage1", *TRAIN),
        overrides("stage2", *TRAIN),
        overrides("generate", *GENERATE),
        *more,
    ]  # fmt: skip


def demo(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *more), cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)


@pytest.mark.slow
def test_the_whole_road_and_again(tmp_path) -> None:
    """Killed as soon as the first shards are there, then run to the end, then again."""
    out = tmp_path / "demo"
    process = subprocess.Popen(command(out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (out / "shards" / "manifest.json").is_file():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait(timeout=60)
    done = demo(out, "strict=false")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "[1/8] render: done already" in done.stdout
    page = (out / "report.html").read_text()
    for words in ("Verdict", "Metrics", "loss per branch", "mesh.glb"):
        assert words in page
    proof = json.loads((out / "proof.json").read_text())
    assert len(proof["objects"]) == 3 and len(proof["samples_db"][0]) == 3
    assert set(proof["baselines_db"]) == {"white", "mean object"}
    assert len(load_glb(out / "distill" / "mesh.glb").faces) > 0
    # Two steps of training prove nothing, and the demo must say so.  What is gone is made again.
    shutil.rmtree(out / "distill")
    again = demo(out)
    assert again.stdout.count("done already") == 7, again.stdout[-3000:]
    assert again.returncode == 2 and "error: the demo missed its bars" in again.stderr, again.stderr[-3000:]
