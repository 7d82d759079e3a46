"""ISO 8601 timestamps: strict reading into numpy, and writing back in the style they came in. No pandas."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from serve_app.errors import MAX_FIELD_ERRORS, FieldError, value_errors

MAX_LENGTH = 40
_ZONE = re.compile(r"(Z|z|[+-]\d{2}(:?\d{2}(:?\d{2}(\.\d+)?)?)?)$")


@dataclass(frozen=True)
class Times:
    """Timestamps of one series.

    local: datetime64[us] [T], the wall clock as written.
    offset: from UTC, one for all; None if the times carry none.
    texts: as written.
    """

    local: np.ndarray
    offset: timedelta | None
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def write(self, local: np.ndarray) -> list[str]:
        """datetime64[us] [N] on the same wall clock → text in the style of the first timestamp."""
        example = self.texts[0]
        if len(example) == 10 and (local.astype("datetime64[D]") == local).all():
            return [str(moment) for moment in local.astype("datetime64[D]")]
        zone = _ZONE.search(example[10:]) if len(example) > 10 else None
        suffix = zone.group(0) if zone else ""
        separator = " " if example[10:11] == " " else "T"
        unit: Literal["us", "s", "m"]
        if (local.astype("datetime64[s]") != local).any():
            unit = "us"
        else:
            clock = example[11 : len(example) - len(suffix)]
            unit = "m" if len(clock) == 5 and (local.astype("datetime64[m]") == local).all() else "s"
        texts = np.datetime_as_string(local, unit=unit)
        return [text.replace("T", separator, 1) + suffix for text in texts.tolist()]


@dataclass(frozen=True)
class ClockTimes:
    """Timestamps that came as numbers: what parse_times reads beside text.

    local: datetime64[us] [T], the wall clock; NaT is refused. offsets: timedelta64[us] [T], or None without a zone.
    """

    local: np.ndarray
    offsets: np.ndarray | None


def parse_times(raw: Any) -> Times:
    """A list of ISO 8601 strings, or ClockTimes: strictly increasing, all with one UTC offset or all without.

    Raises pydantic's ValidationError with field errors: not_a_list, not_a_time, mixed_time_zones, unsorted_times,
    duplicate_times.
    """
    if isinstance(raw, ClockTimes):
        return _clock_times(raw)
    if not isinstance(raw, list):
        raise value_errors([FieldError((), "not_a_list", "must be a list of ISO 8601 timestamps")])
    try:
        # The common case at C speed; one bad entry sends the whole list to the slow path, which finds its place.
        moments = [datetime.fromisoformat(text) for text in raw]
    except (ValueError, TypeError):
        raise value_errors(_bad_texts(raw)) from None
    if raw and max(map(len, raw)) > MAX_LENGTH:
        raise value_errors(_bad_texts(raw))
    offset = moments[0].utcoffset() if moments else None
    if len({moment.utcoffset() for moment in moments}) > 1:
        raise _mixed_zones(next(i for i, moment in enumerate(moments) if moment.utcoffset() != offset))
    local = _wall_clock(moments)
    if faults := _order_faults(local):
        raise value_errors(faults)
    return Times(local, offset, tuple(raw))


def _wall_clock(moments: list[datetime]) -> np.ndarray:
    """datetime64[us] [T] of moments with one UTC offset; several times as fast as numpy reads datetime objects."""
    if not moments:
        return np.empty(0, "datetime64[us]")
    epoch = datetime(1970, 1, 1, tzinfo=moments[0].tzinfo)
    return np.array([(moment - epoch) // _MICROSECOND for moment in moments], dtype=np.int64).view("datetime64[us]")


_MICROSECOND = timedelta(microseconds=1)
_FIRST, _LAST = np.datetime64("0001-01-01", "us"), np.datetime64("9999-12-31T23:59:59.999999", "us")


def _clock_times(given: ClockTimes) -> Times:
    local, offsets = given.local, given.offsets
    # NaT fails both comparisons.
    bad = np.flatnonzero(~((local >= _FIRST) & (local <= _LAST)))[: MAX_FIELD_ERRORS + 1].tolist()
    if bad:
        raise value_errors(FieldError((row,), "not_a_time", "must be a time of the years 1 to 9999") for row in bad)
    if offsets is not None and (offsets != offsets[0]).any():
        raise _mixed_zones(int(np.flatnonzero(offsets != offsets[0])[0]))
    if faults := _order_faults(local):
        raise value_errors(faults)
    offset = None if offsets is None or not len(offsets) else offsets[0].item()
    suffix = "" if offset is None else _offset_text(offset)
    unit: Literal["us", "s"] = "us" if (local.astype("datetime64[s]") != local).any() else "s"
    return Times(local, offset, tuple(text + suffix for text in np.datetime_as_string(local, unit=unit).tolist()))


def _offset_text(offset: timedelta) -> str:
    """ "+08:00", as isoformat writes it."""
    return datetime(2000, 1, 1, tzinfo=timezone(offset)).isoformat()[19:]


def _mixed_zones(row: int) -> ValidationError:
    text = "all timestamps of a series must have the same UTC offset, or none: convert them to one (such as UTC)"
    return value_errors([FieldError((row,), "mixed_time_zones", text)])


def _bad_texts(raw: list[Any]) -> list[FieldError]:
    faults = []
    for row, text in enumerate(raw):
        if not isinstance(text, str) or len(text) > MAX_LENGTH or not _readable(text):
            faults.append(
                FieldError((row,), "not_a_time", "must be an ISO 8601 string such as 2024-06-18T11:15:00+08:00")
            )
            if len(faults) > MAX_FIELD_ERRORS:
                break
    return faults


def _readable(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _order_faults(local: np.ndarray) -> list[FieldError]:
    if (local[1:] > local[:-1]).all():
        return []
    steps = np.diff(local).astype(np.int64)
    faults = []
    for row in (np.flatnonzero(steps <= 0)[: MAX_FIELD_ERRORS + 1] + 1).tolist():
        if steps[row - 1] == 0:
            faults.append(FieldError((row,), "duplicate_times", "repeats the time before it: keep one bar per time"))
        else:
            faults.append(
                FieldError((row,), "unsorted_times", "is earlier than the time before it: sort the bars by time")
            )
    return faults


def follow_faults(history: Times, future: Times) -> list[FieldError]:
    """What is wrong with future as the times after history; empty if nothing is. loc counts in future."""
    if not len(history) or not len(future):
        return []
    if history.offset != future.offset:
        text = "must have the UTC offset of the history's timestamps, or none if they have none"
        return [FieldError((0,), "mixed_time_zones", text)]
    if future.local[0] == history.local[-1]:
        return [
            FieldError((0,), "duplicate_times", "repeats the last time of the history: start with the bar after it")
        ]
    if future.local[0] < history.local[-1]:
        return [FieldError((0,), "unsorted_times", "is earlier than the last bar of the history")]
    return []
