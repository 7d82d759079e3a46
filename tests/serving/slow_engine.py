"""An engine whose speed a test decides. In a module of its own, because Ray's workers import it."""

import time
from typing import Any

import numpy as np

from model.errors import ForecastCancelledError
from model.types import Paths, Window
from serve_app.config import AppConfig
from serve_app.jobs import DeviceFacts, Identity

STEP_S = 0.05
FACTS = DeviceFacts("cpu", "cpu", "a slow processor", "fp32", "exact", False, False, False)


class SlowEngine:
    """STEP_S per bar; path s is s above the seed."""

    def __init__(self, alias):
        self.identity = Identity(alias, "local", None, "0" * 64, 1, 512, "slow", "slow")
        self.device = FACTS
        self.steps = 0

    def cache_slots(self):
        return 3, 7

    def stats(self):
        return {"steps": self.steps, "rows": self.steps}

    def forecast(self, series, sampling, *, window="exact", should_stop=None, on_step=None, on_bars=None):
        for _ in range(series.horizon):
            if should_stop is not None and should_stop():
                raise ForecastCancelledError("stopped")
            time.sleep(STEP_S)
            self.steps += 1
        values = np.full((sampling.samples, series.horizon, 6), float(sampling.seed))
        tokens = np.zeros((sampling.samples, series.horizon, 2), np.int64)
        return Paths(values + np.arange(sampling.samples)[:, None, None], tokens, Window(8, False))


class SlowFactory:
    def __init__(self, config):
        self.config = config

    def __call__(self, alias, group):
        return SlowEngine(alias)

    def device(self, group):
        return FACTS

    def prepare_process(self, threads):
        pass


def build_app(args: AppConfig) -> Any:
    """A whole application over the slow engine, for a configuration file's import_path."""
    from serve_app.app import assemble

    return assemble(args, {}, {"CPU": 8.0}, SlowFactory)
