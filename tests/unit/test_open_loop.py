"""The load generator, over servers that misbehave: what it counts is what the tables say."""

import asyncio
import contextlib
import time

import pytest
from aiohttp import web

from benchmarks import open_loop, records
from benchmarks.load import within_limits
from benchmarks.open_loop import Run, Shot, digest, fire


@contextlib.asynccontextmanager
async def serving(handler):
    app = web.Application()
    app.router.add_post("/v1/forecast", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def run(handler, rate=50, seconds=0.2, **options):
    async def go():
        async with serving(handler) as url:
            return await fire(url, [b"{}"], rate, seconds, **options)

    return asyncio.run(go())


def test_latency_counts_from_the_intended_time():
    """A server that stands still for 0.3 s delays all who wanted to come meanwhile, though each is answered at once."""

    async def handler(request):
        if not handler.called:
            handler.called = True
            time.sleep(0.3)  # the generator's own loop: nothing can be sent either
        return web.Response(text="{}")

    handler.called = False
    result = run(handler)
    assert [shot.status for shot in result.shots] == [200] * 10
    assert [shot.intended for shot in result.shots] == [i / 50 for i in range(10)]
    assert result.percentiles()["p50"] > 100
    assert min(shot.latency for shot in result.shots) > 0


def test_statuses_and_retry(monkeypatch):
    monkeypatch.setattr(open_loop, "CONNECT_RETRY_S", 0.01)  # so that a second try comes before the next request

    async def handler(request):
        handler.count += 1
        if handler.count == 1:
            return web.Response(status=429, headers={"Retry-After": "1"}, text='{"error": {}}')
        if handler.count == 2:
            request.transport.close()
        if handler.count == 4:
            return web.Response(status=500, text="Internal Server Error")
        return web.Response(text="{}")

    handler.count = 0
    plain = run(handler, rate=20, seconds=0.25)
    assert plain.statuses() == {"200": 2, "429": 1, "500": 1, "ServerDisconnectedError": 1}
    assert plain.shots[0].retry_after == "1"
    assert len(plain.failed) == 3
    handler.count = 0
    careful = run(handler, rate=20, seconds=0.25, retry=True)
    assert careful.statuses() == {"200": 5}
    assert [shot.tries for shot in careful.shots] == [2, 2, 2, 1, 1]
    assert careful.shots[0].latency > 1


def test_what_a_run_says():
    shots = [Shot(i, i / 10, i / 10 + 0.1, 200) for i in range(10)] + [Shot(10, 1.0, 3.0, 503)]
    result = Run(10.0, 1.1, 100.0, shots)
    assert result.goodput == pytest.approx(10 / 1.1)
    assert result.percentiles() == {"p50": 100.0, "p99": 100.0, "p99.9": 100.0, "max": 100.0}
    assert result.in_flight(100.05) == 1
    assert result.in_flight(102) == 1
    assert result.in_flight(104) == 0
    assert not within_limits(result)
    assert within_limits(Run(10.0, 1.0, 0.0, shots[:10]))


def test_digest_is_of_the_numbers():
    assert digest(b'{"device_warning":null,"series":[1]}') == digest(b'{"device_warning":"lost","series":[1]}')
    assert digest(b'{"series":[1]}') != digest(b'{"series":[2]}')


def test_table():
    text = records.table([{"case": "a", "x": 1}, {"case": "longer", "y": 2}])
    assert text.splitlines() == ["| case   | x | y |", "|--------|---|---|", "| a      | 1 |   |", "| longer |   | 2 |"]
