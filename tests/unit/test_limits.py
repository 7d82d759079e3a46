"""What one client may take of the service: time, places, headers that Ray would obey."""

import asyncio
import json
import re
import threading
import time

import httpx
import pytest

from model import calendars
from model.calendars import CalendarError
from serve_app import ingress
from serve_app.config import AppConfig
from serve_app.errors import ServiceError
from serve_app.ingress import create_app
from serve_app.limits import ClientLimits
from serve_app.proxy import middlewares


def test_a_body_that_drips_is_cut_off(make_http):
    http = make_http(limits={"body_timeout_s": 0.2})

    async def drip():
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    response = http.post("/v1/forecast", raw=drip())
    assert (response.status_code, response.json()["error"]["code"]) == (408, "body_timeout")
    assert response.headers["connection"] == "close"
    assert re.search(r'event="slow_body"} 1', http.get("/v1/metrics").text)


def test_places_are_limited_per_client_and_in_all():
    admission = ClientLimits(AppConfig(limits={"max_concurrent": 3, "max_concurrent_per_client": 2}).limits)
    with admission.slot("a"), admission.slot("a"):
        with pytest.raises(ServiceError) as caught, admission.slot("a"):
            pass
        assert (caught.value.code, caught.value.status) == ("concurrency_limited", 429)
        with admission.slot("a", concurrent=3), pytest.raises(ServiceError) as caught, admission.slot("b"):
            pass
        assert caught.value.code == "queue_full"
        with admission.slot("b"):
            pass
    with admission.slot("a"), admission.slot("a"):
        pass
    assert not admission._running


def test_concurrent_requests_over_http(fake_backend, columns):
    app = create_app(fake_backend(delay_s=0.5), AppConfig(limits={"max_concurrent_per_client": 2}))
    body = json.dumps({"series": [columns()], "horizon": 1}).encode()

    async def go():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            posts = [
                client.post("/v1/forecast", content=body, headers={"content-type": "application/json"})
                for _ in range(5)
            ]
            answers = await asyncio.gather(*posts)
            return answers, (await client.get("/v1/metrics")).text

    answers, text = asyncio.run(go())
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["error"]["code"] == "concurrency_limited"
    assert int(refused.headers["retry-after"]) >= 1
    assert re.search(r'kronos_rate_limit_hits_total{container="[^"]*"} 3', text)
    assert re.search(r'event="concurrency_limited"} 3', text)
    assert re.search(r"kronos_concurrent_requests 0", text)


def test_the_bodies_of_all_requests_in_work_are_limited_together(fake_backend, columns):
    config = AppConfig(limits={"max_request_mb": 0.5, "max_bodies_mb": 0.25})
    app = create_app(fake_backend(delay_s=0.5), config)
    body = json.dumps({"series": [columns()], "horizon": 1}).encode()
    large = body + b" " * 300_000  # more than all together, and allowed alone

    async def go():
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            def post(content):
                return client.post("/v1/forecast", content=content, headers={"content-type": "application/json"})

            first = asyncio.create_task(post(large))
            await asyncio.sleep(0.2)
            refused = await post(body)
            return (await first), refused, (await post(large))

    first, refused, after = asyncio.run(go())
    assert (first.status_code, after.status_code) == (200, 200)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert "0.25 MB" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1


def test_a_full_service_reads_no_body(fake_backend):
    backend = fake_backend()
    backend.crowded = ServiceError("queue_full", "full")

    async def go():
        transport = httpx.ASGITransport(app=create_app(backend, AppConfig()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/forecast", content=b"no JSON", headers={"content-type": "application/json"})

    assert asyncio.run(go()).status_code == 429


@pytest.mark.parametrize("key", ["calendar", "c\\u0061lendar"])
def test_a_calendar_that_is_slow_to_compute_keeps_nobody_waiting(monkeypatch, fake_backend, columns, key):
    computing = threading.Event()

    def slow(*_):
        computing.set()
        time.sleep(1.0)
        raise CalendarError("calendar", "not_on_calendar", "no")

    monkeypatch.setattr(calendars, "_sessions", slow)
    body = json.dumps({"series": [columns()], "calendar": "XNYS"}).replace('"calendar"', f'"{key}"')

    async def go():
        transport = httpx.ASGITransport(app=create_app(fake_backend(), AppConfig()))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            post = client.post("/v1/forecast", content=body, headers={"content-type": "application/json"})
            waiting = asyncio.create_task(post)
            while not computing.is_set():
                await asyncio.sleep(0.01)
            assert (await client.get("/v1/healthz")).status_code == 200
            assert not waiting.done()
            return await waiting

    assert asyncio.run(go()).status_code == 422


@pytest.mark.parametrize(("quantiles", "aside"), [(2, False), (32, True)])
def test_an_answer_of_many_quantiles_is_written_beside_the_event_loop(
    monkeypatch, make_http, columns, quantiles, aside
):
    threads = []

    def write(*args):
        threads.append(threading.current_thread())
        return b"{}"

    monkeypatch.setattr(ingress, "_write_forecast", write)
    body = {"series": [columns()], "horizon": 256, "quantiles": [level / 32 for level in range(quantiles)]}
    assert make_http().post("/v1/forecast", body).status_code == 200
    assert [thread is not threading.main_thread() for thread in threads] == [aside]


def test_limits_are_published(http):
    limits = http.get("/v1/info").json()["limits"]
    assert limits == AppConfig().limits.model_dump()
    assert {"max_request_mb", "body_timeout_s", "max_series", "max_horizon", "max_samples", "max_cost"} <= set(limits)


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ([("X-Request-Timeout-Seconds", "0"), ("Accept", "*/*")], ["accept"]),
        ([("x-request-disconnect-disabled", "?1")], []),
        ([("serve_multiplexed_model_id", "m"), ("Serve-Multiplexed-Model-Id", "m")], []),
        ([("serve-multiplexed_model_id", "m"), ("X-Session-Id", "s"), ("x_session-id", "s")], []),
        ([("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")], ["traceparent"]),
        ([("traceparent", "\u00ff"), ("tracestate", "\u00ff")], []),
        ([("x-request-id", "mine")], ["x-request-id"]),
        ([("x-request-id", "a b")], ["x-request-id"]),
        ([("x-request-id", "a\tb")], []),
        ([("x-request-id", "a"), ("x-request-id", "b")], []),
        ([("x-request-id", "")], []),
        ([("authorization", "Bearer k")], ["authorization"]),
    ],
)
def test_what_the_proxy_takes_off(sent, kept):
    passed = []

    async def app(scope, receive, send):
        passed.extend(name.decode() for name, _ in scope["headers"])

    middleware = middlewares()[-1]
    headers = [(name.lower().encode(), value.encode()) for name, value in sent]
    wrapped = middleware.cls(app, *middleware.args, **middleware.kwargs)
    asyncio.run(wrapped({"type": "http", "headers": headers}, None, None))
    assert passed == kept
