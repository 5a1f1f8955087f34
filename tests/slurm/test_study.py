"""The study in its smallest form: as jobs on a real cluster, and once more on this machine."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from cluster import ROOT, Cluster

TINY = (
    '"batch_size=2","micro_batch_size=1","model.unet.block_out_channels=[32,64]","model.unet.heads=[1,2]",'
    '"validation.sample_steps=2","validation.sample_objects=1","data.workers=0"'
)
WORDS = [
    "libraries=[BlendSwap-CC-0]", "limit=2", "val_share=0.5", "processes=1", "distil=1", "guidance_scales=[1]",
    "other_guidances=[]", "other_sample_steps=[]",
    'render=["resolution=32","samples=1","views_per_ring=4","rings=1","references=2"]',
    f'stage1=["steps=2",{TINY}]', f'stage2=["steps=2",{TINY}]',
    'generate=["steps=3","schedule.resolutions=[16,32]","mesh.resolution=32","turntable.frames=4","turntable.size=32"]',
]  # fmt: skip


@pytest.mark.slow
def test_jobs_share_a_study_and_a_later_call_finds_all_done(cluster: Cluster, tmp_path) -> None:
    if not (ROOT / ".cache" / "BlendSwap-CC-0.sh3f").is_file():
        from demo.objects import NotFetched, fetch_library

        try:
            fetch_library(ROOT / ".cache" / "BlendSwap-CC-0.sh3f")
        except NotFetched as reason:
            pytest.skip(f"apt has no objects here: {reason}")
    words = [*WORDS, f"out={tmp_path}/study", "variants=[stage1]"]
    options = ["--gpus-per-node=0", "--cpus-per-task=2", "--time=30", f"--output={tmp_path}/%j.out"]
    said = cluster.call("slurm/study.sh", *options, *words)
    numbers = re.findall(r": job (\d+)", said)
    assert re.findall(r"^(.+): job", said, re.MULTILINE) == ["both", "stage1", "meshes and tables"]
    for number in numbers:
        job = cluster.job(tmp_path, number)
        assert job.end() == "COMPLETED 0:0", job.words()[-3000:]
    last = cluster.job(tmp_path, numbers[-1]).words()
    assert "both-0-stage2: done already" in last and "samples_stage1-0: done already" in last
    assert re.search(r"distil_stage2-0-1: \d+ s", last)
    told = (tmp_path / "study" / "RESULTS.md").read_text()
    assert "2 objects trained on, 2 held out and judged" in told and told.count("*A small-scale study") >= 5
    assert "| stage 1 alone |" in told
    assert "nearest object trained on" in told and "| the usual steps | both stages | 1 | 1 of 1 |" in told
    page = (tmp_path / "study" / "results.html").read_text()
    assert "data:image" in page and (tmp_path / "study" / "study.png").is_file()
    again = subprocess.run([sys.executable, "study/run.py", *words, "jobs=2"], cwd=ROOT, capture_output=True, text=True,
                           check=False)  # fmt: skip
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    logs = [path.read_text() for path in sorted((tmp_path / "study" / "jobs").glob("*.log"))]
    assert len(logs) == 3 and all("done already" in log for log in logs), again.stdout  # both, stage1 and the meshes
    assert not any(" s, largest process" in words for words in (again.stdout, *logs)), "nothing was run again"


def test_what_is_wrong_is_told_before_anything_is_submitted(cluster: Cluster) -> None:
    for word, said in (("variants=[nothing]", "none of both"), ("limt=2", "limt"), ("nothing", "neither key=value")):
        done = subprocess.run(["slurm/study.sh", word], cwd=ROOT, env=cluster.environment, capture_output=True,
                              text=True, check=False)  # fmt: skip
        assert done.returncode == 2 and said in done.stderr and "job" not in done.stdout, done.stderr
