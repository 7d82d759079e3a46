"""How much work may be under way."""

import pytest

from serve_app.admission import UNKNOWN_RETRY_S, Admission


@pytest.fixture
def clock():
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    return Clock()


def test_work_counts_and_not_requests(clock):
    admission = Admission({"cpu": 100}, clock)
    for _ in range(10):
        assert admission.has_room("cpu", 10, 1, 0)
        admission.start("cpu", 10)
    assert not admission.has_room("cpu", 1, 1, 0)
    assert admission.has_room("cpu", 1, 2, 0)
    admission.end("cpu", 10, computed=True)
    assert admission.has_room("cpu", 10, 1, 0)
    assert not admission.has_room("cpu", 11, 1, 0)


def test_an_idle_group_takes_a_job_of_any_size(clock):
    admission = Admission({"cpu": 100}, clock)
    assert admission.has_room("cpu", 1000, 1, 0)
    assert not admission.has_room("cpu", 1000, 1, others=1)


def test_what_other_ingress_replicas_sent_counts_too(clock):
    admission = Admission({"cpu": 100}, clock)
    assert admission.has_room("cpu", 40, 1, others=60)
    assert not admission.has_room("cpu", 41, 1, others=60)


def test_retry_after_is_the_excess_over_the_measured_rate(clock):
    admission = Admission({"cpu": 100}, clock)
    assert admission.retry_after_s("cpu", 10, 1, 0) == UNKNOWN_RETRY_S
    for clock.now in (0.0, 5.0, 10.0):
        admission.start("cpu", 20)
        admission.end("cpu", 20, computed=True)
    assert admission.rate("cpu") == 6.0
    admission.start("cpu", 100)
    assert admission.retry_after_s("cpu", 36, 1, 0) == 6.0
    assert admission.retry_after_s("cpu", 1, 1, 0) == 1.0
    assert admission.retry_after_s("cpu", 10_000, 1, 0) == 30.0
    clock.now = 60.0
    assert admission.rate("cpu") is None


def test_what_was_cancelled_says_nothing_about_the_rate(clock):
    admission = Admission({"cpu": 100}, clock)
    admission.start("cpu", 50)
    admission.end("cpu", 50, computed=False)
    assert (admission.rate("cpu"), admission.outstanding("cpu")) == (None, 0)
