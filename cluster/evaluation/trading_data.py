"""What a backtest trades: signals, and prices in float64, from files; candles of an evaluation as prices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from cluster.candles.bars import SymbolBars, bars_from_frame, find_files, read_frame, refuse_mixed_zones
from cluster.evaluation.ledger import SymbolPrices
from model.errors import InputError
from model.frames import columns_by_name, with_names
from model.types import COLUMNS


def read_prices(
    paths: Sequence[str | Path], *, time_column: str = "timestamps", symbol_column: str = "symbol"
) -> list[SymbolPrices]:
    """open and close of every symbol, in float64. Raises InputError as cluster.candles.bars does."""
    found: dict[str, SymbolPrices] = {}
    for file in find_files(paths):
        frame = with_names(read_frame(file, symbol_column), (time_column, symbol_column, *COLUMNS), f"{file}: ")
        if {"open", "close"} <= set(frame.columns):
            # Only these two are traded at; what checks candles wants the others as well.
            pair = frame[["open", "close"]].apply(pd.to_numeric, errors="coerce")  # a text is named further down
            outer = {"high": pair.max, "low": pair.min}
            frame = frame.assign(**{name: find(axis=1) for name, find in outer.items() if name not in frame.columns})
        # The ledger names an open or close that is not positive; of high and low it needs neither.
        checked = bars_from_frame(
            frame, str(file), time_column=time_column, symbol_column=symbol_column, positive=False
        )
        known = symbol_column in frame.columns
        groups = dict(iter(frame.groupby(frame[symbol_column].astype(str), sort=False))) if known else {}
        for bars in checked:
            if bars.symbol in found:
                raise InputError(
                    f"{file}: symbol {bars.symbol!r} was read from another file already: keep a symbol in one file",
                    code="duplicate_symbol",
                )
            own = groups.get(bars.symbol, frame)
            opens, closes = (own[name].to_numpy(np.float64) for name in ("open", "close"))
            found[bars.symbol] = SymbolPrices(bars.symbol, bars.times, opens, closes, bars.zone)
    refuse_mixed_zones({prices.symbol: prices.zone for prices in found.values()}, time_column)
    return list(found.values())


def prices_of(series: Sequence[SymbolBars]) -> list[SymbolPrices]:
    """What the evaluation's own candles say, in the precision that they are kept in."""
    found = []
    for bars in series:
        opens, closes = bars.candles[:, [0, 3]].astype(np.float64).T
        found.append(SymbolPrices(bars.symbol, bars.times, opens, closes, bars.zone))
    return found


def read_signals(path: Path, *, time_column: str = "timestamps", symbol_column: str = "symbol") -> pd.DataFrame:
    """symbol, timestamps, signal of a CSV or Parquet file. Raises InputError for a column that is missing or wrong.

    A file without the columns of these names may have symbol and timestamps, as cluster.evaluate writes them, whatever
    they are called in the prices.
    """
    frame = read_frame(path, symbol_column)
    there = columns_by_name(frame.columns, (symbol_column, "symbol", time_column, "timestamps"), f"{path}: ")
    if symbol_column not in there and "symbol" in there:
        frame, symbol_column = read_frame(path, "symbol"), "symbol"
    if time_column not in there and "timestamps" in there:
        time_column = "timestamps"
    frame = with_names(frame, (symbol_column, time_column, "signal"), f"{path}: ")
    for column in (symbol_column, time_column, "signal"):
        if column not in frame.columns:
            raise InputError(
                f"{path}: column {column!r} is missing, it has {', '.join(map(str, frame.columns))}: give "
                f"{symbol_column}, {time_column} and signal",
                code="missing_column",
                column=column,
            )
    if not pd.api.types.is_numeric_dtype(frame["signal"].dtype):
        raise InputError(f"{path}: column 'signal' holds {frame['signal'].dtype}, not numbers", code="not_a_number")
    return frame.rename(columns={symbol_column: "symbol", time_column: "timestamps"})


def read_levels(paths: Sequence[str | Path], column: str, *, time_column: str = "timestamps") -> pd.Series:
    """A column of the price files as levels by time. Raises InputError if no file has it."""
    parts = []
    for file in find_files(paths):
        frame = with_names(read_frame(file), (time_column,), f"{file}: ")
        if column in frame.columns:
            index = pd.DatetimeIndex(pd.to_datetime(frame[time_column], format="ISO8601"))
            index = index.tz_convert("UTC").tz_localize(None) if index.tz is not None else index
            parts.append(pd.Series(frame[column].to_numpy(np.float64), index=index))
    if not parts:
        raise InputError(
            f"benchmark {column!r} is neither a symbol nor a column of the prices", code="unknown_benchmark"
        )
    levels = pd.concat(parts).dropna()
    return levels[~levels.index.duplicated()]
