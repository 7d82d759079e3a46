"""Server-sent events: a forecast that is told while it is computed.

Events, in this order: `bars` (bars that are final, of one series), any number of them; then `answer`, the body that the
same request has without `stream`, or `error`, the body of an error. The stream ends after either.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve_app.connection import until_gone

EVENT_STREAM = "text/event-stream"


def event(name: str, data: bytes, comment: str = "") -> bytes:
    """One event. data: JSON without line breaks. comment: a line for people, which clients skip."""
    head = f": {comment}\n" if comment else ""
    return f"{head}event: {name}\ndata: ".encode() + data + b"\n\n"


class EventStream(StreamingResponse):
    """Sends events as they come. Closes them, and what is held for them, when the client leaves or all are sent."""

    def __init__(
        self, first: bytes, events: AsyncIterator[bytes], held: AsyncExitStack, headers: Mapping[str, str]
    ) -> None:
        # Proxies in between must neither store nor collect events.
        given = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers}
        super().__init__(events, headers=given, media_type=EVENT_STREAM)
        self._first = first
        self._events = events
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            await until_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        async for chunk in self._events:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
