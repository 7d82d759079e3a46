"""Scores of probabilistic forecasts, and the baseline that each of them has to be read against. numpy only.

Shapes: S sampled paths, H bars of horizon, N forecasts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from cluster.bars import invalid_candles
from model.errors import InputError


def crps_of_samples(samples: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score E|X − y| − ½ E|X − X′| of S draws; in the unit of the data, lower is better.

    samples [S, ...], actual [...] → [...]. The fair estimator: pairs of different draws only, so that the expected
    score does not depend on S (Ferro 2014, doi 10.1002/qj.2270). Raises InputError for fewer than 2 draws.
    """
    count = samples.shape[0]
    if count < 2:
        raise InputError(f"the fair CRPS needs at least 2 samples, not {count}", code="too_few_samples")
    ordered = np.sort(samples.astype(np.float64), axis=0)
    # Σ_{i<j} |x_i − x_j| = Σ_i (2i − n − 1) x_(i) over the sorted draws, i from 1.
    weights = 2 * np.arange(1, count + 1) - count - 1
    pairs = np.tensordot(weights, ordered, axes=(0, 0))
    return np.abs(ordered - actual).mean(axis=0) - pairs / (count * (count - 1))


def crps_of_normal(mean: np.ndarray, std: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """CRPS of N(mean, std²), closed form (Gneiting & Raftery 2007, doi 10.1198/016214506000001437); std > 0."""
    z = (np.asarray(actual, dtype=np.float64) - mean) / std
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    cumulative = 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))
    return std * (z * (2 * cumulative - 1) + 2 * density - 1 / math.sqrt(math.pi))


def covered(samples: np.ndarray, actual: np.ndarray, level: float = 0.8) -> np.ndarray:
    """bool [...]: whether the central interval of the draws [S, ...] holds actual [...].

    Quantiles at (S + 1)·p, so that draws from the truth cover `level` of the time for any S that is large enough; the
    usual interpolation at (S − 1)·p would cover 0.72 instead of 0.80 with 20 draws.
    """
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0, method="weibull")
    return (low <= actual) & (actual <= high)


class RandomWalk(NamedTuple):
    """A normal forecast of the close at each horizon: mean [H] and std [H], in units of price."""

    mean: np.ndarray
    std: np.ndarray


def random_walk(close: np.ndarray, horizon: int) -> RandomWalk:
    """The last close, and the root mean square of the history's one-bar moves times √h: the bar to clear.

    close [T]: the history. Raises InputError for fewer than 2 bars, or for a history that never moves.
    """
    moves = np.diff(np.asarray(close, dtype=np.float64))
    if len(moves) == 0:
        raise InputError("a history of one bar has no volatility: give at least 2", code="too_short", column="close")
    volatility = float(np.sqrt(np.mean(moves**2)))
    if volatility == 0:
        raise InputError("the close never moves: a random walk has no scale here", code="no_movement", column="close")
    steps = np.sqrt(np.arange(1, horizon + 1))
    return RandomWalk(np.full(horizon, float(close[-1])), volatility * steps)


def invalid_share(values: np.ndarray) -> float:
    """Share of candles [..., 6] whose high is below or whose low is above another of their prices."""
    return float(invalid_candles(values).mean())


class Ratio(NamedTuple):
    """mean(a) / mean(b) and its 90 % bootstrap interval."""

    value: float
    low: float
    high: float


def paired_ratio(a: np.ndarray, b: np.ndarray, *, seed: int = 0, draws: int = 2000) -> Ratio:
    """How a's mean compares with b's over the same N forecasts; both [N]. Forecasts are resampled in pairs."""
    rows = np.random.default_rng(seed).integers(len(a), size=(draws, len(a)))
    ratios = a[rows].mean(axis=1) / b[rows].mean(axis=1)
    low, high = np.quantile(ratios, [0.05, 0.95])
    return Ratio(float(a.mean() / b.mean()), float(low), float(high))
