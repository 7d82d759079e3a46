"""What is missing between bars, and which pauses are a market's own."""

import numpy as np
import pandas as pd
import pytest

from cluster.candles.gaps import Step, bar_size, find_gaps


def stock_days(start="2024-03-04", days=20, skip=(), bar="5min"):
    """Monday to Friday, 09:30 to 11:30 and 13:00 to 15:00."""
    dates = [day for day in pd.bdate_range(start, periods=days) if str(day.date()) not in skip]
    halves = (("09:30", "11:25"), ("13:00", "14:55"))
    return pd.DatetimeIndex(
        [
            t
            for day in dates
            for a, b in halves
            for t in pd.date_range(f"{day.date()} {a}", f"{day.date()} {b}", freq=bar)
        ]
    )


def without(times, begin, end):
    return times[(times < begin) | (times >= end)]


def kinds(times, **options):
    gaps = find_gaps(times.to_numpy(), **options)
    return {
        step.name: int((gaps.steps == step).sum()) for step in Step if step != Step.NEXT and (gaps.steps == step).any()
    }


def test_nights_lunches_and_weekends_are_pauses():
    times = stock_days()
    gaps = find_gaps(times.to_numpy())
    assert gaps.bar == 300e9
    assert gaps.missing.sum() == 0
    assert gaps.share == 1
    assert kinds(times) == {"PAUSE": 20 + 19}


def test_bars_missing_inside_a_session_are_a_gap():
    times = without(stock_days(), "2024-03-13 10:00", "2024-03-13 10:20")
    gaps = find_gaps(times.to_numpy())
    [row] = np.flatnonzero(gaps.steps == Step.GAP)
    assert gaps.missing[row] == 4
    assert times[row] == pd.Timestamp("2024-03-13 10:20")


def test_a_gap_over_lunch_counts_only_bars_that_would_have_been_there():
    times = without(stock_days(), "2024-03-13 11:20", "2024-03-13 13:10")
    gaps = find_gaps(times.to_numpy())
    assert gaps.missing[gaps.steps == Step.GAP].tolist() == [4]


def test_an_early_close_is_reported_apart():
    times = without(stock_days(), "2024-03-13 13:00", "2024-03-14 00:00")
    gaps = find_gaps(times.to_numpy())
    [row] = np.flatnonzero(gaps.steps == Step.SHORT_SESSION)
    assert gaps.missing[row] == 24
    assert Step.GAP not in gaps.steps


def test_a_holiday_is_not_a_gap_and_three_lost_weeks_are():
    holiday = find_gaps(stock_days(skip=("2024-03-13", "2024-03-14")).to_numpy())
    [row] = np.flatnonzero(holiday.steps == Step.CLOSED_DAYS)
    assert holiday.closed_days[row] == 2
    assert holiday.missing.sum() == 0
    lost = find_gaps(without(stock_days(days=40), "2024-03-18", "2024-04-06").to_numpy())
    assert lost.missing[lost.steps == Step.GAP].tolist() == [15 * 48]


def test_around_the_clock_every_hole_is_a_gap():
    times = pd.date_range("2024-01-01", periods=2000, freq="h")
    assert kinds(times) == {}
    day = find_gaps(without(times, "2024-01-20", "2024-01-21 06:00").to_numpy())
    assert day.missing[day.steps == Step.GAP].tolist() == [30]
    hour = find_gaps(times.delete(100).to_numpy())
    assert hour.missing[100] == 1


@pytest.mark.parametrize("hole", [(3, 6), (22, 25), (30, 31)])
def test_a_hole_in_a_short_series_is_a_gap(hole):
    """Two days are too few to learn a session from."""
    times = pd.date_range("2024-01-01", periods=40, freq="h").delete(range(*hole))
    gaps = find_gaps(times.to_numpy())
    assert gaps.missing[gaps.steps == Step.GAP].tolist() == [hole[1] - hole[0]]


def test_two_sessions_are_enough_to_know_the_night():
    assert kinds(stock_days(days=2)) == {"PAUSE": 3}


def test_currencies_rest_from_friday_night_to_sunday_night():
    times = pd.date_range("2024-01-01", "2024-02-25", freq="15min")
    week = times.day_of_week * 24 + times.hour
    times = times[(week < 4 * 24 + 22) | (week >= 6 * 24 + 22)]
    assert kinds(times) == {"PAUSE": 7}
    gaps = find_gaps(without(times, "2024-01-24 03:00", "2024-01-24 04:00").to_numpy())
    assert gaps.missing[gaps.steps == Step.GAP].tolist() == [4]


def test_a_change_of_clocks_moves_the_session_and_makes_no_gap():
    """New York's 09:30 to 16:00 in UTC, over the changes of March and November 2024."""
    days = pd.bdate_range("2024-01-02", "2024-12-31")
    local = [t for day in days for t in pd.date_range(f"{day.date()} 09:30", f"{day.date()} 15:45", freq="15min")]
    times = pd.DatetimeIndex(local).tz_localize("America/New_York").tz_convert("UTC").tz_localize(None)
    assert kinds(times) == {"PAUSE": len(days) - 1}


def test_daily_bars():
    days = pd.bdate_range("2024-01-01", periods=200)
    assert kinds(days) == {"PAUSE": 39}
    holiday = find_gaps(days.delete(52).to_numpy())
    assert holiday.closed_days.sum() == 1
    assert holiday.missing.sum() == 0
    lost = find_gaps(days.delete(range(50, 65)).to_numpy())
    assert lost.missing.sum() == 15
    always_open = pd.date_range("2024-01-01", periods=200, freq="D").delete([50, 51])
    assert find_gaps(always_open.to_numpy()).missing.sum() == 2


def test_weekly_and_odd_bars_miss_what_the_distance_says():
    weeks = pd.date_range("2024-01-01", periods=60, freq="W").delete([20, 21])
    assert find_gaps(weeks.to_numpy()).missing.sum() == 2
    months = pd.date_range("2015-01-01", periods=60, freq="MS")
    assert find_gaps(months.to_numpy()).missing.sum() == 0
    seven = pd.date_range("2024-01-01", periods=500, freq="7min").delete([100])
    assert find_gaps(seven.to_numpy()).missing.sum() == 1


def test_bars_that_are_stamped_at_their_end():
    times = stock_days() + pd.Timedelta("4min59s")
    assert kinds(times) == {"PAUSE": 39}


def test_series_without_a_step():
    assert bar_size(np.array([], "datetime64[ns]")) == 0
    assert find_gaps(np.array(["2024-01-01"], "datetime64[ns]")).missing.tolist() == [0]
