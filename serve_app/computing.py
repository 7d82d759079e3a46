"""The tasks of a job, computed by worker threads on one engine: what waits, what runs, what stops."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from model.engine.types import BarsCallback
from model.errors import ForecastCancelledError, InputError, QueueFullError, RequestTooLargeError
from model.types import Paths
from serve_app.bar_stream import BarStream
from serve_app.calibrating import Calibrated, NotCalibratedError
from serve_app.jobs import Engine, Failed, Job, Task
from serve_app.priority import FORECASTS, lower_by


class Load:
    """How much a replica has to do. Safe under threads."""

    def __init__(self) -> None:
        self.queued = 0
        self.running_rows = 0
        self._work: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def work(self) -> dict[str, int]:
        """Rows × steps that wait or run, by the backend that sent them."""
        with self._lock:
            return {sender: work for sender, work in self._work.items() if work}

    @property
    def total_work(self) -> int:
        return sum(self.work.values())

    def change(self, *, queued: int = 0, running_rows: int = 0) -> None:
        with self._lock:
            self.queued += queued
            self.running_rows += running_rows

    def add_work(self, sender: str, work: int) -> None:
        with self._lock:
            self._work[sender] += work


class _Waiting:
    """The tasks of one job that wait: they leave the queue one by one as they start, the rest when the job ends."""

    def __init__(self, load: Load, job: Job) -> None:
        self._load = load
        self._job = job
        self._left = len(job.tasks)
        self._lock = threading.Lock()
        load.change(queued=self._left)
        load.add_work(job.sender, job.work)

    def leave(self, count: int | None = None) -> None:
        with self._lock:
            leaving = self._left if count is None else min(count, self._left)
            self._left -= leaving
        self._load.change(queued=-leaving)

    def end(self) -> None:
        self.leave()
        self._load.add_work(self._job.sender, -self._job.work)


@dataclass
class Progress:
    """One job on this replica. Used as a context: what it has in the queue leaves it at the end, and its tasks stop."""

    job: Job
    load: Load
    arrived: float = field(default_factory=time.monotonic)
    starts: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._deadline = self.arrived + self.job.timeout_s

    def __enter__(self) -> Progress:
        self._waiting = _Waiting(self.load, self.job)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._waiting.end()

    def should_stop(self) -> bool:
        return self._stop.is_set() or time.monotonic() > self._deadline

    def started(self) -> None:
        self._waiting.leave(1)
        self.starts.append(time.monotonic())

    @property
    def queue_ms(self) -> float:
        """How long the job waited for its first worker; known once it has one."""
        return (min(self.starts) - self.arrived) * 1000


class Workers:
    """Threads that wait for engines."""

    def __init__(self, count: int, *, yielding: bool) -> None:
        """yielding: forecasts are computed on the processors that proxy and ingress answer on, and let those go first.

        Not in these threads: an engine's own has the priority of the first of them that waits for it.
        """
        initializer = partial(lower_by, FORECASTS) if yielding else None
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="forecast", initializer=initializer)

    async def compute(self, engine: Engine, progress: Progress, stream: BarStream | None) -> tuple[Paths, ...]:
        """The paths of every task. The first failure, or the caller's cancellation, ends the whole job."""
        loop = asyncio.get_running_loop()
        futures = [
            loop.run_in_executor(
                self._threads,
                partial(_compute, engine, task, progress, None if stream is None else partial(stream.put, index)),
            )
            for index, task in enumerate(progress.job.tasks)
        ]
        try:
            return tuple(await asyncio.gather(*futures))
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _compute(engine: Engine, task: Task, progress: Progress, on_bars: BarsCallback | None) -> Paths:
    """Runs in a worker thread."""
    progress.started()
    rows = task.sampling.samples
    progress.load.change(running_rows=rows)
    should_stop: Callable[[], bool] = progress.should_stop
    try:
        if should_stop():
            raise ForecastCancelledError("stopped before the first step")
        calibrated = None if task.calibrate is None else Calibrated(engine, task)
        if calibrated is not None and on_bars is not None:
            on_bars = calibrated.bars(on_bars)
        paths = engine.forecast(
            task.series,
            task.sampling,
            window=task.window,
            should_stop=should_stop,
            on_bars=on_bars,
            companions=progress,
        )
        return paths if calibrated is None else calibrated.paths(paths)
    except InputError as error:
        raise _TaskError(task, error) from None
    finally:
        progress.load.change(running_rows=-rows)


class _TaskError(Exception):
    """An InputError of one task of a job."""

    def __init__(self, task: Task, error: InputError) -> None:
        super().__init__(str(error))
        self.task = task
        self.error = error


COMPUTING_ERRORS = (ForecastCancelledError, QueueFullError, RequestTooLargeError, NotCalibratedError, _TaskError)
"""What compute() raises that has an answer: see failed()."""


def failed(error: Exception, job: Job) -> Failed:
    """The answer to one of COMPUTING_ERRORS."""
    if isinstance(error, ForecastCancelledError):
        return Failed("deadline_passed", "the deadline passed")
    if isinstance(error, QueueFullError):
        return Failed("queue_full", "the engine of this replica is full", retry_after_s=1.0)
    if isinstance(error, NotCalibratedError):
        return Failed("not_calibrated", str(error))
    if isinstance(error, RequestTooLargeError):
        return Failed("cost_over_limit", str(error))
    if isinstance(error, _TaskError):
        position = next((i for i, task in enumerate(job.tasks) if task is error.task), None)
        fault = error.error
        return Failed("invalid_fields", str(fault), rule=fault.code, task=position, column=fault.column, row=fault.row)
    raise TypeError(f"no answer is known for {type(error).__name__}") from error
