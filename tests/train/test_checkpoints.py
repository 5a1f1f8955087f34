"""Checkpoints of a real engine of two ranks, killed while it writes them."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from warm import Run

from train.checkpoints import checkpoint_folders, damaged_files, step_of

KILLS = 30


def begin(folder: Path, last: int, number: int) -> Run:
    return Run(["tests/train/checkpoint_script.py", str(folder), str(last)], 2, folder / f"log-{number}")


def steps(folder: Path) -> dict[int, set[str]]:
    """What rank 0 held after each step, each time that it took it."""
    found: dict[int, set[str]] = {}
    for line in (folder / "steps.jsonl").read_text().splitlines():
        if line.endswith("]"):  # else it was killed in the middle of the line
            step, mark = json.loads(line)
            found.setdefault(step, set()).add(mark)
    return found


@pytest.mark.slow
def test_killed_while_checkpoints_are_written(tmp_path) -> None:
    """SIGKILL of one rank.  What bears a checkpoint's name is whole, and from it every step is what it would be."""
    out, chance, inside = tmp_path / "killed", random.Random(0), 0
    folder = out / "checkpoints"
    for number in range(KILLS):
        run, before = begin(out, 10**6, number), checkpoint_folders(folder)
        deadline = time.monotonic() + 400
        while checkpoint_folders(folder) == before or not any(folder.glob(".step_*.tmp")):
            assert time.monotonic() < deadline and "Traceback" not in run.stderr, run.stdout + run.stderr
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        os.kill(chance.choice(run.ranks), signal.SIGKILL)
        assert run.wait().returncode != 0
        inside += any(folder.glob(".step_*.tmp"))
        found = checkpoint_folders(folder)
        assert found and not [wrong for path in found for wrong in damaged_files(path, 0, 1)]
    assert inside >= KILLS // 3, "else this would not test what it says"
    last = max(steps(out)) + 1
    assert begin(out, last, KILLS).wait().returncode == 0
    assert [step_of(path) for path in checkpoint_folders(folder)][-1] == last
    assert begin(tmp_path / "quiet", last, 0).wait().returncode == 0
    assert steps(out) == steps(tmp_path / "quiet") and all(len(marks) == 1 for marks in steps(out).values())
    assert not any(folder.glob(".step_*.tmp"))
