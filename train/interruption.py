"""Signals that ask a run to save and end, as preemption, time limits and Ctrl-C send them."""

from __future__ import annotations

import os
import signal
from types import FrameType

REQUEUE = os.EX_TEMPFAIL  # 75: what a run exits with that has saved its state and wants to be started again
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interruption:
    """From its making on, one of SIGNALS is `noted` instead of ending this process."""

    def __init__(self) -> None:
        self.noted = False
        self._former = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True

    def close(self) -> None:
        """Gives the signals their former meaning back."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
