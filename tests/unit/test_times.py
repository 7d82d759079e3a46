"""ISO 8601 in, the same style out."""

from datetime import datetime, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serve_app.times import follow_faults, parse_times


@pytest.mark.parametrize(
    ("texts", "following"),
    [
        (["2024-06-18 11:15:00", "2024-06-18 11:20:00"], "2024-06-18 11:25:00"),
        (["2024-06-18T11:15:00", "2024-06-18T11:20:00"], "2024-06-18T11:25:00"),
        (["2024-06-18T11:15:00Z", "2024-06-18T11:20:00Z"], "2024-06-18T11:25:00Z"),
        (["2024-06-18T11:15:00+08:00", "2024-06-18T11:20:00+08:00"], "2024-06-18T11:25:00+08:00"),
        (["2024-06-18T11:15-05:00", "2024-06-18T11:20-05:00"], "2024-06-18T11:25-05:00"),
        (["2024-06-18T11:15", "2024-06-18T11:20"], "2024-06-18T11:25"),
        (["2024-06-18", "2024-06-19"], "2024-06-20"),
        (["2024-06-18T11:15:00.250000", "2024-06-18T11:15:00.500000"], "2024-06-18T11:15:00.750000"),
        (["2024-12-31T23:50:00Z", "2024-12-31T23:55:00Z"], "2025-01-01T00:00:00Z"),
    ],
)
def test_generated_times_have_the_style_of_the_given_ones(texts, following):
    times = parse_times(texts)
    step = times.local[-1] - times.local[-2]
    assert times.write(times.local[-1:] + step) == [following]
    assert times.write(times.local) == texts


def test_precision_grows_where_the_style_cannot_say_it():
    times = parse_times(["2024-06-18"])
    assert times.write(times.local + np.timedelta64(90, "m")) == ["2024-06-18T01:30:00"]


def test_offsets():
    assert parse_times(["2024-01-01T00:00:00Z"]).offset == timedelta(0)
    assert parse_times(["2024-01-01T00:00:00+05:30"]).offset == timedelta(hours=5, minutes=30)
    assert parse_times(["2024-01-01T00:00:00"]).offset is None
    # The same moment on another wall clock is another zone for the model, which reads wall clocks.
    for second in ("2024-01-01T09:00:00+08:00", "2024-01-01T01:00:00"):
        with pytest.raises(ValidationError) as caught:
            parse_times(["2024-01-01T00:00:00+00:00", second])
        assert caught.value.errors()[0]["type"] == "mixed_time_zones"
        assert caught.value.errors()[0]["loc"] == (1,)


def test_what_follows_the_history():
    history = parse_times(["2024-01-01T00:00:00", "2024-01-01T01:00:00"])
    assert follow_faults(history, parse_times(["2024-01-01T02:00:00"])) == []
    (fault,) = follow_faults(history, parse_times(["2024-01-01T02:00:00Z"]))
    assert (fault.loc, fault.code) == ((0,), "mixed_time_zones")


@given(st.lists(st.datetimes(), min_size=1, max_size=20, unique=True), st.sampled_from(["T", " "]))
def test_any_increasing_times_come_back(moments, separator):
    moments = sorted(moments)
    times = parse_times([moment.isoformat(separator) for moment in moments])
    assert times.local.astype(object).tolist() == moments
    assert [datetime.fromisoformat(text) for text in times.write(times.local)] == moments


@given(st.lists(st.none() | st.text(max_size=30) | st.integers() | st.lists(st.none(), max_size=1), max_size=5))
def test_anything_else_is_a_field_error(raw):
    try:
        times = parse_times(raw)
    except ValidationError as error:
        places = [item["loc"] for item in error.errors()]
    else:
        places = [(i,) for i in range(len(times))]
    assert all(0 <= row < len(raw) for (row,) in places)
