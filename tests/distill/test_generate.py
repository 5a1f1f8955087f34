"""The whole path with a tiny checkpoint: same losses after a resume, a kill at any moment, clear refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from analytic_scenes import Ball
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from PIL import Image
from tiny_model import ROOT, TINY, command, config

from conf.cli import ConfigError
from data.files import UserError, read_json
from distill.config import GenerateConfig, GuidanceConfig, ScheduleConfig
from distill.distillation import camera_ranges, distil, require_finite
from distill.generate import main
from distill.mesh import load_glb
from distill.snapshot import FILE, config_from, identity, load_snapshot, made_of, new_run, save_snapshot, snapshot_mb
from distill.turntable import render_views, ring
from distill.volume import OccupancyGrid, VolumeConfig
from models.checkpoint import load_export


def test_a_killed_run_continues_with_the_same_losses(checkpoint: Path, tmp_path: Path) -> None:
    model, context = load_export(checkpoint), torch.randn(1, 1, 24)
    whole = new_run(config(tmp_path / "a"), "cpu")
    assert distil(whole, model, context, config(tmp_path / "a"), "x") == 0

    killed = new_run(config(tmp_path / "b"), "cpu")
    save = torch.optim.AdamW.step

    def die_at_step_5(self, *args):  # between the snapshots at 3 and 6
        if killed.step == 5:
            raise KeyboardInterrupt
        return save(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", die_at_step_5)
        with pytest.raises(KeyboardInterrupt):
            distil(killed, model, context, config(tmp_path / "b"), "x")

    again = new_run(config(tmp_path / "b"), "cpu")
    assert load_snapshot(tmp_path / "b" / FILE, again, "x") and again.step == 3
    distil(again, model, context, config(tmp_path / "b"), "x")
    assert again.losses == whole.losses and len(whole.losses) == 8
    assert all(torch.equal(a, b) for a, b in zip(again.field.parameters(), whole.field.parameters(), strict=True))
    assert {loss["resolution"] for loss in whole.losses} == {12, 16}


def test_first_interrupt_ends_the_loop_with_a_snapshot(checkpoint: Path, tmp_path: Path) -> None:
    run, settings = new_run(config(tmp_path), "cpu"), config(tmp_path, 1000)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    assert distil(run, load_export(checkpoint), torch.ones(1, 1, 24), settings, "x") == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before and 0 < run.step < 1000
    again = new_run(settings, "cpu")
    assert load_snapshot(tmp_path / FILE, again, "x") and again.step == run.step


def test_nan_stops_before_the_weights_are_touched(checkpoint: Path, tmp_path: Path) -> None:
    run = new_run(config(tmp_path), "cpu")
    with pytest.raises(UserError, match="step 0: sds is not finite"):
        require_finite(run, {"sds": torch.tensor(float("nan"))})
    table = run.field.table.detach().clone()
    with pytest.raises(UserError, match=r"is not finite.*guidance\.scale"):
        distil(run, load_export(checkpoint), torch.full((1, 1, 24), float("nan")), config(tmp_path), "x")
    assert torch.equal(run.field.table, table)


def test_foreign_and_damaged_snapshots_are_refused(tmp_path: Path) -> None:
    run = new_run(config(tmp_path), "cpu")
    save_snapshot(tmp_path / FILE, run, "mine")
    with pytest.raises(UserError, match="another checkpoint, image or configuration"):
        load_snapshot(tmp_path / FILE, run, "yours")
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="not a snapshot that can be read"):
        load_snapshot(tmp_path / FILE, run, "mine")


def test_identity_covers_what_matters(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    base = identity(config(tmp_path), checkpoint, picture)
    moved = config(tmp_path / "elsewhere")
    moved.mesh.resolution, moved.volume.samples_at_once, moved.embedding = 64, 2048, "e.safetensors"
    moved.guidance.scale, moved.dtype = 3.0, "float32"  # what may answer a NaN is compared by itself
    assert identity(moved, checkpoint, picture) == base
    assert identity(config(tmp_path, 9), checkpoint, picture) != base
    moved.volume.samples_per_ray = 64
    assert identity(moved, checkpoint, picture) != base
    moved.checkpoint, moved.image = str(checkpoint), str(picture)
    assert made_of(moved, base) != made_of(config(tmp_path), base)


def test_the_space_that_a_snapshot_wants(tmp_path: Path) -> None:
    assert snapshot_mb(config(tmp_path)) == 1
    assert 100 < snapshot_mb(GenerateConfig(checkpoint="c", image="i", out="o")) < 200  # the released field


def test_a_picture_or_an_embedding_but_not_both() -> None:
    with pytest.raises(ConfigError, match="image is not set; give image="):
        GenerateConfig(checkpoint="c", out="o")
    with pytest.raises(ConfigError, match=r"embedding=e stands instead of pictures, and a\.png"):
        GenerateConfig(checkpoint="c", out="o", embedding="e", more_images=["a.png"])


def test_cameras_come_from_the_checkpoint_unless_chosen(checkpoint: Path, tmp_path: Path) -> None:
    info, settings = load_export(checkpoint).info, config(tmp_path)
    assert camera_ranges(settings, info).framing == (0.58, 0.6)
    settings.framing = [0.8, 1.0]
    assert camera_ranges(settings, info).framing == (0.8, 1.0)
    assert camera_ranges(settings, info).middle == pytest.approx((15, 40, 0.9))


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="one of each per phase"):
        ScheduleConfig(resolutions=[64])
    with pytest.raises(ConfigError, match="t_lowest"):
        GuidanceConfig(t_lowest=[0.98, 0.6])
    assert [ScheduleConfig().at(p) for p in (0, 0.49, 0.5, 0.99)] == [(64, 2), (64, 2), (256, 1), (256, 1)]


@pytest.mark.parametrize(
    "word",
    ["optimizer.betas=[0.9]", "optimizer.betas=[0.9,1.0]", "optimizer.lr_grid=-1", "optimizer.eps=nan",
     "light.ambient_share=-3", "seed=1152921504606846976", "field.hidden=0", "framing=[0,0]", "volume.background=nan",
     "turntable.fps=0"],
)  # fmt: skip
def test_numbers_that_would_end_in_a_traceback(word: str) -> None:
    values = OmegaConf.to_container(OmegaConf.from_dotlist([word]))
    with pytest.raises(ConfigError, match=word.partition("=")[0].replace(".", r"\.")):
        config_from({"checkpoint": "c", "image": "i", "out": "o", **values})  # type: ignore[dict-item]


NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_command_survives_a_kill_and_writes_everything(
    checkpoint: Path, picture: Path, tmp_path: Path, device: str
) -> None:
    """On a GPU with its defaults: the Triton renderer, bf16 and a compiled network."""
    out = tmp_path / "out"
    words = ["steps=60", "snapshot_every=5", *TINY, f"device={device}", "dtype=auto"]
    full = command(f"checkpoint={checkpoint}", f"image={picture}", f"out={out}", *words)
    process = subprocess.Popen(full, cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / FILE).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = subprocess.run(full, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = read_json(out / "result.json", "result")
    assert result["steps"] == 60 and result["continued"] is True and result["device"].startswith(device)
    losses = json.loads((out / "losses.json").read_text())
    assert [loss["step"] for loss in losses] == list(range(60))
    assert load_glb(out / "mesh.glb").faces.shape[0] == result["mesh"]["faces"] > 0
    assert (out / "turntable.mp4").stat().st_size > 0 and Image.open(out / "views.png").size == (64, 64)
    assert "steps: 60" in (out / "config.yaml").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]  # nothing of Hydra's beside it


def test_experiments_are_configurations() -> None:
    """As Hydra composes them; guidance_scale and stage1_or_both are sweeps."""
    folder = ROOT / "conf" / "distill"
    names = {path.stem for path in (folder / "experiment").glob("*.yaml")} - {"guidance_scale", "stage1_or_both"}
    assert {"demo", "fast", "paper"} <= names
    ConfigStore.instance().store(name="generate_schema", node=GenerateConfig)
    with initialize_config_dir(str(folder), version_base="1.3"):
        for name in sorted(names):
            given = ["checkpoint=c", "image=i", "out=o", f"experiment={name}"]
            config_from(compose("generate", given))


def test_the_fast_mode_falls_evenly_through_the_timesteps(checkpoint: Path, tmp_path: Path) -> None:
    fast = OmegaConf.load(ROOT / "conf" / "distill" / "experiment" / "fast.yaml")
    settings = config(tmp_path, steps=6)
    settings.guidance = GuidanceConfig(**fast.guidance)
    run = new_run(settings, "cpu")
    distil(run, load_export(checkpoint), torch.ones(1, 1, 24), settings, "x")
    assert [row["t"] for row in run.losses] == [980, 820, 660, 500, 340, 180]


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_once_makes_a_mesh_and_twice_stops(checkpoint: Path, picture: Path, tmp_path: Path, times: int) -> None:
    out = tmp_path / "out"
    full = command(f"checkpoint={checkpoint}", f"image={picture}", f"out={out}", "steps=100000", "snapshot_every=2",
                   *TINY, "mesh.resolution=200")  # fmt: skip
    process = subprocess.Popen(full, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (out / FILE).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.stderr is not None
    os.kill(process.pid, signal.SIGINT)
    if times == 2:
        while b"a second Ctrl-C stops at once" not in process.stderr.readline():
            assert process.poll() is None
        os.kill(process.pid, signal.SIGINT)
    process.stderr.read()
    if times == 1:
        assert process.wait(timeout=300) == 0
        result = read_json(out / "result.json", "result")
        assert 0 < result["steps"] < 100000 and result["made_of"] is None and (out / "report.html").is_file()
    else:
        assert process.wait(timeout=300) != 0 and not (out / "mesh.glb").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checkpoint": "/nowhere"}, "checkpoint /nowhere is not a folder"),
        ({"image": "/nowhere.png"}, r"image /nowhere\.png does not exist"),
        ({"image": __file__}, "is not a picture"),
        ({"out": "/proc/nothing"}, "cannot write to /proc/nothing"),
        ({"device": "cuda:9"}, "device=cuda:9 cannot be used"),
    ],
)
def test_mistakes_are_found_before_anything_is_paid_for(
    checkpoint: Path, picture: Path, tmp_path: Path, change: dict[str, str], words: str
) -> None:
    settings = config(tmp_path / "out")
    settings.checkpoint, settings.image, settings.device = str(checkpoint), str(picture), "cpu"
    for key, value in change.items():
        setattr(settings, key, value)
    with pytest.raises(UserError, match=words):
        main(settings)
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_a_mistyped_key_is_answered_in_one_line_with_the_nearest(tmp_path: Path) -> None:
    full = command("checkpoint=a", "image=b", f"out={tmp_path}", "guidance.skale=3")
    done = subprocess.run(full, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2 and "guidance.scale" in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_rendered_views_have_the_shapes_others_rely_on() -> None:
    views = render_views(
        Ball(), OccupancyGrid(0.6, VolumeConfig(samples_per_ray=32)), ring(3, 15.0, 40.0, 0.6), 40.0, 24
    )
    assert views.rgb.shape == views.normal.shape == (3, 3, 24, 24)
    assert views.opacity.shape == views.depth.shape == (3, 24, 24)
