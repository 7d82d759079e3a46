"""Scores of probabilistic forecasts of one price. numpy only.

Shapes: S sampled paths, H bars of horizon; a forecast is one of the three classes below, for one origin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple, Protocol

import numpy as np

from cluster.candles.bars import invalid_candles
from model.errors import InputError

LEVELS = tuple(round(0.1 * i, 1) for i in range(1, 10))
"""Quantiles of the weighted quantile loss."""
INTERVALS = (0.5, 0.8, 0.9)
"""Central intervals whose coverage is measured."""


class Predictive(Protocol):
    """A forecast of a price over H bars, as far as scores ask for it. Units of price throughout."""

    def crps(self, actual: np.ndarray) -> np.ndarray:
        """[H]: continuous ranked probability score, lower is better."""

    def quantiles(self, levels: Sequence[float]) -> np.ndarray:
        """[L, H]."""

    def mean(self) -> np.ndarray:
        """[H]."""

    def covered(self, actual: np.ndarray) -> np.ndarray | None:
        """bool [I, H]: whether each of INTERVALS holds the actual price; None for a point."""

    def pit(self, actual: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
        """[H]: the forecast's distribution function at the actual price, randomised at steps; None for a point."""


@dataclass(frozen=True)
class Draws:
    """Sampled paths of a price: [S, H]."""

    paths: np.ndarray

    def crps(self, actual: np.ndarray) -> np.ndarray:
        return crps_of_samples(self.paths, actual)

    def quantiles(self, levels: Sequence[float]) -> np.ndarray:
        return np.quantile(self.paths, levels, axis=0, method="weibull")

    def mean(self) -> np.ndarray:
        return self.paths.mean(axis=0)

    def covered(self, actual: np.ndarray) -> np.ndarray:
        return np.stack([covered(self.paths, actual, level) for level in INTERVALS])

    def pit(self, actual: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Uniform for draws from the truth, whatever their number: the rank among S + 1, randomised inside it."""
        below, ties = (self.paths < actual).sum(axis=0), (self.paths == actual).sum(axis=0)
        return (below + rng.random(len(actual)) * (ties + 1)) / (len(self.paths) + 1)


@dataclass(frozen=True)
class Normal:
    """N(centre, std²) at each bar, both [H]; std > 0."""

    centre: np.ndarray
    std: np.ndarray

    def crps(self, actual: np.ndarray) -> np.ndarray:
        return crps_of_normal(self.centre, self.std, actual)

    def quantiles(self, levels: Sequence[float]) -> np.ndarray:
        return self.centre + np.array([_z(level) for level in levels])[:, None] * self.std

    def mean(self) -> np.ndarray:
        return self.centre

    def covered(self, actual: np.ndarray) -> np.ndarray:
        distance = np.abs(actual - self.centre) / self.std
        return np.stack([distance <= _z((1 + level) / 2) for level in INTERVALS])

    def pit(self, actual: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return normal_cdf((actual - self.centre) / self.std)


@dataclass(frozen=True)
class Point:
    """A path without a spread: [H]. Its CRPS is the absolute error."""

    path: np.ndarray

    def crps(self, actual: np.ndarray) -> np.ndarray:
        return np.abs(actual - self.path)

    def quantiles(self, levels: Sequence[float]) -> np.ndarray:
        return np.tile(self.path, (len(levels), 1))

    def mean(self) -> np.ndarray:
        return self.path

    def covered(self, actual: np.ndarray) -> None:
        return None

    def pit(self, actual: np.ndarray, rng: np.random.Generator) -> None:
        return None


def _z(level: float) -> float:
    return NormalDist().inv_cdf(level)


def normal_cdf(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(z / math.sqrt(2)))


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
    return std * (z * (2 * normal_cdf(z) - 1) + 2 * density - 1 / math.sqrt(math.pi))


def pinball(quantiles: np.ndarray, levels: Sequence[float], actual: np.ndarray) -> np.ndarray:
    """Quantile loss ρ: quantiles [L, H], actual [H] → [L, H]. Twice its sum over Σ|y| is the weighted quantile loss."""
    above = actual - quantiles
    share = np.asarray(levels)[:, None]
    return np.maximum(share * above, (share - 1) * above)


def covered(samples: np.ndarray, actual: np.ndarray, level: float = 0.8) -> np.ndarray:
    """bool [...]: whether the central interval of the draws [S, ...] holds actual [...].

    Quantiles at (S + 1)·p, so that draws from the truth cover `level` of the time for any S that is large enough; the
    usual interpolation at (S − 1)·p would cover 0.72 instead of 0.80 with 20 draws.
    """
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0, method="weibull")
    return (low <= actual) & (actual <= high)


def realised_volatility(last: float | np.ndarray, closes: np.ndarray) -> np.ndarray:
    """√Σ(Δ log p)² over the bars of closes [..., H], the step from the last known close included; NaN where a price is
    not positive."""
    whole = np.concatenate([np.broadcast_to(np.asarray(last, np.float64), closes.shape[:-1])[..., None], closes], -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        steps = np.diff(np.log(np.where(whole > 0, whole, np.nan)), axis=-1)
    return np.sqrt((steps**2).sum(axis=-1))


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
