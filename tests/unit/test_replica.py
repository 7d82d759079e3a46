"""The replica and its models over a fake engine, without Serve."""

import asyncio
import threading
import time

import numpy as np
import pytest

from model.errors import (
    CheckpointNotFoundError,
    ForecastCancelledError,
    InputError,
    QueueFullError,
    RequestTooLargeError,
)
from model.types import Paths, Sampling, Window
from serve_app.config import AppConfig
from serve_app.deployment import KronosReplica, warm_up_series
from serve_app.engine import group_device
from serve_app.jobs import DeviceFacts, Done, Failed, Identity, Job, Task
from serve_app.model_store import ModelStore, ModelUnavailableError

FACTS = DeviceFacts("cpu", "cpu", "a processor", "fp32", "exact", False, False, False)


REFUSALS = {17: QueueFullError, 19: RequestTooLargeError}
"""top_k → what the fake engine raises."""


class FakeEngine:
    """Takes step_s per bar, and looks at should_stop before each."""

    def __init__(self, alias, step_s=0.0):
        self.identity = Identity(alias, "local", None, "0" * 64, 1, 512, "m", "t")
        self.device = FACTS
        self.step_s = step_s
        self.steps = 0

    def cache_slots(self):
        return 3, 7

    def stats(self):
        return {"steps": self.steps, "rows": self.steps}

    def forecast(self, series, sampling, *, window="exact", should_stop=None, on_step=None, on_bars=None):
        if sampling.top_k == 13:
            raise InputError("thirteen", code="unlucky", column="close", row=4)
        if sampling.top_k in REFUSALS:
            raise REFUSALS[sampling.top_k]("refused")
        for _ in range(series.horizon):
            if should_stop is not None and should_stop():
                raise ForecastCancelledError("stopped")
            time.sleep(self.step_s)
            self.steps += 1
        values = np.full((sampling.samples, series.horizon, 6), float(sampling.seed))
        return Paths(values, np.zeros((sampling.samples, series.horizon, 2), np.int64), Window(8, False))


class FakeFactory:
    """`missing` cannot be found, until it is taken out; everything else loads in load_s."""

    def __init__(self, config, step_s=0.0, load_s=0.0, missing=()):
        self.step_s, self.load_s, self.missing = step_s, load_s, set(missing)
        self.engines, self.loads, self.threads = {}, [], None

    def __call__(self, alias, group):
        self.loads.append((alias, threading.current_thread().name))
        time.sleep(self.load_s)
        if alias in self.missing:
            raise CheckpointNotFoundError(f"/a/secret/path: no {alias}")
        self.engines[alias] = FakeEngine(alias, self.step_s)
        return self.engines[alias]

    def device(self, group):
        return FACTS

    def prepare_process(self, threads):
        self.threads = threads


def make_replica(limits=None, group=None, **factory):
    models = {name: {"source": "bundled"} for name in ("a", "b", "gone")}
    config = AppConfig(models=models, default_model="a", limits=limits or {}, groups={"cpu": group or {}})
    made = []

    def factory_of(config):
        made.append(FakeFactory(config, **factory))
        return made[0]

    return KronosReplica("cpu", config, factory_of), made[0]


def make_job(horizon=2, count=1, model="a", timeout_s=10.0, **sampling):
    series = warm_up_series()
    marks = np.zeros((horizon, 5), np.int64)
    long = type(series)(series.candles, series.marks, marks)
    tasks = tuple(Task(long, Sampling(seed=i, **sampling)) for i in range(count))
    return Job("id", model, tasks, timeout_s)


def test_a_job():
    replica, factory = make_replica(group={"num_cpus": 2.5})
    assert (factory.threads, factory.loads) == (2, [("a", "MainThread")])
    done = asyncio.run(replica.forecast(make_job(count=3)))
    assert isinstance(done, Done)
    assert [paths.values[0, 0, 0] for paths in done.paths] == [0.0, 1.0, 2.0]
    assert done.identity.id == "a"
    assert done.replica_id.startswith("pid-")
    assert done.compute_ms > 0


def test_the_event_loop_stays_free_while_a_model_computes_or_loads():
    replica, factory = make_replica(step_s=0.05, load_s=0.3)

    async def go():
        jobs = [asyncio.ensure_future(replica.forecast(make_job(10, model=model))) for model in ("a", "a", "b")]
        longest, before = 0.0, time.monotonic()
        while not all(job.done() for job in jobs):
            await asyncio.sleep(0.005)
            now = time.monotonic()
            longest, before = max(longest, now - before), now
        return [job.result() for job in jobs], longest

    results, longest = asyncio.run(go())
    assert all(isinstance(result, Done) for result in results)
    assert longest < 0.2
    assert ("b", "MainThread") not in factory.loads


def test_at_most_as_many_at_once_as_there_are_workers():
    replica, _ = make_replica(step_s=0.05, group={"workers": 2})

    async def go():
        job = asyncio.ensure_future(replica.forecast(make_job(4, count=6, samples=3)))
        await asyncio.sleep(0.1)
        news = await replica.record_routing_stats()
        await job
        return news, await replica.record_routing_stats()

    news, after = asyncio.run(go())
    assert (news["queued"], news["running_rows"]) == (4, 6)
    assert (after["queued"], after["running_rows"]) == (0, 0)


def test_a_full_queue_refuses():
    replica, _ = make_replica(group={"max_queued_series": 2})
    result = asyncio.run(replica.forecast(make_job(count=3)))
    assert (result.code, result.retry_after_s) == ("queue_full", 1.0)


def test_cancelling_and_deadlines_stop_the_computing_within_a_step():
    replica, factory = make_replica(step_s=0.02, group={"workers": 1})

    async def cancel():
        job = asyncio.ensure_future(replica.forecast(make_job(1000, count=5)))
        await asyncio.sleep(0.1)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        steps = factory.engines["a"].steps
        await asyncio.sleep(0.2)
        return steps, factory.engines["a"].steps, await replica.record_routing_stats()

    then, now, news = asyncio.run(cancel())
    assert now - then <= 1
    assert (news["queued"], news["running_rows"]) == (0, 0)
    started = time.monotonic()
    result = asyncio.run(replica.forecast(make_job(1000, timeout_s=0.1)))
    assert result == Failed("deadline_passed", "the deadline passed")
    assert time.monotonic() - started < 1.0


def test_a_bad_task_says_which_and_ends_its_job():
    replica, _ = make_replica()
    job = make_job(count=2)
    bad = Task(job.tasks[0].series, Sampling(seed=0, top_k=13))
    result = asyncio.run(replica.forecast(Job("id", "a", (job.tasks[1], bad), 10.0)))
    assert (result.code, result.rule, result.task, result.column, result.row) == (
        "invalid_fields", "unlucky", 1, "close", 4,
    )  # fmt: skip


@pytest.mark.parametrize(("top_k", "code"), [(17, "queue_full"), (19, "cost_over_limit")])
def test_what_the_engine_refuses_is_an_answer(top_k, code):
    replica, _ = make_replica()
    job = make_job()
    refused = Task(job.tasks[0].series, Sampling(seed=0, top_k=top_k))
    assert asyncio.run(replica.forecast(Job("id", "a", (refused,), 10.0))).code == code


def test_a_model_that_cannot_be_found_leaves_the_others_working():
    replica, factory = make_replica(missing={"gone"}, limits={"load_retry_s": 30})

    async def go():
        first = await replica.forecast(make_job(model="gone"))
        again = await replica.forecast(make_job(model="gone"))
        other = await replica.forecast(make_job(model="b"))
        return first, again, other, (await replica.record_routing_stats())["models"]

    first, again, other, models = asyncio.run(go())
    assert first.code == again.code == "model_unavailable"
    assert "secret" not in first.message
    assert 0 < again.retry_after_s <= 30
    assert [alias for alias, _ in factory.loads].count("gone") == 1
    assert isinstance(other, Done)
    assert [models[alias]["state"] for alias in ("a", "b", "gone")] == ["loaded", "loaded", "failed"]


def test_a_model_that_loads_slowly_is_not_waited_for():
    replica, _ = make_replica(load_s=0.4, limits={"load_wait_s": 0.1})

    async def go():
        early = await replica.forecast(make_job(model="b"))
        await asyncio.sleep(0.5)
        return early, await replica.forecast(make_job(model="b"))

    early, late = asyncio.run(go())
    assert (early.code, early.retry_after_s) == ("model_unavailable", 5.0)
    assert "being loaded" in early.message
    assert isinstance(late, Done)


def test_an_always_on_model_that_failed_is_tried_again():
    replica, factory = make_replica(missing={"a"}, limits={"load_retry_s": 0.1})

    async def go():
        states = [(await replica.record_routing_stats())["models"]["a"]["state"]]
        factory.missing.clear()
        for _ in range(50):
            await asyncio.sleep(0.05)
            states.append((await replica.record_routing_stats())["models"]["a"]["state"])
            if states[-1] == "loaded":
                break
        return states

    states = asyncio.run(go())
    assert (states[0], states[-1]) == ("failed", "loaded")


def test_one_load_for_many_askers_even_if_the_first_gives_up():
    loads = []

    def load(alias):
        loads.append(alias)
        time.sleep(0.2)
        return FakeEngine(alias)

    async def go():
        store = ModelStore(load, retry_s=1.0)
        askers = [asyncio.ensure_future(store.get("a")) for _ in range(5)]
        await asyncio.sleep(0.05)
        assert store.states(["a", "b"]) == {"a": {"state": "loading"}, "b": {"state": "idle"}}
        askers[0].cancel()
        return await asyncio.gather(*askers[1:])

    engines = asyncio.run(go())
    assert loads == ["a"]
    assert len({id(engine) for engine in engines}) == 1


def test_a_failure_is_remembered_for_its_time():
    now, loads = [0.0], []

    def load(alias):
        loads.append(alias)
        raise CheckpointNotFoundError("no")

    async def go():
        store = ModelStore(load, retry_s=10.0, clock=lambda: now[0])
        waits = []
        for now[0] in (0.0, 4.0, 11.0):
            with pytest.raises(ModelUnavailableError) as caught:
                await store.get("a")
            waits.append(caught.value.retry_after_s)
        return waits

    assert asyncio.run(go()) == [10.0, 6.0, 10.0]
    assert loads == ["a", "a"]


def test_the_group_decides_the_device():
    assert group_device("auto", "cpu") == ("cpu", None)
    assert group_device("cpu", "cpu") == ("cpu", None)
    assert group_device("mps", "cpu") == ("mps", None)
    device, warning = group_device("cuda:0", "cpu")
    assert device == "cpu"
    assert "'cuda:0' was requested" in warning
    assert group_device("auto", "gpu") == ("cuda", None)
    assert group_device("cuda:1", "gpu") == ("cuda:1", None)
