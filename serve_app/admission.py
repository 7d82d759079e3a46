"""How much work may be under way in a group: decided from counters, at once, before anything is sent. No Ray.

Work is rows × steps (serve_app.jobs.Job.work): a request for 100 paths weighs a hundred times as much as one for one.
Two bounds hold: an absolute one per replica; and one in seconds, from the rate at which work came back lately, once
there is so much of it that more at a time would not come back faster.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

RATE_WINDOW_S = 30.0
PRESSED_WINDOW_S = 5.0
"""The same for a group that has had much to do for as long: where its host slows down, the bound in seconds must follow
sooner than in half a minute. Without pressure so few seconds say what was asked for, not what could be done."""
PRESSED_SHARE = 0.75
"""Of the bound in seconds, what is much to do: above LARGEST_SHARE, so that no job is it alone."""
UNKNOWN_RETRY_S = 5.0
"""Told to a client as long as nothing has been measured."""
LARGEST_SHARE = 0.5
"""Of the bound in seconds, what one job may take up: the engine computes jobs side by side, so behind a huge one the
others do not have to wait for all of it."""
SHORTEST_BUSY_S = 0.05
ENOUGH_JOBS, ENOUGH_BUSY_S = 32, 10.0
"""Either makes a rate that work is refused by: the first jobs after a start pay for the warming up, and where replicas
are exchanged for all the others that start. With 8 jobs an update refused more of the requests meanwhile."""


@dataclass(eq=False)
class Booking:
    """A job that is under way. series: how many. busy_s: for how long its group had been busy when it came (_Busy)."""

    group: str
    work: int
    series: int
    busy_s: float


class _Busy:
    """For how long a group has been busy, in seconds; those in which only some of its replicas can have had a job
    count for as much less. Otherwise a few requests at a time would make the group look as slow as one replica.

    Replicas are taken to have processors of their own: those that share them look faster, until there is much to do.
    """

    def __init__(self, now: float) -> None:
        self._seconds, self._since, self._share = 0.0, now, 0.0

    def seconds(self, now: float) -> float:
        return self._seconds + self._share * (now - self._since)

    def change(self, now: float, share: float) -> None:
        """share: of the replicas, at most, that are busy from now on."""
        self._seconds, self._since, self._share = self.seconds(now), now, share


class _Least:
    """The least value among the newest ones of a queue, in constant time."""

    def __init__(self) -> None:
        self._candidates: deque[float] = deque()  # each before any that is less and after it

    def add(self, value: float) -> None:
        while self._candidates and self._candidates[-1] > value:
            self._candidates.pop()
        self._candidates.append(value)

    def drop(self, value: float) -> None:
        """value: of the oldest."""
        if self._candidates[0] == value:
            self._candidates.popleft()

    def __call__(self) -> float:
        return self._candidates[0]


class _Finished:
    """The jobs that came back in the last RATE_WINDOW_S. Asked at every request, so it adds up nothing then."""

    def __init__(self) -> None:
        self._jobs: deque[tuple[float, Booking]] = deque()
        self.work = 0
        self.least_work, self.least_busy_s = _Least(), _Least()

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, now: float, booking: Booking) -> None:
        self._jobs.append((now, booking))
        self.work += booking.work
        self.least_work.add(booking.work)
        self.least_busy_s.add(booking.busy_s)

    def forget(self, now: float) -> None:
        """What is too old by now."""
        while self._jobs and self._jobs[0][0] < now - RATE_WINDOW_S:
            _, booking = self._jobs.popleft()
            self.work -= booking.work
            self.least_work.drop(booking.work)
            self.least_busy_s.drop(booking.busy_s)


class _Pressed:
    """The jobs that came back in the last PRESSED_WINDOW_S from a group that has had much to do since before them.

    ENOUGH_JOBS of them whatever their age: the slower the host has become, the longer they take.
    """

    def __init__(self) -> None:
        self._jobs: deque[tuple[float, int]] = deque()
        self._work = 0

    def add(self, now: float, work: int) -> None:
        self._jobs.append((now, work))
        self._work += work
        self._forget(now)

    def _forget(self, now: float) -> None:
        while len(self._jobs) > ENOUGH_JOBS and self._jobs[0][0] < now - PRESSED_WINDOW_S:
            self._work -= self._jobs.popleft()[1]

    def clear(self) -> None:
        self._jobs.clear()
        self._work = 0

    def rate(self, now: float) -> float | None:
        """Work per second since the first of them came back; None as long as there are not enough."""
        self._forget(now)
        if len(self._jobs) < ENOUGH_JOBS:
            return None
        since, work = self._jobs[0]
        return (self._work - work) / max(SHORTEST_BUSY_S, now - since)


class Admission:
    """What one ingress replica has sent to each group and not got back, against the groups' bounds."""

    def __init__(
        self,
        bounds: Mapping[str, int],
        max_wait_s: Mapping[str, float],
        workers: Mapping[str, int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """bounds: group → work that may wait or run per live replica. max_wait_s: group → the same in seconds.

        workers: group → series that a replica computes side by side; the bound in seconds holds from there on.
        """
        self.bounds, self.max_wait_s, self.workers = dict(bounds), dict(max_wait_s), dict(workers)
        self._clock = clock
        self._bookings: dict[str, set[Booking]] = {name: set() for name in bounds}
        self._own: Counter[str] = Counter()
        self._finished = {name: _Finished() for name in bounds}
        self._pressed = {name: _Pressed() for name in bounds}
        self._busy = {name: _Busy(clock()) for name in bounds}
        self._replicas = dict.fromkeys(bounds, 1)

    def outstanding(self, group: str) -> int:
        """Work that this process has in the group."""
        return self._own[group]

    def has_room(self, group: str, work: int, replicas: int, others: int) -> bool:
        """others: work that other ingress replicas have there. An idle group takes a job of any size."""
        return self._room(group, work, replicas, others) >= 1

    def _room(self, group: str, work: int, replicas: int, others: int) -> float:
        """How many more jobs of one series and so much work the group takes."""
        busy, replicas = self._own[group] + others, max(1, replicas)
        by_bound = (self.bounds[group] * replicas - busy) // max(1, work)
        side_by_side = self.workers[group] * replicas - sum(booking.series for booking in self._bookings[group])
        by_time = 0.0
        if (wait := self.wait_s(group)) <= self.max_wait_s[group]:
            rate = self.rate(group) if self._rate_is_known(group) else None
            by_time = math.inf if rate is None else 1 + (self.max_wait_s[group] - wait) * rate // max(1, work)
        return max(0 if busy else 1, min(by_bound, max(side_by_side, by_time)))

    def places(self, group: str, replicas: int, others: int) -> int:
        """Small jobs that the group may have under way: those that are there, and those that it still takes."""
        small = self.small_work(group)
        return len(self._bookings[group]) + others // small + int(self._room(group, small, replicas, others))

    def small_work(self, group: str) -> int:
        """Of the smallest job under way or finished lately; at most a hundredth of the bound: huge jobs say nothing."""
        smallest = [self._most_small(group), *(booking.work for booking in self._bookings[group])]
        if finished := self._finished[group]:
            smallest.append(int(finished.least_work()))
        return max(1, min(smallest))

    def _most_small(self, group: str) -> int:
        return max(1, self.bounds[group] // 100)

    def crowded(self, group: str, replicas: int, others: int) -> bool:
        """Whether even a small job would find no room."""
        # Asked before every request. As a rule there is room for the largest small job, and no need to look at each.
        if self.has_room(group, self._most_small(group), replicas, others):
            return False
        return not self.has_room(group, self.small_work(group), replicas, others)

    def start(self, group: str, work: int, series: int, replicas: int) -> Booking:
        """Books a job; give what it returns to end(). replicas: live ones of the group."""
        booking = Booking(group, work, series, self._busy[group].seconds(self._clock()))
        self._bookings[group].add(booking)
        self._own[group] += work
        self._replicas[group] = max(1, replicas)
        self._note_share(group)
        return booking

    def end(self, booking: Booking, *, computed: bool) -> None:
        """computed: the work was done, rather than cancelled or refused; it counts for the rate."""
        group = booking.group
        if self.wait_s(group) < PRESSED_SHARE * self.max_wait_s[group]:
            self._pressed[group].clear()
        elif computed:
            self._pressed[group].add(self._clock(), booking.work)
        if computed:
            self._finished[group].add(self._clock(), booking)
        # Here too, and not only where the rate is asked for: without pressure nobody asks.
        self._finished[group].forget(self._clock())
        self._bookings[group].remove(booking)
        self._own[group] -= booking.work
        self._note_share(group)

    def _note_share(self, group: str) -> None:
        self._busy[group].change(self._clock(), min(1.0, len(self._bookings[group]) / self._replicas[group]))

    def rate(self, group: str) -> float | None:
        """Work that came back per busy second (_Busy), over the last RATE_WINDOW_S; None if nothing did.

        Or under pressure lately, if that is less.
        """
        finished = self._finished[group]
        finished.forget(self._clock())
        if not finished:
            return None
        rate = finished.work / max(SHORTEST_BUSY_S, self._measured_s(group))
        pressed = self._pressed[group].rate(self._clock())
        return rate if pressed is None else min(rate, pressed)

    def _measured_s(self, group: str) -> float:
        """Busy seconds behind the rate."""
        return self._busy[group].seconds(self._clock()) - self._finished[group].least_busy_s()

    def wait_s(self, group: str) -> float:
        """Seconds of work under way; 0 as long as too little has been measured."""
        rate = self.rate(group)
        if rate is None or not self._rate_is_known(group):
            return 0.0
        largest = LARGEST_SHARE * self.max_wait_s[group] * rate
        return sum(min(booking.work, largest) for booking in self._bookings[group]) / rate

    def _rate_is_known(self, group: str) -> bool:
        """Whether enough has been measured to refuse work by it."""
        finished = self._finished[group]
        return len(finished) >= ENOUGH_JOBS or (bool(finished) and self._measured_s(group) >= ENOUGH_BUSY_S)

    def retry_after_s(self, group: str, work: int, replicas: int, others: int) -> float:
        """When there should be room again, 1 to 30 s: the excess over either bound at the measured rate."""
        rate = self.rate(group)
        if rate is None:
            return UNKNOWN_RETRY_S
        excess = self._own[group] + others + work - self.bounds[group] * max(1, replicas)
        return min(30.0, max(1.0, excess / rate, self.wait_s(group) - self.max_wait_s[group]))
