"""A sweep through submitit: a job a value, ranks that srun starts, requeued near the time limit."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from cluster import ROOT, Cluster
from tiny_runs import losses, tiny_overrides


@pytest.mark.slow
def test_a_job_a_value_of_two_ranks_each(cluster: Cluster, tiny, tmp_path) -> None:
    words = [sys.executable, "train/stage1.py", "--multirun", "hydra/launcher=submitit_slurm",
             "hydra.launcher.tasks_per_node=2", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=30",
             f"hydra.sweep.dir={tmp_path}/sweep", *tiny_overrides(tiny), "optim.lr=1e-3,2e-3",
             f"out='{tmp_path}/lr-${{optim.lr}}'", "steps=40"]  # fmt: skip
    with open(tmp_path / "log", "w") as log:
        sweep = subprocess.Popen(words, cwd=ROOT, env=cluster.environment, stdout=log, stderr=log)
    outs = [tmp_path / "lr-0.001", tmp_path / "lr-0.002"]
    logs = tmp_path / "sweep" / ".submitit"
    job = cluster.job(tmp_path, "")
    job.log = tmp_path / "log"
    job.until((outs[0] / "checkpoints" / "step_00000002").exists)
    (number,) = (path.name for path in logs.glob("*_0"))  # the first value's, of the array
    cluster.call("scancel", "--signal=USR2", number)  # what submitit has SLURM send some time before the limit
    assert sweep.wait(timeout=600) == 0, job.words()[-3000:]
    for out in outs:
        assert [step for step, _ in losses(out)] == list(range(1, 41))
        state = json.loads((out / "checkpoints" / "step_00000040" / "state.json").read_text())
        assert state["world_size"] == 2 and state["identity"]["optim.lr"] == float(out.name.removeprefix("lr-"))
    words = "".join(path.read_text() for path in (logs / number).glob("*.out"))
    assert "requeued (time 1 of at most 20)" in words and len(re.findall("going on from", words)) == 1
