"""Leaving without cutting anybody off: what an ingress does between "stop" and its end. Plain ASGI.

serve_app.run calls start() in every ingress replica, and again until nothing is in flight.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import ServiceError
from serve_app.middleware import refuse

_READING = ("GET", "HEAD", "OPTIONS")
"""Probes, scrapes and pages are answered until the end, and nobody waits for them."""


class Drain:
    """Whether this ingress still takes work, and how many requests it is answering. Lives on one event loop."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0

    def start(self) -> int:
        """From now on new work is refused. Returns the number of requests that are still being answered."""
        self.draining = True
        return self.in_flight


class DrainMiddleware:
    """Counts requests from their first byte to the last byte of the answer, streams included; refuses while draining.

    Belongs inside RequestContext, so that a refusal has a request id, a metric and a log line.
    """

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self.app = app
        self.drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _READING:
            await self.app(scope, receive, send)
            return
        if self.drain.draining:
            error = ServiceError("draining", "the service is stopping and takes no new work; try again soon")
            await refuse(send, error, scope["state"]["record"])
            return
        self.drain.in_flight += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.drain.in_flight -= 1
