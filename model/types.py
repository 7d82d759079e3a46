"""What goes into and comes out of the generation loop. numpy only: no torch, no pandas, no HTTP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

COLUMNS = ("open", "high", "low", "close", "volume", "amount")
"""Order of the six features everywhere: in arrays, in checkpoints, in answers."""

TIME_MARKS = ("minute", "hour", "weekday", "day", "month")
"""Order of the five time marks of a bar, read off the local wall clock of its timestamp."""

MARK_SIZES = (60, 24, 7, 32, 13)
"""How many values each of them can have, from 0; days and months count from 1."""

StopCheck = Callable[[], bool]
"""Asked once a step; True ends the computing with ForecastCancelledError."""

StepCallback = Callable[[int], None]
"""Told after each step how many bars exist now, from 1 to the horizon."""


@dataclass(frozen=True)
class Series:
    """One history and the times to forecast.

    candles: float32 [T, 6], columns in the order of COLUMNS, raw prices (not normalised), oldest first.
    marks: int64 [T, 5], in the order of TIME_MARKS.
    future_marks: int64 [H, 5]; H is the horizon.
    """

    candles: np.ndarray
    marks: np.ndarray
    future_marks: np.ndarray

    @property
    def horizon(self) -> int:
        return int(self.future_marks.shape[0])


@dataclass(frozen=True)
class Sampling:
    """How paths are drawn.

    temperature: divides the logits; 0 means greedy.
    top_k: keep the k most likely tokens (0: off). As in the public implementation, top_k > 0 switches top_p off.
    top_p: keep the smallest set of tokens whose mass passes p (1: off).
    samples: paths per series.
    seed: None draws noise from torch's global generator in the public order; a number keys a counter-based generator,
        so that path i depends on the seed, i and the history alone.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    samples: int = 1
    seed: int | None = None


@dataclass(frozen=True)
class Window:
    """What the model could see.

    context_used: bars of history in the first window, min(T, max_context).
    slid: True if history + horizon passed max_context, so that old bars left the window while generating.
    policy: how sliding was done; "exact" recomputes every window as the public implementation does.
    """

    context_used: int
    slid: bool
    policy: str = "exact"


@dataclass(frozen=True)
class AppliedCalibration:
    """How sampled paths were calibrated: see model.calibration.

    entry: symbol | bar_size | pooled, what the fitted numbers were chosen by. symbol: whose they are, None for several.
    forecasts: how many they were fitted on. fitted_from, fitted_to: first and last bar of the validation period.
    fitted_horizon: bars ahead; those beyond it are calibrated like the last ones. *_coverage: nominal → measured share.
    """

    method: str
    entry: str
    symbol: str | None
    forecasts: int
    fitted_from: str
    fitted_to: str
    fitted_horizon: int
    raw_coverage: dict[str, float]
    calibrated_coverage: dict[str, float]


@dataclass(frozen=True)
class Paths:
    """All sampled futures of one series.

    values: float64 [S, H, 6], in the units of the history.
    tokens: int64 [S, H, 2], the sampled (s1, s2) pairs behind them.
    calibration: how values were moved; None: they are as sampled.
    """

    values: np.ndarray
    tokens: np.ndarray
    window: Window
    calibration: AppliedCalibration | None = None
