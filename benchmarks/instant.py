"""An engine that answers at once: what is left is the cost of everything around it. Ray's workers import this.

No `from __future__ import annotations` here, as in serve_app.app: Serve reads build_app's annotation.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from model.types import Paths, Sampling, Series, Window
from serve_app.config import AppConfig, ModelConfig
from serve_app.jobs import Candidate, DeviceFacts, Identity

FACTS = DeviceFacts("cpu", "cpu", "no computing", "fp32", "exact", False, False, False)


class InstantEngine:
    """The last close, for ever."""

    def __init__(self, alias: str) -> None:
        self.identity = Identity(alias, "local", None, "0" * 64, 1, 512, "instant", "instant")
        self.calibration = None
        self.device = FACTS

    def forecast(self, series: Series, sampling: Sampling, **_: Any) -> Paths:
        shape = (sampling.samples, series.horizon)
        values = np.broadcast_to(series.candles[-1].astype(np.float64), (*shape, 6)).copy()
        return Paths(values, np.zeros((*shape, 2), np.int64), Window(min(len(series.candles), 512), False))

    def release_thread(self) -> None:
        pass

    def cache_slots(self) -> tuple[int, int]:
        return 0, 0

    def stats(self) -> Mapping[str, float]:
        return {}

    def stalled_s(self) -> float:
        return 0.0


class InstantFactory:
    def __init__(self, config: AppConfig, group: str) -> None:
        self.config = config

    def __call__(self, alias: str, settings: ModelConfig) -> Candidate:
        def engine() -> InstantEngine:
            return InstantEngine(alias)

        return Candidate(1, engine, engine)

    def device(self) -> DeviceFacts:
        return FACTS

    def prepare_process(self, threads: int) -> None:
        pass


def build_app(args: AppConfig) -> Any:
    """The service over the instant engine, for a configuration file's import_path."""
    from serve_app.app import assemble

    return assemble(args, {}, {"CPU": 8.0}, InstantFactory)
