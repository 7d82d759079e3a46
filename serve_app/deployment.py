"""The replica: engines on one device, computing in threads of their own, so that its event loop always answers.

Written against Engine: what computes is injected, and the class runs without Ray in tests.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import Any, Protocol

import numpy as np

from model.errors import KronosError
from model.frames import time_marks
from model.types import Sampling, Series
from serve_app.bar_stream import BarStream, OriginChangedError
from serve_app.catalog import Catalog, ModelSpec
from serve_app.computing import COMPUTING_ERRORS, Load, Progress, Workers, failed
from serve_app.config import AppConfig, ModelConfig
from serve_app.jobs import Candidate, Chunk, DeviceFacts, Done, Engine, Failed, Job, Resume
from serve_app.live_config import InvalidUserConfigError, LiveConfig
from serve_app.load_errors import ModelUnavailableError, UnknownModelError
from serve_app.logs import configure_logging, log
from serve_app.model_store import ModelStore
from serve_app.priority import LoadingThreads
from serve_app.replica_metrics import replica_counters

LAST_RESORT = 2
"""A replica refuses what is over so many times its bound: several ingress replicas count each for itself at first."""


class Factory(Protocol):
    """Reads checkpoints for the replicas of one group; see serve_app.engine.EngineFactory."""

    def __call__(self, alias: str, settings: ModelConfig) -> Candidate: ...

    def device(self) -> DeviceFacts: ...

    def prepare_process(self, threads: int) -> None: ...


MakeFactory = Callable[[AppConfig, str], Factory]
"""(configuration, group) → what reads checkpoints there. Crosses processes by reference."""


class HungEngineError(KronosError):
    """An engine has had work for long and finished no step."""


class KronosReplica:
    """One replica of a group. Every always-on model has made a warm-up forecast before the first request arrives."""

    def __init__(self, group: str, live: LiveConfig, make_factory: MakeFactory) -> None:
        """Loads the always-on models. One that fails is tried again later; the replica serves the others meanwhile."""
        self._live = live
        self.config = config = live.current
        configure_logging(config.log_level)
        self.group = group
        self._replica_id = _replica_id()
        settings = config.group(group)
        threads = max(1, int(settings.num_cpus))
        self._factory = make_factory(config, group)
        # At a low priority: torch alone takes seconds to import, while other replicas may be short of processors.
        loader = LoadingThreads()
        loader.submit(self._factory.prepare_process, threads).result()
        self._device = self._factory.device()
        self._max_work = LAST_RESORT * settings.max_outstanding_work
        self._hang_timeout_s = settings.hang_timeout_s
        self._workers = Workers(settings.workers, yielding=self._device.backend == "cpu")
        self._load = Load()
        budget = settings.model_memory_gb * 2**30
        self._store = ModelStore(Catalog(config).get, self._prepare, budget, config.limits.load_retry_s, loader)
        self._store.pinned = config.always_on
        for alias in config.always_on:
            loader.submit(self._store.load_now, alias).result()
        log(logging.INFO, "replica started", group=group, pid=os.getpid(), threads=threads, **asdict(self._device))

    def _prepare(self, alias: str, spec: ModelSpec) -> Candidate:
        """Blocks. A checkpoint that cannot make a forecast does not take traffic."""
        started = time.monotonic()
        candidate = self._factory(alias, spec.settings)

        def start() -> Engine:
            engine = _warmed_up(alias, candidate.start())
            seconds = round(time.monotonic() - started, 2)
            log(logging.INFO, "model loaded", model=alias, seconds=seconds, sha256=engine.identity.sha256)
            return engine

        return replace(candidate, start=start, rehearse=lambda: _warmed_up(alias, candidate.rehearse()))

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Takes over models and limits. What is loaded serves until its successor is verified; see ModelStore."""
        try:
            self.config = config = self._live.update(user_config)
        except InvalidUserConfigError as error:
            # Raised, it would make Ray replace a replica that serves well.
            log(logging.ERROR, "user_config was refused, the settings before it stay", error_message=str(error))
            return
        self._store.find = Catalog(config).get
        self._store.pinned = config.always_on
        self._store.retry_s = config.limits.load_retry_s
        self._store.refresh()

    async def check_health(self) -> None:
        """Asked by Ray. Raises HungEngineError; a busy engine finishes a step now and then, and is left alone."""
        stalled = max((engine.stalled_s() for engine in self._store.engines), default=0.0)
        if stalled > self._hang_timeout_s:
            log(logging.ERROR, "an engine hangs: this replica asks to be replaced", stalled_s=round(stalled, 1))
            raise HungEngineError(f"no step was finished for {stalled:.0f} s although there is work")

    async def wake(self) -> None:
        """Answers once there is a replica: a call that waits is what makes Ray start one."""

    async def forecast(
        self, job: Job, resume: Resume | None = None, *, bars: bool = False
    ) -> AsyncIterator[Chunk | Done | Failed]:
        """Computes a job. Stops within one step when the caller gives up (cancels) or the job's time is over.

        bars: the job's bars come before its end, as soon as they are final. resume: go on where a lost replica stopped.
        A stream also of the end alone: of a call with one answer, Ray's router hears with that answer only how busy a
        replica is, and would send everything to the one that was idle some seconds ago.
        """
        stream = BarStream(len(job.tasks), resume) if bars else None
        running = asyncio.ensure_future(self._run(job, stream))
        try:
            if stream is not None:
                async for chunk in stream.chunks(running):
                    yield chunk
            yield await running
        finally:
            running.cancel()

    async def _run(self, job: Job, stream: BarStream | None) -> Done | Failed:
        busy = self._load.total_work
        if busy and busy + job.work > self._max_work:
            return Failed("queue_full", "the queue of this replica is full", retry_after_s=1.0)
        try:
            with Progress(job, self._load) as progress:
                async with self._store.lease(job.model, self.config.limits.load_wait_s) as engine:
                    if stream is not None:
                        stream.begin(engine, lambda: progress.queue_ms)
                    paths = await self._workers.compute(engine, progress, stream)
        except UnknownModelError:
            return Failed("unknown_model", f"model {job.model!r} is not served any more")
        except ModelUnavailableError as error:
            return Failed("model_unavailable", str(error), retry_after_s=error.retry_after_s)
        except OriginChangedError:
            return Failed("no_replica", "the replica that streamed this was lost and no equal one is left; ask again")
        except COMPUTING_ERRORS as error:
            return failed(error, job)
        since_arrival_ms = (time.monotonic() - progress.arrived) * 1000
        return Done(
            paths=paths,
            identity=engine.identity,
            device=engine.device,
            replica_id=self._replica_id,
            queue_ms=progress.queue_ms,
            compute_ms=since_arrival_ms - progress.queue_ms,
        )

    async def record_replica_metadata(self) -> dict[str, Any]:
        """Once, when the replica is ready: to every ingress, for /v1/replicas."""
        return {"group": self.group, "pid": os.getpid(), "device": asdict(self._device), **self._news()}

    async def record_routing_stats(self) -> dict[str, Any]:
        """Twice a second, to every ingress. Also the moment to look whether a model has changed."""
        self._store.refresh()
        return self._news()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """To serve_app.scaling, in the controller."""
        return {"work": float(self._load.total_work)}

    def _news(self) -> dict[str, Any]:
        slots = [engine.cache_slots() for engine in self._store.engines]
        return {
            "queued": self._load.queued,
            "running_rows": self._load.running_rows,
            "work": self._load.work,
            "cache_slots_used": sum(used for used, _ in slots),
            "cache_slots_free": sum(free for _, free in slots),
            "models": self._store.states(),
            "counters": replica_counters(self._store.engines, self._store.counts),
        }

    async def info(self) -> dict[str, Any]:
        """What the replica knows of itself, for tools that hold a handle."""
        return {"replica_id": self._replica_id, **await self.record_replica_metadata()}


def _warmed_up(alias: str, engine: Engine) -> Engine:
    paths = engine.forecast(warm_up_series(), Sampling(seed=0))
    if not np.isfinite(paths.values).all():
        raise KronosError(f"{alias}: the warm-up forecast is not finite")
    engine.release_thread()  # it has the low priority of loading
    return engine


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
