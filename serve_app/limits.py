"""How often one client may ask."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable


class RateLimiter:
    """A token bucket per client: `per_minute` requests at once, refilled evenly over a minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic, max_clients: int = 10_000) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._max_clients = max_clients
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, client: str) -> float:
        """0 and one token taken if the client may go on; else the seconds until it may, and nothing is taken."""
        now = self._clock()
        tokens, then = self._buckets.pop(client, (float(self.per_minute), now))
        tokens = min(float(self.per_minute), tokens + (now - then) * self.per_minute / 60.0)
        wait = 0.0 if tokens >= 1.0 else (1.0 - tokens) * 60.0 / self.per_minute
        self._buckets[client] = (tokens - 1.0 if wait == 0.0 else tokens, now)
        # The client seen longest ago goes first: its bucket is the likeliest to be full again.
        if len(self._buckets) > self._max_clients:
            self._buckets.popitem(last=False)
        return wait
