"""A proxy that has just started and knows no application: forecasts wait and lose nothing, probes are told."""

import asyncio
import time

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse

from serve_app.proxy import POLL_S, STARTING_S, RoutesAwaited


class RaysProxy:
    """Knows no routes until its routes have been asked for so many times; then an application at /kronos echoes."""

    def __init__(self, ignorant_for):
        self.left = ignorant_for
        self.asked = []

    async def __call__(self, scope, receive, send):
        path = scope["path"]
        self.asked.append(path)
        if path == "/-/routes":
            self.left -= 1
            answer = JSONResponse({}, 200 if self.left < 0 else 503)
        elif self.left >= 0 or not path.startswith("/kronos"):
            answer = PlainTextResponse(f"Path '{path}' not found. Ping http://.../-/routes for available routes.", 404)
        else:
            answer = PlainTextResponse(await Request(scope, receive).body(), headers={"method": scope["method"]})
        await answer(scope, receive, send)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


async def posting(app, *paths):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        return await asyncio.gather(*(client.post(path, content=path.encode()) for path in paths))


def ask(app, *paths):
    return asyncio.run(posting(app, *paths))


FORECAST = "/kronos/v1/forecast"


def test_forecasts_wait_for_the_routes_and_one_asks_for_all():
    proxy = RaysProxy(ignorant_for=3)
    answers = ask(RoutesAwaited(proxy), *[FORECAST] * 50)
    assert [(answer.status_code, answer.text, answer.headers["method"]) for answer in answers] == [
        (200, FORECAST, "POST")
    ] * 50
    assert proxy.asked == ["/-/routes"] * 4 + [FORECAST] * 50


def test_afterwards_nobody_asks_again():
    proxy = RaysProxy(ignorant_for=0)
    app = RoutesAwaited(proxy)

    async def asking():
        return [(await posting(app, path))[0].status_code for path in (FORECAST, FORECAST, "/elsewhere/v1/forecast")]

    assert asyncio.run(asking()) == [200, 200, 404]
    assert proxy.asked == ["/-/routes", FORECAST, FORECAST, "/elsewhere/v1/forecast"]


def test_the_wait_has_an_end():
    proxy, clock = RaysProxy(ignorant_for=10**9), Clock()

    async def asking():
        waiting = asyncio.ensure_future(posting(RoutesAwaited(proxy, clock), FORECAST))
        await asyncio.sleep(5 * POLL_S)
        assert not waiting.done()
        clock.now = STARTING_S
        return await waiting

    (answer,) = asyncio.run(asking())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
    assert int(answer.headers["retry-after"]) > 0


def test_a_client_that_leaves_does_not_stop_the_asking_for_others():
    proxy = RaysProxy(ignorant_for=4)
    app = RoutesAwaited(proxy)

    async def asking():
        impatient = asyncio.ensure_future(posting(app, FORECAST))
        await asyncio.sleep(POLL_S / 2)
        patient = asyncio.ensure_future(posting(app, FORECAST))
        await asyncio.sleep(POLL_S)
        impatient.cancel()
        return await patient

    assert asyncio.run(asking())[0].status_code == 200


async def getting(app, *paths, method="GET"):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        return [await client.request(method, path) for path in paths]


def test_what_asks_what_there_is_now_is_not_held():
    """It lives and is not ready, whatever Ray's proxy says of a path that it does not know yet."""
    app = RoutesAwaited(RaysProxy(ignorant_for=10**9))
    began = time.monotonic()
    paths = ("/-/routes", "/kronos/v1/healthz", "/kronos/v1/readyz", "/kronos/v1/models", "/")
    routes, health, ready, *others = asyncio.run(getting(app, *paths))
    assert routes.text == "{}"
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    assert (ready.status_code, ready.json()["status"]) == (503, "loading")
    for answer in (ready, *others):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]
        assert "retry-after" in answer.headers
    (head,) = asyncio.run(getting(app, "/kronos/v1/readyz", method="HEAD"))
    assert (head.status_code, head.content) == (503, b"")
    assert time.monotonic() - began < STARTING_S


def test_probes_find_the_application_as_soon_as_it_is_known():
    app = RoutesAwaited(RaysProxy(ignorant_for=1))
    before, after = asyncio.run(getting(app, *["/kronos/v1/readyz"] * 2))
    assert (before.status_code, after.status_code) == (503, 200)
