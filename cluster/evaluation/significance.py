"""Tests and intervals for scores that overlap in time. numpy only.

Forecasts of H bars made every K bars share bars, so that neighbouring scores are not independent: every test here takes
the overlap into account, in origins (moments at which forecasts are made), ⌈H / K⌉ of which share bars.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from model.errors import InputError

SIGNIFICANCE = 0.05
"""Two-sided level of every verdict."""


class Interval(NamedTuple):
    """low and high of a 95 % interval."""

    low: float
    high: float


class DieboldMariano(NamedTuple):
    """statistic < 0: the first forecaster's loss is lower. n: origins. variance: rectangular | bartlett | none.

    p_value is None where there are too few origins, or where the losses never differ (variance "none").
    """

    statistic: float | None
    p_value: float | None
    n: int
    lag: int
    variance: str


class MeanTest(NamedTuple):
    """A mean with its Newey–West t. ir: mean / std, None for a constant series."""

    mean: float
    ir: float | None
    t: float | None
    n: int
    lag: int


def student_t_p_value(t: float, degrees: float) -> float:
    """P(|T| ≥ |t|) of Student's distribution, by the regularised incomplete beta function."""
    if degrees <= 0:
        raise InputError(f"Student's distribution needs positive degrees of freedom, not {degrees}", code="bad_size")
    return _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) by Lentz's continued fraction (Numerical Recipes, 3rd edition, 6.4)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny, c = 1e-300, 1.0
    d = 1 / max(1 - (a + b) * x / (a + 1), tiny)
    fraction = d
    for m in range(1, 500):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for coefficient in (even, odd):
            d = 1 + coefficient * d
            d = 1 / (d if abs(d) > tiny else tiny)
            c = 1 + coefficient / (c if abs(c) > tiny else tiny)
            fraction *= c * d
        if abs(c * d - 1) < 1e-14:
            break
    return front * fraction


def autocovariances(series: np.ndarray, lag: int) -> np.ndarray:
    """[lag + 1]: 1/n Σ (x_t − x̄)(x_{t−k} − x̄) of series [n]."""
    centred = series - series.mean()
    return np.array([float(centred[k:] @ centred[: len(series) - k]) for k in range(lag + 1)]) / len(series)


def newey_west_variance(series: np.ndarray, lag: int) -> float:
    """Variance of the mean of series [n], Bartlett weights up to `lag` (Newey & West 1987, doi 10.2307/1913610)."""
    lag = min(lag, len(series) - 1)
    gamma = autocovariances(series, lag)
    weights = 1 - np.arange(1, lag + 1) / (lag + 1)
    return max(0.0, float(gamma[0] + 2 * weights @ gamma[1:])) / len(series)


def mean_test(series: np.ndarray, lag: int) -> MeanTest:
    """Mean of series [n] (at least 1), its ratio to the standard deviation, and Newey–West t with `lag` lags."""
    mean = float(series.mean())
    spread = float(series.std(ddof=1)) if len(series) > 1 else 0.0
    variance = newey_west_variance(series, lag) if len(series) > 1 else 0.0
    return MeanTest(
        mean,
        mean / spread if spread > 0 else None,
        mean / math.sqrt(variance) if variance > 0 else None,
        len(series),
        min(lag, len(series) - 1),
    )


def diebold_mariano(loss: np.ndarray, other: np.ndarray, steps: int) -> DieboldMariano:
    """Whether two forecasters' mean losses differ; both [n], one per origin in time order.

    steps: origins whose forecasts overlap, counting the own one, so that steps − 1 autocovariances enter. The
    small-sample correction and Student's n − 1 degrees of freedom are Harvey, Leybourne & Newbold's (1997,
    doi 10.1016/S0169-2070(96)00719-4). The rectangular kernel can give a negative variance: then Bartlett weights are
    used, and the result says so.
    """
    difference = np.asarray(loss, dtype=np.float64) - other
    n, lag = len(difference), steps - 1
    if n < max(4, 2 * steps):
        return DieboldMariano(None, None, n, lag, "none")
    gamma = autocovariances(difference, lag)
    variance, kernel = float(gamma[0] + 2 * gamma[1:].sum()) / n, "rectangular"
    if variance <= 0:
        variance, kernel = newey_west_variance(difference, lag), "bartlett"
    # Differences of rounding size are none: identical forecasters must tie, whatever the last digit says.
    if variance <= (1e-12 * float(np.abs(other).mean())) ** 2:
        return DieboldMariano(None, None, n, lag, "none")
    correction = math.sqrt((n + 1 - 2 * steps + steps * (steps - 1) / n) / n)
    statistic = correction * float(difference.mean()) / math.sqrt(variance)
    return DieboldMariano(statistic, student_t_p_value(statistic, n - 1), n, lag, kernel)


def block_rows(n: int, block: int, draws: int, seed: int) -> np.ndarray:
    """int64 [draws, n]: rows of circular block bootstrap samples (Politis & Romano 1992) of n rows in time order."""
    block = max(1, min(block, n))
    starts = np.random.default_rng(seed).integers(n, size=(draws, -(-n // block)))
    rows = (starts[:, :, None] + np.arange(block)) % n
    return rows.reshape(draws, -1)[:, :n]


def block_length(n: int, overlap: int) -> int:
    """Origins a block: twice the overlap, and at least n^(1/3) (the optimal order, Hall et al. 1995)."""
    return min(n, max(2 * overlap if overlap > 1 else 1, math.ceil(n ** (1 / 3))))


def bootstrap(rows: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> Interval | None:
    """95 % percentile interval. statistic: rows [draws, n] → [draws]; draws where it is NaN are left out."""
    values = statistic(rows)
    values = values[np.isfinite(values)]
    if len(values) < len(rows) / 2:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(low), float(high))


def wilson(successes: float, n: int) -> Interval:
    """95 % interval of a binomial share (Wilson 1927); it holds for independent trials. n ≥ 1."""
    z = NormalDist().inv_cdf(0.975)
    share, spread = successes / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def ks_uniform(values: np.ndarray) -> tuple[float, float]:
    """Kolmogorov–Smirnov distance of values [n] from the uniform on [0, 1], and its asymptotic p-value."""
    n, ordered = len(values), np.sort(values)
    steps = np.arange(1, n + 1) / n
    distance = float(max((steps - ordered).max(), (ordered - steps + 1 / n).max()))
    # Stephens' small-sample form of the Kolmogorov distribution (1970).
    x = (math.sqrt(n) + 0.12 + 0.11 / math.sqrt(n)) * distance
    p = 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * x) ** 2) for k in range(1, 101)) if x > 0.2 else 1.0
    return distance, min(1.0, max(0.0, p))


def ranks(values: np.ndarray) -> np.ndarray:
    """float64 [n]: ranks from 1, ties share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; NaN if either is constant or there are fewer than 2 values."""
    if len(a) < 2:
        return math.nan
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else math.nan


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, with mean ranks for ties; NaN as correlation()."""
    return correlation(ranks(a), ranks(b))
