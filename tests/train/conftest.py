"""A run that nothing disturbs, for the others to be compared with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_runs import ROOT, launch, tiny_overrides


@pytest.fixture(scope="session")
def quiet(tiny, tmp_path_factory) -> Path:
    """Stage 1, two processes, ZeRO-2, by the launcher, never disturbed."""
    out = tmp_path_factory.mktemp("quiet") / "stage1"
    done = subprocess.run(
        [*launch(1, 2), *tiny_overrides(tiny), f"out={out}"],
        cwd=ROOT, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return out
