"""Several images in one call: together in one batch, one after the other, and when one of them fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_model import TINY, command, config

from data.files import UserError
from distill.config import GenerateConfig, joined_words
from distill.distillation import Scene, camera_ranges, distil, distil_together, step_together
from distill.isotropy import isotropy
from distill.many import jobs_of
from distill.snapshot import FILE, load_snapshot, new_run
from models.checkpoint import load_export


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "pictures of things"
    folder.mkdir()
    paths = [folder / name for name in ("one.png", "two, it's.png", "three.png")]
    for number, path in enumerate(paths):
        Image.fromarray(np.full((40, 40, 3), 60 * number + 50, dtype=np.uint8)).save(path)
    return paths


def scenes(tmp_path: Path, contexts: list[torch.Tensor]) -> list[Scene]:
    settings = [config(tmp_path / str(number)) for number in range(len(contexts))]
    return [Scene(new_run(one, "cpu"), context, Path(one.out), "x")
            for one, context in zip(settings, contexts, strict=True)]  # fmt: skip


def test_together_each_learns_what_it_learns_alone(checkpoint: Path, tmp_path: Path) -> None:
    """Also from different steps on, as after a kill."""
    model, contexts = load_export(checkpoint), [torch.randn(1, 1, 24), torch.randn(1, 1, 24)]
    alone = scenes(tmp_path / "alone", contexts)
    for scene, context in zip(alone, contexts, strict=True):
        distil(scene.run, model, context, config(scene.out), "x")
    together = scenes(tmp_path / "together", contexts)
    for _ in range(3):  # the first is ahead, as after a kill
        step_together(together[:1], model, camera_ranges(config(tmp_path), model.info), config(tmp_path))
    assert distil_together(together, model, config(tmp_path)) == 0
    for one, other in zip(alone, together, strict=True):
        assert [row["t"] for row in one.run.losses] == [row["t"] for row in other.run.losses]
        assert [row["loss"] for row in one.run.losses] == pytest.approx(
            [row["loss"] for row in other.run.losses], rel=1e-3
        )
        assert other.run.step == 8 and (other.out / FILE).is_file()


def test_a_nan_stops_its_object_alone(checkpoint: Path, tmp_path: Path) -> None:
    model = load_export(checkpoint)
    both = scenes(tmp_path, [torch.full((1, 1, 24), float("nan")), torch.randn(1, 1, 24)])
    before = both[0].run.field.table.detach().clone()
    assert distil_together(both, model, config(tmp_path)) == 0
    assert "step 0: sds is not finite" in both[0].failed and not both[1].failed
    assert torch.equal(both[0].run.field.table, before) and both[0].run.step == 0 and both[1].run.step == 8
    again = new_run(config(tmp_path / "0"), "cpu")
    assert load_snapshot(tmp_path / "0" / FILE, again, "x"), "with a snapshot of its last sound step"
    assert all(torch.isfinite(p).all() for p in both[1].run.field.parameters())


def test_words_that_are_pictures() -> None:
    assert joined_words(["image=a.png", "out=x"]) == ["image=a.png", "out=x"]
    words = joined_words(["image=a.png", "b c.png", "it's.png", "--cfg", "job", "out=x"])
    assert words == ["image=a.png", "--cfg", "job", "out=x", "more_images=['b c.png','it\\'s.png']"]


def test_which_images_go_where(pictures: list[Path], tmp_path: Path) -> None:
    folder = pictures[0].parent
    (folder / "notes.txt").write_text("no picture")
    given = GenerateConfig(checkpoint="c", image=str(folder), out="meshes")
    assert [(Path(job.image).name, job.out) for job in jobs_of(given)] == [
        ("one.png", "meshes/one"), ("three.png", "meshes/three"), ("two, it's.png", "meshes/two, it's"),
    ]  # fmt: skip
    single = GenerateConfig(checkpoint="c", image=str(pictures[0]), out="mesh")
    assert jobs_of(single) == [single]
    same = GenerateConfig(checkpoint="c", image="a/one.png", more_images=["b/one.jpg"], out="meshes")
    with pytest.raises(UserError, match="one is the name of two pictures"):
        jobs_of(same)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is a folder without pictures"):
        jobs_of(GenerateConfig(checkpoint="c", image=str(tmp_path / "empty"), out="meshes"))


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 2])
def test_three_images_of_which_one_is_broken(
    checkpoint: Path, pictures: list[Path], tmp_path: Path, at_once: int
) -> None:
    pictures[2].write_text("no picture")
    out = tmp_path / "meshes"
    full = command(f"checkpoint={checkpoint}", f"image={pictures[0]}", *map(str, pictures[1:]), f"out={out}", "steps=6",
                   f"objects_at_once={at_once}", *TINY)  # fmt: skip
    done = subprocess.run(full, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "three.png is not a picture" in done.stdout + done.stderr and "2 of 3 images have a mesh" in done.stdout
    made = [out / path.stem for path in pictures[:2]]
    for folder in made:
        assert (folder / "mesh.glb").is_file() and (folder / "report.html").is_file()
        assert json.loads((folder / "result.json").read_text())["steps"] == 6
    page = (out / "report.html").read_text()
    assert page.count("<canvas") == 2 and "two, it&#x27;s" in page
    stamps = [(folder / "mesh.glb").stat().st_mtime_ns for folder in made]
    again = subprocess.run(full, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == 1 and again.stdout.count("is finished; nothing to do") == 2
    assert stamps == [(folder / "mesh.glb").stat().st_mtime_ns for folder in made]


@pytest.mark.slow
def test_a_queue_that_is_killed_or_asked_to_leave_goes_on(
    checkpoint: Path, pictures: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "meshes"
    full = command(f"checkpoint={checkpoint}", f"image={pictures[0].parent}", f"out={out}", "steps=40",
                   "snapshot_every=2", *TINY)  # fmt: skip
    for number, ends in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
        process = subprocess.Popen(full, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        began, deadline = len(list(out.glob("*/" + FILE))), time.monotonic() + 400
        while len(list(out.glob("*/" + FILE))) == began and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, number)
        assert process.wait(timeout=300) == ends
        assert len(list(out.glob("*/result.json"))) < 3
    done = subprocess.run(full, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*/result.json"))]
    assert [result["steps"] for result in results] == [40] * 3 and any(result["continued"] for result in results)


def test_asynchronous_score_distillation_learns_something_else(checkpoint: Path, tmp_path: Path) -> None:
    model, context = load_export(checkpoint), torch.randn(1, 1, 24)
    losses = []
    for method in ("sds", "asd"):
        settings = config(tmp_path / method)
        settings.guidance.method = method
        run = new_run(settings, "cpu")
        distil(run, model, context, settings, "x")
        losses.append([row["loss"] for row in run.losses])
    assert losses[0][0] != losses[1][0] and all(np.isfinite(losses[1]))


def test_isotropy_has_an_error_for_each_azimuth(checkpoint: Path, tmp_path: Path) -> None:
    model = load_export(checkpoint)
    settings = config(tmp_path)
    run = new_run(settings, "cpu")
    found = isotropy(run, model, torch.randn(1, 1, 24), camera_ranges(settings, model.info), 32)
    assert found["azimuth_deg"][:2] == [0, 22.5] and len(found["error"]) == 16
    mean = sum(found["error"]) / 16
    assert found["spread"] == pytest.approx(np.std(found["error"]) / mean, abs=1e-3) and found["spread"] >= 0
