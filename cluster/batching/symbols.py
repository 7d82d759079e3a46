"""One unit's files → each symbol's history, checked, with the times to forecast; or what is wrong with it.

A fault is the symbol's own: whatever is wrong with one, the others of its files are forecast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from cluster.batching.files import (
    Layout,
    known_columns,
    layout_of,
    read_columns,
    schema_names,
    unreadable,
    wide_columns,
)
from cluster.batching.plan import Unit
from model.calendars import DAY, CalendarError, future_times, parse_freq
from model.errors import InputError
from model.frames import PRICE_COLUMNS, candle_array, columns_by_name, time_index, time_marks
from model.types import COLUMNS, Series


@dataclass(frozen=True)
class HistoryRules:
    """What is forecast of a history.

    horizon: bars. history: the latest bars that are used; None: all of them. shortest: fewer bars are refused.
    freq, calendar: as model.calendars.future_times takes them.
    """

    horizon: int
    history: int | None = None
    shortest: int = 8
    freq: str | None = None
    calendar: str | None = None


@dataclass(frozen=True)
class SymbolHistory:
    """series: what the engine takes. future: the H times to forecast, in the history's time zone."""

    series: Series
    future: pd.DatetimeIndex


def load_unit(unit: Unit, names: Layout, rules: HistoryRules) -> dict[str, SymbolHistory | InputError]:
    """Every symbol of the unit, in its order."""
    pieces: dict[str, list[pd.DataFrame]] = {symbol: [] for symbol in unit.symbols}
    faults: dict[str, InputError] = {}
    for path, layout in unit.files:
        for file in sorted(Path(path).glob("*.parquet")) if layout == "spread" else [Path(path)]:
            try:
                for symbol, found in _read(str(file), "long" if layout == "spread" else layout, unit.symbols, names):
                    if isinstance(found, InputError):
                        faults[symbol] = found
                    else:
                        pieces[symbol].append(found)
            except InputError as fault:
                faults |= dict.fromkeys(_symbols_of(file, layout, unit), fault)
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                faults |= dict.fromkeys(_symbols_of(file, layout, unit), unreadable(file, error))
            except Exception as error:
                faults |= dict.fromkeys(_symbols_of(file, layout, unit), _unexpected(error))
    histories: dict[str, SymbolHistory | InputError] = {}
    for symbol in unit.symbols:
        try:
            if symbol in faults:
                raise faults[symbol]
            histories[symbol] = symbol_history(symbol, pieces[symbol], names, rules)
        except InputError as fault:
            histories[symbol] = fault
        except Exception as error:
            histories[symbol] = _unexpected(error)
    return histories


def _unexpected(error: Exception) -> InputError:
    """What nobody has thought of is an error of its symbols too: the others may be a million, and hours of work."""
    return InputError(f"{type(error).__name__}: {error}", code="unexpected")


def _symbols_of(file: Path, layout: str, unit: Unit) -> Sequence[str]:
    """Who suffers if a file cannot be read: its one symbol, or all that are not known to lie elsewhere."""
    return [file.stem] if layout in ("single", "") and file.stem in unit.symbols else unit.symbols


def _read(
    file: str, layout: str, symbols: Sequence[str], names: Layout
) -> Iterator[tuple[str, pd.DataFrame | InputError]]:
    """(symbol, its rows in the order of the file) with the time column and the six of COLUMNS that there are.

    Columns are called as names and COLUMNS have them, however the file writes them. A fault of one symbol of a wide
    table comes instead of its rows.
    """
    columns = schema_names(file)
    if not layout:
        layout = layout_of(columns, names, file)  # raises what the scan found, if it still holds
    known = known_columns(columns, names, f"{file}: ")
    if layout == "single":
        yield Path(file).stem, _frame(read_columns(file, names, known, None), names)
    elif layout == "long":
        table = read_columns(file, names, known, symbols)
        yield from _by_symbol(_frame(table.drop_columns([names.symbol]), names), table.column(names.symbol))
    else:
        yield from _read_wide(file, columns, known[names.time], symbols, names)


def _read_wide(
    file: str, columns: Sequence[str], time: str, symbols: Sequence[str], names: Layout
) -> Iterator[tuple[str, pd.DataFrame | InputError]]:
    here = wide_columns(columns, names)
    wanted: dict[str, dict[str, str]] = {}  # symbol → {one of COLUMNS: the file's column}
    for symbol in symbols:
        if symbol in here:
            try:
                written = columns_by_name(here[symbol], COLUMNS, f"symbol {symbol!r}: ")
            except InputError as fault:
                yield symbol, fault
            else:
                wanted[symbol] = {name: here[symbol][field] for name, field in written.items()}
    chosen = {column: column for own in wanted.values() for column in own.values()}
    table = read_columns(file, names, {names.time: time, **chosen}, None)
    times = _frame(table.select([names.time]), names)
    for symbol, own in wanted.items():
        frame = table.select(list(own.values())).rename_columns(list(own)).to_pandas(ignore_metadata=True)
        yield symbol, times.join(frame)[frame.notna().any(axis=1)].reset_index(drop=True)


def _frame(table: pa.Table, names: Layout) -> pd.DataFrame:
    """The table with its times parsed at once, if all of them are of one kind; else each symbol parses its own."""
    # All columns are columns, also those that pandas wrote as the index of its frame.
    frame = table.to_pandas(ignore_metadata=True)
    times = frame[names.time].dtype
    if not pd.api.types.is_datetime64_any_dtype(times) and not pd.api.types.is_numeric_dtype(times):
        try:
            frame[names.time] = pd.to_datetime(frame[names.time], format="ISO8601")
        except (ValueError, TypeError):
            frame[names.time] = frame[names.time].astype(object)
    return frame


def _by_symbol(frame: pd.DataFrame, symbols: pa.ChunkedArray) -> Iterator[tuple[str, pd.DataFrame]]:
    texts = symbols.cast(pa.string()).fill_null("").to_pandas()
    for symbol, rows in frame.groupby(texts.to_numpy(), sort=False).indices.items():
        yield str(symbol), frame.iloc[np.sort(rows)].reset_index(drop=True)


def symbol_history(symbol: str, pieces: Sequence[pd.DataFrame], names: Layout, rules: HistoryRules) -> SymbolHistory:
    """The pieces of one symbol's history, a file each, as what the engine takes.

    Raises InputError with column, row (from 0, in time order over all files) and the remedy.
    """
    if not symbol:
        rows = sum(len(piece) for piece in pieces)
        raise InputError(
            f"{rows} row(s) name no symbol in column {names.symbol!r}: name the symbol of every bar",
            code="missing_symbol",
            column=names.symbol,
        )
    pieces = [piece for piece in pieces if len(piece)]
    if not pieces:
        raise InputError("there are no rows: give at least one bar of history", code="no_rows")
    frame, index = _joined(pieces, names.time)
    if len(frame) < rules.shortest:
        raise InputError(
            f"{len(frame)} bar(s) of history, and at least {rules.shortest} are needed: give more, or lower "
            "--min-history",
            code="too_short",
        )
    if rules.history is not None and len(frame) > rules.history:
        frame, index = frame.iloc[-rules.history :].reset_index(drop=True), index[-rules.history :]
    numbers = frame[[name for name in COLUMNS if name in frame.columns]].apply(_numbers)
    candles = candle_array(numbers)
    _check_candles(candles)
    future = future_index(index, rules)
    return SymbolHistory(Series(candles, time_marks(index), time_marks(future)), future)


def _joined(pieces: Sequence[pd.DataFrame], time: str) -> tuple[pd.DataFrame, pd.DatetimeIndex]:
    """Pieces of several files in the order of their first bars, and their times, which must rise over all of them."""
    indexes = [time_index(piece[time], time) for piece in pieces]
    if len(pieces) == 1:
        return pieces[0], indexes[0]
    zones = {str(index.tz) for index in indexes}
    if len(zones) > 1:
        raise InputError(
            f"{time} mixes time zones ({', '.join(sorted(zones))}) between files: convert all of them to one",
            code="mixed_time_zones",
            column=time,
        )
    order = sorted(range(len(pieces)), key=lambda number: indexes[number][0])
    frame = pd.concat([pieces[number] for number in order], ignore_index=True)
    return frame, time_index(indexes[order[0]].append([indexes[number] for number in order[1:]]), time)


def _numbers(column: pd.Series) -> pd.Series:
    """Text as numbers where it is one."""
    if pd.api.types.is_numeric_dtype(column.dtype):
        return column
    try:
        numbers = pd.to_numeric(column, errors="coerce")
    except TypeError:  # pandas coerces texts only: a column of lists, structures, bytes
        numbers = pd.Series(np.nan, index=column.index)
    bad = np.flatnonzero((numbers.isna() & column.notna()).to_numpy())
    if len(bad):
        raise InputError(
            f"column {column.name!r}, row {bad[0]} is {str(column.iloc[bad[0]])[:32]!r}, not a number",
            code="not_a_number",
            column=str(column.name),
            row=int(bad[0]),
        )
    return numbers


def _check_candles(candles: np.ndarray) -> None:
    """The service's rules: prices above 0, volume and amount not below 0, high not below low."""
    for place, name in enumerate(COLUMNS):
        bad = candles[:, place] <= 0 if name in PRICE_COLUMNS else candles[:, place] < 0
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            what, code = ("a price must be above 0", "not_positive") if place < 4 else ("it must not be", "negative")
            value = candles[row, place]
            raise InputError(f"column {name!r}, row {row} is {value:g}: {what}", code=code, column=name, row=row)
    bad = candles[:, 1] < candles[:, 2]
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise InputError(f"row {row}: high is below low", code="high_below_low", column="high", row=row)


def future_index(index: pd.DatetimeIndex, rules: HistoryRules) -> pd.DatetimeIndex:
    """The times to forecast, in the index's time zone. Raises InputError.

    Bars of whole days follow the wall clock; shorter ones follow UTC, so that a change of the clocks is no gap.
    """
    clock = index.tz_localize(None)
    try:
        if index.tz is None or _is_daily(clock, rules.freq):
            # Of a zone such as UTC, whose clocks never change; the others are read as the exchange's own.
            offset = None if index.tz is None else index.tz.utcoffset(None)
            local = future_times(_array(clock), offset, rules.horizon, rules.freq, rules.calendar)
            future = pd.DatetimeIndex(local)
            # A day whose hour the clocks skip begins an hour later.
            return (
                future
                if index.tz is None
                else future.tz_localize(index.tz, ambiguous=True, nonexistent="shift_forward")
            )
        utc = _array(index.tz_convert("UTC").tz_localize(None))
        local = future_times(utc, timedelta(0), rules.horizon, rules.freq, rules.calendar)
        return pd.DatetimeIndex(local, tz="UTC").tz_convert(index.tz)
    except CalendarError as error:
        raise InputError(f"future times: {error} (--freq, --calendar)", code=error.code, column=error.field) from None


def _array(clock: pd.DatetimeIndex) -> np.ndarray:
    return clock.to_numpy().astype("datetime64[us]")


def _is_daily(clock: pd.DatetimeIndex, freq: str | None) -> bool:
    if freq is not None:
        return bool(parse_freq(freq) >= DAY)
    steps = np.diff(_array(clock))
    return len(steps) > 0 and bool((steps % DAY == np.timedelta64(0)).all())
