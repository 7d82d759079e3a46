"""How much work may be under way."""

from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.admission import (
    ENOUGH_BUSY_S,
    ENOUGH_JOBS,
    RATE_WINDOW_S,
    UNKNOWN_RETRY_S,
    Admission,
    Booking,
    _Finished,
)

LONG = 1e9


def admission_of(clock, bound=100, max_wait_s=LONG, workers=1):
    return Admission({"cpu": bound}, {"cpu": max_wait_s}, {"cpu": workers}, clock)


@pytest.fixture
def clock():
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    return Clock()


def test_work_counts_and_not_requests(clock):
    admission = admission_of(clock)
    bookings = []
    for _ in range(10):
        assert admission.has_room("cpu", 10, 1, 0)
        bookings.append(admission.start("cpu", 10, 1, 1))
    assert not admission.has_room("cpu", 1, 1, 0)
    assert admission.has_room("cpu", 1, 2, 0)
    admission.end(bookings.pop(), computed=True)
    assert admission.has_room("cpu", 10, 1, 0)
    assert not admission.has_room("cpu", 11, 1, 0)


def test_an_idle_group_takes_a_job_of_any_size(clock):
    admission = admission_of(clock)
    assert admission.has_room("cpu", 1000, 1, 0)
    assert not admission.has_room("cpu", 1000, 1, others=1)


def test_what_other_ingress_replicas_sent_counts_too(clock):
    admission = admission_of(clock)
    assert admission.has_room("cpu", 40, 1, others=60)
    assert not admission.has_room("cpu", 41, 1, others=60)


def compute(admission, clock, work, seconds):
    """One job that takes so long."""
    booking = admission.start("cpu", work, 1, 1)
    clock.now += seconds
    admission.end(booking, computed=True)


def test_the_rate_counts_the_time_in_which_there_was_work(clock):
    admission = admission_of(clock)
    for _ in range(3):
        compute(admission, clock, 20, 2.0)
        clock.now += 5  # nobody asks
    assert admission.rate("cpu") == 10.0
    clock.now += 60
    assert admission.rate("cpu") is None


def test_side_by_side_counts_once(clock):
    admission = admission_of(clock)
    bookings = [admission.start("cpu", 10, 1, 1) for _ in range(4)]
    clock.now += 2
    for booking in bookings:
        admission.end(booking, computed=True)
    assert admission.rate("cpu") == 20.0


def test_one_job_at_a_time_keeps_one_replica_busy(clock):
    """Two would do twice as much: they must not be taken for as slow as one, as soon as there is much to do."""
    admission = admission_of(clock)
    for together in (1, 2, 3):
        bookings = [admission.start("cpu", 10, 1, replicas=2) for _ in range(together)]
        clock.now += max(1.0, together / 2)
        for booking in bookings:
            admission.end(booking, computed=True)
        assert admission.rate("cpu") == 20.0
        clock.now += 5


def test_no_more_than_the_bound_in_seconds_at_the_measured_rate(clock):
    admission = admission_of(clock, bound=10**6, max_wait_s=5.0)
    for _ in range(1000):
        assert admission.has_room("cpu", 10, 1, 0)  # nothing has been measured
    for _ in range(ENOUGH_JOBS):
        compute(admission, clock, 10, 1.0)
    admitted = 0
    while admission.has_room("cpu", 10, 1, 0):
        admission.start("cpu", 10, 1, 1)
        admitted += 1
    assert admitted == 6  # 50 units take 5 s; one more goes in while the wait is not above it
    assert not admission.has_room("cpu", 1, 1, 0)
    assert 1.0 <= admission.retry_after_s("cpu", 1, 1, 0) <= 30.0


def test_the_bound_in_seconds_waits_until_every_worker_has_something(clock):
    """A job alone says little about how fast many come back side by side."""
    admission = admission_of(clock, bound=10**6, max_wait_s=5.0, workers=4)
    for _ in range(ENOUGH_JOBS):
        compute(admission, clock, 10, 1.0)
    for _ in range(8):
        assert admission.has_room("cpu", 1000, 2, 0)
        admission.start("cpu", 1000, 1, 1)
    assert not admission.has_room("cpu", 1000, 2, 0)


def test_places_are_what_is_under_way_and_what_finds_room(clock):
    admission = admission_of(clock, bound=100, max_wait_s=5.0)
    assert admission.places("cpu", 1, 0) == 100
    for _ in range(ENOUGH_JOBS):
        compute(admission, clock, 1, 1.0)
    bookings = [admission.start("cpu", 1, 1, 1) for _ in range(2)]
    assert admission.places("cpu", 1, 0) == 6  # as many as has_room would take
    assert admission.places("cpu", 1, 7) == 13
    while admission.has_room("cpu", 1, 1, 0):
        bookings.append(admission.start("cpu", 1, 1, 1))
    assert len(bookings) == admission.places("cpu", 1, 0) == 6
    admission.end(bookings.pop(), computed=True)
    assert admission.places("cpu", 1, 0) > len(bookings)


def test_one_huge_job_leaves_room_for_others(clock):
    admission = admission_of(clock, bound=10**6, max_wait_s=5.0)
    for _ in range(ENOUGH_JOBS):
        compute(admission, clock, 10, 1.0)
    admission.start("cpu", 100_000, 1, 1)
    assert admission.wait_s("cpu") == 2.5
    assert admission.has_room("cpu", 10, 1, 0)
    admission.start("cpu", 100_000, 1, 1)
    admission.start("cpu", 10, 1, 1)
    assert not admission.has_room("cpu", 10, 1, 0)


def test_a_few_jobs_after_a_start_refuse_nobody(clock):
    """The first ones pay for the warming up: at their rate, the next would seem to wait for ever."""
    admission = admission_of(clock, bound=10**6, max_wait_s=5.0)
    for _ in range(ENOUGH_JOBS - 1):
        compute(admission, clock, 1, 0.1)
    for _ in range(3):
        admission.start("cpu", 1000, 1, 1)
    assert admission.has_room("cpu", 10, 1, 0)
    compute(admission, clock, 1, ENOUGH_BUSY_S)
    assert not admission.has_room("cpu", 10, 1, 0)


def test_retry_after_is_the_excess_over_the_measured_rate(clock):
    admission = admission_of(clock)
    assert admission.retry_after_s("cpu", 10, 1, 0) == UNKNOWN_RETRY_S
    compute(admission, clock, 60, 10.0)
    admission.start("cpu", 100, 1, 1)
    assert admission.retry_after_s("cpu", 36, 1, 0) == 6.0
    assert admission.retry_after_s("cpu", 1, 1, 0) == 1.0
    assert admission.retry_after_s("cpu", 10_000, 1, 0) == 30.0


def test_what_was_cancelled_says_nothing_about_the_rate(clock):
    admission = admission_of(clock)
    admission.end(admission.start("cpu", 50, 1, 1), computed=False)
    assert (admission.rate("cpu"), admission.outstanding("cpu")) == (None, 0)


def test_a_service_that_is_never_under_pressure_does_not_collect_finished_jobs(clock):
    admission = admission_of(clock)
    for _ in range(1000):
        assert admission.has_room("cpu", 1, 1, 0)
        compute(admission, clock, 1, 1.0)
    assert len(admission._finished["cpu"]) <= RATE_WINDOW_S + 1


def compute_in_turn(admission, clock, rates, demand):
    """Jobs of one unit each, first come first served, each second at that second's rate; demand: asked for per second.

    Returns how long those took that came in each second and were admitted, and how many were refused in it.
    """
    waiting, asked, done = deque(), 0.0, 0.0
    took, refused = [[] for _ in rates], [0 for _ in rates]
    for second, rate in enumerate(rates):
        for _ in range(1000):
            clock.now += 0.001
            asked, done = asked + demand / 1000, min(done + rate / 1000, 1.0)
            if asked >= 1:
                asked -= 1
                if admission.has_room("cpu", 1, 1, 0):
                    waiting.append((second, clock.now, admission.start("cpu", 1, 1, 1)))
                else:
                    refused[second] += 1
            if done >= 1 and waiting:
                done -= 1
                came_in, at, booking = waiting.popleft()
                admission.end(booking, computed=True)
                took[came_in].append(clock.now - at)
    return took, refused


def test_the_bound_in_seconds_follows_a_host_that_slows_down_and_recovers(clock):
    """Who is there already waits longer. By the rate of half a minute alone, so did who came ten seconds later: 6 s."""
    admission = admission_of(clock, bound=10**6, max_wait_s=4.0, workers=8)
    took, refused = compute_in_turn(admission, clock, [40] * 40 + [20] * 15 + [40] * 15, demand=120)
    assert max(took[30]) < 4.5 < max(took[39])
    assert all(3.0 < max(second) < 4.5 for second in took[46:50])
    assert sum(refused[60:65]) <= 5 * 85  # fast again: 40 a second, or nearly, are taken again


def test_a_stall_under_light_load_is_not_taken_for_a_slow_host(clock):
    """As where replicas are exchanged: nothing comes back for three seconds, then everything."""
    admission = admission_of(clock, bound=10**6, max_wait_s=4.0, workers=8)
    _, refused = compute_in_turn(admission, clock, [40] * 30 + ([0] * 3 + [40] * 4) * 3, demand=15)
    assert sum(refused) == 0


def test_the_slower_a_host_has_become_the_more_the_bound_follows(clock):
    """Few come back in five seconds then; those that did count, however old they are."""
    admission = admission_of(clock, bound=10**6, max_wait_s=4.0, workers=8)
    took, _ = compute_in_turn(admission, clock, [40] * 40 + [5] * 60 + [40] * 5, demand=120)
    assert all(max(second) < 4.7 for second in took[60:100] if second)


def test_one_huge_job_is_no_pressure(clock):
    """While it runs, others come back as they are asked for, and not as fast as they could."""
    admission = admission_of(clock, bound=10**6, max_wait_s=3.0, workers=4)
    for _ in range(2000):
        compute(admission, clock, 10, 0.01)
    huge = admission.start("cpu", 14_000, 1, 1)
    for _ in range(60):
        compute(admission, clock, 10, 0.1)
    admitted = 0
    while admission.has_room("cpu", 10, 1, 0) and admitted < 60:
        admission.start("cpu", 10, 1, 1)
        admitted += 1
    admission.end(huge, computed=True)
    assert admitted == 60


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=60))
def test_what_came_back_lately_is_known_without_counting_it_again(steps):
    """Against a plain list: jobs of some work, seconds apart, most of them forgotten again."""
    now, finished, plain = 0.0, _Finished(), []
    for pause, work in steps:
        now += pause * RATE_WINDOW_S / 4
        booking = Booking("cpu", work, 1, float(work % 3))
        finished.add(now, booking)
        finished.forget(now)
        plain = [(at, one) for at, one in [*plain, (now, booking)] if at >= now - RATE_WINDOW_S]
        assert len(finished) == len(plain)
        assert finished.work == sum(one.work for _, one in plain)
        assert finished.least_work() == min(one.work for _, one in plain)
        assert finished.least_busy_s() == min(one.busy_s for _, one in plain)
