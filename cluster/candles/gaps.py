"""Which bars are missing between those that are there, and which pauses are a market's own: nights, lunch, holidays.

Nothing is told about a symbol's sessions, so that they are read off its own times: a slot of the day (one bar wide) is
open on a date if bars are there on most of the dates around it, of the same weekday where there are enough of them. A
majority of the neighbouring dates follows a change of clocks on the day it happens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np

DAY = 86_400_000_000_000
"""Nanoseconds."""
NEIGHBOURS = 10
"""Dates before, and as many after, that are asked whether a slot is open."""
LONGEST_HOLIDAY = 7
"""Weekdays. Exchanges have closed for six in a row; a longer hole is missing data."""
MOST_SLOTS = 20_000_000
"""Dates × slots; a table of more is not made (20 million are 50 years of minutes)."""


class Step(IntEnum):
    """What lies between a bar and the one before it."""

    NEXT = 0  # nothing
    PAUSE = 1  # a lunch break, a night, a weekend
    CLOSED_DAYS = 2  # weekdays without any bar: a holiday, or days that are missing as a whole
    SHORT_SESSION = 3  # a pause, and the session before ended early or the one after began late
    GAP = 4  # bars are missing inside a session


@dataclass(frozen=True)
class Gaps:
    """bar: the usual distance of two bars in nanoseconds; 0 for fewer than 2 bars.

    share: of the steps that are not pauses, how many are one bar long, give or take an eighth.
    steps: int8 [T], Step of each bar; the first is NEXT. missing: int64 [T], bars missing before each bar.
    closed_days: int64 [T], weekdays without a bar before each bar that count as holidays.
    """

    bar: int
    share: float
    steps: np.ndarray
    missing: np.ndarray
    closed_days: np.ndarray


def bar_size(times: np.ndarray) -> int:
    """The most frequent distance of neighbouring times (datetime64[ns] [T], rising) in ns; the smallest of equals."""
    if len(times) < 2:
        return 0
    distances, counts = np.unique(np.diff(times.astype("datetime64[ns]").view(np.int64)), return_counts=True)
    return int(distances[np.argmax(counts)])


def find_gaps(times: np.ndarray, bar: int | None = None) -> Gaps:
    """times: datetime64[ns] [T], strictly rising. bar: nanoseconds; None infers it."""
    return _find_gaps(np.ascontiguousarray(times, dtype="datetime64[ns]").tobytes(), bar)


@lru_cache(maxsize=8)  # symbols of one market often have the very same times
def _find_gaps(times: bytes, bar: int | None) -> Gaps:
    t = np.frombuffer(times, dtype=np.int64)
    bar = bar_size(t.view("datetime64[ns]")) if bar is None else bar
    steps, missing, closed = (np.zeros(len(t), dtype) for dtype in (np.int8, np.int64, np.int64))
    if len(t) < 2 or bar <= 0:
        return Gaps(bar, 1.0, steps, missing, closed)
    distance = np.diff(t)
    long = np.flatnonzero(2 * distance > 3 * bar) + 1  # a step of up to a bar and a half misses none
    if len(long):
        between = _rule(t, bar)
        for i in long.tolist():
            steps[i], missing[i], closed[i] = between(i)
    inside = (steps[1:] == Step.NEXT) | (steps[1:] == Step.GAP)
    # Months differ in length, and bars that close late are still bars.
    share = float((8 * np.abs(distance[inside] - bar) <= bar).mean()) if inside.any() else 1.0
    for array in (steps, missing, closed):
        array.flags.writeable = False  # several callers get it
    return Gaps(bar, share, steps, missing, closed)


def _rule(t: np.ndarray, bar: int) -> Callable[[int], tuple[Step, int, int]]:
    """Row of a bar → (step before it, missing bars, closed days)."""
    if bar == DAY:
        return _Days(t).between
    if bar > DAY or DAY % bar or len(np.unique(t // DAY)) * (DAY // bar) > MOST_SLOTS:
        return _Plain(t, bar).between
    return _Sessions(t, bar).between


class _Plain:
    """Bars of a week, a month, a size that does not divide a day, or too many: every long step misses bars."""

    def __init__(self, t: np.ndarray, bar: int) -> None:
        self.t, self.bar = t, bar

    def between(self, i: int) -> tuple[Step, int, int]:
        return Step.GAP, max(1, round(int(self.t[i] - self.t[i - 1]) / self.bar) - 1), 0


class _Days:
    """Daily bars: weekends are pauses and short holes holidays, unless the symbol trades at weekends."""

    def __init__(self, t: np.ndarray) -> None:
        self.dates = t // DAY
        weekdays = np.bincount((self.dates + 3) % 7, minlength=7)  # 1970-01-01 was a Thursday
        self.weekend_closed = weekdays[5:].sum() * 20 < weekdays.sum()

    def between(self, i: int) -> tuple[Step, int, int]:
        absent = np.arange(self.dates[i - 1] + 1, self.dates[i])
        if not self.weekend_closed:
            return Step.GAP, len(absent), 0
        return _closed_weekdays(int(((absent + 3) % 7 < 5).sum()), 1)


def _closed_weekdays(count: int, bars_a_day: int) -> tuple[Step, int, int]:
    if count > LONGEST_HOLIDAY:
        return Step.GAP, count * bars_a_day, 0
    return (Step.CLOSED_DAYS, 0, count) if count else (Step.PAUSE, 0, 0)


class _Sessions:
    """Bars within a day."""

    def __init__(self, t: np.ndarray, bar: int) -> None:
        offsets, counts = np.unique(t % bar, return_counts=True)
        t = t - offsets[np.argmax(counts)]  # bars may be stamped at :59
        self.slots_a_day = DAY // bar
        days, self.slot = t // DAY, (t % DAY) // bar
        self.dates, self.row = np.unique(days, return_inverse=True)
        there = np.zeros((len(self.dates), self.slots_a_day), dtype=bool)
        there[self.row, self.slot] = True
        # Nothing is known of the slots before the first bar and after the last one, unless the day began or ended as
        # another one did.
        known = np.ones_like(there)
        first, last = there.argmax(axis=1), self.slots_a_day - 1 - there[:, ::-1].argmax(axis=1)
        if first[0] not in first[1:]:
            known[0, : first[0]] = False
        if last[-1] not in last[:-1]:
            known[-1, last[-1] + 1 :] = False
        self.open = _majority(there, known)
        weekdays = (self.dates + 3) % 7
        for weekday in range(7):
            same = weekdays == weekday
            if same.sum() >= 3:
                self.open[same] = _majority(there[same], known[same])
        self.weekdays_seen = set(weekdays.tolist())
        self.bars_a_day = int(np.median(self.open.sum(axis=1)))

    def between(self, i: int) -> tuple[Step, int, int]:
        before, after = self.row[i - 1], self.row[i]
        start, end = self.slot[i - 1] + 1, self.slot[i]
        if before == after:
            missing = int(self.open[before, start:end].sum())
            return (Step.GAP if missing else Step.PAUSE), missing, 0
        edges = np.concatenate([self.open[before, start:], self.open[after, :end]])
        missing, around_the_clock = int(edges.sum()), bool(edges.all())
        absent = np.arange(self.dates[before] + 1, self.dates[after])
        weekend = ((absent + 3) % 7 >= 5) & ~np.isin((absent + 3) % 7, list(self.weekdays_seen))
        workdays = int((~weekend).sum())
        if around_the_clock:
            missing += workdays * self.bars_a_day
            return (Step.GAP if missing else Step.PAUSE), missing, 0
        step, more, closed = _closed_weekdays(workdays, self.bars_a_day)
        if step == Step.GAP:
            return step, missing + more, 0
        return (Step.SHORT_SESSION if missing else step), missing, closed


def _majority(there: np.ndarray, known: np.ndarray) -> np.ndarray:
    """bool [dates, slots]: a bar on at least half of the known dates around; open where fewer than 2 are known."""
    filled, asked = (_sums_around(table) for table in (there & known, known))
    return (2 * filled >= asked) | (asked < 2)


def _sums_around(table: np.ndarray) -> np.ndarray:
    """int32 [dates, slots]: sums over up to NEIGHBOURS dates before and as many after.

    As many: else near the ends the dates before a change of clocks would outvote those after it, or the other way.
    """
    total = np.concatenate([np.zeros((1, table.shape[1]), np.int32), np.cumsum(table, axis=0, dtype=np.int32)])
    rows = np.arange(len(table))
    reach = np.minimum(rows, len(table) - 1 - rows).clip(1, NEIGHBOURS)
    return total[np.minimum(rows + reach + 1, len(table))] - total[np.maximum(rows - reach, 0)]
