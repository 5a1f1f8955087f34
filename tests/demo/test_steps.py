"""A step runs once, again when what it is made from has changed, and goes on where it was killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from data.files import UserError
from demo.run import Step, run_step

# Leaves a file for each start, and ends with the last word.
SCRIPT = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
(folder / f"start{len(list(folder.iterdir()))}").touch()
time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[3]))
"""


def step(out: Path, seconds: float = 0, status: int = 0, passes: tuple[int, ...] = (0,), removes: bool = True) -> Step:
    command = [sys.executable, "-c", SCRIPT, str(out / "made"), str(seconds), str(status)]
    return Step("one", command, out / "made", passes, removes)


def starts(out: Path) -> int:
    return len(list((out / "made").iterdir()))


def test_it_runs_once_and_again_when_what_it_is_made_from_has_changed(tmp_path: Path) -> None:
    first = run_step(step(tmp_path), 1, 1, tmp_path, "before")
    assert run_step(step(tmp_path), 1, 1, tmp_path, "before") == first and starts(tmp_path) == 1
    assert run_step(step(tmp_path), 1, 1, tmp_path, "other") != first
    assert starts(tmp_path) == 1, "what it had made was removed"
    run_step(step(tmp_path, removes=False), 1, 1, tmp_path, "third")
    assert starts(tmp_path) == 2, "a step before this one removes it"


def test_a_status_that_passes_and_one_that_does_not(tmp_path: Path) -> None:
    run_step(step(tmp_path, status=1, passes=(0, 1)), 1, 1, tmp_path, "")
    run_step(step(tmp_path, status=1, passes=(0, 1)), 1, 1, tmp_path, "")
    assert starts(tmp_path) == 2, "what it could not do is tried again"
    for _ in range(2):
        with pytest.raises(UserError, match="step one ended with status 2"):
            run_step(step(tmp_path, status=2, passes=(0, 1)), 1, 1, tmp_path, "")
    assert starts(tmp_path) == 2, "it failed twice, and went on from the first time"


def test_killed_after_a_change_it_goes_on(tmp_path: Path) -> None:
    run_step(step(tmp_path), 1, 1, tmp_path, "before")
    (tmp_path / "made" / "old").touch()
    for start in (1, 2):
        process = multiprocessing.get_context("fork").Process(
            target=run_step, args=(step(tmp_path, seconds=600), 1, 1, tmp_path, "after")
        )
        process.start()
        assert process.pid is not None
        deadline = time.monotonic() + 60
        while not (tmp_path / "made").is_dir() or (tmp_path / "made" / "old").exists() or starts(tmp_path) < start:
            assert time.monotonic() < deadline, "what a killed start had made is kept"
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGUSR1)  # as a scheduler does before the time limit
        process.join()
