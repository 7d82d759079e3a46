"""What Ray's HTTP proxy takes off a request before it looks at it.

Any client may send headers that Ray reads as orders: to drop its time limit, or to go on computing for one that has
left. The ingress keeps its own deadlines and watches the connection itself, so neither does harm; here they end at the
door. And an X-Request-ID that we would not take goes too, because Ray sends back whatever it was given.

Ray loads this where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve_app.proxy:middlewares is set when it starts.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.middleware import usable_request_id

DROPPED = frozenset(
    {
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id",
    }
)


class ClientHeaders:
    """Passes a request on without the headers that are none of the client's business."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if "headers" in scope:
            dropped = DROPPED
            if len(given := Headers(scope=scope).getlist("x-request-id")) != 1 or not usable_request_id(given[0]):
                dropped |= {b"x-request-id"}
            kept = [(name, value) for name, value in scope["headers"] if name.lower() not in dropped]
            scope = {**scope, "headers": kept}
        await self.app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """Called by Ray in every proxy."""
    return [Middleware(ClientHeaders)]
