"""The verdict: each bar can fail, and only for its own reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from data.files import UserError
from demo.proof import Truth, baselines, judge, sample_all
from demo.report import verdict

OBJECTS, VIEWS, SIZE = 3, 8, 16


@pytest.fixture
def truth() -> Truth:
    """Objects of one colour each, far apart, so that every number can be told beforehand."""
    colours = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.1, 0.1, 0.9]])
    views = colours[:, None, :, None, None].expand(OBJECTS, VIEWS, 3, SIZE, SIZE).clone()
    return Truth(
        ["red", "green", "blue"], views[:, 0], views, torch.eye(4).expand(VIEWS, 4, 4), torch.full((VIEWS,), 40.0)
    )


def off(views: Tensor, error: float) -> Tensor:
    """Every pixel wrong by `error`: a PSNR of -20 log10(error)."""
    return views + error


def test_baselines_have_their_analytic_values(truth: Truth) -> None:
    base = baselines(truth)
    white = -10 * torch.log10(torch.tensor((0.1**2 + 2 * 0.9**2) / 3))
    assert base["white"] == pytest.approx([float(white)] * 3, abs=1e-4)
    mean = (0.9 + 0.1 + 0.1) / 3
    error = ((0.9 - mean) ** 2 + 2 * (0.1 - mean) ** 2) / 3
    assert base["mean object"] == pytest.approx([float(-10 * torch.log10(torch.tensor(error)))] * 3, abs=1e-4)


def test_good_results_pass(truth: Truth) -> None:
    proof = judge(truth, off(truth.views, 0.1), off(truth.views[1], 0.1), off(truth.views[1], 0.12), "green")
    assert proof["passed"] and all(proof["checks"].values())
    assert proof["distilled_db"][1] == pytest.approx(20, abs=1e-3)
    assert [proof["samples_db"][i][i] for i in range(3)] == pytest.approx([20] * 3, abs=1e-3)
    ok, words = verdict(proof | {"samples_margin_mean_db_by_steps": {2: 1.0}})
    assert ok and "20.0 dB" in words and "Missed" not in words


@pytest.mark.parametrize(
    ("fails", "change"),
    [
        ("distilled object is nearest", lambda samples, field, mesh: (samples, field.roll(1, dims=1), mesh)),
        ("distilled object beats", lambda samples, field, mesh: (samples, off(field, 0.35), mesh)),
        ("the mesh is nearest", lambda samples, field, mesh: (samples, field, mesh.roll(1, dims=1))),
        ("pictures of the mesh", lambda samples, field, mesh: (samples, field, off(mesh, 0.02))),
        ("2D samples of every object are nearest", lambda samples, field, mesh: (samples[[1, 1, 2]], field, mesh)),
        (
            "2D samples of every object beat",
            lambda samples, field, mesh: (torch.cat([off(samples[:1], 0.6), samples[1:]]), field, mesh),
        ),
        ("2D samples beat both baselines by 3", lambda samples, field, mesh: (off(samples, 0.3), field, mesh)),
    ],
)
def test_every_bar_can_fail(truth: Truth, fails: str, change) -> None:
    samples, field, mesh = change(truth.views.clone(), off(truth.views[1], 0.05), off(truth.views[1], 0.06))
    proof = judge(truth, samples, field, mesh, "green")
    missed = [name for name, ok in proof["checks"].items() if not ok]
    assert any(name.startswith(fails) for name in missed) and not proof["passed"]
    ok, words = verdict(proof)
    assert not ok and all(name in words for name in missed)


def test_too_few_views_are_refused(truth: Truth) -> None:
    truth.c2w = truth.c2w[:4]
    with pytest.raises(UserError, match="4 posed views judge nothing"):
        sample_all(Path("/nowhere"), truth, 4, 1.0, 2)
