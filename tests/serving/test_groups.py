"""Streams, hung engines and groups that sleep, on a cluster."""

import asyncio
import os
import signal
import threading
import time

import httpx
import numpy as np
import pytest

from cluster.plan import Plan, PlannedGroup, Scale
from model.types import Sampling, Series
from serve_app.admission import Admission
from serve_app.deployment import warm_up_series
from serve_app.jobs import Answered, Bars, Job, Task
from serve_app.routing import RayBackend
from tests.serving.slow_engine import HANGS, STEP_S


@pytest.fixture
def backend(applications, ray_serve, wait):
    """The application "slow", as its ingress sees it, in this process."""
    serve, _ = ray_serve
    handles = {"cpu": serve.get_deployment_handle("kronos_cpu", "slow")}
    made = RayBackend(
        handles,
        Plan((PlannedGroup("cpu", 1.0, 0.0, Scale()),)),
        Admission({"cpu": 10**6}, {"cpu": 60.0}, {"cpu": 16}),
        replica_wait_s=20,
    )
    wait(lambda: len(made.replicas()) == 2, 30)
    return made


def job_of(horizon, tasks=1, **sampling):
    short = warm_up_series()
    series = Series(short.candles, short.marks, np.zeros((horizon, 5), np.int64))
    return Job("id", "kronos-bundled", tuple(Task(series, Sampling(seed=i, **sampling)) for i in range(tasks)), 60.0)


def assert_whole(items, tasks):
    """Every bar came once, in order, and they are those of the answer."""
    *bars, last = items
    assert isinstance(last, Answered)
    for task in range(tasks):
        pieces = [piece for piece in bars if piece.task == task]
        assert [piece.first for piece in pieces] == [0, *np.cumsum([p.values.shape[1] for p in pieces])[:-1]]
        whole = np.concatenate([piece.values for piece in pieces], axis=1)
        np.testing.assert_array_equal(whole, last.done.paths[task].values)


def test_bars_come_while_the_rest_is_computed(backend):
    async def go():
        items, times = [], []
        async for item in backend.stream(job_of(40, tasks=2, samples=3), None):
            items.append(item)
            times.append(time.monotonic())
        return items, times

    items, times = asyncio.run(go())
    assert_whole(items, 2)
    # Not at the end, and not all at once.
    assert times[-1] - times[0] > 20 * STEP_S
    assert len(items) > 20


def running(backend):
    return [view for view in backend.replicas() if view.running_rows]


def test_closing_a_stream_stops_the_computing(backend, wait):
    async def go():
        stream = backend.stream(job_of(1000), None)
        await anext(stream)
        await stream.aclose()

    asyncio.run(go())
    # It would have taken 50 s.
    wait(lambda: not running(backend), 5)


def test_a_stream_survives_the_kill_of_its_replica(backend, wait):
    async def go():
        items, killed = [], None
        async for item in backend.stream(job_of(100, samples=2), None):
            items.append(item)
            if killed is None and isinstance(item, Bars) and item.first > 30:
                (view,) = await asyncio.to_thread(wait, lambda: running(backend), 5)
                os.kill(view.pid, signal.SIGKILL)
                killed = view.replica_id
        return items, killed

    items, killed = asyncio.run(go())
    assert_whole(items, 1)
    assert items[-1].done.replica_id != killed
    wait(lambda: len(backend.replicas()) == 2 and killed not in {v.replica_id for v in backend.replicas()}, 40)


def test_overload_is_refused_at_once_and_what_was_taken_is_answered(slow, request_body, wait):
    def outstanding():
        return [one["outstanding_work"] for one in slow.get("/v1/replicas").json()["replicas"]]

    # What other tests sent from a backend of their own is known until the replicas report again.
    wait(lambda: outstanding() == [0, 0], 30)
    answers = []
    large = request_body(16, 100, samples=30)
    thread = threading.Thread(target=lambda: answers.append(slow.post("/v1/forecast", json=large)))
    thread.start()
    wait(lambda: any(outstanding()), 5)
    times = []
    for _ in range(10):
        started = time.monotonic()
        response = slow.post("/v1/forecast", json=large)
        times.append(time.monotonic() - started)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        assert 1 <= int(response.headers["retry-after"]) <= 30
    thread.join()
    assert answers[0].status_code == 200
    print(f"refused after {1000 * sorted(times)[5]:.0f} ms, median of 10")
    wait(lambda: slow.post("/v1/forecast", json=large).status_code == 200, 30)


def test_idle_models_make_room_and_bad_ones_do_not(slow, request_body, wait):
    """A replica has room for the always-on model and two others."""

    def loaded():
        found = [set(one["models"]) for one in slow.get("/v1/replicas").json()["replicas"]]
        assert all(len(models) <= 3 and "kronos-bundled" in models for models in found)
        return found

    for model in "bcdbcd":
        for _ in range(4):
            response = slow.post("/v1/forecast", json=request_body(16, 1, model=model))
            assert (response.status_code, response.json()["model"]["id"]) == (200, model)
    wait(lambda: all(len(models) == 3 for models in loaded()), 5)
    time.sleep(1.5)  # until the replicas have reported the last of it
    before = loaded()
    for model, code in (("bad", 503), ("unknown", 404)):
        assert slow.post("/v1/forecast", json=request_body(16, 1, model=model)).status_code == code
    time.sleep(1.5)  # until the replicas have reported again
    assert loaded() == before
    (bad,) = (one for one in slow.get("/v1/models").json()["models"] if one["id"] == "bad")
    assert bad["state"] == "failed"
    assert bad["error"].endswith("model.safetensors: head.weight is missing")
    assert "secret" not in bad["error"]


def test_a_hung_engine_is_replaced_and_a_busy_one_is_not(slow, request_body, wait):
    """The hung job's retry hangs the other replica too, so both are replaced; the busy ones before are left alone."""

    def pids():
        return {replica["pid"] for replica in slow.get("/v1/replicas").json()["replicas"]}

    wait(lambda: len(pids()) == 2, 30)
    before = pids()
    answers = []

    def ask(**settings):
        answers.append(slow.post("/v1/forecast", json=request_body(16, settings.pop("horizon"), **settings)))

    # Longer than the time after which an engine counts as hung, step after step.
    busy = [threading.Thread(target=ask, kwargs={"horizon": 120}) for _ in range(4)]
    for thread in busy:
        thread.start()
    for thread in busy:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 4
    assert pids() == before

    started = time.monotonic()
    thread = threading.Thread(target=ask, kwargs={"horizon": 1, "top_k": HANGS, "deadline_ms": 20_000})
    thread.start()
    wait(lambda: before - pids(), 15)
    print(f"left the listing after {time.monotonic() - started:.1f} s")
    thread.join()
    assert answers[-1].status_code in (408, 503)
    wait(lambda: len(pids()) == 2, 40)
    wait(lambda: slow.post("/v1/forecast", json=request_body(16, 1)).status_code == 200, 20)


# --- sleep ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sleepy(ray_serve):
    """An application whose only group may have no replica."""
    from serve_app.app import assemble
    from serve_app.config import AppConfig
    from tests.serving.slow_engine import SlowFactory

    serve, url = ray_serve
    scaling = {"min_replicas": 0, "max_replicas": 2, "target_work": 200, "upscale_delay_s": 0, "downscale_delay_s": 1}
    config = AppConfig(groups={"gpu": {"mode": "off"}, "cpu": {"num_cpus": 0.5, "autoscaling": scaling}})
    serve.run(assemble(config, {}, None, SlowFactory), name="sleepy", route_prefix="/sleepy")
    with httpx.Client(base_url=f"{url}/sleepy", timeout=60) as client:
        yield client
    serve.delete("sleepy", _blocking=False)


def replicas(client):
    return client.get("/v1/replicas").json()["replicas"]


def test_a_group_sleeps_and_the_next_request_wakes_it(sleepy, request_body, wait):
    wait(lambda: not replicas(sleepy), 60)
    assert sleepy.get("/v1/readyz").status_code == 200
    assert sleepy.get("/v1/healthz/detailed").json()["status"] == "healthy"
    started = time.monotonic()
    assert sleepy.post("/v1/forecast", json=request_body(16, 1)).status_code == 200
    took = time.monotonic() - started
    print(f"the first answer from zero took {took:.1f} s")
    assert len(replicas(sleepy)) == 1
    wait(lambda: not replicas(sleepy), 60)


def test_work_brings_replicas_and_its_absence_takes_them(sleepy, request_body, wait):
    # 25 s of work each, so that the second replica comes while there is some; closing the streams ends it.
    body = request_body(16, 500, samples=2, stream=True)
    with sleepy.stream("POST", "/v1/forecast", json=body), sleepy.stream("POST", "/v1/forecast", json=body):
        wait(lambda: len(replicas(sleepy)) == 2, 60)
    wait(lambda: not replicas(sleepy), 60)
