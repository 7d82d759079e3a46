"""The models of one replica: loaded at most once, off the event loop, and a failure is remembered for a while."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from model.errors import CheckpointNotFoundError, KronosError
from serve_app.jobs import Engine
from serve_app.logs import LOGGER_NAME


class ModelUnavailableError(Exception):
    """A listed model that cannot be loaded now. The message is fit for a client: no path, no stack."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelStore:
    """alias → engine. All methods run on one event loop; loading happens in threads of its own."""

    def __init__(
        self, load: Callable[[str], Engine], retry_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """load: alias → engine, blocking; whatever it raises counts as unavailable for retry_s seconds."""
        self._load = load
        self._retry_s = retry_s
        self._clock = clock
        self._engines: dict[str, Engine] = {}
        self._loading: dict[str, asyncio.Task[Engine]] = {}
        self._failures: dict[str, tuple[float, str]] = {}
        self.counts: Counter[str] = Counter()
        self._loader = ThreadPoolExecutor(4, thread_name_prefix="load")

    async def get(self, alias: str) -> Engine:
        """The engine, loaded if it is not yet. Raises ModelUnavailableError, at once if it failed a short time ago."""
        engine = self._engines.get(alias)
        if engine is not None:
            return engine
        failure = self._failures.get(alias)
        if failure is not None and (left := failure[0] + self._retry_s - self._clock()) > 0:
            raise ModelUnavailableError(failure[1], left)
        task = self._loading.get(alias)
        if task is None:
            task = self._loading[alias] = asyncio.ensure_future(self._load_in_thread(alias))
            # A failure is remembered and logged; with everybody gone who asked, asyncio would log a stack beside.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        # Shielded: a request that gives up must not stop the loading that others wait for.
        return await asyncio.shield(task)

    async def _load_in_thread(self, alias: str) -> Engine:
        try:
            engine = await asyncio.get_running_loop().run_in_executor(self._loader, self._load, alias)
        except Exception as error:  # whatever a checkpoint breaks, from a bad file to a full GPU, the others go on
            message = self.remember_failure(alias, error)
            raise ModelUnavailableError(message, self._retry_s) from None
        finally:
            self._loading.pop(alias, None)
        self.add(alias, engine)
        return engine

    @property
    def engines(self) -> list[Engine]:
        """Those that are loaded."""
        return list(self._engines.values())

    def add(self, alias: str, engine: Engine) -> None:
        self.counts["model_loads"] += 1
        self._failures.pop(alias, None)
        self._engines[alias] = engine

    def remember_failure(self, alias: str, error: Exception) -> str:
        """Logs the error in full and returns what a client may read of it."""
        self.counts["model_load_failures"] += 1
        known = isinstance(error, KronosError | OSError)
        logging.getLogger(LOGGER_NAME).error(
            "model failed to load",
            extra={"fields": {"model": alias, "error_type": type(error).__name__, "error_message": str(error)}},
            exc_info=None if known else error,
        )
        if isinstance(error, CheckpointNotFoundError):
            message = f"model {alias!r} is listed, but its checkpoint cannot be found or fetched now"
        else:
            message = f"model {alias!r} is listed, but its checkpoint cannot be used; the server's log says why"
        self._failures[alias] = (self._clock(), message)
        return message

    def states(self, aliases: list[str]) -> dict[str, dict[str, Any]]:
        """Per alias what /v1/models shows, as plain values: this goes through Ray to every ingress."""
        return {alias: self._state(alias) for alias in aliases}

    def _state(self, alias: str) -> dict[str, Any]:
        if (engine := self._engines.get(alias)) is not None:
            identity = engine.identity
            return {
                "state": "loaded",
                "revision": identity.revision,
                "sha256": identity.sha256,
                "parameters": identity.parameters,
                "model_version": identity.model_version,
            }
        if alias in self._loading:
            return {"state": "loading"}
        if alias in self._failures:
            return {"state": "failed", "error": self._failures[alias][1]}
        return {"state": "idle"}
