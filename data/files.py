"""Files that appear whole or not at all, and the one error a user is meant to read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


class UserError(Exception):
    """Something the user can mend: the message names the file or key, the value and the remedy.

    Entry points print it as one line and exit with status 2; no traceback.
    """


def fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is fsynced and renamed to `path`, else removed.

    Raises UserError when the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in an error of its own
        raise UserError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; free space or choose another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success every file in it is fsynced and it is renamed to `path`.

    An existing `path` is replaced only after the new one is whole.  Raises UserError as `atomic_file` does.
    """
    path = Path(path)
    tag = uuid.uuid4().hex[:8]
    temporary, old = path.with_name(f".{path.name}.{tag}.tmp"), path.with_name(f".{path.name}.{tag}.old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        fsync_folder(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in an error of its own
        raise UserError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, sort_keys=False, allow_nan=False) + "\n")


def content_mark(path: str | os.PathLike[str]) -> str:
    """Tells two versions of a large file apart without reading all of it: its size and a hash of 3 samples of 1 MiB."""
    size, sample = os.path.getsize(path), 2**20
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for offset in (0, size // 2, max(size - sample, 0)):
            file.seek(offset)
            digest.update(file.read(sample))
    return digest.hexdigest()


def read_json(path: str | os.PathLike[str], what: str) -> Any:
    """JSON from `path`; UserError naming `what` and the file when it is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{what}: {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:  # no text, no JSON, too deep, numbers too long
        raise UserError(f"{what}: {path} cannot be read: {error}") from None


def require_writable(folder: str | os.PathLike[str], needed_mb: int = 1) -> None:
    """Fails at once, before any expensive work, when `folder` cannot be made or written or lacks `needed_mb`."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{uuid.uuid4().hex[:8]}"
        probe.write_bytes(b"0")
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from None
    free_mb = shutil.disk_usage(folder).free // 2**20
    if free_mb < needed_mb:
        raise UserError(f"{folder} has {free_mb} MiB free and needs {needed_mb}; free space or choose another folder")
