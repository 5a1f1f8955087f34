"""A SLURM cluster of two nodes on this machine, by the project's own script."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
sys.path.insert(0, str(Path(__file__).parent))

from cluster import ROOT, Cluster


def free_ports(count: int) -> int:
    """The first of so many in a row that nobody listens at."""
    for first in range(17520, 32000, count):
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(first, first + count):
                probes.enter_context(socket.socket()).bind(("", port))
            return first
    raise AssertionError("no ports are free")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Jobs on it find this environment's Python, and more cores than there are."""
    base = Path(tempfile.mkdtemp(prefix="isotropic3d-cluster-"))
    base.chmod(0o755)  # else munge refuses it
    environment = os.environ | {
        "CLUSTER": str(base), "CPUS": "8", "PORT": str(free_ports(3)), "SLURM_CONF": f"{base}/slurm.conf",
        "PYTHON": sys.executable, "PROCESSES_PER_NODE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    script = ["bash", "slurm/local-cluster.sh"]
    subprocess.run([*script, "start"], cwd=ROOT, env=environment, check=True)
    yield Cluster(base, environment)
    subprocess.run([*script, "stop"], cwd=ROOT, env=environment, check=True)
    shutil.rmtree(base)
