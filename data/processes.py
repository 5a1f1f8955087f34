"""Processes that do not outlive the one that started them, and folders that one process works in at a time."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from data.files import UserError, require_writable

T = TypeVar("T")
PR_SET_PDEATHSIG = 1  # prctl(2)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of file systems, such as Lustre mounted without flock
REQUEUE = os.EX_TEMPFAIL  # 75: a program's that has saved its state and wants to be started again


def die_with_parent(by: signal.Signals = signal.SIGTERM) -> None:
    """Asks Linux for a signal when the parent ends, however it ends: a killed launcher leaves nobody working."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by)
        # torchrun's launcher runs the Python that it starts; another parent has adopted what a killed one left.
        if "TORCHELASTIC_RUN_ID" in os.environ and program(os.getppid()) != program(os.getpid()):
            os.kill(os.getpid(), by)


def program(pid: int) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/exe")
    return ""


@contextlib.contextmanager
def locked(folder: Path, wait_s: float | None = None) -> Iterator[None]:
    """Keeps other processes out of `folder`, until the end of the block or of this process, however it ends.

    Waits a while for a former process that is on its way out, by default 45 s, and 10 minutes in a job that has started
    again, since NFS keeps the lock of a node that is gone for some; then UserError naming its number.  Where the file
    system has no locks, that is said.
    """
    if wait_s is None:
        wait_s = 45 if os.environ.get("SLURM_RESTART_COUNT", "0") == "0" else 600
    require_writable(folder)
    with open(folder / ".lock", "a+") as lock:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    lock.seek(0)
                    owner = lock.read(32).strip() or "unknown"
                    raise UserError(
                        f"{folder} is in use by process {owner}; wait for it or stop it, or choose another out="
                    ) from None
                time.sleep(0.5)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                print(f"warning: the file system of {folder} has no locks ({error.strerror}); let no two processes "
                      "work in it at once", file=sys.stderr, flush=True)  # fmt: skip
                break
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def parallel(work: Callable[..., T], tasks: dict[int, tuple[Any, ...]], processes: int) -> Iterator[tuple[int, T]]:
    """(number, work(*arguments)) of each task as it is done.  processes: 0 for one a core.

    Fresh interpreters, since forking one that has threads, as torch has, may hang; they end with this one.
    """
    workers = min(processes or len(os.sched_getaffinity(0)), len(tasks))
    if workers <= 1:
        yield from ((number, work(*arguments)) for number, arguments in tasks.items())
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=die_with_parent) as pool:
        futures = {pool.submit(work, *arguments): number for number, arguments in tasks.items()}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
