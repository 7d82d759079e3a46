"""Groups, retries and bounded waits of the ingress' backend, over handles that are no Ray's."""

import asyncio
import gc
import time
from dataclasses import replace

import numpy as np
import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import RequestCancelledError

from cluster.plan import Plan, PlannedGroup, Scale
from model.types import Sampling, Series
from serve_app import routing
from serve_app.admission import Admission
from serve_app.errors import ServiceError
from serve_app.jobs import Answered, Bars, Chunk, DeviceFacts, Done, Failed, Identity, Job, Resume, Task
from serve_app.listing import deployment_name
from serve_app.routing import RayBackend

FACTS = DeviceFacts("cpu", "cpu", "a processor", "fp32", "exact", False, False, False)
DONE = Done((), Identity("m", "local", None, "0", 1, 512, "m", "t"), FACTS, "r")
JOB = Job("id", "m", (), 10.0)


class Response:
    """A stream of items, exceptions among them. It ends after Done or Failed, by at_end if there is one; else never."""

    def __init__(self, items, at_end=None):
        self.items, self.at_end, self.ended, self.read_to_its_end, self.cancelled = items, at_end, False, False, False

    async def __anext__(self):
        if self.ended:
            self.read_to_its_end = True
            raise self.at_end or StopAsyncIteration
        if not self.items:
            await self._never()
        item = self.items.pop(0)
        if isinstance(item, Exception):
            raise item
        self.ended = isinstance(item, Done | Failed)
        return item

    def __await__(self):
        return self._never().__await__()

    async def _never(self):
        """As Ray does, it ends with an error when whoever waits gives up."""
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise RequestCancelledError("id") from None

    def cancel(self):
        self.cancelled = True


class Handle:
    """Gives one outcome after another: a result, an exception, a list of such, or None for no answer at all."""

    def __init__(self, *outcomes, at_end=None):
        self.at_end = at_end
        self.outcomes, self.responses, self.wakes, self.sent = list(outcomes), [], 0, []

    def options(self, method_name, stream=False):
        # A job that is no stream tells Ray's router too late how busy a replica is.
        assert stream or method_name == "wake"
        return self.wake() if method_name == "wake" else self

    def wake(self):
        return Waker(self)

    def remote(self, job, resume, *, bars):
        self.sent.append((job, resume))
        outcome = self.outcomes.pop(0)
        items = [outcome] if isinstance(outcome, Exception | Done | Failed) else outcome or []
        self.responses.append(Response(items, self.at_end))
        return self.responses[-1]


class Waker:
    def __init__(self, handle):
        self.handle = handle

    def remote(self):
        self.handle.wakes += 1
        return Response([])


REPLICAS = {}
"""The listing of these tests. The process's own may be written to by a router of another test's cluster."""


@pytest.fixture(autouse=True)
def listing(monkeypatch):
    monkeypatch.setattr(routing, "REPLICAS", REPLICAS)
    monkeypatch.setattr(routing, "POLL_S", 0.01)
    monkeypatch.setattr(routing, "WATCH_S", 0.02)
    monkeypatch.setattr(routing, "LEFT_ALONE_S", 0.1)
    REPLICAS.clear()
    yield REPLICAS
    REPLICAS.clear()


NEWS = {"queued": 0, "work": {}, "running_rows": 0, "cache_slots_used": 0, "cache_slots_free": 9, "counters": {}}


def entry(group):
    device = dict(vars(FACTS))
    return {
        "node": "n",
        "metadata": {"group": group, "pid": 7, "device": device, **NEWS, "models": {}},
        "stats": {},
    }


def backend(handles, wait_s=0.1, alive=None, bound=100, gpus=0.0, **options):
    for group in handles if alive is None else alive:
        REPLICAS[deployment_name(group)] = {f"{group}-1": entry(group)}
    groups = tuple(PlannedGroup(name, 1.0, 1.0, Scale(), follows_gpus=name == "gpu") for name in handles)
    bounds = dict.fromkeys(handles, bound)
    resources = {"CPU": 8.0, "GPU": gpus}
    admission = Admission(bounds, dict.fromkeys(bounds, 1e9), dict.fromkeys(bounds, 16))
    return RayBackend(handles, Plan(groups), admission, replica_wait_s=wait_s, resources=lambda: resources, **options)


def same(done):
    """Whether this is DONE, whose waiting begins where the ingress got the job."""
    return replace(done, queue_ms=0.0) == DONE


def ask(made, prefer=None, job=JOB):
    return asyncio.run(made.forecast(job, prefer))


def test_the_first_group_or_the_one_that_was_asked_for():
    made = backend({"gpu": Handle(DONE, DONE), "cpu": Handle(DONE)})
    assert (ask(made).group, ask(made).warnings) == ("gpu", ())
    answered = ask(made, "cpu")
    assert (answered.group, answered.warnings) == ("cpu", ())


def test_a_group_that_is_not_there_means_the_other_and_is_said():
    answered = ask(backend({"cpu": Handle(DONE)}), "gpu")
    assert answered.group == "cpu"
    assert "gpu group was requested" in answered.warnings[0]
    made = backend({"gpu": Handle(), "cpu": Handle(DONE, DONE)}, alive=["cpu"])
    answered = ask(made)
    # device_warning says it to all.
    assert (answered.group, answered.warnings) == ("cpu", ())
    assert made.device_warning == "the cluster has no GPU: forecasts run on the CPU"
    assert "gpu group was requested and has no live replica" in ask(made, "gpu").warnings[0]


def test_the_device_warning_follows_the_cluster():
    made = backend({"gpu": Handle(), "cpu": Handle()}, alive=["cpu"])
    assert "no GPU" in made.device_warning
    REPLICAS[deployment_name("gpu")] = {"gpu-1": entry("gpu")}
    assert made.device_warning is None
    REPLICAS[deployment_name("gpu")] = {}
    assert "no GPU" in made.device_warning
    assert backend({"cpu": Handle()}).device_warning is None


def test_no_replica_is_waited_for_a_bounded_time():
    started = time.monotonic()
    with pytest.raises(ServiceError) as caught:
        ask(backend({"cpu": Handle()}, alive=[]))
    assert (caught.value.status, caught.value.code) == (503, "no_replica")
    assert caught.value.headers["Retry-After"]
    assert 0.1 <= time.monotonic() - started < 2

    made = backend({"cpu": Handle(DONE)}, wait_s=5, alive=[])

    async def late():
        asyncio.get_running_loop().call_later(0.1, REPLICAS.update, {deployment_name("cpu"): {"x": entry("cpu")}})
        return await made.forecast(JOB, None)

    answered = asyncio.run(late())
    assert answered.group == "cpu"
    assert 50 <= answered.done.queue_ms < 5000  # waiting for a replica is waiting


def test_a_lost_replica_is_retried_once():
    retries = []
    made = backend({"cpu": Handle(ActorDiedError(), DONE)})
    made.on_retry = lambda: retries.append(1)
    assert same(ask(made).done)
    assert retries == [1]
    with pytest.raises(ServiceError) as caught:
        ask(backend({"cpu": Handle(ActorDiedError(), ActorDiedError())}))
    assert caught.value.code == "no_replica"


def test_a_job_does_not_wait_in_a_group_that_lost_its_replicas():
    handles = {"gpu": Handle(None), "cpu": Handle(DONE)}
    made = backend(handles)

    async def go():
        asyncio.get_running_loop().call_later(0.05, REPLICAS.pop, deployment_name("gpu"))
        return await made.forecast(JOB, None)

    answered = asyncio.run(go())
    assert answered.group == "cpu"
    assert handles["gpu"].responses[0].cancelled
    assert "the replica of the gpu group that had this was lost" in answered.warnings[0]


def test_giving_up_cancels_the_call():
    handles = {"cpu": Handle(None)}
    made = backend(handles)

    complaints = []

    async def go():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context["message"]))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await made.forecast(JOB, None)
        await asyncio.sleep(0)
        gc.collect()

    asyncio.run(go())
    assert handles["cpu"].responses[0].cancelled
    assert complaints == []


def test_what_a_replica_refuses_becomes_an_error():
    for failed, status in (
        (Failed("queue_full", "full", retry_after_s=2.0), 429),
        (Failed("model_unavailable", "no", retry_after_s=9.0), 503),
        (Failed("deadline_passed", "late"), 408),
        (Failed("invalid_fields", "bad", rule="unlucky", task=1, column="close", row=3), 422),
    ):
        with pytest.raises(ServiceError) as caught:
            ask(backend({"cpu": Handle(failed)}))
        assert caught.value.status == status
    (field,) = caught.value.fields
    assert (field.loc, field.code) == ((1, "close", 3), "unlucky")


def test_the_listing():
    made = backend({"gpu": Handle(), "cpu": Handle()})
    REPLICAS[deployment_name("cpu")] |= {
        "cpu-2": {
            **entry("cpu"),
            "stats": {**NEWS, "queued": 3, "running_rows": 4, "models": {"m": {"state": "loaded"}}},
        },
        "cpu-3": {"node": "n", "metadata": {}, "stats": {}},
    }
    views = made.replicas()
    assert [view.replica_id for view in views] == ["gpu-1", "cpu-1", "cpu-2"]
    assert (views[2].queued, views[2].running_rows, views[2].models) == (3, 4, {"m": {"state": "loaded"}})
    assert views[0].device == FACTS


# --- bounds -----------------------------------------------------------------------------------------------------------


def job_of(work):
    series = Series(np.zeros((0, 6), np.float32), np.zeros((0, 5), np.int64), np.zeros((work, 5), np.int64))
    return Job("id", "m", (Task(series, Sampling(samples=1)),), 10.0)


def test_a_full_group_spills_over_and_two_full_groups_refuse_at_once():
    handles = {"gpu": Handle(None, None), "cpu": Handle(None, None)}
    made = backend(handles, bound=100)

    async def go():
        running = [asyncio.ensure_future(made.forecast(job_of(60), None)) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert [len(handle.sent) for handle in handles.values()] == [1, 1]
        started = time.monotonic()
        with pytest.raises(ServiceError) as caught:
            await made.forecast(job_of(60), None)
        assert time.monotonic() - started < 0.05
        for job in running:
            job.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        return caught.value

    refused = asyncio.run(go())
    assert (refused.status, refused.code) == (429, "queue_full")
    assert 1 <= int(refused.headers["Retry-After"]) <= 30
    assert [len(handle.sent) for handle in handles.values()] == [1, 1]
    assert [made.admission.outstanding(group) for group in handles] == [0, 0]


def test_spilling_is_said_and_can_be_switched_off():
    made = backend({"gpu": Handle(None), "cpu": Handle(DONE)}, bound=100)

    async def go(made):
        busy = asyncio.ensure_future(made.forecast(job_of(100), None))
        await asyncio.sleep(0.01)
        try:
            return await made.forecast(job_of(1), None)
        finally:
            busy.cancel()

    answered = asyncio.run(go(made))
    assert answered.group == "cpu"
    assert "the gpu group is full now" in answered.warnings[0]
    with pytest.raises(ServiceError, match="as much work as they may"):
        asyncio.run(go(backend({"gpu": Handle(None), "cpu": Handle(DONE)}, bound=100, spill=False)))


def test_what_other_ingress_replicas_sent_counts():
    made = backend({"cpu": Handle(DONE)}, bound=100)
    REPLICAS[deployment_name("cpu")]["cpu-1"]["stats"] = {**NEWS, "work": {"somebody else": 90}}
    with pytest.raises(ServiceError) as caught:
        ask(made, job=job_of(20))
    assert caught.value.code == "queue_full"
    # What is known of our own work is newer than what the replica says of it.
    REPLICAS[deployment_name("cpu")]["cpu-1"]["stats"] = {**NEWS, "work": {made._sender: 90}}
    assert same(ask(made, job=job_of(20)).done)


def test_a_sleeping_group_is_woken_by_who_waits_but_never_for_gpus_that_are_not_there():
    for gpus, wakes in ((0.0, [0, 1]), (1.0, [1, 1])):
        handles = {"gpu": Handle(), "cpu": Handle(DONE)}
        made = backend(handles, wait_s=5, alive=[], gpus=gpus)

        async def go(made=made):
            asyncio.get_running_loop().call_later(0.1, REPLICAS.update, {deployment_name("cpu"): {"x": entry("cpu")}})
            return await made.forecast(JOB, None)

        REPLICAS.clear()
        assert asyncio.run(go()).group == "cpu"
        assert [handle.wakes for handle in handles.values()] == wakes


def test_a_sleeping_group_is_woken_even_by_who_may_not_wait():
    handle = Handle()
    made = backend({"cpu": handle}, wait_s=0, alive=[])

    async def go():
        with pytest.raises(ServiceError):
            await made.forecast(JOB, None)
        await asyncio.sleep(0)

    asyncio.run(go())
    assert handle.wakes == 1


@pytest.mark.parametrize("at_end", [None, ActorDiedError()])
def test_an_answer_is_read_to_its_end_and_kept_whatever_comes_there(at_end):
    """Ray counts a call as under way until then."""
    handle = Handle(DONE, at_end=at_end)
    assert same(ask(backend({"cpu": handle})).done)
    assert handle.responses[0].read_to_its_end
    assert len(handle.sent) == 1


# --- streams ----------------------------------------------------------------------------------------------------------


def chunk(first, count, origin="o"):
    values = np.arange(first, first + count, dtype=float)[None, :, None].repeat(6, 2)
    return Chunk(origin, (Bars(0, first, values, "cpu", 0.0),))


def read(made, job=None):
    async def go():
        return [item async for item in made.stream(job or job_of(10), None)]

    return asyncio.run(go())


def test_a_stream_passes_bars_on_and_ends_with_the_answer():
    made = backend({"cpu": Handle([chunk(0, 2), chunk(2, 3), DONE])})
    first, second, last = read(made)
    assert (first.first, second.first, second.values.shape) == (0, 2, (1, 3, 6))
    assert isinstance(last, Answered)
    assert same(last.done)


def test_a_retry_goes_on_where_the_lost_replica_stopped():
    handle = Handle([chunk(0, 2), chunk(2, 3), ActorDiedError()], [chunk(5, 5), DONE])
    items = read(backend({"cpu": handle}))
    assert [bars.first for bars in items[:-1]] == [0, 2, 5]
    assert [resume for _, resume in handle.sent] == [None, Resume("o", (5,))]


def test_a_stream_that_fails_raises():
    for outcome in ([chunk(0, 2), Failed("deadline_passed", "late")], [chunk(0, 2), ActorDiedError()]):
        with pytest.raises(ServiceError):
            read(backend({"cpu": Handle(outcome, [ActorDiedError()])}))


def test_closing_a_stream_cancels_the_call_and_frees_its_place():
    handle = Handle([chunk(0, 2)])
    made = backend({"cpu": handle})

    async def go():
        stream = made.stream(job_of(10), None)
        await anext(stream)
        assert made.admission.outstanding("cpu") == 10
        await stream.aclose()

    asyncio.run(go())
    assert handle.responses[0].cancelled
    assert made.admission.outstanding("cpu") == 0


def test_a_crowded_service_refuses_before_it_reads():
    made = backend({"cpu": Handle(None)}, bound=10)
    made.refuse_if_crowded()
    made.admission.start("cpu", 1, 1, 1)
    made.admission.start("cpu", 8, 1, 1)
    made.refuse_if_crowded()
    made.admission.start("cpu", 1, 1, 1)
    with pytest.raises(ServiceError) as caught:
        made.refuse_if_crowded()
    assert caught.value.code == "queue_full"
    assert backend({"cpu": Handle()}, alive=[]).refuse_if_crowded() is None


def test_a_huge_job_alone_does_not_make_a_service_crowded():
    made = backend({"cpu": Handle(None)}, bound=1000)
    made.admission.start("cpu", 900, 1, 1)
    made.refuse_if_crowded()


def test_a_large_job_is_refused_and_leaves_places_for_small_ones():
    made = backend({"cpu": Handle(None)}, bound=10)
    made.admission.start("cpu", 4, 1, 1)
    with pytest.raises(ServiceError) as caught:
        ask(made, job=job_of(9))
    assert caught.value.code == "queue_full"
    assert made.places().count == 7  # it, and six of work 1


def test_places_count_every_group_that_is_awake():
    made = backend({"gpu": Handle(None), "cpu": Handle(None)}, bound=10)
    made.admission.start("gpu", 10, 1, 1)
    assert made.places().count == 11
    for _ in range(10):
        made.admission.start("cpu", 1, 1, 1)
    assert made.places().count == 11
    assert made.places().retry_after_s >= 1


def test_nothing_is_refused_at_the_door_while_a_group_can_be_woken():
    """Overload wakes it, and only what reaches the ingress does."""
    made = backend({"gpu": Handle(), "cpu": Handle()}, alive=[])
    assert made.places() is None
    assert backend({"gpu": Handle(), "cpu": Handle()}, alive=["cpu"], gpus=1.0).places() is None
    assert backend({"gpu": Handle(), "cpu": Handle()}, alive=["cpu"]).places().count == 100
