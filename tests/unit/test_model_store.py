"""Models within a budget: leases, eviction, replacement, failures."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from model.errors import CheckpointMismatchError, CheckpointNotFoundError
from serve_app import model_store
from serve_app.catalog import ModelSpec
from serve_app.config import ModelConfig
from serve_app.jobs import Candidate, Identity
from serve_app.load_errors import ModelUnavailableError, UnknownModelError, public_reason
from serve_app.model_store import ModelStore


class FakeEngine:
    def __init__(self, alias, revision):
        self.identity = Identity(alias, "local", revision, f"{alias}@{revision}", 1, 512, "m", "t")
        self.threads_released = 0

    def release_thread(self):
        self.threads_released += 1


class World:
    """A store, the models there are, what was loaded, and a clock. Every model has size 1 unless `sizes` says else."""

    def __init__(self, *aliases, budget=10.0, retry_s=10.0):
        self.models = dict.fromkeys(aliases, "v1")
        self.loads, self.rehearsals, self.sizes = [], [], {}
        self.bad, self.breaks_late = set(), set()
        self.gate = threading.Event()
        self.gate.set()
        self.now = 0.0
        self.store = ModelStore(self.find, self.prepare, budget, retry_s, ThreadPoolExecutor(4), clock=lambda: self.now)

    def find(self, alias):
        revision = self.models.get(alias)
        return None if revision is None else ModelSpec(ModelConfig(source="bundled", revision=revision))

    def prepare(self, alias, spec):
        revision = spec.settings.revision
        self.loads.append((alias, revision))
        self.gate.wait(5)
        if (alias, revision) in self.bad:
            raise CheckpointMismatchError("/a/secret/place/model.safetensors: head is missing")

        def make():
            if (alias, revision) in self.breaks_late:
                raise CheckpointMismatchError("the warm-up forecast is not finite")
            return FakeEngine(alias, revision)

        def rehearse():
            self.rehearsals.append(alias)
            return make()

        return Candidate(self.sizes.get(alias, 1), make, rehearse)

    async def use(self, alias, wait_s=60.0):
        """Version and time of the forecast of a job that ends at once."""
        self.now += 1
        async with self.store.lease(alias, wait_s) as engine:
            return engine.identity.sha256

    async def settle(self, revision_of, expected):
        self.store.refresh()
        for _ in range(2000):
            if self.store.states().get(revision_of, {}).get("revision") == expected:
                return
            await asyncio.sleep(0.005)
        raise AssertionError(self.store.states())

    @property
    def loaded(self):
        return sorted(alias for alias, state in self.store.states().items() if state["state"] == "loaded")


def test_one_load_for_many_askers_even_if_the_first_gives_up():
    world = World("a")
    world.gate.clear()

    async def go():
        askers = [asyncio.ensure_future(world.use("a")) for _ in range(5)]
        await asyncio.sleep(0.05)
        assert world.store.states() == {"a": {"state": "loading"}}
        askers[0].cancel()
        world.gate.set()
        return await asyncio.gather(*askers[1:])

    assert asyncio.run(go()) == ["a@v1"] * 4
    assert world.loads == [("a", "v1")]


def test_loading_is_waited_for_a_bounded_time_and_goes_on():
    world = World("a")
    world.gate.clear()

    async def go():
        with pytest.raises(ModelUnavailableError, match="being loaded"):
            await world.use("a", wait_s=0.05)
        world.gate.set()
        return await world.use("a")

    assert asyncio.run(go()) == "a@v1"
    assert world.loads == [("a", "v1")]


def test_who_does_not_want_to_wait_gets_what_is_loaded_and_starts_what_is_not():
    world = World("a")

    async def go():
        with pytest.raises(ModelUnavailableError, match="being loaded"):
            await world.use("a", wait_s=0)
        await world.settle("a", "v1")
        return await world.use("a", wait_s=0)

    assert asyncio.run(go()) == "a@v1"
    assert world.loads == [("a", "v1")]


def test_a_failure_is_remembered_for_its_time():
    world = World("a")
    world.bad.add(("a", "v1"))

    async def go():
        waits = []
        for world.now in (-1.0, 3.0, 10.0):
            with pytest.raises(ModelUnavailableError) as caught:
                await world.use("a")
            waits.append(caught.value.retry_after_s)
        return waits

    assert asyncio.run(go()) == [10.0, 6.0, 10.0]
    assert len(world.loads) == 2
    assert world.store.states()["a"]["error"].endswith("model.safetensors: head is missing")
    assert "secret" not in world.store.states()["a"]["error"]


def test_the_idle_model_that_was_used_longest_ago_makes_room():
    world = World("a", "b", "c", "d", budget=3.0)

    async def go():
        for alias in ("a", "b", "c", "a", "d"):
            await world.use(alias)

    asyncio.run(go())
    assert world.loaded == ["a", "c", "d"]


def test_what_is_in_use_is_not_evicted_and_is_waited_for():
    world = World("a", "b", budget=1.0)

    async def go():
        async with world.store.lease("a", 1.0) as engine:
            with pytest.raises(ModelUnavailableError, match="being loaded"):
                await world.use("b", wait_s=0.05)
            assert world.loaded == ["a"]
            assert engine.identity.sha256 == "a@v1"
        return await world.use("b")

    assert asyncio.run(go()) == "b@v1"
    assert world.loaded == ["b"]


def test_the_thread_of_an_idle_model_ends_where_there_are_others():
    world = World("a", "b")

    async def go():
        for _ in range(2):
            await world.use("a")
        async with world.store.lease("a", 60) as engine:
            assert engine.threads_released == 0
            await world.use("a")
            await world.use("b")
            assert engine.threads_released == 0  # in use
        return engine.threads_released, [one.threads_released for one in world.store.engines]

    assert asyncio.run(go()) == (1, [1, 1])


def test_always_on_models_are_never_evicted_and_bound_what_else_fits():
    world = World("on", "a", "b", "large", budget=2.0)
    world.store.pinned = ["on"]
    world.sizes["large"] = 2
    world.store.load_now("on")

    async def go():
        await world.use("a")
        await world.use("b")
        with pytest.raises(ModelUnavailableError, match="always-on models leave"):
            await world.use("large")

    asyncio.run(go())
    assert world.loaded == ["b", "on"]


def test_nothing_makes_room_for_what_does_not_work():
    world = World("a", "b", "bad", "late", budget=2.0)
    world.bad.add(("bad", "v1"))
    world.breaks_late.add(("late", "v1"))

    async def go():
        await world.use("a")
        await world.use("b")
        for alias in ("bad", "late"):
            with pytest.raises(ModelUnavailableError):
                await world.use(alias)
        with pytest.raises(UnknownModelError):
            await world.use("never heard of")

    asyncio.run(go())
    assert world.loaded == ["a", "b"]
    assert world.rehearsals == ["late"]


def test_a_model_is_replaced_when_the_new_version_is_there_and_no_job_sees_both():
    world = World("a", budget=1.0)

    async def go():
        await world.use("a")
        world.gate.clear()
        world.models["a"] = "v2"
        async with world.store.lease("a", 1.0) as before:
            world.store.refresh()
            await asyncio.sleep(0.02)
            assert world.store.states()["a"]["pending"] == {
                "state": "loading", "error": None, "repo": "bundled", "revision": "v2",
            }  # fmt: skip
            assert await world.use("a") == "a@v1"
            world.gate.set()
            await world.settle("a", "v2")
            assert before.identity.sha256 == "a@v1"
            assert len(world.store.engines) == 2
            assert await world.use("a") == "a@v2"
        assert len(world.store.engines) == 1

    asyncio.run(go())
    assert world.store.states()["a"]["pending"] is None


def test_a_bad_version_leaves_the_old_one_serving_and_says_why():
    world = World("a")
    world.bad.add(("a", "v2"))

    async def go():
        await world.use("a")
        world.models["a"] = "v2"
        world.store.refresh()
        await asyncio.sleep(0.05)
        world.store.refresh()  # not tried again at once
        state = world.store.states()["a"]
        assert (state["state"], state["revision"]) == ("loaded", "v1")
        assert (state["pending"]["state"], state["pending"]["revision"]) == ("failed", "v2")
        assert "head is missing" in state["pending"]["error"]
        assert await world.use("a") == "a@v1"
        assert world.loads == [("a", "v1"), ("a", "v2")]
        world.models["a"] = "v1"
        world.store.refresh()
        assert world.store.states()["a"]["pending"] is None
        world.models["a"] = "v3"
        await world.settle("a", "v3")

    asyncio.run(go())
    assert world.store.states()["a"]["pending"] is None


def test_a_version_that_is_not_wanted_any_more_when_it_is_loaded_is_let_go():
    world = World("a")

    async def go():
        await world.use("a")
        world.gate.clear()
        world.models["a"] = "v2"
        world.store.refresh()
        await asyncio.sleep(0.02)
        world.models["a"] = "v1"
        world.gate.set()
        await asyncio.sleep(0.05)
        assert await world.use("a") == "a@v1"

    asyncio.run(go())
    assert len(world.store.engines) == 1


def test_always_on_models_that_are_missing_are_loaded_and_tried_again():
    world = World("a")
    world.bad.add(("a", "v1"))
    world.store.pinned = ["a"]
    world.store.load_now("a")
    assert world.store.states()["a"]["state"] == "failed"

    async def go():
        world.bad.clear()
        world.store.refresh()
        assert len(world.loads) == 1
        world.now = 11.0
        await world.settle("a", "v1")

    asyncio.run(go())


def test_a_model_that_is_gone_from_the_catalogue_is_let_go_after_a_while():
    world = World("a", "b")

    async def go():
        await world.use("a")
        await world.use("b")
        del world.models["a"]
        world.store.refresh()
        assert await world.use("a") == "a@v1"
        world.now += model_store.UNLISTED_S + 1
        world.store.refresh()
        assert world.loaded == ["b"]
        with pytest.raises(UnknownModelError):
            await world.use("a")

    asyncio.run(go())


def test_many_jobs_over_few_places():
    """Every job gets the model it asked for, and the budget holds at every moment."""
    world = World(*"abcdef", budget=3.0)
    most = 0

    async def job(alias, hold_s):
        nonlocal most
        async with world.store.lease(alias, 60.0) as engine:
            most = max(most, len(world.store.engines))
            await asyncio.sleep(hold_s)
            assert engine.identity.id == alias

    async def go():
        await asyncio.gather(*(job("abcdef"[i % 6], (i % 4) / 1000) for i in range(120)))

    started = time.monotonic()
    asyncio.run(go())
    assert most == 3
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data/x/model.safetensors: head is missing", "model.safetensors: head is missing"),
        ("./runs/new/model holds no config.json", "model holds no config.json"),
        ("a/b/c/config.json is not JSON", "config.json is not JSON"),
        ("NeoQuasar/Kronos-small has no revision 'x'", "NeoQuasar/Kronos-small has no revision 'x'"),
        ("'/etc/passwd' is odd", "'passwd' is odd"),
    ],
)
def test_reasons_hold_no_folders(text, shown):
    assert public_reason(CheckpointNotFoundError(text)) == shown
