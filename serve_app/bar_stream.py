"""Bars of a running job on their way from the engine's thread to the event loop, some milliseconds' worth at a time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np

from serve_app.jobs import Bars, Chunk, Done, Engine, Failed, Resume

COALESCE_S = 0.03
"""Pause between two chunks: each one that crosses processes costs about a millisecond, whatever is in it."""


class OriginChangedError(Exception):
    """A stream cannot go on here: other weights or another kind of device would make other numbers."""


def origin(engine: Engine) -> str:
    """Two engines of one origin give the same numbers for the same seed."""
    calibration = engine.calibration.digest if engine.calibration is not None else "raw"
    return f"{engine.identity.sha256}/{engine.device.device_type}/{engine.device.precision}/{calibration}"


class BarStream:
    """Collects bars of all tasks of one job. put() may be called by any thread, everything else by one event loop."""

    def __init__(self, tasks: int, resume: Resume | None = None) -> None:
        """resume: leave out what has been delivered, and refuse an engine of another origin."""
        self._resume = resume
        self._skip = [0] * tasks if resume is None else list(resume.delivered)
        self._origin = self._backend = ""
        self._queue_ms: Callable[[], float] = lambda: 0.0
        self._bars: list[Bars] = []
        self._lock = threading.Lock()
        self._arrived = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def begin(self, engine: Engine, queue_ms: Callable[[], float]) -> None:
        """Names the engine that computes. queue_ms: known once it does.

        Raises OriginChangedError if it cannot go on where another stopped.
        """
        self._origin, self._backend, self._queue_ms = origin(engine), engine.device.backend, queue_ms
        if self._resume is not None and self._resume.origin != self._origin:
            raise OriginChangedError

    def put(self, task: int, first: int, values: np.ndarray) -> None:
        """Takes final bars of a task: float64 [S, n, 6] from bar `first` on."""
        skipped = max(0, self._skip[task] - first)
        if skipped >= values.shape[1]:
            return
        with self._lock:
            self._bars.append(Bars(task, first + skipped, values[:, skipped:], self._backend, self._queue_ms()))
            wake = len(self._bars) == 1
        if wake:
            self._loop.call_soon_threadsafe(self._arrived.set)

    async def chunks(self, running: asyncio.Future[Done | Failed]) -> AsyncIterator[Chunk]:
        """What arrives until `running` is done: the first bars at once, later ones every COALESCE_S."""
        while not running.done():
            arrived: asyncio.Future[bool] = asyncio.ensure_future(self._arrived.wait())
            either: set[asyncio.Future[Any]] = {running, arrived}
            try:
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            finally:
                arrived.cancel()
            if bars := self._take():
                yield Chunk(self._origin, bars)
                await asyncio.wait({running}, timeout=COALESCE_S)
        if bars := self._take():
            yield Chunk(self._origin, bars)

    def _take(self) -> tuple[Bars, ...]:
        self._arrived.clear()
        with self._lock:
            taken, self._bars = self._bars, []
        return joined(taken)


def joined(bars: Sequence[Bars]) -> tuple[Bars, ...]:
    """One Bars per task; those of one task follow each other without gaps."""
    by_task = groupby(sorted(bars, key=lambda piece: piece.task), key=lambda piece: piece.task)
    pieces = [list(group) for _, group in by_task]
    return tuple(replace(group[0], values=np.concatenate([one.values for one in group], axis=1)) for group in pieces)
