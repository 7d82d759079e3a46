"""While the ingress says that it is crowded, the proxy answers for it, and tells it later how often."""

import asyncio
import json
import re

import httpx
import pytest

from serve_app.config import AppConfig
from serve_app.door import CLOSED_S, LoadShedding
from serve_app.errors import ServiceError
from serve_app.ingress import create_app
from serve_app.proxy import ClientHeaders, middlewares


class Door:
    """Proxy and ingress as Ray puts them together, over a backend that answers or refuses, and a clock to turn."""

    def __init__(self, backend):
        self.backend, self.now = backend, 0.0
        self.app = create_app(backend, AppConfig(), behind_serve=True, behind_door=True)
        around = [middleware.cls for middleware in middlewares()]
        assert around == [LoadShedding, ClientHeaders]
        self.app = ClientHeaders(LoadShedding(self.app, clock=lambda: self.now))

    def ask(self, body, path="/v1/forecast", **headers):
        return asyncio.run(self._request("POST", path, json=body, headers=headers))

    def metric(self, pattern):
        text = asyncio.run(self._request("GET", "/v1/metrics")).text
        return float(re.search(pattern + r" (\S+)", text).group(1))

    async def _request(self, method, path, **content):
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **content)


FULL = ServiceError("queue_full", "full", retry_after_s=3, crowded=True)
NARROW = ServiceError("queue_full", "full", retry_after_s=3)
REFUSED = r'kronos_requests_total{route="/v1/forecast",status="429"}'


@pytest.fixture
def body(columns):
    return {"series": [columns()], "horizon": 1}


def test_a_crowded_service_is_answered_for_and_then_asked_again(fake_backend, body):
    door = Door(fake_backend(error=FULL))
    first = door.ask(body)
    assert first.status_code == 429
    assert "x-kronos-crowded" not in first.headers
    door.backend.error = None

    refused = door.ask(body, **{"x-request-id": "mine"})
    assert (refused.status_code, refused.headers["retry-after"], refused.headers["x-request-id"]) == (429, "3", "mine")
    assert refused.json()["error"] == {
        **first.json()["error"],
        "request_id": "mine",
        "message": refused.json()["detail"],
    }
    assert door.ask(body, "/v1/predict/single").status_code == 429

    door.now += CLOSED_S
    assert door.ask(body).status_code == 200
    # One of the ingress's own, and one of the door's, of which it was told.
    assert door.metric(REFUSED) == 2
    assert door.metric(r'kronos_requests_total{route="/v1/predict/single",status="429"}') == 1
    assert door.metric(r'kronos_errors_total{code="queue_full"}') == 3
    assert door.ask(body).status_code == 200
    assert door.metric(REFUSED) == 2


def test_a_job_that_is_too_large_for_what_is_left_closes_nothing(fake_backend, body):
    door = Door(fake_backend(error=NARROW))
    assert door.ask(body).status_code == 429
    door.backend.error = None
    assert door.ask(body).status_code == 200


def test_other_routes_and_applications_stay_open(fake_backend, body):
    door = Door(fake_backend(error=FULL))
    assert door.ask(body).status_code == 429
    assert door.metric("\nkronos_concurrent_requests") == 0
    door.backend.error = None
    assert door.ask(body, "/other/v1/forecast").status_code == 404


def test_clients_cannot_forge_the_count(fake_backend, body):
    door = Door(fake_backend())
    forged = {"x-kronos-refused-at-door": json.dumps({"/v1/forecast": 10**9})}
    assert door.ask(body, **forged).status_code == 200
    assert door.ask(body, x_kronos_refused_at_door="{").status_code == 200
    with pytest.raises(AttributeError):
        door.metric(REFUSED)
