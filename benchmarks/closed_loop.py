"""Closed-loop load: so many clients, each sending its next request when it has its answer. For what a server can do at
best; how it does under a given rate is open_loop's question."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Sequence

import aiohttp
import numpy as np


async def drive(url: str, bodies: Sequence[bytes], clients: int, seconds: float) -> dict[str, float | str]:
    """requests/s, p50 and p99 in ms, and the statuses, of one route's url.

    A client that is refused with 429 asks again when it is told to; its request counts once, from the first try on.
    """
    latencies: list[float] = []
    statuses: Counter[str] = Counter()
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3600)) as session:
        started = time.monotonic()
        end = started + seconds

        async def client(number: int) -> None:
            turn = number
            while turn < clients or time.monotonic() < end:  # everybody once at least
                begun = time.monotonic()
                body = bodies[turn % len(bodies)]
                turn += clients
                while True:
                    async with session.post(url, data=body, headers={"content-type": "application/json"}) as response:
                        await response.read()
                    statuses[str(response.status)] += 1
                    if response.status != 429:
                        break
                    await asyncio.sleep(float(response.headers["retry-after"]))
                latencies.append(time.monotonic() - begun)

        await asyncio.gather(*(client(i) for i in range(clients)))
        # To the last answer: with few and long requests the end of the period would cut into one.
        took = time.monotonic() - started
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000
    return {
        "clients": clients,
        "per s": round(len(latencies) / took, 2),
        "p50 ms": round(float(p50), 1),
        "p99 ms": round(float(p99), 1),
        "statuses": " ".join(f"{status}:{count}" for status, count in sorted(statuses.items())),
    }
