"""A hung rank is told from those that wait for it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from train.config import LimitsConfig
from train.watchdog import HUNG, Watchdog, blame


def beats(*counts_and_beats: tuple[int, int]) -> dict[int, dict[str, object]]:
    return {
        rank: {"beats": beats, "count": count, "doing": f"step {count}", "host": "node7", "pid": 40 + rank}
        for rank, (count, beats) in enumerate(counts_and_beats)
    }


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (beats((5, 9), (5, 9), (5, 9)), beats((5, 11), (5, 9), (5, 12)), "no sign of life from rank 1 (host node7"),
        (beats((5, 9), (4, 9), (5, 9)), beats((5, 11), (4, 11), (5, 11)), "behind the others is rank 1 (host node7"),
        (beats((5, 9), (5, 9)), beats((5, 11), (5, 11)), "all 2 ranks are there"),
        (beats((5, 9)), beats((5, 11)), "its own stack follows"),
    ],
)
def test_who_is_to_blame(before, after, words) -> None:
    assert words in blame(before, after, 0)


@pytest.mark.timeout(60)
def test_the_one_that_waits_names_the_one_that_is_silent(tmp_path, capfd) -> None:
    ended: list[int] = []
    waiting = Watchdog(tmp_path, LimitsConfig(step_s=0.5), rank=0, world=2)
    waiting.end = ended.append
    waiting.enter("step", "step 8")
    while not ended:  # rank 1 never starts
        time.sleep(0.05)
    words = capfd.readouterr().err
    assert ended == [HUNG]
    assert "rank 0 has been in step 8 for more than 0.5 s (limits.step_s): no sign of life from rank 1" in words
    waiting.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(60)
def test_ends_also_where_the_file_system_hangs(tmp_path, monkeypatch) -> None:
    """As on a server that no longer answers: whoever touches a file waits for ever."""
    ended: list[int] = []
    hang, release = threading.Event(), threading.Event()
    monkeypatch.setattr("train.watchdog.GRACE", 0.5)
    watchdog = Watchdog(tmp_path, LimitsConfig(step_s=0.5), rank=0, world=2)
    watchdog.end = ended.append

    def never(rank: int) -> Path:
        hang.set()
        release.wait()
        return tmp_path / f"late_{rank}"

    monkeypatch.setattr(watchdog, "_file", never)
    watchdog.enter("step", "step 8")
    while not ended:
        time.sleep(0.05)
    assert hang.is_set() and ended == [HUNG]
    watchdog.closed.set()
    release.set()
    for thread in watchdog.threads:
        thread.join()


@pytest.mark.timeout(60)
def test_phases_that_change_are_left_in_peace(tmp_path) -> None:
    ended: list[int] = []
    watchdog = Watchdog(tmp_path, LimitsConfig(set_up_s=0, step_s=2, checkpoint_s=0), rank=0, world=2)
    watchdog.end = ended.append
    for step in range(8):
        watchdog.enter("step", f"step {step}")
        time.sleep(0.4)
    watchdog.enter("checkpoint", "a checkpoint without limit")
    time.sleep(3)
    watchdog.close()
    assert not ended
