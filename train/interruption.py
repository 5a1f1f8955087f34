"""Why a run ends before its last step and wants to be started again: it was asked to, or another process is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from data.processes import REQUEUE

# Of preemption, time limits (submitit's are SIGUSR2) and Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
# In what gloo, NCCL and torch's store say when the other end is gone.
PEER_LOST = (
    "connection closed by peer", "connection reset by peer", "connection refused", "broken pipe", "socket closed",
    "remote process exited", "recv, 0 bytes", "recvvalue failed", "timed out waiting", "wait timeout", "failed to recv",
)  # fmt: skip


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


@contextlib.contextmanager
def peers_needed() -> Iterator[None]:
    """SystemExit with REQUEUE where the block failed because another process of the run is gone.

    That one, or its node, is what failed; this process has nothing to mend.
    """
    try:
        yield
    except RuntimeError as error:  # of which torch's own network errors are kinds
        if not any(sign in str(error).lower() for sign in PEER_LOST):
            raise
        print(
            f"error: rank {os.environ.get('RANK', '0')} has lost another process of the run "
            f"({str(error).splitlines()[0][:200]}); the same command goes on from the last checkpoint",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        raise SystemExit(REQUEUE) from None
