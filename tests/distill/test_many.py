"""Several images in one call: together in one batch, one after the other, and when one of them fails."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analytic_scenes import Ball
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image
from tiny_model import TINY, command, config

from data.files import UserError
from distill import sds
from distill.config import GenerateConfig, MeshConfig, TurntableConfig, joined_words, quoted
from distill.distillation import Scene, camera_ranges, distil, distil_together, step_together
from distill.field import FieldSamples
from distill.isotropy import isotropy
from distill.many import Queue, generate, jobs_of, why_failed
from distill.snapshot import FILE, is_made, load_snapshot, made_of, mark_of, new_run
from distill.turntable import render_views, ring
from models.autoencoder import encode_images
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


def test_names_of_files_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture may be called as an override looks, or as a sweep does."""
    monkeypatch.chdir(tmp_path)
    for name in ("a=b.png", "c,d.png", "image=e.png"):
        Path(name).write_text("")
    words = joined_words(["image=c,d.png", "a=b.png", "image=e.png", "out=x", "c=d.png"])
    assert words == ["image='c,d.png'", "image=e.png", "out=x", "c=d.png", "more_images=['a=b.png']"]
    assert joined_words(["image=a=b.png"]) == ["image='a=b.png'"]
    Path("lr=0.1").mkdir()
    assert joined_words(["checkpoint=lr=0.1", "out=a (1)", "out=x=[2]"]) == [
        "checkpoint='lr=0.1'", "out='a (1)'", "out='x=[2]'",
    ]  # fmt: skip
    for word in ("out=a,b", "out='a b'", "out=runs/${now:}", "out=plain", "checkpoint=a,b"):
        assert joined_words([word]) == [word]
    assert joined_words(["image=a.png,b.png", "-m"]) == ["image=a.png,b.png", "-m"], "a sweep"


@pytest.mark.parametrize("name", ["back\\'q.png", "two\\\\'.png", "end\\", "a\\b.png", "it's", "plain"])
def test_quoted_names_come_back_from_hydra_as_they_were(name: str) -> None:
    parser = OverridesParser.create()
    assert parser.parse_override(f"image={quoted(name)}").value() == name


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
    words_alone = GenerateConfig(checkpoint="c", more_images=["a/one.png"], out="mesh")
    assert [(job.image, job.more_images, job.out) for job in jobs_of(words_alone)] == [("a/one.png", [], "mesh")]
    given = GenerateConfig(checkpoint="c", embedding="e.safetensors", out="mesh")
    assert jobs_of(given) == [given]
    (tmp_path / "empty" / "folder.png").mkdir(parents=True)
    with pytest.raises(UserError, match="is a folder without pictures"):
        jobs_of(GenerateConfig(checkpoint="c", image=str(tmp_path / "empty"), out="meshes"))


def old_result(job: GenerateConfig) -> None:
    """Of other settings."""
    Path(job.out).mkdir(parents=True)
    (Path(job.out) / "mesh.glb").write_bytes(b"glTF")
    (Path(job.out) / "result.json").write_text('{"made_of": "something else"}')


def test_an_old_result_is_no_success(checkpoint: Path, pictures: list[Path], tmp_path: Path) -> None:
    job = config(tmp_path / "out")
    job.checkpoint, job.image = str(checkpoint), str(pictures[0])
    old_result(job)
    assert not is_made(job)
    for status, words in ((2, "ended with status 2"), (-9, "ended with signal 9"), (75, "give the same command again")):
        assert words in why_failed([job], status, tmp_path / "none.json")[job.out]
    (tmp_path / "answer.json").write_text("{}")
    assert why_failed([job], 0, tmp_path / "answer.json") == {}
    (Path(job.out) / "result.json").write_text(json.dumps({"made_of": made_of(job, mark_of(job))}))
    assert is_made(job) and why_failed([job], -9, tmp_path / "none.json") == {}


def test_a_group_that_cannot_start_costs_itself_alone(
    checkpoint: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def run(self: Queue, group: list[GenerateConfig], device: str, asked: Path, answer: Path) -> int:
        if "one" in str(group[0].image):
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        answer.write_text("{}")
        return 0

    monkeypatch.setattr(Queue, "run", run)
    monkeypatch.setattr("distill.many.write_page", lambda path, made, failed: None)
    given = config(tmp_path / "meshes")
    given.checkpoint, given.image = str(checkpoint), str(pictures[0].parent)
    with pytest.raises(SystemExit):
        generate(given)
    told = capsys.readouterr()
    assert told.err.count("error:") == 1 and "meshes/one: OSError: [Errno 12]" in told.err
    assert "2 of 3 images have a mesh" in told.out


@pytest.mark.parametrize(("at_once", "groups"), [(1, [1, 1, 1]), (8, [1, 2])])
def test_each_device_takes_groups_and_one_that_leaves_costs_no_page(
    checkpoint: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], at_once: int, groups: list[int],
) -> None:  # fmt: skip
    """Two devices: 3 images in at least two groups.  The group of three.png is asked to leave the machine."""
    taken, pages = [], []
    together = threading.Barrier(2, timeout=60)  # both devices work at the same time

    def run(self: Queue, group: list[GenerateConfig], device: str, asked: Path, answer: Path) -> int:
        first = device not in {name for name, _ in taken}
        names = [Path(str(job.image)).stem for job in group]
        taken.append((device, names))
        if first:
            together.wait()
        if "three" in names:
            return 75
        answer.write_text("{}")
        return 0

    monkeypatch.setattr(Queue, "run", run)
    monkeypatch.setattr("distill.many.devices_of", lambda config: ["cuda:0", "cuda:1"])
    monkeypatch.setattr(
        "distill.many.write_page",
        lambda path, made, failed: pages.append(([out.name for out in made], [Path(out).stem for out in failed])),
    )
    given = config(tmp_path / "meshes")
    given.checkpoint, given.image, given.objects_at_once = str(checkpoint), str(pictures[0].parent), at_once
    for job in jobs_of(given):
        old_result(job)
    with pytest.raises(SystemExit) as end:
        generate(given)
    assert end.value.code == 1 and {device for device, _ in taken} == {"cuda:0", "cuda:1"}
    assert sorted(len(names) for _, names in taken) == groups
    (lost,) = [names for _, names in taken if "three" in names]
    assert pages == [([path.stem for path in sorted(pictures) if path.stem not in lost], lost)]
    assert capsys.readouterr().err.count("was asked to leave the machine") == len(lost)


@pytest.mark.slow
def test_two_devices_at_work(
    checkpoint: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of their own, which get their settings in a file, whatever this process was started as."""
    monkeypatch.setattr("distill.many.devices_of", lambda config: ["cpu", "cpu:0"])
    monkeypatch.setattr(sys, "argv", ["submitit", "--multirun", "seed=1,2"])
    given = config(tmp_path / "meshes", steps=3)
    given.checkpoint, given.image = str(checkpoint), str(pictures[0])
    given.more_images = [str(path) for path in pictures[1:]]
    given.mesh, given.turntable = MeshConfig(24, texture_size=0), TurntableConfig(frames=2, size=16, views=1)
    generate(given)
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "meshes").glob("*/result.json"))]
    assert [one["steps"] for one in results] == [3] * 3
    asked = [OmegaConf.load(path).device for path in (tmp_path / "meshes").glob("*/config.yaml")]
    assert set(asked) == {"cpu", "cpu:0"}
    assert (tmp_path / "meshes" / "report.html").read_text().count("<canvas") == 3


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
    assert "Without a mesh" in page and "three.png is not a picture" in page
    stamps = [(folder / "mesh.glb").stat().st_mtime_ns for folder in made]
    again = subprocess.run(full, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == 1 and again.stdout.count("is finished; nothing to do") == 2
    assert "[3/3] images" in again.stdout and "[2/3] images" not in again.stdout, "no process for what is finished"
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


def test_isotropy_finds_the_odd_side(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model wants what a ball is on all sides: the bare ball has no spread, and one with a dark side, its error."""
    model, settings = load_export(checkpoint), config(tmp_path)
    ranges = camera_ranges(settings, model.info)
    run = new_run(settings, "cpu")
    run.occupancy.update(Ball().density)

    def painted(dark: bool) -> Any:
        def field(points: torch.Tensor, normals: bool = True) -> FieldSamples:
            found = Ball()(points, normals)
            side = points[:, :1] < -0.1 if dark else torch.zeros(len(points), 1, dtype=torch.bool)
            return found._replace(albedo=torch.where(side, 0.0, 0.7).expand(-1, 3))

        return field

    def latents(dark: bool) -> torch.Tensor:
        views = render_views(painted(dark), run.occupancy, ring(1, *ranges.middle), ranges.middle[1], 32)
        return encode_images(model.vae, views.rgb * 2 - 1, sample=False)

    wanted = latents(dark=False)
    monkeypatch.setattr(sds, "predict_x0", lambda *_: wanted[None])
    spread, errors = [], []
    for dark in (False, True):
        run.field = painted(dark)
        found = isotropy(run, model, torch.zeros(1, 1, 24), ranges, 32)
        spread.append(found["spread"])
        errors.append(np.array(found["error"]))
    assert errors[1].argmax() in (7, 8, 9) and errors[1][8] > 10 * errors[1][0]
    assert errors[0].max() < 0.1 * errors[1].max() and spread[1] > 0.5
