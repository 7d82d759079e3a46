"""Thousands of mixed requests, and what the processes hold afterwards.

    make soak ARGS="--quick"
    python benchmarks/soak.py [--requests 20000] [--quick]

Forecasts of many shapes, batches, bad input, clients that leave, probes and scrapes. Memory, open files and threads of
replicas, ingress and proxy are read every tenth of the way; from the third reading on they must be flat. Until then
caches and pools of allocators fill. The engine's cache is small here, so that all its pages are touched early.

Results go to benchmarks/results/DATE-soak.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import aiohttp
import numpy as np

from benchmarks import inputs, records
from benchmarks.load import forecast_body, idle
from benchmarks.service import Service, bundled_config

CLIENTS = 8
CACHE_GB = 0.05
READINGS = 10
SETTLED = 2
GROWTH_MB = 16.0
"""Allowed between the mean of the first readings after SETTLED and that of the last."""
GROWTH_FILES = 8
GROWTH_THREADS = 4


def mixed(index: int) -> tuple[str, str, bytes, dict[str, str], float]:
    """(method, path, body, headers, patience in s)."""
    dice = random.Random(index)
    kind = dice.random()
    headers = {"content-type": "application/json"}
    if kind < 0.05:
        return "GET", dice.choice(("/v1/metrics", "/v1/readyz", "/v1/replicas", "/v1/models")), b"", {}, 60
    if kind < 0.25:
        return *inputs.generated(dice), 60
    history, horizon, samples = dice.choice((8, 33, 64, 200)), dice.choice((1, 4, 16)), dice.choice((1, 1, 3, 10))
    body = forecast_body(index % 1000, history, horizon, samples=samples)
    body["series"] *= dice.choice((1, 1, 1, 4))
    patience = dice.uniform(0.005, 0.1) if kind < 0.3 else 60
    return "POST", "/v1/forecast", json.dumps(body).encode(), headers, patience


async def send(url: str, indices: Iterator[int], statuses: Counter[str]) -> None:
    """CLIENTS clients share the requests."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:

        async def client() -> None:
            for index in indices:
                method, path, body, headers, patience = mixed(index)
                status = "left"
                try:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(patience):
                            async with session.request(method, url + path, data=body, headers=headers) as response:
                                await response.read()
                                status = str(response.status)
                except aiohttp.ClientError as error:
                    status = type(error).__name__
                statuses[status] += 1

        await asyncio.gather(*(client() for _ in range(CLIENTS)))


def reading(service: Service) -> dict[str, tuple[float, int, int]]:
    """kind → (MB that no other process shares, files, threads), summed over the processes of the kind."""
    found = {}
    for kind in ("replica", "ingress", "proxy"):
        processes = service.processes(kind)
        if not processes:
            continue
        held = [(one.memory_full_info().uss / 2**20, one.num_fds(), one.num_threads()) for one in processes]
        memory, files, threads = (sum(column) for column in zip(*held, strict=True))
        found[kind] = (round(memory, 1), int(files), int(threads))
    return found


def row(kind: str, readings: list[tuple[float, int, int]]) -> dict[str, Any]:
    values = np.array(readings[SETTLED:], dtype=float)
    third = max(1, len(values) // 3)
    grown = values[-third:].mean(axis=0) - values[:third].mean(axis=0)
    limits = {"memory": GROWTH_MB, "files": GROWTH_FILES, "threads": GROWTH_THREADS}
    missed = [name for (name, limit), growth in zip(limits.items(), grown, strict=True) if growth > limit]
    columns = zip(("MB", "files", "threads"), zip(*readings, strict=True), strict=True)
    return {
        "case": kind,
        **{name: " ".join(f"{value:g}" for value in column) for name, column in columns},
        "grown": " ".join(f"{growth:+.1f}" for growth in grown),
        "shown": "yes" if not missed else "NO: " + ", ".join(missed),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--quick", action="store_true", help="1,000 requests: shows that it runs, hardly a leak")
    parser.add_argument("--fast", action="store_true", help="HAProxy, see docs/operations.md")
    options = parser.parse_args()
    count = 1000 if options.quick else options.requests
    statuses: Counter[str] = Counter()
    readings: dict[str, list[tuple[float, int, int]]] = {}
    started = time.monotonic()
    with Service(bundled_config(2, cpu={"cache_gb": CACHE_GB}), options=["--fast"] if options.fast else []) as service:
        pids = {process.pid for process in service.processes("replica")}
        for part in range(READINGS):
            indices = iter(range(part * count // READINGS, (part + 1) * count // READINGS))
            asyncio.run(send(service.url, indices, statuses))
            idle(service.url)
            now = reading(service)
            for kind, held in now.items():
                readings.setdefault(kind, []).append(held)
            print(f"# {part + 1}/{READINGS}: {dict(statuses)} {now}", file=sys.stderr, flush=True)
        restarted = pids != {process.pid for process in service.processes("replica")}
    rows = [row(kind, held) for kind, held in readings.items()]
    fine = {status for status in statuses if status == "left" or (status.isdecimal() and int(status) < 500)}
    wrong = {status: number for status, number in statuses.items() if status not in fine}
    rows.append(
        {
            "case": f"{count} requests in {time.monotonic() - started:.0f} s",
            "grown": " ".join(f"{status}:{number}" for status, number in sorted(statuses.items())),
            "shown": "yes" if not wrong and not restarted else f"NO: {wrong or 'a replica restarted'}",
        }
    )
    print(records.table(rows))
    path = records.write("soak", rows, requests=count)
    print(f"written to {path.relative_to(path.parents[2])}")
    return 1 if any(str(one["shown"]).startswith("NO") for one in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
