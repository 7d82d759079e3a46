"""What happens to a request before Ray looks at it: in its HTTP proxy, or with HAProxy in every ingress replica.

Any client may send headers that Ray reads as orders: to drop its time limit, to go on computing for one that has left,
to prefer a replica. The ingress keeps its own deadlines and watches the connection itself, so none does harm; here they
end at the door. An X-Request-ID that we would not take goes too, because Ray sends back whatever it was given, and so
does a trace context that is not ASCII, because Ray would answer 500 to what it cannot decode. What comes before a new
proxy has heard of any application is answered here, or waits. And where the service is full, serve_app.door refuses.

Ray loads this where CALLBACK stands in the environment variable CALLBACK_VARIABLE when it starts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.door import LoadShedding
from serve_app.errors import ServiceError
from serve_app.metrics import FORECAST_ROUTES
from serve_app.middleware import REFUSED_AT_DOOR, HeadAsGet, mark, request_id_of, usable_request_id

CALLBACK_VARIABLE, CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "serve_app.proxy:middlewares"
DROPPED = frozenset(
    {
        REFUSED_AT_DOOR.encode(),
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve-multiplexed-model-id",
        b"x-session-id",
    }
)
"""In Ray's eyes "_" is the same as "-" in some of them."""
TRACE_CONTEXT = frozenset({b"traceparent", b"tracestate"})
STARTING_S = 10.0
"""So long after the start of a proxy, at most, forecasts wait for its routes."""
POLL_S = 0.05
ROUTES = "/-/routes"
"""Where Ray says 200 once a proxy knows an application, and 503 before."""


class ClientHeaders:
    """Passes a request on without the headers that are none of the client's business."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            given = Headers(scope=scope).getlist("x-request-id")
            keep_id = len(given) == 1 and usable_request_id(given[0])
            kept = [(name, value) for name, value in scope["headers"] if _passes(name.lower(), value, keep_id)]
            scope = {**scope, "headers": kept}
        await self.app(scope, receive, send)


def _passes(name: bytes, value: bytes, keep_id: bool) -> bool:
    if name == b"x-request-id":
        return keep_id
    if name in TRACE_CONTEXT:
        return value.isascii()
    return name.replace(b"_", b"-") not in DROPPED


class RoutesAwaited:
    """Answers for a proxy that does not know any application yet; forecasts wait for a moment.

    Ray's proxy listens before it is told of any, at the start of a service and after a proxy was lost, and says 404 to
    everything meanwhile, to clients and probes whose path is right.
    """

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self.app = app
        self._clock = clock
        self._ends = clock() + STARTING_S
        self._known = False
        self._asking: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        # What begins so is Ray's own.
        if self._known or scope["type"] != "http" or path.startswith("/-/"):
            await self.app(scope, receive, send)
            return
        if path.endswith(tuple(FORECAST_ROUTES)):
            if self._asking is None or self._asking.done():
                # One asks for all who wait.
                self._asking = asyncio.ensure_future(self._until_known(scope))
            await asyncio.shield(self._asking)
        else:
            await self._ask(scope)
        await (self.app if self._known else _not_ready)(scope, receive, send)

    async def _until_known(self, scope: Scope) -> None:
        """scope: of any request."""
        await self._ask(scope)
        while not self._known and self._clock() < self._ends:
            await asyncio.sleep(POLL_S)
            await self._ask(scope)

    async def _ask(self, scope: Scope) -> None:
        self._known = self._known or await self._status_of_routes(scope) == 200

    async def _status_of_routes(self, scope: Scope) -> int:
        status = 0

        async def nothing() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def listening(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)

        asking = {"method": "GET", "path": ROUTES, "raw_path": ROUTES.encode(), "query_string": b"", "headers": []}
        await self.app({**scope, **asking, "root_path": "", "state": {}}, nothing, listening)
        return status


async def _not_ready(scope: Scope, receive: Receive, send: Send) -> None:
    """What the ingress would say of itself: it lives, and is not ready."""
    request_id = request_id_of(Headers(scope=scope))
    if scope["path"].endswith("/v1/healthz"):
        answer = JSONResponse({"status": "ok"})
    else:
        error = ServiceError("not_ready", "the service is starting; ask again soon")
        status = {"status": "loading"} if scope["path"].endswith("/v1/readyz") else {}
        answer = JSONResponse(status | error.body(request_id), error.status, error.headers)
    mark(answer.headers, request_id)
    await HeadAsGet(answer)(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Called by Ray in every process that listens for HTTP."""
    # Ray puts the last one around the others.
    return [Middleware(LoadShedding), Middleware(RoutesAwaited), Middleware(ClientHeaders)]
