"""While as many requests are under way as the ingress takes, the proxy answers for it, and tells it later how often."""

import asyncio
import json
import re

import httpx
import pytest

from serve_app.config import AppConfig
from serve_app.door import BODY_PATIENCE_S, STALE_S, LoadShedding
from serve_app.ingress import create_app
from serve_app.jobs import Places
from serve_app.proxy import ClientHeaders, RoutesAwaited, middlewares


class Door:
    """Proxy and ingress as Ray puts them together, over a backend that answers or refuses, and a clock to turn."""

    def __init__(self, backend):
        self.backend, self.now = backend, 0.0
        self.app = create_app(backend, AppConfig(), behind_serve=True, behind_door=True)
        self.app.add_api_route("/-/routes", lambda: "known")
        around = [middleware.cls for middleware in middlewares()]
        assert around == [LoadShedding, RoutesAwaited, ClientHeaders]
        self.app = ClientHeaders(RoutesAwaited(LoadShedding(self.app, clock=lambda: self.now)))

    def ask(self, body, path="/v1/forecast", **headers):
        return asyncio.run(self.post(body, path, **headers))

    async def post(self, body, path="/v1/forecast", **headers):
        return await self._request("POST", path, json=body, headers=headers)

    async def beside(self, count, body, path="/v1/forecast", **headers):
        """Answers to `count` requests that are under way, and to one more that comes then."""
        first = [asyncio.ensure_future(self.post(body)) for _ in range(count)]
        await asyncio.sleep(0.05)
        last = await self.post(body, path, **headers)
        return await asyncio.gather(*first), last

    def metric(self, pattern):
        text = asyncio.run(self._request("GET", "/v1/metrics")).text
        return float(re.search(pattern + r" (\S+)", text).group(1))

    async def _request(self, method, path, **content):
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **content)


REFUSED = r'kronos_requests_total{route="/v1/forecast",status="429"}'


@pytest.fixture
def body(columns):
    return {"series": [columns()], "horizon": 1}


def full(fake_backend, count):
    """A door that has heard of `count` places, before a backend that takes a moment."""
    door = Door(fake_backend(delay_s=0.2))
    door.backend.small_jobs = Places(count, 2.2)
    assert "x-kronos-places" not in door.ask(body_of_one()).headers
    return door


def body_of_one():
    bars = {name: [10.0, 11.0, 10.5, 10.8] for name in ("open", "high", "low", "close")}
    times = [f"2024-01-02T09:3{i}:00" for i in range(4)]
    return {"series": [{**bars, "timestamps": times}], "horizon": 1}


def test_what_finds_no_place_is_answered_for(fake_backend, body):
    door = full(fake_backend, 2)
    asked = len(door.backend.jobs)
    answers, refused = asyncio.run(door.beside(2, body, **{"x-request-id": "mine"}))
    assert [answer.status_code for answer in answers] == [200, 200]
    assert (refused.status_code, refused.headers["retry-after"], refused.headers["x-request-id"]) == (429, "3", "mine")
    assert refused.json()["error"]["code"] == "queue_full"
    assert refused.json()["error"]["request_id"] == "mine"
    assert len(door.backend.jobs) == asked + 2
    _, refused = asyncio.run(door.beside(2, body, "/v1/predict/single"))
    assert refused.status_code == 429

    # There is room again, and the ingress hears how many the door has refused.
    assert door.ask(body).status_code == 200
    assert door.metric(REFUSED) == 1
    assert door.metric(r'kronos_requests_total{route="/v1/predict/single",status="429"}') == 1
    assert door.metric(r'kronos_errors_total{code="queue_full"}') == 2
    assert door.ask(body).status_code == 200
    assert door.metric(REFUSED) == 1


def test_without_news_one_request_goes_in_now_and_then(fake_backend, body):
    door = full(fake_backend, 1)

    async def go():
        long = asyncio.ensure_future(door.post(body))
        await asyncio.sleep(0.05)
        refused = await door.post(body)
        door.now += STALE_S
        first, second = await asyncio.gather(door.post(body), door.post(body))
        return refused.status_code, {first.status_code, second.status_code}, (await long).status_code

    assert asyncio.run(go()) == (429, {200, 429}, 200)


def test_a_backend_that_knows_no_bound_leaves_the_one_of_the_service(fake_backend, body):
    door = Door(fake_backend(delay_s=0.1))
    assert door.ask(body).status_code == 200
    answers, last = asyncio.run(door.beside(5, body))
    assert {answer.status_code for answer in (*answers, last)} == {200}


def test_a_body_that_comes_drop_by_drop_keeps_nobody_out(fake_backend, body):
    door = full(fake_backend, 1)

    async def slowly(arrived):
        raw = json.dumps(body).encode()
        yield raw[:10]
        await arrived.wait()
        yield raw[10:]

    async def go():
        arrived = asyncio.Event()
        headers = {"content-type": "application/json"}
        slow = asyncio.ensure_future(door._request("POST", "/v1/forecast", content=slowly(arrived), headers=headers))
        await asyncio.sleep(BODY_PATIENCE_S + 0.05)
        quick = await door.post(body)
        arrived.set()
        return quick.status_code, (await slow).status_code

    assert asyncio.run(go()) == (200, 200)


def test_other_routes_and_applications_stay_open(fake_backend, body):
    door = full(fake_backend, 1)

    async def go():
        long = asyncio.ensure_future(door.post(body))
        await asyncio.sleep(0.05)
        answers = await door._request("GET", "/v1/metrics"), await door.post(body, "/other/v1/forecast")
        await long
        return [answer.status_code for answer in answers]

    assert asyncio.run(go()) == [200, 404]


def test_clients_cannot_forge_the_count(fake_backend, body):
    door = Door(fake_backend())
    forged = {"x-kronos-refused-at-door": json.dumps({"/v1/forecast": 10**9})}
    assert door.ask(body, **forged).status_code == 200
    assert door.ask(body, x_kronos_refused_at_door="{").status_code == 200
    with pytest.raises(AttributeError):
        door.metric(REFUSED)
