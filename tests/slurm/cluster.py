"""Jobs on the test cluster."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
SLEEP = """#!/bin/bash
source slurm/job.sh
[ "${SLURM_RESTART_COUNT:-0}" -lt "$STARTS" ] || exit 0
status=0
until_the_end bash -c 'echo sleeping; exec sleep 600' || status=$?
end_with "$status"
"""
SMALL = ["--gpus-per-node=0", "--cpus-per-task=2", "--time=30"]


@dataclass
class Job:
    cluster: Cluster
    number: str
    log: Path

    def words(self) -> str:
        return self.log.read_text() if self.log.is_file() else ""

    def fact(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", self.cluster.call("scontrol", "show", "job", self.number))
        assert found, name
        return found[1]

    def until(self, happened: Callable[[], object], limit: float = 400) -> None:
        deadline = time.monotonic() + limit
        while not happened():
            assert time.monotonic() < deadline, f"{self.cluster.call('squeue')}\n{self.words()[-5000:]}"
            time.sleep(0.2)

    def end(self, limit: float = 600) -> str:
        """Its state and exit status, when it has come to an end, as in COMPLETED 0:0."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.until(lambda: self.fact("JobState") in over, limit)
        return f"{self.fact('JobState')} {self.fact('ExitCode')}"

    def warn(self) -> None:
        """As the scheduler does some time before the limit (#SBATCH --signal=B:USR1@...)."""
        self.cluster.call("scancel", "--batch", "--signal=USR1", self.number)


@dataclass
class Cluster:
    base: Path
    environment: dict[str, str]

    def call(self, *words: str, **more: str) -> str:
        done = subprocess.run(
            words, cwd=ROOT, env=self.environment | more, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    def submit(self, folder: Path, *words: str, **more: str) -> Job:
        """sbatch WORDS from the repository's root, its log in `folder`."""
        return self.job(folder, self.call("sbatch", "--parsable", f"--output={folder}/%j.out", *words, **more).strip())

    def job(self, folder: Path, number: str) -> Job:
        return Job(self, number, folder / f"{number}.out")

    def kill_node(self, name: str) -> None:
        """SIGKILL of the node's daemon and of all that runs on it: the controller finds it gone."""
        os.kill(int((self.base / f"slurmd.{name}.pid").read_text()), signal.SIGKILL)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                where = process.environ()  # another cluster may have a node of that name
                if (where.get("SLURMD_NODENAME"), where.get("SLURM_CONF")) == (name, f"{self.base}/slurm.conf"):
                    keepers = [one for one in process.parents() if one.name().startswith("slurmstepd")]
                    for one in (*keepers, process):
                        one.kill()

    def start_node(self, name: str) -> None:
        self.call("bash", "slurm/local-cluster.sh", "node-up", name)


def sleeping(cluster: Cluster, folder: Path, *words: str, script: str = SLEEP, starts: int = 1) -> str:
    """The number of a job that sleeps in so many starts, and ends by itself in the next."""
    path = folder / "job.sbatch"
    path.write_text(script)
    options = ["--parsable", "--requeue", "--open-mode=append", *SMALL]
    return cluster.call("sbatch", *options, *words, str(path), STARTS=str(starts)).strip()


def after(cluster: Cluster, folder: Path, *numbers: str) -> Job:
    words = [f"--dependency=afterok:{':'.join(numbers)}", "--kill-on-invalid-dep=yes", "--wrap=true"]
    return cluster.submit(folder, *words)
