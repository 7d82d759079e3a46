"""How often, and how much at once, one client may ask. Counted per ingress process."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from serve_app.config import Limits
from serve_app.errors import ServiceError


class RateLimiter:
    """A token bucket per client: as many requests at once as it has in a minute, refilled evenly over a minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, max_clients: int = 10_000) -> None:
        self._clock = clock
        self._max_clients = max_clients
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, client: str, per_minute: int) -> float:
        """0 and one token taken if the client may go on; else the seconds until it may, and nothing is taken."""
        now = self._clock()
        tokens, then = self._buckets.pop(client, (float(per_minute), now))
        tokens = min(float(per_minute), tokens + (now - then) * per_minute / 60.0)
        wait = 0.0 if tokens >= 1.0 else (1.0 - tokens) * 60.0 / per_minute
        self._buckets[client] = (tokens - 1.0 if wait == 0.0 else tokens, now)
        # The client seen longest ago goes first: its bucket is the likeliest to be full again.
        if len(self._buckets) > self._max_clients:
            self._buckets.popitem(last=False)
        return wait


class ClientLimits:
    """Lets a forecast request in, or refuses it with 429."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._rates = RateLimiter()
        self._running: Counter[str] = Counter()
        self._body_bytes = 0

    def require_rate(self, client: str, per_minute: int | None = None) -> None:
        """Counts one request of a client; per_minute: its own limit, 0 for none. Raises ServiceError rate_limited."""
        if not self.limits.security_enabled:
            return
        limit = self.limits.rate_limit_per_minute if per_minute is None else per_minute
        if limit and (wait := self._rates.wait_s(client, limit)) > 0:
            raise ServiceError("rate_limited", f"over the limit of {limit} requests a minute", retry_after_s=wait)

    @contextmanager
    def slot(self, client: str, concurrent: int | None = None) -> Iterator[None]:
        """Holds one of the client's places; concurrent: its own number of them, 0 for no limit.

        Raises ServiceError concurrency_limited.
        """
        limits = self.limits
        own = limits.max_concurrent_per_client if concurrent is None else concurrent
        if own and limits.security_enabled and self._running[client] >= own:
            raise ServiceError("concurrency_limited", f"over the limit of {own} requests at once: wait for one to end")
        if self._running.total() >= limits.max_concurrent:
            message = f"the service is answering {limits.max_concurrent} requests already"
            raise ServiceError("queue_full", message)
        self._running[client] += 1
        try:
            yield
        finally:
            self._running[client] -= 1
            if not self._running[client]:
                del self._running[client]

    @contextmanager
    def body(self) -> Iterator[Callable[[int], None]]:
        """Yields what counts the bytes of one body as they arrive; they count until the context ends.

        It raises ServiceError queue_full for bytes that would be too many together with those of other requests.
        """
        taken = 0

        def take(count: int) -> None:
            nonlocal taken
            others = self._body_bytes - taken
            if others and self._body_bytes + count > self.limits.max_bodies_mb * 2**20:
                message = (
                    f"the bodies of the requests in work fill {self.limits.max_bodies_mb:g} MB: send fewer at once"
                )
                raise ServiceError("queue_full", message)
            taken += count
            self._body_bytes += count

        try:
            yield take
        finally:
            self._body_bytes -= taken
