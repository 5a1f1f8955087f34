"""ZeRO stages and precisions beside the usual ones, and a change of the number of processes."""

from __future__ import annotations

import os
import random
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import begun, losses, train, weights_hash
from warm import Run


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (3, "bf16")])
def test_other_engines_go_on_exactly_after_a_kill(tiny, tmp_path, stage, precision) -> None:
    """SIGKILL of every rank at once, after a step that is drawn anew each time."""
    given = [f"deepspeed=zero{stage}", f"precision={precision}", "steps=5", "optim.warmup_steps=2"]
    whole = train(tiny, tmp_path / "whole", *given)
    assert whole.returncode == 0, whole.stderr[-3000:]
    step = random.randint(2, 4)
    print(f"killed after step {step}")
    run = begun(tiny, tmp_path / "killed", *given, steps=step)
    for rank in run.ranks:
        os.kill(rank, signal.SIGKILL)
    assert run.wait().returncode != 0
    assert train(tiny, tmp_path / "killed", *given).returncode == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert weights_hash(tmp_path / "killed") == weights_hash(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "first", "then"), [(2, 2, 1), (2, 1, 2), (3, 2, 1)])
def test_goes_on_with_another_number_of_processes(tiny, tmp_path, stage, first, then) -> None:
    """The same data in the same steps; the sums over ranks are rounded in another order."""
    # Adam with its usual eps makes a whole step of a gradient that is nothing but rounding; with this one a step is all
    # but proportional to the gradient.  And 64 channels would be normalised in groups of one or two, which multiplies
    # the rounding by a million: with SSE on one side and AVX2 on the other, gradients differed by a third.
    given = [f"deepspeed=zero{stage}", "precision=fp32", "keep_checkpoints=9", "steps=4", "optim.lr=1e-3",
             "optim.eps=0.1", "optim.warmup_steps=1", "model.unet.block_out_channels=[128,256]"]  # fmt: skip
    whole, other = tmp_path / "whole", tmp_path / "other"
    done = train(tiny, whole, *given, processes=first)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(whole / "checkpoints" / "step_00000002", other / "checkpoints" / "step_00000002")
    shutil.copytree(whole / "shards", other / "shards")
    done = train(tiny, other, *given, processes=then)
    assert done.returncode == 0 and "going on from" in done.stdout, done.stderr[-3000:]
    assert [step for step, _ in losses(other)] == [3, 4]
    assert [value for _, value in losses(other)] == pytest.approx([v for _, v in losses(whole)[2:]], rel=1e-4)
    done = Run(["train/export.py", f"run={whole}", "step=2", f"out={tmp_path}/begun"], 1, tmp_path / "log-export")
    assert done.wait().returncode == 0, done.stderr
    begun_with, undisturbed, found = (
        load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        for folder in (tmp_path / "begun", whole / "export", other / "export")
    )

    def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
        return float(torch.cat([(a[name] - b[name]).flatten() for name in a]).norm())

    moved, apart = distance(undisturbed, begun_with), distance(found, undisturbed)
    print(f"moved by {moved:.3g} since the checkpoint, {apart:.3g} apart")
    assert moved > 0 and apart < 1e-2 * moved
    assert {p.name for p in (other / "checkpoints").iterdir()} == {f"step_0000000{n}" for n in (2, 4)}
