"""What an ingress answers with while its settings change, without Ray."""

import asyncio

import pytest

from serve_app import app
from serve_app.app import Ingress
from serve_app.config import AppConfig
from serve_app.live_config import LiveConfig

MODELS = {"one": {"source": "bundled"}, "two": {"source": "bundled"}}


class Live:
    """An ingress's way through its settings. loaded: the models that a replica has."""

    reconfigure, _switch = Ingress.reconfigure, Ingress._switch

    def __init__(self):
        self._live = LiveConfig(AppConfig(models=MODELS, default_model="one"), {})
        self._switching = None
        self.loaded = {"one"}
        self._serve(self._live.current)

    def _serve(self, config, *notes):
        self._config, self._notes = config, notes

    def _can_answer(self, config):
        return config.default_model in self.loaded

    @property
    def shown(self):
        return self._config.default_model, [note.split(":")[0] for note in self._notes]


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(app, "SWITCH_POLL_S", 0.001)


def test_a_refused_user_config_does_not_end_a_switch_that_is_on_its_way():
    live = Live()

    async def go():
        await live.reconfigure({"default_model": "two"})
        assert live.shown[0] == "one"
        await live.reconfigure({"default_model": "three"})
        assert live.shown == ("one", ["the latest user_config was refused"])
        live.loaded.add("two")
        await asyncio.wait_for(live._switching, 5)

    asyncio.run(go())
    assert live.shown == ("two", [])


def test_what_was_refused_is_not_shown_for_ever():
    live = Live()

    async def go():
        await live.reconfigure({"limits": {"max_series": 0}})
        assert live.shown == ("one", ["the latest user_config was refused"])
        await live.reconfigure({})

    asyncio.run(go())
    assert live.shown == ("one", [])


def test_a_newer_user_config_ends_the_wait_for_an_older_one():
    live = Live()

    async def go():
        await live.reconfigure({"default_model": "two"})
        await live.reconfigure({})
        live.loaded.add("two")
        await asyncio.gather(live._switching, return_exceptions=True)

    asyncio.run(go())
    assert live.shown == ("one", [])
