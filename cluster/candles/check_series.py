"""What is wrong with the bars of one symbol, and what is worth knowing about them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from cluster.candles.bars import SymbolBars, invalid_candles
from cluster.candles.data_config import BarFilter, TimeSplit
from cluster.candles.filters import jumps, stagnant
from cluster.candles.gaps import Gaps, Step, find_gaps
from cluster.candles.lenient import FAULT, WARNING, Finding, RawSeries
from model.frames import time_marks
from model.types import COLUMNS

CLOSE, VOLUME = 3, 4
FEWEST_MOVES = 20
"""Moves over pauses that are enough to tell how large these usually are."""
GAPS_LISTED = 20
"""Gaps of a symbol that get a finding each; the rest share one."""


@dataclass(frozen=True)
class CheckOptions:
    """bar: expected distance of bars; None infers it.

    max_gap_bars: as data.max_gap_bars; gaps are warnings if it is given, because then training knows what to do with
    them, and faults if not.
    filter: as data.filter.
    jump_sigmas: a move is a jump if it is larger than so many robust standard deviations (1.4826 × the median absolute
    deviation) of the symbol's own moves. stagnant_bars: shortest run of one close that is reported.
    window, stride, split: how windows are counted; without a window they are not, without a split as one.
    """

    time_column: str = "timestamps"
    symbol_column: str = "symbol"
    bar: pd.Timedelta | None = None
    window: int | None = None
    stride: int = 1
    split: TimeSplit | None = None
    max_gap_bars: int | None = None
    filter: BarFilter | None = None
    jump_sigmas: float = 10.0
    stagnant_bars: int = 20


@dataclass
class SymbolReport:
    """Counts of one symbol. rows: in the file; bars: those with a time and six numbers, each time once.

    first, last: ISO times, UTC if there is a zone. bar_seconds: usual distance of bars; regular: share of the steps
    inside sessions that have it. missing_bars: inside sessions, in `gaps` places; pauses: nights, lunch breaks and
    weekends; short_sessions: began late or ended early, by short_session_bars; closed_days: weekdays without a bar.
    jumps, stagnant_bars, zero_volume, bad_candles: bars. memory_bytes: of its arrays, in every worker.
    """

    symbol: str
    file: str
    rows: int
    bars: int = 0
    first: str | None = None
    last: str | None = None
    zone: str | None = None
    bar_seconds: float | None = None
    regular: float = 1.0
    gaps: int = 0
    missing_bars: int = 0
    pauses: int = 0
    short_sessions: int = 0
    short_session_bars: int = 0
    closed_days: int = 0
    duplicates: int = 0
    unsorted: int = 0
    bad_candles: int = 0
    jumps: int = 0
    zero_volume: int = 0
    stagnant_bars: int = 0
    windows: dict[str, int] = field(default_factory=dict)
    memory_bytes: int = 0


class SeriesCheck:
    """Everything about one symbol of one file: report, findings, and the bars that are usable."""

    def __init__(self, raw: RawSeries, options: CheckOptions) -> None:
        self.raw, self.options = raw, options
        self.report = SymbolReport(raw.symbol, raw.file, len(raw.rows), zone=raw.zone)
        self.findings: list[Finding] = []
        self.usable: SymbolBars | None = None
        self._check_order()
        self._check_candles()
        # Duplicates: the first one counts. Order: as it would be once the rows are sorted.
        timed = np.flatnonzero(~np.isnat(raw.times))
        _, first = np.unique(raw.times[timed], return_index=True)
        self.order = timed[first]
        if len(self.order) == 0:
            return
        times = raw.times[self.order]
        self.report.first, self.report.last = (str(pd.Timestamp(t)) for t in (times[0], times[-1]))
        self._check_gaps(find_gaps(times, None if options.bar is None else options.bar.value))
        self._check_usable()

    def _add(
        self, level: str, code: str, message: str, remedy: str, places: np.ndarray, column: str | None = None
    ) -> int:
        """places: where in the raw series. Returns how many; nothing is added for none."""
        if len(places):
            rows = np.sort(self.raw.rows[places]).tolist()
            self.findings.append(Finding(level, code, message, remedy, self.raw.file, self.raw.symbol, column, rows))
        return len(places)

    def _check_order(self) -> None:
        times = self.raw.times
        places = np.flatnonzero(~np.isnat(times))
        stamps = times[places].view(np.int64)
        again = ~np.isin(np.arange(len(stamps)), np.unique(stamps, return_index=True)[1])
        self.report.duplicates = self._add(
            FAULT, "duplicate_times", "the time of an earlier bar", "keep one bar per time", places[again],
            self.options.time_column,
        )  # fmt: skip
        back = np.concatenate([[False], stamps[1:] < stamps[:-1]]) if len(stamps) else again
        self.report.unsorted = self._add(
            FAULT, "unsorted_times", "earlier than the bar before it", "sort the rows by time", places[back],
            self.options.time_column,
        )  # fmt: skip

    def _check_candles(self) -> None:
        values = self.raw.values
        bad = np.zeros(len(values), dtype=bool)
        for place, name in enumerate(COLUMNS):
            if name not in self.raw.columns:
                continue
            column = values[:, place]
            for flags, code, text, remedy in (
                (~_fits_float32(column), "not_finite", "missing or not a finite number", "fill it or drop the bar"),
                # In the precision that training keeps them in, where a tiny one is 0.
                (_as_float32(column) <= 0, "not_positive", "a price that is not positive", "correct it or drop the bar")
                if place <= CLOSE
                else (column < 0, "negative", f"a negative {name}", "correct it, or write 0"),
            ):
                self._add(FAULT, code, text, remedy, np.flatnonzero(flags), name)
                bad |= flags
        opened, high, low, close = (values[:, i] for i in range(4))
        for flags, code, text, column_name in (
            (high < low, "high_below_low", "high is below low", "high"),
            ((high < np.fmax(opened, close)) & (high >= low), "high_too_low", "high is below open or close", "high"),
            ((low > np.fmin(opened, close)) & (high >= low), "low_too_high", "low is above open or close", "low"),
        ):
            remedy = "correct the candle, or drop it"
            self._add(FAULT, code, text, remedy, np.flatnonzero(flags), column_name)
        self.report.bad_candles = int((bad | invalid_candles(values)).sum())

    def _check_gaps(self, gaps: Gaps) -> None:
        report, usual = self.report, gaps.bar
        times = self.raw.times[self.order]
        report.bar_seconds, report.regular = (usual / 1e9 if usual else None), gaps.share
        if self.options.bar is not None and len(times) > 1:
            inferred = find_gaps(times).bar
            if inferred != usual:
                text = f"most bars are {pd.Timedelta(inferred)} apart, not {self.options.bar}"
                remedy = "give the right --bar, or resample"
                self.findings.append(Finding(FAULT, "bar_size", text, remedy, self.raw.file, self.raw.symbol))
        report.missing_bars, report.short_session_bars = (
            int(gaps.missing[gaps.steps == step].sum()) for step in (Step.GAP, Step.SHORT_SESSION)
        )
        report.gaps, report.pauses, report.short_sessions = (
            int((gaps.steps == step).sum()) for step in (Step.GAP, Step.PAUSE, Step.SHORT_SESSION)
        )
        report.closed_days = int(gaps.closed_days.sum())
        report.pauses += int((gaps.steps == Step.CLOSED_DAYS).sum()) + report.short_sessions
        level = FAULT if self.options.max_gap_bars is None else WARNING
        self._list_gaps(gaps, times, Step.GAP, level, "gap", "inside a session", _GAP_REMEDY)
        remedy = "an early close or a late start, or lost bars?"
        self._list_gaps(gaps, times, Step.SHORT_SESSION, WARNING, "short_session", "at the edge of a session", remedy)
        days = np.flatnonzero(gaps.closed_days)
        text = f"{report.closed_days} weekdays without a bar before these rows"
        self._add(WARNING, "closed_days", text, "holidays, or lost days?", self.order[days], self.options.time_column)
        if gaps.share < 0.9:
            text = f"only {gaps.share:.0%} of the steps inside sessions are {pd.Timedelta(usual)}, the usual bar"
            self.findings.append(
                Finding(WARNING, "irregular_times", text, "resample the bars", self.raw.file, self.raw.symbol)
            )

    def _list_gaps(
        self, gaps: Gaps, times: np.ndarray, step: Step, level: str, code: str, where: str, remedy: str
    ) -> None:
        found = np.flatnonzero(gaps.steps == step)
        for i in found[:GAPS_LISTED]:
            count = _missing(int(gaps.missing[i]))
            text = f"{count} missing {where}, between {_shown(times[i - 1])} and {_shown(times[i])}"
            self._add(level, code, text, remedy, self.order[i : i + 1], self.options.time_column)
        rest = found[GAPS_LISTED:]
        text = (
            f"{_missing(int(gaps.missing[rest].sum()))} missing {where}, in {len(rest)} more places before these rows"
        )
        self._add(level, code, text, remedy, self.order[rest], self.options.time_column)

    def _check_usable(self) -> None:
        """Jumps, idle and stagnant stretches, on the bars that have all their numbers."""
        columns = [place for place, name in enumerate(COLUMNS) if name in self.raw.columns]
        usable = self.order[_fits_float32(self.raw.values[self.order][:, columns]).all(axis=1)]
        values, times = self.raw.values[usable], self.raw.times[usable]
        if "amount" not in self.raw.columns:
            values[:, 5] = values[:, VOLUME] * values[:, :4].mean(axis=1)
        self.report.bars = len(usable)
        if len(usable) == 0:
            return
        candles = values.astype(np.float32)
        self.usable = SymbolBars(self.raw.symbol, times, candles, time_marks(pd.DatetimeIndex(times)), self.raw.zone)
        self.report.memory_bytes = sum(a.nbytes for a in (times, candles, self.usable.marks))
        self._check_jumps(values, times, usable)
        still = np.flatnonzero(stagnant(values, self.options.stagnant_bars))
        text = f"the close stays the same for {self.options.stagnant_bars} bars or more"
        remedy = "was it suspended, or the feed stuck? data.filter.stagnant_bars leaves the windows out"
        self.report.stagnant_bars = self._add(WARNING, "stagnant", text, remedy, usable[still], "close")
        self._check_volume(values, usable)

    def _check_jumps(self, values: np.ndarray, times: np.ndarray, usable: np.ndarray) -> None:
        """A night moves a price further than a bar does: moves over pauses are measured by their own spread."""
        moves = jumps(values)
        seconds = np.diff(times) / np.timedelta64(1, "s")
        paused = np.concatenate([[False], seconds > 1.5 * (self.report.bar_seconds or np.inf)])
        sigma = np.full(len(moves), _robust_sigma(values[:, CLOSE], ~paused))
        if paused.sum() >= FEWEST_MOVES:
            sigma[paused] = max(sigma[0], _robust_sigma(values[:, CLOSE], paused))
        with np.errstate(divide="ignore", invalid="ignore"):
            sizes = np.where(np.isfinite(moves) & (sigma > 0), moves / sigma, 0.0)
        far = np.flatnonzero(sizes > self.options.jump_sigmas)
        if len(far):
            worst = far[np.argmax(sizes[far])]
            text = (
                f"moves of more than {self.options.jump_sigmas:g} robust sigma; the largest, row "
                f"{self.raw.rows[usable[worst]]}, is {np.expm1(moves[worst]):.1%}, {sizes[worst]:.0f} sigma"
            )
            remedy = "adjust splits and dividends, correct typing errors; data.filter.jump leaves the windows out"
            self.report.jumps = self._add(WARNING, "jump", text, remedy, usable[far])

    def _check_volume(self, values: np.ndarray, usable: np.ndarray) -> None:
        if "volume" not in self.raw.columns:
            text = "there is no volume; it counts as 0"
            self.findings.append(
                Finding(WARNING, "no_volume", text, "give it where it is known", self.raw.file, self.raw.symbol)
            )
            return
        idle = np.flatnonzero(values[:, VOLUME] == 0)
        text = f"no volume in {len(idle) / len(values):.1%} of the bars"
        remedy = "did nobody trade? data.filter.illiquid_bars leaves long stretches out"
        self.report.zero_volume = self._add(WARNING, "zero_volume", text, remedy, usable[idle], "volume")


_GAP_REMEDY = "get the bars, or set data.max_gap_bars so that no window straddles them (here: --max-gap-bars)"


def _as_float32(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        return values.astype(np.float32)


def _fits_float32(values: np.ndarray) -> np.ndarray:
    return np.isfinite(_as_float32(values))


def _missing(count: int) -> str:
    return "1 bar is" if count == 1 else f"{count:,} bars are"


def _shown(time: np.datetime64) -> str:
    return str(pd.Timestamp(time))


def _robust_sigma(close: np.ndarray, chosen: np.ndarray) -> float:
    """1.4826 × median |move − median| of the log moves to the chosen bars; of those that move, if most do not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        moves = np.diff(np.log(close))[chosen[1:]]
    moves = moves[np.isfinite(moves)]
    for sample in (moves, moves[moves != 0]):
        if len(sample) and (deviation := float(np.median(np.abs(sample - np.median(sample))))) > 0:
            return 1.4826 * deviation
    return 0.0
