"""How many replicas a group should have: as much as its work asks for, no more than the cluster's GPUs hold.

Runs in Serve's controller, a few times a second. Ray pickles this module by value, so it holds no state of its own, and
imports what is ours inside the method that needs it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

REFRESH_S = 1.0


class GroupScaling:
    """A Serve autoscaling policy. Serve keeps the result between the deployment's min_replicas and max_replicas."""

    def __init__(
        self,
        minimum: int,
        maximum: int,
        target_work: int | None = None,
        num_gpus: float | None = None,
        upscale_delay_s: float = 0.0,
        downscale_delay_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """target_work: rows × steps that one replica should have; None keeps `maximum` whatever the work is.

        num_gpus: per replica; the cluster's GPUs are then an upper bound, to which no delay applies.
        """
        self._minimum, self._maximum = minimum, maximum
        self._target_work = target_work
        self._num_gpus = num_gpus
        self._upscale_delay_s, self._downscale_delay_s = upscale_delay_s, downscale_delay_s
        self._clock = clock
        self._history: deque[tuple[float, int]] = deque()
        self._slots = 0
        self._slots_at = -math.inf

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        """ctx: ray.serve.config.AutoscalingContext. Returns (replicas, the state that Serve keeps, which is none)."""
        wanted = self._maximum if self._target_work is None else self._by_work(ctx)
        if self._num_gpus is not None:
            wanted = min(wanted, self._gpu_slots())
        return wanted, {}

    def _by_work(self, ctx: Any) -> int:
        """What the work asks for, once it has asked for as many, or as few, for the time of the delays."""
        now = self._clock()
        work = sum(_latest(series) for series in (ctx.raw_metrics or {}).get("work", {}).values())
        waiting = 1 if (ctx.total_queued_requests or 0) > 0 else 0
        asked = max(math.ceil(work / (self._target_work or 1)), waiting)
        self._history.append((now, max(self._minimum, min(self._maximum, asked))))
        longest = max(self._upscale_delay_s, self._downscale_delay_s)
        while len(self._history) > 1 and self._history[1][0] <= now - longest:
            self._history.popleft()
        current = ctx.target_num_replicas
        lowest = min(self._over(now - self._upscale_delay_s))
        highest = max(self._over(now - self._downscale_delay_s))
        # From nothing to something there is no delay: somebody waits.
        if current == 0:
            return self._history[-1][1]
        return lowest if lowest > current else min(current, highest)

    def _over(self, since: float) -> list[int]:
        """What was asked for from a moment on, with what held at that moment."""
        before = [replicas for at, replicas in self._history if at <= since]
        return before[-1:] + [replicas for at, replicas in self._history if at > since]

    def _gpu_slots(self) -> int:
        if self._clock() - self._slots_at >= REFRESH_S:
            import ray

            from cluster.plan import gpu_slots

            self._slots = gpu_slots(ray.cluster_resources().get("GPU", 0.0), self._num_gpus or 1.0)
            self._slots_at = self._clock()
        return self._slots


def _latest(series: Any) -> float:
    """The newest value of one replica's time series."""
    return float(series[-1].value) if series else 0.0
