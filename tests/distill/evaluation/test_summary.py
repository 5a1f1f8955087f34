"""Means and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from distill.evaluation.summary import bootstrap, by_azimuth, means, paired_difference


def test_the_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(3).normal(5, 2, size=400)
    low, high = bootstrap(values)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)
    assert bootstrap([7.0]) == (7.0, 7.0)


def test_the_order_of_objects_changes_nothing() -> None:
    objects = {f"o{i}": {"psnr": float(i * i % 7), "chamfer": None if i == 3 else i / 10} for i in range(9)}
    backwards = dict(reversed(objects.items()))
    assert means(objects) == means(backwards)
    assert means(objects)["chamfer"]["objects"] == 8


def test_paired_difference_is_of_shared_objects() -> None:
    found = paired_difference({"a": 2.0, "b": 3.0, "c": 9.0}, {"a": 1.0, "b": 1.0})
    assert found["mean"] == 1.5
    assert found["objects"] == 2
    assert found["low"] == 1.0 and found["high"] == 2.0


def test_quality_over_azimuth() -> None:
    flat = by_azimuth([(a, 20.0) for a in range(0, 360, 45)])
    assert flat is not None and flat["spread_db"] == 0 and flat["azimuth_deg"] == [0, 45, 90, 135, 180, 225, 270, 315]
    front = by_azimuth([(350.0, 30.0), (10.0, 30.0), (180.0, 20.0)])
    assert front is not None and front["azimuth_deg"] == [0, 180] and front["spread_db"] == 5
    assert by_azimuth([(0.0, 1.0), (5.0, 2.0)]) is None
