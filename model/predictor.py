"""KronosPredictor: candles in, sampled futures out. Drop-in for the public class, and forecast() for all its paths."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from model.device import memory_bytes, resolve_device, resolve_precision
from model.engine.engine import Engine
from model.engine.types import BarsCallback, EngineConfig, Request, WindowPolicy
from model.errors import InputError, KronosError
from model.frames import Times, series_from_frame
from model.kronos import Kronos
from model.sampler import check_sampling
from model.tokenizer import KronosTokenizer
from model.types import COLUMNS, Paths, Sampling, Series, StepCallback, StopCheck, Window

COMPILED_ROWS = (1, 4, 6)
"""A step of more rows is bound by its products, which the packed layers compute as fast."""


@dataclass(frozen=True)
class Forecast:
    """All that was sampled for one series.

    timestamps: the H future times.
    paths: float64 [S, H, 6] in the order of model.types.COLUMNS, in the history's units.
    mean: frame [H, 6], the mean over paths. quantiles: one frame [H, 6] per level, column by column and bar by bar.
    seed: with it and the same history the same paths come out again.
    """

    timestamps: pd.DatetimeIndex
    paths: np.ndarray
    mean: pd.DataFrame
    quantiles: dict[float, pd.DataFrame]
    seed: int
    window: Window
    device: str
    device_warning: str | None


class KronosPredictor:
    """Forecasts candles with a model and its tokenizer on one device.

    One predictor may be used from several threads at once: nothing in it changes after construction.
    """

    def __init__(
        self,
        model: Kronos,
        tokenizer: KronosTokenizer,
        device: str | torch.device | None = None,
        max_context: int = 512,
        clip: float = 5,
        *,
        precision: str = "auto",
        cache_bytes: int | None = None,
        max_rows: int = 1024,
        compile: bool = False,
        throughput: bool = False,
        own_thread: bool = False,
    ) -> None:
        """device: as resolve_device takes it. max_context: bars that the model sees at once.

        clip: bound on normalised values. precision: fp32, bf16, int8, or auto; as resolve_precision takes it.
        cache_bytes: memory for keys and values, allocated once; None takes a quarter of the device's memory, of which
        the CPU commits only what is used, and on MPS at most 2 GiB. max_rows: paths that step together; more wait.
        compile: prepares steps with torch.compile on first use, minutes the first time; engine.warnings says if it
        could not.
        throughput: for many series at once rather than for short waits: a history is computed in one piece, so that its
        rounding does not depend on what runs beside it.
        own_thread: for a server, where many threads ask: one thread computes for all of them, and runs their callbacks,
        one of which may still be called when its caller has been interrupted. Otherwise who waits computes, for all.
        """
        if max_context < 1:
            raise ValueError(f"max_context must be at least 1, not {max_context}")
        if not clip > 0:
            raise ValueError(f"clip must be positive, not {clip}")
        if (model.s1_bits, model.s2_bits) != (tokenizer.s1_bits, tokenizer.s2_bits):
            raise ValueError(
                f"the model has {model.s1_bits} + {model.s2_bits} bits, the tokenizer {tokenizer.s1_bits} + "
                f"{tokenizer.s2_bits}: they do not belong together"
            )
        self.device, self.device_warning = resolve_device(device)
        self.precision, self.precision_reason, self.precision_warning = resolve_precision(precision, self.device)
        # Dropout must never reach a forecast, whatever the caller trained just before.
        self.model = model.to(self.device).eval()
        self.tokenizer = tokenizer.to(self.device).eval()
        self.max_context = max_context
        self.clip = clip
        self._config = EngineConfig(
            max_context=max_context,
            clip=clip,
            precision=self.precision,
            cache_bytes=cache_bytes or _cache_bytes(self.device),
            max_rows=max_rows,
            compile_rows=COMPILED_ROWS if compile else (),
            own_thread=own_thread,
        )
        if throughput:
            self._config = replace(self._config, prefill_chunk=max_context)
        self._engine: Engine | None = None
        self._engine_weights: tuple[tuple[int, int], ...] = ()
        self._engine_lock = threading.Lock()

    @property
    def engine(self) -> Engine:
        """The engine over the networks' present weights; made on first use, and anew after the weights have changed."""
        parameters = [*self.model.parameters(), *self.tokenizer.parameters()]
        weights = tuple((parameter.data_ptr(), parameter._version) for parameter in parameters)
        with self._engine_lock:
            if self._engine is None or self._engine_weights != weights:
                self.model.eval()
                self.tokenizer.eval()
                self._engine = Engine(self.model, self.tokenizer, self._config, self.device)
                self._engine_weights = weights
            return self._engine

    def predict(
        self,
        df: pd.DataFrame,
        x_timestamp: Times,
        y_timestamp: Times,
        pred_len: int,
        T: float = 1.0,
        top_k: int | None = 0,
        top_p: float | None = 0.9,
        sample_count: int = 1,
        verbose: bool = True,
        *,
        seed: int | None = None,
        window: str = "exact",
    ) -> pd.DataFrame:
        """The mean path: a float32 frame [pred_len, 6], indexed by y_timestamp; the public arguments and numbers.

        df: columns open, high, low, close, and volume and amount if known, in any case; one row a bar, oldest first.
        T: temperature, 0 is greedy. top_k > 0 switches top_p off. verbose shows a progress bar.
        Without a seed the noise comes from torch's global generator.
        window: exact | hop:K | fit, what happens past max_context (model.engine.types.WindowPolicy).
        Raises InputError (a ValueError) that names the column, the row and the remedy.
        """
        return self.predict_batch(
            [df],
            [x_timestamp],
            [y_timestamp],
            pred_len,
            T,
            top_k,
            top_p,
            sample_count,
            verbose,
            seed=seed,
            window=window,
        )[0]

    def predict_batch(
        self,
        df_list: Sequence[pd.DataFrame],
        x_timestamp_list: Sequence[Times],
        y_timestamp_list: Sequence[Times],
        pred_len: int | Sequence[int] | None,
        T: float = 1.0,
        top_k: int | None = 0,
        top_p: float | None = 0.9,
        sample_count: int = 1,
        verbose: bool = True,
        *,
        seed: int | None = None,
        window: str = "exact",
    ) -> list[pd.DataFrame]:
        """predict for several series, in their order. Their histories may differ in length.

        pred_len: one horizon for all, one per series, or None for the lengths of y_timestamp_list.
        With a seed each series is forecast as it would be alone. Without, all of them share torch's global generator.
        """
        if not len(df_list) == len(x_timestamp_list) == len(y_timestamp_list):
            raise InputError(
                f"{len(df_list)} frames, {len(x_timestamp_list)} x_timestamps, {len(y_timestamp_list)} y_timestamps: "
                "give one of each per series",
                code="length_mismatch",
            )
        if not len(df_list):
            return []
        horizons = [pred_len] * len(df_list) if pred_len is None or isinstance(pred_len, int) else list(pred_len)
        if len(horizons) != len(df_list):
            raise InputError(f"pred_len has {len(horizons)} entries for {len(df_list)} series", code="length_mismatch")
        sampling = _sampling(T, top_k, top_p, sample_count, seed)
        batch = [
            _located(i, len(df_list), *arguments)
            for i, arguments in enumerate(zip(df_list, x_timestamp_list, y_timestamp_list, horizons, strict=True))
        ]
        with tqdm(total=max(series.horizon for series in batch), disable=not verbose, unit="bar") as progress:
            requests = self._generate(batch, sampling, window, on_step=lambda bars: _advance(progress, bars))
        # The mean is taken before scaling back, as published: the same rounding.
        return [
            pd.DataFrame(
                _candles(request, np.mean(cast(np.ndarray, request.normalised), axis=0)),
                columns=list(COLUMNS),
                index=times,
            )
            for request, times in zip(requests, y_timestamp_list, strict=True)
        ]

    def forecast(
        self,
        df: pd.DataFrame,
        x_timestamp: Times,
        y_timestamp: Times,
        pred_len: int | None = None,
        T: float = 1.0,
        top_k: int | None = 0,
        top_p: float | None = 0.9,
        sample_count: int = 30,
        *,
        quantiles: Sequence[float] = (0.1, 0.5, 0.9),
        seed: int | None = None,
        window: str = "exact",
        verbose: bool = False,
    ) -> Forecast:
        """Every sampled path with quantiles and mean; the horizon is the length of y_timestamp, and pred_len if given.

        seed: drawn and returned if it is None. Raises InputError as predict does.
        """
        for level in quantiles:
            if not 0 <= level <= 1:
                raise InputError(
                    f"quantile {level} must lie between 0 and 1", code="invalid_quantile", column="quantiles"
                )
        seed = secrets.randbits(32) if seed is None else seed
        sampling = _sampling(T, top_k, top_p, sample_count, seed)
        series = series_from_frame(df, x_timestamp, y_timestamp, pred_len)
        with tqdm(total=series.horizon, disable=not verbose, unit="bar") as progress:
            result = self.forecast_series(
                series, sampling, window=window, on_step=lambda bars: _advance(progress, bars)
            )
        index = pd.DatetimeIndex(y_timestamp)

        def frame(values: np.ndarray) -> pd.DataFrame:
            return pd.DataFrame(values, columns=list(COLUMNS), index=index)

        return Forecast(
            timestamps=index,
            paths=result.values,
            mean=frame(result.values.mean(axis=0)),
            quantiles={level: frame(np.quantile(result.values, level, axis=0)) for level in quantiles},
            seed=seed,
            window=result.window,
            device=str(self.device),
            device_warning=self.device_warning,
        )

    def forecast_series(
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
        """Arrays in, arrays out: what the server calls. Blocks until all paths are there.

        Calls from several threads share the engine's steps. on_bars receives bars as soon as they are final.
        companions: the same object for all series of one caller who waits for the last of them; they step together,
        which costs less. on_bars makes it void.
        Raises InputError for settings out of range, ForecastCancelledError once should_stop() is true, and
        EngineFullError.
        """
        check_sampling(sampling)
        [request] = self._generate(
            [series],
            sampling,
            window,
            should_stop=should_stop,
            on_step=on_step,
            on_bars=on_bars,
            companions=companions,
        )
        return self._paths(request)

    def forecast_many(
        self, batch: Sequence[tuple[Series, Sampling]], *, window: str = "exact"
    ) -> list[Paths | Exception]:
        """forecast_series for many series, each with its own settings; all of them share the engine's steps.

        What is wrong with one is its result, and costs the others nothing.
        """
        results: dict[int, Paths | Exception] = {}
        requests: dict[int, Request] = {}
        engine, companions = self.engine, object()
        for number, (series, sampling) in enumerate(batch):
            try:
                check_sampling(sampling)
                policy = _window_policy(window, self.max_context, series.horizon)
                request = Request(series, sampling, policy, companions=companions)
                engine.submit([request])
            except KronosError as error:
                results[number] = error
            else:
                requests[number] = request
        engine.finish(list(requests.values()))
        for number, request in requests.items():
            results[number] = self._paths(request) if request.error is None else cast(Exception, request.error)
        return [results[number] for number in range(len(batch))]

    def _paths(self, request: Request) -> Paths:
        """What a finished request has made."""
        context = request.context_used(self.max_context)
        return Paths(
            values=_candles(request, request.normalised).astype(np.float64),
            tokens=cast(np.ndarray, request.tokens),
            window=Window(
                context_used=context,
                slid=context + request.horizon - 1 > self.max_context,
                policy=str(request.window),
            ),
        )

    def _generate(
        self,
        batch: Sequence[Series],
        sampling: Sampling,
        window: str,
        *,
        should_stop: StopCheck | None = None,
        on_step: StepCallback | None = None,
        on_bars: BarsCallback | None = None,
        companions: object | None = None,
    ) -> list[Request]:
        """Runs one request per series to its end; raises the first error of any."""
        policy = _window_policy(window, self.max_context, max(series.horizon for series in batch))
        group = object()
        requests = [
            Request(series, sampling, policy, group, companions, should_stop, on_step, on_bars) for series in batch
        ]
        self.engine.run(requests)
        for request in requests:
            if request.error is not None:
                raise request.error
        return requests


def _cache_bytes(device: torch.device) -> int:
    """Memory for keys and values where nobody says how much."""
    share = memory_bytes(device) // 4
    # Operations of MPS end the process on arrays past 4 GiB (pytorch issue 149325).
    return min(share, 2**31) if device.type == "mps" else share


def _candles(request: Request, normalised: np.ndarray | None) -> np.ndarray:
    """Normalised values [..., 6] of a finished request, scaled back to its history's units."""
    return cast(np.ndarray, normalised) * cast(np.ndarray, request.scale) + cast(np.ndarray, request.mean)


def _window_policy(text: str, max_context: int, horizon: int) -> WindowPolicy:
    """WindowPolicy.parse, and whether it can be kept."""
    try:
        policy = WindowPolicy.parse(text)
    except ValueError as error:
        raise InputError(str(error), code="invalid_window", column="window") from None
    if policy.hop > max_context:
        raise InputError(
            f"window={text} drops more than the {max_context} bars there are: use hop:16 or exact",
            code="invalid_window",
            column="window",
        )
    if policy.name == "fit" and horizon > max_context:
        raise InputError(
            f"window=fit needs a horizon of at most {max_context} bars, not {horizon}: use exact or hop:16",
            code="invalid_window",
            column="window",
        )
    return policy


def _sampling(T: float, top_k: int | None, top_p: float | None, sample_count: int, seed: int | None) -> Sampling:
    """The public argument names as Sampling, checked; None switches a filter off."""
    sampling = Sampling(T, 0 if top_k is None else top_k, 1.0 if top_p is None else top_p, sample_count, seed)
    check_sampling(sampling)
    return sampling


def _located(
    index: int, count: int, df: pd.DataFrame, x_timestamp: Times, y_timestamp: Times, pred_len: int | None
) -> Series:
    """series_from_frame, whose errors say which series of a batch they are about."""
    try:
        return series_from_frame(df, x_timestamp, y_timestamp, pred_len)
    except InputError as error:
        if count == 1:
            raise
        raise InputError(str(error), code=error.code, series=index, column=error.column, row=error.row) from None


def _advance(progress: tqdm, bars: int) -> None:
    """Several series of a batch report to one bar; the furthest counts."""
    if bars > progress.n:
        progress.update(bars - progress.n)
