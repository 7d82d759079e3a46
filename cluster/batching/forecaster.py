"""The actor of a batch forecast: reads a unit, computes its symbols together, writes the part. One engine each.

While one unit is computed, the next one is read and the last one is written, by threads of the actor.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cluster.batching.files import Layout
from cluster.batching.plan import Unit
from cluster.batching.store import Part, Store, schema
from cluster.batching.symbols import HistoryRules, SymbolHistory, load_unit
from model.device import memory_bytes, resolve_device
from model.engine.attention import SequenceCache
from model.errors import CheckpointMismatchError, InputError
from model.kronos import Kronos
from model.predictor import KronosPredictor
from model.registry import CheckpointSource, load_checkpoint
from model.types import COLUMNS, Paths, Sampling

CPU_CACHE_BYTES = 2**30
"""Keys and values of an actor without a GPU: some twenty symbols of Kronos-small with 30 paths at once."""
CPU_ROWS = 256
"""Paths that step together on a CPU; its matrix products gain nothing from more."""
GPU_ROWS = 1024


@dataclass(frozen=True)
class Work:
    """Everything that decides the numbers, and what an actor needs to compute them.

    sampling: of every symbol; its seed is the run's, from which each symbol's is made. sha256: of the weights that the
    run was begun with. device: what a worker asks model.device for. threads: that torch computes with.
    """

    source: CheckpointSource
    sha256: str
    rules: HistoryRules
    names: Layout
    sampling: Sampling
    quantiles: tuple[float, ...]
    paths: bool
    window: str
    precision: str
    device: str
    threads: int


def symbol_seed(seed: int, symbol: str) -> int:
    """A symbol's own seed below 2^53, so that no two symbols share their noise. HTTP clients can send it, too."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{symbol}".encode()).digest()[:8]) >> 11


def cache_bytes(model: Kronos, work: Work, device: torch.device) -> int | None:
    """The engine's cache: on a GPU the predictor's own choice, on a CPU enough for two symbols at least."""
    if device.type != "cpu":
        return None
    context, horizon = work.source.max_context, work.rules.horizon
    own = max(1, min(horizon - 1, context))
    one = SequenceCache.size(len(model.transformer) + 1, model.d_model, context, work.sampling.samples, own)
    return min(max(CPU_CACHE_BYTES, 2 * 4 * one), memory_bytes(device) // 2)


class Forecaster:
    """What Ray Data's map_batches runs in every actor."""

    def __init__(self, work: Work, store: Store) -> None:
        self._work, self._store = work, store
        checkpoint = load_checkpoint(work.source)
        if checkpoint.sha256 != work.sha256:
            raise CheckpointMismatchError(
                f"{work.source.model} has other weights on this node than where the run was started: share one folder"
            )
        device, warning = resolve_device(work.device)
        self._predictor = KronosPredictor(
            checkpoint.model,
            checkpoint.tokenizer,
            device,
            work.source.max_context,
            precision=work.precision,
            cache_bytes=cache_bytes(checkpoint.model, work, device),
            max_rows=CPU_ROWS if device.type == "cpu" else GPU_ROWS,
            throughput=True,
        )
        self._warnings = [text for text in (warning, self._predictor.precision_warning) if text]
        self._provenance = {
            "model": checkpoint.model_version,
            "revision": checkpoint.revision,
            "sha256": checkpoint.sha256,
            "device": str(device),
            "precision": self._predictor.precision,
        }

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
        """batch["unit"]: units as text. Yields one row a unit: what the driver shows."""
        # OpenMP's number of threads is each thread's own, and Ray chooses the thread that calls.
        torch.set_num_threads(self._work.threads)
        began = time.time()
        units = [Unit.parse(text) for text in batch["unit"].tolist()]
        with ThreadPoolExecutor(2) as pool:
            reading = pool.submit(self._read, units[0])
            writing: Future[None] | None = None
            for number, unit in enumerate(units):
                histories, finished = reading.result()
                if number + 1 < len(units):
                    reading = pool.submit(self._read, units[number + 1])
                if finished is not None:  # by this actor's predecessor, before it was lost
                    yield self._told(finished, began)
                    continue
                outcomes = self.forecast(histories)
                if writing is not None:
                    writing.result()
                part = Part(unit.symbols, _error_codes(outcomes))
                writing = pool.submit(self._write, histories, outcomes, part)
                if number + 1 == len(units):
                    writing.result()
                yield self._told(part, began)

    def _read(self, unit: Unit) -> tuple[dict[str, SymbolHistory | InputError], Part | None]:
        finished = self._store.read(unit.symbols)
        return ({}, finished) if finished is not None else (load_unit(unit, self._work.names, self._work.rules), None)

    def forecast(self, histories: dict[str, SymbolHistory | InputError]) -> dict[str, Paths | InputError]:
        """Every symbol's paths, or what is wrong with it; all symbols share the engine's steps."""
        good = {symbol: history for symbol, history in histories.items() if isinstance(history, SymbolHistory)}
        sampling = self._work.sampling
        requests = [
            (history.series, _seeded(sampling, symbol_seed(sampling.seed or 0, symbol)))
            for symbol, history in good.items()
        ]
        made = dict(zip(good, self._predictor.forecast_many(requests, window=self._work.window), strict=True))
        found: dict[str, Paths | InputError] = {}
        for symbol, history in histories.items():
            outcome = history if isinstance(history, InputError) else made[symbol]
            found[symbol] = _as_input_error(outcome) if isinstance(outcome, Exception) else outcome
        return found

    def _write(
        self, histories: dict[str, SymbolHistory | InputError], outcomes: dict[str, Paths | InputError], part: Part
    ) -> None:
        work = self._work
        form = schema(work.quantiles, work.paths)
        tables = []
        for symbol, outcome in outcomes.items():
            columns: dict[str, Any]
            if isinstance(outcome, InputError):
                columns = {"error_code": [outcome.code], "error": [f"{outcome.code}: {outcome}"]}
                rows = 1
            else:
                history = histories[symbol]
                assert isinstance(history, SymbolHistory)
                columns = self._columns(history, outcome)
                rows = len(history.future)
            seed = symbol_seed(work.sampling.seed or 0, symbol)
            facts: dict[str, Any] = {**self._provenance, "window": work.window, "symbol": symbol, "seed": seed}
            columns |= {name: [value] * rows for name, value in facts.items()}
            arrays = [pa.array(columns.get(field.name, [None] * rows), type=field.type) for field in form]
            tables.append(pa.Table.from_arrays(arrays, schema=form))
        self._store.write(pa.concat_tables(tables).unify_dictionaries(), part)

    def _columns(self, history: SymbolHistory, paths: Paths) -> dict[str, Any]:
        """The rows of one forecast, one a step."""
        horizon = len(history.future)
        zone = None if history.future.tz is None else str(history.future.tz)
        columns: dict[str, Any] = {
            "timestamp": history.future.tz_localize(None).to_numpy().astype("datetime64[us]"),
            "time_zone": [zone] * horizon,
            "step": np.arange(1, horizon + 1, dtype=np.int32),
            "history": [len(history.series.candles)] * horizon,
        }
        tables = [("mean", paths.values.mean(axis=0))]
        levels = np.quantile(paths.values, self._work.quantiles, axis=0)
        tables += [(f"q{level:g}", table) for level, table in zip(self._work.quantiles, levels, strict=True)]
        for suffix, table in tables:
            columns |= {f"{name}_{suffix}": table[:, place] for place, name in enumerate(COLUMNS)}
        if self._work.paths:
            # The engine's numbers are float32.
            steps = paths.values.astype(np.float32).transpose(2, 1, 0)
            columns |= {f"{name}_paths": list(steps[place]) for place, name in enumerate(COLUMNS)}
        return columns

    def _told(self, part: Part, began: float) -> dict[str, Any]:
        """A row for the driver. began: when the call did, in seconds since 1970."""
        warnings = [*self._warnings, *self._predictor.engine.warnings]
        return {
            "symbols": np.array([len(part.symbols)]),
            "errors": np.array([len(part.errors)]),
            "began": np.array([began]),
            "device": np.array([f"{self._provenance['device']}, {self._provenance['precision']}"]),
            "warning": np.array(["; ".join(dict.fromkeys(warnings))]),
        }


def _error_codes(outcomes: dict[str, Paths | InputError]) -> dict[str, str]:
    return {symbol: outcome.code for symbol, outcome in outcomes.items() if isinstance(outcome, InputError)}


def _seeded(sampling: Sampling, seed: int) -> Sampling:
    return Sampling(sampling.temperature, sampling.top_k, sampling.top_p, sampling.samples, seed)


def _as_input_error(error: Exception) -> InputError:
    """What the engine says of one request, with a code."""
    if isinstance(error, InputError):
        return error
    code = {"RequestTooLargeError": "request_too_large"}.get(type(error).__name__, "engine_failure")
    return InputError(f"{type(error).__name__}: {error}", code=code)


def unit_rows(units: Sequence[Unit]) -> list[dict[str, str]]:
    """Units as the rows of a data set."""
    return [{"unit": unit.text()} for unit in units]
