"""Runs scripts in processes forked from one that has imported torch, diffusers and DeepSpeed already.

Half a minute less a training run than a fresh interpreter for every rank. The scripts are the user's own, run as
`__main__` with the environment that `accelerate launch --use_deepspeed` gives its ranks; some tests use the launcher
itself, and their losses are compared with those of runs from here.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What DeepSpeed and W&B import after their start, which takes as long as a small training.
LATE = (
    "deepspeed.module_inject", "deepspeed.runtime.zero.muon.muon_optimizer", "pandas",
    "opentelemetry.exporter.otlp.proto.http._log_exporter", "opentelemetry.exporter.otlp.proto.http.metric_exporter",
    "wandb.sdk.launch.inputs.internal",
)  # fmt: skip


def rank_environment(rank: int, world: int, nodes: int, port: int) -> dict[str, str]:
    local = world // nodes
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank % local), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(local),
        "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no",
        "ACCELERATE_CONFIG_DS_FIELDS": "none",
    }  # fmt: skip


def become(request: dict[str, Any], rank: int, port: int) -> None:
    """In the forked child: the script, to its end."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        descriptor = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request["processes"] > 1:
        os.environ |= rank_environment(rank, request["processes"], request["nodes"], port)
        import torch

        torch.set_num_threads(1)
    sys.argv = request["words"]
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # as the interpreter does at its top
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print
    # The PATH that training has: another ninja would compile DeepSpeed's op again, and the next run once more.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PATH": path}
    for name in LATE:  # an older release may lack one
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    from deepspeed.comm.torch import build_shm_op

    import distill.sds  # noqa: F401
    import train.checkpoint_files  # DeepSpeed with it
    import train.loop  # noqa: F401

    build_shm_op()
    os.chdir(ROOT)
    for line in sys.stdin:
        request = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = []
        for rank in range(request["processes"]):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, 0)
                become(request, rank, port)
            ranks.append(pid)
        print(json.dumps(ranks), file=answers)
        left, status, failed_at = set(ranks), 0, None
        while left:
            pid, code = os.waitpid(-1, os.WNOHANG)
            if pid in left:
                left.discard(pid)
                code = os.waitstatus_to_exitcode(code)
                if code != 0 and failed_at is None:
                    status, failed_at = code, time.monotonic()
                    for other in left:  # as the launcher ends the ranks of one that failed
                        os.kill(other, signal.SIGTERM)
            elif failed_at is not None and time.monotonic() > failed_at + 8:
                for other in left:
                    os.kill(other, signal.SIGKILL)
            else:
                time.sleep(0.02)
        print(status, file=answers)


@cache
def server() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


class Run:
    """A script that runs; `ranks` are its processes, which believe themselves on so many nodes. One at a time."""

    def __init__(self, words: list[str], processes: int, out: Path, nodes: int = 1) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        paths = {name: str(out / name) for name in ("stdout", "stderr")}
        for path in paths.values():
            Path(path).write_text("")
        process = server()
        assert process.stdin is not None
        process.stdin.write(json.dumps({"words": words, "processes": processes, "nodes": nodes, **paths}) + "\n")
        self.ranks = json.loads(self._line(400))
        self.returncode: int | None = None

    def _line(self, timeout: float) -> str:
        stdout = server().stdout
        assert stdout is not None
        ready, _, _ = select.select([stdout], [], [], timeout)
        assert ready, f"nothing within {timeout} s"
        return stdout.readline()

    @property
    def stdout(self) -> str:
        return (self.out / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.out / "stderr").read_text()

    def wait(self, timeout: float = 800) -> Run:
        try:
            self.returncode = int(self._line(timeout))
        except AssertionError:
            for rank in self.ranks:
                os.kill(rank, signal.SIGKILL)
            self.returncode = int(self._line(60))
            raise
        return self


if __name__ == "__main__":
    serve()
