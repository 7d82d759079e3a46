"""An ingress that is told to stop, over the fake backend."""

import asyncio

import httpx
import pytest

from serve_app.config import AppConfig
from serve_app.draining import Drain
from serve_app.ingress import create_app


@pytest.fixture
def drain():
    return Drain()


@pytest.fixture
def http(drain, fake_backend):
    app = create_app(fake_backend(delay_s=0.1), AppConfig(), drain=drain)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test")


def test_what_is_in_flight_finishes_and_what_comes_later_is_refused(drain, http, columns):
    body = {"series": [columns()], "horizon": 2}

    async def go():
        first = [asyncio.ensure_future(http.post("/v1/forecast", json=body)) for _ in range(3)]
        while drain.in_flight < 3:
            await asyncio.sleep(0.001)
        assert drain.start() == 3
        refused = await http.post("/v1/forecast", json=body, headers={"x-request-id": "late"})
        assert drain.in_flight == 3
        return [one.status_code for one in await asyncio.gather(*first)], refused

    statuses, refused = asyncio.run(go())
    assert statuses == [200] * 3
    assert drain.in_flight == 0
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["request_id"]) == (503, "draining", "late")
    assert int(refused.headers["retry-after"]) >= 1


def test_who_only_looks_is_answered_to_the_end(drain, http):
    async def go():
        assert (await http.get("/v1/readyz")).status_code == 200
        drain.start()
        ready = await http.get("/v1/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")
        assert "retry-after" in ready.headers
        for path in ("/v1/healthz", "/v1/replicas"):
            assert (await http.get(path)).status_code == 200
        # A refusal is counted like every other answer.
        await http.post("/v1/forecast", json={})
        assert 'kronos_requests_total{route="/v1/forecast",status="503"} 1.0' in (await http.get("/v1/metrics")).text

    asyncio.run(go())


def test_a_failed_request_is_not_in_flight_any_more(drain, http):
    async def go():
        assert (await http.post("/v1/forecast", content=b"{")).status_code in (400, 415)
        assert drain.in_flight == 0

    asyncio.run(go())
