"""A real server of shards in a process of its own, and what it serves."""

from __future__ import annotations

import contextlib
import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np

SERVER = Path(__file__).with_name("range_server.py")
CONTENT = np.random.default_rng(0).bytes(300_000)
LARGE = 64 * 2**20


@contextlib.contextmanager
def running(*command: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server of its own process, that prints its port; yields its address."""
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert process.stdout is not None
        yield f"127.0.0.1:{int(process.stdout.readline())}", process
    finally:
        process.kill()
        process.wait()


def counts(server: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{server}/counts/") as reply:
        found: dict[str, int] = json.load(reply)
    return found
