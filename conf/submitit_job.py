"""What a job of a sweep needs that `hydra/launcher=submitit_slurm` has started: its ranks, and to be requeued."""

from __future__ import annotations

import os
import subprocess
import sys
import time


def take_rank() -> None:
    """Sets RANK and the like, as a launcher would, from what srun says.  Nothing where srun started one process."""
    step = {name: os.environ.get(f"SLURM_{name}", "") for name in ("STEP_NUM_TASKS", "PROCID", "LOCALID", "JOB_ID")}
    if "RANK" in os.environ or int(step["STEP_NUM_TASKS"] or 1) == 1:
        return
    words = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
    first = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[0]
    os.environ |= {
        "RANK": step["PROCID"], "LOCAL_RANK": step["LOCALID"], "WORLD_SIZE": step["STEP_NUM_TASKS"],
        "MASTER_ADDR": first, "MASTER_PORT": str(20000 + int(step["JOB_ID"]) % 20000),
    }  # fmt: skip


def requeue() -> None:
    """Has SLURM start this job again, up to MAX_REQUEUES times.  Nothing in a process that submitit has not started."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return
    job = os.environ["SLURM_JOB_ID"]
    count, most = (
        int(os.environ.get(name, usual)) for name, usual in (("SLURM_RESTART_COUNT", 0), ("MAX_REQUEUES", 20))
    )
    if count >= most:
        print(f"error: job {job} was requeued {count} times, and MAX_REQUEUES={most}; submit it again to go on",
              file=sys.stderr, flush=True)  # fmt: skip
        return
    if os.environ.get("SLURM_PROCID", "0") == "0":
        print(f"job {job}: saved, and requeued (time {count + 1} of at most {most})", flush=True)
        subprocess.run(["scontrol", "requeue", job], check=True)
    time.sleep(60)  # until the scheduler ends this process, and not the job because one of its processes has ended
