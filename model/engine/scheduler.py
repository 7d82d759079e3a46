"""Policy: who is admitted, who is prefilled, who steps. Knows requests and sizes, no tensors.

One plan a step: at most one chunk of one prefill, or one share of decoding a large result to candles, and one step for
every running request. Running requests therefore never wait for more than that, whatever else arrives or ends, and
whosever window slides and is computed again. Only companions wait for each other: their caller gains nothing from the
first one's bars, and steps of all their rows cost less.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from model.engine.kv_cache import Arena, Block
from model.engine.types import EngineConfig, Request, State
from model.errors import QueueFullError, RequestTooLargeError

BYPASS_LIMIT = 32
"""How many requests may overtake the first one that does not fit yet before all wait behind it; and how many that do
not fit are looked at in a step."""
OLDEST_EVERY = 4
"""One prefill chunk in so many goes to the oldest request: short ones must not keep a long one waiting for ever."""
IDLE_CHUNK = 512
"""Bars of a chunk where no request is running that it could hold up."""


@dataclass(frozen=True)
class Plan:
    """What one engine step computes: prefill is (request, rows × bars), decode the requests that advance by one bar.

    prefill may name a request that is DECODING: its result is what a share is computed of.
    """

    prefill: tuple[Request, int] | None
    decode: list[Request]


class Scheduler:
    """Queue, admission by cache and rows, and the plan of each step."""

    def __init__(
        self, config: EngineConfig, arena: Arena, cache_size: Callable[[Request], int], prefill_chunk: int
    ) -> None:
        """cache_size: elements of the arena that a request needs from admission to its end.

        prefill_chunk: rows × bars that may be computed between two steps of the running requests.
        """
        self._config = config
        self._prefill_chunk = prefill_chunk
        self._arena = arena
        self._cache_size = cache_size
        self._queue: deque[Request] = deque()
        self._overtaken: dict[Request, int] = {}
        self._blocks: dict[Request, Block] = {}
        self._prefilling: dict[Request, int] = {}  # rows × bars that are left to compute, or to decode
        self._plans = 0
        self._running: list[Request] = []
        self._submitted = 0
        self._order: dict[Request, int] = {}

    @property
    def queued(self) -> list[Request]:
        return list(self._queue)

    @property
    def admitted(self) -> list[Request]:
        return list(self._blocks)

    @property
    def queued_work(self) -> int:
        return sum(request.work for request in self._queue)

    @property
    def running_rows(self) -> int:
        return sum(request.rows for request in self.admitted)

    def submit(self, requests: Sequence[Request]) -> None:
        """Appends to the queue, all or none. Raises RequestTooLargeError or QueueFullError.

        The bound is on what others let wait: into an empty queue goes any number at once.
        """
        for request in requests:
            size = self._cache_size(request)
            if size > self._arena.capacity:
                raise RequestTooLargeError(
                    f"{request.rows} paths over {request.history} + {request.horizon} bars need "
                    f"{size / self._arena.capacity:.1f} times the cache that there is: ask for fewer paths or bars, or "
                    "give the engine more"
                )
        waiting, more = self.queued_work, sum(request.work for request in requests)
        if self._queue and waiting + more > self._config.max_queued_work:
            raise QueueFullError(
                f"{waiting} rows × steps are waiting already, and {more} more would pass the bound of "
                f"{self._config.max_queued_work}: ask again later, or for less at a time"
            )
        for request in requests:
            self._queue.append(request)
            self._submitted += 1
            self._order[request] = self._submitted

    def admit(self) -> None:
        """Moves requests from the queue to prefilling, as far as rows and cache allow."""
        rows = self.running_rows
        waiting: list[Request] = []
        for request in list(self._queue):
            if waiting and max(self._overtaken.get(waiting[0], 0), len(waiting)) >= BYPASS_LIMIT:
                break
            fits_rows = rows == 0 or rows + request.rows <= self._config.max_rows
            block = self._arena.allocate(self._cache_size(request)) if fits_rows else None
            if block is None:
                waiting.append(request)
                continue
            if waiting:
                self._overtaken[waiting[0]] = self._overtaken.get(waiting[0], 0) + 1
            rows += request.rows
            self._queue.remove(request)
            self._overtaken.pop(request, None)
            self._blocks[request] = block
            self._prefilling[request] = request.context_used(self._config.max_context)
            request.state = State.PREFILLING

    def block(self, request: Request) -> Block:
        """Where the cache of an admitted request lies."""
        return self._blocks[request]

    def plan(self) -> Plan:
        """The next step. The shortest remaining prefill goes first: a long history then delays nobody but itself."""
        awaited = {
            id(group) for request in self._prefilling if request.state is State.PREFILLING for group in _groups(request)
        }
        decode = [request for request in self._running if not any(id(group) in awaited for group in _groups(request))]
        prefill = None
        if self._prefilling:
            self._plans += 1
            key = self._order if self._plans % OLDEST_EVERY == 0 else self._prefilling
            request = min(self._prefilling, key=key.__getitem__)
            prefill = (request, self._prefill_chunk if decode else max(self._prefill_chunk, IDLE_CHUNK))
        return Plan(prefill, decode)

    def prefilled(self, request: Request, left: int) -> int:
        """Books a chunk after which rows × bars are left; with none left the request is ready to step.

        Returns how many the chunk had.
        """
        computed = self._prefilling[request] - left
        self._prefilling[request] = left
        if not left:
            del self._prefilling[request]
            self._running.append(request)
            self._running.sort(key=self._order.__getitem__)
            request.state = State.RUNNING
        return computed

    def refill(self, request: Request, left: int) -> None:
        """Takes a running request out of the steps until its window, rows × bars, is computed again."""
        self._running.remove(request)
        self._prefilling[request] = left
        request.state = State.PREFILLING

    def decode_later(self, request: Request, left: int) -> None:
        """Takes a request that has all its tokens out of the steps; rows × bars of its result are left to decode."""
        if request in self._running:
            self._running.remove(request)
        self._prefilling[request] = left
        request.state = State.DECODING

    def restart(self, left: Mapping[Request, int]) -> None:
        """Takes all admitted requests out of the steps. left: rows × bars that each has to prefill; 0: to decode."""
        self._running.clear()
        self._prefilling = {request: count or request.work for request, count in left.items()}
        for request, count in left.items():
            request.state = State.PREFILLING if count else State.DECODING

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it is, and frees its cache."""
        if request in self._queue:
            self._queue.remove(request)
        self._overtaken.pop(request, None)
        self._order.pop(request, None)
        self._prefilling.pop(request, None)
        if request in self._running:
            self._running.remove(request)
        block = self._blocks.pop(request, None)
        if block is not None:
            self._arena.release(block)

    def check_integrity(self) -> None:
        """Raises CacheIntegrityError unless the arena holds exactly the admitted requests' blocks."""
        self._arena.check_integrity(list(self._blocks.values()))


def _groups(request: Request) -> list[object]:
    """What a request steps together with, or not at all."""
    return [group for group in (request.noise_group, request.companions) if group is not None]
