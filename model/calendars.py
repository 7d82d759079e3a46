"""Future timestamps from the history's: the bar size (given or inferred) and the trading calendar.

What cannot be told from the history is refused, with the remedy; nothing is guessed. Times without a UTC offset are the
exchange's local time if a calendar is named.
"""

from __future__ import annotations

import difflib
import re
from datetime import timedelta
from functools import lru_cache

import numpy as np
import pandas as pd

from model.errors import clip_text

ALWAYS_OPEN = "24/7"
DAY = np.timedelta64(1, "D").astype("timedelta64[us]")
HOUR = np.timedelta64(1, "h").astype("timedelta64[us]")
_UNITS = {"s": 1, "sec": 1, "min": 60, "t": 60, "h": 3600, "d": 86400, "day": 86400, "w": 604800, "week": 604800}
_FREQ = re.compile(r"(\d{0,4})\s*([a-z]+)")
_SESSIONS_A_YEAR = 200
"""At least, on any exchange."""
_WINDOWS = ((1995, 2040), (1900, 2204))
"""Years of a schedule, of which the first window that holds a history is computed: once, whatever years are asked for.

All of them take 10 MB and more for one exchange; pandas ends in 2262."""
_CHECKED_BARS = 1000
_FIT_SHARE = 0.9
"""Share of the history's bars that must lie on the calendar's grid: vendors have the odd auction bar beside it."""


class CalendarError(ValueError):
    """Future times cannot be told. field is the setting to change: "freq" or "calendar"."""

    def __init__(self, field: str, code: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.code = code


def parse_freq(freq: str) -> np.timedelta64:
    """ "5min", "1h", "D", "2w" → timedelta64[us]. Raises CalendarError."""
    match = _FREQ.fullmatch(freq.strip().lower())
    if match is None or match[2] not in _UNITS or match[1] in ("0", "00", "000", "0000"):
        text = "must be a number and one of s, min, h, d, w, such as 5min or 1d; a month is no fixed size"
        raise CalendarError("freq", "unknown_freq", text)
    return np.timedelta64(int(match[1] or 1) * _UNITS[match[2]], "s").astype("timedelta64[us]")


def future_times(
    local: np.ndarray, offset: timedelta | None, horizon: int, freq: str | None, calendar: str | None
) -> np.ndarray:
    """The horizon bar times after a history's, datetime64[us] on the history's wall clock.

    local: datetime64[us] [T], the history's times on its wall clock, rising. offset: of that clock from UTC; None if it
    is not told, which a calendar reads as the exchange's own time.
    freq: a bar size as parse_freq reads it; None infers it from the history.
    calendar: an exchange_calendars name, "24/7", or None: every step of freq is a bar.
    Raises CalendarError.
    """
    if calendar is None or calendar == ALWAYS_OPEN:
        step = parse_freq(freq) if freq else _infer_step(local, gaps_allowed=calendar is not None)
        future = local[-1] + step * np.arange(1, horizon + 1)
    else:
        step = parse_freq(freq) if freq else _infer_step(local, gaps_allowed=True)
        if step < DAY:
            future = _intraday(local, offset, horizon, step, calendar)
        elif step == DAY:
            future = _daily(local, offset, horizon, calendar)
        else:
            text = "bars of more than a day do not follow a calendar: leave calendar out"
            raise CalendarError("calendar", "freq_over_a_day", text)
    if future[-1] > np.datetime64("9999-12-31") or (np.diff(future) <= np.timedelta64(0)).any():
        raise CalendarError("freq", "times_out_of_range", "the future timestamps leave the range of dates")
    return future


def _infer_step(local: np.ndarray, *, gaps_allowed: bool) -> np.timedelta64:
    """The bar size. Without a calendar all steps must be equal; with one, gaps of whole bars are closed hours."""
    steps = np.diff(local)
    if len(steps) == 0:
        raise CalendarError("freq", "freq_ambiguous", "one bar shows no bar size: give freq")
    sizes, counts = np.unique(steps, return_counts=True)
    step = sizes[counts.argmax()]
    if sizes[0] <= np.timedelta64(0):  # times of nanoseconds, cut to microseconds
        text = "bars less than a microsecond apart have no future times here: give bars of a microsecond or more"
        raise CalendarError("freq", "freq_too_small", text)
    if len(sizes) == 1:
        return step
    if not gaps_allowed:
        text = "the history has gaps, so that the next bars cannot be told: give calendar (such as XNYS, XSHG or 24/7)"
        raise CalendarError("freq", "freq_ambiguous", text)
    days = np.rint(steps / DAY)
    if step == DAY and (days >= 1).all() and (np.abs(steps - days * DAY) <= HOUR).all():
        return step  # in UTC, the day of an exchange is an hour longer or shorter when its clocks change
    if step != sizes[0] or counts.max() * 2 <= len(steps):
        text = "the history's bars are unevenly spaced: give freq"
        raise CalendarError("freq", "freq_ambiguous", text)
    return step


def require_known(name: str) -> None:
    """Raises CalendarError unless there is a calendar of that name."""
    # Imported on first use: it costs 0.7 s, and most requests name no calendar.
    import exchange_calendars

    names = exchange_calendars.get_calendar_names(include_aliases=True)
    if name not in names:
        close = difflib.get_close_matches(name.upper(), names, n=3, cutoff=0.5) or ["XNYS", "XSHG", ALWAYS_OPEN]
        text = f"unknown calendar {clip_text(name, 16)!r}: an exchange_calendars name such as {', '.join(close)}"
        raise CalendarError("calendar", "unknown_calendar", text)


@lru_cache(maxsize=256)
def _sessions(name: str, first_year: int, last_year: int) -> tuple[np.ndarray, np.ndarray, str]:
    """(dates datetime64[D] [N], opens and closes datetime64[us] UTC [N, parts, 2], time zone).

    parts is 2 with a lunch break (a session without one has NaT in the second), else 1.
    """
    schedule, zone = _schedule(name, first_year, last_year)
    parts = [(schedule["open"], schedule["close"])]
    if schedule["break_start"].notna().any():
        # A session without a break is one part that lasts from open to close.
        end_of_first = schedule["break_start"].where(schedule["break_start"].notna(), schedule["close"])
        end_of_second = schedule["close"].where(schedule["break_end"].notna())
        parts = [(schedule["open"], end_of_first), (schedule["break_end"], end_of_second)]
    hours = np.stack([np.stack([_utc(opens), _utc(closes)], axis=-1) for opens, closes in parts], axis=1)
    return schedule.index.to_numpy().astype("datetime64[D]"), hours, zone


def _schedule(name: str, first_year: int, last_year: int) -> tuple[pd.DataFrame, str]:
    """The table of sessions, as far as the calendar covers these years, and its time zone."""
    import exchange_calendars

    require_known(name)
    first, last = pd.Timestamp(first_year, 1, 1), pd.Timestamp(last_year, 12, 31)
    schedule = None
    try:
        probe = exchange_calendars.get_calendar(name)
        lower, upper = probe.bound_min(), probe.bound_max()
        start, end = max(first, lower) if lower is not None else first, min(last, upper) if upper is not None else last
        if start < end:
            schedule = exchange_calendars.get_calendar(name, start=start, end=end).schedule
    except Exception as error:  # of any kind: the rules of some exchanges do not go with every release of pandas
        text = f"the calendar {name} does not work with the installed exchange_calendars: leave it out and give freq"
        raise CalendarError("calendar", "calendar_unavailable", text) from error
    if schedule is None:
        raise CalendarError("calendar", "calendar_out_of_range", "this calendar does not cover these years")
    return schedule, str(probe.tz)


def _utc(column: pd.Series) -> np.ndarray:
    return column.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy().astype("datetime64[us]")


def _calendar(local: np.ndarray, name: str, horizon: int) -> tuple[np.ndarray, np.ndarray, str]:
    """_sessions from before the history, as far as it is looked at, to after `horizon` of them."""
    first, last = (int(str(moment)[:4]) for moment in (local[max(0, len(local) - _CHECKED_BARS)], local[-1]))
    if not 1900 <= first <= last <= 2200:
        raise CalendarError("calendar", "calendar_out_of_range", "calendars cover 1900 to 2200")
    first, last = first - 1, last + 2 + horizon // _SESSIONS_A_YEAR
    window = next((years for years in _WINDOWS if years[0] <= first and last <= years[1]), _WINDOWS[-1])
    return _sessions(name, *window)


def _daily(local: np.ndarray, offset: timedelta | None, horizon: int, name: str) -> np.ndarray:
    dates, _, zone = _calendar(local, name, horizon)
    clock, there = local, False
    if offset is not None:
        exchange = _to_local(local[-_CHECKED_BARS:] - np.timedelta64(offset), None, zone)
        there = _named_on_the_exchange(local[-_CHECKED_BARS:], exchange, dates)
        clock = exchange if there else local
    day = clock[-1].astype("datetime64[D]")
    if day < dates[0]:
        text = f"this calendar begins with {dates[0]}, after the history: leave calendar out, or give future_timestamps"
        raise CalendarError("calendar", "calendar_out_of_range", text)
    following = dates[dates > day][:horizon]
    _require_enough(following, horizon)
    future = following.astype("datetime64[us]") + (clock[-1] - day.astype("datetime64[us]"))
    if there:
        # A time that the clocks skip that day is read as the first one after it, a repeated one as the earlier.
        index = pd.DatetimeIndex(future).tz_localize(
            zone, ambiguous=np.ones(horizon, bool), nonexistent="shift_forward"
        )
        utc = index.tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[us]")
        return _to_local(utc, offset, zone)
    return future


def _named_on_the_exchange(local: np.ndarray, exchange: np.ndarray, dates: np.ndarray) -> bool:
    """Whether days are dated by the exchange's clock rather than by the one they are written in.

    Midnight in Tokyo is 15:00 of the day before in UTC; midnight in UTC is 20:00 of the day before in New York. The
    sessions tell which of the two is meant; where both fit, a midnight is a date and any other time a moment.
    """
    written, meant = (np.isin(clock.astype("datetime64[D]"), dates).mean() for clock in (local, exchange))
    if written != meant:
        return bool(meant > written)
    return bool(local[-1] != local[-1].astype("datetime64[D]"))


def _intraday(local: np.ndarray, offset: timedelta | None, horizon: int, step: np.timedelta64, name: str) -> np.ndarray:
    """Bars are labelled by their open or by their close: whichever the history shows."""
    _, hours, zone = _calendar(local, name, horizon)
    parts = hours.reshape(-1, 2)
    parts = parts[~np.isnat(parts).any(axis=1)]
    utc = _to_utc(local[-_CHECKED_BARS:], offset, zone)
    fits = [_on_grid(utc, parts, step, right) for right in (False, True)]
    shares = [fit.mean() if fit[-1] else 0.0 for fit in fits]
    # The labels inside a session are the same; its first and last bar tell the two conventions apart.
    best = [right for right, share in zip((False, True), shares, strict=True) if share == max(shares) >= _FIT_SHARE]
    futures = [_labels_after(utc[-1], parts, step, right, horizon) for right in best]
    if not futures:
        text = "the history's bars do not fit this calendar's sessions and bar size: check both"
        raise CalendarError("calendar", "not_on_calendar", text)
    for future in futures:
        _require_enough(future, horizon)
    if len(futures) == 2 and not np.array_equal(futures[0], futures[1]):
        text = (
            "the history does not show whether a bar is named by its open or its close: "
            "send the first or last bar of a session as well"
        )
        raise CalendarError("calendar", "calendar_ambiguous", text)
    return _to_local(futures[0], offset, zone)


# The labels of bars are the opens of the bars or (right) their closes, the last of which may be cut short. They are
# counted, never listed: ten weeks of sessions have a million seconds. parts: datetime64[us] UTC [N, 2], in order.


def _on_grid(utc: np.ndarray, parts: np.ndarray, step: np.timedelta64, right: bool) -> np.ndarray:
    """bool [T]: which times are labels."""
    place = np.searchsorted(parts[:, 0], utc, side="left" if right else "right") - 1
    begin, end = parts[np.maximum(place, 0)].T
    whole = (utc - begin) % step == np.timedelta64(0)
    inside = (utc <= end) & (whole | (utc == end)) if right else (utc < end) & whole
    fits: np.ndarray = (place >= 0) & inside
    return fits


def _labels_after(
    moment: np.datetime64, parts: np.ndarray, step: np.timedelta64, right: bool, count: int
) -> np.ndarray:
    """The next `count` labels, or as many as there are; datetime64[us]."""
    found = [np.empty(0, "datetime64[us]")]
    for begin, end in parts[np.searchsorted(parts[:, 1], moment) :]:
        first = max(0, int((moment - begin) // step))
        opens = begin + step * np.arange(first, min(first + count + 2, -((begin - end) // step)))
        labels = np.minimum(opens + step, end) if right else opens
        found.append(labels[labels > moment][:count])
        count -= len(found[-1])
        if not count:
            break
    return np.concatenate(found)


def _to_utc(local: np.ndarray, offset: timedelta | None, zone: str) -> np.ndarray:
    if offset is not None:
        return local - np.timedelta64(offset)
    index = pd.DatetimeIndex(local).tz_localize(zone, ambiguous="NaT", nonexistent="NaT")
    if index.hasnans:
        text = f"a bar lies in the hour that the clocks of {zone} skip or repeat: send times with a UTC offset"
        raise CalendarError("calendar", "not_on_calendar", text)
    return index.tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[us]")


def _to_local(utc: np.ndarray, offset: timedelta | None, zone: str) -> np.ndarray:
    if offset is not None:
        return utc + np.timedelta64(offset)
    return pd.DatetimeIndex(utc, tz="UTC").tz_convert(zone).tz_localize(None).to_numpy().astype("datetime64[us]")


def _require_enough(future: np.ndarray, horizon: int) -> None:
    if len(future) < horizon:
        text = f"this calendar ends after {len(future)} more bars: ask for a shorter horizon"
        raise CalendarError("calendar", "calendar_out_of_range", text)
