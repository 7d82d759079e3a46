"""The way of a forecast request: limits, body, job, backend, answer; in one piece or as a stream."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from model.types import COLUMNS
from serve_app.answers import bars_json
from serve_app.bodies import ARROW, body_kind, read_body
from serve_app.config import AppConfig
from serve_app.connection import until_gone
from serve_app.errors import FieldError, ServiceError, invalid_fields
from serve_app.jobs import Answered, Backend, Bars, Done, Job, joined_warnings
from serve_app.limits import ClientLimits
from serve_app.logs import LOGGER_NAME
from serve_app.metrics import Metrics
from serve_app.middleware import Record
from serve_app.reading import Asked
from serve_app.stream import EventStream, event

T = TypeVar("T")
SMALL_BYTES = 2**16
"""What is read and written in the event loop itself, about 5 ms of it; more goes to a thread."""
LINE_BREAKS = {mark.encode(): f"\\u{ord(mark):04x}".encode() for mark in "\x85\u2028\u2029"}
"""What JSON lets stand in a string as it is, and how it is written there otherwise."""
LEAST_WEIGHT = 0.001
"""Of a media type in Accept; 0 means: not this one."""
_WEIGHT = re.compile(r"q=[01](\.[0-9]{0,3})?")
Write = Callable[[Asked, Answered, str | None], bytes]
"""(request, result, device warning) → the body of the answer."""


@dataclass(frozen=True)
class Formats:
    """What a route reads and writes, by media type. The first of `writers` is sent to whoever names none of them."""

    readers: Mapping[str, Callable[[bytes], Asked]]
    writers: Mapping[str, Write]

    def writer(self, accept: str) -> tuple[str, Write]:
        """The format for an Accept header: one that it names, unless it gives the first more weight; else the first."""
        weights = _weights(accept)
        default, *others = self.writers
        most = next((weights[kind] for kind in (default, "application/*", "*/*") if kind in weights), 0.0)
        kind = next((kind for kind in others if weights.get(kind, 0.0) >= max(most, LEAST_WEIGHT)), default)
        return kind, self.writers[kind]


def _weights(accept: str) -> dict[str, float]:
    """Media type → its weight in an Accept header, 0 to 1; 1 where there is none, or none that can be read."""
    weights = {}
    for part in accept.lower().split(","):
        kind, *parameters = (piece.strip() for piece in part.split(";"))
        given = next((text for text in parameters if _WEIGHT.fullmatch(text)), "q=1")
        weights[kind] = float(given[2:])
    return weights


class Forecasting:
    """What the forecast routes share. Raises ServiceError, and ClientGoneError if the client leaves."""

    def __init__(self, backend: Backend, config: AppConfig, metrics: Metrics, clients: ClientLimits) -> None:
        self.backend = backend
        self.limits = config.limits
        self.metrics = metrics
        self.clients = clients

    async def answer(self, request: Request, formats: Formats) -> Response:
        """Answers one request: in one piece, or with an EventStream if its body asks for one."""
        record: Record = request.state.record
        prefer = _preferred_group(request)
        async with AsyncExitStack() as held:
            self._admit(held, request, record)
            self.backend.refuse_if_crowded()
            media_type, write = formats.writer(request.headers.get("accept", ""))
            read = formats.readers[body_kind(request, tuple(formats.readers))]
            take = held.enter_context(self.clients.body())
            raw = await read_body(request, int(self.limits.max_request_mb * 2**20), self.limits.body_timeout_s, take)
            record.request_size_bytes = len(raw)
            asked = await _aside(_is_slow_to_read(raw), read, raw)
            if media_type == ARROW:
                _require_table(asked)
            self._record_input(record, asked)
            work = _Work(self, record, asked, prefer, write)
            if asked.stream:
                return await self._stream(request, work, held)
            answered, content = await until_gone(request.receive, work.whole())
        headers = {"X-Backend-Used": answered.done.device.backend, "Server-Timing": timing_of(answered.done)}
        return Response(content, media_type=media_type, headers=headers)

    def _admit(self, held: AsyncExitStack, request: Request, record: Record) -> None:
        key = record.key
        # An address cannot be taken for a key's name: names have no colon.
        client = key.name if key else f"address:{request.client.host if request.client else ''}"
        try:
            self.clients.require_rate(client, key.per_minute if key else None)
            held.enter_context(self.clients.slot(client, key.concurrent if key else None))
        except ServiceError as error:
            if error.code != "queue_full":
                self.metrics.rate_limit_hits.labels(self.metrics.container).inc()
                self.metrics.security_event(error.code)
            raise
        held.enter_context(self.metrics.concurrent.track_inprogress())

    def _record_input(self, record: Record, asked: Asked) -> None:
        rows = sum(len(item.candles) for item in asked.items)
        self.metrics.input_size.labels(record.route).observe(rows)
        pred_len = max(item.task.series.horizon for item in asked.items)
        record.details.update(series_count=len(asked.items), rows=rows, pred_len=pred_len, model=asked.model)

    async def _stream(self, request: Request, work: _Work, held: AsyncExitStack) -> EventStream:
        """Waits for the first event, because an error before it is an answer with a status of its own."""
        events = work.events()
        held.push_async_callback(events.aclose)
        first = await until_gone(request.receive, anext(events))
        # Up to the first event; the times of the answer stand before its event, which comes last.
        passed = work.record.seconds() * 1000
        spent = timing(work.queue_ms, 0.0, max(0.0, passed - work.queue_ms))
        headers = {"X-Backend-Used": work.backend, "Server-Timing": spent}
        return EventStream(first, events, held.pop_all(), headers)


@dataclass
class _Work:
    """One request, from job to the bytes of its answer. Its deadline runs from when the request came in.

    backend, queue_ms: of a stream, once its first event is there.
    """

    service: Forecasting
    record: Record
    asked: Asked
    prefer: str | None
    write: Write
    backend: str = ""
    queue_ms: float = 0.0

    def __post_init__(self) -> None:
        limits, asked = self.service.limits, self.asked
        left = min(limits.request_timeout_s, (asked.deadline_ms or float("inf")) / 1000) - self.record.seconds()
        timeout = min(left, limits.inference_timeout_s)
        if timeout <= 0:
            raise self._late()
        self.ends = asyncio.get_running_loop().time() + timeout
        self.job = Job(self.record.request_id, asked.model, tuple(item.task for item in asked.items), timeout)

    async def whole(self) -> tuple[Answered, bytes]:
        answered = await self._in_time(self.service.backend.forecast(self.job, self.prefer))
        return answered, await self._written(answered)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events. Raises ServiceError instead of the first; later, an error is the last event."""
        begun = False
        try:
            stream = cast(AsyncGenerator[Bars | Answered, None], self.service.backend.stream(self.job, self.prefer))
            async with aclosing(stream) as results:
                while isinstance(result := await self._in_time(anext(results)), Bars):
                    self.backend, self.queue_ms = result.backend, result.queue_ms
                    yield event("bars", await asyncio.to_thread(_bars_bytes, self.asked, result))
                    begun = True
            done = result.done
            self.backend, self.queue_ms = done.device.backend, done.queue_ms
            comment = f"backend={done.device.backend}; replica={done.replica_id}; {timing_of(done)}"
            yield event("answer", await self._written(result), comment)
        except Exception as error:
            if not begun:
                raise
            yield event("error", encode(self._failed(error).body(self.record.request_id)))

    def _failed(self, error: Exception) -> ServiceError:
        """An error that comes too late for a status: it is told as an event, and logged."""
        if not isinstance(error, ServiceError):
            fields = {"request_id": self.record.request_id}
            logging.getLogger(LOGGER_NAME).exception("unhandled error in a stream", extra={"fields": fields})
            error = ServiceError("internal", "internal error; quote the request id")
        self.record.details.update(error_type=error.code, error_message=error.message)
        return error

    async def _in_time(self, result: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout_at(self.ends):
                return await result
        except TimeoutError:
            raise self._late() from None
        except ServiceError as error:
            raise self._told(error) from None

    def _told(self, error: ServiceError) -> ServiceError:
        """What the backend says, in the terms of the request."""
        if error.code == "deadline_passed":
            return self._late()
        if error.code == "invalid_fields":
            return invalid_fields([self._placed(field) for field in error.fields])
        return error

    def _placed(self, field: FieldError) -> FieldError:
        """A replica counts tasks; the client knows them by their places in its body."""
        match field.loc:
            case (int(task), *rest):
                return replace(field, loc=(*self.asked.items[task].loc, *rest))
        return field

    def _late(self) -> ServiceError:
        self.service.metrics.timeouts.labels(self.record.route).inc()
        text = "the deadline passed and the computing was stopped: ask for fewer bars or samples, or allow more time"
        return ServiceError("deadline_passed", text)

    async def _written(self, answered: Answered) -> bytes:
        done, service = answered.done, self.service
        service.metrics.inference.labels(self.record.route).observe(done.compute_ms / 1000)
        service.metrics.queue_wait.labels(self.record.route).observe(done.queue_ms / 1000)
        self.record.details.update(
            model_inference_ms=round(done.compute_ms, 2),
            queue_time_ms=round(done.queue_ms, 2),
            group=answered.group,
            replica=done.replica_id,
        )
        warning = joined_warnings(service.backend.device_warning, done.device.device_warning, *answered.warnings)
        if warning is not None:
            service.metrics.fallbacks.inc()
        return await _aside(_written_bytes(self.asked) > SMALL_BYTES, self.write, self.asked, answered, warning)


async def _aside(slow: bool, work: Callable[..., T], *args: Any) -> T:
    """work(*args), in a thread if it is slow: it must not keep the other requests waiting.

    What is not is done sooner than a thread of a busy process takes it up (≈1 ms of 6 per request saved).
    """
    return await asyncio.to_thread(work, *args) if slow else work(*args)


def _is_slow_to_read(raw: bytes) -> bool:
    """True for a large body, and for one that may name a calendar: the first use of each takes up to 4 s."""
    # The key may be written with an escape.
    return len(raw) > SMALL_BYTES or b"calendar" in raw or b"\\u" in raw


def _written_bytes(asked: Asked) -> int:
    """About how large an answer is, and what it is made from: every number of paths, mean and quantiles, in float64."""
    tables = 1 + len(getattr(asked.body, "quantiles", ()))
    rows = sum((tables + item.task.sampling.samples) * item.task.series.horizon for item in asked.items)
    return rows * len(COLUMNS) * 8


def encode(answer: Any) -> bytes:
    """JSON on one line. Raises ValueError for NaN and infinity: better an error that is logged than what none can read.

    "One line" for clients too that take every line break of Unicode for one, as httpx does where it reads a stream.
    """
    written = to_json(answer, inf_nan_mode="constants")  # seven times as fast as json.dumps
    if b"NaN" in written or b"Infinity" in written:
        # A number, or no more than a name.
        return json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()
    for mark, escaped in LINE_BREAKS.items():
        written = written.replace(mark, escaped)
    return written


def timing_of(done: Done) -> str:
    return timing(done.queue_ms, done.batch_ms, done.compute_ms)


def timing(queue_ms: float, batch_ms: float, compute_ms: float) -> str:
    """The value of Server-Timing."""
    return f"queue;dur={queue_ms:.2f}, batch;dur={batch_ms:.2f}, compute;dur={compute_ms:.2f}"


def _bars_bytes(asked: Asked, bars: Bars) -> bytes:
    return encode(bars_json(asked.body, asked.items, bars))


def _require_table(asked: Asked) -> None:
    """Raises ServiceError if the answer cannot be one Arrow table."""
    if asked.stream:
        text = f"a stream is server-sent events: leave stream out, or do not Accept {ARROW}"
        raise invalid_fields([FieldError(("stream",), "unknown_value", text)])
    seen: set[str | None] = set()
    for index, item in enumerate(asked.items):
        if item.id in seen:
            text = "another series has this id, or this place where an id is absent: a table tells series apart by it"
            raise invalid_fields([FieldError(("series", index, "id"), "duplicate", text)])
        seen.add(item.id)
        if (item.offset is None) != (asked.items[0].offset is None):
            text = "has a UTC offset where the first series has none, or the reverse: one Arrow column cannot hold both"
            raise invalid_fields([FieldError(("series", index, "timestamps"), "mixed_time_zones", text)])


def _preferred_group(request: Request) -> str | None:
    group = request.headers.get("x-kronos-device")
    if group is not None and group not in ("cpu", "gpu"):
        fault = FieldError(("header", "X-Kronos-Device"), "unknown_value", "must be cpu or gpu")
        raise invalid_fields([fault])
    return group
