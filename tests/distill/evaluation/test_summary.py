"""Means and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from distill.evaluation.summary import bootstrap, by_azimuth, interval, means, paired_difference, share_interval, spread


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(3).normal(5, 2, size=400)
    low, high = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)


def test_few_objects_have_wide_intervals_and_one_has_none() -> None:
    """Coverage of the true mean is close to 95 % for any number; a bootstrap of three has it in three of four cases."""
    draw = np.random.default_rng(5)
    for count in (2, 3, 5, 9):
        inside = 0
        for _ in range(1000):
            low, high = interval(list(draw.normal(1, 3, size=count))) or (0, 0)
            inside += low < 1 < high
        assert 0.925 < inside / 1000 < 0.975, count
    assert interval([7.0]) is None
    ten = list(draw.normal(size=10))
    assert interval(ten) == bootstrap(ten)
    with pytest.raises(ValueError, match="no value"):
        interval([])
    assert means({"one": {"psnr": 7.0}})["psnr"] == {"mean": 7.0, "low": None, "high": None, "objects": 1}


def test_the_order_of_objects_changes_nothing() -> None:
    objects = {f"o{i}": {"psnr": float(i * i % 7), "chamfer": None if i == 3 else i / 10} for i in range(9)}
    backwards = dict(reversed(objects.items()))
    assert means(objects) == means(backwards)
    assert means(objects)["chamfer"]["objects"] == 8


def test_paired_difference_is_of_shared_objects() -> None:
    found = paired_difference({"a": 2.0, "b": 3.0, "c": 9.0}, {"a": 1.0, "b": 1.0})
    assert found["mean"] == 1.5
    assert found["objects"] == 2
    assert found["low"] == pytest.approx(1.5 - 12.7062 / 2) and found["high"] == pytest.approx(1.5 + 12.7062 / 2)
    with pytest.raises(ValueError, match="no value"):
        paired_difference({"a": 1.0}, {"b": 1.0})


def test_quality_over_azimuth() -> None:
    flat = by_azimuth([(a, 20.0) for a in range(0, 360, 45)])
    assert flat is not None and flat["spread_db"] == 0 and flat["azimuth_deg"] == [0, 45, 90, 135, 180, 225, 270, 315]
    front = by_azimuth([(350.0, 30.0), (10.0, 30.0), (180.0, 20.0)])
    assert front is not None and front["azimuth_deg"] == [0, 180] and front["spread_db"] == 5
    assert by_azimuth([(0.0, 1.0), (5.0, 2.0)]) is None


def test_the_spread_has_an_interval() -> None:
    draw = np.random.default_rng(1)
    azimuths = np.arange(0, 360, 45)
    better = np.where(azimuths == 0, 8.0, 0.0)  # the front by 8 dB: standard deviation over 8 sectors 2.65
    objects = [[(a, 20 + db + draw.normal()) for a, db in zip(azimuths, better, strict=True)] for _ in range(40)]
    found = spread(objects)
    assert found is not None
    value, (low, high) = found
    assert low < value < high < low + 0.5 and low < 2.65 < high
    assert spread(objects[:9]) is None
    assert spread([views[1:] for views in objects]) is None, "nobody was seen from the front"


@pytest.mark.parametrize("true_spread", [0.0, 0.2, 1.0])
def test_the_spread_is_not_made_of_noise(true_spread: float) -> None:
    """Over many sets of objects its mean is the true one, and the interval holds that; whole objects differ too."""
    draw = np.random.default_rng(2)
    azimuths = np.arange(0, 360, 45)
    sides = np.cos(np.radians(azimuths)) * true_spread * np.sqrt(2)
    values, held = [], 0
    for _ in range(20):
        objects = [
            [(float(a), float(own + db + draw.normal())) for a, db in zip(azimuths, sides, strict=True)]
            for own in draw.normal(18, 4, size=50)
        ]
        value, (low, high) = spread(objects) or (0.0, (0.0, 0.0))
        values.append(value)
        held += low <= true_spread <= high
    assert held >= 17
    assert np.mean(values) == pytest.approx(true_spread, abs=0.06)


def test_shares_of_few_are_not_certain() -> None:
    """Wilson's interval; z^2 / (n + z^2) for none of n."""
    assert share_interval(0.0, 5) == (0.0, pytest.approx(1.96**2 / (5 + 1.96**2)))
    assert share_interval(1.0, 5) == (pytest.approx(5 / (5 + 1.96**2)), 1.0)
    low, high = share_interval(0.5, 100)
    assert low == pytest.approx(0.404, abs=1e-3) and high == pytest.approx(0.596, abs=1e-3)
