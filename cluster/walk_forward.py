"""Walk-forward forecasts: which windows there are, and what a model says about each, in this process or on Ray.

The numbers do not depend on the number of workers: the seed of a forecast is a function of (seed, symbol, origin), and
the windows that share the engine's steps are the same ones whoever computes them.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import torch

from cluster.bars import SymbolBars, invalid_candles, read_bars
from model.calibration import usual_bar_seconds
from model.device import resolve_device
from model.engine.types import Request, WindowPolicy
from model.errors import InputError
from model.predictor import KronosPredictor
from model.registry import BUNDLED, BUNDLED_FOLDER, PUBLISHED, Checkpoint, CheckpointSource, load_checkpoint
from model.types import Sampling, Series

CLOSE = 3
ROWS_TOGETHER = 256
"""Paths that share the engine's steps: enough to fill its matrix products."""
WORK_TOGETHER = 500_000
"""Rows × steps of one share; the engine's queue takes twice as much."""


@dataclass(frozen=True)
class WalkForward:
    """begins, ends: the period [begins, ends) that all forecast bars lie in; None: open. history, horizon, every: bars.

    every: distance of neighbouring origins. samples: paths a forecast. Sampling as Sampling has it; scores are honest
    only with temperature 1, top_k 0 and top_p 1. window: model.engine.types.WindowPolicy.
    """

    begins: np.datetime64 | None = None
    ends: np.datetime64 | None = None
    history: int = 400
    horizon: int = 48
    samples: int = 20
    every: int = 48
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    window: str = "exact"

    def __post_init__(self) -> None:
        for name, least in (("history", 3), ("horizon", 1), ("samples", 2), ("every", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}", code="bad_size")
        if self.begins is not None and self.ends is not None and self.begins >= self.ends:
            raise InputError(f"the period from {self.begins} to {self.ends} is empty: give --to after --from")
        WindowPolicy.parse(self.window)

    @property
    def overlap(self) -> int:
        """Origins whose forecasts share bars, counting the own one."""
        return -(-self.horizon // self.every)


@dataclass(frozen=True)
class Window:
    """One forecast to make: bars[cut − history : cut] are known, the horizon starts at cut. season: bars of a day."""

    bars: SymbolBars
    cut: int
    season: int

    @property
    def origin(self) -> np.datetime64:
        """Time of the last known bar."""
        return self.bars.times[self.cut - 1]

    def known(self, setting: WalkForward) -> np.ndarray:
        """float32 [history, 6]."""
        return self.bars.candles[self.cut - setting.history : self.cut]

    def actual(self, setting: WalkForward) -> np.ndarray:
        """Closes that came: float64 [H]."""
        return self.bars.candles[self.cut : self.cut + setting.horizon, CLOSE].astype(np.float64)


@dataclass(frozen=True)
class Windows:
    """All windows, by origin and then by symbol. left_out: reason → how many were not made."""

    chosen: list[Window]
    left_out: dict[str, int] = field(default_factory=dict)


def read_series(
    paths: Sequence[str | Path], *, time_column: str = "timestamps", symbol_column: str = "symbol"
) -> list[SymbolBars]:
    """cluster.bars.read_bars for command lines: what it says of a column names the option too."""
    try:
        return read_bars(paths, time_column=time_column, symbol_column=symbol_column)
    except InputError as error:
        if error.code != "missing_column" or error.column != time_column:
            raise
        raise InputError(f"{error} (--time-column)", code=error.code, column=error.column) from error


def season_length(bars: SymbolBars) -> int:
    """Bars of a usual day; 5 for daily and longer bars, a week of trading."""
    _, counts = np.unique(bars.times.astype("datetime64[D]"), return_counts=True)
    usual = int(np.median(counts))
    return usual if usual > 1 else 5


def pick_windows(series: Sequence[SymbolBars], setting: WalkForward, season: int | None = None) -> Windows:
    """Every origin of every symbol whose whole horizon lies in the period.

    Origins are every K-th time of all symbols of one bar size together, so that symbols are forecast at the same
    moments; one without a bar at that moment is left out there. Raises InputError if no window is left.
    """
    by_size: dict[int, list[SymbolBars]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for bars in series:
        size = usual_bar_seconds(bars.times)
        if size is None:
            left_out["symbols of one bar"] += 1
        else:
            by_size[size].append(bars)
    chosen: list[Window] = []
    for group in by_size.values():
        calendar = np.unique(np.concatenate([bars.times for bars in group]))
        first = 0 if setting.begins is None else int(np.searchsorted(calendar, setting.begins))
        first = max(first, setting.history)
        stop = len(calendar) if setting.ends is None else int(np.searchsorted(calendar, setting.ends))
        # The origin is the bar before the first forecast one.
        for origin in calendar[first - 1 : stop : setting.every]:
            for bars in group:
                cut = int(np.searchsorted(bars.times, origin)) + 1
                reason = _unusable(bars, cut, origin, setting)
                if reason is None:
                    chosen.append(Window(bars, cut, season or season_length(bars)))
                else:
                    left_out[reason] += 1
    if not chosen:
        raise InputError(_no_window(series, setting, left_out), code="no_window")
    chosen.sort(key=lambda window: (window.origin, window.bars.symbol))
    return Windows(chosen, dict(left_out))


def _unusable(bars: SymbolBars, cut: int, origin: np.datetime64, setting: WalkForward) -> str | None:
    if cut > len(bars) or bars.times[cut - 1] != origin:
        return "no bar at the origin"
    last = cut + setting.horizon - 1
    if last >= len(bars) or (setting.ends is not None and bars.times[last] >= setting.ends):
        return "the horizon leaves the period or the data"
    if cut < setting.history:
        return "too little history before the origin"
    closes = bars.candles[cut - setting.history : cut, CLOSE]
    moves = np.diff(closes.astype(np.float64))
    if np.ptp(moves) <= 1e-12 * abs(float(closes[-1])):
        return "the close never moves, or always alike, in the history"
    if not (bars.candles[cut - 1 : last + 1, CLOSE] > 0).all():
        return "a price of the horizon is not positive"
    return None


def _no_window(series: Sequence[SymbolBars], setting: WalkForward, left_out: Counter[str]) -> str:
    longest = max(series, key=len)
    reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.most_common())
    period = f"from {setting.begins or 'the start'} to {setting.ends or 'the end'}"
    return (
        f"there is no window in the period {period}: one needs {setting.history} bars of history before it and "
        f"{setting.horizon} in it; the longest series, {longest.symbol!r}, has {len(longest)} bars from "
        f"{longest.times[0]} to {longest.times[-1]} ({reasons or 'no bar in the period'}); move the period, take a "
        "shorter history or horizon, or give more bars"
    )


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelChoice:
    """What to forecast with: "bundled", a published alias, org/repo, or a folder with model/ and tokenizer/."""

    model: str
    tokenizer: str | None = None
    device: str = "auto"
    threads: int = 1

    @property
    def source(self) -> CheckpointSource:
        if self.model in PUBLISHED and self.tokenizer is None:
            return PUBLISHED[self.model]
        if self.model == "bundled":
            return BUNDLED
        return CheckpointSource(Path(self.model).resolve().name, self.model, self.tokenizer)

    @property
    def folder(self) -> Path:
        """Where training.json and calibration.json lie, if the model is a bundle on this machine."""
        return BUNDLED_FOLDER if self.model == "bundled" else Path(self.model)


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


def forecast_windows(predictor: Any, windows: Sequence[Window], setting: WalkForward, first: int = 0) -> Forecasts:
    """Forecasts of some windows, which share the engine's steps. predictor: a KronosPredictor."""
    policy = WindowPolicy.parse(setting.window)
    requests = [Request(_series(window, setting), _sampling(window, setting), policy) for window in windows]
    predictor.engine.run(requests)
    closes, invalid = [], []
    for request in requests:
        if request.error is not None:
            raise request.error
        values = cast(np.ndarray, request.normalised) * cast(np.ndarray, request.scale) + cast(np.ndarray, request.mean)
        closes.append(values[:, :, CLOSE].astype(np.float64))
        invalid.append(invalid_candles(values).mean())
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
) -> Iterator[Forecasts]:
    """Forecasts of all windows, in their order. workers: Ray actors; 0 computes in this process, without Ray.

    on_done: told how many windows have been forecast. Raises CheckpointError, InputError.
    """
    share = max(1, min(ROWS_TOGETHER // setting.samples, WORK_TOGETHER // (setting.samples * setting.horizon)))
    shares = [(first, windows[first : first + share]) for first in range(0, len(windows), share)]
    done = 0
    for result in _in_process(choice, shares, setting) if workers == 0 else _on_ray(choice, shares, setting, workers):
        done += len(result.closes)
        on_done(done)
        yield result


Share = tuple[int, Sequence[Window]]


def _in_process(choice: ModelChoice, shares: Sequence[Share], setting: WalkForward) -> Iterator[Forecasts]:
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


def _on_ray(choice: ModelChoice, shares: Sequence[Share], setting: WalkForward, workers: int) -> Iterator[Forecasts]:
    """One actor a worker; results in order, at most two shares an actor under way."""
    workers = min(workers, len(shares))
    series = list({id(window.bars): window.bars for _, windows in shares for window in windows}.values())
    numbers = {id(bars): number for number, bars in enumerate(series)}
    with ray_cluster():
        options, choice = _placement(choice, workers)
        stored = ray.put(series)
        # What a lost actor had under way is asked of its successor: the seeds are in the windows.
        actors: list[Any] = [
            ray.remote(Forecaster)
            .options(max_restarts=2, max_task_retries=2, **options)
            .remote(choice, setting, stored)
            for _ in range(workers)
        ]
        waiting: list[Any] = []
        for turn, (first, windows) in enumerate(shares):
            if len(waiting) >= 2 * workers:
                yield _result(waiting.pop(0))
            places = [(numbers[id(window.bars)], window.cut) for window in windows]
            waiting.append(actors[turn % workers].forecast.remote(first, places))
        for reference in waiting:
            yield _result(reference)
        for actor in actors:
            ray.kill(actor)


def _result(reference: Any) -> Forecasts:
    try:
        return cast(Forecasts, ray.get(reference))
    except ray.exceptions.RayTaskError as error:
        # As in this process: the error of the computing itself, not Ray's wrapping of it.
        raise error.cause from None
    except ray.exceptions.ActorDiedError as error:
        raise InputError(f"a worker could not be started or died too often: {error}", code="worker_lost") from None


def _placement(choice: ModelChoice, workers: int) -> tuple[dict[str, float], ModelChoice]:
    """Ray's resources for an actor. Raises InputError for CPUs that the cluster lacks: Ray would wait for ever."""
    found = ray.cluster_resources()
    cpus, gpus = found.get("CPU", 0.0), found.get("GPU", 0.0)
    if workers * choice.threads > cpus:
        raise InputError(
            f"{workers} workers of {choice.threads} threads need {workers * choice.threads} CPUs and the cluster has "
            f"{cpus:g}: ask for fewer --workers or --threads",
            code="too_few_cpus",
        )
    if choice.device in ("auto", "cuda") and gpus >= workers:
        return {"num_cpus": choice.threads, "num_gpus": 1}, choice
    device = "cpu" if choice.device == "auto" else choice.device
    return {"num_cpus": choice.threads}, ModelChoice(choice.model, choice.tokenizer, device, choice.threads)


def device_warning(choice: ModelChoice) -> str | None:
    """What asking for an absent device comes to."""
    return resolve_device(choice.device)[1]


@contextmanager
def ray_cluster() -> Iterator[None]:
    """The cluster this process is connected to, or the one of RAY_ADDRESS, or a private one that is stopped again."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=True)
    else:
        ray.init(address=address)
    try:
        yield
    finally:
        ray.shutdown()
