"""Requests that must be refused well: every bad input by name, and thousands of generated ones.

python benchmarks/inputs.py --url URL [--requests 20000] [--schemathesis]
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import aiohttp

from benchmarks.load import forecast_body
from benchmarks.open_loop import digest

ROUTES = ("/v1/forecast", "/v1/predict/single", "/v1/predict/batch")
BAD_PLACE = 3
"""Where the bad series stands among the good ones."""

Change = Callable[[dict[str, Any]], None]


def _put(*path: str | int, value: Any) -> Change:
    def change(series: dict[str, Any]) -> None:
        target: Any = series
        for part in path[:-1]:
            target = target[part]
        target[path[-1]] = value

    return change


def _drop_last(name: str) -> Change:
    return lambda series: series[name].pop()


def _swap_times(series: dict[str, Any]) -> None:
    stamps = series["timestamps"]
    stamps[5], stamps[6] = stamps[6], stamps[5]


def _calendar(name: str) -> Change:
    return lambda series: series.update(calendar=name, future_timestamps=None, freq="5min", horizon=8)


SERIES_FAULTS: dict[str, tuple[Change, int, list[str | int], str]] = {
    "NaN": (_put("close", 5, value=float("nan")), 422, ["close", 5], "not_finite"),
    "infinity": (_put("open", 5, value=float("inf")), 422, ["open", 5], "not_finite"),
    "minus infinity": (_put("low", 5, value=float("-inf")), 422, ["low", 5], "not_finite"),
    "string for a number": (_put("high", 5, value="12"), 422, ["high", 5], "not_a_number"),
    "null": (_put("close", 5, value=None), 422, ["close", 5], "not_a_number"),
    "boolean": (_put("close", 5, value=True), 422, ["close", 5], "not_a_number"),
    "price 0": (_put("close", 5, value=0), 422, ["close", 5], "not_positive"),
    "price below 0": (_put("open", 5, value=-1.5), 422, ["open", 5], "not_positive"),
    "volume below 0": (_put("volume", 5, value=-1), 422, ["volume", 5], "negative"),
    "over float32": (_put("close", 5, value=1e300), 422, ["close", 5], "out_of_range"),
    "high below low": (_put("high", 5, value=0.001), 422, ["high", 5], "high_below_low"),
    "unsorted times": (_swap_times, 422, ["timestamps", 6], "unsorted_times"),
    "duplicate times": (_put("timestamps", 1, value="2024-01-01T00:00:00Z"), 422, ["timestamps", 1], "duplicate_times"),
    "mixed time zones": (
        _put("timestamps", 63, value="2024-01-01T05:15:00"), 422, ["timestamps", 63], "mixed_time_zones",
    ),
    "no time": (_put("timestamps", 5, value="yesterday"), 422, ["timestamps", 5], "not_a_time"),
    "lengths differ": (_drop_last("close"), 422, ["close"], "length_mismatch"),
    "no close": (lambda series: series.pop("close"), 422, ["close"], "missing"),
    "unknown field": (_put("clsoe", value=[]), 422, ["clsoe"], "unknown_field"),
    "horizon over the limit": (_put("horizon", value=100_000), 422, ["horizon"], "horizon_over_limit"),
    "samples over the limit": (_put("samples", value=100_000), 422, ["samples"], "samples_over_limit"),
    "temperature NaN": (_put("temperature", value=float("nan")), 422, ["temperature"], "not_finite"),
    "top_p above 1": (_put("top_p", value=1.5), 422, ["top_p"], "out_of_range"),
    "seed below 0": (_put("seed", value=-1), 422, ["seed"], "out_of_range"),
    "unknown calendar": (_calendar("../../etc/passwd"), 422, ["calendar"], "unknown_calendar"),
}  # fmt: skip
"""Name → (what is done to a good series, status, place inside it, code)."""

BODY_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], bytes], dict[str, str], int, str]] = {
    "malformed JSON": (lambda body: json.dumps(body).encode()[:-9], {}, 400, "malformed_json"),
    "not UTF-8": (lambda body: b'{"series": "\xff\xfe"}', {}, 400, "malformed_json"),
    "deep nesting": (lambda body: b"[" * 100_000, {}, 400, "malformed_json"),
    "not JSON": (lambda body: json.dumps(body).encode(), {"content-type": "text/csv"}, 415, "not_json"),
    "compressed": (lambda body: json.dumps(body).encode(), {"content-encoding": "gzip"}, 415, "content_encoding"),
    "unknown model": (lambda body: json.dumps(body | {"model": "none"}).encode(), {}, 404, "unknown_model"),
    "cost over the limit": (
        lambda body: json.dumps(body | {"series": [_long(s) for s in body["series"] * 8], "samples": 512}).encode(),
        {}, 413, "cost_over_limit",
    ),
    "body over the limit": (lambda body: b" " * (33 * 2**20), {}, 413, "body_too_large"),
}  # fmt: skip
"""Name → (body made of a good one, headers, status, code)."""


def _long(series: dict[str, Any]) -> dict[str, Any]:
    return {**series, "future_timestamps": None, "freq": "5min", "horizon": 512}


def check_poison(url: str) -> tuple[list[str], int, list[str]]:
    """(what was answered wrongly, number of bad requests, neighbours whose bytes changed)."""
    return asyncio.run(_check_poison(url))


async def _check_poison(url: str) -> tuple[list[str], int, list[str]]:
    good = [forecast_body(i) for i in range(7)]
    wrong: list[str] = []
    disturbed: list[str] = []
    asked = 0
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def ask(body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
            given = {"content-type": "application/json", **(headers or {})}
            async with session.post(f"{url}/v1/forecast", data=body, headers=given) as response:
                return response.status, await response.read()

        async def neighbours() -> list[str]:
            answers = await asyncio.gather(*(ask(json.dumps(body).encode()) for body in good))
            return [f"{status} {digest(answer)}" for status, answer in answers]

        undisturbed = await neighbours()

        async def try_one(name: str, body: bytes, headers: dict[str, str], status: int, loc: Any, code: str) -> None:
            nonlocal asked
            asked += 1
            (got, answer), beside = await asyncio.gather(ask(body, headers), neighbours())
            said = _error(answer)
            if (got, said[1]) != (status, code) or (loc is not None and said[0] != loc):
                wrong.append(f"{name}: {got} {said}")
            if beside != undisturbed:
                disturbed.append(name)

        for name, (change, status, place, code) in SERIES_FAULTS.items():
            for at, company in ((0, []), (BAD_PLACE, good)):
                series = [copy.deepcopy(body["series"][0]) for body in company]
                bad = copy.deepcopy(good[0]["series"][0])
                change(bad)
                series.insert(at, bad)
                body = json.dumps({"series": series, "seed": 1}).encode()
                await try_one(f"{name}, {at}", body, {}, status, ["series", at, *place], code)
        for name, (make, headers, status, code) in BODY_FAULTS.items():
            await try_one(name, make(copy.deepcopy(good[0])), headers, status, None, code)
    return wrong, asked, disturbed


def _error(answer: bytes) -> tuple[list[Any] | None, str]:
    """(place, code) of the first field error, or (None, code of the whole)."""
    try:
        error = json.loads(answer)["error"]
    except (ValueError, KeyError, TypeError):
        return None, "no error body"
    fields = error["fields"]
    if error["code"] == "invalid_fields" and fields:
        return fields[0]["loc"], fields[0]["code"]
    return None, error["code"]


# --- generated requests -----------------------------------------------------------------------------------------------

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e308, -1e308, 1e-320, 10**30, float("nan"), float("inf"), "", "a",
    "\x00", "\u202e", "🕯" * 40, "x" * 5000, "2024-01-01", "2024-01-01T00:00:00+14:00", "9999-12-31T23:59:59Z", [], {},
    [[]], [None], {"a": 1}, "cpu", "off", "exact", "hop:4", "XNYS", "5min",
]  # fmt: skip
"""None of these asks for much computing."""


def generated(dice: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """(method, path, body, headers): a small good request, changed in some places."""
    path = dice.choice(ROUTES)
    body: Any = forecast_body(dice.randrange(16), 8, 2, deadline_ms=5000)
    if path != "/v1/forecast":
        series = body["series"][0]
        names = ("open", "high", "low", "close", "volume", "amount")
        candles = [dict(zip(names, row, strict=True)) for row in zip(*(series[name] for name in names), strict=True)]
        item = {
            "series_id": "a",
            "candles": candles,
            "timestamps": series["timestamps"],
            "prediction_timestamps": series["future_timestamps"],
            "overrides": {"sample_count": 2, "temperature": 0.8},
        }
        body = item if path.endswith("single") else {"items": [item, copy.deepcopy(item)]}
    else:
        body |= {"samples": 3, "quantiles": [0.1, 0.9], "return_paths": True, "repair": "ohlc"}
    for _ in range(dice.choice((0, 1, 1, 2, 4))):
        _mutate(body, dice)
    raw = json.dumps(body).encode()
    if dice.random() < 0.1:
        cut = bytearray(raw[: dice.randrange(len(raw))] if dice.random() < 0.5 else raw)
        for _ in range(min(len(cut), 3)):
            cut[dice.randrange(len(cut))] = dice.randrange(256)
        raw = bytes(cut)
    headers = {"content-type": "application/json"}
    if dice.random() < 0.05:
        headers["content-type"] = dice.choice(("text/plain", "application/json; charset=utf-16", "", "a/b;" * 50))
    if dice.random() < 0.05:
        name = dice.choice(("x-request-id", "x-kronos-device", "accept", "content-encoding", "authorization"))
        headers[name] = dice.choice(("cpu", "tpu", "x" * 300, "gzip", "Bearer a", "a b"))
    method = "POST"
    if dice.random() < 0.05:
        method, path = (
            dice.choice(("GET", "PUT", "DELETE", "POST")),
            dice.choice(("/v1/x", "/v1/../etc", "/v1/models", path)),
        )
    return method, path, raw, headers


def _mutate(node: Any, dice: random.Random) -> None:
    """Replaces, removes or adds one thing, at a random depth."""
    while isinstance(node, dict | list) and node:
        key = dice.choice(list(node)) if isinstance(node, dict) else dice.randrange(len(node))
        if isinstance(node[key], dict | list) and node[key] and dice.random() < 0.8:
            node = node[key]
            continue
        what = dice.random()
        if what < 0.7:
            node[key] = copy.deepcopy(dice.choice(NASTY))
        elif what < 0.85:
            del node[key]
        elif isinstance(node, dict):
            node[dice.choice(("extra", "", "Close", "__proto__"))] = dice.choice(NASTY)
        else:
            node.append(copy.deepcopy(dice.choice(NASTY)))
        return


async def fuzz(url: str, count: int, clients: int = 8, seed: int = 0) -> dict[str, int]:
    """Statuses of `count` generated requests; "0" where the connection broke."""
    statuses: Counter[str] = Counter()
    left = iter(range(count))
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:

        async def client() -> None:
            for index in left:
                method, path, raw, headers = generated(random.Random(f"{seed}/{index}"))
                try:
                    async with session.request(method, url + path, data=raw, headers=headers) as response:
                        await response.read()
                        status = str(response.status)
                except (aiohttp.ClientError, TimeoutError):
                    status = "0"
                if status == "0" or int(status) >= 500:
                    print(f"# request {seed}/{index}: {status}", file=sys.stderr, flush=True)
                statuses[status] += 1

        await asyncio.gather(*(client() for _ in range(clients)))
    return dict(sorted(statuses.items()))


def schemathesis(url: str, examples: int) -> int:
    """Requests made from /openapi.json. Returns the exit status: 0 if no answer was a 5xx or broke the schema."""
    tool = Path(sys.executable).parent / "schemathesis"
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [str(tool), "run", f"{url}/openapi.json", "--url", url, "--checks", checks]
    return subprocess.run(
        [*command, "--max-examples", str(examples), "--request-timeout", "60"], check=False
    ).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument(
        "--schemathesis", type=int, default=0, metavar="EXAMPLES", help="per route, made from the schema"
    )
    options = parser.parse_args()
    wrong, asked, disturbed = check_poison(options.url)
    statuses = asyncio.run(fuzz(options.url, options.requests))
    print(json.dumps({"bad inputs": asked, "wrong": wrong, "disturbed": disturbed, "generated": statuses}, indent=1))
    broken = schemathesis(options.url, options.schemathesis) if options.schemathesis else 0
    return int(bool(wrong or disturbed or broken or any(int(s) >= 500 or s == "0" for s in statuses)))


if __name__ == "__main__":
    sys.exit(main())
