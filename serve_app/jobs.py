"""What travels between the ingress and a replica, and what the ingress expects of whoever computes. numpy only.

The ingress is written against Backend, the replica against Engine: both are tested without Ray and without torch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from model.calibration import Calibration
from model.engine.types import BarsCallback
from model.types import Paths, Sampling, Series, StepCallback, StopCheck


@dataclass(frozen=True)
class CalibrationKey:
    """Whose calibration a task wants. symbol: the series' id, None if it has none. bar_seconds: None for one bar."""

    symbol: str | None
    bar_seconds: int | None


@dataclass(frozen=True)
class Task:
    """One series of a job. The seed is drawn before dispatch, so that a retry gives the numbers of the first try.

    window: a policy as model.engine.types.WindowPolicy.parse reads it. calibrate: None leaves paths as sampled.
    """

    series: Series
    sampling: Sampling
    window: str = "exact"
    calibrate: CalibrationKey | None = None

    @property
    def work(self) -> int:
        """Rows × steps. Bars of history are computed once for all paths and many at a time: eight count as one step."""
        return self.sampling.samples * self.series.horizon + len(self.series.candles) // 8


@dataclass(frozen=True)
class Job:
    """The computing part of one HTTP request.

    timeout_s: counted from when the replica receives the job (clocks of two hosts may differ).
    sender: the backend that sent it, so that each knows what the others have sent.
    """

    request_id: str
    model: str
    tasks: tuple[Task, ...]
    timeout_s: float
    sender: str = ""

    @property
    def work(self) -> int:
        """Rows × steps of all tasks: what queues are bounded by."""
        return sum(task.work for task in self.tasks)


@dataclass(frozen=True)
class Identity:
    """Which weights answered."""

    id: str
    repo: str
    revision: str | None
    sha256: str
    parameters: int
    max_context: int
    model_version: str
    tokenizer_version: str


def joined_warnings(*warnings: str | None) -> str | None:
    """Several warnings as one, each once; None if there is none."""
    return "; ".join(dict.fromkeys(warning for warning in warnings if warning)) or None


@dataclass(frozen=True)
class DeviceFacts:
    """What a replica computes on, and why."""

    device: str
    device_type: str
    device_name: str
    precision: str
    precision_reason: str
    gpu_available: bool
    cuda_available: bool
    mps_available: bool
    device_warning: str | None = None

    @property
    def backend(self) -> str:
        """The value of X-Backend-Used."""
        return "cpu" if self.device_type == "cpu" else "gpu"


@dataclass(frozen=True)
class Done:
    """A job that was computed. Milliseconds: waiting for a worker, joining a batch, computing."""

    paths: tuple[Paths, ...]
    identity: Identity
    device: DeviceFacts
    replica_id: str
    queue_ms: float = 0.0
    batch_ms: float = 0.0
    compute_ms: float = 0.0


@dataclass(frozen=True)
class Failed:
    """A job that was not. code is a key of serve_app.errors.STATUS.

    A value, not an exception: it crosses processes unchanged, and Ray logs no stack for what is a client's matter.
    task, column, row: where in the input, for code "invalid_fields"; rule is the name of what was broken.
    """

    code: str
    message: str
    retry_after_s: float | None = None
    rule: str | None = None
    task: int | None = None
    column: str | None = None
    row: int | None = None


@dataclass(frozen=True)
class LoadFailure:
    """Why a replica could not load a model. at: when one said so last, time.monotonic()."""

    message: str
    at: float


class Engine(Protocol):
    """One model on one device."""

    identity: Identity
    calibration: Calibration | None

    @property
    def device(self) -> DeviceFacts:
        """What it computes on, and what it does without."""

    def forecast(
        self,
        series: Series,
        sampling: Sampling,
        *,
        window: str = "exact",
        should_stop: StopCheck | None = None,
        on_step: StepCallback | None = None,
        on_bars: BarsCallback | None = None,
        companions: object | None = None,
    ) -> Paths:
        """Blocks until all paths are there. on_bars receives bars as soon as they are final.

        companions: the same object for all series of one caller, who waits for the last of them.

        Raises InputError, ForecastCancelledError once should_stop() is true, and EngineFullError.
        """

    def release_thread(self) -> None:
        """Ends the thread that computes, once nobody waits; the next forecast starts one, of its caller's priority."""

    def cache_slots(self) -> tuple[int, int]:
        """(used, free) slots of its cache: one holds one bar of one path."""

    def stats(self) -> Mapping[str, float]:
        """The counters of model.engine.types.EngineStats by name. Never blocks."""

    def stalled_s(self) -> float:
        """Seconds without a finished step although there is work; 0 without work. Never blocks."""


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that has been read and verified, and can become an engine.

    size: bytes that the engine will need. start: makes it; blocks. rehearse: makes one with a small cache, to find out
    whether it works before anything makes room for it; blocks.
    """

    size: int
    start: Callable[[], Engine]
    rehearse: Callable[[], Engine]


@dataclass(frozen=True)
class Answered:
    """What a backend gives back: the result, and what happened on the way."""

    done: Done
    group: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bars:
    """Bars of one task that will not change any more, sent while the job still runs.

    task: index in the job. first: index of the first bar. values: candles float64 [S, n, 6].
    backend: the value of X-Backend-Used. queue_ms: how long the job waited before the computing began.
    """

    task: int
    first: int
    values: np.ndarray
    backend: str
    queue_ms: float


@dataclass(frozen=True)
class Chunk:
    """What a replica sends of a running job at once. origin: see Resume."""

    origin: str
    bars: tuple[Bars, ...]


@dataclass(frozen=True)
class Resume:
    """Where a stream goes on after its replica was lost.

    origin: the weights and the kind of device that the first bars came from; no other may go on with them.
    delivered: how many bars of each task have been passed on.
    """

    origin: str
    delivered: tuple[int, ...]


@dataclass(frozen=True)
class ReplicaView:
    """One live replica, as the last news from it says.

    work: rows × steps that wait or run. counters: name → what has only grown since the replica started, or gauges of
    its process; serve_app.replica_metrics names them.
    """

    replica_id: str
    group: str
    node: str
    pid: int
    device: DeviceFacts
    queued: int = 0
    running_rows: int = 0
    cache_slots_used: int = 0
    cache_slots_free: int = 0
    work: int = 0
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    counters: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Places:
    """How many small jobs may be under way at once, those that are counted in; and when to ask again if all are."""

    count: int
    retry_after_s: float


class Backend(Protocol):
    """Who computes for the ingress."""

    @property
    def device_warning(self) -> str | None:
        """Why forecasts run on the CPU although a GPU was wanted; None if nothing was given up."""

    def refuse_if_crowded(self) -> None:
        """Raises ServiceError queue_full if a small job would find no room: then there is no need to read one."""

    def places(self) -> Places | None:
        """What serve_app.door may refuse by; None if it may not."""

    async def forecast(self, job: Job, prefer: str | None) -> Answered:
        """prefer: "cpu" or "gpu" for a replica group, None for the usual order. Raises ServiceError."""

    def stream(self, job: Job, prefer: str | None) -> AsyncIterator[Bars | Answered]:
        """Bars as they become final, of every task from its first bar on and without gaps; Answered comes last.

        A retry goes on where the lost replica stopped. Closing the iterator stops the computing. Raises ServiceError.
        """

    def replicas(self) -> Sequence[ReplicaView]:
        """All live replicas of all groups. Costs no remote call."""

    def load_failures(self) -> Mapping[str, LoadFailure]:
        """Alias → why no replica could load it, also while none is there to say so."""

    def groups(self) -> Sequence[str]:
        """Names of the groups that were planned, in the order of preference."""
