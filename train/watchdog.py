"""A rank that hangs is named and the job ends: each says in a file of the run's folder what it is doing."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.config import LimitsConfig

HUNG = os.EX_TEMPFAIL  # as a run exits that wants to be started again: the last checkpoint is whole
SLOWEST_BEAT = 15.0  # seconds
GRACE = 60.0  # seconds for finding out whose fault it is, before this process ends in any case


class Watchdog:
    """Threads beside the training that end this process when one phase lasts beyond its limit.

    Every rank enters the same phases in the same order.  So the rank to blame is one whose thread has fallen silent
    (stopped, or its node is gone), or else one that is in an earlier phase than the others.  Files, not the process
    group, because that is what hangs; signs of life are counted, not dated, because nodes' clocks differ.  Should the
    file system hang as well, all end without a name: what watches the time touches no file.
    """

    def __init__(self, folder: Path, limits: LimitsConfig, rank: int, world: int):
        self.folder, self.limits, self.rank, self.world = folder / "heartbeats", asdict(limits), rank, world
        longest = [limit for limit in self.limits.values() if limit > 0]
        self.period = min([SLOWEST_BEAT, *(limit / 10 for limit in longest)])
        self.beats, self.count, self.kind, self.doing = 0, 0, "set_up_s", "set-up"
        self.since = time.monotonic()
        self.end: Callable[[int], Any] = os._exit  # the main thread may hang where no exception reaches it
        self.closed = threading.Event()
        self.threads = [
            threading.Thread(target=work, name=f"watchdog {work.__name__}", daemon=True)
            for work in (self._beat_on, self._watch)
        ]
        if longest:
            self.folder.mkdir(parents=True, exist_ok=True)
            for thread in self.threads:
                thread.start()

    def enter(self, phase: str, doing: str) -> None:
        """phase: set_up, step or checkpoint; doing: what messages call it."""
        self.since = time.monotonic()
        self.kind, self.doing = f"{phase}_s", doing
        self.count += 1

    def close(self) -> None:
        self.closed.set()
        if self.threads[0].ident is not None:
            for thread in self.threads:
                thread.join(GRACE)
            if any(thread.is_alive() for thread in self.threads):  # in a file system that hangs
                return
            self._file(self.rank).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # until the last rank is gone
                self.folder.rmdir()

    def _file(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.json"

    def _beat_on(self) -> None:
        while not self.closed.wait(self.period):
            self._beat()

    def _beat(self) -> None:
        self.beats += 1
        words = {"rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(), "beats": self.beats,
                 "count": self.count, "doing": self.doing}  # fmt: skip
        temporary = self._file(self.rank).with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(words))
            os.replace(temporary, self._file(self.rank))
        except OSError as error:
            # A full disk must not end the run (see train.checkpoints); the others look here only when they wait.
            print(f"warning: rank {self.rank} cannot write {temporary}: {error.strerror}", file=sys.stderr, flush=True)

    def _read(self) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in range(self.world):
            try:
                found[rank] = json.loads(self._file(rank).read_text())
            except (OSError, ValueError):
                found[rank] = {"beats": 0, "count": -1, "doing": "starting", "host": "unknown", "pid": 0}
        return found

    def _watch(self) -> None:
        while not self.closed.wait(self.period):
            count, limit, lasted = self.count, self.limits[self.kind], time.monotonic() - self.since
            if 0 < limit < lasted:
                in_any_case = threading.Timer(4 * self.period + GRACE, self._end_if_still_at, [count])
                in_any_case.daemon = True
                in_any_case.start()
                self._give_up(limit, count)
                in_any_case.cancel()

    def _end_if_still_at(self, count: int) -> None:
        if self.count == count and not self.closed.is_set():
            self.end(HUNG)

    def _give_up(self, limit: float, count: int) -> None:
        """Ends this process, unless it goes on after all from where it was at `count`."""
        doing = self.doing
        before = self._read()
        if self.closed.wait(4 * self.period) or self.count != count:  # others beat meanwhile, if they live
            return
        words = blame(before, self._read(), self.rank)
        print(
            f"error: rank {self.rank} has been in {doing} for more than {limit:g} s (limits.{self.kind}): {words}; "
            "ending; the same command goes on from the last checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        self.end(HUNG)


def blame(before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]], own: int) -> str:
    """Which ranks the others wait for, from two looks at the beats with several periods between them."""

    def name(rank: int) -> str:
        return f"rank {rank} (host {after[rank]['host']}, process {after[rank]['pid']}, in {after[rank]['doing']})"

    silent = [rank for rank in after if rank != own and after[rank]["beats"] == before[rank]["beats"]]
    if silent:
        return f"no sign of life from {', '.join(map(name, silent))}: stopped, or its node is gone"
    first = min(one["count"] for one in after.values())
    behind = [rank for rank in after if after[rank]["count"] == first]
    if len(behind) < len(after):
        return f"behind the others is {', '.join(map(name, behind))}"
    if len(after) == 1:
        return "its own stack follows"
    return f"all {len(after)} ranks are there; the network between them, or the file system, may hang"
