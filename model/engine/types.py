"""Requests, their states, and the engine's configuration. No torch."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from model.types import Sampling, Series, StepCallback, StopCheck


class State(enum.Enum):
    """A request ends in exactly one of the last three."""

    QUEUED = "queued"
    PREFILLING = "prefilling"
    RUNNING = "running"
    DECODING = "decoding"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def ended(self) -> bool:
        return self in (State.FINISHED, State.CANCELLED, State.FAILED)


@dataclass(frozen=True)
class WindowPolicy:
    """What happens when history and generated bars pass max_context.

    exact: the window slides by one bar a step and is recomputed, as the public implementation does.
    hop: the `hop` oldest bars are dropped at once, and the cache serves until the window is full again.
    fit: the window starts so late in the history that nothing slides.
    """

    name: str = "exact"
    hop: int = 1

    @classmethod
    def parse(cls, text: str) -> WindowPolicy:
        """exact | hop:K | fit. Raises ValueError for anything else."""
        match = re.fullmatch(r"exact|fit|hop:([1-9][0-9]{0,3})", text)
        if match is None:
            raise ValueError(f"unknown window policy {text[:64]!r}; accepted: exact, fit, hop:K (K = 1, 2, …)")
        return cls("hop", int(match[1])) if match[1] else cls(text)

    def __str__(self) -> str:
        return f"hop:{self.hop}" if self.name == "hop" else self.name


@dataclass(frozen=True)
class EngineConfig:
    """Everything that decides how the engine runs; fixed for its life.

    max_context: bars that the model sees at once. clip: bound on normalised values.
    precision: fp32 | bf16 | int8. cache_bytes: the arena of keys and values, allocated once.
    max_rows: sample paths that step together. max_queued_work: rows × steps that may wait; more is
        refused, unless nothing waits.
    prefill_chunk: rows × bars computed between two steps, so that a long history does not stall the others; None: by
        the model's size.
    graphs: steps of fixed shapes, captured as CUDA graphs where there is CUDA; None: there only.
    own_thread: one thread of the engine's makes all steps, for whoever waits; without it, who waits makes them. For
        every thread that ever computed torch keeps caches, some 30 MB, and OpenMP a pool of threads, which slow down
        each other: two pools of two threads on two processors take twice as long.
    compile_rows: the steps that torch.compile prepares, by their number of rows; a step of fewer rows is filled up to
        the next of them. Empty: none. CPU only.
    """

    max_context: int = 512
    clip: float = 5.0
    precision: str = "fp32"
    cache_bytes: int = 512 * 2**20
    max_rows: int = 64
    max_queued_work: int = 1_000_000
    prefill_chunk: int | None = None
    graphs: bool | None = None
    compile_rows: tuple[int, ...] = ()
    own_thread: bool = False


@dataclass
class EngineStats:
    """What an engine has done since it was made. Everything only grows.

    steps: decode steps, of all running requests together. rows: paths advanced by them, each by one bar, which is two
    tokens. prefill_bars: rows × bars computed before or between steps: histories, and windows that moved.
    prefill_seconds, decode_seconds: time spent in either; on a GPU, until the work was handed to it. finished,
    cancelled, failed: requests that ended so.
    """

    steps: int = 0
    rows: int = 0
    prefill_bars: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


BarsCallback = Callable[[int, np.ndarray], None]
"""(index of the first bar, values float64 [S, n, 6]): bars that will not change any more."""


@dataclass(eq=False)
class Request:
    """One series on its way through the engine.

    noise_group: unseeded requests of one group step together and draw their noise together, in the order in which they
    were submitted, as far as the cache holds all of them at once.
    companions: the same object in all requests of one caller, who waits for the last of them: none steps while another
        is prefilled.
    on_bars: called with bars as they become final; None decodes once at the end.
    error: set when state is FAILED or CANCELLED.
    Set when state is FINISHED: tokens int64 [S, H, 2]; normalised float32 [S, H, 6], and mean and scale [6], with which
    normalised * scale + mean are candles.
    """

    series: Series
    sampling: Sampling
    window: WindowPolicy = field(default_factory=WindowPolicy)
    noise_group: object | None = None
    companions: object | None = None
    should_stop: StopCheck | None = None
    on_step: StepCallback | None = None
    on_bars: BarsCallback | None = None
    state: State = State.QUEUED
    error: BaseException | None = None
    tokens: np.ndarray | None = None
    normalised: np.ndarray | None = None
    mean: np.ndarray | None = None
    scale: np.ndarray | None = None

    @property
    def history(self) -> int:
        return int(self.series.candles.shape[0])

    @property
    def horizon(self) -> int:
        return self.series.horizon

    @property
    def rows(self) -> int:
        return self.sampling.samples

    def context_used(self, max_context: int) -> int:
        """Bars of history in the first window. With fit, so few that history and horizon share the window."""
        room = max_context - (self.horizon - 1 if self.window.name == "fit" else 0)
        return min(self.history, room)

    @property
    def work(self) -> int:
        """Rows × steps, the scheduler's measure of cost."""
        return self.rows * self.horizon
