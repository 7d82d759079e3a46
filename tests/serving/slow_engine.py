"""An engine whose speed a test decides. In a module of its own, because Ray's workers import it."""

import hashlib
import time
from typing import Any

import numpy as np

from model.errors import CheckpointMismatchError, ForecastCancelledError
from model.types import Paths, Window
from serve_app.config import AppConfig
from serve_app.jobs import Candidate, DeviceFacts, Identity

STEP_S = 0.05
HANGS = 77
"""The top_k of a request that never finishes its first step."""
CPU = DeviceFacts("cpu", "cpu", "a slow processor", "fp32", "exact", False, False, False)
GPU = DeviceFacts("cuda:0", "cuda", "a slow GPU", "bf16", "fast", True, True, False)
GIB = 2**30


class SlowEngine:
    """STEP_S per bar; path s is s above the seed."""

    def __init__(self, alias, revision, device=CPU):
        digest = hashlib.sha256(f"{alias}@{revision}".encode()).hexdigest()
        self.identity = Identity(alias, "local", revision, digest, 1, 512, "slow", "slow")
        self.calibration = None
        self.device = device
        self.steps = 0
        self._busy = 0
        self._progressed_at = time.monotonic()

    def release_thread(self):
        pass

    def cache_slots(self):
        return 3, 7

    def stats(self):
        return {"steps": self.steps, "rows": self.steps}

    def stalled_s(self):
        return time.monotonic() - self._progressed_at if self._busy else 0.0

    def forecast(
        self, series, sampling, *, window="exact", should_stop=None, on_step=None, on_bars=None, companions=None
    ):
        self._progressed_at = time.monotonic()
        self._busy += 1
        try:
            return self._forecast(series, sampling, should_stop, on_bars)
        finally:
            self._busy -= 1

    def _forecast(self, series, sampling, should_stop, on_bars):
        shape = (sampling.samples, series.horizon, 6)
        values = np.full(shape, float(sampling.seed)) + np.arange(sampling.samples)[:, None, None]
        if sampling.top_k == HANGS:
            time.sleep(3600)
        for i in range(series.horizon):
            if should_stop is not None and should_stop():
                raise ForecastCancelledError("stopped")
            time.sleep(STEP_S)
            self.steps += 1
            self._progressed_at = time.monotonic()
            if on_bars is not None:
                on_bars(i, values[:, i : i + 1])
        return Paths(values, np.zeros((*shape[:2], 2), np.int64), Window(8, False))


class SlowFactory:
    """Every model takes 1 GiB of the budget. A model whose revision is "bad" cannot be loaded."""

    def __init__(self, config, group):
        self._facts = GPU if group == "gpu" else CPU

    def __call__(self, alias, settings):
        if settings.revision == "bad":
            raise CheckpointMismatchError("/secret/place/model.safetensors: head.weight is missing")

        def engine():
            return SlowEngine(alias, settings.revision, self._facts)

        return Candidate(GIB, engine, engine)

    def device(self):
        return self._facts

    def prepare_process(self, threads):
        pass


def build_app(args: AppConfig) -> Any:
    """A whole application over the slow engine, for a configuration file's import_path."""
    from serve_app.app import assemble
    from serve_app.updates import probe_before

    return assemble(args, {}, {"CPU": 8.0}, SlowFactory, probe_before())
