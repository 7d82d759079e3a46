"""Refusals at the door: in Ray's HTTP proxy, or with HAProxy in front of the ingress's own work.

Ray's way from proxy to ingress costs several milliseconds of processor time, and as much as a second of waiting where
forecasts take the processors. Under three times what the service can take, two of three requests would spend them on
being refused. So the ingress says with every answer how many small requests may be under way, and while so many are,
the door refuses the others itself.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import ALL_FULL, ServiceError
from serve_app.jobs import Places
from serve_app.metrics import FORECAST_ROUTES
from serve_app.middleware import REFUSED_AT_DOOR, mark, request_id_of, send_error

PLACES = "x-kronos-places"
"""Header of an answer, from PlacesReport to LoadShedding: Places.count and Places.retry_after_s."""
STALE_S = 1.0
"""After so long without an answer one request goes in, whatever is under way: things may have changed."""
MARGIN = 16
"""One place in so many is kept back: the room that a request was let in for must still be there when it arrives."""
BODY_PATIENCE_S = 0.25
"""How long a request is under way before its body is there."""


@dataclass
class _Door:
    """Of one application, which its prefix names. refused: requests by route that the ingress has not heard of.

    under_way: requests whose answer is not out.
    """

    places: Places
    heard_at: float
    under_way: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def closed(self, now: float) -> bool:
        if self.under_way < max(1, self.places.count):
            return False
        if now - self.heard_at < STALE_S:
            return True
        self.heard_at = now
        return False


class _Place:
    """One request's place among those under way, from when it comes; not while its body is long in coming."""

    def __init__(self, door: _Door) -> None:
        self._door = door
        self._taken = False
        self._take()
        # Whoever sends a body drop by drop must not keep the others out.
        self._patience = asyncio.get_running_loop().call_later(BODY_PATIENCE_S, self._release)

    def body_is_there(self) -> None:
        self._patience.cancel()
        self._take()

    def leave(self) -> None:
        self._patience.cancel()
        self._release()

    def _take(self) -> None:
        if not self._taken:
            self._taken = True
            self._door.under_way += 1

    def _release(self) -> None:
        if self._taken:
            self._taken = False
            self._door.under_way -= 1


class LoadShedding:
    """Refuses forecasts with 429 while as many are under way as the ingress behind takes; tells it later how many."""

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.monotonic) -> None:
        self.app = app
        self._clock = clock
        # Made when an ingress says how much it takes, never from a client's words.
        self._doors: dict[str, _Door] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        route = next((route for route in FORECAST_ROUTES if path.endswith(route)), None)
        if scope["type"] != "http" or route is None:
            await self.app(scope, receive, send)
            return
        prefix = path.removesuffix(route)
        door = self._doors.get(prefix)
        if door is not None and door.closed(self._clock()):
            door.refused[route] += 1
            await _refuse(scope, send, door.places.retry_after_s)
            return
        if door is not None and door.refused:
            report = json.dumps(door.refused).encode()
            scope = {**scope, "headers": [*scope["headers"], (REFUSED_AT_DOOR.encode(), report)]}
            door.refused = Counter()
        place = None if door is None else _Place(door)

        async def watching() -> Message:
            message = await receive()
            if place is not None and message["type"] == "http.request" and not message.get("more_body"):
                place.body_is_there()
            return message

        async def noticing(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if PLACES in headers:
                    self._hear(prefix, headers[PLACES])
                    del headers[PLACES]
            await send(message)

        try:
            await self.app(scope, watching, noticing)
        finally:
            if place is not None:
                place.leave()

    def _hear(self, prefix: str, news: str) -> None:
        count, retry_after_s = news.split()
        places, now = Places(int(count), float(retry_after_s)), self._clock()
        door = self._doors.setdefault(prefix, _Door(places, now))
        door.places, door.heard_at = places, now


class PlacesReport:
    """Says with every answer to a forecast how many there may be under way; LoadShedding takes it off."""

    def __init__(self, app: ASGIApp, places: Callable[[], Places | None], most: int) -> None:
        """most: requests that the service answers at once, whatever they are."""
        self.app = app
        self._places, self._most = places, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or not path.endswith(tuple(FORECAST_ROUTES)):
            await self.app(scope, receive, send)
            return

        async def saying(message: Message) -> None:
            if message["type"] == "http.response.start":
                places = self._places() or Places(self._most, 1.0)
                count = min(places.count - places.count // MARGIN, self._most)
                MutableHeaders(scope=message)[PLACES] = f"{count} {places.retry_after_s:.3f}"
            await send(message)

        await self.app(scope, receive, saying)


async def _refuse(scope: Scope, send: Send, retry_after_s: float) -> None:
    request_id = request_id_of(Headers(scope=scope))

    async def send_marked(message: Message) -> None:
        if message["type"] == "http.response.start":
            mark(MutableHeaders(scope=message), request_id)
        await send(message)

    await send_error(send_marked, ServiceError("queue_full", ALL_FULL, retry_after_s=retry_after_s), request_id)
