"""The engine: schedule → run → update, for requests of any shape at once.

Any number of threads may call run(). The engine has no thread of its own: whoever waits for a result drives the steps,
for all.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import numpy as np
import torch

from model.engine.kv_cache import Arena
from model.engine.runner import Lane, Runner
from model.engine.scheduler import Scheduler
from model.engine.types import EngineConfig, Request, State
from model.errors import ForecastCancelledError
from model.kronos import Kronos
from model.tokenizer import KronosTokenizer

logger = logging.getLogger(__name__)


class Engine:
    """Generates paths for requests that join and leave at every step."""

    def __init__(
        self, model: Kronos, tokenizer: KronosTokenizer, config: EngineConfig, device: torch.device | None = None
    ) -> None:
        self.config = config
        self._runner = Runner(model, tokenizer, config, device or torch.device("cpu"))
        self._arena = Arena(self._runner.arena_elements)
        self._scheduler = Scheduler(config, self._arena, self._runner.cache_size)
        self._lanes: dict[Request, Lane] = {}
        self._books = threading.RLock()
        self._turn = threading.Condition()
        self._driving = False

    def run(self, requests: Sequence[Request]) -> None:
        """Submits requests and returns once all have ended; each one's state says how.

        Raises QueueFullError or RequestTooLargeError, and then none of the requests has been taken.
        """
        self.submit(requests)
        try:
            self.wait(requests)
        except BaseException:
            # An interrupt: nobody waits for these any more, so the next step drops what is left of them.
            for request in requests:
                request.should_stop = lambda: True
            raise

    def submit(self, requests: Sequence[Request]) -> None:
        """Puts requests into the queue, all of them or none."""
        with self._books:
            taken: list[Request] = []
            try:
                for request in requests:
                    self._scheduler.submit(request)
                    taken.append(request)
            except Exception:
                for request in taken:
                    self._scheduler.remove(request)
                raise

    def wait(self, requests: Sequence[Request]) -> None:
        """Drives the engine, or lets another thread drive it, until all of the requests have ended."""
        while True:
            with self._turn:
                self._turn.wait_for(lambda: not self._driving or all(r.state.ended for r in requests))
                if all(request.state.ended for request in requests):
                    return
                self._driving = True
            try:
                while not all(request.state.ended for request in requests):
                    if self.step():
                        with self._turn:
                            self._turn.notify_all()
            finally:
                with self._turn:
                    self._driving = False
                    self._turn.notify_all()

    def step(self) -> bool:
        """One turn of the engine; True if a request ended in it."""
        with self._books:
            ended = self._drop_stopped()
            for request, block in self._scheduler.admit():
                try:
                    self._lanes[request] = self._runner.open(request, block)
                except Exception as error:
                    ended |= self._fail(request, error)
            plan = self._scheduler.plan()
        if plan.prefill is not None:
            request, bars = plan.prefill
            try:
                self._runner.prefill(self._lanes[request], bars)
            except Exception as error:
                ended |= self._fail(request, error)
            else:
                with self._books:
                    self._scheduler.prefilled(request, bars)
        stepped = self._step_lanes([self._lanes[request] for request in plan.decode])
        ended |= len(stepped) < len(plan.decode)
        for lane in stepped:
            ended |= self._update(lane)
        return ended

    def _step_lanes(self, lanes: list[Lane]) -> list[Lane]:
        """One step of all lanes. If it raises, each is stepped alone, so that only the cause ends."""
        if not lanes:
            return []
        before = [(lane.start, lane.cache.own_length) for lane in lanes]
        try:
            self._runner.step(lanes)
            return lanes
        except Exception as error:
            if len(lanes) == 1:
                self._fail(lanes[0].request, error)
                return []
            stepped = []
            for lane, (start, own_length) in zip(lanes, before, strict=True):
                # With its old start, a window that had moved already is moved and computed again.
                lane.start, lane.cache.own_length = start, own_length
                stepped += self._step_lanes([lane])
            return stepped

    def _update(self, lane: Lane) -> bool:
        """Callbacks and the end of a request that has stepped; True if it ended."""
        request = lane.request
        try:
            if request.on_step is not None:
                request.on_step(lane.step)
            if request.on_bars is not None or lane.finished:
                self._decode(lane)
        except Exception as error:
            return self._fail(request, error)
        if not lane.finished:
            return False
        request.normalised = np.concatenate(lane.decoded, axis=1)
        request.mean, request.scale = lane.mean, lane.scale
        request.tokens = lane.tokens[:, request.history :].cpu().numpy()
        return self._end(request, State.FINISHED)

    def _decode(self, lane: Lane) -> None:
        bars = self._runner.decode(lane)
        first = sum(piece.shape[1] for piece in lane.decoded)
        lane.decoded.append(bars)
        if lane.request.on_bars is not None and bars.shape[1]:
            lane.request.on_bars(first, (bars * lane.scale + lane.mean).astype(np.float64))
        if lane.finished and first:
            # Decoded again at once: the result has to be, digit for digit, that of a request which was not streamed.
            lane.decoder_cache, lane.decoded = None, []
            lane.decoded.append(self._runner.decode(lane))

    def _drop_stopped(self) -> bool:
        """Ends the requests whose callers do not want them any more."""
        ended = False
        for request in [*self._scheduler.queued, *self._scheduler.admitted]:
            try:
                if request.should_stop is not None and request.should_stop():
                    request.error = ForecastCancelledError("the caller stopped the forecast")
                    ended |= self._end(request, State.CANCELLED)
            except Exception as error:
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
        request.state = state
        return True

    def cache_slots(self) -> tuple[int, int]:
        """(used, free) slots of the cache; a slot holds one bar of one path, or one bar of a shared history."""
        with self._books:
            return self._arena.used // self._runner.slot_size, self._arena.free // self._runner.slot_size

    def queued_work(self) -> int:
        """Rows × steps that wait."""
        with self._books:
            return self._scheduler.queued_work

    def running_rows(self) -> int:
        """Paths that are being computed."""
        with self._books:
            return self._scheduler.running_rows

    def check_integrity(self) -> None:
        """Raises CacheIntegrityError unless every range of the cache belongs to one live request or to nobody."""
        with self._books:
            self._scheduler.check_integrity()
