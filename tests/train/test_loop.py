"""What of the loop is a function of numbers alone."""

from __future__ import annotations

import pytest

from train.config import OptimConfig
from train.loop import learning_rate


def test_the_learning_rate_warms_up_and_stays() -> None:
    config = OptimConfig(lr=2e-4, warmup_steps=4)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:4] == pytest.approx([0.5e-4, 1e-4, 1.5e-4, 2e-4]) and set(rates[4:]) == {2e-4}
    assert learning_rate(OptimConfig(lr=2e-4, warmup_steps=0), 0, 100) == 2e-4


def test_the_cosine_ends_at_zero() -> None:
    config = OptimConfig(lr=1e-3, warmup_steps=1, schedule="cosine")
    rates = [learning_rate(config, step, 100) for step in range(101)]
    assert rates[0] == 1e-3 and rates[50] == pytest.approx(5e-4) and rates[100] == 0
    assert rates[25] == pytest.approx(1e-3 * (1 + 0.5**0.5) / 2)
    assert rates == sorted(rates, reverse=True)
