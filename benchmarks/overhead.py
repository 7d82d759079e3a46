"""What the service costs beside the model, and what it gains over a plain one.

    make overhead ARGS="--quick"
    python benchmarks/overhead.py [--quick] [--reference PATH_OF_A_PUBLIC_CHECKOUT] [--shape small]

1. An engine that answers at once, through proxy, ingress and replica: requests/s and latency, with Ray's proxy and with
   HAProxy; and in turn with it bare.py, the same path with nothing on it, under Ray's own settings. Before each pair
   echo.py, one process without Ray: what was reached elsewhere is told as a share of that, and so is what is here.
2. Of it, reading and writing JSON: 400 bars in, 120 bars out, in this process.
3. With --reference: forecasts/s and p99 of the same forecasts from this service and from baseline_service.py, one
   process that calls the public predict in a thread, at 1, 8 and 32 clients (--clients), random weights in the
   published shape, one after the other in the same run.

Results go to benchmarks/results/DATE-overhead.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx

from benchmarks import records
from benchmarks.closed_loop import drive
from benchmarks.load import forecast_body
from benchmarks.service import Service, free_port, shipped_config
from benchmarks.shapes import CONTEXT, save_pair
from serve_app.run import ONE_LOOP

HISTORY, HORIZON = 400, 120
REACHED = {"default": 167, "HAProxy + gRPC": 861}
"""Requests/s of an echo of JSON on such a path on another machine with 2 cores, before anything was built."""
ECHO_REACHED = 8001
"""Requests/s of one FastAPI process beside them: how fast that machine was."""
ROUNDS = 3
"""Echo, bare path and service in turn, because a shared machine is not equally fast from one minute to the next."""
RAYS_OWN = dict.fromkeys(ONE_LOOP, "1")
BARE = {"default": {**RAYS_OWN, "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0"}, "HAProxy + gRPC": RAYS_OWN}
"""The settings under which REACHED was."""
CLIENTS = (1, 8, 32)
GAIN_AT_8 = 20.0


def through_the_whole_path(quick: bool) -> list[dict[str, Any]]:
    """Small (64 bars in, 8 out) and large requests to the bare path and to the service, in both modes of Ray."""
    bodies = {
        f"{history} → {horizon}": [json.dumps(forecast_body(i, history, horizon)).encode() for i in range(50)]
        for history, horizon in ((64, 8), (HISTORY, HORIZON))
    }
    rows = []
    for mode, options in (("default", []), ("HAProxy + gRPC", ["--fast"])):
        rates: dict[tuple[str, str, int], list[float]] = {}
        for name in ("echo", "bare", "instant") * (1 if quick else ROUNDS):
            with _path(name, mode, options) as base:
                url = f"{base}/v1/forecast"
                asyncio.run(drive(url, bodies["64 → 8"], 4, 2))
                for size, sent in bodies.items():
                    for clients in (1, 16):
                        measured = asyncio.run(drive(url, sent, clients, 3 if quick else 8))
                        case = f"{name}, {mode}, {size} bars"
                        rows.append({"case": case, **measured, "shown": _all_200(measured)})
                        rates.setdefault((name, size, clients), []).append(float(measured["per s"]))
                        print(f"# {rows[-1]}", file=sys.stderr, flush=True)
        for name, size, clients in rates:
            if name == "instant":
                ours, bare, echo = (median(rates[one, size, clients]) for one in ("instant", "bare", "echo"))
                case = f"service / bare path, {mode}, {size} bars"
                rows.append({"case": case, "clients": clients, "per s": f"{ours / bare:.2f}×"})
                case = f"service / echo, {mode}, {size} bars"
                rows.append({"case": case, "clients": clients, "per s": f"{100 * ours / echo:.1f} %"})
    return rows


@contextlib.contextmanager
def _path(name: str, mode: str, options: Sequence[str]) -> Iterator[str]:
    """The address of one of the three, as long as it runs."""
    if name == "echo":
        port = free_port()
        command = [sys.executable, "-m", "uvicorn", "benchmarks.echo:api", "--port", str(port), "--no-access-log"]
        with _running(command, port) as base:
            yield base
    else:
        environ = BARE[mode] if name == "bare" else {}
        with Service(_instant_config(name), options=list(options), environ=environ) as service:
            yield service.url


def _instant_config(name: str) -> dict[str, Any]:
    """A configuration of benchmarks/bare.py, or of the service over benchmarks/instant.py."""
    config = shipped_config(
        models={"kronos-bundled": {"source": "bundled"}}, groups={"cpu": {"num_cpus": 0.5}}, log_level="WARNING"
    )
    application = config["applications"][0]
    if name == "bare":
        application.update(import_path="benchmarks.bare:app", args={})
    else:
        application["import_path"] = "benchmarks.instant:build_app"
    return config


def _all_200(measured: dict[str, Any], *, but: frozenset[str] = frozenset()) -> str:
    """but: statuses that are allowed beside 200."""
    found = {one.partition(":")[0] for one in str(measured["statuses"]).split()}
    return "yes" if "200" in found and found <= {"200", *but} else "NO: not all were answered"


def reading_and_writing(quick: bool) -> list[dict[str, Any]]:
    """JSON to job, and result to JSON, as the ingress does it: 400 bars in, 120 out, one path and 30."""
    import numpy as np

    from benchmarks.instant import InstantEngine
    from serve_app.answers import forecast_json
    from serve_app.config import AppConfig
    from serve_app.forecasting import encode
    from serve_app.jobs import Answered, Done
    from serve_app.reading import Reading

    reading = Reading(AppConfig())
    rows = []
    for samples in (1, 30):
        raw = json.dumps(forecast_body(0, HISTORY, HORIZON, samples=samples)).encode()
        asked = reading.forecast(raw)
        engine = InstantEngine("kronos-bundled")
        paths = engine.forecast(asked.items[0].task.series, asked.items[0].task.sampling)
        paths.values[:] *= np.random.default_rng(0).normal(1, 0.01, paths.values.shape)
        done = Done((paths,), engine.identity, engine.device, "replica")
        answered = Answered(done, "cpu")

        def write(asked: Any = asked, answered: Any = answered) -> bytes:
            return encode(forecast_json(asked.body, asked.items, asked.seed, answered, None))

        count = 20 if quick else 200
        rows.append(
            {
                "case": f"reading and checking {HISTORY} bars ({len(raw) // 1024} KiB), {samples} path(s)",
                "p50 ms": _median_ms(lambda raw=raw: reading.forecast(raw), count),  # type: ignore[misc]
            }
        )
        size = len(write()) // 1024
        rows.append(
            {
                "case": f"summing up and writing {HORIZON} bars ({size} KiB), {samples} path(s)",
                "p50 ms": _median_ms(write, count),
            }
        )
    return rows


def _median_ms(run: Callable[[], object], count: int) -> float:
    times = []
    for _ in range(count):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return round(1000 * sorted(times)[count // 2], 2)


def against_the_public_code(
    reference: str, shape: str, quick: bool, clients: Sequence[int] | None
) -> list[dict[str, Any]]:
    """Both services in turn, with all cores of the machine each."""
    clients = clients or ((1, 8) if quick else CLIENTS)
    horizon = 12 if quick else HORIZON
    threads = os.cpu_count() or 1
    # Exact and never sliding, so that both compute the same windows: 400 + 112 bars is the whole context.
    horizon = min(horizon, CONTEXT[shape] - HISTORY)
    with tempfile.TemporaryDirectory() as folder:
        save_pair(shape, Path(folder))
        rates: dict[tuple[str, int], float] = {}
        rows = []
        bodies = {
            "public": [json.dumps(_predict_body(i, horizon)).encode() for i in range(16)],
            "ours": [json.dumps(_predict_body(i, horizon)).encode() for i in range(16)],
        }
        servers = {
            "public": lambda: _baseline(reference, folder, shape, threads),
            "ours": lambda: _ours(folder, shape, threads),
        }
        for name, start in servers.items():
            with start() as base:
                url = f"{base}/v1/predict/single"
                asyncio.run(drive(url, bodies[name], 1, 0))
                for count in clients:
                    # At least two rounds of all clients, however long one forecast takes.
                    measured = asyncio.run(drive(url, bodies[name], count, 5 if quick else 60))
                    rates[name, count] = float(measured["per s"])
                    case = f"{shape} {HISTORY}/{horizon}, {name}"
                    # A client that was told to come back later got its forecast then.
                    rows.append({"case": case, **measured, "shown": _all_200(measured, but=frozenset({"429"}))})
        for count in clients:
            ratio = rates["ours", count] / rates["public", count]
            enough = "yes" if ratio >= GAIN_AT_8 else f"NO: below {GAIN_AT_8:.0f}×"
            shown = {"shown": enough} if count == 8 and not quick else {}
            rows.append({"case": "ours / public", "clients": count, "per s": f"{ratio:.1f}×", **shown})
        return rows


def _predict_body(index: int, horizon: int) -> dict[str, Any]:
    series = forecast_body(index, HISTORY, horizon)["series"][0]
    names = ("open", "high", "low", "close", "volume", "amount")
    columns = zip(*(series[name] for name in names), strict=True)
    return {
        "candles": [dict(zip(names, row, strict=True)) for row in columns],
        "timestamps": series["timestamps"],
        "prediction_timestamps": series["future_timestamps"],
    }


@contextlib.contextmanager
def _ours(folder: str, shape: str, threads: int) -> Iterator[str]:
    alias = f"kronos-{shape}"
    models = {alias: {"source": folder, "max_context": CONTEXT[shape]}}
    group = {"num_cpus": threads, "replicas": 1, "workers": 32}
    config = shipped_config(models=models, default_model=alias, groups={"gpu": {"mode": "off"}, "cpu": group})
    config["applications"][0]["args"]["ingress"] = {"num_cpus": 0}
    with Service(config, environ={"OMP_NUM_THREADS": str(threads)}) as service:
        yield service.url


@contextlib.contextmanager
def _baseline(reference: str, folder: str, shape: str, threads: int) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("baseline_service.py"))]
    arguments = [str(Path(reference).resolve()), folder, str(CONTEXT[shape]), str(port), str(threads)]
    with _running([*command, *arguments], port) as base:
        yield base


@contextlib.contextmanager
def _running(command: Sequence[str], port: int) -> Iterator[str]:
    """The address of a server that is one process, started from the repository. Raises RuntimeError."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
    try:
        end = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/v1/healthz").status_code == 200:
                    break
            time.sleep(0.2)
        else:
            raise RuntimeError(f"{command[1:3]} did not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short runs and coarse numbers")
    parser.add_argument("--reference", help="checkout of the public implementation")
    parser.add_argument("--shape", default="small", choices=sorted(CONTEXT))
    parser.add_argument(
        "--clients", type=int, nargs="+", help="of 3.; 32 take the public code a quarter of an hour; --quick: 1 and 8"
    )
    parser.add_argument("--only-reference", action="store_true", help="leave out the instant engine")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if not options.only_reference:
        rows += reading_and_writing(options.quick) + through_the_whole_path(options.quick)
    if options.reference:
        rows += against_the_public_code(options.reference, options.shape, options.quick, options.clients)
    print(records.table(rows))
    shares = ", ".join(f"{mode} {rate} ({100 * rate / ECHO_REACHED:.1f} % of echo)" for mode, rate in REACHED.items())
    print(f"reached before on another machine, echo {ECHO_REACHED} requests/s, 16 clients: {shares}")
    path = records.write("overhead", rows, quick=options.quick, reached={"echo": ECHO_REACHED, **REACHED})
    print(f"written to {path.relative_to(path.parents[2])}")
    return 1 if any(str(row.get("shown", "")).startswith("NO") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
