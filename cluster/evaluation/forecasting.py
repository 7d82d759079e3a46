"""What a model says about windows: in this process, or on Ray actors, with the same numbers.

The seed of a forecast is a function of (seed, symbol, origin), and the windows that share the engine's steps are the
same ones whoever computes them: rounding depends on who steps together.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import torch

from cluster.candles.bars import SymbolBars
from cluster.evaluation.scores import invalid_share
from cluster.evaluation.walk_forward import CLOSE, WalkForward, Window
from cluster.placement import place_when_free
from cluster.ray_session import node_resources, ray_session
from model.device import resolve_device
from model.errors import InputError
from model.predictor import KronosPredictor
from model.registry import BUNDLED_FOLDER, Checkpoint, CheckpointSource, load_checkpoint, named_source, whole_path
from model.types import Sampling, Series

logger = logging.getLogger(__name__)

ROWS_TOGETHER = 256
"""Paths that share the engine's steps: enough to fill its matrix products."""
WORK_TOGETHER = 500_000
"""Rows × steps of one share; the engine's queue takes twice as much."""


@dataclass(frozen=True)
class ModelChoice:
    """What to forecast with. model: as model.registry.named_source takes it."""

    model: str
    tokenizer: str | None = None
    device: str = "auto"
    threads: int = 1

    @property
    def source(self) -> CheckpointSource:
        return named_source(self.model, tokenizer=self.tokenizer)

    @property
    def folder(self) -> Path:
        """Where training.json and calibration.json lie, if the model is a bundle on this machine."""
        model = self.source.model
        return BUNDLED_FOLDER if model == "bundled" else Path(model)


def make_predictor(choice: ModelChoice) -> tuple[Checkpoint, KronosPredictor]:
    """Raises CheckpointError. torch's threads are set for the process, because rounding depends on them."""
    torch.set_num_threads(choice.threads)
    checkpoint = load_checkpoint(choice.source)
    device = resolve_device(choice.device)[0]
    predictor = KronosPredictor(
        checkpoint.model,
        checkpoint.tokenizer,
        device,
        checkpoint.source.max_context,
        # Several workers share the memory of a CPU, while a GPU is one's own.
        cache_bytes=2**30 if device.type == "cpu" else None,
    )
    return checkpoint, predictor


@dataclass(frozen=True)
class Forecasts:
    """Of the windows first, first + 1, … closes: float64 [n, S, H]. invalid: share of sampled candles whose high or low
    is not outermost."""

    first: int
    closes: np.ndarray
    invalid: float


def forecast_windows(
    predictor: KronosPredictor, windows: Sequence[Window], setting: WalkForward, first: int = 0
) -> Forecasts:
    """Forecasts of some windows, which share the engine's steps."""
    requests = [(_series(window, setting), _sampling(window, setting)) for window in windows]
    closes, invalid = [], []
    for outcome in predictor.forecast_many(requests, window=setting.window):
        if isinstance(outcome, Exception):
            raise outcome
        closes.append(outcome.values[:, :, CLOSE])
        invalid.append(invalid_share(outcome.values))
    return Forecasts(first, np.stack(closes), float(np.mean(invalid)))


def _series(window: Window, setting: WalkForward) -> Series:
    cut, marks = window.cut, window.bars.marks
    return Series(window.known(setting), marks[cut - setting.history : cut], marks[cut : cut + setting.horizon])


def _sampling(window: Window, setting: WalkForward) -> Sampling:
    key = f"{setting.seed}|{window.bars.symbol}|{window.origin.astype('datetime64[ns]').astype(np.int64)}"
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1
    return Sampling(setting.temperature, setting.top_k, setting.top_p, setting.samples, seed)


def forecast_all(
    choice: ModelChoice,
    windows: Sequence[Window],
    setting: WalkForward,
    *,
    workers: int = 0,
    on_done: Callable[[int], None] = lambda done: None,
    warn: Callable[[str], None] = logger.warning,
) -> Iterator[Forecasts]:
    """Forecasts of all windows, in their order. workers: Ray actors; 0 computes in this process, without Ray.

    on_done: told how many windows have been forecast. warn: told what is not as it was asked for.
    Raises CheckpointError, InputError.
    """
    share = max(1, min(ROWS_TOGETHER // setting.samples, WORK_TOGETHER // (setting.samples * setting.horizon)))
    shares = [(first, windows[first : first + share]) for first in range(0, len(windows), share)]
    done = 0
    if workers == 0:
        results = _in_process(choice, shares, setting, warn)
    else:
        results = _on_ray(choice, shares, setting, workers, warn)
    for result in results:
        done += len(result.closes)
        on_done(done)
        yield result


Share = tuple[int, Sequence[Window]]
Warn = Callable[[str], None]


def _in_process(choice: ModelChoice, shares: Sequence[Share], setting: WalkForward, warn: Warn) -> Iterator[Forecasts]:
    _, warning = resolve_device(choice.device)
    if warning is not None:
        warn(warning)
    _, predictor = make_predictor(choice)
    for first, windows in shares:
        yield forecast_windows(predictor, windows, setting, first)


class Forecaster:
    """A Ray actor: one predictor, and the series, which are sent once."""

    def __init__(self, choice: ModelChoice, setting: WalkForward, series: list[SymbolBars]) -> None:
        self._setting, self._series = setting, series
        _, self._predictor = make_predictor(choice)

    def forecast(self, first: int, places: list[tuple[int, int]]) -> Forecasts:
        """places: (number of the series, cut) of each window."""
        windows = [Window(self._series[number], cut, 1) for number, cut in places]
        return forecast_windows(self._predictor, windows, self._setting, first)


def _on_ray(
    choice: ModelChoice, shares: Sequence[Share], setting: WalkForward, workers: int, warn: Warn
) -> Iterator[Forecasts]:
    """One actor a worker, or as many as fit; results in order, at most two shares an actor under way."""
    series = list({id(window.bars): window.bars for _, windows in shares for window in windows}.values())
    numbers = {id(bars): number for number, bars in enumerate(series)}
    with ray_session(os.environ.get("RAY_ADDRESS")):
        place = place_when_free(
            node_resources(),
            lambda: node_resources(free=True),
            device=choice.device,
            actors=min(workers, len(shares)),
            num_cpus=choice.threads,
            num_gpus=1.0,
        )
        for warning in place.warnings:
            warn(warning)
        choice = replace(
            choice,
            model=whole_path(choice.model),
            tokenizer=choice.tokenizer and whole_path(choice.tokenizer),
            device=place.device,
        )
        stored = ray.put(series)
        # What a lost actor had under way is asked of its successor: the seeds are in the windows.
        actors: list[Any] = [
            ray.remote(Forecaster)
            .options(max_restarts=2, max_task_retries=2, num_cpus=place.num_cpus, num_gpus=place.num_gpus)
            .remote(choice, setting, stored)
            for _ in range(place.actors)
        ]
        try:
            waiting: list[Any] = []
            for turn, (first, windows) in enumerate(shares):
                if len(waiting) >= 2 * place.actors:
                    yield _result(waiting.pop(0))
                places = [(numbers[id(window.bars)], window.cut) for window in windows]
                waiting.append(actors[turn % place.actors].forecast.remote(first, places))
            for reference in waiting:
                yield _result(reference)
        finally:  # also for a caller who stops listening: the cluster may be one that goes on
            for actor in actors:
                ray.kill(actor)


def _result(reference: Any) -> Forecasts:
    try:
        return cast(Forecasts, ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        # As in this process: the error of the computing itself, not Ray's wrapping of it.
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise InputError(f"a worker could not be started or died too often: {error}", code="worker_lost") from None
