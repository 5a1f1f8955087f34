"""The whole road, small: objects -> renders -> shards -> stage 1 -> stage 2 -> NeRF -> mesh -> report.

    python demo/run.py [out=runs/demo] [source=folder/of/glbs] [stage1='["steps=500"]' ...]

Each step is the command a user would type; it is run once, and again only when it or a step before it has changed.
Interrupted at any point, the demo goes on where it was: each command resumes by itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from conf.cli import run
from data.assets import list_assets
from data.files import UserError, require_writable, write_json
from data.processes import die_with_parent, locked
from demo.config import DemoConfig
from demo.objects import fetch_objects

ROOT = Path(__file__).resolve().parent.parent
PYTHON = [sys.executable]
LIBRARY_OBJECT = "teddyBear"
# Port 0: one that is free, so that two demos do not meet.
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch", "--use_deepspeed", "--num_machines", "1",
    "--main_process_port", "0",
]  # fmt: skip


@dataclass
class Step:
    name: str
    command: list[str]
    makes: Path  # file or folder; the demo's own, removed when the step's values have changed
    passes: tuple[int, ...] = (0,)  # the statuses after which what follows can begin; done it is with 0
    removes: bool = True  # what it made, when its values have changed; false: a step before it does


def steps(config: DemoConfig, source: Path) -> list[Step]:
    """The commands, in order."""
    out = config.out
    chosen = config.source is None and source.suffix == ".sh3f"  # another source is taken whole
    distill = config.distill or (LIBRARY_OBJECT if chosen else list_assets(source)[-1].uid)
    names = [f"names=[{','.join(config.objects)}]"] if chosen else []
    launch = [
        *ACCELERATE,
        "--num_processes",
        str(config.processes),
        "--num_cpu_threads_per_process",
        str(max((os.cpu_count() or 1) // config.processes, 1)),
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    shards, parts = f"{out}/shards", f"{out}/parts"
    weights = [f"model.autoencoder.weights={parts}/vae", f"model.image_encoder.weights={parts}/image_encoder"]
    training = ["experiment=demo", f"cpu={str(config.cpu).lower()}", f"data.shards={shards}", *weights]
    stage1, stage2 = f"{out}/stage1", f"{out}/stage2"
    generate = ["experiment=demo", f"checkpoint={stage2}/export", f"out={out}/distill"]
    return [
        Step(
            "render",
            [
                *PYTHON,
                "data/render.py",
                "experiment=demo",
                f"source={source}",
                f"out={out}/views",
                *names,
                *config.render,
            ],
            Path(out, "views"),
        ),
        Step(
            "pack",
            [*PYTHON, "data/pack.py", "shard_mb=2", f"views={out}/views", f"out={shards}", *config.pack],
            Path(shards),
        ),
        Step("small", [*PYTHON, "models/small.py", f"shards={shards}", f"out={parts}", *config.small], Path(parts)),
        Step("stage1", [*launch, "train/stage1.py", *training, f"out={stage1}", *config.stage1], Path(stage1)),
        Step(
            "stage2",
            [*launch, "train/stage2.py", *training, f"out={stage2}", f"init_from={stage1}/export", *config.stage2],
            Path(stage2),
        ),
        Step(
            "reference",
            [*PYTHON, "-m", "demo.reference", f"{out}/views/{distill}", f"{out}/reference.png"],
            Path(out, "reference.png"),
        ),
        Step(
            "generate",
            [*PYTHON, "distill/generate.py", *generate, f"image={out}/reference.png", *config.generate],
            Path(out, "distill"),
        ),
        Step("proof", [*PYTHON, "-m", "demo.proof", out, distill], Path(out, "proof.json")),
    ]


def values_of(step: Step) -> list[str]:
    """The YAML that the step's entry point reads, so that an edited value runs the step again."""
    script = next((part for part in step.command if part.endswith(".py")), "")
    return [path.read_text() for path in sorted((ROOT / "conf" / Path(script).parent).rglob("*.yaml")) if script]


def run_step(step: Step, number: int, total: int, out: Path, before: str) -> str:
    """Runs one command unless it has ended with 0 on the same inputs; returns the fingerprint for the next.

    total: of all steps; 0 where it is not known.

    Raises UserError with the command when it fails.
    """
    fingerprint = hashlib.sha256(json.dumps([before, step.command[1:], values_of(step)]).encode()).hexdigest()
    done = out / "steps" / f"{step.name}.json"
    record = json.loads(done.read_text()) if done.is_file() else {}
    title = f"[{number}/{total}] {step.name}" if total else f"[{number}] {step.name}"
    if record.get("fingerprint") == fingerprint and record.get("finished") and step.makes.exists():
        print(f"{title}: done already ({record['seconds']:.0f} s)", flush=True)
        return fingerprint
    spent = record.get("seconds", 0.0)
    if record and record["fingerprint"] != fingerprint:
        print(f"{title}: its values have changed since; {step.makes} is made anew", flush=True)
        if step.removes:
            shutil.rmtree(step.makes) if step.makes.is_dir() else step.makes.unlink(missing_ok=True)
        spent = 0.0
    # Before it begins: killed, it goes on from what it has made, which has these values.
    record = {"fingerprint": fingerprint, "finished": False, "seconds": spent, "command": step.command[1:]}
    write_json(done, record)
    print(f"{title}: {' '.join(step.command[1:])}", flush=True)
    began = time.monotonic()
    peak_mib = 0.0
    status = -1
    process = subprocess.Popen(step.command, cwd=ROOT, preexec_fn=die_with_parent)  # noqa: PLW1509
    try:
        _, wait_status, usage = os.wait4(process.pid, 0)
        status, peak_mib = os.waitstatus_to_exitcode(wait_status), usage.ru_maxrss / 1024
        process.returncode = status
    except KeyboardInterrupt:
        process.wait()
        raise
    finally:
        seconds = spent + time.monotonic() - began
        record = {
            "fingerprint": fingerprint,
            "finished": status == 0,
            "seconds": round(seconds, 1),
            "peak_mib": round(peak_mib),
            "command": step.command[1:],
        }
        write_json(done, record)
    if status not in step.passes:
        raise UserError(
            f"step {step.name} ended with status {status}; its own words are above. When mended, give the same command "
            "again: it goes on from here"
        )
    print(f"{title}: {seconds:.0f} s, largest process {peak_mib:.0f} MiB", flush=True)
    return fingerprint


def require_all_rendered(config: DemoConfig, source: Path, out: Path) -> None:
    """One failed object costs a large run nothing, but the demo compares all of its objects."""
    ledger = out / "views" / "render_ledger.jsonl"
    latest = {row["uid"]: row for row in map(json.loads, ledger.read_text().splitlines())} if ledger.is_file() else {}
    failed = [f"{uid} ({row['reason']})" for uid, row in latest.items() if row["status"] != "rendered"]
    if failed:
        (out / "steps" / "render.json").unlink(missing_ok=True)
        raise UserError(f"{source}: not rendered: {', '.join(failed)}; give the same command again to try once more")


def main(config: DemoConfig) -> None:
    out = Path(config.out)
    os.chdir(ROOT)
    require_writable(out, needed_mb=1024)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin take the cores from whoever shares them
    with locked(out):
        try:
            demo(config, out)
        except KeyboardInterrupt:
            raise UserError("interrupted; give the same command again, and the demo goes on from here") from None


def demo(config: DemoConfig, out: Path) -> None:
    began = time.monotonic()
    if config.source is None:
        source, words = fetch_objects(Path(config.cache))
        print(words, flush=True)
    else:
        source = Path(config.source)
    plan = steps(config, source)
    before = ""
    for number, step in enumerate(plan, 1):
        before = run_step(step, number, len(plan), out, before)
        if step.name == "render":
            require_all_rendered(config, source, out)

    from demo.report import verdict, write_demo_report

    path = write_demo_report(out)
    ok, words = verdict(json.loads((out / "proof.json").read_text()))
    print(f"\n{words}\nreport: {path}   mesh: {out}/distill/mesh.glb   ({time.monotonic() - began:.0f} s this time)")
    if not ok and config.strict:
        raise UserError("the demo missed its bars; see the report")


if __name__ == "__main__":
    run(DemoConfig, "demo/run", main)
