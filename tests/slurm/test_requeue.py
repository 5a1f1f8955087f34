"""How the batch scripts end and start again, on a real cluster: jobs that sleep, by the code that all of them read."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import ROOT, Cluster, after, sleeping

from data.processes import REQUEUE

# As training that loses a process again and again: from the second start on it stays at one checkpoint.
STUCK = """#!/bin/bash
source slurm/job.sh
progress='going on from|saved at step'
[ -z "${SLURM_RESTART_COUNT:-}" ] || echo "going on from step_00000010"
end_with "$REQUEUE"
"""


@pytest.mark.slow
def test_one_task_of_an_array_is_requeued_and_one_cancelled(cluster: Cluster, tmp_path) -> None:
    """The last has the array's own number.  What waits for those that are requeued starts after them."""
    number = sleeping(cluster, tmp_path, "--array=0-2", f"--output={tmp_path}/%A_%a.out")
    first, cancelled, last = tasks = [cluster.job(tmp_path, f"{number}_{task}") for task in range(3)]
    waiting = after(cluster, tmp_path, first.number, last.number)
    for task in tasks:
        task.until(lambda: "sleeping" in task.words())  # noqa: B023
    cluster.call("scancel", cancelled.number)
    last.warn()
    assert last.end() == "COMPLETED 0:0" and last.fact("Restarts") == "1" and last.fact("JobId") == number
    assert f"job {number}_2: requeued (time 1 of at most 20)" in last.words()
    assert cancelled.end().startswith("CANCELLED") and cancelled.fact("Restarts") == "0"
    assert first.fact("JobState") == "RUNNING" and first.fact("Restarts") == "0"
    first.warn()
    assert first.end() == waiting.end() == "COMPLETED 0:0"


@pytest.mark.slow
def test_time_limits_and_jobs_that_get_nowhere(cluster: Cluster, tmp_path) -> None:
    """SLURM itself warns the first, as a time limit nears; the others would start again for ever."""
    output = f"--output={tmp_path}/%j.out"
    limited = cluster.job(tmp_path, sleeping(cluster, tmp_path, output, "--time=1", "--signal=B:USR1@40"))
    stuck = cluster.job(tmp_path, sleeping(cluster, tmp_path, output, script=STUCK))
    warned = cluster.job(tmp_path, sleeping(cluster, tmp_path, output, starts=9))
    waiting = after(cluster, tmp_path, stuck.number)
    for start in (1, 2, 3):
        warned.until(lambda: warned.words().count("sleeping") == start)  # noqa: B023
        warned.warn()
    assert warned.end() == "FAILED 75:0" and warned.fact("Restarts") == "2"
    assert "is warned as soon as it starts; give sbatch a longer --time" in warned.words()
    assert stuck.end() == "FAILED 75:0" and stuck.fact("Restarts") == "3"
    assert "started 3 times without a newer checkpoint" in stuck.words()
    assert f"what waits for it does not start: {waiting.number}" in stuck.words()
    assert waiting.end().startswith("CANCELLED")
    assert limited.end() == "COMPLETED 0:0" and limited.fact("Restarts") == "1"
    assert "the time limit is near" in limited.words()


def distill(folder: Path, *pictures: str, **array: int) -> str:
    """What distill.sbatch says against such pictures or such an array, in no job."""
    (folder / "pictures").mkdir()
    for name in pictures:
        (folder / "pictures" / name).write_text("")
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "SLURM_JOB_ID": "7"}
    environment |= {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}
    words = ["bash", "slurm/distill.sbatch", f"images={folder}/pictures", f"out={folder}/out"]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not (folder / "out").exists(), done.stdout
    return done.stderr


def test_pictures_of_one_name_and_gaps_in_an_array(tmp_path) -> None:
    for name, array, said in (
        ("same", {}, "chair.png would both be made in"),
        ("gaps", {"ID": 5, "MIN": 0, "MAX": 9, "STEP": 1, "COUNT": 3}, "not evenly spaced, and some pictures would"),
    ):
        (tmp_path / name).mkdir()
        pictures = ["chair.jpg", "chair.png"] if name == "same" else ["chair.png"]
        assert said in distill(tmp_path / name, *pictures, **array)
    (tmp_path / "none").mkdir()
    assert "holds no picture" in distill(tmp_path / "none", "notes.txt")


def test_a_port_that_a_neighbour_has() -> None:
    """Before the job chooses one, or after: then it asks to be started again."""
    with socket.socket() as neighbour:
        neighbour.bind(("", 0))
        neighbour.listen()
        taken = neighbour.getsockname()[1]
        words = [sys.executable, "slurm/free_port.py", str(taken)]
        other = int(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        start = [sys.executable, "slurm/node_launcher.py", "--use_deepspeed", "--num_machines=2", "--num_processes=2",
                 "--main_process_ip=localhost", f"--main_process_port={taken}", "--machine_rank=0",
                 "--deepspeed_multinode_launcher=standard", "train/stage1.py"]  # fmt: skip
        late = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, check=False)
    assert late.returncode == REQUEUE and f"error: port {taken} was taken since the job chose it" in late.stderr
    assert other != taken and 20000 <= other < 32768
    assert int(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout) == taken


STATUS = "import json, runpy, sys; launcher = runpy.run_path('slurm/node_launcher.py'); print(json.dumps(["
STATUS += "launcher['status_of'](codes, processes) for codes, processes in json.loads(sys.argv[1])]))"


def test_a_lost_process_is_no_failure_and_a_failure_outranks_it() -> None:
    """75 asks for another start; -6 is SIGABRT, by which NCCL ends a process that has lost another."""
    cases = {
        ((75, -15), 2): 75,
        ((-6, -15), 2): 75,
        ((-6,), 1): 134,
        ((-6, 2), 2): 102,
        ((-9, 75), 2): 137,
        ((), 2): 75,
    }
    words = [sys.executable, "-c", STATUS, json.dumps(list(cases))]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == list(cases.values())
