"""A cache of byte ranges on a local disk, for several processes at once.

    folder/  .lock  00/  01/ ... ff/<64 hex digits>

A file's name is the SHA-256 of its whole key; it holds 32 bytes, the SHA-256 of the name and the content, and then the
content.  So what is torn, flipped or from elsewhere is noticed when it is read, deleted and fetched again, and nothing
needs an fsync: after a power failure the worst is a file that fails its check.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import random
import re
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from conf.cli import check
from data.files import require_writable

DIGEST_BYTES = 32
# A process looks at all the files once it has written SCAN_SHARE of the limit, and deletes down to KEEP_SHARE.  While
# another one does so it goes on, but writes no more than twice its share.  So P processes with ranges of R bytes never
# keep more than limit x (KEEP_SHARE + 2 x P x SCAN_SHARE) + P x R; usually it is the limit, since they look in turn.
SCAN_SHARE, KEEP_SHARE = 0.02, 0.95
TOUCH_S = 60.0  # a file used again is marked as used when its mark is older than this: a write fewer at most reads
STALE_S = 3600.0  # a temporary file as old as this was left by a process that was killed
SUBFOLDER, ENTRY = re.compile(r"[0-9a-f]{2}"), re.compile(r"[0-9a-f]{64}")


@dataclass
class CacheConfig:
    """Where byte ranges of shards are kept on a local disk, and how many."""

    folder: str | None = None  # none: nothing is kept
    limit_gb: float = 100.0  # 10^9 bytes

    def __post_init__(self) -> None:
        check(self.folder != "", "cache.folder= is empty; give a folder on a local disk, or null for no cache")
        check(
            math.isfinite(self.limit_gb) and self.limit_gb > 0,
            f"cache.limit_gb={self.limit_gb} holds nothing; give gigabytes above 0, or cache.folder=null for no cache",
        )


class RangeCache:
    """Ranges by key; the least recently used ones go when the limit is reached.

    Readers never wait; one process at a time deletes.  A full disk or a folder that cannot be written any more turns
    the cache off in this process, with one line on stderr.  Can be pickled and forked.
    """

    def __init__(self, folder: str | Path, limit_bytes: int):
        """Raises UserError when `folder` cannot be made or written."""
        self.folder, self.limit = Path(folder).absolute(), limit_bytes
        self._pid, self._off, self._written = -1, False, 0.0
        require_writable(self.folder)

    def get(self, key: list[str | int], count: int) -> bytes | None:
        """The `count` bytes kept under `key`; None when there are none, or damaged ones, which are deleted."""
        self._begin_process()
        if self._off:
            return None
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                digest, content = file.read(DIGEST_BYTES), file.read(count + 1)
                if time.time() - os.fstat(file.fileno()).st_mtime > TOUCH_S:
                    with contextlib.suppress(PermissionError):  # another user's file: it keeps its age
                        os.utime(file.fileno())
            if len(content) == count and digest == _digest(path, content):
                return content
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._turn_off(error)
        return None

    def put(self, key: list[str | int], content: bytes) -> None:
        """Keeps `content`, unless it is more than the limit or another process has not done deleting."""
        self._begin_process()
        if self._off or len(content) > self.limit:
            return
        share, path = SCAN_SHARE * self.limit, self._path(key)
        temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
        try:
            if self._written >= share and self._evict():
                self._written = 0.0
            if self._written > 2 * share:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "xb") as file:
                    file.write(_digest(path, content))
                    file.write(content)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            self._written += DIGEST_BYTES + len(content)
        except OSError as error:
            self._turn_off(error)

    def drop(self, key: list[str | int]) -> None:
        """Forgets what is kept under `key`."""
        with contextlib.suppress(OSError):  # a folder that cannot be written is said when it is written to
            self._path(key).unlink(missing_ok=True)

    def _begin_process(self) -> None:
        if self._pid != os.getpid():
            # A random start spreads the processes' scans in time, and short-lived processes scan their share too.  Not
            # from the global generator: training's random numbers must not depend on the cache.
            start = random.SystemRandom().random() * SCAN_SHARE * self.limit
            self._pid, self._off, self._written = os.getpid(), False, start

    def _path(self, key: list[str | int]) -> Path:
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return self.folder / name[:2] / name

    def _turn_off(self, error: OSError) -> None:
        self._off = True
        print(
            f"note: the cache {self.folder} cannot be used any more ({error.strerror or error}); this process goes on "
            "without it",
            file=sys.stderr,
            flush=True,
        )

    def _evict(self) -> bool:
        """False when another process is at it, which is not waited for."""
        with open(self.folder / ".lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            files = sorted(_files(self.folder))
            total = sum(size for _, size, _ in files)
            for used, size, path in files:
                if total <= KEEP_SHARE * self.limit or used == math.inf:
                    break
                path.unlink(missing_ok=True)
                total -= size
        return True


def _digest(path: Path, content: bytes) -> bytes:
    digest = hashlib.sha256(path.name.encode())
    digest.update(content)
    return digest.digest()


def _files(folder: Path) -> list[tuple[float, int, Path]]:
    """(last use in seconds, bytes, path) of the cache's own files; nothing else in the folder is ever touched."""
    found = []
    for subfolder in os.scandir(folder):
        if not SUBFOLDER.fullmatch(subfolder.name) or not subfolder.is_dir(follow_symlinks=False):
            continue
        for entry in os.scandir(subfolder):
            is_temporary = entry.name.startswith(".") and entry.name.endswith(".tmp")
            if not is_temporary and not ENTRY.fullmatch(entry.name):
                continue
            with contextlib.suppress(FileNotFoundError):  # renamed, or deleted by a reader that found it damaged
                status = entry.stat(follow_symlinks=False)
                if is_temporary and time.time() - status.st_mtime > STALE_S:
                    os.unlink(entry.path)
                elif is_temporary:
                    found.append((math.inf, status.st_size, Path(entry.path)))  # being written: counted, not deleted
                else:
                    found.append((status.st_mtime, status.st_size, Path(entry.path)))
    return found
