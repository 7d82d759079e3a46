"""What goes wrong in a day of operation, done on purpose under load; one line each of what it did to the clients.

    make chaos ARGS="--quick"
    python benchmarks/chaos.py [--quick] [--only kill-replica,cancel] [--rate C]

Every case starts from the bundled model on two CPU replicas, and from C, the rate that benchmarks/load.py finds; --rate
saves looking for it. "one retry": the same with a client that sends once more when its connection breaks or it is told
to come back later, and knocks again while it is refused.

Results go to benchmarks/results/DATE-chaos.json.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import aiohttp
import httpx
import psutil

from benchmarks import inputs, records, swaps, waking
from benchmarks.load import bodies, calibrate, forecast_body, idle
from benchmarks.open_loop import Run, fire
from benchmarks.service import Service, bundled_config

SHARE_OF_C = 0.4
RECOVERY_LIMIT_S = {"proxy": 5.0, "ingress": 5.0, "controller": 5.0}
EXIT_LIMIT_S = 25.0
WAKING_LIMIT_S = 3.0
"""Over the time that loading takes."""


@dataclass
class Context:
    """A running service, the load for it, and how much patience there is."""

    service: Service
    rate: float
    quick: bool
    model: str | None = None

    def fire(self, seconds: float, **options: Any) -> Run:
        return asyncio.run(fire(self.service.url, bodies(model=self.model), self.rate, seconds, **options))


def result(case: str, run: Run | None, checks: dict[str, bool], **facts: Any) -> dict[str, Any]:
    missed = [text for text, holds in checks.items() if not holds]
    counts = {} if run is None else {"requests": len(run.shots), "failed": len(run.failed)}
    if run is not None and run.failed:
        facts["got"] = " ".join(f"{status}:{count}" for status, count in run.statuses().items())
    said = ", ".join(f"{name} {value}" for name, value in facts.items())
    return {"case": case, **counts, "measured": said, "shown": "yes" if not missed else "NO: " + ", ".join(missed)}


def kill_replicas(context: Context) -> list[dict[str, Any]]:
    """kill -9 of a model replica every 6 s: nobody notices, and the numbers are those of the undisturbed run."""
    wanted = 100 if context.quick else 1500
    seconds = max(12.0 if context.quick else 100.0, wanted / context.rate)
    calm = context.fire(seconds)
    kills = 0

    async def kill(run: Run) -> None:
        nonlocal kills
        for turn in range(int(seconds / 6)):
            await asyncio.sleep(6 if turn else 3)
            victims = await asyncio.to_thread(context.service.processes, "replica")
            if victims:
                random.Random(turn).choice(victims).kill()
                kills += 1

    run = context.fire(seconds, during=kill)
    context.service.wait_ready()
    same = sum(a.digest == b.digest for a, b in zip(calm.shots, run.shots, strict=True))
    checks = {
        "0 failed": not run.failed,
        f"≥ {wanted} requests": len(run.shots) >= wanted,
        "the undisturbed numbers": same == len(run.shots),
    }
    p99 = f"{calm.percentiles()['p99']:.0f} → {run.percentiles()['p99']:.0f} ms"
    return [result("kill -9 a replica every 6 s", run, checks, kills=kills, equal=same, p99=p99)]


def kill_process(kind: str) -> Callable[[Context], list[dict[str, Any]]]:
    """kill -9 of one of Serve's own processes."""

    def case(context: Context) -> list[dict[str, Any]]:
        seconds = 12.0 if context.quick else 20.0
        rows = []
        for retry in (False, True):
            killed = 0.0

            async def kill(run: Run) -> None:
                nonlocal killed
                await asyncio.sleep(4)
                victim, *_ = await asyncio.to_thread(context.service.processes, kind)
                killed = time.monotonic()
                victim.kill()

            run = context.fire(seconds, retry=retry, during=kill)
            context.service.wait_ready()
            at = killed - run.started
            cut = [shot for shot in run.failed if shot.intended <= at]
            later = [shot for shot in run.failed if shot.intended > at]
            recovery = max((shot.ended for shot in run.failed), default=at) - at
            flying = run.in_flight(killed)
            if retry:
                checks = {"0 failed": not run.failed}
            else:
                checks = {
                    "failures ≤ in flight": len(cut) <= flying,
                    f"recovered in {RECOVERY_LIMIT_S[kind]:.0f} s": recovery <= RECOVERY_LIMIT_S[kind],
                }
            name = f"kill -9 the {kind}" + (", one retry" if retry else "")
            facts = {
                "in flight": flying,
                "cut": len(cut),
                "refused while down": len(later),
                "recovery s": round(recovery, 1),
            }
            rows.append(result(name, run, checks, **facts))
        return rows

    return case


def code_update(context: Context) -> list[dict[str, Any]]:
    """A rolling update of every replica, ingress included."""
    before = {process.pid for process in context.service.processes("replica")}
    config = json.loads(json.dumps(context.service.config))
    config["applications"][0]["runtime_env"] = {"env_vars": {"KRONOS_LOG_LEVEL": "WARNING"}}

    async def update(run: Run) -> None:
        await asyncio.sleep(2)
        await asyncio.to_thread(context.service.redeploy, config)

    run = context.fire(15 if context.quick else 30, during=update)
    end = time.monotonic() + 60
    while time.monotonic() < end and before & {process.pid for process in context.service.processes("replica")}:
        time.sleep(0.5)
    left = before & {process.pid for process in context.service.processes("replica")}
    checks = {"0 failed": not run.failed, "every replica replaced": not left}
    return [result("code update", run, checks, p99=f"{run.percentiles()['p99']:.0f} ms")]


def cancel(context: Context) -> list[dict[str, Any]]:
    """Long requests whose clients leave at any moment: the computing stops with them."""
    count, horizon, samples = (40 if context.quick else 200), 400, 8
    body = forecast_body(1, 64, horizon, samples=samples)
    dice = random.Random(7)

    async def one(session: aiohttp.ClientSession, patience: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await session.post(f"{context.service.url}/v1/forecast", json=body)

    async def all_of_them() -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            for _ in range(count // 10):
                await asyncio.gather(*(one(session, dice.uniform(0.005, 0.4)) for _ in range(10)))

    idle(context.service.url)
    time.sleep(1.5)  # news of replicas are up to a second old on a busy machine
    before = context.service.metric("kronos_engine_rows_total")
    asyncio.run(all_of_them())
    time.sleep(2)
    gauges = {
        name: context.service.metric(name)
        for name in (
            "kronos_queue_depth",
            "kronos_running_rows",
            "kronos_cache_slots_used",
            "kronos_concurrent_requests",
        )
    }
    share = (context.service.metric("kronos_engine_rows_total") - before) / (count * horizon * samples)
    after = asyncio.run(fire(context.service.url, bodies(), 2, 2))
    checks = {
        "≤ 10 % of the steps": share <= 0.1,
        "gauges 0 after 2 s": not any(gauges.values()),
        "serves on": not after.failed,
    }
    busy = " ".join(f"{name}={value:g}" for name, value in gauges.items() if value) or "0"
    return [result(f"cancel {count} long requests", None, checks, computed=f"{100 * share:.1f} %", gauges=busy)]


def drain(context: Context) -> list[dict[str, Any]]:
    """Stop with 20 in flight. The service is gone afterwards."""
    service = context.service

    stopped = 0.0

    async def stop() -> tuple[list[int], list[int], bool]:
        nonlocal stopped
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def ask(body: Any) -> tuple[int, bool]:
                try:
                    async with session.post(f"{service.url}/v1/forecast", json=body) as response:
                        await response.read()
                        return response.status, "retry-after" in response.headers
                except aiohttp.ClientError:
                    return 0, False

            long = [asyncio.ensure_future(ask(forecast_body(i, 64, 150, samples=4))) for i in range(20)]
            # Seen by the replicas: with two ingress replicas a scrape reaches one of them.
            while await asyncio.to_thread(_taken, service) < 20:
                if any(one.done() for one in long):
                    raise RuntimeError("the requests were too short to be in flight together")
                await asyncio.sleep(0.02)
            service.stop()
            stopped = time.monotonic()
            late = []
            while not late or late[-1][0] == 200:
                late.append(await ask(forecast_body(0)))
            answers = await asyncio.gather(*long)
            return [status for status, _ in answers], [status for status, _ in late], late[-1][1]

    finished, late, told = asyncio.run(stop())
    with contextlib.suppress(Exception):
        service.process.wait(60)
    seconds = time.monotonic() - stopped
    checks = {
        "all 20 finished": finished == [200] * 20,
        "new ones 503 with Retry-After": late[-1] == 503 and told,
        f"exit ≤ {EXIT_LIMIT_S:.0f} s": service.process.returncode == 0 and seconds <= EXIT_LIMIT_S,
    }
    return [result("stop with 20 in flight", None, checks, exit=f"{seconds:.1f} s")]


def poison(context: Context) -> list[dict[str, Any]]:
    """Every bad input, alone and among good ones."""
    faults, asked, disturbed = inputs.check_poison(context.service.url)
    checks = {"right status and field": not faults, "neighbours' bytes unchanged": not disturbed}
    facts = {"inputs": asked, "wrong": "; ".join(faults[:3]) or 0}
    return [result("poison matrix", None, checks, **facts)]


def fuzz(context: Context) -> list[dict[str, Any]]:
    """Generated requests, most of them wrong."""
    before = {process.pid for process in context.service.processes("replica")}
    statuses = asyncio.run(inputs.fuzz(context.service.url, 1000 if context.quick else 20_000))
    after = {process.pid for process in context.service.processes("replica")}
    checks = {
        "no 5xx": not any(int(status) >= 500 or status == "0" for status in statuses),
        "some were taken": "200" in statuses,
        "no restart": before == after,
    }
    return [result("generated requests", None, checks, statuses=" ".join(f"{k}:{v}" for k, v in statuses.items()))]


def schemathesis(context: Context) -> list[dict[str, Any]]:
    """Requests that a tool makes of /openapi.json, and answers held against it."""
    before = {process.pid for process in context.service.processes("replica")}
    status = inputs.schemathesis(context.service.url, 20 if context.quick else 500)
    checks = {
        "no 5xx, answers as described": status == 0,
        "no restart": before == {process.pid for process in context.service.processes("replica")},
    }
    return [result("schemathesis on /openapi.json", None, checks)]


def _taken(service: Service) -> float:
    """Series of 4 paths that wait or run."""
    return sum(one["queued"] + one["running_rows"] / 4 for one in service.replicas())


CASES: dict[str, Callable[[Context], list[dict[str, Any]]]] = {
    "kill-replica": kill_replicas,
    "kill-ingress": kill_process("ingress"),
    "kill-proxy": kill_process("proxy"),
    "kill-controller": kill_process("controller"),
    "cancel": cancel,
    "poison": poison,
    "fuzz": fuzz,
    "schemathesis": schemathesis,
    "update": code_update,
    "drain": drain,
}
"""In one service, in this order: the last one ends it."""


def run_swaps(rate: float, quick: bool) -> list[dict[str, Any]]:
    """Model swaps, in a service that serves a folder of checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        swaps.install(root, swaps.BUNDLED)
        with Service(swaps.config(root)) as service:
            context = Context(service, rate, quick, swaps.ALIAS)
            swaps.load_everywhere(service.url, len(service.replicas()))
            rows = []
            for name, change, good in swaps.CHANGES:
                run, verdict = swaps.swap_under_load(context.service.url, root, change, good, context.fire, quick)
                rows.append(
                    result(
                        f"model swap: {name}",
                        run,
                        {"0 failed": not run.failed, **verdict},
                        p99=f"{run.percentiles()['p99']:.0f} ms",
                    )
                )
            return rows


def run_wake(rate: float, quick: bool) -> list[dict[str, Any]]:
    """The first answer of a service that has scaled to zero."""
    with Service(waking.config()) as service:
        times = [(waking.first_answer_s(service), waking.load_s()) for _ in range(1 if quick else 3)]
    waits, loads = (sorted(values) for values in zip(*times, strict=True))
    checks = {f"load + {WAKING_LIMIT_S:.0f} s": waits[-1] <= loads[0] + WAKING_LIMIT_S}
    said = {
        "first answers s": [round(wait, 1) for wait in waits],
        "loading alone s": [round(load, 1) for load in loads],
    }
    return [result("first answer from zero", None, checks, **said)]


OWN_SERVICE: dict[str, Callable[[float, bool], list[dict[str, Any]]]] = {"swap": run_swaps, "wake": run_wake}
"""Cases with another configuration, each in a service of its own: of the rate and whether it has to be quick."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short runs and coarse numbers")
    parser.add_argument("--only", help=f"comma-separated, of: {', '.join([*CASES, *OWN_SERVICE])}")
    parser.add_argument("--rate", type=float, help="C; found first if it is not given")
    parser.add_argument("--fast", action="store_true", help="HAProxy, see docs/operations.md")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else [*CASES, *OWN_SERVICE]
    if unknown := set(chosen) - {*CASES, *OWN_SERVICE}:
        parser.error(f"unknown cases: {', '.join(sorted(unknown))}")
    rows: list[dict[str, Any]] = []
    capacity = options.rate
    # Two ingress replicas: with one, killing it would be an outage by construction.
    config = bundled_config(2, ingress={"num_cpus": 0.1, "replicas": 2})
    if capacity is None or set(chosen) - set(OWN_SERVICE):
        with Service(config, options=["--fast"] if options.fast else []) as service:
            if capacity is None:
                capacity, _ = calibrate(service.url, quick=options.quick)
            context = Context(service, SHARE_OF_C * capacity, options.quick)
            for name in CASES:
                if name in chosen:
                    rows += _guarded(name, lambda name=name: CASES[name](context))  # type: ignore[misc]
    for name, case in OWN_SERVICE.items():
        if name in chosen:
            rows += _guarded(name, lambda case=case: case(SHARE_OF_C * capacity, options.quick))  # type: ignore[misc]
    print(records.table(rows))
    path = records.write("chaos", rows, capacity=round(capacity, 2), quick=options.quick)
    print(f"written to {path.relative_to(path.parents[2])}")
    return 1 if any(row["shown"].startswith("NO") for row in rows) else 0


def _guarded(name: str, case: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A case that breaks down is a line of the table, and the others go on."""
    try:
        rows = case()
    except (httpx.HTTPError, psutil.Error, RuntimeError, TimeoutError, OSError, ValueError) as error:
        rows = [{"case": name, "measured": "", "shown": f"NO: {type(error).__name__}: {str(error)[:200]}"}]
    for row in rows:
        print(f"# {row['case']}: {row['shown']} ({row['measured']})", file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
