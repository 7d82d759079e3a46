"""Fits the calibration of a bundle on validation bars and saves it as calibration.json in it.

    python -m cluster.calibration fit --model BUNDLE --data 'bars/*.parquet' --from 2024-07-01 --to 2024-08-01

One entry per symbol and bar size with enough forecasts, one per bar size, and a pooled one. model.calibration says what
the entries mean and applies them; the server does so for requests with `"calibrate": true`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.bundles.training_record import training_period
from cluster.candles.bars import read_bars
from cluster.evaluation.forecasting import ModelChoice, forecast_all
from cluster.evaluation.scores import INTERVALS, covered
from cluster.evaluation.walk_forward import WalkForward, Window, pick_windows
from cluster.evaluation.walk_forward_options import add_walk_forward_arguments, print_progress, walk_forward_of
from cluster.files import require_writable_file
from model.calibration import (
    CALIBRATION_FILE,
    METHODS,
    VERSION,
    Calibration,
    group_bounds,
    parse_calibration,
    typical_move,
    usual_bar_seconds,
)
from model.errors import InputError, KronosError
from model.registry import BUNDLED_FOLDER, MANIFEST_FILE, load_checkpoint

logger = logging.getLogger(__name__)

LEVELS = tuple(round(0.05 * i, 2) for i in range(1, 20))
"""Quantiles whose errors the conformal method measures."""
NOMINAL = 0.8
"""Interval whose coverage the scale method sets."""
FEWEST = 20
"""Forecasts without which nothing is fitted."""
FEWEST_OWN = 40
"""Forecasts from which on a symbol gets an entry of its own."""


def fit(
    choice: ModelChoice, windows: Sequence[Window], setting: WalkForward, method: str, *, workers: int = 0
) -> dict[str, Any]:
    """The contents of calibration.json. Raises InputError for too few windows or a method that is not one."""
    if method not in METHODS:
        raise InputError(f"method {method!r} is not known: choose from {', '.join(METHODS)}", code="unknown_method")
    if len(windows) < FEWEST:
        raise InputError(
            f"{len(windows)} forecasts are too few to calibrate on, {FEWEST} are needed: take a longer period or "
            "forecast more often (--every)",
            code="too_few_forecasts",
        )
    checkpoint = load_checkpoint(choice.source)
    parts = forecast_all(
        choice,
        windows,
        setting,
        workers=workers,
        on_done=lambda done: print_progress("model", done, len(windows)),
    )
    closes = np.concatenate([part.closes for part in parts])
    actual = np.stack([window.actual(setting) for window in windows])
    units = np.array([typical_move(window.known(setting)[:, 3]) for window in windows])
    keys = [(window.bars.symbol, usual_bar_seconds(window.bars.times)) for window in windows]
    entries = []
    for key in [
        (None, None),
        *((None, size) for size in sorted({size for _, size in keys if size})),
        *sorted(set(keys)),
    ]:
        rows = np.array([i for i, own in enumerate(keys) if key[1] in (None, own[1]) and key[0] in (None, own[0])])
        if key[0] is None or len(rows) >= FEWEST_OWN:
            entries.append(_entry(key, closes[rows], actual[rows], units[rows], method))
    return {
        "version": VERSION,
        "method": method,
        "model_sha256": checkpoint.sha256,
        "fitted_on": {
            "from": str(windows[0].bars.times[windows[0].cut].astype("datetime64[s]")),
            "to": str(max(w.bars.times[w.cut + setting.horizon - 1] for w in windows).astype("datetime64[s]")),
            "symbols": sorted({window.bars.symbol for window in windows}),
            "forecasts": len(windows),
            "history": setting.history,
            "horizon": setting.horizon,
            "samples": setting.samples,
            "every": setting.every,
            "seed": setting.seed,
            "sampling": {"temperature": setting.temperature, "top_k": setting.top_k, "top_p": setting.top_p},
        },
        "entries": entries,
    }


def _entry(
    key: tuple[str | None, int | None], closes: np.ndarray, actual: np.ndarray, units: np.ndarray, method: str
) -> dict[str, Any]:
    """closes [N, S, H], actual [N, H], units [N], in time order."""
    bounds = group_bounds(actual.shape[1])
    numbers = _numbers(closes, actual, units, bounds, method)
    entry = {
        "symbol": key[0],
        "bar_seconds": key[1],
        "n": len(closes),
        "first_bars": bounds,
        **numbers,
        "raw_coverage": _coverage(closes, actual),
    }
    # Each half is judged by a fit on the other one: what was fitted would praise itself.
    middle = len(closes) // 2
    halves = (slice(None, middle), slice(middle, None))
    adjusted = np.empty_like(closes)
    for own, other in (halves, halves[::-1]):
        fitted = {**entry, **_numbers(closes[other], actual[other], units[other], bounds, method)}
        judged = _parsed({**fitted, "symbol": None, "bar_seconds": None, "calibrated_coverage": {}}, method)
        adjusted[own] = [
            judged.entries[0].closes(c, unit=u, first=0) for c, u in zip(closes[own], units[own], strict=True)
        ]
    return {**entry, "calibrated_coverage": _coverage(adjusted, actual)}


def _parsed(entry: dict[str, Any], method: str) -> Calibration:
    fitted_on = {"from": "", "to": "", "horizon": 1, "sampling": {"temperature": 1.0, "top_k": 0, "top_p": 1.0}}
    head = {"version": VERSION, "method": method, "model_sha256": "", "fitted_on": fitted_on}
    return parse_calibration({**head, "entries": [entry]})


def _numbers(
    closes: np.ndarray, actual: np.ndarray, units: np.ndarray, bounds: Sequence[int], method: str
) -> dict[str, Any]:
    """The fitted numbers of every group of bars ahead."""
    groups = [
        slice(first - 1, after - 1) for first, after in zip(bounds, [*bounds[1:], actual.shape[1] + 1], strict=True)
    ]
    if method == "scale":
        return {"factors": [_factor(closes[:, :, group], actual[:, group]) for group in groups]}
    return {
        "levels": list(LEVELS),
        "shifts": [_shifts(closes[:, :, group], actual[:, group], units) for group in groups],
    }


def _factor(closes: np.ndarray, actual: np.ndarray) -> float:
    """What the 80 % interval has to be stretched by, each side from the median, to cover 80 % (split conformal)."""
    tail = (1 - NOMINAL) / 2
    low, middle, high = np.quantile(closes, [tail, 0.5, 1 - tail], axis=1, method="weibull")
    half = np.where(actual >= middle, high - middle, middle - low)
    distance = np.abs(actual - middle)
    known = half > 0
    if not known.any():
        raise InputError("all sampled paths are alike: there is no spread to scale", code="no_spread")
    ratios = np.sort((distance[known] / half[known]).ravel())
    factor = float(ratios[min(math.ceil((len(ratios) + 1) * NOMINAL), len(ratios)) - 1])
    if not factor > 0:
        raise InputError("the forecast medians hit every price: there is nothing to scale", code="no_spread")
    return factor


def _shifts(closes: np.ndarray, actual: np.ndarray, units: np.ndarray) -> list[float]:
    """Per level the order statistic of the quantile's errors that split conformal prediction asks for; outer sides."""
    quantiles = np.quantile(closes, LEVELS, axis=1, method="weibull")  # [L, N, h]
    errors = np.sort(((actual - quantiles) / units[:, None]).reshape(len(LEVELS), -1), axis=1)
    n = errors.shape[1]
    picked = []
    for level, own in zip(LEVELS, errors, strict=True):
        place = math.ceil((n + 1) * level) if level >= 0.5 else math.floor((n + 1) * level)
        picked.append(float(own[min(max(place, 1), n) - 1]))
    return picked


def _coverage(closes: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    ordered = np.moveaxis(closes, 1, 0)
    return {f"{level}": float(covered(ordered, actual, level).mean()) for level in INTERVALS}


def save(path: Path, fitted: dict[str, Any]) -> None:
    """Writes calibration.json in one go, and its line in the folder's SHA256SUMS, if there is one."""
    parse_calibration(fitted)
    text = json.dumps(fitted, indent=2, allow_nan=False) + "\n"
    _replace(path, text)
    manifest = path.parent / MANIFEST_FILE
    if manifest.is_file():
        lines = [line for line in manifest.read_text(encoding="utf-8").splitlines() if line[66:] != path.name]
        lines.append(f"{hashlib.sha256(text.encode()).hexdigest()}  {path.name}")
        _replace(manifest, "\n".join(lines) + "\n")


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def validation_setting(folder: Path, setting: WalkForward) -> WalkForward:
    """setting, with the validation period of the bundle's training.json where it names none.

    Raises InputError for a period that reaches into training or test bars: a calibration is fitted on validation only.
    """
    period = training_period(folder)
    if period is None or period.train_ends is None:
        logger.warning(
            "%s does not say which bars it was trained on: make sure that the period holds none", folder.name
        )
        return setting
    _refuse_the_other_periods(setting, period.train_ends, period.test_from)
    setting = replace(
        setting,
        begins=period.train_ends if setting.begins is None else setting.begins,
        ends=period.test_from if setting.ends is None else setting.ends,
    )
    if setting.begins is not None and setting.begins < period.train_ends:
        raise InputError(
            f"the period begins at {setting.begins}, but the model was trained on bars up to {period.train_ends}: give "
            f"--from {period.train_ends} or later",
            code="trained_on",
        )
    if period.test_from is not None and (setting.ends is None or setting.ends > period.test_from):
        raise InputError(
            f"the period ends at {setting.ends}, inside the test period that begins at {period.test_from}: give --to "
            f"{period.test_from} or earlier, so that the test stays untouched",
            code="test_period",
        )
    return setting


def _refuse_the_other_periods(setting: WalkForward, train_ends: np.datetime64, test_from: np.datetime64 | None) -> None:
    """For a --from or --to that leaves nothing of the validation period [train_ends, test_from).

    Without this the other end, which the user may not have given, would be blamed for an empty period.
    Raises InputError.
    """
    if test_from is not None and setting.begins is not None and setting.begins >= test_from:
        raise InputError(
            f"--from {setting.begins} lies in or after the test period, which begins at {test_from}: give an earlier "
            f"--from, from {train_ends} on and before {test_from}, so that the test stays untouched",
            code="test_period",
        )
    if setting.ends is not None and setting.ends <= train_ends:
        raise InputError(
            f"--to {setting.ends} lies in the training period, which ends at {train_ends}: give a later --to",
            code="trained_on",
        )


def _file_in_bundle(choice: ModelChoice) -> Path:
    """Where the calibration goes unless --out says it. Raises InputError where there is no bundle of the user's."""
    if not choice.folder.is_dir():
        raise InputError(f"{choice.model} is no folder on this machine: name the file with --out", code="no_folder")
    if choice.folder.samefile(BUNDLED_FOLDER):
        # Whoever installed the package shares it, and an upgrade would take the file away.
        raise InputError(
            f"the bundled checkpoint is part of the installed package, where no {CALIBRATION_FILE} is written: name a "
            "bundle with --model (a copy of the folder is one), or the file with --out",
            code="bundled_model",
        )
    return choice.folder / CALIBRATION_FILE


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster.calibration", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    fitting = commands.add_parser("fit", help="fit on held-out bars and write calibration.json into the bundle")
    add_walk_forward_arguments(fitting)
    fitting.add_argument("--method", choices=METHODS, default="conformal", help="see model/calibration.py")
    fitting.add_argument("--out", type=Path, help=f"file to write; default: {CALIBRATION_FILE} in the bundle")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        if options.data is None:
            raise InputError("--data is missing: name the files to forecast", code="missing_option")
        choice = ModelChoice(options.model, options.tokenizer, options.device, options.threads)
        path = options.out or _file_in_bundle(choice)
        require_writable_file(path, "--out")
        setting = validation_setting(choice.folder, walk_forward_of(options))
        series = read_bars(options.data, time_column=options.time_column, symbol_column=options.symbol_column)
        windows = pick_windows(series, setting).chosen
        fitted = fit(choice, windows, setting, options.method, workers=options.workers)
        save(path, fitted)
    except (KronosError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for entry in fitted["entries"]:
        raw, calibrated = (
            " ".join(f"{float(level):.0%} {share:.3f}" for level, share in entry[name].items())
            for name in ("raw_coverage", "calibrated_coverage")
        )
        name = entry["symbol"] or ("pooled" if entry["bar_seconds"] is None else "all symbols")
        size = "" if entry["bar_seconds"] is None else f", bars of {entry['bar_seconds']} s"
        print(f"{name}{size}: {entry['n']} forecasts, raw coverage {raw}, calibrated (out of fold) {calibrated}")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
