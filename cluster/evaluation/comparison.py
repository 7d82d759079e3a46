"""A model, its parent and the baselines: forecasts of the same windows, scored and compared."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cluster.bundles.training_record import overlap_warning
from cluster.candles.bars import SymbolBars
from cluster.evaluation import report
from cluster.evaluation.baselines import NO_FIT, Baseline, baselines
from cluster.evaluation.forecasting import ModelChoice, forecast_all
from cluster.evaluation.leakage import alarms, future_in_inputs, shuffled_labels
from cluster.evaluation.metrics import Scored, Table, Truth, overall_verdict
from cluster.evaluation.scores import Draws
from cluster.evaluation.walk_forward import WalkForward, Window, Windows, pick_windows
from cluster.ray_session import ray_session
from model.calibration import Calibration, load_calibration, usual_bar_seconds
from model.errors import InputError
from model.registry import load_checkpoint

PUBLISHED_CUTOFF = np.datetime64("2024-07-01")
"""The published weights were trained on bars up to June 2024."""
FEW_ORIGINS = 30


@dataclass
class Evaluation:
    """summary: what report.json holds. windows, truth, scored: forecast by forecast, in the same order."""

    summary: dict[str, Any]
    windows: list[Window]
    truth: Truth
    scored: dict[str, Scored]

    def signals(self) -> pd.DataFrame:
        """symbol, timestamps (the origin, at whose close it is known), signal: the model's predicted return."""
        return pd.DataFrame(
            {
                "symbol": [window.bars.symbol for window in self.windows],
                "timestamps": [window.origin for window in self.windows],
                "signal": self.scored["model"].predicted,
            }
        )


def evaluate(
    choice: ModelChoice,
    series: Sequence[SymbolBars],
    setting: WalkForward,
    *,
    parent: ModelChoice | None = None,
    season: int | None = None,
    extras: Sequence[str] = (),
    workers: int = 0,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Evaluation:
    """Forecasts every window and scores it beside the baselines (and the parent, with the same seeds).

    season: bars of the seasonal naive forecast; None: each symbol's usual day. extras: of evaluation.baselines.EXTRAS.
    on_progress: (what, done, total). Raises InputError for data and settings, CheckpointError for weights.
    """
    if season is not None and season < 1:
        raise InputError(f"season must be at least 1 bar, not {season}", code="bad_size")
    began = time.monotonic()
    picked = pick_windows(series, setting, season)
    windows = picked.chosen
    truth = _truth(windows, setting)
    said: list[str] = []
    placed: list[str] = []
    scored, misfits = _score_baselines(windows, truth, setting, extras, said)
    choices = {"model": choice} | ({"parent": parent} if parent is not None else {})
    models: dict[str, dict[str, Any]] = {}
    calibrations: dict[str, Calibration | None] = {}
    for name, one in choices.items():
        checkpoint = load_checkpoint(one.source)
        models[name] = {
            "name": one.source.id,
            "sha256": checkpoint.sha256,
            "revision": checkpoint.revision,
            "parameters": checkpoint.parameters,
            "version": checkpoint.model_version,
            "tokenizer_version": checkpoint.tokenizer_version,
        }
        calibrations[name] = None
        if name == "model":
            calibrations[name] = _calibration(load_calibration(one.folder, checkpoint.sha256), setting, said)
    # One cluster for all of them: starting one takes longer than many forecasts.
    with ray_session(os.environ.get("RAY_ADDRESS")) if workers else nullcontext():
        invalid = {
            name: _score_model(
                name,
                one,
                windows,
                truth,
                setting,
                scored,
                calibrations[name],
                workers=workers,
                on_progress=on_progress,
                warn=placed.append,
            )
            for name, one in choices.items()
        }
    table = Table(truth, seed=setting.seed)
    metrics = {name: table.metrics(one) for name, one in _ordered(scored).items()}
    for name, share in invalid.items():
        metrics[name]["invalid_candles"] = share
    comparisons = [
        table.compare(scored["model"], other, name)
        for name, other in _ordered(scored).items()
        if name not in ("model", "calibrated")
    ]
    inputs = future_in_inputs([_inside(bars, setting) for bars in series])
    shuffled = shuffled_labels(table, np.array(scored["model"].predicted), seed=setting.seed)
    said = [
        *_warnings(windows, picked, truth, table, setting, choice),
        *said,
        *dict.fromkeys(placed),
        *alarms(inputs, metrics["model"]["rank_ic"], shuffled),
    ]
    verdict = overall_verdict(comparisons)
    summary = {
        "schema": 1,
        "model": models["model"],
        "parent": models.get("parent"),
        "period": {
            "from": _text(setting.begins),
            "to": _text(setting.ends),
            "first_origin": _text(windows[0].origin),
            "last_origin": _text(windows[-1].origin),
        },
        "setting": {
            name: getattr(setting, name)
            for name in ("history", "horizon", "samples", "every", "seed", "temperature", "top_k", "top_p", "window")
        },
        "data": {
            "symbols": sorted({window.bars.symbol for window in windows}),
            "forecasts": len(windows),
            "origins": table.origins,
            "origins_that_overlap": truth.overlap,
            "left_out": picked.left_out,
            "not_fitted": misfits,
        },
        "warnings": said,
        "metrics": metrics,
        "comparisons": comparisons,
        "verdict": verdict,
        "verdict_line": report.verdict_line(verdict, comparisons),
        "leakage": {"inputs": inputs, "shuffled": shuffled},
        "calibration": _coverages(metrics) if "calibrated" in metrics else None,
        "workers": workers,
        "seconds": round(time.monotonic() - began, 1),
    }
    return Evaluation(summary, windows, truth, _ordered(scored))


def _truth(windows: Sequence[Window], setting: WalkForward) -> Truth:
    moves = [np.diff(window.known(setting)[:, 3].astype(np.float64)) for window in windows]
    origins = np.array([window.origin for window in windows])
    return Truth(
        actual=np.stack([window.actual(setting) for window in windows]),
        last=np.array([float(window.bars.candles[window.cut - 1, 3]) for window in windows]),
        unit=np.array([np.sqrt(np.mean(move**2)) for move in moves]),
        mase_scale=np.array([np.abs(move).mean() for move in moves]),
        origin=np.unique(origins, return_inverse=True)[1],
        symbol=np.array([window.bars.symbol for window in windows]),
        overlap=setting.overlap,
    )


def _score_baselines(
    windows: Sequence[Window], truth: Truth, setting: WalkForward, extras: Sequence[str], said: list[str]
) -> tuple[dict[str, Scored], dict[str, int]]:
    """The scores, and extra → number of forecasts that it could not be fitted to, which its scores are without.

    said: gets a warning for each season that does not fit into the history, and for each extra with a misfit.
    """
    by_season: dict[int, dict[str, Baseline]] = {}
    scored: dict[str, Scored] = {}
    misfits: dict[str, list[str]] = {}
    for number, window in enumerate(windows):
        season = window.season
        if season + 2 > setting.history:
            season = setting.history // 2
            text = (
                f"a season of {window.season} bars does not fit into {setting.history} bars of history: the seasonal "
                f"naive forecast repeats the last {season} bars"
            )
            if text not in said:
                said.append(text)
        known = window.known(setting)[:, 3].astype(np.float64)
        rng = np.random.default_rng([setting.seed, number])
        for name, baseline in by_season.setdefault(season, baselines(season, extras)).items():
            own = scored.setdefault(name, Scored())
            try:
                forecast = baseline(known, setting.horizon)
            except InputError as error:
                if error.code != NO_FIT:
                    raise
                # The others and the model can do without it: one odd history must not cost the whole run.
                misfits.setdefault(name, []).append(f"{window.bars.symbol} at {_text(window.origin)}: {error}")
            else:
                own.add(forecast, truth, number, rng)
    for name, faults in misfits.items():
        left = len(windows) - len(faults)
        said.append(
            f"{report.NAMES[name]} could not be fitted to {len(faults)} of {len(windows)} forecasts and is "
            + (f"compared on the other {left}" if left else "left out of comparisons and verdict")
            + f"; the first was {faults[0]}"
        )
    counts = {name: len(faults) for name, faults in misfits.items()}
    return {name: own for name, own in scored.items() if own.numbers}, counts


def _score_model(
    name: str,
    choice: ModelChoice,
    windows: Sequence[Window],
    truth: Truth,
    setting: WalkForward,
    scored: dict[str, Scored],
    calibration: Calibration | None,
    *,
    workers: int,
    on_progress: Callable[[str, int, int], None],
    warn: Callable[[str], None],
) -> float:
    """Adds `name`, and "calibrated" where the model has a calibration, to scored; the share of invalid candles."""
    own = scored.setdefault(name, Scored())
    invalid = []
    done = lambda count: on_progress(name, count, len(windows))  # noqa: E731
    for result in forecast_all(choice, windows, setting, workers=workers, on_done=done, warn=warn):
        invalid.append(result.invalid * len(result.closes))
        for number, closes in enumerate(result.closes, start=result.first):
            own.add(Draws(closes), truth, number, np.random.default_rng([setting.seed, number]))
            if calibration is not None:
                window = windows[number]
                entry = calibration.entry(window.bars.symbol, usual_bar_seconds(window.bars.times))
                adjusted = entry.closes(closes, unit=truth.unit[number], first=0)
                rng = np.random.default_rng([setting.seed, number])
                scored.setdefault("calibrated", Scored()).add(Draws(adjusted), truth, number, rng)
    return float(sum(invalid) / len(windows))


def _calibration(found: Calibration | None, setting: WalkForward, said: list[str]) -> Calibration | None:
    """The calibration, if it was fitted on forecasts that were drawn as these are. said: gets a warning if not."""
    if found is None or found.fits(setting.temperature, setting.top_k, setting.top_p):
        return found
    said.append(
        "the bundle's calibration was fitted on forecasts with other temperature, top_k or top_p: it is not evaluated"
    )
    return None


def _ordered(scored: dict[str, Scored]) -> dict[str, Scored]:
    """The model first, then what it came from, then the baselines."""
    first = [name for name in ("model", "calibrated", "parent") if name in scored]
    return {name: scored[name] for name in [*first, *(name for name in scored if name not in first)]}


def _inside(bars: SymbolBars, setting: WalkForward) -> SymbolBars:
    begin = 0 if setting.begins is None else int(np.searchsorted(bars.times, setting.begins))
    end = len(bars) if setting.ends is None else int(np.searchsorted(bars.times, setting.ends))
    begin = max(0, begin - setting.history)
    return SymbolBars(bars.symbol, bars.times[begin:end], bars.candles[begin:end], bars.marks[begin:end])


def _coverages(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        kind: {level: entry["value"] for level, entry in metrics[name]["coverage"].items()}
        for kind, name in (("raw_coverage", "model"), ("calibrated_coverage", "calibrated"))
    }


def _warnings(
    windows: Sequence[Window], picked: Windows, truth: Truth, table: Table, setting: WalkForward, choice: ModelChoice
) -> list[str]:
    said = []
    first = windows[0].bars.times[windows[0].cut]
    if first < PUBLISHED_CUTOFF:
        said.append(
            f"the test period starts at {_text(first)}, before 2024-07-01: the published Kronos weights, and what was "
            "finetuned from them, may have been trained on these bars; choose a later period for a fair test"
        )
    last = max(window.bars.times[window.cut + setting.horizon - 1] for window in windows)
    if (known := overlap_warning(choice.folder, first, last)) is not None:
        said.append(known)
    if table.origins < FEW_ORIGINS:
        said.append(
            f"there are {table.origins} origins only: tests and intervals over so few say little; take a longer period "
            "or forecast more often (--every)"
        )
    if (setting.temperature, setting.top_k, setting.top_p) != (1.0, 0, 1.0):
        said.append("sampling is narrowed (temperature, top_k, top_p): coverage and CRPS are too by construction")
    if picked.left_out:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in picked.left_out.items())
        said.append(f"forecasts left out: {reasons}")
    return said


def _text(time: np.datetime64 | None) -> str | None:
    return None if time is None else str(time.astype("datetime64[s]"))
