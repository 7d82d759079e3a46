"""Candles of one or many symbols, read from CSV or Parquet and checked before anything is trained on them."""

from __future__ import annotations

import glob
import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet

from model.errors import InputError
from model.frames import PRICE_COLUMNS, candle_array, same_name, time_index, time_marks, with_names
from model.types import COLUMNS

logger = logging.getLogger(__name__)

SUFFIXES = (".csv", ".parquet", ".pq")


@dataclass(frozen=True)
class SymbolBars:
    """The bars of one symbol, oldest first.

    times: datetime64[ns] [T], strictly increasing; UTC if the source had a time zone, else its wall clock.
    candles: float32 [T, 6] in the order of model.types.COLUMNS, raw prices.
    marks: int64 [T, 5] in the order of model.types.TIME_MARKS, of the source's wall clock.
    zone: the source's time zone; None if its times are a wall clock of no named zone.
    """

    symbol: str
    times: np.ndarray
    candles: np.ndarray
    marks: np.ndarray
    zone: str | None = None

    def __len__(self) -> int:
        return len(self.times)


def find_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The .csv and .parquet files that paths mean: files, folders of them, patterns such as bars/*.parquet.

    In the order given, each once; those of a folder or a pattern by name. A file that is named outright is returned
    whatever it is called. Raises InputError for what is not there and for a folder or a pattern without any such file.
    """
    found: dict[Path, None] = {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        found.update(dict.fromkeys(_files_of(Path(path))))
    if not found:
        raise InputError("no file was named: give a file, a folder or a pattern", code="no_such_file")
    return list(found)


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    pattern = glob.has_magic(str(path))
    if not path.is_dir() and not pattern:
        raise InputError(f"there is no file or folder {path}", code="no_such_file")
    candidates = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(file for file in candidates if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        what = f"{path} matches" if not path.is_dir() else f"{path} holds"
        raise InputError(f"{what} no .csv or .parquet file", code="no_rows")
    return files


def read_bars(
    paths: str | Path | Sequence[str | Path], *, time_column: str = "timestamps", symbol_column: str = "symbol"
) -> list[SymbolBars]:
    """Reads the files that find_files finds, in long format.

    Columns: the time, open, high, low, close, and where there are any volume, amount and the symbol, written in any
    case. Without a symbol column a file is one symbol, named after the file. A symbol's rows must be in time order;
    symbols may interleave. Either all symbols have times with a time zone or none has. Raises InputError naming file,
    symbol, column, row (from 0, in the file) and the remedy; at the first fault: `python -m cluster.data check` lists
    all of them.
    """
    found: dict[str, SymbolBars] = {}
    for file in find_files(paths):
        for bars in _read_file(file, time_column, symbol_column):
            if bars.symbol in found:
                raise InputError(
                    f"{file}: symbol {bars.symbol!r} is in another file too: keep a symbol in one file",
                    code="duplicate_symbol",
                    column=symbol_column,
                )
            found[bars.symbol] = bars
    series = list(found.values())
    refuse_mixed_zones({bars.symbol: bars.zone for bars in series}, time_column)
    return series


def refuse_mixed_zones(zones: Mapping[str, str | None], time_column: str) -> None:
    """zones: symbol → time zone, None for a wall clock. Raises InputError if some have one and others have none."""
    aware, naive = ([symbol for symbol, zone in zones.items() if (zone is None) == wanted] for wanted in (False, True))
    if aware and naive:
        raise InputError(
            f"the times of {aware[0]!r} have a time zone and those of {naive[0]!r} have none: give all of them one",
            code="mixed_time_zones",
            column=time_column,
        )


def _read_file(file: Path, time_column: str, symbol_column: str) -> list[SymbolBars]:
    frame = read_frame(file, symbol_column)
    return bars_from_frame(frame, str(file), time_column=time_column, symbol_column=symbol_column)


def read_frame(file: Path, symbol_column: str = "symbol") -> pd.DataFrame:
    """A file's table as it is. Raises InputError if it is not a table that is read here."""
    if file.suffix.lower() not in SUFFIXES:
        raise InputError(f"{file}: {file.suffix!r} is not read here: give {', '.join(SUFFIXES)}", code="unknown_format")
    try:
        if file.suffix.lower() == ".csv":
            return _read_csv(file, symbol_column)
        table = _with_text_symbols(pyarrow.parquet.read_table(file), symbol_column, file)
        # All columns are columns, also those that pandas wrote as the index of its frame.
        return table.to_pandas(ignore_metadata=True)
    except InputError:
        raise
    except (ValueError, OSError) as error:
        raise InputError(f"{file} cannot be read: {error}", code="unreadable_file") from error


def _with_text_symbols(table: pa.Table, symbol_column: str, file: Path) -> pa.Table:
    """Some writers keep texts as bytes (BINARY without UTF8), which pandas would call b'A'."""
    for place, column in enumerate(table.column_names):
        if same_name(column, symbol_column) and _holds_bytes(table.field(place).type):
            table = table.set_column(place, column, symbols_as_text(table.column(place), column, file))
    return table


def _holds_bytes(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    of_bytes = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(is_one(kind) for is_one in of_bytes)


def symbols_as_text(values: Any, column: str, file: Path | str) -> Any:
    """Symbols, a pyarrow array of any flat type, as pyarrow strings; nulls stay. Raises InputError for no UTF-8."""
    try:
        return values.cast(pa.string())
    except pa.ArrowInvalid:
        raise InputError(
            f"{file}: column {column!r} holds bytes that are not UTF-8: write each symbol as text",
            code="not_a_symbol",
            column=column,
        ) from None


def _read_csv(file: Path, symbol_column: str) -> pd.DataFrame:
    head = pd.read_csv(file, header=None, nrows=1, dtype=str, keep_default_na=False).iloc[0].tolist()
    symbols = [column for column in dict.fromkeys(head) if same_name(column, symbol_column)]
    frame = pd.read_csv(file, dtype=dict.fromkeys(symbols, str))  # 000001 is a name, not a number
    for column in symbols:
        if column in frame and frame[column].isna().any():
            # NA, NULL and None are names too: only an empty cell names nothing.
            texts = pd.read_csv(file, usecols=[column], dtype=str, keep_default_na=False, na_values=[""])
            frame[column] = texts[column]
    # pandas renames the second of two columns of one name: here both keep it, so that they are refused.
    if len(head) == frame.shape[1]:
        frame.columns = pd.Index([name or known for name, known in zip(head, frame.columns, strict=True)])
    return frame


def bars_from_frame(
    frame: pd.DataFrame,
    name: str = "frame",
    *,
    time_column: str = "timestamps",
    symbol_column: str = "symbol",
    positive: bool = True,
) -> list[SymbolBars]:
    """A long-format frame as one SymbolBars per symbol, in order of first appearance. Errors as read_bars.

    positive: whether a price of 0 or less is refused; false for a caller that uses some of the prices and checks those.
    """
    frame = with_names(frame, (time_column, symbol_column, *COLUMNS), f"{name}: ")
    if time_column not in frame.columns:
        raise InputError(
            f"{name}: column {time_column!r} is missing: give each bar its time, or name its column (--time-column; in "
            "a training configuration data.source.time_column)",
            code="missing_column",
            column=time_column,
        )
    if len(frame) == 0:
        raise InputError(f"{name}: there are no rows", code="no_rows")
    if symbol_column not in frame.columns:
        return [_symbol_bars(frame, np.arange(len(frame)), Path(name).stem, name, time_column, positive)]
    if frame[symbol_column].isna().any():
        row = int(np.flatnonzero(frame[symbol_column].isna())[0])
        raise InputError(
            f"{name}: column {symbol_column!r}, row {row} is missing: name the symbol of every bar",
            code="missing_symbol",
            column=symbol_column,
            row=row,
        )
    try:
        codes, symbols = symbol_codes(frame[symbol_column])
    except InputError as error:
        raise InputError(f"{name}: {error}", code=error.code, column=error.column, row=error.row) from error
    order = np.argsort(codes, kind="stable")
    rows_by_symbol = np.split(order, np.cumsum(np.bincount(codes))[:-1])
    return [
        _symbol_bars(frame.iloc[rows], rows, str(symbol), f"{name}, symbol {symbol!s}", time_column, positive)
        for symbol, rows in zip(symbols, rows_by_symbol, strict=True)
    ]


def symbol_codes(column: pd.Series) -> tuple[np.ndarray, pd.Index]:
    """(int64 [T], the place of each row's symbol among the symbols, −1 where there is none; the symbols).

    Raises InputError for lists and structures, which a Parquet file can hold.
    """
    try:
        codes, symbols = pd.factorize(column)
    except TypeError:
        row = next(place for place, value in enumerate(column) if not isinstance(value, Hashable))
        raise InputError(
            f"column {column.name!r}, row {row} holds lists or structures, not symbols: write each symbol as text",
            code="not_a_symbol",
            column=str(column.name),
            row=row,
        ) from None
    return codes, pd.Index(symbols)


def _symbol_bars(
    frame: pd.DataFrame, rows: np.ndarray, symbol: str, where: str, time_column: str, positive: bool
) -> SymbolBars:
    """rows: where in the file the frame's rows came from."""
    try:
        candles = candle_array(frame)
        # An Index of wall-clock texts has no dtype of its own: pandas parses it once, here.
        index = time_index(frame[time_column], time_column)
        marks = time_marks(index, time_column)
        if positive:
            _require_positive(candles, index)
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
    times = (index.tz_convert("UTC").tz_localize(None) if index.tz is not None else index).to_numpy()
    if (far := out_of_range(times)).any():
        place = int(np.flatnonzero(far)[0])
        raise InputError(
            f"{where}: {time_column}[{place}] ({index[place]}) is not between the years 1678 and 2261: correct it",
            code="not_a_time",
            column=time_column,
            row=int(rows[place]),
        )
    zone = None if index.tz is None else str(index.tz)
    return SymbolBars(symbol, times.astype("datetime64[ns]"), candles, marks, zone)


def _require_positive(candles: np.ndarray, times: pd.DatetimeIndex) -> None:
    """Raises InputError for the first price that is not above 0: its logarithm and its returns mean nothing."""
    bad = candles[:, : len(PRICE_COLUMNS)] <= 0
    if not bad.any():
        return
    row, position = (int(i) for i in np.argwhere(bad)[0])
    column = PRICE_COLUMNS[position]
    raise InputError(
        f"column {column!r}, row {row} ({times[row]}) is {candles[row, position]:g}: a price must be above 0, correct "
        "it or drop the bar",
        code="not_positive",
        column=column,
        row=row,
    )


def out_of_range(times: np.ndarray) -> np.ndarray:
    """bool [...]: the times (datetime64 of any unit) that would become others in nanoseconds; not NaT."""
    years = times.astype("datetime64[Y]").astype(np.int64) + 1970
    return ~np.isnat(times) & ((years < 1678) | (years > 2261))


def invalid_candles(candles: np.ndarray) -> np.ndarray:
    """bool [...]: True where candles [..., 6] have high < max(open, close, low) or low > min(open, close, high)."""
    opened, high, low, close = (candles[..., i] for i in range(4))
    return (high < np.maximum(np.maximum(opened, close), low)) | (low > np.minimum(opened, close))


def crooked_bars_warning(series: Sequence[SymbolBars]) -> str | None:
    """What a run's record says of invalid_candles in all its series; None where there is none.

    One sentence for all of them, of the bars themselves: a cache is read without the warnings of its files.
    """
    found = [(bars, crooked) for bars in series if (crooked := invalid_candles(bars.candles)).any()]
    if not found:
        return None
    bars, crooked = found[0]
    count, time = sum(int(flags.sum()) for _, flags in found), bars.times[np.flatnonzero(crooked)[0]]
    return (
        f"{count} of {sum(map(len, series))} bars have a high below or a low above another price, in {len(found)} of "
        f"{len(series)} symbols; the first is of {bars.symbol!r} at {time.astype('datetime64[s]')}; "
        "python -m cluster.data check lists them"
    )


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
