"""Groups, retries and bounded waits of the ingress' backend, over handles that are no Ray's."""

import asyncio
import time

import pytest
from ray.exceptions import ActorDiedError

from cluster.plan import Plan, PlannedGroup, Scale
from serve_app import routing
from serve_app.errors import ServiceError
from serve_app.jobs import DeviceFacts, Done, Failed, Identity, Job
from serve_app.listing import REPLICAS
from serve_app.routing import RayBackend, deployment_name

FACTS = DeviceFacts("cpu", "cpu", "a processor", "fp32", "exact", False, False, False)
DONE = Done((), Identity("m", "local", None, "0", 1, 512, "m", "t"), FACTS, "r")
JOB = Job("id", "m", (), 10.0)


class Response:
    def __init__(self, outcome):
        self.outcome, self.cancelled = outcome, False

    def __await__(self):
        return self._wait().__await__()

    async def _wait(self):
        if self.outcome is None:
            await asyncio.sleep(60)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def cancel(self):
        self.cancelled = True


class Handle:
    """Gives one outcome after another: a result, an exception, or None for no answer at all."""

    def __init__(self, *outcomes):
        self.outcomes, self.responses = list(outcomes), []

    def options(self, method_name):
        return self

    def remote(self, job):
        self.responses.append(Response(self.outcomes.pop(0)))
        return self.responses[-1]


@pytest.fixture(autouse=True)
def listing(monkeypatch):
    monkeypatch.setattr(routing, "POLL_S", 0.01)
    REPLICAS.clear()
    yield REPLICAS
    REPLICAS.clear()


NEWS = {"queued": 0, "running_rows": 0, "cache_slots_used": 0, "cache_slots_free": 9, "counters": {}}


def entry(group):
    device = dict(vars(FACTS))
    return {
        "node": "n",
        "metadata": {"group": group, "pid": 7, "device": device, **NEWS, "models": {}},
        "stats": {},
    }


def backend(handles, wait_s=0.1, alive=None):
    for group in handles if alive is None else alive:
        REPLICAS[deployment_name(group)] = {f"{group}-1": entry(group)}
    groups = tuple(PlannedGroup(name, 1.0, 0.0, Scale()) for name in handles)
    return RayBackend(handles, Plan(groups), wait_s)


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
    answered = ask(backend({"gpu": Handle(), "cpu": Handle(DONE)}, alive=["cpu"]))
    assert answered.group == "cpu"
    assert "no live replica" in answered.warnings[0]


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

    assert asyncio.run(late()).group == "cpu"


def test_a_lost_replica_is_retried_once():
    retries = []
    made = backend({"cpu": Handle(ActorDiedError(), DONE)})
    made.on_retry = lambda: retries.append(1)
    assert ask(made).done is DONE
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


def test_giving_up_cancels_the_call():
    handles = {"cpu": Handle(None)}
    made = backend(handles)

    async def go():
        async with asyncio.timeout(0.05):
            await made.forecast(JOB, None)

    with pytest.raises(TimeoutError):
        asyncio.run(go())
    assert handles["cpu"].responses[0].cancelled


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
