"""Forecasts as server-sent events, over a fake backend."""

import asyncio
import json
import re

import numpy as np
import pytest

from serve_app.config import AppConfig
from serve_app.errors import ServiceError
from serve_app.ingress import create_app


def events(text):
    """[(name, data)] of a stream; comments are dropped, as a client does."""
    found = []
    for block in text.split("\n\n"):
        lines = [line for line in block.split("\n") if line and not line.startswith(":")]
        if lines:
            name, data = (line.split(": ", 1)[1] for line in lines)
            found.append((name, json.loads(data)))
    return found


@pytest.fixture
def body(columns):
    series = [dict(columns(), id="a"), dict(columns(), id="b", horizon=3)]
    return {"series": series, "horizon": 5, "samples": 7, "seed": 3, "return_paths": True, "stream": True}


def test_a_stream_ends_with_the_answer_that_is_not_streamed(http, body):
    response = http.post("/v1/forecast", body, headers={"x-request-id": "mine"})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-request-id"] == "mine"
    assert response.headers["x-backend-used"] == "cpu"
    spent = response.headers["server-timing"]
    assert re.fullmatch(r"queue;dur=1\.00, batch;dur=0\.00, compute;dur=[0-9]+\.[0-9]{2}", spent)
    assert "content-length" not in response.headers
    last = events(response.text)[-1]
    assert last == ("answer", http.post("/v1/forecast", {**body, "stream": False}).json())
    assert ": backend=cpu; replica=replica; queue;dur=1.00, batch;dur=0.50, compute;dur=20.00\n" in response.text


def test_a_stream_says_at_once_what_computes_it_whatever_else_is_alive(make_http, fake_backend, body):
    class Nobody(fake_backend):
        def replicas(self):
            return []

    assert make_http(Nobody()).post("/v1/forecast", body).headers["x-backend-used"] == "cpu"


def test_bars_come_once_in_order_and_agree_with_the_answer(http, body):
    *bars, (_, answer) = events(http.post("/v1/forecast", body).text)
    assert {name for name, _ in bars} == {"bars"}
    for index, series in enumerate(answer["series"]):
        own = [data for _, data in bars if data["series"] == index]
        assert [data["first"] for data in own] == list(range(0, len(series["timestamps"]), 2))
        assert all(data["final"] is True and data["id"] == series["id"] for data in own)
        assert [time for data in own for time in data["timestamps"]] == series["timestamps"]
        for name, whole in series["mean"].items():
            np.testing.assert_allclose([value for data in own for value in data["mean"][name]], whole, rtol=1e-8)
        for level, table in series["quantiles"].items():
            told = [value for data in own for value in data["quantiles"][level]["close"]]
            np.testing.assert_allclose(told, table["close"], rtol=1e-8)


def test_repair_is_in_the_bars_too(make_http, fake_backend, body):
    class Wild(fake_backend):
        def _answered(self, job, prefer):
            answered = super()._answered(job, prefer)
            for paths in answered.done.paths:
                paths.values[:, 0] = [100, 90, 110, 105, -5, 1]
            return answered

    *bars, (_, answer) = events(make_http(Wild()).post("/v1/forecast", {**body, "repair": "ohlc"}).text)
    assert bars[0][1]["mean"]["high"][0] == 105
    assert bars[0][1]["mean"]["volume"][0] == 0
    assert answer["repaired"] == 2 * 7


def test_errors_before_the_first_event_are_answers(make_http, fake_backend, body):
    response = make_http(fake_backend(error=ServiceError("queue_full", "full"))).post("/v1/forecast", body)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    assert response.headers["retry-after"] == "1"
    response = make_http().post("/v1/forecast", {**body, "calendar": "NOPE"})
    assert (response.status_code, response.json()["error"]["fields"][0]["code"]) == (422, "unknown_calendar")
    response = make_http(fake_backend(error=RuntimeError("secret"))).post("/v1/forecast", body)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal")
    slow = make_http(fake_backend(delay_s=5))
    response = slow.post("/v1/forecast", {**body, "deadline_ms": 50})
    assert (response.status_code, response.json()["error"]["code"]) == (408, "deadline_passed")


@pytest.mark.parametrize(
    ("error", "code"), [(ServiceError("no_replica", "lost"), "no_replica"), (RuntimeError("secret"), "internal")]
)
def test_a_later_error_is_the_last_event(make_http, fake_backend, body, error, code):
    response = make_http(fake_backend(error=error, fail_after=2)).post(
        "/v1/forecast", body, headers={"x-request-id": "mine"}
    )
    assert response.status_code == 200
    assert "secret" not in response.text
    told = events(response.text)
    name, data = told[-1]
    assert len(told) == 3
    assert name == "error"
    assert set(data) == {"error", "detail"}
    assert (data["error"]["code"], data["error"]["request_id"]) == (code, "mine")


def test_a_deadline_within_the_stream(make_http, fake_backend, body):
    backend = fake_backend(delay_s=0.05)
    http = make_http(backend, limits={"max_horizon": 512})
    told = events(http.post("/v1/forecast", {**body, "horizon": 500, "deadline_ms": 2000}).text)
    assert told[0][0] == "bars"
    assert (told[-1][0], told[-1][1]["error"]["code"]) == ("error", "deadline_passed")
    assert backend.closed == 1
    assert 'kronos_timeouts_total{endpoint="/v1/forecast"} 1.0' in http.get("/v1/metrics").text


def leave(app, body, *, after_events, headers=()):
    """Posts a body and closes the connection after that many chunks of the answer. Returns what was sent."""
    sent = []

    async def go():
        gone = asyncio.Event()
        if not after_events:
            asyncio.get_running_loop().call_later(0.05, gone.set)
        requests = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive():
            if requests:
                return requests.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            if sum(bool(one.get("body")) for one in sent) >= after_events > 0:
                gone.set()
            await asyncio.sleep(0)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "method": "POST",
            "path": "/v1/forecast",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), *headers],
            "client": ("127.0.0.1", 1),
        }
        await asyncio.wait_for(app(scope, receive, send), 5)

    asyncio.run(go())
    return sent


RAYS_SWITCH = [(b"x-request-disconnect-disabled", b"?1"), (b"x-request-timeout-seconds", b"0")]


@pytest.mark.parametrize("headers", [[], RAYS_SWITCH])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_computing_and_frees_its_slot(fake_backend, body, stream, headers):
    # Whole, it must not be there before the client has left, however busy this machine is.
    backend = fake_backend(delay_s=0.1 if stream else 30)
    app = create_app(backend, AppConfig(limits={"max_concurrent": 1}))
    for again in (1, 2):
        sent = leave(app, {**body, "stream": stream, "horizon": 500}, after_events=int(stream), headers=headers)
        assert sent[0]["status"] == (200 if stream else 499)
        assert (backend.closed if stream else backend.cancelled) == again
        assert not sent[-1].get("more_body", False)
