"""Steps of every engine on two real ranks, without data and without the UNet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from warm import Run

ENGINES = [f"{stage} {kind}" for stage in range(4) for kind in ("fp32", "bf16", "fp16") if (stage, kind) != (0, "fp16")]
ENGINES += ["2 fp32 offload", "2 bf16 offload", "3 fp32 offload", "3 bf16 offload_all"]
CLIP_NORM = 1e-3  # step_script's


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    """Of each rank."""
    folder = tmp_path_factory.mktemp("engines")
    done = Run(["tests/train/step_script.py", str(folder)], 2, folder / "log").wait()
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(2)]


def of(found: list[dict[str, Any]], engine: str) -> list[Any]:
    """What each rank found of an engine."""
    ranks = [rank[engine] for rank in found]
    if None in ranks:
        pytest.skip("DeepSpeed has no fp16 on this device")
    return ranks


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_that_is_not_finite_on_one_rank_leaves_no_trace_on_any(found, engine) -> None:
    """Neither in the masters nor in Adam's moments, its count included: as if those batches had never come."""
    stage, precision = engine.split()[:2]
    for rank in of(found, engine):
        spoiled, quiet = rank["spoiled"], rank["quiet"]
        kind = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision]
        assert spoiled["running"] == [int(stage), f"torch.{kind}"]
        assert spoiled["applied"] == [True, False, True, False, True] and quiet["applied"] == [True] * 3
        assert spoiled["unchanged"] == [True, True]
        assert spoiled["updates"] == quiet["updates"] == 3
        assert spoiled["state"] == quiet["state"]
        assert spoiled["counted"] == quiet["counted"] == [3.0]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_average_is_that_of_the_masters(found, engine) -> None:
    """Against its definition in float64; and put together from all ranks it is the same under every engine."""
    first, second = of(found, engine)
    assert all(rank[kind]["average_off"] < 1e-6 for rank in (first, second) for kind in ("spoiled", "quiet"))
    assert first["quiet"]["gathered"] == first["spoiled"]["gathered"] and second["quiet"]["gathered"] is None
    tolerance = 1e-5 if "fp32" in engine else 5e-3
    plain = found[0]["0 fp32"]["quiet"]["gathered"]
    assert all(abs(a - b) < tolerance for a, b in zip(first["quiet"]["gathered"], plain, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_training_starts_from_the_weights_in_full_precision(found, engine) -> None:
    """Not from what of them fits into 16 bits."""
    assert all(rank["quiet"]["starts_exact"] for rank in of(found, engine))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_clipped(found, engine) -> None:
    for rank in of(found, engine):
        assert rank["clipped"] == pytest.approx(CLIP_NORM, rel=1e-2 if "fp32" not in engine else 1e-3)
