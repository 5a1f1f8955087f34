"""Both stages of the demo while a random process of theirs is killed every 20 to 40 seconds, against the quiet run.

    python demo/run.py                                  # the quiet run: runs/demo
    python tests/benchmarks/kill_stages.py --demo runs/demo --out runs/killed

The commands are the demo's own with another `out`, more frequent checkpoints and a report of every step; each is
given again until it ends with 0. Prints, a stage: how often it was killed, the SHA-256 of all tensors of both exports,
and the time lost a kill. Exits with 1 when a tensor differs, or a loss: the quiet run reports means over several steps,
which those of the other's single steps must be.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]


def weights_hash(export: Path) -> str:
    """SHA-256 over names and bytes of all tensors of an export folder."""
    digest = hashlib.sha256()
    for path in sorted(export.rglob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                digest.update(f"{path.relative_to(export)} {name}".encode())
                digest.update(file.get_tensor(name).numpy().tobytes())
    return digest.hexdigest()


def losses(run: Path) -> dict[int, float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["global_step"]: row["loss"] for row in rows if "loss" in row}


def same_losses(quiet: Path, killed: Path) -> bool:
    """Whether each mean that the quiet run reported is that of the other's single steps, none of which is missing."""
    means, single = losses(quiet), losses(killed)
    steps = [0, *means]
    if list(single) != list(range(1, steps[-1] + 1)):
        return False
    of_steps = [statistics.fmean(single[step] for step in range(a + 1, b + 1)) for a, b in itertools.pairwise(steps)]
    return all(math.isclose(ours, means[step], rel_tol=1e-6) for ours, step in zip(of_steps, steps[1:], strict=True))


def family(pid: int) -> list[int]:
    """The process and all below it."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        children = []
    return [pid, *(one for child in children for one in family(child))]


def what(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    if any(b"accelerate" in word for word in words):
        return "the launcher"
    if any(b"wandb" in word for word in words[:1]):
        return "W&B's process"
    rank = re.search(rb"\0RANK=(\d+)\0", Path(f"/proc/{pid}/environ").read_bytes())
    return f"rank {rank[1].decode()}" if rank else "a helper process"


def run_killed(command: list[str], log: Path, chance: random.Random, between: tuple[float, float]) -> list[str]:
    """Gives the command until it ends with 0; returns whom it killed.

    The first kill comes after the first step, since DeepSpeed may have to compile before it, once on a machine.
    """
    killed: list[str] = []
    due = float("inf")
    while True:
        with open(log, "a") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        struck = False
        while process.poll() is None:
            if time.monotonic() > due:
                victim = chance.choice(family(process.pid))
                with contextlib.suppress(OSError):  # where it has just ended by itself
                    name = what(victim)
                    os.kill(victim, signal.SIGKILL)
                    killed.append(name)
                    struck = True
                due = time.monotonic() + chance.uniform(*between)
            if due == float("inf") and "step/s" in log.read_text():
                due = time.monotonic() + chance.uniform(*between)
            time.sleep(0.05)
        if process.returncode == 0:
            return killed
        if not struck:
            raise SystemExit(f"error: the command ended with {process.returncode} though nobody killed it; see {log}")
        print(f"  killed {killed[-1]} ({len(killed)}); {position(log)}", flush=True)


def position(log: Path) -> str:
    found = re.findall(r"going on from \S*step_(\d+)", log.read_text())
    return f"last gone on from step {int(found[-1])}" if found else "no checkpoint yet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="a finished demo")
    parser.add_argument("--out", type=Path, default=Path("runs/killed"), help="a new folder")
    parser.add_argument("--between", type=float, nargs=2, default=(20.0, 40.0), help="seconds between kills")
    parser.add_argument("--checkpoint-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists():
        raise SystemExit(f"error: {options.out} is there already; give another --out")
    options.out.mkdir(parents=True)
    chance, differs = random.Random(options.seed), False
    print(f"{datetime.date.today()}, {os.cpu_count()} CPUs, {platform.machine()}; a kill every {options.between[0]:g} "
          f"to {options.between[1]:g} s, a checkpoint every {options.checkpoint_every} steps")  # fmt: skip
    for stage in ("stage1", "stage2"):
        record = json.loads((options.demo / "steps" / f"{stage}.json").read_text())
        changed = {f"out={options.demo}/{stage}": f"out={options.out}/{stage}",
                   f"init_from={options.demo}/stage1/export": f"init_from={options.out}/stage1/export"}  # fmt: skip
        command = [sys.executable, *(changed.get(word, word) for word in record["command"])]
        began = time.monotonic()
        killed = run_killed([*command, f"checkpoint_every={options.checkpoint_every}", "log_every=1"],
                            options.out / f"{stage}.log", chance, tuple(options.between))  # fmt: skip
        seconds = time.monotonic() - began
        quiet, ours = options.demo / stage, options.out / stage
        hashes = weights_hash(quiet / "export"), weights_hash(ours / "export")
        same = same_losses(quiet, ours)
        differs |= hashes[0] != hashes[1] or not same
        lost = (seconds - record["seconds"]) / max(len(killed), 1)
        whom = ", ".join(f"{name} {killed.count(name)}" for name in sorted(set(killed)))
        print(f"{stage}: killed {len(killed)} times ({whom}); {seconds:.0f} s, quiet {record['seconds']:.0f} s: "
              f"{lost:.1f} s lost a kill\n  quiet  {hashes[0]}\n  killed {hashes[1]}\n"
              f"  losses of all {max(losses(ours))} steps {'agree' if same else 'DIFFER'}", flush=True)  # fmt: skip
    shutil.rmtree(options.out)
    raise SystemExit(int(differs))


if __name__ == "__main__":
    main()
