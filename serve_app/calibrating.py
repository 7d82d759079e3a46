"""Calibration on request: what a task's paths become, in one piece or bar by bar. numpy only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from model.calibration import sampling_text, typical_move
from model.engine.types import BarsCallback
from model.types import COLUMNS, Paths
from serve_app.jobs import Engine, Task

CLOSE = COLUMNS.index("close")


class NotCalibratedError(Exception):
    """The model has no calibration, or none for forecasts that are drawn like this. The message is fit for a client."""


class Calibrated:
    """The calibration of one task. Every bar is calibrated on its own, so that a stream shows what the answer will."""

    def __init__(self, engine: Engine, task: Task) -> None:
        """Raises NotCalibratedError. task.calibrate is set."""
        key, calibration, sampling = task.calibrate, engine.calibration, task.sampling
        if calibration is None or key is None:
            raise NotCalibratedError(
                f"model {engine.identity.id!r} has no calibration: leave calibrate out, or fit one with "
                "python -m cluster.calibration fit"
            )
        if not calibration.fits(sampling.temperature, sampling.top_k, sampling.top_p):
            raise NotCalibratedError(
                f"the calibration of model {engine.identity.id!r} is for forecasts with {sampling_text(calibration)}: "
                "ask for these, or leave calibrate out"
            )
        self._entry = calibration.entry(key.symbol, key.bar_seconds)
        self._applied = calibration.applied(self._entry)
        self._unit = typical_move(task.series.candles[:, CLOSE])

    def paths(self, paths: Paths) -> Paths:
        return replace(paths, values=self._entry.candles(paths.values, unit=self._unit), calibration=self._applied)

    def bars(self, on_bars: BarsCallback) -> BarsCallback:
        """on_bars, told calibrated bars."""

        def calibrate(first: int, values: np.ndarray) -> None:
            on_bars(first, self._entry.candles(values, unit=self._unit, first=first))

        return calibrate
