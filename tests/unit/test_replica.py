"""The replica and its models over a fake engine, without Serve."""

import asyncio
import sys
import threading
import time
from dataclasses import replace

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
from serve_app.computing import Workers
from serve_app.config import AppConfig
from serve_app.deployment import HungEngineError, KronosReplica, warm_up_series
from serve_app.engine import group_device
from serve_app.jobs import Candidate, Chunk, DeviceFacts, Done, Failed, Identity, Job, Resume, Task
from serve_app.live_config import LiveConfig
from serve_app.priority import FORECASTS, LOADING
from tests.niceness import niceness

FACTS = DeviceFacts("cpu", "cpu", "a processor", "fp32", "exact", False, False, False)


REFUSALS = {17: QueueFullError, 19: RequestTooLargeError}
"""top_k → what the fake engine raises."""


class FakeEngine:
    """Takes step_s per bar, and looks at should_stop before each. hold: an event that the second bar waits for."""

    def __init__(self, alias, step_s=0.0):
        self.identity = Identity(alias, "local", None, "0" * 64, 1, 512, "m", "t")
        self.calibration = None
        self.device = FACTS
        self.step_s = step_s
        self.hold = None
        self.steps = 0
        self.stalled = 0.0
        self.companions = []

    def release_thread(self):
        self.thread_released = True

    def cache_slots(self):
        return 3, 7

    def stats(self):
        return {"steps": self.steps, "rows": self.steps}

    def stalled_s(self):
        return self.stalled

    def forecast(
        self, series, sampling, *, window="exact", should_stop=None, on_step=None, on_bars=None, companions=None
    ):
        self.companions.append(companions)
        if sampling.top_k == 13:
            raise InputError("thirteen", code="unlucky", column="close", row=4)
        if sampling.top_k in REFUSALS:
            raise REFUSALS[sampling.top_k]("refused")
        values = np.full((sampling.samples, series.horizon, 6), float(sampling.seed))
        values += np.arange(series.horizon)[:, None] / 1000
        for i in range(series.horizon):
            if should_stop is not None and should_stop():
                raise ForecastCancelledError("stopped")
            if i > 0 and self.hold is not None:
                assert self.hold.wait(60)
            time.sleep(self.step_s)
            self.steps += 1
            if on_bars is not None:
                on_bars(i, values[:, i : i + 1])
        return Paths(values, np.zeros((sampling.samples, series.horizon, 2), np.int64), Window(8, False))


class FakeFactory:
    """`missing` cannot be found, until it is taken out; everything else loads in load_s."""

    def __init__(self, step_s=0.0, load_s=0.0, missing=()):
        self.step_s, self.load_s, self.missing = step_s, load_s, set(missing)
        self.engines, self.loads, self.threads = {}, [], None

    def __call__(self, alias, settings):
        self.loads.append((alias, threading.current_thread().name))
        self.loaded_at = niceness()
        time.sleep(self.load_s)
        if alias in self.missing:
            raise CheckpointNotFoundError(f"/a/secret/path: no {alias}")

        def start():
            self.engines[alias] = FakeEngine(alias, self.step_s)
            return self.engines[alias]

        return Candidate(1, start, start)

    def device(self):
        return FACTS

    def prepare_process(self, threads):
        self.threads, self.prepared_at = threads, niceness()


def make_replica(limits=None, group=None, **factory):
    models = {name: {"source": "bundled"} for name in ("a", "b", "gone")}
    config = AppConfig(models=models, default_model="a", limits=limits or {}, groups={"cpu": group or {}})
    made = FakeFactory(**factory)
    return KronosReplica("cpu", LiveConfig(config, {}), lambda config, group: made), made


def make_job(horizon=2, count=1, model="a", timeout_s=10.0, **sampling):
    series = warm_up_series()
    marks = np.zeros((horizon, 5), np.int64)
    long = type(series)(series.candles, series.marks, marks)
    tasks = tuple(Task(long, Sampling(seed=i, **sampling)) for i in range(count))
    return Job("id", model, tasks, timeout_s)


async def whole(replica, job):
    """What a job ends with, where nobody asks for bars before: the only item."""
    (end,) = [item async for item in replica.forecast(job)]
    return end


def test_a_job():
    replica, factory = make_replica(group={"num_cpus": 2.5})
    assert (factory.threads, factory.loads) == (2, [("a", "load_0")])
    done = asyncio.run(whole(replica, make_job(count=3)))
    assert isinstance(done, Done)
    assert [paths.values[0, 0, 0] for paths in done.paths] == [0.0, 1.0, 2.0]
    assert done.identity.id == "a"
    assert done.replica_id.startswith("pid-")
    assert done.compute_ms > 0


def test_the_event_loop_stays_free_while_a_model_computes_or_loads():
    replica, factory = make_replica(step_s=0.05, load_s=0.3)

    async def go():
        jobs = [asyncio.ensure_future(whole(replica, make_job(10, model=model))) for model in ("a", "a", "b")]
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
        job = asyncio.ensure_future(whole(replica, make_job(4, count=6, samples=3)))
        await asyncio.sleep(0.1)
        news = await replica.record_routing_stats()
        await job
        return news, await replica.record_routing_stats()

    news, after = asyncio.run(go())
    assert (news["queued"], news["running_rows"]) == (4, 6)
    assert (after["queued"], after["running_rows"]) == (0, 0)


def test_a_full_queue_refuses():
    """An idle replica takes a job of any size; a busy one up to twice its bound: the ingress refuses before that."""
    replica, _ = make_replica(step_s=0.05, group={"max_outstanding_work": 10})

    async def go():
        large = asyncio.ensure_future(whole(replica, make_job(18)))
        await asyncio.sleep(0.05)
        return await whole(replica, make_job(2)), await large

    refused, large = asyncio.run(go())
    assert (refused.code, refused.retry_after_s) == ("queue_full", 1.0)
    assert isinstance(large, Done)


def test_cancelling_and_deadlines_stop_the_computing_within_a_step():
    replica, factory = make_replica(step_s=0.02, group={"workers": 1})

    async def cancel():
        job = asyncio.ensure_future(whole(replica, make_job(1000, count=5)))
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
    result = asyncio.run(whole(replica, make_job(1000, timeout_s=0.1)))
    assert result == Failed("deadline_passed", "the deadline passed")
    assert time.monotonic() - started < 1.0


def test_a_bad_task_says_which_and_ends_its_job():
    replica, _ = make_replica()
    job = make_job(count=2)
    bad = Task(job.tasks[0].series, Sampling(seed=0, top_k=13))
    result = asyncio.run(whole(replica, Job("id", "a", (job.tasks[1], bad), 10.0)))
    assert (result.code, result.rule, result.task, result.column, result.row) == (
        "invalid_fields", "unlucky", 1, "close", 4,
    )  # fmt: skip


@pytest.mark.parametrize(("top_k", "code"), [(17, "queue_full"), (19, "cost_over_limit")])
def test_what_the_engine_refuses_is_an_answer(top_k, code):
    replica, _ = make_replica()
    job = make_job()
    refused = Task(job.tasks[0].series, Sampling(seed=0, top_k=top_k))
    assert asyncio.run(whole(replica, Job("id", "a", (refused,), 10.0))).code == code


def test_a_model_that_cannot_be_found_leaves_the_others_working():
    replica, factory = make_replica(missing={"gone"}, limits={"load_retry_s": 30})

    async def go():
        first = await whole(replica, make_job(model="gone"))
        again = await whole(replica, make_job(model="gone"))
        other = await whole(replica, make_job(model="b"))
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
        early = await whole(replica, make_job(model="b"))
        await asyncio.sleep(0.5)
        return early, await whole(replica, make_job(model="b"))

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


def collect(replica, job, resume=None):
    """(chunks, the last item) of a stream."""

    async def go():
        items = [item async for item in replica.forecast(job, resume, bars=True)]
        return items[:-1], items[-1]

    return asyncio.run(go())


def test_a_stream_gives_every_bar_once_and_then_the_whole():
    replica, factory = make_replica()
    taken = factory.engines["a"].hold = threading.Event()

    async def go():
        items = []
        async for item in replica.forecast(make_job(8, count=2, samples=3), bars=True):
            items.append(item)
            taken.set()
        return items

    *chunks, done = asyncio.run(go())
    assert all(isinstance(chunk, Chunk) for chunk in chunks)
    # Not all at the end: the second bar waited until somebody had the first. Coalesced: 16 bars came in fewer chunks.
    assert 1 < len(chunks) < 8
    assert all(bars.backend == "cpu" and bars.queue_ms >= 0 for chunk in chunks for bars in chunk.bars)
    for task in range(2):
        pieces = [bars for chunk in chunks for bars in chunk.bars if bars.task == task]
        assert [bars.first for bars in pieces] == list(np.cumsum([0] + [p.values.shape[1] for p in pieces[:-1]]))
        np.testing.assert_array_equal(np.concatenate([bars.values for bars in pieces], axis=1), done.paths[task].values)


def test_a_stream_goes_on_where_another_replica_stopped():
    replica, _ = make_replica()
    (first, *_), done = collect(replica, make_job(6))
    chunks, again = collect(replica, make_job(6), Resume(first.origin, (4,)))
    pieces = [bars for chunk in chunks for bars in chunk.bars]
    assert pieces[0].first == 4
    assert sum(bars.values.shape[1] for bars in pieces) == 2
    np.testing.assert_array_equal(again.paths[0].values, done.paths[0].values)


def test_a_stream_never_mixes_two_models():
    replica, factory = make_replica()
    chunks, refused = collect(replica, make_job(6), Resume("other weights/cuda/bf16", (4,)))
    assert chunks == []
    assert refused.code == "no_replica"
    assert factory.engines["a"].steps == 2  # the warm-up's


def test_closing_a_stream_stops_the_computing():
    replica, factory = make_replica(step_s=0.02)

    async def go():
        stream = replica.forecast(make_job(1000), bars=True)
        await anext(stream)
        await stream.aclose()
        await asyncio.sleep(0.05)
        steps = factory.engines["a"].steps
        await asyncio.sleep(0.2)
        return steps, await replica.record_routing_stats()

    steps, news = asyncio.run(go())
    assert factory.engines["a"].steps - steps <= 1
    assert (news["running_rows"], news["work"]) == (0, {})


def test_work_is_counted_by_who_sent_it():
    replica, _ = make_replica(step_s=0.02)

    async def go():
        jobs = [replace(make_job(10, samples=3), sender=sender) for sender in ("x", "y")]
        running = [asyncio.ensure_future(whole(replica, job)) for job in jobs]
        await asyncio.sleep(0.05)
        work = (await replica.record_routing_stats())["work"]
        scaling = await replica.record_autoscaling_stats()
        await asyncio.gather(*running)
        return work, scaling, (await replica.record_routing_stats())["work"]

    # 3 paths of 10 bars, and a step for 8 bars of history.
    assert asyncio.run(go()) == ({"x": 31, "y": 31}, {"work": 62.0}, {})


def test_a_hung_engine_makes_the_replica_unhealthy_and_a_busy_one_does_not():
    replica, factory = make_replica(group={"hang_timeout_s": 10})
    asyncio.run(replica.check_health())
    factory.engines["a"].stalled = 9.0
    asyncio.run(replica.check_health())
    factory.engines["a"].stalled = 11.0
    with pytest.raises(HungEngineError, match="11 s"):
        asyncio.run(replica.check_health())


def test_a_bad_user_config_changes_nothing():
    replica, _ = make_replica()
    before = replica.config
    asyncio.run(replica.reconfigure({"limits": {"load_wait_s": -1}}))
    asyncio.run(replica.reconfigure({"groups": {}}))
    assert replica.config == before
    asyncio.run(replica.reconfigure({"limits": {"load_wait_s": 3}}))
    assert replica.config.limits.load_wait_s == 3
    asyncio.run(replica.reconfigure({}))
    assert replica.config == before


def test_models_of_a_reconfigured_replica():
    replica, factory = make_replica()

    async def go():
        await replica.reconfigure({"models": {"new": {"source": "bundled"}}, "default_model": "new"})
        for _ in range(100):
            await asyncio.sleep(0.01)
            if "new" in factory.engines:
                break
        return [await whole(replica, make_job(model=model)) for model in ("new", "a", "b")]

    new, old, unknown = asyncio.run(go())
    assert (new.identity.id, old.identity.id) == ("new", "a")
    assert unknown.code == "unknown_model"


def test_the_group_decides_the_device():
    assert group_device("auto", "cpu") == ("cpu", None)
    assert group_device("cpu", "cpu") == ("cpu", None)
    assert group_device("mps", "cpu") == ("mps", None)
    device, warning = group_device("cuda:0", "cpu")
    assert device == "cpu"
    assert "'cuda:0' was requested" in warning
    assert group_device("auto", "gpu") == ("cuda", None)
    assert group_device("cuda:1", "gpu") == ("cuda:1", None)


def test_the_tasks_of_a_job_are_companions_and_those_of_two_jobs_are_not():
    replica, factory = make_replica()
    for _ in range(2):
        asyncio.run(whole(replica, make_job(count=3)))
    _, *asked = factory.engines["a"].companions  # but the warm-up
    assert len(asked) == 6
    assert asked[0] is asked[1] is asked[2]
    assert asked[3] is asked[4] is asked[5]
    assert asked[0] is not asked[3]


linux = pytest.mark.skipif(sys.platform != "linux", reason="priorities are a process's elsewhere")


@linux
@pytest.mark.parametrize(("yielding", "lower"), [(True, FORECASTS), (False, 0)])
def test_what_answers_goes_before_what_computes(yielding, lower):
    computing = Workers(1, yielding=yielding)._threads.submit(niceness).result()
    assert computing == min(19, niceness() + lower)


@linux
def test_what_computes_goes_before_what_loads():
    _, factory = make_replica()
    assert factory.prepared_at == factory.loaded_at == min(19, niceness() + LOADING)
    assert LOADING > FORECASTS
    assert factory.engines["a"].thread_released
