"""One views folder, many renderers: each task of an array renders its own part of the objects."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from data.files import UserError
from data.processes import locked

ARRAY = "SLURM_ARRAY_TASK_"


def which_part(part: int | None, parts: int | None, environment: Mapping[str, str]) -> tuple[int, int]:
    """(part, parts): as given, else of the SLURM array that this process is a task of, else (0, 1).

    With `parts` given, the part is the task's own number, so that a single task can be repeated: --array=3 ... parts=8.
    """
    if part is None and f"{ARRAY}ID" in environment and parts != 1:
        number, first, step, count = (
            int(environment.get(ARRAY + name, default))
            for name, default in (("ID", "0"), ("MIN", "0"), ("STEP", "1"), ("COUNT", "1"))
        )
        part = number if parts is not None else (number - first) // max(step, 1)
        parts = count if parts is None else parts
    part, parts = part or 0, parts or 1
    if not 0 <= part < parts:
        raise UserError(
            f"part={part} is not within 0..{parts - 1}; submit the array as --array=0-{parts - 1}, or give part= and "
            "parts="
        )
    return part, parts


def in_part(uid: str, part: int, parts: int) -> bool:
    """By hash of the uid, so that parts stay disjoint where two tasks see different lists."""
    return int.from_bytes(hashlib.sha256(uid.encode()).digest()[:8], "little") % parts == part


@contextlib.contextmanager
def only_renderer(out: Path, part: int, parts: int) -> Iterator[None]:
    """Keeps other renderers of this part out of the folder and removes what an earlier one, killed, left half done.

    A renderer of all objects keeps out the parts too; parts of different division keep each other out.
    """
    with contextlib.ExitStack() as stack:
        if parts == 1:
            stack.enter_context(locked(out))
        else:
            stack.enter_context(shared_lock(out, f"parts={parts}"))
            stack.enter_context(locked(out / f".part-{part:05d}"))
        for pattern in (".*.tmp", ".*.old"):
            for left in out.glob(pattern):
                if in_part(left.name.split(".")[1], part, parts):  # .UID.TAG.tmp, see data/files.py
                    shutil.rmtree(left, ignore_errors=True)
        yield


@contextlib.contextmanager
def shared_lock(out: Path, division: str, wait_s: float = 45) -> Iterator[None]:
    """Holds `out/.lock` together with all who name the same `division`; UserError when others hold it."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a+") as lock:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the first one says which division
            lock.truncate(0)
            lock.write(division)
            lock.flush()
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # the first one is still writing, or somebody renders all objects
                if time.monotonic() > deadline:
                    raise UserError(f"{out} is in use by a renderer of all objects; wait for it or stop it") from None
                time.sleep(0.1)
        lock.seek(0)
        if (found := lock.read(64)) != division:  # also when another came in between the two locks
            raise UserError(f"{out} is in use by renderers with {found}, not {division}; give all the same parts=")
        yield
