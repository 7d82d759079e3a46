"""The numbers of a bundle's model card: forecasts of series it never saw, simulated and real, by bars ahead.

python -m cluster.evaluate --bundle model/bundled --candles FILE.csv --card model/bundled/README.md
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cluster.candles.bars import SymbolBars, read_bars
from cluster.candles.simulate import simulate
from cluster.evaluation.baselines import random_walk
from cluster.evaluation.card import training_of, write_card
from cluster.evaluation.forecasting import ModelChoice, make_predictor
from cluster.evaluation.scores import covered, crps_of_normal, crps_of_samples, invalid_share, paired_ratio
from cluster.evaluation.walk_forward import CLOSE
from cluster.files import require_writable_file
from model.errors import InputError
from model.frames import normalise
from model.predictor import KronosPredictor
from model.tokenizer import KronosTokenizer
from model.types import Sampling, Series

HELD_OUT_SEED = 90_001
"""Of the simulated series that are scored here. No configuration in cluster/configs may train on it."""
HORIZONS = (1, 12, 48)
CODE_LENGTHS = (64, 128, 256, 400, 512, 1024, 2000)
"""Histories whose round trip through the tokenizer is measured, where the series are long enough."""


@dataclass(frozen=True)
class Setting:
    """windows: forecasts a data set. history, horizon: bars. samples: paths a forecast, drawn at T = 1, top_p = 1."""

    windows: int = 200
    history: int = 400
    horizon: int = 48
    samples: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("windows", 1), ("history", 2), ("horizon", 1), ("samples", 2)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}", code="bad_size")


@dataclass(frozen=True)
class HorizonScore:
    """CRPS of the close in units of the history's typical one-bar move, means over the windows."""

    horizon: int
    crps: float
    baseline: float
    ratio: float
    ratio_low: float
    ratio_high: float
    coverage: float
    baseline_coverage: float


@dataclass(frozen=True)
class Scores:
    """Everything measured on one data set.

    coverage: over all bars of the horizon, not only those of `horizons`.
    bias: mean of (median path − actual) of the close at the last horizon, in units of its random walk's std.
    code_error: rms error of the tokenizer's round trip per column in units of the window's std.
    close_errors: history length → the same for the close in units of the typical one-bar move, median over windows.
    """

    name: str
    windows: int
    horizons: list[HorizonScore]
    coverage: float
    baseline_coverage: float
    bias: float
    invalid: float
    code_error: list[float]
    close_errors: dict[int, float]
    seconds: float


def pick_windows(series: Sequence[SymbolBars], setting: Setting) -> list[tuple[SymbolBars, int]]:
    """(bars, first row) of evenly spaced windows over all series. Raises InputError if no series is long enough."""
    length = setting.history + setting.horizon
    every = [(bars, start) for bars in series for start in range(len(bars) - length + 1)]
    if not every:
        raise InputError(f"no series has the {length} bars that one forecast and its check need", code="too_short")
    # One window a series first; more only where there are fewer series than windows.
    places = np.linspace(0, len(every) - 1, min(setting.windows, len(every))).astype(int)
    return [every[i] for i in places]


def score(
    predictor: KronosPredictor, name: str, series: Sequence[SymbolBars], setting: Setting, *, progress: bool = False
) -> Scores:
    """Forecasts the horizon of each window and compares. Raises InputError for series that are too short."""
    chosen = pick_windows(series, setting)
    sampling = Sampling(temperature=1.0, top_k=0, top_p=1.0, samples=setting.samples, seed=setting.seed)
    began = time.monotonic()
    samples, actuals, walks, invalid = [], [], [], []
    for number, (bars, start) in enumerate(chosen):
        cut, end = start + setting.history, start + setting.history + setting.horizon
        request = Series(bars.candles[start:cut], bars.marks[start:cut], bars.marks[cut:end])
        values = predictor.forecast_series(request, sampling).values
        walk = random_walk(bars.candles[start:cut, CLOSE], setting.horizon)
        # Scores of different instruments can be averaged once each is in units of its own one-bar move.
        unit = walk.std[0]
        samples.append((values[:, :, CLOSE] - walk.centre) / unit)
        actuals.append((bars.candles[cut:end, CLOSE] - walk.centre) / unit)
        walks.append(walk.std / unit)
        invalid.append(invalid_share(values))
        if progress:
            left = (time.monotonic() - began) / (number + 1) * (len(chosen) - number - 1)
            print(f"{name}: window {number + 1}/{len(chosen)}, {left / 60:.1f} min left", file=sys.stderr, flush=True)
    drawn, actual, std = np.stack(samples, axis=1), np.stack(actuals), np.stack(walks)  # [S, N, H], [N, H], [N, H]
    crps, baseline = crps_of_samples(drawn, actual), crps_of_normal(np.zeros_like(std), std, actual)
    inside = covered(drawn, actual)
    inside_walk = np.abs(actual) <= 1.2815515655446004 * std  # the normal's 80 % interval
    horizons = []
    for h in (h for h in HORIZONS if h <= setting.horizon):
        ratio = paired_ratio(crps[:, h - 1], baseline[:, h - 1])
        horizons.append(
            HorizonScore(
                h,
                float(crps[:, h - 1].mean()),
                float(baseline[:, h - 1].mean()),
                *ratio,
                float(inside[:, h - 1].mean()),
                float(inside_walk[:, h - 1].mean()),
            )
        )
    code_error, _ = round_trip(predictor.tokenizer, chosen, setting.history)
    close_errors = {
        length: round_trip(predictor.tokenizer, pick_windows(series, Setting(setting.windows, length, 1)), length)[1]
        for length in CODE_LENGTHS
        if any(len(bars) > length for bars in series)
    }
    return Scores(
        name=name,
        windows=len(chosen),
        horizons=horizons,
        coverage=float(inside.mean()),
        baseline_coverage=float(inside_walk.mean()),
        bias=float(((np.median(drawn, axis=0) - actual)[:, -1] / std[:, -1]).mean()),
        invalid=float(np.mean(invalid)),
        code_error=code_error,
        close_errors=close_errors,
        seconds=time.monotonic() - began,
    )


@torch.no_grad()
def round_trip(
    tokenizer: KronosTokenizer, chosen: Sequence[tuple[SymbolBars, int]], history: int
) -> tuple[list[float], float]:
    """What encoding and decoding alone do to the histories: see Scores.code_error and Scores.close_errors."""
    device = next(tokenizer.parameters()).device
    squares, close_errors = [], []
    for bars, start in chosen:
        x, _, _ = normalise(bars.candles[start : start + history], 5.0)
        tensor = torch.from_numpy(np.ascontiguousarray(x)).unsqueeze(0).to(device)
        back = tokenizer.decode(tokenizer.encode(tensor, half=True), half=True)[0].cpu().numpy()
        error = (back - x).astype(np.float64)
        squares.append((error**2).mean(axis=0))
        move = np.sqrt(np.mean(np.diff(x[:, CLOSE].astype(np.float64)) ** 2))
        close_errors.append(np.sqrt(squares[-1][CLOSE]) / move)
    return [float(v) for v in np.sqrt(np.mean(squares, axis=0))], float(np.median(close_errors))


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument("--card", type=Path, help="model card to write; needs training.json in the bundle")
    parser.add_argument("--scores", type=Path, help="JSON file to write the card's numbers to")
    parser.add_argument("--candles", type=Path, help="CSV or Parquet file of real candles; left out: simulated only")
    parser.add_argument("--windows", type=int, default=Setting.windows, help="forecasts a data set")


def run(options: argparse.Namespace) -> int:
    """Measures options.model on simulated and, if there are any, real candles; writes the card."""
    setting = Setting(options.windows, options.history, options.horizon, options.samples, options.seed)
    choice = ModelChoice(options.model, options.tokenizer, options.device, options.threads)
    # What cannot be read or written is said before the forecasts.
    for option, path in (("--card", options.card), ("--scores", options.scores)):
        if path is not None:
            require_writable_file(path, option)
    if options.card is not None:
        training_of(choice.folder)
    real = None if options.candles is None else read_bars(options.candles)
    _, predictor = make_predictor(choice)
    simulated = simulate(HELD_OUT_SEED, setting.windows, max(2001, setting.history + setting.horizon))
    found = [score(predictor, "simulated, held out", simulated, setting, progress=True)]
    if real is not None:
        found.append(score(predictor, "real 5-minute candles", real, setting, progress=True))
    else:
        print("no --candles: the real candles are not scored", file=sys.stderr)
    numbers = {"setting": vars(setting), "sets": [_as_dict(scores) for scores in found]}
    print(json.dumps(numbers, indent=2))
    if options.scores:
        options.scores.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    if options.card:
        write_card(options.card, choice.folder, numbers)
    return 0


def _as_dict(scores: Scores) -> dict[str, object]:
    return {**vars(scores), "horizons": [vars(h) for h in scores.horizons]}
