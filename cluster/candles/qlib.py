"""Reads Qlib's binary layout with numpy; the package qlib is not needed.

The layout (Qlib's documentation, "Data Layer", and what its dump_bin writes):
- calendars/<freq>.txt: a time a line, rising; the positions of all other files count in it;
- instruments/<market>.txt: symbol, first and last day, separated by tabs; a symbol may have several lines;
- features/<symbol in lower case>/<field>.<freq>.bin: little-endian float32; the first number is the position of the
  field's first value in the calendar, the rest are the values, NaN where there was no trading.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from cluster.candles.bars import SymbolBars, bars_from_frame
from model.errors import InputError
from model.types import COLUMNS

logger = logging.getLogger(__name__)

NEEDED = COLUMNS[:4]


def read_qlib(folder: str | Path, *, freq: str = "day", market: str = "all") -> list[SymbolBars]:
    """The symbols of instruments/<market>.txt, within the days that it lists, as the prices stand there (adjusted).

    Bars without a price (suspended) are left out and counted in the log; missing volume and amount are 0 and derived.
    Raises InputError naming the file and the remedy.
    """
    folder = Path(folder)
    calendar = pd.DatetimeIndex(_lines(folder / "calendars" / f"{freq}.txt", "data.source.freq"))
    if not calendar.is_monotonic_increasing or calendar.has_duplicates:
        raise InputError(f"{folder / 'calendars' / f'{freq}.txt'} is not in rising order", code="unsorted_times")
    series: list[SymbolBars] = []
    suspended = 0
    for symbol, spans in _instruments(folder / "instruments" / f"{market}.txt").items():
        frame = _features(folder / "features" / symbol.lower(), freq, calendar)
        listed = np.zeros(len(frame), dtype=bool)
        for first, last in spans:
            # The last day is listed as a whole.
            listed |= (frame.index >= first) & (frame.index < last.normalize() + pd.Timedelta(days=1))
        frame = frame[listed]
        traded = frame[list(NEEDED)].notna().all(axis=1)
        suspended += int((~traded).sum())
        frame = frame[traded].fillna({"volume": 0.0})
        if "amount" in frame and frame["amount"].isna().any():
            frame = frame.drop(columns="amount")
        if len(frame):
            series += bars_from_frame(frame.rename_axis("timestamps").reset_index(), str(folder / symbol))
        else:
            logger.warning("%s: %s has no bar in its listed days", folder, symbol)
    if suspended:
        logger.info("%s: %d bars without a price were left out", folder, suspended)
    if not series:
        raise InputError(f"{folder}: no symbol of market {market!r} has a bar", code="no_rows")
    return series


def _lines(path: Path, key: str) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError:
        known = ", ".join(sorted(file.stem for file in path.parent.glob("*.txt"))) or "nothing"
        raise InputError(f"there is no {path}: set {key}; there is {known}", code="no_such_file") from None


def _instruments(path: Path) -> dict[str, list[tuple[pd.Timestamp, pd.Timestamp]]]:
    found: dict[str, list[tuple[pd.Timestamp, pd.Timestamp]]] = {}
    for number, line in enumerate(_lines(path, "data.source.market")):
        parts = line.split("\t")
        try:
            symbol, first, last = parts[0], pd.Timestamp(parts[1]), pd.Timestamp(parts[2])
        except (IndexError, ValueError):
            raise InputError(
                f"{path}, line {number + 1}: not symbol, first day and last day with tabs between",
                code="unreadable_file",
                row=number,
            ) from None
        found.setdefault(symbol, []).append((first, last))
    return found


def _features(folder: Path, freq: str, calendar: pd.DatetimeIndex) -> pd.DataFrame:
    """The six columns (those that are there) of one symbol, indexed by time, NaN where a field has no value."""
    columns: dict[str, pd.Series] = {}
    for name in COLUMNS:
        path = folder / f"{name}.{freq}.bin"
        if not path.is_file():
            if name in NEEDED:
                raise InputError(f"there is no {path}: dump the field {name} too", code="missing_column", column=name)
            continue
        # Mapped, not read: a long calendar of minutes is touched only where the symbol has bars.
        values = np.memmap(path, dtype="<f4", mode="r") if path.stat().st_size else np.empty(0, "<f4")
        start = float(values[0]) if len(values) else -1.0
        if not (start.is_integer() and start >= 0 and start + len(values) - 1 <= len(calendar)):
            raise InputError(
                f"{path}: {max(0, len(values) - 1)} values from position {start:g} do not fit the calendar's "
                f"{len(calendar)} times: dump the folder anew",
                code="unreadable_file",
                column=name,
            )
        begin = int(start)
        columns[name] = pd.Series(np.asarray(values[1:]), index=calendar[begin : begin + len(values) - 1])
    return pd.DataFrame(columns)
