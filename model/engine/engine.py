"""The engine: schedule → run → update, for requests of any shape at once.

Any number of threads may call run(). Whoever waits for a result drives the steps, for all; with own_thread, a thread of
the engine's does so for whoever waits.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from asyncio import CancelledError
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from model.engine.kv_cache import Arena
from model.engine.lane import Lane
from model.engine.runner import Runner
from model.engine.scheduler import Scheduler
from model.engine.types import EngineConfig, EngineStats, Request, State
from model.errors import ForecastCancelledError
from model.kronos import Kronos
from model.tokenizer import KronosTokenizer

logger = logging.getLogger(__name__)
OF_A_CALLBACK = (Exception, GeneratorExit, CancelledError)
"""Ends the request whose callback raises it. What else there is, KeyboardInterrupt, interrupts the thread."""


class Engine:
    """Generates paths for requests that join and leave at every step."""

    def __init__(
        self, model: Kronos, tokenizer: KronosTokenizer, config: EngineConfig, device: torch.device | None = None
    ) -> None:
        self.config = config
        self._runner = Runner(model, tokenizer, config, device or torch.device("cpu"))
        self._arena = Arena(self._runner.arena_elements)
        self._scheduler = Scheduler(config, self._arena, self._runner.cache_size, self._runner.prefill_chunk)
        self._lanes: dict[Request, Lane] = {}
        self._stats = EngineStats()
        self._books = threading.RLock()
        self._turn = threading.Condition()
        self._driver: int | None = None  # the thread that drives the steps
        self._thread = _new_thread() if config.own_thread else None
        self._process = os.getpid()
        self._live = 0
        self._progressed_at = time.monotonic()

    def run(self, requests: Sequence[Request]) -> None:
        """Submits requests and returns once all have ended; each one's state says how.

        They are each other's companions, unless they name theirs.

        Raises QueueFullError or RequestTooLargeError, and then none of the requests has been taken, and RuntimeError in
        a callback of this engine, which would wait for itself.
        """
        self._refuse_callbacks()
        companions = object()
        for request in requests:
            # Who reads bars as they come wants the first ones early.
            request.companions = None if request.on_bars else request.companions or companions
        self.submit(requests)
        self.finish(requests)

    def finish(self, requests: Sequence[Request]) -> None:
        """wait() for the only one who waits: if it is interrupted, the requests are dropped."""
        try:
            self.wait(requests)
        except BaseException:
            _abandon(requests)  # an interrupt: nobody waits for these any more
            raise

    def submit(self, requests: Sequence[Request]) -> None:
        """Puts requests into the queue, all of them or none."""
        with self._books:
            self._scheduler.submit(requests)
            if not self._live:
                self._progressed_at = time.monotonic()
            self._live += len(requests)

    def wait(self, requests: Sequence[Request]) -> None:
        """Returns once all of the requests have ended.

        Raises RuntimeError in a callback of this engine, and with a thread of its own while the interpreter ends.
        """
        self._refuse_callbacks()
        if self._thread is None:
            self._drive(requests)
            return
        awaited, failures = list(requests), list[BaseException]()
        with self._turn:
            if self._process != os.getpid():  # forked: the thread stayed with the parent
                self._thread, self._process = _new_thread(), os.getpid()
            self._thread.submit(self._drive_for, awaited, failures)
            self._turn.wait_for(lambda: failures or all(request.state.ended for request in awaited))
        awaited.clear()  # the thread may still be busy with another's wait, and would keep results for as long
        if failures:
            raise failures.pop()

    def _drive_for(self, awaited: list[Request], failures: list[BaseException]) -> None:
        """In the engine's own thread: who waits goes on once its requests have ended, or hears what went wrong."""
        try:
            self._drive(awaited)
        except BaseException as error:
            logger.error("the engine failed: %s: %s", type(error).__name__, str(error))
            with self._turn:
                failures.append(error)
                self._turn.notify_all()
                _abandon(awaited)
                with self._books:
                    self._drop_stopped()

    def release_thread(self) -> None:
        """Ends the engine's own thread once nobody waits. The next who waits starts another, of that one's priority."""
        if self._thread is not None:
            with self._turn:
                self._thread.shutdown(wait=False)
                self._thread = _new_thread()

    def _drive(self, requests: Sequence[Request]) -> None:
        """Drives the engine, or lets another thread drive it, until all of the requests have ended."""
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._driver is None or all(r.state.ended for r in requests))
                if all(request.state.ended for request in requests):
                    return
                self._driver = threading.get_ident()
            try:
                while not all(request.state.ended for request in requests):
                    ended = self.step()
                    self._progressed_at = time.monotonic()
                    if ended:
                        with self._turn:
                            self._turn.notify_all()
            except BaseException:
                # An interrupt of this thread, which may have come in the middle of anybody's step.
                self._restart()
                raise
            finally:
                with self._turn:
                    self._driver = None
                    self._turn.notify_all()

    def _refuse_callbacks(self) -> None:
        if self._driver == threading.get_ident():
            raise RuntimeError("a callback cannot wait for the engine that calls it: submit() there, wait() elsewhere")

    def _restart(self) -> None:
        """Puts all admitted requests back to where their tokens are, and nothing else counts."""
        with self._books:
            left = {}
            for request in self._scheduler.admitted:
                lane = self._lanes.get(request)
                if lane is None or lane.encoding is not None:
                    self._lanes.pop(request, None)
                    left[request] = request.context_used(self.config.max_context)
                else:
                    left[request] = self._runner.restart(lane)
            self._scheduler.restart(left)

    def step(self) -> bool:
        """One turn of the engine; True if a request ended in it."""
        with self._books:
            ended = self._drop_stopped()
            self._scheduler.admit()
            plan = self._scheduler.plan()
        if plan.prefill is not None:
            request, chunk = plan.prefill
            if request.state is State.DECODING:
                ended |= self._finish(self._lanes[request])
            else:
                started = time.perf_counter()
                ended |= self._prefill(request, chunk, held_up=bool(plan.decode))
                self._stats.prefill_seconds += time.perf_counter() - started
        started = time.perf_counter()
        stepped = self._step_lanes([self._lanes[request] for request in plan.decode])
        ended |= len(stepped) < len(plan.decode)
        if stepped:
            self._stats.steps += 1
            self._stats.rows += sum(lane.request.rows for lane in stepped)
            self._stats.decode_seconds += time.perf_counter() - started
        for lane in stepped:
            ended |= self._update(lane)
        return ended

    def _prefill(self, request: Request, chunk: int, *, held_up: bool) -> bool:
        """A request's next share of computing before it can step; True if it failed and so ended.

        held_up: others are waiting for their step. Encoding the history then takes shares of its own.
        """
        try:
            if request not in self._lanes:
                self._lanes[request] = self._runner.open(request, self._scheduler.block(request))
            lane = self._lanes[request]
            if lane.encoding is not None:
                self._runner.encode(lane, at_once=not held_up)
                if held_up:
                    return False
            left = self._runner.prefill(lane, chunk)
            with self._books:
                self._stats.prefill_bars += self._scheduler.prefilled(request, left)
        except Exception as error:
            return self._fail(request, error)
        return False

    def _step_lanes(self, lanes: list[Lane]) -> list[Lane]:
        """One step of all lanes. If it raises, each is stepped alone, so that only the cause ends."""
        if not lanes:
            return []
        before = [lane.cache.own_length for lane in lanes]
        try:
            self._runner.step(lanes)
            return lanes
        except Exception as error:
            if len(lanes) == 1:
                self._fail(lanes[0].request, error)
                return []
            stepped = []
            for lane, own_length in zip(lanes, before, strict=True):
                lane.cache.own_length = own_length
                stepped += self._step_lanes([lane])
            return stepped

    def _update(self, lane: Lane) -> bool:
        """Callbacks and the end of a request that has stepped; True if it ended."""
        request = lane.request
        try:
            if request.on_step is not None:
                request.on_step(lane.step)
            if request.on_bars is not None and self._runner.results.in_shares(request):
                self._tell(lane, self._runner.results.decode(lane))
        except OF_A_CALLBACK as error:
            return self._fail(request, error)
        if lane.finished:
            # What has been told came through the decoder bar by bar. The result is decoded anew: it has to be, digit
            # for digit, that of a request which was not streamed.
            lane.decoder_cache = None
            if self._runner.results.is_long(request):
                with self._books:
                    self._scheduler.decode_later(request, request.work)
                return False
            return self._finish(lane)
        if left := self._runner.slide(lane):
            with self._books:
                self._scheduler.refill(request, left)
        return False

    def _finish(self, lane: Lane) -> bool:
        """Decodes a share of a result, and hands it over once it is whole; True if the request ended."""
        request = lane.request
        try:
            lane.decoded.append(self._runner.results.decode(lane))
            if left := request.horizon - sum(piece.shape[1] for piece in lane.decoded):
                with self._books:
                    self._scheduler.decode_later(request, request.rows * left)
                return False
            request.mean, request.scale = lane.mean, lane.scale
            request.tokens = lane.tokens[:, request.history :].cpu().numpy()
            request.normalised = np.concatenate(lane.decoded, axis=1)
            if request.on_bars is not None:
                self._tell(lane, request.normalised[:, lane.told :])
        except OF_A_CALLBACK as error:
            return self._fail(request, error)
        return self._end(request, State.FINISHED)

    def _tell(self, lane: Lane, bars: np.ndarray) -> None:
        """Hands normalised bars [S, n, 6], which follow those told before, to on_bars."""
        if lane.request.on_bars is not None and bars.shape[1]:
            lane.request.on_bars(lane.told, (bars * lane.scale + lane.mean).astype(np.float64))
            lane.told += bars.shape[1]

    def _drop_stopped(self) -> bool:
        """Ends the requests whose callers do not want them any more."""
        ended = False
        for request in [*self._scheduler.queued, *self._scheduler.admitted]:
            try:
                if request.should_stop is not None and request.should_stop():
                    request.error = ForecastCancelledError("the caller stopped the forecast")
                    ended |= self._end(request, State.CANCELLED)
            except OF_A_CALLBACK as error:
                ended |= self._fail(request, error)
        return ended

    def _fail(self, request: Request, error: BaseException) -> bool:
        # As text: a handler that keeps its records would keep the traceback, and with it the tensors of its frames.
        logger.error("a request failed: %s: %s", type(error).__name__, str(error))
        request.error = error
        return self._end(request, State.FAILED)

    def _end(self, request: Request, state: State) -> bool:
        with self._books:
            self._scheduler.remove(request)
            self._lanes.pop(request, None)
            name = state.value
            setattr(self._stats, name, getattr(self._stats, name) + 1)
            self._live -= 1
        request.state = state
        return True

    def cache_slots(self) -> tuple[int, int]:
        """(used, free) slots of the cache; a slot holds one bar of one path, or one bar of a shared history."""
        with self._books:
            return self._arena.used // self._runner.slot_size, self._arena.free // self._runner.slot_size

    def stats(self) -> EngineStats:
        """A copy of the counters. Never waits for a step."""
        return replace(self._stats)

    def stalled_s(self) -> float:
        """Seconds since the last step ended, or work came; 0 without work. Takes no lock: a hang may hold one."""
        return time.monotonic() - self._progressed_at if self._live else 0.0

    def queued_work(self) -> int:
        """Rows × steps that wait."""
        with self._books:
            return self._scheduler.queued_work

    def running_rows(self) -> int:
        """Paths that are being computed."""
        with self._books:
            return self._scheduler.running_rows

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was asked for and does not work here; the engine does without."""
        return self._runner.warnings

    def check_integrity(self) -> None:
        """Raises CacheIntegrityError unless every range of the cache belongs to one live request or to nobody."""
        with self._books:
            self._scheduler.check_integrity()


def _abandon(requests: Sequence[Request]) -> None:
    """The next step drops what is left of them."""
    for request in requests:
        request.should_stop = lambda: True


def _new_thread() -> ThreadPoolExecutor:
    """An executor starts its thread when it is needed, and ends it with the engine."""
    return ThreadPoolExecutor(1, thread_name_prefix="kronos-engine")
