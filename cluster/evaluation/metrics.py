"""From forecasts and what came to one table per forecaster. numpy only.

N forecasts of H bars, in time order; O origins (moments), at each of which one or more symbols were forecast. Every
interval is a block bootstrap over origins, so that forecasts that overlap in time or across symbols are not counted as
independent (cluster.evaluation.significance).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cluster.evaluation.scores import INTERVALS, LEVELS, Draws, Predictive, pinball, realised_volatility
from cluster.evaluation.significance import (
    SIGNIFICANCE,
    Interval,
    block_length,
    block_rows,
    bootstrap,
    correlation,
    diebold_mariano,
    ks_uniform,
    mean_test,
    ranks,
    wilson,
)

MEDIAN = LEVELS.index(0.5)
CROSS_SECTION = 3
"""Symbols at an origin from which on a correlation across them says something."""
DRAWS = 1000


@dataclass
class Scored:
    """One forecaster's scores, a list entry a forecast.

    crps: [H], in units of the history's root mean square one-bar move. error: [H], |median − actual| in price.
    loss: [L], quantile losses summed over the bars, in price. covered: bool [I, H] or None; pit: [H] or None.
    predicted: return of the mean path at the horizon. volatility: forecast of the realised one. numbers: which of the
    truth's forecasts these are; a baseline that could not be fitted to one of them has no entry for it.
    """

    numbers: list[int] = field(default_factory=list)
    crps: list[np.ndarray] = field(default_factory=list)
    error: list[np.ndarray] = field(default_factory=list)
    loss: list[np.ndarray] = field(default_factory=list)
    covered: list[np.ndarray | None] = field(default_factory=list)
    pit: list[np.ndarray | None] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    volatility: list[float] = field(default_factory=list)

    def add(self, forecast: Predictive, truth: Truth, number: int, rng: np.random.Generator) -> None:
        """The scores of forecast `number` of the truth."""
        actual, last = truth.actual[number], truth.last[number]
        quantiles, mean = forecast.quantiles(LEVELS), forecast.mean()
        self.numbers.append(number)
        self.crps.append(forecast.crps(actual) / truth.unit[number])
        self.error.append(np.abs(quantiles[MEDIAN] - actual))
        self.loss.append(pinball(quantiles, LEVELS, actual).sum(axis=1))
        self.covered.append(forecast.covered(actual))
        self.pit.append(forecast.pit(actual, rng))
        self.predicted.append(float(mean[-1] / last - 1))
        self.volatility.append(_volatility(forecast, mean, last))


def _volatility(forecast: Predictive, mean: np.ndarray, last: float) -> float:
    """Expected √Σ(Δ log p)²: mean over paths; of a normal, from its variances; of a point, of its path."""
    if isinstance(forecast, Draws):
        paths = realised_volatility(last, forecast.paths)
        paths = paths[np.isfinite(paths)]
        return float(paths.mean()) if len(paths) else float("nan")
    own = float(realised_volatility(last, mean)) ** 2
    std = getattr(forecast, "std", None)
    # The variance of a sum of moves is the sum of their variances: the last one's is that of all of them together.
    return float(np.sqrt(own + (0.0 if std is None else (std[-1] / last) ** 2)))


@dataclass(frozen=True)
class Truth:
    """What came. actual: [N, H] closes; last: [N] last known closes; unit: [N] root mean square one-bar move of the
    history; mase_scale: [N] mean absolute one-bar move; origin: [N] number of the moment, from 0, rising; symbol: [N].
    overlap: origins whose forecasts share bars, counting the own one."""

    actual: np.ndarray
    last: np.ndarray
    unit: np.ndarray
    mase_scale: np.ndarray
    origin: np.ndarray
    symbol: np.ndarray
    overlap: int

    def only(self, numbers: np.ndarray) -> Truth:
        """Some of the forecasts. Origins that none is left of go, so that fewer than `overlap` may share bars."""
        parts = {name: getattr(self, name)[numbers] for name in ("actual", "last", "unit", "mase_scale", "symbol")}
        return Truth(**parts, origin=np.unique(self.origin[numbers], return_inverse=True)[1], overlap=self.overlap)

    @property
    def returns(self) -> np.ndarray:
        """[N]: over the whole horizon."""
        return self.actual[:, -1] / self.last - 1

    @property
    def volatility(self) -> np.ndarray:
        return realised_volatility(self.last, self.actual)


class Table:
    """Metrics and comparisons of several forecasters over the same forecasts."""

    def __init__(self, truth: Truth, *, seed: int = 0) -> None:
        self.truth, self._seed = truth, seed
        self.origins = int(truth.origin.max()) + 1
        self._rows = block_rows(self.origins, block_length(self.origins, truth.overlap), DRAWS, seed)

    def metrics(self, scored: Scored) -> dict[str, Any]:
        """JSON-ready; "intervals" holds the 95 % block bootstrap interval of what stands beside it.

        What a forecaster cannot have (coverage of a point, IC of a constant) is None. One without some of the
        forecasts ("left_out": how many) is measured on those it has.
        """
        left_out = len(self.truth.last) - len(scored.numbers)
        return self._among(np.array(scored.numbers))._metrics(scored) | {"left_out": left_out}

    def _among(self, numbers: np.ndarray) -> Table:
        """The table of some of the forecasts, their numbers in rising order."""
        every = len(numbers) == len(self.truth.last)
        return self if every else Table(self.truth.only(numbers), seed=self._seed)

    def _metrics(self, scored: Scored) -> dict[str, Any]:
        truth = self.truth
        crps, error = np.stack(scored.crps), np.stack(scored.error)
        loss, size = np.stack(scored.loss), np.abs(truth.actual).sum(axis=1)
        means = {
            "crps": crps.mean(axis=1),
            "mae": error.mean(axis=1),
            "mase": error.mean(axis=1) / truth.mase_scale,
        }
        values: dict[str, Any] = {name: float(column.mean()) for name, column in means.items()}
        intervals = {name: self._ratio_interval(column, np.ones_like(column)) for name, column in means.items()}
        values["wql"] = float(2 * loss.mean(axis=1).sum() / size.sum())
        values["wql_by_level"] = {
            f"{level}": float(2 * loss[:, i].sum() / size.sum()) for i, level in enumerate(LEVELS)
        }
        intervals["wql"] = self._ratio_interval(2 * loss.mean(axis=1), size)
        values["crps_by_step"] = crps.mean(axis=0).tolist()
        values |= self._coverage(scored)
        for name, transform in (("ic", None), ("rank_ic", ranks)):
            values[name], intervals[name] = self._information_coefficient(np.array(scored.predicted), transform)
        values["hit_rate"], intervals["hit_rate"] = self._hit_rate(np.array(scored.predicted))
        values["volatility"] = self._volatility(np.array(scored.volatility))
        return {**values, "intervals": {name: interval and list(interval) for name, interval in intervals.items()}}

    def compare(self, model: Scored, other: Scored, against: str) -> dict[str, Any]:
        """CRPS of the model over the other's: ratio < 1 is in the model's favour; the verdict is Diebold–Mariano's.

        Paired: both are taken on the forecasts that both have ("forecasts"; "left_out": the others).
        """
        common, of_model, of_other = np.intersect1d(model.numbers, other.numbers, return_indices=True)
        mine = np.stack(model.crps).mean(axis=1)[of_model]
        theirs = np.stack(other.crps).mean(axis=1)[of_other]
        table = self._among(common)
        test = diebold_mariano(table._by_origin(mine), table._by_origin(theirs), self.truth.overlap)
        interval = table._ratio_interval(mine, theirs)
        ratio = float(mine.mean() / theirs.mean()) if theirs.mean() > 0 else None
        verdict = "ties"
        if test.p_value is not None and test.statistic is not None and test.p_value < SIGNIFICANCE:
            verdict = "beats" if test.statistic < 0 else "loses"
        return {
            "against": against,
            "metric": "crps",
            "ratio": ratio,
            "low": interval and interval.low,
            "high": interval and interval.high,
            "p_value": test.p_value,
            "statistic": test.statistic,
            "test": "Diebold–Mariano, Harvey–Leybourne–Newbold correction, two-sided",
            "forecasts": len(common),
            "left_out": len(self.truth.last) - len(common),
            "origins": test.n,
            "lag": test.lag,
            "variance": test.variance,
            "verdict": verdict,
        }

    def _sums(self, column: np.ndarray) -> np.ndarray:
        """[N] → [O]: sums over the symbols of each origin."""
        return np.bincount(self.truth.origin, weights=column, minlength=self.origins)

    def _by_origin(self, column: np.ndarray) -> np.ndarray:
        return self._sums(column) / self._sums(np.ones_like(column))

    def _ratio_interval(self, numerator: np.ndarray, denominator: np.ndarray) -> Interval | None:
        """Of Σ numerator / Σ denominator, both [N]; None with fewer than 4 origins."""
        if self.origins < 4:
            return None
        above, below = self._sums(numerator), self._sums(denominator)
        with np.errstate(invalid="ignore", divide="ignore"):
            return bootstrap(self._rows, lambda rows: above[rows].sum(axis=1) / below[rows].sum(axis=1))

    def _coverage(self, scored: Scored) -> dict[str, Any]:
        if any(pit is None for pit in scored.pit):
            return {"coverage": None, "pit": None}
        inside = np.stack([c for c in scored.covered if c is not None]).astype(np.float64)  # [N, I, H]
        pit = np.stack([p for p in scored.pit if p is not None])
        n, coverage = len(inside), {}
        for i, level in enumerate(INTERVALS):
            share = float(inside[:, i].mean())
            blocks = self._ratio_interval(inside[:, i].mean(axis=1), np.ones(n))
            coverage[f"{level}"] = {
                "value": share,
                # The bars of one forecast move together: a forecast counts as one trial.
                **wilson(share * n, n)._asdict(),
                "n": n,
                "bootstrap": blocks and list(blocks),
                "by_step": inside[:, i].mean(axis=0).tolist(),
            }
        distance, p_value = ks_uniform(pit[:, -1])
        histogram = np.histogram(pit, bins=10, range=(0, 1))[0] / pit.size
        return {
            "coverage": coverage,
            "pit": {"ks": distance, "p_value": p_value, "n": n, "bar": pit.shape[1], "histogram": histogram.tolist()},
        }

    def _information_coefficient(self, predicted: np.ndarray, transform: Any) -> tuple[Any, Interval | None]:
        """Correlation of predicted and actual returns: across symbols per origin where there are enough symbols, else
        over time (each symbol on its own, then the mean)."""
        kind, series = self.coefficient_series(predicted, self.truth.returns, transform)
        if len(series) == 0:
            return None, None
        test = mean_test(series, self.truth.overlap)
        rows = block_rows(len(series), block_length(len(series), self.truth.overlap), DRAWS, 1)
        interval = bootstrap(rows, lambda chosen: series[chosen].mean(axis=1)) if len(series) >= 4 else None
        return {"kind": kind, **test._asdict()}, interval

    def coefficient_series(
        self, predicted: np.ndarray, returns: np.ndarray, transform: Any = None
    ) -> tuple[str, np.ndarray]:
        """(kind, one term per origin), whose mean is the information coefficient; empty where nothing varies.

        transform: None for Pearson's, ranks for Spearman's.
        """
        change = transform or (lambda column: column)
        groups = np.split(np.arange(len(predicted)), np.flatnonzero(np.diff(self.truth.origin)) + 1)
        crowded = [rows for rows in groups if len(rows) >= CROSS_SECTION]
        if len(crowded) >= 4:
            values = np.array([correlation(change(predicted[rows]), change(returns[rows])) for rows in crowded])
            return "cross-sectional", values[np.isfinite(values)]
        terms, known = np.zeros(len(predicted)), np.zeros(len(predicted), dtype=bool)
        for symbol in np.unique(self.truth.symbol):
            rows = np.flatnonzero(self.truth.symbol == symbol)
            a, b = change(predicted[rows]), change(returns[rows])
            if len(rows) >= CROSS_SECTION and np.isfinite(correlation(a, b)):
                terms[rows] = (a - a.mean()) / a.std() * (b - b.mean()) / b.std()
                known[rows] = True
        counts = self._sums(known.astype(np.float64))
        return "over time", self._sums(terms)[counts > 0] / counts[counts > 0]

    def _hit_rate(self, predicted: np.ndarray) -> tuple[Any, Interval | None]:
        actual = np.sign(self.truth.returns)
        counted = (actual != 0) & (np.abs(predicted) > 1e-12)
        if not counted.any():
            return None, None
        hits = ((np.sign(predicted) == actual) & counted).astype(np.float64)
        up = float((actual[counted] > 0).mean())
        value = float(hits.sum() / counted.sum())
        n = int(counted.sum())
        found = {"value": value, "base_rate": max(up, 1 - up), "n": n, **wilson(hits.sum(), n)._asdict()}
        return found, self._ratio_interval(hits, counted.astype(np.float64))

    def _volatility(self, predicted: np.ndarray) -> dict[str, Any] | None:
        """mae and r2 = 1 − Σ(v̂ − v)² / Σ(v − v̄)², of the realised volatility over the horizon, in log returns."""
        actual = self.truth.volatility
        known = np.isfinite(predicted) & np.isfinite(actual)
        if known.sum() < 2:
            return None
        error, spread = (predicted - actual)[known], actual[known] - actual[known].mean()
        total = float(spread @ spread)
        return {
            "mae": float(np.abs(error).mean()),
            "r2": 1 - float(error @ error) / total if total > 0 else None,
            "n": int(known.sum()),
        }


def overall_verdict(comparisons: Sequence[dict[str, Any]]) -> str:
    """beats: every comparison is won; loses: one is lost; ties otherwise."""
    verdicts = {comparison["verdict"] for comparison in comparisons}
    if verdicts == {"beats"}:
        return "beats"
    return "loses" if "loses" in verdicts else "ties"
