"""What changes how a run computes or what it shows, and not what it learns."""

from __future__ import annotations

import gzip
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import losses, train

from train.checkpoints import average_file


@pytest.mark.slow
def test_compiled_and_profiled_it_learns_the_same(tiny, tmp_path) -> None:
    """With a backend that needs no C++ compiler; inductor is for GPUs."""
    # At next to no rate: Adam's first steps are as long for rounding errors as for gradients.
    given = ["steps=4", "precision=fp32", "objective.single_view_probability=0", "optim.lr=1e-12"]
    plain = train(tiny, tmp_path / "plain", *given, processes=1)
    assert plain.returncode == 0, plain.stderr[-3000:]
    more = ["compile=aot_eager", "profile.after=1", "profile.steps=2"]
    done = train(tiny, tmp_path / "compiled", *given, *more, processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
    plain_rows, rows = (
        [row for row in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
        for name in ("plain", "compiled")
    )
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 2e-3)):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in plain_rows], rel=tolerance)
    folder = tmp_path / "compiled" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["operators.txt", "trace.json.gz"]
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"ProfilerStep#2", "ProfilerStep#3"} & names and any("aten::" in str(name) for name in names)
    assert "Compiled" in (folder / "operators.txt").read_text() or "aten::" in (folder / "operators.txt").read_text()


def test_a_checkpoint_in_the_foreground_and_checkpointed_gradients_are_the_same(quiet, tiny, tmp_path) -> None:
    more = ["checkpoint_in_background=false", "keep_checkpoints=1", "milestone_every=3",
            "gradient_checkpointing=true"]  # fmt: skip
    done = train(tiny, tmp_path / "run", *more)
    assert done.returncode == 0, done.stderr[-3000:]
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000003", "step_00000006"], "the newest, and the milestone"
    assert losses(tmp_path / "run") == losses(quiet)
    states = [
        json.loads((out / "checkpoints" / "step_00000006" / "state.json").read_text())["files"]
        for out in (quiet, tmp_path / "run")
    ]
    assert states[0].keys() == states[1].keys() and len(states[0]) >= 5
    for rank in range(2):  # the order of a safetensors file's metadata is chance
        pair = [load_file(out / "checkpoints/step_00000006" / average_file(rank)) for out in (quiet, tmp_path / "run")]
        assert pair[0].keys() == pair[1].keys() and all(torch.equal(pair[0][name], pair[1][name]) for name in pair[0])


def test_what_is_reported_survives_an_end_between_two_reports(quiet, tiny, tmp_path) -> None:
    """Step 6's row is of steps 4 to 6, though 4 was another process's."""
    out, given = tmp_path / "run", ["log_every=3"]
    assert train(tiny, out, *given, "end_after=4").returncode == 75
    done = train(tiny, out, *given)
    assert done.returncode == 0, done.stderr[-3000:]
    each = [loss for _, loss in losses(quiet)]
    expected = [(3, sum(each[:3]) / 3), (6, sum(each[3:]) / 3)]
    assert [step for step, _ in losses(out)] == [3, 6]
    assert [loss for _, loss in losses(out)] == pytest.approx([loss for _, loss in expected], rel=1e-12)
