"""The replica: engines on one device, computing in threads of their own, so that its event loop always answers.

Written against Engine: what computes is injected, and the class runs without Ray in tests.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any, Protocol

import numpy as np

from model.errors import ForecastCancelledError, InputError, KronosError, QueueFullError, RequestTooLargeError
from model.frames import time_marks
from model.types import Paths, Sampling, Series
from serve_app.config import AppConfig, GroupConfig
from serve_app.jobs import DeviceFacts, Done, Engine, Failed, Job, Task
from serve_app.logs import configure_logging, log
from serve_app.model_store import ModelStore, ModelUnavailableError
from serve_app.replica_metrics import replica_counters

RETRY_LOADING_S = 5.0


class Factory(Protocol):
    """Makes engines; see serve_app.engine.EngineFactory."""

    def __call__(self, alias: str, group: str) -> Engine: ...

    def device(self, group: str) -> DeviceFacts: ...

    def prepare_process(self, threads: int) -> None: ...


class _Load:
    """How much a replica has to do. Safe under threads."""

    def __init__(self) -> None:
        self.queued = 0
        self.running_rows = 0
        self._lock = threading.Lock()

    def change(self, *, queued: int = 0, running_rows: int = 0) -> None:
        with self._lock:
            self.queued += queued
            self.running_rows += running_rows


class _Waiting:
    """The tasks of one job that wait: they leave the queue one by one as they start, the rest when the job ends."""

    def __init__(self, load: _Load, count: int) -> None:
        self._load = load
        self._left = count
        self._lock = threading.Lock()
        load.change(queued=count)

    def leave(self, count: int | None = None) -> None:
        with self._lock:
            leaving = self._left if count is None else min(count, self._left)
            self._left -= leaving
        self._load.change(queued=-leaving)


class KronosReplica:
    """One replica of a group. Every always-on model has made a warm-up forecast before the first request arrives."""

    def __init__(self, group: str, config: AppConfig, make_factory: Callable[[AppConfig], Factory]) -> None:
        """Loads the always-on models. One that fails is tried again later; the replica serves the others meanwhile."""
        configure_logging(config.log_level)
        self.group = group
        self._replica_id = _replica_id()
        self.config = config
        settings: GroupConfig = config.groups.gpu if group == "gpu" else config.groups.cpu
        threads = max(1, int(settings.num_cpus))
        self._factory = make_factory(config)
        self._factory.prepare_process(threads)
        self._device = self._factory.device(group)
        self._max_queued = settings.max_queued_series
        self._workers = ThreadPoolExecutor(settings.workers, thread_name_prefix="forecast")
        self._load = _Load()
        self._store = ModelStore(self._load_and_warm, config.limits.load_retry_s)
        self._retry: asyncio.Task[None] | None = None
        for alias in config.always_on:
            try:
                self._store.add(alias, self._load_and_warm(alias))
            except Exception as error:  # as in the store: what one model breaks, the others must not feel
                self._store.remember_failure(alias, error)
        log(logging.INFO, "replica started", group=group, pid=os.getpid(), threads=threads, **asdict(self._device))

    def _load_and_warm(self, alias: str) -> Engine:
        """Blocks. A checkpoint that cannot make a forecast does not take traffic."""
        started = time.monotonic()
        engine = self._factory(alias, self.group)
        paths = engine.forecast(warm_up_series(), Sampling(seed=0))
        if not np.isfinite(paths.values).all():
            raise KronosError(f"{alias}: the warm-up forecast is not finite")
        seconds = round(time.monotonic() - started, 2)
        log(logging.INFO, "model loaded", model=alias, seconds=seconds, sha256=engine.identity.sha256)
        return engine

    async def forecast(self, job: Job) -> Done | Failed:
        """Computes a job. Stops within one step when the caller gives up (cancels) or the job's time is over."""
        arrived = time.monotonic()
        stop = threading.Event()
        deadline = arrived + job.timeout_s

        def should_stop() -> bool:
            return stop.is_set() or time.monotonic() > deadline

        if self._load.queued + len(job.tasks) > self._max_queued:
            return Failed("queue_full", "the queue of this replica is full", retry_after_s=1.0)
        waiting = _Waiting(self._load, len(job.tasks))
        try:
            engine = await self._engine(job.model)
            loop = asyncio.get_running_loop()
            starts: list[float] = []
            futures = [
                loop.run_in_executor(self._workers, self._compute, engine, task, should_stop, waiting, starts)
                for task in job.tasks
            ]
            try:
                paths = await asyncio.gather(*futures)
            except BaseException:
                # The first failure, or the caller's cancellation, ends the whole job.
                stop.set()
                for future in futures:
                    future.cancel()
                raise
        except ModelUnavailableError as error:
            return Failed("model_unavailable", str(error), retry_after_s=error.retry_after_s)
        except ForecastCancelledError:
            return Failed("deadline_passed", "the deadline passed")
        except QueueFullError:
            return Failed("queue_full", "the engine of this replica is full", retry_after_s=1.0)
        except RequestTooLargeError as error:
            return Failed("cost_over_limit", str(error))
        except _TaskError as error:
            return error.failed(job.tasks)
        finally:
            stop.set()
            waiting.leave()
        ended, first = time.monotonic(), min(starts)
        return Done(
            paths=tuple(paths),
            identity=engine.identity,
            device=engine.device,
            replica_id=self._replica_id,
            queue_ms=(first - arrived) * 1000,
            compute_ms=(ended - first) * 1000,
        )

    async def _engine(self, alias: str) -> Engine:
        """The model, if it is there within a bounded time; loading goes on for those who come later."""
        try:
            return await asyncio.wait_for(self._store.get(alias), self.config.limits.load_wait_s)
        except TimeoutError:
            raise ModelUnavailableError(f"model {alias!r} is being loaded; try again soon", RETRY_LOADING_S) from None

    def _compute(
        self, engine: Engine, task: Task, should_stop: Callable[[], bool], waiting: _Waiting, starts: list[float]
    ) -> Paths:
        """Runs in a worker thread."""
        waiting.leave(1)
        starts.append(time.monotonic())
        rows = task.sampling.samples
        self._load.change(running_rows=rows)
        try:
            if should_stop():
                raise ForecastCancelledError("stopped before the first step")
            return engine.forecast(task.series, task.sampling, window=task.window, should_stop=should_stop)
        except InputError as error:
            raise _TaskError(task, error) from None
        finally:
            self._load.change(running_rows=-rows)

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Once, when the replica is ready: to every ingress, for /v1/replicas."""
        return {"group": self.group, "pid": os.getpid(), "device": asdict(self._device), **self._news()}

    async def record_routing_stats(self) -> dict[str, Any]:
        """Every second, to every ingress."""
        self._retry_always_on()
        return self._news()

    def _news(self) -> dict[str, Any]:
        slots = [engine.cache_slots() for engine in self._store.engines]
        return {
            "queued": self._load.queued,
            "running_rows": self._load.running_rows,
            "cache_slots_used": sum(used for used, _ in slots),
            "cache_slots_free": sum(free for _, free in slots),
            "models": self._store.states(list(self.config.models)),
            "counters": replica_counters(self._store.engines, self._store.counts),
        }

    def _retry_always_on(self) -> None:
        """Starts another try of always-on models that failed; the store itself holds back until it is time."""
        missing = [a for a, state in self._store.states(self.config.always_on).items() if state["state"] == "failed"]
        if missing and (self._retry is None or self._retry.done()):
            self._retry = asyncio.get_running_loop().create_task(self._reload(missing))

    async def _reload(self, aliases: list[str]) -> None:
        for alias in aliases:
            try:
                await self._store.get(alias)
            except ModelUnavailableError:
                continue  # remembered and logged by the store

    async def info(self) -> dict[str, Any]:
        """What the replica knows of itself, for tools that hold a handle."""
        return {"replica_id": self._replica_id, **await self.record_replica_metadata()}


class _TaskError(Exception):
    """An InputError of one task of a job."""

    def __init__(self, task: Task, error: InputError) -> None:
        super().__init__(str(error))
        self.task = task
        self.error = error

    def failed(self, tasks: tuple[Task, ...]) -> Failed:
        position = next((i for i, task in enumerate(tasks) if task is self.task), None)
        error = self.error
        return Failed("invalid_fields", str(error), rule=error.code, task=position, column=error.column, row=error.row)


def warm_up_series() -> Series:
    """Eight made-up bars and two to forecast: enough to run every part of a model once."""
    rng = np.random.default_rng(0)
    close = 100.0 * np.exp(rng.normal(0, 0.01, 8).cumsum())
    candles = np.stack([close, close * 1.01, close * 0.99, close, np.full(8, 1e3), close * 1e3], axis=1)
    times = [datetime(2024, 1, 1) + timedelta(hours=i) for i in range(10)]
    marks = time_marks(times)
    return Series(candles.astype(np.float32), marks[:8], marks[8:])


def _replica_id() -> str:
    """Ray's name for this replica; the process id outside of Serve."""
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        return serve.get_replica_context().replica_id.unique_id
    except RayServeException:
        return f"pid-{os.getpid()}"
