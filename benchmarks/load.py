"""How much the service takes, and what it does with three times as much.

    make load ARGS="--quick"
    python benchmarks/load.py [--quick] [--replicas 2] [--url URL]

C = the highest rate at which every answer is 200 and p99 stays below 1 s: the bundled model, 64 bars of history, 8 to
forecast, one path, on --replicas CPU replicas. Then 3 C for 60 s, and the quiet afterwards. Open loop, latency from the
intended send time; see open_loop. Starts a service of its own unless --url names one.

Results go to benchmarks/results/DATE-load.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx

from benchmarks import records
from benchmarks.open_loop import Run, Shot, fire
from benchmarks.service import Service, bundled_config
from model.types import COLUMNS

HISTORY, HORIZON = 64, 8
P99_LIMIT_MS = 1000.0
REFUSAL_LIMIT_MS = 50.0
ADMITTED_LIMIT_MS = 5000.0
OVERLOAD = 3.0
GOODPUT_SHARE = 0.9
FIRST_RATE, STEP = 16.0, 1.4


def forecast_body(index: int, history: int = HISTORY, horizon: int = HORIZON, **settings: Any) -> dict[str, Any]:
    """A body of /v1/forecast over five-minute candles of a random walk; series and seed follow from the index."""
    from benchmarks.shapes import random_series  # brings torch, which the tests of the generator need not load

    candles = random_series(history, 1, index % 16).candles.astype(float).round(6)
    start = 1_704_067_200
    stamps = [time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start + 300 * i)) for i in range(history + horizon)]
    series: dict[str, Any] = {name: candles[:, i].tolist() for i, name in enumerate(COLUMNS)}
    series |= {"timestamps": stamps[:history], "future_timestamps": stamps[history:]}
    return {"series": [series], "seed": index, **settings}


def bodies(count: int = 500, **settings: Any) -> list[bytes]:
    return [json.dumps(forecast_body(index, **settings)).encode() for index in range(count)]


def idle(url: str, timeout_s: float = 60.0) -> None:
    """Waits until no replica has anything to do. Raises TimeoutError."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        replicas = httpx.get(f"{url}/v1/replicas", timeout=30).json()["replicas"]
        if not any(one["queued"] or one["running_rows"] for one in replicas):
            return
        time.sleep(0.3)
    raise TimeoutError(f"not idle within {timeout_s} s")


def within_limits(run: Run) -> bool:
    return not run.failed and run.percentiles()["p99"] < P99_LIMIT_MS


def calibrate(url: str, *, quick: bool) -> tuple[float, Run]:
    """C and the run that showed it: up by STEP until it is too much, then halving the interval."""
    # A short run lets too much pass: in 20 s a queue may grow by 5 % before a second is waited.
    seconds, halvings = (4, 1) if quick else (40, 3)
    load = bodies()
    asyncio.run(fire(url, load, FIRST_RATE, 2))
    good: tuple[float, Run] | None = None
    rate, low, high = FIRST_RATE, 0.0, 0.0
    for _ in range(20):
        idle(url)
        run = asyncio.run(fire(url, load, rate, seconds))
        print(f"# {rate:.1f}/s: {run.statuses()} {run.percentiles()}", file=sys.stderr, flush=True)
        if within_limits(run):
            good, low = (rate, run), rate
        else:
            high = rate
        if not high:
            rate *= STEP
        elif not low:
            rate /= 2
        elif high / low < STEP ** (1 / 2**halvings) + 1e-9:
            break
        else:
            rate = (low * high) ** 0.5
        if rate < 0.5:
            break
    if good is None:
        raise RuntimeError("no rate keeps the limits: is the machine busy?")
    return good


def overload(url: str, capacity: float, seconds: float) -> list[dict[str, Any]]:
    """OVERLOAD × C, against the quiet before and 5 s after it."""
    load = bodies()
    idle(url)
    before = asyncio.run(fire(url, load, 0.3 * capacity, 5))
    run = asyncio.run(fire(url, load, OVERLOAD * capacity, seconds, timeout_s=120))
    time.sleep(5)
    after = asyncio.run(fire(url, load, 0.3 * capacity, 5))
    refused = [shot for shot in run.shots if shot.status == 429]
    refusal_ms = run.percentiles(lambda shot: shot.status == 429)
    quiet = (before.percentiles()["p50"], after.percentiles()["p50"])
    checks = {
        f"goodput ≥ {GOODPUT_SHARE} C": run.goodput >= GOODPUT_SHARE * capacity,
        "only 200 and 429": {shot.status for shot in run.shots} <= {200, 429},
        "429 with Retry-After": bool(refused) and all(has_retry_after(shot) for shot in refused),
        f"admitted in p99 ≤ {ADMITTED_LIMIT_MS / 1000:.0f} s": run.percentiles()["p99"] <= ADMITTED_LIMIT_MS,
        f"429 in p99 ≤ {REFUSAL_LIMIT_MS:.0f} ms": refusal_ms["p99"] <= REFUSAL_LIMIT_MS,
        "5 s later quiet": not after.failed and quiet[1] < 2 * quiet[0] + 20,
    }
    return [
        row("quiet before", before),
        row(f"{OVERLOAD:.0f} C", run, checks),
        row("429 only", Run(run.rate, run.seconds, run.started, refused), latencies=refusal_ms),
        row("quiet 5 s later", after),
    ]


def has_retry_after(shot: Shot) -> bool:
    return shot.retry_after is not None and shot.retry_after.isdecimal() and int(shot.retry_after) >= 1


def row(
    case: str, run: Run, checks: Mapping[str, bool] | None = None, latencies: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """A line of the table; "shown" names what did not hold."""
    missed = [text for text, holds in (checks or {}).items() if not holds]
    shown = "" if checks is None else ("yes" if not missed else "NO: " + ", ".join(missed))
    return {
        "case": case,
        "rate/s": round(run.rate, 1),
        "requests": len(run.shots),
        "statuses": " ".join(f"{status}:{count}" for status, count in run.statuses().items()),
        "goodput/s": round(run.goodput, 1),
        **{f"{name} ms": value for name, value in (latencies or run.percentiles()).items()},
        "sent late p99 ms": run.late_p99_ms,
        "shown": shown,
    }


@contextlib.contextmanager
def a_service(url: str | None, replicas: int, options: list[str] | None = None) -> Iterator[str]:
    """The URL of the named service, or of one that lives as long as this block."""
    if url is not None:
        yield url
        return
    with Service(bundled_config(replicas), options=options or []) as service:
        yield service.url


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute, with coarse numbers")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--url", help="of a service that runs already")
    parser.add_argument("--rate", type=float, help="take this as C and do not look for it")
    parser.add_argument("--fast", action="store_true", help="HAProxy, see docs/operations.md")
    options = parser.parse_args()
    with a_service(options.url, options.replicas, ["--fast"] if options.fast else None) as url:
        if options.rate:
            capacity, rows = options.rate, []
        else:
            capacity, run = calibrate(url, quick=options.quick)
            rows = [row("C: all 200, p99 < 1 s", run)]
        rows += overload(url, capacity, 10 if options.quick else 60)
    print(records.table(rows))
    path = records.write("load", rows, capacity=round(capacity, 2), replicas=options.replicas, quick=options.quick)
    print(f"written to {path.relative_to(path.parents[2])}")
    return 1 if any(str(one["shown"]).startswith("NO") for one in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
