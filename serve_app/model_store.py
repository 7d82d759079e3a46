"""The models of one replica: loaded off the event loop within a budget of bytes, lent to jobs, replaced on change.

A job holds a lease: what is leased is neither evicted nor changed under it. A model that is replaced serves until the
new version is loaded and verified; a failure leaves everything as it was and is remembered for a while.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from serve_app.catalog import ModelSpec
from serve_app.jobs import Candidate, Engine
from serve_app.load_errors import MemoryFullError, ModelUnavailableError, UnknownModelError, report_failure
from serve_app.logs import log

RETRY_LOADING_S = 5.0
UNLISTED_S = 10.0
"""How long a model stays that is not served any more: jobs for it may be on their way."""
ValueT = TypeVar("ValueT")


@dataclass(eq=False)
class _Loaded:
    alias: str
    spec: ModelSpec
    engine: Engine
    size: int
    last_used: float
    users: int = 0


@dataclass(frozen=True)
class _Failure:
    spec: ModelSpec
    at: float
    message: str


class ModelStore:
    """alias → engine. All methods run on one event loop; loading happens in other threads."""

    def __init__(
        self,
        find: Callable[[str], ModelSpec | None],
        prepare: Callable[[str, ModelSpec], Candidate],
        budget: float,
        retry_s: float,
        loader: Executor,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """find: what an alias means now. prepare: blocks; whatever it raises makes the model unavailable for retry_s.

        budget: bytes for all loaded models. loader: the threads in which `prepare` and what it returns run.
        """
        self.find = find
        self.retry_s = retry_s
        self.pinned: Collection[str] = ()
        """Aliases that are never evicted."""
        self._prepare = prepare
        self._budget = budget
        self._clock = clock
        self._loaded: dict[str, _Loaded] = {}
        self._asked: Counter[str] = Counter()
        """Jobs that wait for a model: between its loading and their lease it must not be evicted for another."""
        self._outgoing: set[_Loaded] = set()
        """Replaced or evicted, but still leased."""
        self._reserved = 0
        self.counts: Counter[str] = Counter()
        """model_loads, model_load_failures, model_evictions."""
        self._loading: dict[str, asyncio.Task[_Loaded]] = {}
        self._failures: dict[str, _Failure] = {}
        self._loader = loader
        self._room = asyncio.Lock()
        self._released = asyncio.Event()

    @asynccontextmanager
    async def lease(self, alias: str, wait_s: float) -> AsyncIterator[Engine]:
        """The engine, loaded if it is not yet, for as long as the block runs.

        Raises UnknownModelError, or ModelUnavailableError: at once if it failed a short time ago, after wait_s if it is
        still being loaded; loading goes on for those who come later.
        """
        self._asked[alias] += 1
        try:
            # A model whose replacement is on its way goes on serving, and so does one that is not listed any more.
            loaded = self._loaded.get(alias)
            if loaded is None:
                loaded = await asyncio.wait_for(self._arriving(alias), wait_s)
            loaded.users += 1
        except TimeoutError:
            raise ModelUnavailableError(f"model {alias!r} is being loaded; try again soon", RETRY_LOADING_S) from None
        finally:
            self._asked[alias] -= 1
            self._released.set()
        if self._loaded.get(alias) is not loaded:
            self._outgoing.add(loaded)
        try:
            yield loaded.engine
        finally:
            loaded.users -= 1
            loaded.last_used = self._clock()
            if not loaded.users:
                self._outgoing.discard(loaded)
                self._released.set()
                if len(self._loaded) > 1:
                    loaded.engine.release_thread()  # its pool of OpenMP's would slow down the other engines'

    def _arriving(self, alias: str) -> asyncio.Future[_Loaded]:
        """A model that is not loaded; its loading has begun. Raises as lease does."""
        spec = self.find(alias)
        if spec is None:
            raise UnknownModelError(alias)
        if (failure := self._recent_failure(alias, spec)) is not None:
            raise ModelUnavailableError(failure.message, failure.at + self.retry_s - self._clock())
        # Shielded: a request that gives up must not stop the loading that others wait for.
        return asyncio.shield(self._start_loading(alias, spec))

    def load_now(self, alias: str) -> None:
        """Blocks; for use before the first request. A failure is remembered, not raised."""
        spec = self.find(alias)
        if spec is None:
            return
        try:
            candidate = self._prepare(alias, spec)
            self._check_that_it_fits(alias, candidate.size)
            if self._used() + candidate.size > self._budget:
                raise MemoryFullError(alias, candidate.size, self._budget)
            self._add(alias, spec, candidate.start(), candidate.size)
        except Exception as error:  # what one model breaks, from a bad file to a full GPU, the others must not feel
            self._fail(alias, spec, error)

    def refresh(self) -> None:
        """Starts what has to be loaded: always-on models that are missing, loaded ones that mean something else now.

        Lets go of models that are not served any more, once all always-on ones are there: until then the ingress may
        go on asking for what it knows. Called every second.
        """
        settled = all(alias in self._loaded for alias in self.pinned)
        for alias in {*self.pinned, *self._loaded}:
            spec, loaded = self.find(alias), self._loaded.get(alias)
            if spec is None:
                idle = loaded is not None and not loaded.users and self._clock() - loaded.last_used > UNLISTED_S
                if loaded is not None and idle and settled:
                    self._evict(loaded)
            elif loaded is not None and loaded.spec == spec:
                # What failed to replace it is not wanted any more.
                self._failures.pop(alias, None)
            elif self._recent_failure(alias, spec) is None:
                self._start_loading(alias, spec)

    @property
    def engines(self) -> list[Engine]:
        """Those that are loaded or still leased."""
        return [loaded.engine for loaded in (*self._loaded.values(), *self._outgoing)]

    def states(self) -> dict[str, dict[str, Any]]:
        """What /v1/models shows of models that are not idle, as plain values: it goes through Ray to every ingress."""
        return {alias: self._state(alias) for alias in {**self._loaded, **self._loading, **self._failures}}

    # --- loading ------------------------------------------------------------------------------------------------------

    def _start_loading(self, alias: str, spec: ModelSpec) -> asyncio.Task[_Loaded]:
        task = self._loading.get(alias)
        if task is None:
            task = self._loading[alias] = asyncio.ensure_future(self._load(alias, spec))
            # A failure is remembered and logged; with everybody gone who asked, asyncio would log a stack beside.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def _load(self, alias: str, spec: ModelSpec) -> _Loaded:
        try:
            candidate = await self._in_thread(lambda: self._prepare(alias, spec))
            self._check_that_it_fits(alias, candidate.size)
            if self._excess(alias, candidate.size) > 0:
                # Nothing makes room for a model that does not work.
                await self._in_thread(candidate.rehearse)
            async with self._room:
                await self._make_room(alias, candidate.size)
                self._reserved += candidate.size
            try:
                engine = await self._in_thread(candidate.start)
            finally:
                self._reserved -= candidate.size
        except Exception as error:  # whatever a checkpoint breaks, from a bad file to a full GPU, the others go on
            raise ModelUnavailableError(self._fail(alias, spec, error), self.retry_s) from None
        finally:
            self._loading.pop(alias, None)
        if alias in self._loaded and self.find(alias) != spec:
            return self._loaded[alias]  # wanted no more: what serves now goes on
        return self._add(alias, spec, engine, candidate.size)

    async def _in_thread(self, work: Callable[[], ValueT]) -> ValueT:
        return await asyncio.get_running_loop().run_in_executor(self._loader, work)

    def _add(self, alias: str, spec: ModelSpec, engine: Engine, size: int) -> _Loaded:
        self._failures.pop(alias, None)
        replaced = self._loaded.get(alias)
        if replaced is not None:
            self._evict(replaced)
            log(
                logging.INFO,
                "model replaced",
                model=alias,
                before=replaced.engine.identity.sha256,
                now=engine.identity.sha256,
            )
        self.counts["model_loads"] += 1
        self._loaded[alias] = _Loaded(alias, spec, engine, size, self._clock())
        return self._loaded[alias]

    def _fail(self, alias: str, spec: ModelSpec, error: Exception) -> str:
        self.counts["model_load_failures"] += 1
        message = report_failure(alias, error)
        self._failures[alias] = _Failure(spec, self._clock(), message)
        return message

    def _recent_failure(self, alias: str, spec: ModelSpec) -> _Failure | None:
        failure = self._failures.get(alias)
        if failure is None or failure.spec != spec or self._clock() - failure.at >= self.retry_s:
            return None
        return failure

    # --- memory -------------------------------------------------------------------------------------------------------

    def _used(self) -> int:
        return self._reserved + sum(loaded.size for loaded in (*self._loaded.values(), *self._outgoing))

    def _excess(self, alias: str, size: int) -> float:
        """Bytes over the budget if that much came in the place of what the alias has now."""
        replaced = self._loaded[alias].size if alias in self._loaded else 0
        return self._used() - replaced + size - self._budget

    def _check_that_it_fits(self, alias: str, size: int) -> None:
        """Raises MemoryFullError if there could not be room even with nothing in use."""
        kept = sum(loaded.size for name, loaded in self._loaded.items() if name in self.pinned and name != alias)
        if kept + size > self._budget:
            raise MemoryFullError(alias, size, self._budget - kept)

    async def _make_room(self, alias: str, size: int) -> None:
        """Evicts idle models, the one least recently used first; waits for those in use where that is not enough."""
        while self._excess(alias, size) > 0:
            idle = [
                loaded
                for loaded in self._loaded.values()
                if not loaded.users and not self._asked[loaded.alias] and loaded.alias not in {*self.pinned, alias}
            ]
            if idle:
                self.counts["model_evictions"] += 1
                self._evict(min(idle, key=lambda loaded: loaded.last_used))
            else:
                self._released.clear()
                await self._released.wait()

    def _evict(self, loaded: _Loaded) -> None:
        del self._loaded[loaded.alias]
        if loaded.users:
            self._outgoing.add(loaded)
        log(
            logging.INFO,
            "model unloaded",
            model=loaded.alias,
            sha256=loaded.engine.identity.sha256,
            leased=loaded.users,
        )

    # --- what is told -------------------------------------------------------------------------------------------------

    def _state(self, alias: str) -> dict[str, Any]:
        failure = self._failures.get(alias)
        if failure is not None and failure.spec != self.find(alias):
            failure = None  # the alias means something else now, which has not been tried
        if (loaded := self._loaded.get(alias)) is not None:
            identity = loaded.engine.identity
            return {
                "state": "loaded",
                "repo": identity.repo,
                "revision": identity.revision,
                "max_context": identity.max_context,
                "sha256": identity.sha256,
                "parameters": identity.parameters,
                "model_version": identity.model_version,
                "pending": self._pending(alias, failure),
            }
        if alias in self._loading:
            return {"state": "loading"}
        return {"state": "failed", "error": failure.message} if failure is not None else {"state": "idle"}

    def _pending(self, alias: str, failure: _Failure | None) -> dict[str, Any] | None:
        """The version that shall replace the loaded one, and how far it is."""
        if failure is not None and alias not in self._loading:
            return _wanted(failure.spec, "failed", failure.message)
        spec = self.find(alias)
        return _wanted(spec, "loading", None) if alias in self._loading and spec is not None else None


def _wanted(spec: ModelSpec, state: str, error: str | None) -> dict[str, Any]:
    return {"state": state, "error": error, "repo": spec.settings.repo, "revision": spec.settings.revision}
