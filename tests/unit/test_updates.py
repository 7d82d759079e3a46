"""Whether an update starts a new replica before it stops an old one."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.updates import Before, Running


def surge(old, replicas, num_cpus, free, reserved=0.0):
    running = {} if old is None else {"cpu": Running(*old)}
    return Before(running, free).surge_percent("cpu", replicas, num_cpus, reserved_cpus=reserved)


@pytest.mark.parametrize(
    ("old", "replicas", "num_cpus", "free", "percent"),
    [
        ((1, 1.0), 1, 1.0, 1.0, 100),
        ((2, 0.5), 2, 0.5, 0.9, 50),
        ((1, 1.0), 1, 1.0, 0.9, 0),
        # Ray would wait for the second new one before it stops the old one, and that for its room.
        ((1, 1.0), 2, 0.5, 0.9, 0),
        ((1, 1.0), 3, 1.0, 2.9, 0),
        ((1, 1.0), 3, 1.0, 3.0, 33),
        ((3, 1.0), 1, 1.0, 1.0, 100),
        ((1, 0.0), 1, 0.0, 0.0, 100),
        # The first deployment.
        (None, 1, 1.0, 8.0, 0),
    ],
)
def test_all_that_start_before_an_old_one_stops_must_fit(old, replicas, num_cpus, free, percent):
    assert surge(old, replicas, num_cpus, free) == percent


def test_what_else_starts_takes_its_part():
    assert surge((1, 1.0), 1, 1.0, 1.0, reserved=0.1) == 0


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 40))
def test_an_update_ends(old, new, free):
    """As Ray goes about it: it starts as many as percent allows, and stops an old one when more than `new` run."""
    percent = surge((old, 1.0), new, 1.0, float(free))
    if not percent:
        return
    most, started = new + math.ceil(percent * new / 100), 0
    while old:
        begin = min(new - started, most - old - started, free)
        if begin > 0:
            started, free = started + begin, free - begin
        stop = min(old, max(0, old + started - new))
        assert begin > 0 or stop > 0, "nothing goes on"
        old, free = old - stop, free + stop
    assert started <= new
    assert new - started <= free
