"""The rules for candles and timestamps: bad input and the error it must raise, and what good input becomes."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from model.errors import InputError
from model.frames import (
    candle_array,
    clock_marks,
    columns_by_name,
    normalise,
    series_from_frame,
    time_index,
    time_marks,
)

N = 6
X = pd.Series(pd.date_range("2024-03-01 09:30", periods=N, freq="5min"))
Y = pd.Series(pd.date_range("2024-03-01 10:00", periods=2, freq="5min"))


def candles(**changes):
    frame = pd.DataFrame(
        {"open": 1.0, "high": 3.0, "low": 0.5, "close": 2.0, "volume": 10.0, "amount": 17.0}, index=range(N)
    )
    for column, values in changes.items():
        if values is None:
            frame = frame.drop(columns=column)
        else:
            frame[column] = values
    return frame


def with_bad(value, row):
    values = [1.0] * N
    values[row] = value
    return values


@pytest.mark.parametrize(
    ("df", "x", "y", "code", "column", "row"),
    [
        ([1, 2], X, Y, "not_a_frame", None, None),
        (candles(low=None), X, Y, "missing_column", "low", None),
        (candles()[:0], X[:0], Y, "no_rows", None, None),
        (candles(high=with_bad(np.nan, 3)), X, Y, "not_finite", "high", 3),
        (candles(volume=with_bad(np.inf, 5)), X, Y, "not_finite", "volume", 5),
        (candles(amount=with_bad(-np.inf, 0)), X, Y, "not_finite", "amount", 0),
        (candles(close=with_bad(1e39, 1)), X, Y, "not_finite", "close", 1),
        (candles(open=["1"] * N), X, Y, "not_a_number", "open", None),
        (candles(open=[True] * N), X, Y, "not_a_number", "open", None),
        (pd.concat([candles(), candles()[["open"]]], axis=1), X, Y, "duplicate_column", "open", None),
        (pd.concat({"AAPL": candles()}, axis=1).swaplevel(axis=1), X, Y, "column_levels", None, None),
        (candles(), X[:-1], Y, "length_mismatch", "x_timestamp", None),
        (candles(), X[::-1], Y, "unsorted_times", "x_timestamp", 1),
        (candles(), X.where(X.index != 4, X[3]), Y, "duplicate_times", "x_timestamp", 4),
        (candles(), X.where(X.index != 2), Y, "not_a_time", "x_timestamp", 2),
        (candles(), list(range(N)), Y, "not_a_time", "x_timestamp", None),
        (candles(), ["monday"] * N, Y, "not_a_time", "x_timestamp", None),
        (candles(), X, Y[::-1], "unsorted_times", "y_timestamp", 1),
        (candles(), X, Y[:0], "no_rows", "y_timestamp", None),
        (candles(), X, Y - pd.Timedelta("1h"), "unsorted_times", "y_timestamp", 0),
        (candles(), X, Y.dt.tz_localize("UTC"), "mixed_time_zones", "y_timestamp", None),
        (
            candles(),
            [t.tz_localize("UTC" if i else "Asia/Tokyo") for i, t in enumerate(X)],
            Y,
            "mixed_time_zones",
            "x_timestamp",
            None,
        ),
    ],
)
def test_bad_input_is_named(df, x, y, code, column, row):
    with pytest.raises(InputError) as error:
        series_from_frame(df, x, y)
    assert (error.value.code, error.value.column, error.value.row) == (code, column, row)
    for part in (column, row):
        assert part is None or str(part) in str(error.value)


def test_horizon_must_match():
    with pytest.raises(InputError, match="2 times for pred_len=3") as error:
        series_from_frame(candles(), X, Y, 3)
    assert error.value.code == "length_mismatch"


def test_missing_volume_and_amount():
    assert candle_array(candles(volume=None, amount=None))[:, 4:].max() == 0
    derived = candle_array(candles(amount=None))
    assert derived[0, 5] == pytest.approx(10.0 * (1 + 3 + 0.5 + 2) / 4)
    # The public implementation throws the amount away here.
    assert candle_array(candles(volume=None))[:, 4:].tolist() == [[0.0, 17.0]] * N


def test_column_order_and_extra_columns_do_not_matter():
    shuffled = candles()[["amount", "close", "low", "volume", "high", "open"]].assign(symbol="X")
    assert np.array_equal(candle_array(shuffled), candle_array(candles()))


@pytest.mark.parametrize("write", [str.upper, str.title])
def test_names_of_columns_may_be_in_any_case(write):
    """Volume was read as no volume."""
    for frame in (candles(), candles(amount=None)):
        assert np.array_equal(candle_array(frame.rename(columns=write)), candle_array(frame))
    assert np.array_equal(candle_array(candles().rename(columns={"volume": "Volume"})), candle_array(candles()))


def test_of_two_columns_that_differ_in_case_none_is_preferred():
    with pytest.raises(
        InputError, match=r"column 'volume' is there twice \('volume' and 'Volume'\): keep one"
    ) as caught:
        candle_array(candles().assign(Volume=1.0))
    assert (caught.value.code, caught.value.column) == ("duplicate_column", "volume")
    candle_array(candles().assign(note=1, Note=2))  # which nobody reads


def test_columns_are_found_in_the_order_of_the_names_that_are_asked_for():
    assert columns_by_name(["LOW", 7, "x", "Open"], ("open", "high", "low")) == {"open": "Open", "low": "LOW"}


def test_marks_are_read_off_the_local_wall_clock():
    times = pd.date_range("2024-06-30 23:55", periods=2, freq="5min", tz="Asia/Shanghai")
    expected = [[55, 23, 6, 30, 6], [0, 0, 0, 1, 7]]
    for form in (times, pd.Series(times), list(times), [str(t) for t in times], times.to_pydatetime()):
        assert time_marks(form).tolist() == expected
    assert time_marks(times.tz_convert("UTC"))[0].tolist() == [55, 15, 6, 30, 6]
    assert time_marks(times.tz_localize(None)).tolist() == expected


@given(st.lists(st.datetimes(pd.Timestamp("1700-01-01"), pd.Timestamp("2250-01-01")), min_size=1, max_size=20))
def test_marks_are_those_of_the_calendar(moments):
    expected = [[m.minute, m.hour, m.weekday(), m.day, m.month] for m in moments]
    assert clock_marks(np.array(moments, dtype="datetime64[us]")).tolist() == expected


def test_repeated_wall_clock_at_the_end_of_summer_time_is_not_a_duplicate():
    times = pd.date_range("2024-11-03 05:00", periods=4, freq="30min", tz="UTC").tz_convert("America/New_York")
    assert len(set(times.strftime("%H:%M"))) < len(times)
    assert len(time_index(times)) == 4


finite = st.floats(-1e6, 1e6, width=32)


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.just(6)), elements=finite))
def test_normalise_scales_back(values):
    x, mean, scale = normalise(values, clip=1e9)
    assert x.dtype == np.float32
    restored = x * scale + mean
    # fp32: relative to the largest value of the column, not to each value.
    assert (np.abs(restored - values) <= 1e-5 * (np.abs(values).max(axis=0) + 1e-3)).all()
    clipped, _, _ = normalise(values, clip=0.5)
    assert np.abs(clipped).max() <= 0.5


def test_constant_column_stays_finite():
    x, mean, scale = normalise(np.full((50, 6), 7.25, np.float32), clip=5)
    assert np.abs(x).max() == 0
    assert mean.tolist() == [7.25] * 6
    assert (scale > 0).all()
