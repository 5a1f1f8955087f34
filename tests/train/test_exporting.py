"""An export made of a checkpoint is the one that the run makes itself."""

from __future__ import annotations

import shutil

import pytest
from warm import Run

from data.files import UserError
from train.exporting import ExportConfig, export_checkpoint


def test_it_is_the_runs_own(quiet, tmp_path) -> None:
    made = Run(["train/export.py", f"run={quiet}", f"out={tmp_path}/export"], 1, tmp_path / "log").wait()
    assert made.returncode == 0 and "exported step 6" in made.stdout, made.stderr
    theirs = {p.relative_to(quiet / "export"): p.read_bytes() for p in (quiet / "export").rglob("*") if p.is_file()}
    ours = {p.relative_to(tmp_path / "export"): p.read_bytes() for p in (tmp_path / "export").rglob("*") if p.is_file()}
    assert ours == theirs


def test_errors(quiet, tmp_path) -> None:
    for choice, words in (
        (ExportConfig(str(tmp_path)), "has no config.yaml"),
        (ExportConfig(str(quiet), step=5), "has no step 5; there are: 4, 6"),
        (ExportConfig(str(quiet), out=str(quiet / "export")), "is there already"),
    ):
        with pytest.raises(UserError, match=words):
            export_checkpoint(choice)
    run = tmp_path / "run"
    shutil.copytree(quiet, run)
    average = run / "checkpoints" / "step_00000006" / "weight_average_rank1.safetensors"
    average.write_bytes(average.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"step_00000006 is damaged .*rank1\.safetensors is not what was written"):
        export_checkpoint(ExportConfig(str(run)))
    assert not list(run.glob("export_*"))
    export_checkpoint(ExportConfig(str(run), step=4))
    assert (run / "export_00000004" / "isotropic3d.json").is_file()
