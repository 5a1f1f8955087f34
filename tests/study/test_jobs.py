"""Jobs beside each other: so many at a time, what needs `both` after it, nobody left working."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.cli import ConfigError
from demo.run import ROOT
from study import results, run
from study.config import StudyConfig, words_of
from study.jobs import Job, jobs_of, work_off
from study.variants import BASE, VARIANTS, chosen

# Notes its beginning and its end in a file of its own, and ends with the last word.
SCRIPT = """
import json, pathlib, sys, time
began = time.monotonic()
print("so speaks", sys.argv[1])
pathlib.Path(sys.argv[1] + ".pid").write_text(str(__import__("os").getpid()))
time.sleep(float(sys.argv[2]))
pathlib.Path(sys.argv[1] + ".json").write_text(json.dumps([began, time.monotonic()]))
sys.exit(int(sys.argv[3]))
"""


def job(folder: Path, name: str, seconds: float = 0.3, status: int = 0, after: tuple[str, ...] = ()) -> Job:
    return Job(name, [sys.executable, "-c", SCRIPT, str(folder / name), str(seconds), str(status)], after)


def times(folder: Path, name: str) -> tuple[float, float]:
    began, ended = json.loads((folder / f"{name}.json").read_text())
    return began, ended


def test_so_many_at_a_time_and_what_needs_both_after_it(tmp_path: Path) -> None:
    names = [f"own{n}" for n in range(4)]
    work_off([job(tmp_path, "after", after=(BASE,)), job(tmp_path, BASE, 1.5), *(job(tmp_path, n) for n in names)], 2,
             tmp_path)  # fmt: skip
    spans = {name: times(tmp_path, name) for name in (BASE, "after", *names)}
    assert spans["after"][0] >= spans[BASE][1]
    for name, (began, _) in spans.items():
        others = [one for one, (start, end) in spans.items() if one != name and start <= began < end]
        assert len(others) <= 1, f"{name} began beside {others}"
    assert "so speaks" in (tmp_path / "jobs" / "own3.log").read_text()


def test_a_job_that_fails_costs_itself_alone_and_both_those_after_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work_off([job(tmp_path, BASE), job(tmp_path, "bad", status=3), job(tmp_path, "good", after=(BASE,))], 1, tmp_path)
    assert "job bad: ended with status 3" in capsys.readouterr().err and (tmp_path / "good.json").is_file()
    work_off([job(tmp_path, BASE, status=1), job(tmp_path, "own"), job(tmp_path, "never", after=(BASE,))], 1, tmp_path)
    assert (tmp_path / "own.json").is_file() and not (tmp_path / "never.pid").exists()


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_whoever_waits_for_them_killed_none_goes_on(tmp_path: Path, by: signal.Signals) -> None:
    script = f"""
import sys
from pathlib import Path
from study.jobs import Job, work_off
command = [sys.executable, "-c", {SCRIPT!r}, {str(tmp_path / "one")!r}, "60", "0"]
work_off([Job("both", command)], 1, Path({str(tmp_path)!r}))
"""
    waiting = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    pid = tmp_path / "one.pid"
    deadline = time.monotonic() + 60
    while not (pid.is_file() and pid.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    waiting.send_signal(by)
    waiting.wait(timeout=30)
    worker = Path("/proc", pid.read_text())
    while worker.exists() and "zombie" not in (worker / "status").read_text():
        assert time.monotonic() < deadline + 30, "it works on"
        time.sleep(0.1)


def test_each_job_is_a_command_of_its_own() -> None:
    config = StudyConfig(jobs=2, distil=3, seeds=[1, 2], stage1=["steps=4", "name='a b'"], processes=1,
                         variants=["stage1", "width16", "finest"])  # fmt: skip
    jobs = jobs_of(config, chosen(config.variants))
    assert [(one.name, one.after) for one in jobs] == [
        (BASE, ()), ("width16", ()), ("meshes", (BASE,)), ("stage1", (BASE,)), ("finest", (BASE,)),
    ]  # fmt: skip
    for one in jobs:
        assert one.command[1] == "study/run.py" and "tables=false" in one.command
        assert not any(word.startswith("jobs=") for word in one.command), "it does not divide itself again"
        assert ("distil=3" in one.command) == (one.name == "meshes")
    named = {one.name: [word for word in one.command if word.startswith("variants=")] for one in jobs}
    assert named["meshes"] == [f"variants=[{BASE}]"] and named["width16"] == ["variants=[width16]"]
    alone = jobs_of(StudyConfig(jobs=2, distil=0, tables=False), chosen(["width16"], with_base=False))
    assert [one.name for one in alone] == ["width16"]
    longest = jobs_of(StudyConfig(jobs=2, distil=1, variants=["longer_stage1"]), chosen(["longer_stage1"]))
    assert [(one.name, one.after) for one in longest] == [
        (BASE, ()), ("longer", ()), ("meshes", (BASE,)), ("meshes_longer", ("meshes", "longer")),
        ("longer_stage1", ("longer",)),
    ]  # fmt: skip
    without = StudyConfig(jobs=2, distil=0, tables=False, variants=["longer_stage1", "longer_no_reference"])
    assert [(one.name, one.after) for one in jobs_of(without, chosen(without.variants, with_base=False))] == [
        ("longer", ()), ("longer_stage1", ("longer",)), ("longer_no_reference", ("longer",)),
    ], "two that take one stage 1 do not both train it"  # fmt: skip
    everything = jobs_of(StudyConfig(jobs=2), list(VARIANTS))
    assert sorted(one.name for one in everything) == sorted(
        ["meshes", "meshes_longer", *(one.name for one in VARIANTS)]
    )
    known = {one.name for one in everything}
    assert all(known.issuperset(one.after) for one in everything), "nobody waits for what nobody makes"


@pytest.mark.parametrize("tables", [False, True])
def test_a_job_makes_its_own_variant_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tables: bool) -> None:
    """So that it waits for no lock of `both`, which is at work beside it; whoever writes tables needs both."""
    trained: list[str] = []
    for name in ("fetched", "render", "prepare", "of_two_libraries"):
        monkeypatch.setattr(run, name, lambda *given: [])
    monkeypatch.setattr(run, "train_and_judge", lambda plan, variant, seed: trained.append(variant.name))
    monkeypatch.setattr(results, "write_results", lambda *given: given[0])
    monkeypatch.chdir(tmp_path)
    config = StudyConfig(out=str(tmp_path / "study"), jobs=2, distil=0, variants=["width16"])
    (own,) = (one for one in jobs_of(config, chosen(config.variants)) if one.name == "width16")
    assert "variants=[width16]" in own.command and "tables=false" in own.command
    run.main(StudyConfig(out=str(tmp_path / "study"), variants=["width16"], tables=tables, distil=0))
    assert trained == ([BASE, "width16"] if tables else ["width16"])


def test_the_words_are_read_back_as_they_were(tmp_path: Path) -> None:
    config = StudyConfig(
        out=str(tmp_path / "été (b), c=d"), stage1=["steps=4", 'name="x, y"'], other_guidances=[], cpu=False,
        seeds=[3], guidance=2.5, tables=False,
    )  # fmt: skip
    script = "import sys; from conf.cli import run; from study.config import StudyConfig; " \
             "run(StudyConfig, 'study/run', lambda config: print(repr(config)))"  # fmt: skip
    read = subprocess.run([sys.executable, "-c", script, *words_of(config)], cwd=ROOT, capture_output=True, text=True,
                          check=False, env=os.environ)  # fmt: skip
    assert read.stdout.strip() == repr(config), read.stderr


def test_jobs_are_for_the_cpu() -> None:
    with pytest.raises(ConfigError, match="slurm/study"):
        StudyConfig(jobs=2, cpu=False)


def test_another_seed_is_another_for_every_seed() -> None:
    other = next(one for one in VARIANTS if one.name == "other_seed")
    words = [tuple(other.words(other.stage1 or (), seed)) for seed in (0, 1, 1000)]
    assert words == [("seed=1000",), ("seed=1001",), ("seed=2000",)]
