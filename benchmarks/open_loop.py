"""Open-loop load: requests leave at their intended times, whatever the answers do, and latency counts from there.

A closed loop (send, wait, send) asks less of a server that is slow, and then measures less of its slowness.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

CONNECT_RETRY_S = 0.2
CONNECT_PATIENCE_S = 10.0


@dataclass
class Shot:
    """One request. Times are seconds from the start of the run; status 0: no answer came, `error` says why.

    late: seconds after the intended time at which the generator itself came to send it: its machine had no time for it.
    """

    index: int
    intended: float
    ended: float = 0.0
    status: int = 0
    error: str = ""
    retry_after: str | None = None
    digest: str = ""
    tries: int = 0
    late: float = 0.0

    @property
    def latency(self) -> float:
        return self.ended - self.intended

    @property
    def ok(self) -> bool:
        return self.status == 200


@dataclass
class Run:
    """All shots of one run, and what they were sent with. started: time.monotonic() at time 0 of the shots."""

    rate: float
    seconds: float
    started: float
    shots: list[Shot] = field(default_factory=list)

    @property
    def failed(self) -> list[Shot]:
        return [shot for shot in self.shots if not shot.ok]

    @property
    def goodput(self) -> float:
        """Answers 200 per second, until the last of them."""
        ended = [shot.ended for shot in self.shots if shot.ok]
        return len(ended) / max(self.seconds, *ended, 1e-9)

    def statuses(self) -> dict[str, int]:
        return dict(sorted(Counter(str(shot.status or shot.error) for shot in self.shots).items()))

    def percentiles(self, of: Callable[[Shot], bool] = lambda shot: shot.ok) -> dict[str, float]:
        """Milliseconds of latency: p50, p99, p99.9, max. NaN where nothing is."""
        values = [1000 * shot.latency for shot in self.shots if of(shot)] or [float("nan")]
        points = np.percentile(values, [50, 99, 99.9, 100])
        return {
            name: round(float(value), 1) for name, value in zip(("p50", "p99", "p99.9", "max"), points, strict=True)
        }

    @property
    def late_p99_ms(self) -> float:
        """What the generator's own machine adds to latencies: no percentile of theirs can be read more finely."""
        return round(1000 * float(np.percentile([shot.late for shot in self.shots], 99)), 1)

    def in_flight(self, moment: float) -> int:
        """Requests that were under way at a time.monotonic()."""
        at = moment - self.started
        return sum(shot.intended <= at <= shot.ended for shot in self.shots)


def digest(answer: bytes) -> str:
    """Of a forecast's numbers alone: a warning about a lost replica must not look like another forecast."""
    return hashlib.sha256(answer.partition(b'"series":')[2] or answer).hexdigest()[:16]


@contextlib.contextmanager
def going_first() -> Iterator[None]:
    """Gives this thread the processor whenever it asks for it, where the system lets it; what it starts, as usual.

    The clients that it stands for are on other machines. On one machine the kernel shares processors out between
    sessions first, and let a generator wait for up to a second while a loaded service computed in its own.
    """
    if sys.platform != "linux":
        yield
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


async def fire(
    url: str,
    bodies: Sequence[bytes],
    rate: float,
    seconds: float,
    *,
    retry: bool = False,
    timeout_s: float = 60.0,
    path: str = "/v1/forecast",
    during: Callable[[Run], Any] | None = None,
) -> Run:
    """rate × seconds requests, evenly spaced; body i % len(bodies).

    retry: as a careful client does, send once more if the connection is lost, if a 5xx is not the service's but of
    Ray's proxy, which lost its ingress, or when the service says to come back later; and knock for up to
    CONNECT_PATIENCE_S if the connection is refused. during: a coroutine function that runs beside the load.
    """
    count = max(1, round(rate * seconds))
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    connector = aiohttp.TCPConnector(limit=0)
    with going_first():
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            run = Run(rate, seconds, time.monotonic())
            beside = asyncio.ensure_future(during(run)) if during is not None else None
            tasks = []
            for index in range(count):
                shot = Shot(index, index / rate)
                run.shots.append(shot)
                await asyncio.sleep(max(0.0, run.started + shot.intended - time.monotonic()))
                shot.late = time.monotonic() - run.started - shot.intended
                body = bodies[index % len(bodies)]
                tasks.append(asyncio.ensure_future(_shoot(session, url + path, body, shot, run.started, retry)))
            await asyncio.gather(*tasks)
            if beside is not None:
                await beside
    return run


async def _shoot(
    session: aiohttp.ClientSession, url: str, body: bytes, shot: Shot, started: float, retry: bool
) -> None:
    patience = time.monotonic() + CONNECT_PATIENCE_S
    while True:
        shot.tries += 1
        shot.status = 0
        try:
            async with session.post(url, data=body, headers={"content-type": "application/json"}) as response:
                answer = await response.read()
                shot.status, shot.retry_after = response.status, response.headers.get("retry-after")
                shot.digest = digest(answer)
            lost = response.status >= 500 and b'"error"' not in answer
            if not (retry and shot.tries == 1 and (lost or shot.retry_after)):
                break
            await asyncio.sleep(float(shot.retry_after or 0))
        except aiohttp.ClientConnectorError as error:
            # Nothing was sent.
            shot.error = type(error).__name__
            if not retry or time.monotonic() > patience:
                break
            shot.tries -= 1
            await asyncio.sleep(CONNECT_RETRY_S)
        except (aiohttp.ClientError, TimeoutError) as error:
            shot.error = type(error).__name__
            if not retry or shot.tries == 2:
                break
            # A process that is being killed takes connections a few milliseconds more, only to reset them.
            await asyncio.sleep(CONNECT_RETRY_S)
    shot.ended = time.monotonic() - started
