"""What a simulation says about a long run: means and quantiles with their confidence intervals.

Waits of one run depend on each other and its beginning is not typical, so the first part is left out
(``steady``) and an interval comes from what is nearly independent: batches of one run
(``batch_means``; Law, Simulation Modeling and Analysis, 9.5.3) or whole runs with their own random
numbers (``mean_interval``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

WARMUP = 0.1
"""Share of a run that is left out at its beginning."""
BATCHES = 20
"""Batches of a run: few, so that each is much longer than the correlation of its waits (Law
recommends 10 to 30)."""

Values = NDArray[Any]


class Estimate(NamedTuple):
    """A number and its confidence interval; ``low`` and ``high`` are None where nothing is random or
    one run is all there is."""

    value: float
    low: float | None = None
    high: float | None = None


def steady(values: Values) -> Values:
    """``values`` of one run without its warm-up."""
    return values[math.floor(WARMUP * len(values)) :]


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of independent ``values`` and Student's interval, two-sided."""
    sample = np.asarray(values)
    mean = float(sample.mean())
    if len(sample) < 2:
        return Estimate(mean)
    half = _half_width(sample, 0.5 + confidence / 2)
    return Estimate(mean, mean - half, mean + half)


def upper_bound(values: Sequence[float], confidence: float = 0.95) -> float:
    """What the mean of independent ``values`` is below, with one-sided ``confidence``; the value
    itself where there is one."""
    sample = np.asarray(values)
    if len(sample) < 2:
        return float(sample[0])
    return float(sample.mean()) + _half_width(sample, confidence)


def _half_width(sample: Values, level: float) -> float:
    spread = float(sample.std(ddof=1)) / math.sqrt(len(sample))
    return float(stdtrit(len(sample) - 1, level)) * spread


def batch_means(values: Values, confidence: float = 0.95) -> Estimate:
    """Long-run mean of the values of one run: warm-up deleted (and what does not divide), the rest in
    BATCHES batches. With fewer values than that, no interval."""
    rest = steady(values)
    if len(rest) < BATCHES:
        return Estimate(float(rest.mean()))
    size = len(rest) // BATCHES
    means = rest[len(rest) - size * BATCHES :].reshape(BATCHES, size).mean(axis=1)
    return mean_interval(means.tolist(), confidence)
