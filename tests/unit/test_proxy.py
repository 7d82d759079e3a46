"""A proxy that has just started: what comes before it knows an application waits, and nothing of it is lost."""

import asyncio

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse

from serve_app.proxy import POLL_S, STARTING_S, RoutesAwaited


class RaysProxy:
    """Says 404 in Ray's words so many times, then hands over to an application at /kronos that has a 404 of its own."""

    def __init__(self, ignorant_for):
        self.left = ignorant_for
        self.asked = 0

    async def __call__(self, scope, receive, send):
        self.asked += 1
        self.left -= 1
        path = scope["path"]
        if path == "/-/routes":
            answer = JSONResponse({})
        elif self.left >= 0 or not path.startswith("/kronos"):
            answer = PlainTextResponse(f"Path '{path}' not found. Ping http://.../-/routes for available routes.", 404)
        elif path == "/kronos/v1/nothing":
            answer = JSONResponse({"error": {"code": "unknown_route"}}, 404)
        else:
            answer = PlainTextResponse(await Request(scope, receive).body())
        await answer(scope, receive, send)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def ask(app, *paths):
    async def asking():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
            return [await client.post(path, content=b"body") for path in paths]

    return asyncio.run(asking())


def test_a_request_waits_until_the_routes_are_there():
    proxy = RaysProxy(ignorant_for=3)
    (answer,) = ask(RoutesAwaited(proxy), "/kronos/v1/forecast")
    assert (answer.status_code, answer.content, proxy.asked) == (200, b"body", 4)


def test_a_path_that_nobody_has_is_told_at_once_when_the_routes_are_there():
    proxy = RaysProxy(ignorant_for=0)
    known, other, own = ask(RoutesAwaited(proxy), "/kronos/v1/forecast", "/elsewhere", "/kronos/v1/nothing")
    assert (known.status_code, other.status_code, own.status_code, proxy.asked) == (200, 404, 404, 3)
    assert "/elsewhere" in other.text
    assert own.json()["error"]["code"] == "unknown_route"


def test_a_404_of_the_application_is_an_answer():
    (answer,) = ask(RoutesAwaited(RaysProxy(ignorant_for=0)), "/kronos/v1/nothing")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_route")


def test_the_wait_has_an_end():
    proxy, clock = RaysProxy(ignorant_for=10**9), Clock()
    app = RoutesAwaited(proxy, clock)

    async def asking():
        waiting = asyncio.ensure_future(asyncio.to_thread(ask, app, "/kronos/v1/forecast"))
        await asyncio.sleep(5 * POLL_S)
        assert not waiting.done()
        clock.now = STARTING_S
        return await waiting

    (answer,) = asyncio.run(asking())
    assert (answer.status_code, "not found" in answer.text) == (404, True)


@pytest.mark.parametrize("path", ["/-/routes", "/-/healthz"])
def test_rays_own_paths_are_not_held(path):
    proxy = RaysProxy(ignorant_for=10**9)
    (answer,) = ask(RoutesAwaited(proxy), path)
    assert (answer.status_code, proxy.asked) == (200 if path == "/-/routes" else 404, 1)
