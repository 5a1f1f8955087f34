"""From numbers an object to numbers over objects: means with intervals, and quality over azimuth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

RESAMPLES = 10_000
LEVEL = 0.95
FEW = 10  # below it a bootstrap's interval is too narrow: of three values it holds the mean in three of four cases


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Of the mean, at 95 %: by bootstrap, of 2 to 9 values by Student's t, and of one none.

    Raises ValueError without any value.
    """
    if len(values) == 0:
        raise ValueError("no value, no interval")
    if len(values) >= FEW:
        return bootstrap(values)
    if len(values) == 1:
        return None
    data = np.asarray(sorted(values), dtype=np.float64)
    half = stdtrit(len(data) - 1, (1 + LEVEL) / 2) * data.std(ddof=1) / math.sqrt(len(data))
    return float(data.mean() - half), float(data.mean() + half)


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Percentile interval at 95 % of the mean, objects drawn with replacement (Efron 1979)."""
    data = np.sort(np.asarray(values, dtype=np.float64))  # sorted: the order of objects changes nothing
    drawn = np.random.default_rng(seed).integers(len(data), size=(RESAMPLES, len(data)))
    low, high = np.quantile(data[drawn].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def means(objects: Mapping[str, Mapping[str, float | None]]) -> dict[str, dict[str, float | None]]:
    """Of each metric: mean, low and high of its interval (None of one object), and how many objects have it."""
    names = list(dict.fromkeys(name for values in objects.values() for name in values))
    found: dict[str, dict[str, float | None]] = {}
    for name in names:
        have = [float(v) for values in objects.values() if (v := values.get(name)) is not None]
        if have:
            low, high = interval(have) or (None, None)
            found[name] = {"mean": float(np.mean(np.sort(have))), "low": low, "high": high, "objects": len(have)}
    return found


def paired_difference(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, Any]:
    """Mean over the objects of both of a - b, with its interval: the same objects under two methods.

    Raises ValueError where they share none.
    """
    shared = sorted(a.keys() & b.keys())
    differences = [a[name] - b[name] for name in shared]
    low, high = interval(differences) or (None, None)
    return {"mean": float(np.mean(differences)), "low": low, "high": high, "objects": len(shared)}


def by_azimuth(views: Sequence[tuple[float, float]], bins: int = 8) -> dict[str, Any] | None:
    """(azimuth in degrees from the reference, dB) of all views -> mean dB in `bins` sectors, and their spread.

    Isotropic: all sides are as good; the spread (standard deviation over sectors) is 0.  None with one sector alone.
    """
    sector = [sector_of(azimuth, bins) for azimuth, _ in views]
    there = sorted(set(sector))
    if len(there) < 2:
        return None
    mean = [float(np.mean([db for (_, db), s in zip(views, sector, strict=True) if s == one])) for one in there]
    return {"azimuth_deg": [one * 360 / bins for one in there], "psnr": mean, "spread_db": float(np.std(mean))}


def sector_of(azimuth_deg: float, bins: int) -> int:
    """The first sector's middle is at 0."""
    return int(((azimuth_deg + 180 / bins) % 360) // (360 / bins))


def spread(
    objects: Sequence[Sequence[tuple[float, float]]], bins: int = 8, seed: int = 0
) -> tuple[float, tuple[float, float]] | None:
    """Standard deviation in dB over sectors, with its 95 % interval; objects: each its views, as in `by_azimuth`.

    Noise makes sectors differ too; what it adds to the variance, which a bootstrap over objects adds once more, is
    taken away, so that 0 is found where all sides are as good (Efron and Tibshirani 1993, chapter 10).  None of fewer
    than ten objects, or where a sector has no view.
    """
    sums, counts = np.zeros((2, len(objects), bins))
    for number, views in enumerate(objects):
        for azimuth, db in views:
            sums[number, sector_of(azimuth, bins)] += db
            counts[number, sector_of(azimuth, bins)] += 1
    if len(objects) < FEW or not counts.sum(axis=0).all():
        return None
    drawn = np.random.default_rng(seed).multinomial(len(objects), [1 / len(objects)] * len(objects), size=RESAMPLES)
    shown = drawn @ counts
    whole = (shown > 0).all(axis=1)
    variances = ((drawn @ sums)[whole] / shown[whole]).var(axis=1)
    variance = float((sums.sum(axis=0) / counts.sum(axis=0)).var())
    bias = float(variances.mean()) - variance
    low, high = np.quantile(variances, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) - 2 * bias
    value, low, high = (math.sqrt(max(one, 0.0)) for one in (variance - bias, low, high))
    return value, (low, high)


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Of a share of `count` objects, at 95 % (Wilson 1927): 0 of 5 may be 0.43."""
    z = 1.96
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max((middle - half) / (1 + z * z / count), 0.0), min((middle + half) / (1 + z * z / count), 1.0)
