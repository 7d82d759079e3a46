"""Around every request: its id, its metrics, its log line, and the answer to what nobody caught. Plain ASGI."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.connection import ClientGoneError
from serve_app.errors import STATUS, ServiceError
from serve_app.keys import Key
from serve_app.logs import log
from serve_app.metrics import Metrics

MAX_REQUEST_ID = 64
NOTHING_COMPUTED = "queue;dur=0.00, batch;dur=0.00, compute;dur=0.00"
REFUSED_AT_DOOR = "x-kronos-refused-at-door"
"""Header of a request: how many serve_app.door has refused since the last one, as JSON by route."""
CLIENT_GONE = 499
"""Status in log and metrics of a request whose client closed the connection; nothing is sent."""
_OPTIONAL_FIELDS = (
    "series_count",
    "rows",
    "pred_len",
    "queue_time_ms",
    "model_inference_ms",
    "error_type",
    "error_message",
)
"""Of a log line: null where they do not apply, so that every line has the same fields."""


@dataclass
class Record:
    """What is known of a request while it is answered; becomes its log line."""

    request_id: str
    route: str
    started: float = field(default_factory=time.monotonic)
    status: int = 0
    request_size_bytes: int = 0
    response_size_bytes: int = 0
    key: Key | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def client(self) -> str:
        """The name of the key, for the log."""
        return self.key.name if self.key else "anonymous"

    def seconds(self) -> float:
        return time.monotonic() - self.started


def usable_request_id(given: str) -> bool:
    """True for what may stand in answers and logs: short and printable."""
    return 0 < len(given) <= MAX_REQUEST_ID and given.isascii() and given.isprintable() and given == given.strip()


def request_id_of(headers: Headers) -> str:
    """The caller's X-Request-ID if it is usable, else a new one."""
    given = headers.get("x-request-id", "")
    return given if usable_request_id(given) else uuid.uuid4().hex


class RequestContext:
    """Puts a Record into scope["state"]["record"], and closes it when the answer is out."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        routes: frozenset[str],
        behind_serve: bool = False,
        behind_door: bool = False,
    ) -> None:
        """behind_serve: Ray's proxy adds the caller's X-Request-ID to every answer, so ours would be there twice.

        behind_door: clients cannot send REFUSED_AT_DOOR, because serve_app.proxy takes it off.
        """
        self.app = app
        self.metrics = metrics
        self.routes = routes
        self.behind_serve = behind_serve
        self.behind_door = behind_door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        # Labels come from a fixed list: a scanner must not grow the metrics.
        route = path if path in self.routes else "unmatched"
        headers = Headers(scope=scope)
        record = Record(request_id_of(headers), route)
        add_id = not self.behind_serve or headers.get("x-request-id") != record.request_id
        scope.setdefault("state", {})["record"] = record
        if self.behind_door and REFUSED_AT_DOOR in headers:
            self._count_refused(json.loads(headers[REFUSED_AT_DOOR]))
        if route == "unmatched" and (".." in path or "\\" in path or not path.isprintable()):
            self.metrics.security_event("suspicious_path")

        async def send_recorded(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                mark(MutableHeaders(scope=message), record.request_id if add_id else None)
            elif message["type"] == "http.response.body":
                record.response_size_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, send_recorded)
        except (asyncio.CancelledError, ClientGoneError) as error:
            begun, record.status = record.status != 0, CLIENT_GONE
            record.details.update(error_type="client_gone", error_message="the client closed the connection")
            if isinstance(error, asyncio.CancelledError):
                raise
            # Nobody reads it, but Ray's proxy counts on every request having an answer.
            if not begun:
                await send({"type": "http.response.start", "status": CLIENT_GONE, "headers": []})
            await send({"type": "http.response.body", "body": b""})
        except Exception as error:
            # The last line of defence: a client never sees a stack, the log always does.
            record.details.update(error_type=type(error).__name__, error_message=str(error)[:500])
            logging.getLogger("kronos").exception(
                "unhandled error", extra={"fields": {"request_id": record.request_id}}
            )
            if record.status:
                raise  # the answer has begun; only closing the connection tells the client that it is not whole
            internal = ServiceError("internal", "internal error; quote the request id")
            await send_error(send_recorded, internal, record.request_id)
        finally:
            self._close(record, scope)

    def _count_refused(self, refused: Mapping[str, int]) -> None:
        for route, count in refused.items():
            self.metrics.requests.labels(route, str(STATUS["queue_full"])).inc(count)
            self.metrics.error("queue_full", count)
        log(logging.INFO, "refused at the door, because all replicas were full", requests=sum(refused.values()))

    def _close(self, record: Record, scope: Scope) -> None:
        seconds = record.seconds()
        self.metrics.requests.labels(record.route, str(record.status)).inc()
        self.metrics.duration.labels(record.route).observe(seconds)
        if "error_type" in record.details:
            self.metrics.error(record.details["error_type"])
        # Probes and scrapes come every few seconds: their lines would drown the others.
        probe = scope["method"] in ("GET", "HEAD") and (record.status < 400 or record.route == "/v1/readyz")
        level = logging.DEBUG if probe and record.route != "unmatched" else logging.INFO
        log(
            level,
            "request",
            request_id=record.request_id,
            method=scope["method"],
            route=record.route,
            status_code=record.status,
            client=record.client,
            latency_ms=round(seconds * 1000, 2),
            request_size_bytes=record.request_size_bytes,
            response_size_bytes=record.response_size_bytes,
            **dict.fromkeys(_OPTIONAL_FIELDS) | record.details,
        )


class HeadAsGet:
    """Answers HEAD as GET without the body, on every route: FastAPI says 405, which load balancers take for down."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self.app({**scope, "method": "GET"}, receive, without_body)


async def refuse(send: Send, error: ServiceError, record: Record) -> None:
    """The answer of a middleware that lets a request go no further."""
    record.details.update(error_type=error.code, error_message=error.message)
    await send_error(send, error, record.request_id)


def mark(answer: MutableHeaders, request_id: str | None) -> None:
    """Sets what every answer carries. request_id: None if Ray's proxy adds it."""
    if request_id is not None:
        answer["X-Request-ID"] = request_id
    answer.setdefault("Server-Timing", NOTHING_COMPUTED)
    answer["X-Content-Type-Options"] = "nosniff"


async def send_error(send: Send, error: ServiceError, request_id: str) -> None:
    """The whole answer that an error is."""
    body = json.dumps(error.body(request_id)).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
