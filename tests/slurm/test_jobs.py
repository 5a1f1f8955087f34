"""The batch scripts on a real cluster: requeued, a node lost, two at once, cancelled, failing."""

from __future__ import annotations

import json
import re
import sys

import pytest
import trimesh
from cluster import SMALL, Cluster, after, sleeping
from tiny_runs import losses, tiny_overrides, train, weights_hash

from monitor.wandb_file import history, records


@pytest.mark.slow
def test_a_job_goes_on_after_a_warning_and_lost_nodes(cluster: Cluster, tiny, tmp_path) -> None:
    """Two nodes, ZeRO-2 across them.  The same losses and weights as on one machine without disturbance."""
    length = ["steps=200", "checkpoint_every=10"]
    assert train(tiny, tmp_path / "quiet", *length, nodes=2).returncode == 0
    out = tmp_path / "run"
    job = cluster.submit(
        tmp_path, "--nodes=2", *SMALL, "slurm/stage1.sbatch", *tiny_overrides(tiny), f"out={out}", *length
    )
    job.until((out / "checkpoints" / "step_00000010").exists)
    job.warn()
    job.until(lambda: "going on from" in job.words())
    assert "requeued (time 1 of at most 20)" in job.words()
    for restarts, node in ((2, "node2"), (3, "node1")):  # the first has the batch script and rank 0
        steps = len(losses(out))
        job.until(lambda: len(losses(out)) > steps + 3)  # noqa: B023
        cluster.kill_node(node)
        job.until(lambda: int(job.fact("Restarts")) == restarts)  # noqa: B023
        cluster.start_node(node)
    assert job.end() == "COMPLETED 0:0"
    assert losses(out) == losses(tmp_path / "quiet") and weights_hash(out) == weights_hash(tmp_path / "quiet")
    files = sorted(out.glob("wandb/offline-run-*/*.wandb"))
    rows = [row for path in files for row in history(path)]
    # As many as starts: SLURM may deliver an old order to kill to the job's next start, which then starts once more.
    assert len(files) >= 4 and [row["global_step"] for row in rows] == list(range(1, 201))
    assert {f"loss/{branch}" for branch in ("single", "multi")} <= {name for row in rows for name in row}
    assert "samples/psnr" in rows[-1] and len({path.name for path in files}) == 1
    assert "image-file" in (rows[-1].get("samples/_type"), rows[-1].get("samples", {}).get("_type"))
    alerts = [r.alert.title for path in files for r in records(path) if r.WhichOneof("record_type") == "alert"]
    assert {"asked to end", "started again", "finished"} <= set(alerts), "but what a killed one had not written yet"


@pytest.mark.slow
def test_two_jobs_at_once_and_one_is_cancelled(cluster: Cluster, tiny, tmp_path) -> None:
    """One with a process for each GPU that SLURM gives, in a container, with a folder of the node's own."""
    given = [*SMALL, "slurm/stage1.sbatch", *tiny_overrides(tiny)]
    both = ["--gpus-per-node=2", *given[1:]]
    scratch = {"PROCESSES_PER_NODE": "", "CONTAINER": "env IN_CONTAINER=1", "TMPDIR": str(tmp_path / "scratch")}
    jobs = [
        cluster.submit(tmp_path, *both, f"out={tmp_path}/run0", "steps=6", **scratch),
        cluster.submit(tmp_path, *given, f"out={tmp_path}/run1", "steps=100000"),
    ]
    assert jobs[0].end() == "COMPLETED 0:0"
    state = json.loads((tmp_path / "run0" / "checkpoints" / "step_00000006" / "state.json").read_text())
    assert state["world_size"] == 2 and (tmp_path / "scratch").is_dir()
    assert f"on each of 1 nodes: env IN_CONTAINER=1 {sys.executable} slurm/node_launcher.py" in jobs[0].words()
    jobs[1].until(lambda: "step/s" in jobs[1].words())
    cluster.call("scancel", jobs[1].number)
    assert jobs[1].end().startswith("CANCELLED")
    assert "requeued" not in jobs[1].words()
    ports = [re.findall(r"--main_process_port (\d+)", job.words()) for job in jobs]
    assert len(ports[0]) == len(ports[1]) == 1 and ports[0] != ports[1]


@pytest.mark.slow
def test_a_job_that_fails_for_its_own_reason_ends(cluster: Cluster, tiny, tmp_path) -> None:
    nan = [*tiny_overrides(tiny), f"out={tmp_path}/nan", "optim.lr=1e30", "optim.warmup_steps=0", "max_skipped=2"]
    diverging = cluster.submit(tmp_path, *SMALL, "slurm/stage1.sbatch", *nan, "steps=100")
    wrong = [*tiny_overrides(tiny), f"out={tmp_path}/run", "optim.lrr=1"]
    job = cluster.submit(tmp_path, "--nodes=2", *SMALL, "slurm/stage1.sbatch", *wrong)
    waiting = cluster.call("sbatch", "--parsable", f"--dependency=afterok:{job.number}", "--wrap=true").strip()
    assert job.end() == "FAILED 102:0"
    assert "unknown key optim.lrr; the nearest known key is optim.lr" in job.words()
    assert job.fact("Restarts") == "0" and "requeued" not in job.words()
    assert f"what waits for it does not start: {waiting}" in job.words()
    cluster.call("scancel", waiting)
    assert diverging.end() == "FAILED 102:0" and diverging.fact("Restarts") == "0"
    assert "in a row, and max_skipped=2" in diverging.words() and "requeued" not in diverging.words()
    kinds = [r.alert.title for path in (tmp_path / "nan").glob("wandb/*/*.wandb") for r in records(path)
             if r.WhichOneof("record_type") == "alert"]  # fmt: skip
    assert kinds[-1] == "stopped" and "a step was left out" in kinds


@pytest.mark.slow
def test_a_preempted_job_saves_and_starts_again(cluster: Cluster, tiny, tmp_path) -> None:
    """By a job of a partition that goes before; one that has no time to save starts again too."""
    out = tmp_path / "run"
    given = [*tiny_overrides(tiny), f"out={out}", "steps=300", "checkpoint_every=1000"]
    job = cluster.submit(tmp_path, "--nodes=2", *SMALL, "slurm/stage1.sbatch", *given)
    asleep = cluster.job(tmp_path, sleeping(cluster, tmp_path, "--partition=brief", f"--output={tmp_path}/%j.out"))
    waiting = after(cluster, tmp_path, asleep.number)
    job.until(lambda: "step/s" in job.words() and "sleeping" in asleep.words())
    urgent = cluster.call("sbatch", "--parsable", "--partition=urgent", "--exclusive", "--nodes=2", "--wrap=sleep 1")
    job.until(lambda: "going on from" in job.words())
    assert cluster.job(tmp_path, urgent.strip()).fact("JobState") == "COMPLETED"
    assert job.end() == "COMPLETED 0:0" and "asked to end; saved at step" in job.words()
    assert [step for step, _ in losses(out)] == list(range(1, 301))
    assert asleep.end() == waiting.end() == "COMPLETED 0:0" and asleep.fact("Restarts") == "1"
    for preempted, said in ((job, "preempted, and requeued"), (asleep, "a preempted job is started again")):
        assert said in preempted.words() and "error: job" not in preempted.words()


@pytest.mark.slow
def test_a_warning_before_there_is_anything_to_save(cluster: Cluster, tmp_path) -> None:
    """Rendering knows no signals: it ends by them, starts again, and keeps the objects that are whole."""
    (tmp_path / "objects").mkdir()
    for name in ("one", "two"):
        trimesh.creation.icosphere(subdivisions=4).export(tmp_path / "objects" / f"{name}.ply")
    words = [f"source={tmp_path}/objects", f"out={tmp_path}/views", "resolution=32", "samples=4", "rings=1",
             "views_per_ring=4", "references=1", "eval_views=0"]  # fmt: skip
    job = cluster.submit(tmp_path, "--array=0", *SMALL, "slurm/render.sbatch", *words)
    job.log = tmp_path / f"{job.number}.out"
    job.until(lambda: job.fact("JobState") == "RUNNING")
    job.warn()
    job.until(lambda: int(job.fact("Restarts")) == 1)
    assert job.end() == "COMPLETED 0:0"
    assert sorted(path.parent.name for path in (tmp_path / "views").glob("*/meta.json")) == ["one", "two"]


@pytest.mark.slow
def test_at_most_so_many_requeues(cluster: Cluster, tiny, tmp_path) -> None:
    given = [*tiny_overrides(tiny), f"out={tmp_path}/run", "end_after=2"]  # asks to end by itself, after two steps
    job = cluster.submit(tmp_path, *SMALL, "slurm/stage1.sbatch", *given, MAX_REQUEUES="1")
    assert job.end() == "FAILED 75:0"
    assert job.fact("Restarts") == "1" and "was requeued 1 times, and MAX_REQUEUES=1" in job.words()
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len({row["global_step"] for row in rows}) == 4
