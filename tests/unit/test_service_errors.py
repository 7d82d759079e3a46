"""The error body and the rate limit."""

import pytest
from pydantic import TypeAdapter

from model.errors import clip_text
from serve_app.errors import STATUS, FieldError, ServiceError, invalid_fields
from serve_app.limits import RateLimiter
from serve_app.schemas import ErrorBody


def test_every_code_makes_a_body_of_the_documented_shape():
    for code, status in STATUS.items():
        error = ServiceError(code, "why", fields=[FieldError(("a", 1), "bad", "because")])
        body = TypeAdapter(ErrorBody).validate_python(error.body("id"))
        assert (error.status, body.error.code, body.detail) == (status, code, "why")
    with pytest.raises(KeyError):
        _ = ServiceError("no_such_code", "").status


def test_refusals_that_pass_say_when_to_come_back():
    for code in STATUS:
        expected = STATUS[code] in (429, 503)
        assert ("Retry-After" in ServiceError(code, "").headers) == expected
    assert ServiceError("queue_full", "", retry_after_s=0.2).headers == {"Retry-After": "1"}
    assert ServiceError("rate_limited", "", retry_after_s=12.1).headers == {"Retry-After": "13"}


def test_at_most_twenty_fields():
    error = invalid_fields([FieldError((i,), "bad", "because") for i in range(50)])
    assert (error.status, len(error.fields)) == (422, 20)


def test_text_of_a_client_is_cut_and_made_printable():
    assert clip_text("a\n\ud800é\x00b") == "a????b"
    assert clip_text("x" * 65) == "x" * 61 + "..."
    assert FieldError(("k" * 100,), "bad", "").as_json()["loc"] == ["k" * 61 + "..."]


def test_rate_limit():
    now = [0.0]
    limiter = RateLimiter(clock=lambda: now[0], max_clients=2)
    assert [limiter.wait_s("a", 2) for _ in range(3)] == [0.0, 0.0, 30.0]
    assert limiter.wait_s("b", 2) == 0.0
    now[0] = 30.0
    assert limiter.wait_s("a", 2) == 0.0
    assert limiter.wait_s("a", 2) == 30.0
    now[0] = 1e6
    assert [limiter.wait_s("a", 2) for _ in range(3)] == [0.0, 0.0, 30.0]
    for name in ("c", "d"):
        limiter.wait_s(name, 2)
    assert len(limiter._buckets) == 2
