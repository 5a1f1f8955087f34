"""`tryrun=true` with the real launcher."""

from __future__ import annotations

import subprocess

import pytest
from tiny_runs import ROOT, launch, tiny_overrides, train


@pytest.mark.slow
def test_a_try_of_a_configuration(tiny, tmp_path) -> None:
    out = tmp_path / "stage1"

    more = [f"out={out}", "tryrun=true", "steps=50000", "optim.schedule=cosine"]
    words = [*launch(1, 2), *tiny_overrides(tiny), *more]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "saved at step 2" in done.stdout and "going on from" in done.stdout
    for part in ("stage 1 works here, on 2 processes", "gone on from it after 2 steps", "samples/psnr"):
        assert part in done.stdout
    assert sorted(p.name for p in out.iterdir()) == ["tryrun"]
    assert (out / "tryrun" / "samples" / "step_00000003.png").is_file()
    assert not any((out / "tryrun" / large).exists() for large in ("checkpoints", "export"))

    wrong = train(tiny, out, "tryrun=true", "model.autoencoder.latent_channels=4", processes=1)
    assert wrong.returncode == 2 and "set model.autoencoder.latent_channels=8" in wrong.stderr
    assert "works here" not in wrong.stdout
