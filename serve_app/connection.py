"""The client's end of a request: work goes on only as long as somebody waits for it.

Ray's proxy cancels a request whose client has left, unless that client sent `x-request-disconnect-disabled`; so the
ingress watches the connection itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed the connection before the answer was out."""


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. Its body must have been read: from then on the client sends nothing but its end.

    Raises ClientGoneError once the client closes the connection; work is cancelled and over by then.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_closed(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        watch.result()
        raise ClientGoneError
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _closed(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
