"""Cameras of the render plan and the checks of its settings; nothing is rendered here."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from conf.cli import ConfigError
from data.assets import list_assets
from data.blender_pool import PACKAGES, check_blender, find_blender, script_command
from data.contact_sheet import write_contact_sheet
from data.files import UserError, write_json
from data.processes import locked
from data.render_ledger import Verdict, ledger_path, read_verdicts, verdict_table, write_verdict
from data.render_parts import in_part, only_renderer, shared_lock, which_part
from data.rendering import FIXED_LIGHT, RADIUS, RenderConfig, fingerprint, plan_light, plan_views

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
        ({"light": "dark"}, "light=dark is none of fixed, sampled"),
        ({"device": "tpu"}, "device=tpu is none of auto, cpu, gpu"),
        ({"sun_strength": [2, 1]}, r"sun_strength=\[2, 1\] must be"),
        ({"part": -1}, "part=-1 is negative"),
        ({"object_limit_gb": 0}, "object_limit_gb=0 is outside"),
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


@pytest.mark.parametrize("choice", ["experiment=demo", "experiment=paper", "experiment=paper preset=draft"])
def test_experiments_compose(choice: str, tmp_path: Path) -> None:
    done = command("render", *choice.split(), f"source={tmp_path}/nowhere", "out=x", "blender=python3")
    assert "nowhere does not exist" in done.stderr, done.stderr


@pytest.mark.parametrize("preset", ["draft", "cpu", "zero123"])
def test_a_preset_overrides_the_quality_of_an_experiment_and_not_its_cameras(preset: str) -> None:
    def composed(*choices: str) -> RenderConfig:
        with initialize_config_dir(str(ROOT / "conf" / "data"), version_base="1.3"):
            ConfigStore.instance().store(name="render_schema", node=RenderConfig)
            values = compose("render", ["source=in", "out=out", *choices])
        return cast(RenderConfig, OmegaConf.to_object(values))

    plain, preset_ = composed("experiment=paper"), composed("experiment=paper", f"preset={preset}")
    assert plan_views(plain, "a") == plan_views(preset_, "a")
    assert (plain.resolution, plain.samples) != (preset_.resolution, preset_.samples)
    assert composed("experiment=paper", f"preset={preset}", "samples=7").samples == 7
    assert plain.light == "sampled" and composed("experiment=demo").light == "fixed"


def test_light_is_fixed_or_drawn_within_its_ranges() -> None:
    assert plan_light(config(), "a") == FIXED_LIGHT == plan_light(config(seed=5), "b")
    sampled = config(light="sampled", sky_strength=[0.2, 0.3], sun_strength=[1, 2], sun_elevation_deg=[10, 20])
    assert plan_light(sampled, "a") == plan_light(sampled, "a") != plan_light(sampled, "b")
    assert plan_views(sampled, "a") == plan_views(config(), "a")
    lights = [plan_light(sampled, str(number)) for number in range(200)]
    suns = [sun for light in lights for sun in light["suns"]]
    assert all(0.2 <= light["sky"] <= 0.3 for light in lights) and all(1 <= sun["strength"] <= 2 for sun in suns)
    towards = np.array([sun["towards"] for sun in suns])
    elevation = np.degrees(np.arcsin(towards[:, 2]))
    assert 10 <= elevation.min() < 11 and 19 < elevation.max() <= 20
    assert np.linalg.norm(towards.mean(0)[:2]) < 0.2  # from all around


def test_the_fingerprint_changes_with_what_changes_the_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.glb").write_bytes(b"glTF")
    (asset,) = list_assets(tmp_path)
    plain = fingerprint(config(), asset)
    for changes in (
        {"samples": 3}, {"seed": 1}, {"light": "sampled"}, {"normals": True}, {"depth": True}, {"max_bounces": 1},
        {"denoise": False}, {"rings": 3}, {"eval_elevation_deg": 5}, {"elevation_deg": [0, 1]},
    ):  # fmt: skip
        assert fingerprint(config(**changes), asset) != plain, changes
    for changes in (
        {"processes": 3},
        {"device": "cpu"},
        {"retry": True},
        {"object_limit_gb": 2},
        {"parts": 2},
        {"reference_azimuth_deg": 90.0},
        {"eval_elevation_deg": 15},
    ):
        assert fingerprint(config(**changes), asset) == plain, changes


def verdict(uid: str, status: str = "failed", time: float = 1.0, reason: str = "because") -> Verdict:
    return Verdict(uid, status, reason, "print", {"faces": [None, None]}, 0.1, time)


def test_the_newest_verdict_counts_and_torn_lines_are_passed_over(tmp_path: Path) -> None:
    one, two = ledger_path(tmp_path, 0, 1), ledger_path(tmp_path, 1, 3)
    assert (one.name, two.name) == ("render_ledger.jsonl", "render_ledger-00001.jsonl")
    write_verdict(one, verdict("a", time=5))
    write_verdict(two, verdict("a", "rendered", time=3))
    write_verdict(two, verdict("b", "rejected", time=3))
    whole = two.read_bytes()
    for cut in range(len(whole) - 1):  # killed after so many bytes, then another run goes on
        two.write_bytes(whole[:cut])
        write_verdict(two, verdict("c", time=6))
        found = read_verdicts(tmp_path)
        assert found["a"] == verdict("a", time=5) and found["c"] == verdict("c", time=6)
        assert set(found) <= {"a", "b", "c"}
    lines = verdict_table(
        [verdict(f"o{i:02d}", reason="no\x1b[31m\nway") for i in range(30)] + [verdict("z", "rendered")]
    )
    assert len(lines) == 21 and lines[-1] == "and 10 more failed" and lines[0] == "failed    o00  no [31m way"


@given(st.integers(1, 20), st.lists(st.text("abcXYZ019_-", min_size=1), unique=True))
def test_every_object_is_in_one_part(parts: int, uids: list[str]) -> None:
    for uid in uids:
        assert sum(in_part(uid, part, parts) for part in range(parts)) == 1


def test_the_part_is_the_array_task(tmp_path: Path) -> None:
    task = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "9"}
    task |= {"SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "4"}  # --array=3-9:2
    assert which_part(None, None, {}) == (0, 1)
    assert which_part(None, None, task) == (2, 4)
    assert which_part(None, 8, task) == (7, 8)
    assert which_part(1, 3, task) == (1, 3)
    assert which_part(None, 1, task) == (0, 1)
    with pytest.raises(UserError, match=r"part=7 is not within 0..3"):
        which_part(7, 4, {})
    with pytest.raises(UserError, match=r"part=5 is not within 0..2.*give part= and parts="):
        which_part(None, None, {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "3"})


def test_parts_leave_each_other_alone(tmp_path: Path) -> None:
    """What a part finds half done is removed where it is its own; parts of another division are kept out."""
    halves: tuple[list[str], list[str]] = ([], [])
    for uid in (f"o{number}" for number in range(20)):
        halves[in_part(uid, 1, 2)].append(uid)
        (tmp_path / f".{uid}.0123abcd.tmp").mkdir()
        (tmp_path / uid).mkdir()
    with only_renderer(tmp_path, 0, 2):
        assert {path.name.split(".")[1] for path in tmp_path.glob(".*.tmp")} == set(halves[1])
        with (
            pytest.raises(UserError, match="in use by renderers with parts=2, not parts=3"),
            only_renderer(tmp_path, 1, 3),
        ):
            pass
        with only_renderer(tmp_path, 1, 2):
            assert not list(tmp_path.glob(".*.tmp"))
    with only_renderer(tmp_path, 1, 3), pytest.raises(UserError, match="is in use by process parts=3"):  # noqa: SIM117
        with locked(tmp_path, wait_s=0.1):
            pass
    with locked(tmp_path), pytest.raises(UserError, match="a renderer of all objects"):  # noqa: SIM117
        with shared_lock(tmp_path, "parts=2", wait_s=0.1):
            pass
    assert len(list(tmp_path.glob("o*"))) == 20


def test_the_contact_sheet_escapes_what_assets_say(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&"
    write_json(tmp_path / "a" / "meta.json", {"uid": "a", "caption": evil, "license": evil, "faces": 3, "views": []})
    verdicts = {each.uid: each for each in (verdict("b", reason=evil), verdict("gone", "rendered"), verdict("a"))}
    page = write_contact_sheet(tmp_path, {"a"}, verdicts).read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") == 3
    assert "<h1>2 objects rendered, 1 failed</h1>" in page and "1 of 2 objects are shown" in page
    assert (
        page.count("<img") == 1 and 'src="a/contact.webp"' in page and "<td>b<td>" in page and "<td>a<td>" not in page
    )


def test_the_contact_sheet_of_many_objects_shows_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.contact_sheet.MOST_OBJECTS", 10)
    monkeypatch.setattr("data.contact_sheet.MOST_ROWS", 5)
    uids = [f"o{number:03d}" for number in range(95)]
    for uid in uids:
        write_json(tmp_path / uid / "meta.json", {"uid": uid, "views": []})
    page = write_contact_sheet(tmp_path, uids, {f"x{i}": verdict(f"x{i}") for i in range(8)}).read_text()
    assert page.count("<img loading=lazy") == 10 and "o000/" in page and "o090/" in page
    assert page.count("<td>failed") == 5 and "3 more are in the ledger" in page


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
