"""Ranks of a measurement: the script that calls this, started once a rank, with the environment of a launcher."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def measured_by_ranks(processes: int, words: list[str], apart: bool = False) -> dict[str, Any]:
    """The last line of rank 0, as JSON, of the calling script with its own arguments and `words`.

    apart: the ranks believe themselves on different nodes, and do not speak through shared memory.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(processes):
        place = {"RANK": rank, "LOCAL_RANK": 0 if apart else rank, "WORLD_SIZE": processes,
                 "LOCAL_WORLD_SIZE": 1 if apart else processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                 "ACCELERATE_USE_DEEPSPEED": "true", "OMP_NUM_THREADS": 1}  # fmt: skip
        environment = os.environ | {name: str(value) for name, value in place.items()}
        command = [sys.executable, *sys.argv, *words]
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
    lines = [rank.communicate()[0].strip().splitlines() for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"error: {' '.join(words)}: a rank ended; its words are above")
    found: dict[str, Any] = json.loads(lines[0][-1])
    return found
