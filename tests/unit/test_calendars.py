"""Future bar times: inferred, by calendar, or refused with the remedy."""

import tracemalloc

import exchange_calendars
import numpy as np
import pandas as pd
import pytest

from model.calendars import CalendarError, future_times, parse_freq
from serve_app.times import parse_times


def follow(texts, horizon, freq=None, calendar=None):
    times = parse_times(texts)
    return times.write(future_times(times.local, times.offset, horizon, freq, calendar))


def refused(texts, horizon=3, freq=None, calendar=None):
    with pytest.raises(CalendarError) as caught:
        follow(texts, horizon, freq, calendar)
    return caught.value.field, caught.value.code


def session(day, bars):
    return [f"{day} {clock}:00" for clock in bars]


def test_even_steps_go_on():
    assert follow(["2024-01-01T22:00:00Z", "2024-01-01T23:00:00Z"], 2) == [
        "2024-01-02T00:00:00Z", "2024-01-02T01:00:00Z",
    ]  # fmt: skip
    assert follow(["2024-01-05"], 2, "1d") == ["2024-01-06", "2024-01-07"]
    assert follow(["2024-01-05", "2024-01-12"], 1) == ["2024-01-19"]


def test_one_bar_or_gaps_need_help():
    assert refused(["2024-01-01T00:00:00"]) == ("freq", "freq_ambiguous")
    gap = ["2024-01-01T00:00:00", "2024-01-01T01:00:00", "2024-01-01T02:00:00", "2024-01-01T05:00:00"]
    assert refused(gap) == ("freq", "freq_ambiguous")
    assert follow(gap, 1, calendar="24/7") == ["2024-01-01T06:00:00"]
    assert follow(gap, 1, "1h") == ["2024-01-01T06:00:00"]
    uneven = ["2024-01-01T00:00:00", "2024-01-01T01:00:00", "2024-01-01T01:30:00"]
    assert refused(uneven, calendar="24/7") == ("freq", "freq_ambiguous")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5min", 300), ("1h", 3600), ("H", 3600), ("1d", 86400), ("D", 86400), ("2w", 1209600), ("30s", 30)],
)
def test_freq(text, seconds):
    assert parse_freq(text) == np.timedelta64(seconds, "s")


@pytest.mark.parametrize("text", ["", "month", "1M", "0min", "-5min", "5", "1e9d", "99999d", "5 min min"])
def test_bad_freq(text):
    with pytest.raises(CalendarError, match="5min or 1d"):
        parse_freq(text)


def test_lunch_break_and_night_of_an_exchange_whose_bars_are_named_by_their_close():
    bars = ["11:15", "11:20", "11:25", "11:30", "13:05", "13:10", "14:50", "14:55"]
    history = session("2024-06-18", bars[:6])
    assert follow(history, 2, calendar="XSHG") == session("2024-06-18", ["13:15", "13:20"])
    morning = session("2024-06-18", ["11:20", "11:25"])
    assert refused(morning, calendar="XSHG") == ("calendar", "calendar_ambiguous")
    afternoon = session("2024-06-18", ["11:30", "13:05", "13:10"]) + session("2024-06-18", ["14:50", "14:55"])
    assert follow(afternoon, 3, "5min", "XSHG") == [
        "2024-06-18 15:00:00", "2024-06-19 09:35:00", "2024-06-19 09:40:00",
    ]  # fmt: skip


def test_bars_named_by_their_open_with_an_offset():
    history = [f"2024-03-08T{hour}:{minute:02d}:00-05:00" for hour in ("14", "15") for minute in (0, 30)]
    history = ["2024-03-08T09:30:00-05:00", *history]
    following = follow(history, 3, "30min", "XNYS")
    # The weekend; New York's clocks change on Sunday, and the offset of the history stays.
    assert following == ["2024-03-11T08:30:00-05:00", "2024-03-11T09:00:00-05:00", "2024-03-11T09:30:00-05:00"]
    naive = [text[:-6] for text in history]
    assert follow(naive, 1, "30min", "XNYS") == ["2024-03-11T09:30:00"]


def test_inside_a_session_both_conventions_agree():
    history = session("2024-06-18", ["10:00", "10:05", "10:10"])
    assert follow(history, 2, calendar="XSHG") == session("2024-06-18", ["10:15", "10:20"])


def test_half_day_and_hours_that_do_not_divide():
    # 3 July 2024 closes at 13:00 in New York; the last hourly bar starts at 12:30.
    history = [f"2024-07-03 {clock}:00" for clock in ("09:30", "10:30", "11:30")]
    assert follow(history, 2, calendar="XNYS") == ["2024-07-03 12:30:00", "2024-07-05 09:30:00"]


def test_days_skip_weekends_and_holidays():
    history = ["2024-06-28", "2024-07-01", "2024-07-02", "2024-07-03"]
    assert follow(history, 2, calendar="XNYS") == ["2024-07-05", "2024-07-08"]
    assert refused(history) == ("freq", "freq_ambiguous")
    assert follow(["2024-07-02T00:00:00Z", "2024-07-03T00:00:00Z"], 1, calendar="XNYS") == ["2024-07-05T00:00:00Z"]


@pytest.mark.parametrize(
    ("name", "zone", "clock", "weekend", "expected"),
    [
        # Midnight in Tokyo, in UTC the day before: Monday's bar comes on a Sunday.
        ("XTKS", "Asia/Tokyo", "00:00", ("2024-06-12", "2024-06-21"), ["2024-06-23T15:00:00Z", "2024-06-24T15:00:00Z"]),
        # Closes in New York; its clocks change on the Sunday between.
        (
            "XNYS",
            "America/New_York",
            "16:00",
            ("2024-03-04", "2024-03-08"),
            ["2024-03-11T20:00:00Z", "2024-03-12T20:00:00Z"],
        ),
        # Dates written as midnight in UTC are no moments of an exchange.
        ("XNYS", "UTC", "00:00", ("2024-03-04", "2024-03-08"), ["2024-03-11T00:00:00Z", "2024-03-12T00:00:00Z"]),
        ("XTKS", "UTC", "00:00", ("2024-06-12", "2024-06-21"), ["2024-06-24T00:00:00Z", "2024-06-25T00:00:00Z"]),
    ],
)
def test_days_with_an_offset_are_the_exchanges(name, zone, clock, weekend, expected):
    days = exchange_calendars.get_calendar(name).sessions_in_range(*weekend)
    moments = [(day + pd.Timedelta(f"{clock}:00")).tz_localize(zone).tz_convert("UTC") for day in days]
    assert follow([f"{moment:%Y-%m-%dT%H:%M:%SZ}" for moment in moments], 2, calendar=name) == expected
    elsewhere = [moment.tz_convert("+09:00").isoformat() for moment in moments]
    followed = [pd.Timestamp(text) for text in follow(elsewhere, 2, calendar=name)]
    assert followed == [pd.Timestamp(text) for text in expected]


def test_days_in_utc_over_a_change_of_the_clocks_need_no_freq():
    days = exchange_calendars.get_calendar("XNYS").sessions_in_range("2024-03-01", "2024-03-15")
    moments = [day.tz_localize("America/New_York").tz_convert("UTC") for day in days]
    history = [f"{moment:%Y-%m-%dT%H:%M:%SZ}" for moment in moments]
    assert {text[11:16] for text in history} == {"04:00", "05:00"}
    assert follow(history, 2, calendar="XNYS") == ["2024-03-18T04:00:00Z", "2024-03-19T04:00:00Z"]
    assert refused(history) == ("freq", "freq_ambiguous")
    twice_a_day = ["2024-03-04T05:00:00Z", "2024-03-05T05:00:00Z", "2024-03-06T05:00:00Z", "2024-03-06T06:00:00Z"]
    assert refused(twice_a_day, calendar="XNYS") == ("freq", "freq_ambiguous")


def test_refusals_of_calendars():
    hours = [f"2024-06-18T{hour:02d}:00:00" for hour in range(6)]
    assert refused(hours, calendar="XNYS") == ("calendar", "not_on_calendar")
    assert refused(hours, calendar="NOPE") == ("calendar", "unknown_calendar")
    assert refused(["2024-01-05", "2024-01-12"], calendar="XNYS") == ("calendar", "freq_over_a_day")
    assert refused(["1492-01-05", "1492-01-06"], calendar="XNYS") == ("calendar", "calendar_out_of_range")
    assert refused(["9999-12-30", "9999-12-31"], 2) == ("freq", "times_out_of_range")
    # Shanghai opened in December 1990: its first sessions are not the next ones of 1989.
    assert refused(["1989-06-05", "1989-06-06"], calendar="XSHG") == ("calendar", "calendar_out_of_range")
    # XSHG publishes its holidays year by year: five hundred days ahead of its last year are not known.
    history = ["2024-01-02", "2024-01-03"]
    assert len(follow(history, 300, calendar="XSHG")) == 300
    assert len(follow(history, 1500, calendar="XNYS")) == 1500


def test_a_calendar_that_its_package_cannot_compute_is_a_refusal(monkeypatch):
    """As Athens and Tel Aviv are with some releases of pandas."""

    def broken(name, **options):
        raise NotImplementedError("implemented by subclasses")

    monkeypatch.setattr(exchange_calendars, "get_calendar", broken)
    assert refused(["1999-01-04", "1999-01-05"], calendar="XLIS") == ("calendar", "calendar_unavailable")


def test_labels_are_counted_and_not_listed():
    """A request of two bars, decades apart and a second long, would otherwise take all memory and minutes."""
    history = ["2016-01-04T15:00:00Z", "2024-06-17T15:00:00Z", "2024-06-17T15:00:01Z"]
    expected = ["2024-06-17T15:00:02Z", "2024-06-17T15:00:31Z"]
    assert follow(history, 2, "1s", "XNYS")[:1] == expected[:1]
    tracemalloc.start()
    following = follow(history, 30, "1s", "XNYS")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [following[0], following[-1]] == expected
    assert peak < 8 * 2**20


def test_a_calendar_is_computed_once_whatever_years_are_asked_for(monkeypatch):
    assert follow(["2024-07-02", "2024-07-03"], 1, calendar="XWBO") == ["2024-07-04"]

    def again(name, **options):
        raise AssertionError("computed again")

    monkeypatch.setattr(exchange_calendars, "get_calendar", again)
    for year in range(2000, 2024):
        assert len(follow([f"{year}-07-01", f"{year}-07-02"], 500, calendar="XWBO")) == 500


def test_real_candles(bars):
    """400 bars of the golden file's exchange and the next 120, as the exchange had them."""
    stamps = [f"{time:%Y-%m-%d %H:%M:%S}" for time in bars["timestamps"][:520]]
    assert follow(stamps[:400], 120, calendar="XSHG") == stamps[400:]
