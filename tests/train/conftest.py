"""A run that nothing disturbs, for the others to be compared with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny_runs import train


@pytest.fixture(scope="session")
def quiet(tiny, tmp_path_factory) -> Path:
    """Stage 1, two processes, ZeRO-2, never disturbed."""
    out = tmp_path_factory.mktemp("quiet") / "stage1"
    done = train(tiny, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return out
