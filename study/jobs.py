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
from study.variants import BASE, LONGEST, VARIANTS, Variant


@dataclass(frozen=True)
class Job:
    name: str
    command: list[str]
    after: tuple[str, ...] = ()  # jobs whose results it needs


def jobs_of(config: StudyConfig, variants: list[Variant]) -> list[Job]:
    """`both` first; then what trains a stage 1 of its own, the meshes, and what goes on from the stage 1 of another."""

    def command(names: list[str], distil: int = 0) -> list[str]:
        return [*PYTHON, "study/run.py", *words_of(replace(config, variants=names, distil=distil, tables=False,
                                                           jobs=1))]  # fmt: skip

    following = [one for one in variants if one.stage1 is None]
    owners = {one.name for one in variants if one.stage1 is not None} | {one.after for one in following}
    owners |= {BASE} if config.distil else set()
    own = [Job(one.name, command([one.name])) for one in VARIANTS if one.name in owners]
    meshes = [Job("meshes", command([BASE], config.distil), (BASE,))] if config.distil else []
    if config.distils_longest():
        meshes.append(Job(f"meshes_{LONGEST}", command([LONGEST], config.distil), ("meshes", LONGEST)))
    return [*own, *meshes, *(Job(one.name, command([one.name]), (one.after,)) for one in following)]


def started(job: Job, log: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with open(log, "ab") as words:
        return subprocess.Popen(job.command, cwd=ROOT, env=environment, stdout=words, stderr=subprocess.STDOUT,
                                preexec_fn=die_with_parent)  # noqa: PLW1509  # fmt: skip


def work_off(jobs: list[Job], at_once: int, out: Path) -> None:
    """Runs so many of the jobs at a time; what they say goes to out/jobs/<name>.log.

    One that fails costs itself and those after it: it is named, and whoever calls runs what is missing.
    """
    (out / "jobs").mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // at_once, 1))}
    waiting = list(jobs)
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    done = set[str]()
    try:
        while waiting or running:
            # A loop without an end, otherwise: nobody makes what they wait for.
            assert running or any(done.issuperset(job.after) for job in waiting), [job.name for job in waiting]
            ready = [job for job in waiting if done.issuperset(job.after)]
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
                if status == 0:
                    done.add(name)
                else:
                    waiting = [job for job in waiting if name not in job.after]
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
