"""The forecasts that every model has to be read against: a price and its own history, nothing learned.

Each takes the closes of a history [T], raw prices, oldest first, and a horizon H, and answers with a forecast of
evaluation.scores. GARCH and ETS need the optional extra `baselines` and are loaded only when they are asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cluster.evaluation.scores import Normal, Point, Predictive
from model.errors import InputError

Baseline = Callable[[np.ndarray, int], Predictive]
EXTRAS = ("garch", "ets")
NO_FIT = "no_fit"
"""Code of the InputError of an extra that a history cannot be fitted with: the caller may go on without it."""


def last_price(close: np.ndarray, horizon: int) -> Point:
    """The last close, as a point: what a forecaster without any knowledge says."""
    return Point(np.full(horizon, float(close[-1])))


def random_walk(close: np.ndarray, horizon: int) -> Normal:
    """Historical volatility: the last close, and the root mean square of the history's one-bar moves times √h.

    Raises InputError for fewer than 2 bars, or for a history that never moves.
    """
    volatility = _root_mean_square(np.diff(np.asarray(close, dtype=np.float64)))
    return Normal(np.full(horizon, float(close[-1])), volatility * np.sqrt(np.arange(1, horizon + 1)))


def drift(close: np.ndarray, horizon: int) -> Normal:
    """Random walk with drift: the history's mean move goes on; spread σ√(h(1 + h/(T − 1))).

    Hyndman & Athanasopoulos, Forecasting: Principles and Practice, 5.5. Raises InputError for fewer than 3 bars, or
    moves that are all alike.
    """
    moves = np.diff(np.asarray(close, dtype=np.float64))
    if len(moves) < 2:
        raise InputError(f"drift needs at least 3 bars, not {len(close)}", code="too_short", column="close")
    steps, slope = np.arange(1, horizon + 1), moves.mean()
    spread = float(np.sqrt(((moves - slope) ** 2).sum() / (len(moves) - 1)))
    if spread <= 1e-12 * abs(float(close[-1])):
        raise InputError("the close always moves alike: its spread is 0", code="no_movement", column="close")
    return Normal(close[-1] + slope * steps, spread * np.sqrt(steps * (1 + steps / len(moves))))


def seasonal_naive(season: int) -> Baseline:
    """The price of one season ago, with the spread that such forecasts had in the history.

    season: bars. The spread grows with √(seasons ahead) (Forecasting: Principles and Practice, 5.5). The forecaster
    raises InputError for histories of fewer than season + 2 bars, or that never move.
    """

    def forecast(close: np.ndarray, horizon: int) -> Normal:
        if len(close) < season + 2:
            raise InputError(
                f"a season of {season} bars needs {season + 2} bars of history, not {len(close)}: give more history "
                "or a shorter season",
                code="too_short",
                column="close",
            )
        steps = np.arange(1, horizon + 1)
        close = np.asarray(close, dtype=np.float64)
        repeated = close[len(close) - season + (steps - 1) % season]
        _root_mean_square(np.diff(close))
        # Of a history that repeats itself exactly, the rounding of float32 prices is what is left to be wrong by.
        rounding = float(np.finfo(np.float32).eps * np.abs(close).max())
        spread = max(float(np.sqrt(np.mean((close[season:] - close[:-season]) ** 2))), rounding)
        return Normal(repeated, spread * np.sqrt((steps - 1) // season + 1))

    return forecast


def _root_mean_square(moves: np.ndarray) -> float:
    if len(moves) == 0:
        raise InputError("a history of one bar has no volatility: give at least 2", code="too_short", column="close")
    size = float(np.sqrt(np.mean(moves**2)))
    if size == 0:
        raise InputError("the close never moves: it has no scale to forecast in", code="no_movement", column="close")
    return size


def garch(close: np.ndarray, horizon: int) -> Normal:
    """GARCH(1,1) of log returns without a mean, as a normal around the last close. Needs the extra `baselines`."""
    from arch import arch_model

    returns = 100 * np.diff(np.log(np.asarray(close, dtype=np.float64)))
    fitted = arch_model(returns, mean="Zero", vol="GARCH", p=1, q=1, rescale=False).fit(disp="off", show_warning=False)
    variance = fitted.forecast(horizon=horizon, reindex=False).variance.to_numpy()[0]
    return Normal(np.full(horizon, float(close[-1])), close[-1] / 100 * np.sqrt(np.cumsum(variance)))


def ets(close: np.ndarray, horizon: int) -> Normal:
    """Exponential smoothing with an additive damped trend. Needs the extra `baselines`."""
    from statsmodels.tsa.exponential_smoothing.ets import ETSModel

    # Its intervals want an index.
    model: Any = ETSModel(pd.Series(np.asarray(close, dtype=np.float64)), error="add", trend="add", damped_trend=True)
    with warnings.catch_warnings():
        # A fit that stops at its iteration limit is still this baseline's best; its score shows how good it is.
        warnings.simplefilter("ignore")
        fitted = model.fit(disp=False)
        predicted = fitted.get_prediction(start=len(close), end=len(close) + horizon - 1)
    return Normal(np.asarray(predicted.predicted_mean), np.sqrt(np.asarray(predicted.forecast_variance)))


def _fitted(name: str, forecaster: Callable[[np.ndarray, int], Normal]) -> Baseline:
    """forecaster, whose package says in its own words, or by NaN, what it cannot fit: here it is an InputError."""

    def forecast(close: np.ndarray, horizon: int) -> Normal:
        try:
            made = forecaster(close, horizon)
            fault = "its variance is not finite and positive"
            if np.isfinite(made.centre).all() and np.isfinite(made.std).all() and (made.std > 0).all():
                return made
        except (ValueError, ArithmeticError) as error:  # numpy's LinAlgError is a ValueError
            fault = str(error)
        raise InputError(
            f"baseline {name!r} cannot be fitted to {len(close)} bars ({fault}): give more --history, or leave it "
            "out of --extras",
            code=NO_FIT,
        )

    return forecast


def baselines(season: int, extras: Sequence[str] = ()) -> dict[str, Baseline]:
    """Name → forecaster, in the order of reports. Raises InputError for an extra that is unknown or not installed."""
    found: dict[str, Baseline] = {
        "last_price": last_price,
        "drift": drift,
        "historical_volatility": random_walk,
        "seasonal_naive": seasonal_naive(season),
    }
    for name in extras:
        if name not in EXTRAS:
            raise InputError(
                f"baseline {name!r} is not known: choose from {', '.join(EXTRAS)}", code="unknown_baseline"
            )
        package = {"garch": "arch", "ets": "statsmodels"}[name]
        try:
            __import__(package)
        except ImportError as error:
            raise InputError(
                f"baseline {name!r} needs {package}: pip install 'kronos-ray-serve[baselines]'", code="missing_extra"
            ) from error
        found[name] = _fitted(name, {"garch": garch, "ets": ets}[name])
    return found
