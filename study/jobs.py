"""Variants trained several at a time on one machine: each job is the study's own command with fewer variants."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from data.processes import die_with_parent
from demo.run import PYTHON, ROOT
from study.config import StudyConfig, words_of
from study.variants import BASE, Variant


@dataclass(frozen=True)
class Job:
    name: str
    command: list[str]
    after_base: bool = False  # it needs what the job of `both` makes


def jobs_of(config: StudyConfig, variants: list[Variant]) -> list[Job]:
    """`both` first; then what trains a stage 1 of its own, the meshes, and what goes on from the stage 1 of `both`."""

    def command(variant: str, distil: int = 0) -> list[str]:
        return [*PYTHON, "study/run.py", *words_of(replace(config, variants=[variant], distil=distil, tables=False,
                                                           jobs=1))]  # fmt: skip

    others = [one for one in variants if one.name != BASE]
    own = [Job(one.name, command(one.name)) for one in others if one.stage1 is not None]
    following = [Job(one.name, command(one.name), after_base=True) for one in others if one.stage1 is None]
    meshes = [Job("meshes", command(BASE, config.distil), after_base=True)] if config.distil else []
    base = [Job(BASE, command(BASE))] if following or meshes or len(others) < len(variants) else []
    return [*base, *own, *meshes, *following]


def started(job: Job, log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with open(log, "ab") as words:
        return subprocess.Popen(job.command, cwd=ROOT, env=environment, stdout=words, stderr=subprocess.STDOUT,
                                preexec_fn=die_with_parent)  # noqa: PLW1509  # fmt: skip


def work_off(jobs: list[Job], at_once: int, out: Path) -> None:
    """Runs so many of the jobs at a time; what they say goes to out/jobs/<name>.log.

    One that fails costs itself alone (`both`, those after it): it is named, and whoever calls runs what is missing.
    """
    (out / "jobs").mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // at_once, 1))}
    waiting = list(jobs)
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    base_done = False
    try:
        while waiting or running:
            ready = [job for job in waiting if base_done or not job.after_base]
            for job in ready[: at_once - len(running)]:
                log = out / "jobs" / f"{job.name}.log"
                running[job.name] = started(job, log, environment), time.monotonic()
                waiting.remove(job)
                print(f"job {job.name}: began; what it says: {log}", flush=True)
            time.sleep(0.5)
            for name in [name for name, (process, _) in running.items() if process.poll() is not None]:
                process, began = running.pop(name)
                status = process.returncode
                print(f"job {name}: ended with status {status} after {time.monotonic() - began:.0f} s; "
                      f"{len(running)} at work, {len(waiting)} waiting",
                      file=sys.stderr if status else sys.stdout, flush=True)  # fmt: skip
                base_done |= name == BASE and status == 0
                if name == BASE and status:
                    waiting = [job for job in waiting if not job.after_base]
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
