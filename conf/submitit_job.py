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
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    # One task of an array may bear the number of the whole array, all of which scontrol would requeue.
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    count, most = (
        int(os.environ.get(name, usual)) for name, usual in (("SLURM_RESTART_COUNT", 0), ("MAX_REQUEUES", 20))
    )
    if count >= most:
        print(f"error: job {job} was requeued {count} times, and MAX_REQUEUES={most}; submit it again to go on",
              file=sys.stderr, flush=True)  # fmt: skip
        return
    if os.environ.get("SLURM_PROCID", "0") == "0":
        print(f"job {job}: requeued (time {count + 1} of at most {most})", flush=True)
        for _ in range(10):  # the controller may be slow to answer
            if subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0:
                break
            time.sleep(15)
        else:
            print(f"error: job {job} could not be requeued; submit it again to go on", file=sys.stderr, flush=True)
            return
    time.sleep(600)  # until the scheduler ends this process, and not the job because one of its processes has ended
