"""Cameras of the render plan and the checks of its settings; nothing is rendered here."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.cli import ConfigError
from data.blender_pool import PACKAGES, check_blender, find_blender, script_command
from data.files import UserError
from data.rendering import RADIUS, RenderConfig, plan_views

ROOT = Path(__file__).parents[2]


def config(**changes: Any) -> RenderConfig:
    return RenderConfig(**({"source": "in", "out": "out"} | changes))


def test_rings_are_equally_spaced_and_share_a_lens() -> None:
    views = plan_views(config(rings=3, views_per_ring=12, references=5, eval_views=6), "a")
    assert [view["file"] for view in views] == [f"{i:03d}.png" for i in range(3 * 12 + 5 + 6 + 1)]
    for number in range(3):
        ring = [view for view in views if view["role"] == "ring" and view["ring"] == number]
        assert [view["index"] for view in ring] == list(range(12))
        steps = np.diff([view["azimuth_deg"] for view in ring] + [ring[0]["azimuth_deg"]]) % 360
        np.testing.assert_allclose(steps, 30, atol=1e-9)
        for key in ("elevation_deg", "fov_deg", "distance"):
            assert len({view[key] for view in ring}) == 1
    evaluation = [view for view in views if view["role"] == "eval"]
    assert [view["azimuth_deg"] for view in evaluation] == [0, 60, 120, 180, 240, 300]
    assert {view["elevation_deg"] for view in evaluation} == {15}


def test_references_look_at_the_front() -> None:
    views = plan_views(config(references=200), "a")
    signed = [(view["azimuth_deg"] + 180) % 360 - 180 for view in views if view["role"] == "reference"]
    assert len(signed) == 200 and -90 <= min(signed) < -70 and 70 < max(signed) <= 90
    (view,) = [view for view in views if view["role"] == "eval_reference"]
    assert abs((view["azimuth_deg"] + 180) % 360 - 180) <= 30


def test_the_plan_depends_on_seed_and_uid_only() -> None:
    assert plan_views(config(), "a") == plan_views(config(processes=3, samples=2), "a")
    assert plan_views(config(), "a") != plan_views(config(), "b")
    assert plan_views(config(), "a") != plan_views(config(seed=1), "a")


@settings(max_examples=30, deadline=None)
@given(st.floats(1, 119), st.floats(0.001, 1), st.integers(0, 2**32))
def test_whatever_the_checks_accept_is_not_clipped(fov: float, slack: float, seed: int) -> None:
    """Every point of the bounding sphere projects into the picture: |x|, |y| < 1 in normalised device coordinates."""
    lowest = RADIUS / math.cos(math.radians(fov + 1) / 2) + slack * 0.1 + 1e-6
    lens = {"fov_deg": [fov, fov + 1], "framing": [lowest, lowest + slack]}
    direction = torch.nn.functional.normalize(
        torch.randn(500, 3, generator=torch.Generator().manual_seed(seed)), dim=-1
    )
    for view in plan_views(config(rings=1, views_per_ring=4, references=1, seed=seed, **lens), "a"):
        c2w = torch.tensor(view["c2w"], dtype=torch.float64)
        seen = (direction.double() * RADIUS - c2w[:3, 3]) @ c2w[:3, :3]
        ndc = seen[:, :2] / -seen[:, 2:] / math.tan(math.radians(view["fov_deg"]) / 2)
        assert bool((seen[:, 2] < 0).all()) and float(ndc.abs().max()) < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": ""}, "source is empty"),
        ({"views_per_ring": 10}, "no multiple of 4; try 12 or 16"),
        ({"fov_deg": [40, 60], "framing": [0.55, 0.7]}, "raise framing or lower fov_deg"),
        ({"fov_deg": [60, 40]}, r"must be \[lowest, highest\]"),
        ({"framing": [0.6]}, r"must be \[lowest, highest\]"),
        ({"resolution": 0}, "resolution=0 is outside"),
        ({"rings": 100}, "more than 1000"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**changes)


def command(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    words = (sys.executable, f"data/{script}.py", *words)
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)


def test_errors_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    done = command("render", f"source={tmp_path}/nowhere", f"out={tmp_path}/out", "blender=python3")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere does not exist" in done.stderr
    done = command("render", "source=a", f"out={tmp_path}/out", "sample=3")
    assert done.returncode == 2 and "nearest known key is samples" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("experiment", ["demo", "paper"])
def test_experiments_compose(experiment: str, tmp_path: Path) -> None:
    done = command("render", f"experiment={experiment}", f"source={tmp_path}/nowhere", "out=x", "blender=python3")
    assert "nowhere does not exist" in done.stderr, done.stderr


def fake(path: Path, words: str) -> Path:
    path.write_text(f"#!/bin/sh\n{words}\n")
    path.chmod(0o755)
    return path


def test_a_blender_that_cannot_start_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is not a program"):
        find_blender(str(tmp_path / "none"))
    lacking = "echo 'libEGL.so.1: cannot open shared object file: No such file' >&2; exit 1"
    with pytest.raises(UserError, match=f"libEGL.*apt-get install {PACKAGES}"):
        check_blender(fake(tmp_path / "blender", lacking))
    with pytest.raises(UserError, match=r"No module named 'bpy'.*make blender"):
        check_blender(Path(sys.executable).with_name("python"))
    monkeypatch.setattr("data.blender_pool.REPOSITORY", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="make blender"):
        find_blender()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_blender() == tmp_path / "blender"
    assert script_command(tmp_path / "blender", Path("w.py"))[1:] == [
        "-b",
        "--factory-startup",
        "-Y",
        "-P",
        "w.py",
        "--",
    ]
