"""Refusals at the door: in Ray's HTTP proxy, or with HAProxy in front of the ingress's own work.

Ray's way from proxy to ingress costs several milliseconds of processor time. Under three times what the service can
take, two of three requests would spend them on being refused, beside the forecasts that are computed on the same
machine. So while the ingress says that a small request finds no room, the door answers for it, for a quarter of a
second at a time; behind it seconds of work are waiting, so that nothing stands idle meanwhile.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import ALL_FULL, CROWDED, ServiceError
from serve_app.metrics import FORECAST_ROUTES
from serve_app.middleware import REFUSED_AT_DOOR, mark, request_id_of, send_error

CLOSED_S = 0.25


@dataclass
class _Door:
    """Of one application, which its prefix names. refused: requests by route that the ingress has not heard of."""

    closed_until: float = 0.0
    retry_after_s: float = 1.0
    refused: Counter[str] = field(default_factory=Counter)


class LoadShedding:
    """Refuses forecasts with 429 while the ingress behind is crowded, and tells it later how many."""

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self.app = app
        self._clock = clock
        # Made when an ingress says that it is crowded, never from a client's words.
        self._doors: dict[str, _Door] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        route = next((route for route in FORECAST_ROUTES if path.endswith(route)), None)
        if scope["type"] != "http" or route is None:
            await self.app(scope, receive, send)
            return
        prefix = path.removesuffix(route)
        door = self._doors.get(prefix)
        if door is not None and self._clock() < door.closed_until:
            door.refused[route] += 1
            await _refuse(scope, send, door.retry_after_s)
            return
        if door is not None and door.refused:
            report = json.dumps(door.refused).encode()
            scope = {**scope, "headers": [*scope["headers"], (REFUSED_AT_DOOR.encode(), report)]}
            door.refused = Counter()

        async def noticing(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if CROWDED in headers:
                    del headers[CROWDED]
                    self._close(prefix, float(headers.get("retry-after", "1")))
            await send(message)

        await self.app(scope, receive, noticing)

    def _close(self, prefix: str, retry_after_s: float) -> None:
        door = self._doors.setdefault(prefix, _Door())
        door.closed_until, door.retry_after_s = self._clock() + CLOSED_S, retry_after_s


async def _refuse(scope: Scope, send: Send, retry_after_s: float) -> None:
    request_id = request_id_of(Headers(scope=scope))

    async def send_marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            mark(MutableHeaders(scope=message), request_id)
        await send(message)

    await send_error(send_marked, ServiceError("queue_full", ALL_FULL, retry_after_s=retry_after_s), request_id)
