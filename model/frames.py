"""The rules for candles and timestamps: what is accepted, how it is scaled, which marks the model reads off a time.

The only module of the package, beside the predictor's result frames, that knows pandas. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from model.errors import InputError
from model.types import COLUMNS, Series

PRICE_COLUMNS = COLUMNS[:4]
SCALE_FLOOR = 1e-5
"""Added to the standard deviation, as the published weights were trained."""

Times: TypeAlias = pd.Series | pd.DatetimeIndex | Sequence[datetime] | np.ndarray


def time_index(times: Times, name: str = "timestamps") -> pd.DatetimeIndex:
    """Any sequence of timestamps as a DatetimeIndex, in the time zone it has.

    Raises InputError for NaT, mixed time zones, times that are not strictly increasing, and what is not a time.
    """
    if isinstance(times, str) or not hasattr(times, "__len__"):
        raise InputError(f"{name} must be a sequence of timestamps, not {type(times).__name__}", code="not_a_time")
    if len(times) == 0:
        return pd.DatetimeIndex([])
    values = times if isinstance(times, pd.DatetimeIndex) else pd.Series(times).reset_index(drop=True)
    if not pd.api.types.is_datetime64_any_dtype(values.dtype):
        values = _parse_times(values, name)
    index = pd.DatetimeIndex(values)
    if index.hasnans:
        row = int(np.flatnonzero(index.isna())[0])
        raise InputError(f"{name}[{row}] is missing: give every bar its time", code="not_a_time", column=name, row=row)
    steps = np.diff(index.asi8)
    if (steps <= 0).any():
        row = int(np.flatnonzero(steps <= 0)[0]) + 1
        if steps[row - 1] == 0:
            raise InputError(
                f"{name}[{row}] repeats the time {index[row]}: keep one bar per time",
                code="duplicate_times",
                column=name,
                row=row,
            )
        raise InputError(
            f"{name}[{row}] ({index[row]}) is earlier than the bar before it: sort the bars by time",
            code="unsorted_times",
            column=name,
            row=row,
        )
    return index


def _parse_times(values: Any, name: str) -> pd.Series:
    if pd.api.types.is_numeric_dtype(values.dtype):
        raise InputError(
            f"{name} holds numbers: convert them with pandas.to_datetime and the right unit",
            code="not_a_time",
            column=name,
        )
    try:
        return pd.Series(pd.to_datetime(values, format="ISO8601"))
    except (ValueError, TypeError) as error:
        if "timezone" in str(error).lower() or "time zone" in str(error).lower() or "tz-" in str(error).lower():
            raise InputError(
                f"{name} mixes time zones: convert all of them to one", code="mixed_time_zones", column=name
            ) from None
        raise InputError(
            f"{name} holds something that is not an ISO 8601 time", code="not_a_time", column=name
        ) from None


def time_marks(times: Times, name: str = "timestamps") -> np.ndarray:
    """int64 [T, 5]: minute, hour, weekday (Monday 0), day of month and month of each time on its own wall clock.

    Raises InputError as time_index does.
    """
    return clock_marks(time_index(times, name).tz_localize(None).to_numpy())


def clock_marks(local: np.ndarray) -> np.ndarray:
    """time_marks of datetime64 [T] without NaT on their own wall clock; numpy only, because a service asks often."""
    days, months = local.astype("datetime64[D]"), local.astype("datetime64[M]")
    minutes = (local.astype("datetime64[m]") - days).astype(np.int64)
    weekday = (days.astype(np.int64) + 3) % 7  # 1970-01-01 was a Thursday
    day = (days - months).astype(np.int64) + 1
    return np.stack([minutes % 60, minutes // 60, weekday, day, months.astype(np.int64) % 12 + 1], axis=1)


def same_name(column: Any, name: str) -> bool:
    """Whether a column is what is called `name` here: Volume, VOLUME and volume are one."""
    return isinstance(column, str) and column.lower() == name.lower()


def columns_by_name(columns: Iterable[Any], names: Sequence[str], where: str = "") -> dict[str, Any]:
    """{name: the column that has it, in whatever case} for those of `names` that are there, in their order.

    Every reader of tables asks here, so that none takes Volume for no volume. where: what an error begins with.
    Raises InputError for a name that several columns have: which one is meant is not for us to guess.
    """
    alike: dict[Any, list[Any]] = {}
    for column in columns:
        alike.setdefault(column.lower() if isinstance(column, str) else column, []).append(column)
    for name in names:
        if len(twice := alike.get(name.lower(), [])) > 1:
            spelt = " and ".join(map(repr, dict.fromkeys(twice)))
            raise InputError(
                f"{where}column {name!r} is there twice{f' ({spelt})' if len(set(twice)) > 1 else ''}: keep one",
                code="duplicate_column",
                column=name,
            )
    return {name: alike[name.lower()][0] for name in names if name.lower() in alike}


def with_names(df: pd.DataFrame, names: Sequence[str], where: str = "") -> pd.DataFrame:
    """The frame with the columns that columns_by_name finds called by these names.

    Raises as it does, and InputError for columns of several levels.
    """
    if df.columns.nlevels > 1:
        raise InputError(
            f"{where}the columns have {df.columns.nlevels} levels: pick one symbol, such as df.xs(symbol, axis=1, "
            "level=1)",
            code="column_levels",
        )
    other = {column: name for name, column in columns_by_name(df.columns, names, where).items() if column != name}
    return df.rename(columns=other) if other else df


def candle_array(df: pd.DataFrame) -> np.ndarray:
    """float32 [T, 6] in the order of COLUMNS, each column contiguous.

    Names of columns may be in any case. No volume: volume is 0. No amount: volume × the mean of the four prices
    (0 without volume).
    Raises InputError for a missing column, one that is there twice, no rows, NaN, infinities, and what float32 cannot
    hold.
    """
    if not isinstance(df, pd.DataFrame):
        raise InputError(f"candles must be a pandas DataFrame, not {type(df).__name__}", code="not_a_frame")
    df = with_names(df, COLUMNS)
    missing = [name for name in PRICE_COLUMNS if name not in df.columns]
    if missing:
        alike = next((name for name in map(str, df.columns) if name.strip().lower() == missing[0]), None)
        raise InputError(
            f"column {missing[0]!r} is missing: {', '.join(PRICE_COLUMNS)} are needed, volume and amount may be there"
            + (f"; rename {alike!r}" if alike is not None else ""),
            code="missing_column",
            column=missing[0],
        )
    if len(df) == 0:
        raise InputError("there are no rows: give at least one bar of history", code="no_rows")
    columns = {name: _numbers(df[name], name) for name in COLUMNS if name in df.columns}
    volume = columns.get("volume", np.zeros(len(df)))
    columns["volume"] = volume
    if "amount" not in columns:
        # pandas' own mean, so that the sum is rounded in the published order.
        columns["amount"] = volume * df[list(PRICE_COLUMNS)].mean(axis=1).to_numpy(np.float64)
    with np.errstate(over="ignore"):
        candles = np.stack([columns[name].astype(np.float32) for name in COLUMNS]).T
    _require_finite(candles)
    return candles


def _numbers(column: pd.Series, name: str) -> np.ndarray:
    if not pd.api.types.is_numeric_dtype(column.dtype) or pd.api.types.is_bool_dtype(column.dtype):
        raise InputError(
            f"column {name!r} holds {column.dtype}, not numbers: convert it with pandas.to_numeric",
            code="not_a_number",
            column=name,
        )
    return column.to_numpy(np.float64, na_value=np.nan)


def _require_finite(candles: np.ndarray) -> None:
    bad = ~np.isfinite(candles)
    if not bad.any():
        return
    row, position = (int(i) for i in np.argwhere(bad)[0])
    column = COLUMNS[position]
    what = "NaN" if np.isnan(candles[row, position]) else "infinite in float32"
    raise InputError(
        f"column {column!r}, row {row} is {what}: fill the gap or drop the bar",
        code="not_finite",
        column=column,
        row=row,
    )


def normalise(candles: np.ndarray, clip: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Candles float32 [T, 6] → (normalised and clipped to ±clip [T, 6], mean [6], std with the floor added [6])."""
    # Columns are made contiguous because numpy then sums them pairwise, as on a frame's values: it rounds alike.
    candles = np.asfortranarray(candles, dtype=np.float32)
    mean, scale = np.mean(candles, axis=0), np.std(candles, axis=0) + np.float32(SCALE_FLOOR)
    return np.clip((candles - mean) / scale, -clip, clip), mean, scale


def series_from_frame(df: pd.DataFrame, x_timestamp: Times, y_timestamp: Times, pred_len: int | None = None) -> Series:
    """One series from the public predictor's arguments; pred_len, if given, must be the number of future times.

    Raises InputError, which says where the fault lies and what to do about it.
    """
    candles = candle_array(df)
    history, future = time_index(x_timestamp, "x_timestamp"), time_index(y_timestamp, "y_timestamp")
    if len(history) != len(candles):
        raise InputError(
            f"x_timestamp has {len(history)} times for {len(candles)} bars: give each bar its time",
            code="length_mismatch",
            column="x_timestamp",
        )
    if len(future) == 0:
        raise InputError(
            "y_timestamp is empty: give one time per bar to forecast", code="no_rows", column="y_timestamp"
        )
    if pred_len is not None and len(future) != pred_len:
        raise InputError(
            f"y_timestamp has {len(future)} times for pred_len={pred_len}: give one time per bar to forecast",
            code="length_mismatch",
            column="y_timestamp",
        )
    if (history.tz is None) != (future.tz is None):
        raise InputError(
            "x_timestamp and y_timestamp differ in having a time zone: give both or neither",
            code="mixed_time_zones",
            column="y_timestamp",
        )
    if future[0] <= history[-1]:
        raise InputError(
            f"y_timestamp starts at {future[0]}, not after the last bar of history at {history[-1]}",
            code="unsorted_times",
            column="y_timestamp",
            row=0,
        )
    return Series(candles, time_marks(history), time_marks(future))
