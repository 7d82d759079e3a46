"""A validated body → the job to compute: limits, defaults, future timestamps, sampling. Every fault has its place."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np

from model.calendars import CalendarError, future_times, parse_freq, require_known
from model.calibration import usual_bar_seconds
from model.frames import clock_marks
from model.types import Sampling, Series
from serve_app.candles import candle_matrix, range_faults
from serve_app.config import Defaults, Limits
from serve_app.errors import MAX_FIELD_ERRORS, FieldError, Loc, invalid_fields
from serve_app.jobs import CalibrationKey, Task
from serve_app.schemas import ForecastRequest, ForecastSeries, PredictRequest
from serve_app.times import Times, follow_faults

SEED_SPACE = 2**53
"""Seeds that the server draws: every one is exact in a client that reads JSON numbers as doubles."""

OF_THE_SETTING = frozenset({"unknown_freq", "unknown_calendar", "calendar_unavailable"})
"""Codes of CalendarError that say nothing of a series."""


@dataclass(frozen=True)
class Prepared:
    """One series, ready to compute and to answer.

    loc: its place in the body. candles: float64 [T, 6] as given. future: the texts of the H times to forecast.
    local: datetime64[us] [H], the same on the history's wall clock, which is offset from UTC (None: not told).
    """

    loc: Loc
    id: str | None
    task: Task
    candles: np.ndarray
    future: Sequence[str]
    local: np.ndarray
    offset: timedelta | None


def prepare_predictions(
    items: Sequence[tuple[Loc, PredictRequest]], limits: Limits, defaults: Defaults
) -> list[Prepared]:
    """Items of /v1/predict with their places in the body. Raises ServiceError with all field errors found."""
    faults: list[FieldError] = []
    prepared = []
    for loc, item in items:
        overrides = item.overrides
        horizon = len(item.prediction_timestamps)
        bad = _length_faults(loc, item.timestamps, {"candles": item.candles["close"]}, limits)
        if horizon > limits.max_horizon:
            text = f"at most {limits.max_horizon} bars can be predicted"
            bad.append(FieldError((*loc, "prediction_timestamps"), "horizon_over_limit", text))
        bad += [
            _under((*loc, "prediction_timestamps"), fault)
            for fault in follow_faults(item.timestamps, item.prediction_timestamps)
        ]
        if overrides is not None and overrides.pred_len not in (None, horizon):
            text = f"must equal the number of prediction_timestamps, {horizon}, or be left out"
            bad.append(FieldError((*loc, "overrides", "pred_len"), "length_mismatch", text))
        candles, amount_faults = candle_matrix(item.candles)
        bad += [
            FieldError((*loc, "candles", fault.loc[1], fault.loc[0]), fault.code, fault.message)
            for fault in amount_faults
        ]
        sampling = _sampling((overrides,), defaults, seed=secrets.randbelow(SEED_SPACE))
        bad += _sample_faults((*loc, "overrides", "sample_count"), sampling, limits)
        faults += bad
        if not bad:
            task = _task(candles, item.timestamps, item.prediction_timestamps.local, sampling, defaults.window)
            future = item.prediction_timestamps
            prepared.append(Prepared(loc, item.series_id, task, candles, future.texts, future.local, future.offset))
    return _checked(prepared, faults, items[0][0][:1], limits)


def prepare_forecast(request: ForecastRequest, limits: Limits, defaults: Defaults) -> tuple[list[Prepared], int]:
    """The series of /v1/forecast, and the request's seed. Raises ServiceError with all field errors found."""
    faults: list[FieldError] = []
    if request.repair not in ("off", "ohlc"):
        faults.append(FieldError(("repair",), "unknown_value", 'must be "off" or "ohlc"'))
    seed = secrets.randbelow(SEED_SPACE) if request.seed is None else request.seed
    prepared = []
    for index, series in enumerate(request.series):
        item, bad = _forecast_series(("series", index), request, series, seed, limits, defaults)
        faults += bad
        if item is not None:
            prepared.append(item)
    items = _checked(prepared, faults, ("series",), limits)
    _require_answer_fits(request, items, limits)
    return items, seed


def _forecast_series(
    loc: Loc, request: ForecastRequest, series: ForecastSeries, seed: int, limits: Limits, defaults: Defaults
) -> tuple[Prepared | None, list[FieldError]]:
    given = {"open": series.open, "high": series.high, "low": series.low, "close": series.close}
    given |= {name: column for name in ("volume", "amount") if (column := getattr(series, name)) is not None}
    faults = _length_faults(loc, series.timestamps, given, limits)
    if faults:
        return None, faults
    faults += [FieldError((*loc, "high", *fault.loc), fault.code, fault.message) for fault in range_faults(given)]
    candles, amount_faults = candle_matrix(given)
    faults += [_under(loc, fault) for fault in amount_faults]

    sampling = _sampling((series, request), defaults, seed=seed if series.seed is None else series.seed)
    faults += _sample_faults(_place(loc, series, "samples"), sampling, limits)
    future, texts, bad = _future(loc, request, series, limits, defaults)
    faults += bad
    if faults or future is None:
        return None, faults
    name = str(loc[-1]) if series.id is None else series.id
    window = series.window or request.window or defaults.window
    key = None
    if request.calibrate:
        key = CalibrationKey(series.id, usual_bar_seconds(series.timestamps.local))
    task = _task(candles, series.timestamps, future, sampling, window, key)
    return Prepared(loc, name, task, candles, texts, future, series.timestamps.offset), []


def _future(
    loc: Loc, request: ForecastRequest, series: ForecastSeries, limits: Limits, defaults: Defaults
) -> tuple[np.ndarray | None, Sequence[str], list[FieldError]]:
    """The times to forecast, on the history's wall clock, and as text."""
    # What the series says wins over what the request says, whichever of the two ways it is said in.
    own = series.horizon is not None or series.freq is not None or series.calendar is not None
    future = series.future_timestamps
    future_loc: Loc = (*loc, "future_timestamps")
    if future is None and not own:
        future, future_loc = request.future_timestamps, ("future_timestamps",)
    horizon = series.horizon
    horizon_loc: Loc = (*loc, "horizon")
    if horizon is None:
        horizon, horizon_loc = request.horizon, ("horizon",)
    if horizon is None and future is not None:
        horizon, horizon_loc = len(future), future_loc
    if horizon is None:
        horizon = defaults.pred_len
    faults = []
    if horizon > limits.max_horizon or (future is not None and len(future) > limits.max_horizon):
        place = future_loc if horizon <= limits.max_horizon else horizon_loc
        faults.append(FieldError(place, "horizon_over_limit", f"at most {limits.max_horizon} bars can be forecast"))
    elif future is not None and len(future) != horizon:
        text = f"horizon is {horizon} but there are {len(future)} future_timestamps: leave horizon out"
        faults.append(FieldError(future_loc, "length_mismatch", text))
    if faults:
        return None, (), faults
    freq = series.freq if series.freq is not None else request.freq
    calendar = series.calendar if series.calendar is not None else request.calendar
    try:
        if future is None:
            local = future_times(series.timestamps.local, series.timestamps.offset, horizon, freq, calendar)
            return local, series.timestamps.write(local), []
        # Not needed beside the times themselves, but a misspelt one is a mistake all the same.
        if freq is not None:
            parse_freq(freq)
        if calendar is not None:
            require_known(calendar)
    except CalendarError as error:
        remedy = "; or give future_timestamps" if future is None else ""
        # What is wrong with the request's setting is so for every series; all else is this one's matter.
        place = _place(loc, series, error.field) if error.code in OF_THE_SETTING else (*loc, error.field)
        return None, (), [FieldError(place, error.code, f"{error}{remedy}")]
    faults = [_under(future_loc, fault) for fault in follow_faults(series.timestamps, future)]
    return future.local, future.texts, faults


def _sampling(layers: Sequence[Any], defaults: Defaults, seed: int) -> Sampling:
    """Each setting from the first layer that names it, else from the defaults."""

    def pick(default: Any, *names: str) -> Any:
        values = (getattr(layer, name, None) for layer in layers for name in names)
        return next((value for value in values if value is not None), default)

    return Sampling(
        temperature=pick(defaults.temperature, "temperature"),
        top_k=pick(defaults.top_k, "top_k"),
        top_p=pick(defaults.top_p, "top_p"),
        samples=pick(defaults.sample_count, "samples", "sample_count"),
        seed=seed,
    )


def _task(
    candles: np.ndarray,
    times: Times,
    future: np.ndarray,
    sampling: Sampling,
    window: str,
    calibrate: CalibrationKey | None = None,
) -> Task:
    marks = clock_marks(np.concatenate([times.local, future]))
    series = Series(candles.astype(np.float32), marks[: len(times)], marks[len(times) :])
    return Task(series, sampling, window, calibrate)


def require_count(loc: Loc, count: int, most: int, what: str) -> None:
    """Raises ServiceError if there is more of something than one request may hold."""
    if count > most:
        raise invalid_fields([FieldError(loc, "too_many", f"at most {most} {what} per request")])


def _length_faults(loc: Loc, times: Times, columns: dict[str, np.ndarray], limits: Limits) -> list[FieldError]:
    faults = []
    if len(times) > limits.max_history:
        text = f"at most {limits.max_history} bars of history: send the latest ones"
        faults.append(FieldError((*loc, "timestamps"), "history_over_limit", text))
    for name, column in columns.items():
        if len(column) != len(times):
            text = f"has {len(column)} entries and timestamps has {len(times)}: give each bar its time"
            faults.append(FieldError((*loc, name), "length_mismatch", text))
    return faults


def _sample_faults(loc: Loc, sampling: Sampling, limits: Limits) -> list[FieldError]:
    if sampling.samples <= limits.max_samples:
        return []
    return [FieldError(loc, "samples_over_limit", f"at most {limits.max_samples} samples")]


def _checked(prepared: list[Prepared], faults: list[FieldError], loc: Loc, limits: Limits) -> list[Prepared]:
    if not faults:
        cost = sum(item.task.sampling.samples * item.task.series.horizon for item in prepared)
        if cost > limits.max_cost:
            text = (
                f"the work (samples × horizon, summed over the series) is {cost}, over the limit of {limits.max_cost}"
            )
            faults = [FieldError(loc, "cost_over_limit", text)]
    if faults:
        # What the request sets for all series is at fault once.
        raise invalid_fields(list(dict.fromkeys(faults))[: MAX_FIELD_ERRORS + 1])
    return prepared


def _require_answer_fits(request: ForecastRequest, items: Sequence[Prepared], limits: Limits) -> None:
    """Raises ServiceError. A few kilobytes may ask for hundreds of megabytes: many quantiles of many short series."""
    tables = 1 + len(request.quantiles)
    rows = sum(
        (tables + item.task.sampling.samples * request.return_paths) * item.task.series.horizon for item in items
    )
    if rows > limits.max_answer_rows:
        text = (
            f"the answer would have {rows} rows (mean, quantiles and paths × horizon, summed over the series), over "
            f"the limit of {limits.max_answer_rows}: ask for fewer quantiles, or in several requests"
        )
        raise invalid_fields([FieldError(("series",), "cost_over_limit", text)])


def _place(loc: Loc, series: ForecastSeries, field: str) -> Loc:
    """Where a setting was given: in the series, or in the request."""
    return (*loc, field) if getattr(series, field) is not None else (field,)


def _under(loc: Loc, fault: FieldError) -> FieldError:
    return FieldError((*loc, *fault.loc), fault.code, fault.message)
