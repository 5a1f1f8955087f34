"""Stage 1, stage 2 and meshes by one command, on a real cluster."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from cluster import ROOT, Cluster
from tiny_runs import losses, tiny_overrides

from monitor.wandb_file import records

SMALL = ["--gpus-per-node=0", "--cpus-per-task=1", "--time=30"]
GENERATE = ["experiment=demo", "steps=3", "schedule.resolutions=[16,32]", "mesh.resolution=32", "turntable.frames=4",
            "turntable.size=32", "wandb.mode=offline"]  # fmt: skip


def submitted(cluster: Cluster, words: list[str]) -> list[str]:
    """The numbers of the jobs."""
    said = cluster.call("slurm/pipeline.sh", *words)
    return re.findall(r": job (?:array )?(\d+)", said)


@pytest.mark.slow
def test_pictures_to_meshes(cluster: Cluster, tiny, tmp_path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, name in enumerate(("first one, it's (1).png", "second.PNG")):
        shutil.copy(sorted((tiny / "views" / f"object{number}").glob("*.png"))[0], pictures / name)
    (pictures / "third.png").write_text("no picture")
    (pictures / "notes.txt").write_text("no picture either")
    logs = [f"{where}--output={tmp_path}/{log}.out"
            for where, log in (("stage1:", "1"), ("stage2:", "2"), ("distill:", "%a"))]  # fmt: skip
    numbers = submitted(cluster, [
        *logs, *SMALL, *(f"distill:{word}" for word in (*SMALL, "--array=7-8", *GENERATE)),
        *tiny_overrides(tiny), "steps=2", f"stage1:out={tmp_path}/stage1", f"stage2:out={tmp_path}/stage2",
        f"stage2:init_from={tmp_path}/stage1/export", "name=pipe", f"images={pictures}", f"out={tmp_path}/meshes",
        "wandb.project=shapes", f"distill:checkpoint={tmp_path}/stage2/export",
    ])  # fmt: skip
    stage1, stage2, array = (cluster.job(tmp_path, number) for number in numbers)
    assert [job.end() for job in (stage1, stage2)] == ["COMPLETED 0:0"] * 2
    assert [step for step, _ in losses(tmp_path / "stage2")] == [1, 2]
    last = cluster.job(tmp_path, f"{array.number}_8")
    last.log = tmp_path / "8.out"
    last.until(lambda: "[2/3]" in last.words())
    last.warn()
    array.until(lambda: not cluster.call("squeue", "--noheader", f"--jobs={array.number}").strip())
    assert last.fact("Restarts") == "1" and cluster.job(tmp_path, f"{array.number}_7").fact("Restarts") == "0"
    words = [(tmp_path / f"{task}.out").read_text() for task in (7, 8)]
    assert "[1/3]" in words[0] and "[3/3]" in words[0] and "[2/3]" in words[1]
    for name in ("first one, it's (1)", "second"):
        assert (tmp_path / "meshes" / name / "mesh.glb").stat().st_size > 1000
        path = sorted((tmp_path / "meshes" / name).glob("wandb/offline-run-*/*.wandb"))[-1]
        kinds = [record.WhichOneof("record_type") for record in records(path)]
        (run,) = (record.run for record in records(path) if record.WhichOneof("record_type") == "run")
        assert (run.run_group, run.job_type, run.project) == ("pipe", "distill", "shapes")
        assert kinds.count("artifact") == 1
        media = path.parent / "files" / "media"
        assert list(media.rglob("turntable*.mp4")) and list(media.rglob("mesh*.glb"))
    assert "error: no mesh of" in words[0] and "third.png (status 2)" in words[0], "it costs itself alone"


@pytest.mark.slow
def test_a_failing_stage_leaves_the_rest_unstarted(cluster: Cluster, tiny, tmp_path) -> None:
    words = [f"--output={tmp_path}/%j.out", *SMALL, *tiny_overrides(tiny), "stage1:steps=-5"]
    stage1, stage2 = (cluster.job(tmp_path, number) for number in submitted(cluster, words))
    assert stage1.end() == "FAILED 102:0" and stage2.end().startswith("CANCELLED")
    assert not stage2.log.exists() and f"what waits for it does not start: {stage2.number}" in stage1.words()


def test_words_that_are_wrong_submit_nothing(cluster: Cluster, tmp_path) -> None:
    for words, said in (
        (["experiment"], "neither key=value nor"), (["images=/none"], "images=/none does not exist"),
        (["optim.lrr=1"], "unknown key optim.lrr"), (["stage2:experiment=deno"], "demo"),
        ([f"images={tmp_path}", "distill:meshh.resolution=32"], "unknown key meshh"),
    ):  # fmt: skip
        command, env = ["slurm/pipeline.sh", *words], cluster.environment
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and said in done.stderr and not done.stdout
    help_words = cluster.call("slurm/pipeline.sh", "--help")
    assert "stage1:WORD" in help_words
