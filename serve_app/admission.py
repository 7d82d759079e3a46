"""How much work may be under way in a group: decided from counters, at once, before anything is sent. No Ray.

Work is rows × steps (serve_app.jobs.Job.work): a request for 100 paths weighs a hundred times as much as one for one.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping

RATE_WINDOW_S = 30.0
UNKNOWN_RETRY_S = 5.0
"""Told to a client as long as nothing has been measured."""


class Admission:
    """What one ingress replica has sent to each group and not got back, against the groups' bounds."""

    def __init__(self, bounds: Mapping[str, int], clock: Callable[[], float] = time.monotonic) -> None:
        """bounds: group → work that may wait or run per live replica."""
        self.bounds = dict(bounds)
        self._clock = clock
        self._own: Counter[str] = Counter()
        self._finished: dict[str, deque[tuple[float, int]]] = {name: deque() for name in bounds}

    def outstanding(self, group: str) -> int:
        """Work that this process has in the group."""
        return self._own[group]

    def has_room(self, group: str, work: int, replicas: int, others: int) -> bool:
        """others: work that other ingress replicas have there. An idle group takes a job of any size."""
        busy = self._own[group] + others
        return busy == 0 or busy + work <= self.bounds[group] * max(1, replicas)

    def start(self, group: str, work: int) -> None:
        self._own[group] += work

    def end(self, group: str, work: int, *, computed: bool) -> None:
        """computed: the work was done, rather than cancelled or refused; it counts for the rate."""
        self._own[group] -= work
        if computed:
            self._finished[group].append((self._clock(), work))

    def rate(self, group: str) -> float | None:
        """Work per second that came back over the last RATE_WINDOW_S; None if nothing did."""
        finished, now = self._finished[group], self._clock()
        while finished and finished[0][0] < now - RATE_WINDOW_S:
            finished.popleft()
        if not finished:
            return None
        return sum(work for _, work in finished) / max(1.0, now - finished[0][0])

    def retry_after_s(self, group: str, work: int, replicas: int, others: int) -> float:
        """When there should be room again: the excess over the measured rate, 1 to 30 s."""
        rate = self.rate(group)
        if not rate:
            return UNKNOWN_RETRY_S
        excess = self._own[group] + others + work - self.bounds[group] * max(1, replicas)
        return min(30.0, max(1.0, excess / rate))
