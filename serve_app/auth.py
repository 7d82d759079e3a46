"""Which key a request needs, and the refusal of those without it. Plain ASGI, inside RequestContext."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import ServiceError
from serve_app.keys import ADMIN, PREDICT, KeyRing
from serve_app.metrics import Metrics
from serve_app.middleware import Record, refuse

OPEN_ROUTES = frozenset({"/v1/healthz", "/v1/readyz", "/", "/docs"})
"""Probes have no key, and a page must load before one can be typed into it."""
ADMIN_ROUTES = frozenset({"/v1/metrics", "/v1/replicas", "/v1/healthz/detailed"})
"""They tell of hosts, processes and everybody's traffic."""


class Authentication:
    """401 without a key that is in force, 403 if the key may not. Before the body is read."""

    def __init__(self, app: ASGIApp, keys: KeyRing, metrics: Metrics) -> None:
        self.app = app
        self.keys = keys
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            record: Record = scope["state"]["record"]
            try:
                self._authenticate(record, Headers(scope=scope))
            except ServiceError as error:
                self.metrics.security_event(error.code)
                await refuse(send, error, record)
                return
        await self.app(scope, receive, send)

    def _authenticate(self, record: Record, headers: Headers) -> None:
        """Raises ServiceError unauthorized or forbidden."""
        if record.route in OPEN_ROUTES:
            return
        secret = _secret(headers)
        if not secret:
            raise ServiceError("unauthorized", "send an API key, as Authorization: Bearer KEY or as X-API-Key: KEY")
        record.key = self.keys.find(secret)
        if record.key is None:
            raise ServiceError("unauthorized", "this API key is not known")
        scope = ADMIN if record.route in ADMIN_ROUTES else PREDICT
        if not record.key.may(scope):
            raise ServiceError("forbidden", f"this API key lacks the scope {scope}, which the route needs")


def _secret(headers: Headers) -> str:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    return value.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
