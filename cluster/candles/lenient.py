"""Reads tables of bars without stopping at a fault: what is wrong becomes a finding, what is left goes on.

cluster.candles.bars is the strict reader that training uses; this one is for telling a user everything in one go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cluster.candles.bars import out_of_range, symbol_codes
from model.errors import InputError
from model.frames import columns_by_name, same_name
from model.types import COLUMNS

PRICES = COLUMNS[:4]
HAS_ZONE = r"[T ]\d{2}.*(?:Z|[+-]\d{2}(?::?\d{2})?)$"
FAULT, WARNING = "fault", "warning"


@dataclass(frozen=True)
class Finding:
    """Something that was found in the data.

    level: FAULT (training must not start) or WARNING. code: a stable short name, where there is one that of the strict
    reader. rows: all rows it is about, counted from 0 in the file; empty if it is about the whole.
    """

    level: str
    code: str
    message: str
    remedy: str
    file: str | None = None
    symbol: str | None = None
    column: str | None = None
    rows: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "count": len(self.rows)}


@dataclass
class RawSeries:
    """One symbol's rows of one file in the order of the file.

    rows: int64 [T], where in the file. times: datetime64[ns] [T], UTC if there is a zone, NaT where unreadable.
    values: float64 [T, 6], NaN where there is no number; volume is 0 and amount NaN where the file has no such column.
    zone: None for wall clock times.
    """

    symbol: str
    file: str
    rows: np.ndarray
    times: np.ndarray
    values: np.ndarray
    zone: str | None
    columns: Sequence[str]


def _nanoseconds(times: np.ndarray) -> np.ndarray:
    """datetime64[ns] [T]; NaT where there are no such nanoseconds."""
    return np.where(out_of_range(times), np.datetime64("NaT"), times).astype("datetime64[ns]")


class Lenient:
    """The tables of one file after the other; everything that is wrong with them as tables gathers in `findings`."""

    def __init__(self, time_column: str, symbol_column: str) -> None:
        self.time_column, self.symbol_column = time_column, symbol_column
        self.findings: list[Finding] = []

    def series(self, frame: pd.DataFrame, file: Path) -> Iterator[RawSeries]:
        """The symbols of one table that have times and prices."""
        name = str(file)
        frame, twice = self._named(frame, name)
        missing = [column for column in (self.time_column, *PRICES) if column not in frame.columns]
        for column in missing:
            what = f"there is no column {column!r}; there are {', '.join(map(repr, map(str, frame.columns)))}"
            remedy = "name it as is asked for" + (", or give --time-column" if column == self.time_column else "")
            self._fault("missing_column", what, remedy, name, column=column)
        if len(frame) == 0:
            self._fault("no_rows", "the table has no rows", "leave the file out", name)
        if missing or twice or len(frame) == 0:
            return
        times, zone = self._times(frame[self.time_column], name)
        values = self._values(frame, name)
        for symbol, rows in self._symbols(frame, file):
            yield RawSeries(symbol, name, rows, times[rows], values[rows], zone, list(frame.columns))

    def _named(self, frame: pd.DataFrame, file: str) -> tuple[pd.DataFrame, bool]:
        """The frame with the columns that are read called as they are here, and whether any column is there twice."""
        wanted = (self.time_column, self.symbol_column, *COLUMNS)
        named: dict[Any, str] = {}
        others = {str(column) for column in frame.columns[frame.columns.duplicated()]}
        before = len(self.findings)
        for name in wanted:
            try:
                named |= dict.fromkeys(columns_by_name(frame.columns, (name,)).values(), name)
            except InputError as error:
                others = {column for column in others if not same_name(column, name)}
                self._fault(error.code, str(error).removesuffix(": keep one"), "keep one", file, column=name)
        for column in sorted(others):
            self._fault("duplicate_column", f"column {column!r} is there twice", "keep one", file, column=column)
        return frame.rename(columns=named), len(self.findings) > before

    def _symbols(self, frame: pd.DataFrame, file: Path) -> Iterator[tuple[str, np.ndarray]]:
        if self.symbol_column not in frame.columns:
            yield file.stem, np.arange(len(frame))
            return
        try:
            codes, symbols = symbol_codes(frame[self.symbol_column])
        except InputError as error:
            self._fault(error.code, str(error), "name one symbol a row", str(file), column=self.symbol_column)
            return
        nameless = np.flatnonzero(codes < 0)
        if len(nameless):
            text = f"{len(nameless)} rows have no {self.symbol_column}"
            self._fault("missing_symbol", text, "name the symbol of every bar", str(file), rows=nameless.tolist())
        if len(nameless) == len(codes):
            return
        order = np.argsort(codes, kind="stable")[len(nameless) :]
        counts = np.bincount(codes[codes >= 0], minlength=len(symbols))
        for symbol, rows in zip(symbols, np.split(order, np.cumsum(counts)[:-1]), strict=True):
            yield str(symbol), rows

    def _times(self, column: pd.Series, file: str) -> tuple[np.ndarray, str | None]:
        """datetime64[ns] [T], NaT where there is no time, and the zone."""
        if pd.api.types.is_numeric_dtype(column.dtype):
            text = f"column {self.time_column!r} holds numbers"
            remedy = "convert them with pandas.to_datetime and the right unit"
            self._fault("not_a_time", text, remedy, file, column=self.time_column)
            return np.full(len(column), np.datetime64("NaT", "ns")), None
        if pd.api.types.is_datetime64_any_dtype(column.dtype):
            index = pd.DatetimeIndex(column)
            zone = None if index.tz is None else str(index.tz)
            parsed = index.tz_convert("UTC").tz_localize(None) if index.tz is not None else index
        else:
            parsed, zone = self._parse(column.astype("string"), file)
        times = _nanoseconds(parsed.to_numpy())
        bad = np.flatnonzero(np.isnat(times))
        if len(bad):
            text = (
                f"{len(bad)} times are missing, not ISO 8601, or not between the years 1678 and 2261, the first is "
                f"{str(column.iloc[bad[0]])!r}"
            )
            remedy = "give every bar its time, such as 2024-01-31 15:30:00"
            self._fault("not_a_time", text, remedy, file, column=self.time_column, rows=bad.tolist())
        return times, zone

    def _parse(self, text: pd.Series, file: str) -> tuple[pd.DatetimeIndex, str | None]:
        text = text.reset_index(drop=True)
        aware = text.str.contains(HAS_ZONE, regex=True).fillna(False).to_numpy(bool)
        offsets = text[aware].str.extract(r"(Z|[+-]\d{2}(?::?\d{2})?)$")[0].replace({"Z": "+00:00"})
        known = text.notna().to_numpy()
        labels = pd.Series("none", index=text.index)
        labels[aware] = offsets
        counts = labels[known].value_counts().to_dict()
        usual = max(counts, key=lambda kind: counts[kind], default="none")
        if len(counts) > 1:
            other = np.flatnonzero((labels != usual).to_numpy() & known)
            self._fault(
                "mixed_time_zones",
                "the times have different time zones: " + ", ".join(f"{kind} ({counts[kind]} rows)" for kind in counts),
                "convert all of them to one, best UTC",
                file,
                column=self.time_column,
                rows=other.tolist(),
            )
        parsed = pd.Series(pd.NaT, index=text.index, dtype="datetime64[ns]")
        parsed[~aware] = _nanoseconds(pd.to_datetime(text[~aware], format="ISO8601", errors="coerce").to_numpy())
        if aware.any():
            in_utc = pd.to_datetime(text[aware], format="ISO8601", utc=True, errors="coerce")
            parsed[aware] = _nanoseconds(in_utc.dt.tz_localize(None).to_numpy())
        return pd.DatetimeIndex(parsed), (None if usual == "none" else usual)

    def _values(self, frame: pd.DataFrame, file: str) -> np.ndarray:
        """float64 [T, 6], NaN where there is no number."""
        values = np.full((len(frame), len(COLUMNS)), np.nan)
        values[:, COLUMNS.index("volume")] = 0.0
        for place, name in enumerate(COLUMNS):
            if name not in frame.columns:
                continue
            column = frame[name]
            numbers = pd.to_numeric(column, errors="coerce")
            text = np.flatnonzero((numbers.isna() & column.notna()).to_numpy())
            if len(text):
                what = f"column {name!r} holds {len(text)} values that are no numbers, such as {column.iloc[text[0]]!r}"
                remedy = "write plain numbers; leave nothing else in the column"
                self._fault("not_a_number", what, remedy, file, column=name, rows=text.tolist())
            elif not pd.api.types.is_numeric_dtype(column.dtype) or pd.api.types.is_bool_dtype(column.dtype):
                what = f"column {name!r} is of type {column.dtype}"
                self._fault("not_a_number", what, "convert it with pandas.to_numeric", file, column=name)
            values[:, place] = numbers.to_numpy(np.float64, na_value=np.nan)
        return values

    def _fault(
        self, code: str, message: str, remedy: str, file: str, *, column: str | None = None, rows: Sequence[int] = ()
    ) -> None:
        self.findings.append(Finding(FAULT, code, message, remedy, file, None, column, list(rows)))
