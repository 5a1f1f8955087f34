"""`tryrun=true`: does this configuration work here?  Three steps, a checkpoint, a resume and a validation, in minutes.

The training command itself is run twice in each of the launched processes, with few steps and a folder of its own: the
first time it is asked to end after two steps, the second time it goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.processes import REQUEUE, die_with_parent
from train.config import TrainConfig

STEPS, FIRST = 3, 2


def try_run(config: TrainConfig) -> None:
    """SystemExit with the command's own status where it fails, after its own words."""
    folder = Path(config.out) / "tryrun"
    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        shutil.rmtree(folder, ignore_errors=True)  # of a former try
    try:
        with meeting() as ports:
            first = begin(config, folder, ports[0], REQUEUE, f"end_after={FIRST}")
            seconds = [first, begin(config, folder, ports[1], 0, "end_after=0")]
        if is_main:
            print(words(config, folder, seconds), flush=True)
    finally:
        if is_main:
            for large in ("checkpoints", "export"):
                shutil.rmtree(folder / large, ignore_errors=True)


@contextlib.contextmanager
def meeting() -> Iterator[list[int]]:
    """Two free ports of rank 0's host: a run must not meet what the former left in the launcher's own store."""
    with contextlib.ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(2)]
        for probe in sockets:
            probe.bind(("", 0))
        ports = [probe.getsockname()[1] for probe in sockets]
    if "RANK" not in os.environ:
        yield ports
        return
    from torch.distributed import TCPStore

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    own = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = TCPStore(host, port, world, is_master=own, wait_for_workers=False)
    if rank == 0:
        store.set("tryrun", json.dumps(ports))
    yield json.loads(store.get("tryrun"))


def begin(config: TrainConfig, folder: Path, port: int, expected: int, *more: str) -> float:
    """Runs this process's command, changed; returns its seconds."""
    few = min(config.validation.loss_objects, config.micro_batch_size)
    changes = [
        "tryrun=false", f"out={folder}", "resume=auto", f"steps={STEPS}", "log_every=1", f"checkpoint_every={FIRST}",
        "milestone_every=0", "wandb.mode=disabled", "validation.every=0", f"validation.loss_objects={few}",
        "validation.sample_objects=1", "validation.sample_steps=2", *more,
    ]  # fmt: skip
    environment = os.environ | {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}
    began = time.monotonic()
    command = [sys.executable, *sys.argv, *changes]
    process = subprocess.Popen(command, env=environment, preexec_fn=die_with_parent)  # noqa: PLW1509
    while True:
        with contextlib.suppress(KeyboardInterrupt):  # the command has it too, and ends by itself
            status = process.wait()
            break
    if status != expected:
        raise SystemExit(status if status > 0 else 128 - status)
    return time.monotonic() - began


def words(config: TrainConfig, folder: Path, seconds: list[float]) -> str:
    rows: dict[int, dict[str, Any]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["global_step"], {}).update(row)
    last = rows[STEPS]
    path = max((folder / "checkpoints").glob("step_*"))
    gigabytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e9
    looked = [f"{name} {last[name]:.4g}" for name in last if name.startswith(("validation/", "samples/"))]
    losses = ", ".join(f"{row['loss']:.4f}" for _, row in sorted(rows.items()))
    return "\n".join(
        [
            f"tryrun: stage {config.stage} works here, on {config.processes} processes",
            f"  steps: loss {losses}; the second took "
            f"{1 / rows[FIRST]['steps_per_s']:.2f} s, the most memory of rank 0 is {last['memory_gib']:.2f} GiB",
            f"  checkpoint: {gigabytes:.2f} GB; gone on from it after {FIRST} steps",
            f"  validation: {', '.join(looked)}; {folder}/samples",
            f"  seconds with set-up: {seconds[0]:.0f}, and {seconds[1]:.0f} from the checkpoint on",
        ]
    )
