"""Candles of one or many symbols, read from CSV or Parquet and checked before anything is trained on them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from model.errors import InputError
from model.frames import candle_array, time_index, time_marks
from model.types import COLUMNS

logger = logging.getLogger(__name__)

READERS = {".csv": pd.read_csv, ".parquet": pd.read_parquet, ".pq": pd.read_parquet}


@dataclass(frozen=True)
class SymbolBars:
    """The bars of one symbol, oldest first.

    times: datetime64[ns] [T], strictly increasing; UTC if the source had a time zone, else its wall clock.
    candles: float32 [T, 6] in the order of model.types.COLUMNS, raw prices.
    marks: int64 [T, 5] in the order of model.types.TIME_MARKS, of the source's wall clock.
    """

    symbol: str
    times: np.ndarray
    candles: np.ndarray
    marks: np.ndarray

    def __len__(self) -> int:
        return len(self.times)


def read_bars(path: str | Path, *, time_column: str = "timestamps", symbol_column: str = "symbol") -> list[SymbolBars]:
    """Reads a .csv or .parquet file, or every such file of a folder, in long format.

    Columns: the time, open, high, low, close, and where there are any volume, amount and the symbol. Without a symbol
    column a file is one symbol, named after the file. A symbol's rows must be in time order; symbols may interleave.
    Raises InputError naming file, symbol, column, row (from 0, in the file) and the remedy.
    """
    source = Path(path)
    if source.is_dir():
        files = sorted(file for file in source.iterdir() if file.suffix.lower() in READERS)
        if not files:
            raise InputError(f"{source} holds no .csv or .parquet file", code="no_rows")
    elif source.is_file():
        files = [source]
    else:
        raise InputError(f"there is no file or folder {source}", code="no_such_file")
    found: dict[str, SymbolBars] = {}
    for file in files:
        for bars in _read_file(file, time_column, symbol_column):
            if bars.symbol in found:
                raise InputError(
                    f"{file}: symbol {bars.symbol!r} is in another file of {source} too: keep a symbol in one file",
                    code="duplicate_symbol",
                    column=symbol_column,
                )
            found[bars.symbol] = bars
    return list(found.values())


def _read_file(file: Path, time_column: str, symbol_column: str) -> list[SymbolBars]:
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise InputError(f"{file}: {file.suffix!r} is not read here: give {', '.join(READERS)}", code="unknown_format")
    try:
        frame = reader(file)
    except (ValueError, OSError) as error:
        raise InputError(f"{file} cannot be read: {error}", code="unreadable_file") from error
    return bars_from_frame(frame, str(file), time_column=time_column, symbol_column=symbol_column)


def bars_from_frame(
    frame: pd.DataFrame, name: str = "frame", *, time_column: str = "timestamps", symbol_column: str = "symbol"
) -> list[SymbolBars]:
    """A long-format frame as one SymbolBars per symbol, in order of first appearance. Errors as read_bars."""
    if time_column not in frame.columns:
        raise InputError(
            f"{name}: column {time_column!r} is missing: give each bar its time, or set data.time_column",
            code="missing_column",
            column=time_column,
        )
    if len(frame) == 0:
        raise InputError(f"{name}: there are no rows", code="no_rows")
    if symbol_column not in frame.columns:
        return [_symbol_bars(frame, np.arange(len(frame)), Path(name).stem, name, time_column)]
    if frame[symbol_column].isna().any():
        row = int(np.flatnonzero(frame[symbol_column].isna())[0])
        raise InputError(
            f"{name}: column {symbol_column!r}, row {row} is missing: name the symbol of every bar",
            code="missing_symbol",
            column=symbol_column,
            row=row,
        )
    codes, symbols = pd.factorize(frame[symbol_column])
    order = np.argsort(codes, kind="stable")
    rows_by_symbol = np.split(order, np.cumsum(np.bincount(codes))[:-1])
    return [
        _symbol_bars(frame.iloc[rows], rows, str(symbol), f"{name}, symbol {symbol!s}", time_column)
        for symbol, rows in zip(symbols, rows_by_symbol, strict=True)
    ]


def _symbol_bars(frame: pd.DataFrame, rows: np.ndarray, symbol: str, where: str, time_column: str) -> SymbolBars:
    """rows: where in the file the frame's rows came from."""
    try:
        candles = candle_array(frame)
        # An Index of wall-clock texts has no dtype of its own: pandas parses it once, here.
        index = time_index(frame[time_column], time_column)
        marks = time_marks(index, time_column)
    except InputError as error:
        row = None if error.row is None else int(rows[error.row])
        at = "" if row is None or row == error.row else f" (row {row} of the file)"
        raise InputError(f"{where}: {error}{at}", code=error.code, column=error.column, row=row) from error
    crooked = invalid_candles(candles)
    if crooked.any():
        logger.warning(
            "%s: %d of %d bars have a high below or a low above another price; the first is row %d",
            where,
            int(crooked.sum()),
            len(crooked),
            int(rows[np.flatnonzero(crooked)[0]]),
        )
    times = index.tz_convert("UTC").tz_localize(None) if index.tz is not None else index
    return SymbolBars(symbol, times.to_numpy().astype("datetime64[ns]"), candles, marks)


def invalid_candles(candles: np.ndarray) -> np.ndarray:
    """bool [...]: True where candles [..., 6] have high < max(open, close, low) or low > min(open, close, high)."""
    opened, high, low, close = (candles[..., i] for i in range(4))
    return (high < np.maximum(np.maximum(opened, close), low)) | (low > np.minimum(opened, close))


def frame_from_bars(series: Sequence[SymbolBars]) -> pd.DataFrame:
    """Long format, the inverse of bars_from_frame: symbol, timestamps and the six columns."""
    return pd.concat(
        [
            pd.DataFrame({"symbol": bars.symbol, "timestamps": bars.times}).join(
                pd.DataFrame(bars.candles, columns=list(COLUMNS))
            )
            for bars in series
        ],
        ignore_index=True,
    )
