"""What Ctrl-C and a scheduler's signals ask of a run, and when it obeys."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from data.processes import REQUEUE

LEAVE = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # of schedulers, which want the machine


class StopSignals:
    """The first Ctrl-C asks for an end with a mesh of what there is; a second one interrupts at once.

    One of LEAVE ends the process with REQUEUE: at once, since a snapshot holds all that is worth keeping, or, inside
    `patiently`, when whoever works there has looked at `signal` and saved it.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.before: dict[int, Any] = {}
        self.patient = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self.note) for s in (signal.SIGINT, *LEAVE)}
        return self

    @contextlib.contextmanager
    def patiently(self) -> Iterator[None]:
        self.patient = True
        try:
            yield
        finally:
            self.patient = False

    def note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell's `&` has had SIGINT ignored
        if number in LEAVE and not self.patient:
            raise SystemExit(REQUEUE)
        how = "leaving after this step" if number in LEAVE else "ending with a mesh of what there is"
        print(f"signal {number}: {how}; a second Ctrl-C stops at once", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
