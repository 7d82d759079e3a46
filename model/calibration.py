"""Calibrated spreads of sampled closes: calibration.json of a bundle, read strictly and applied. numpy only.

Fitted by `python -m cluster.calibration fit`. Two methods, both on the samples of one bar at a time:

- scale: distances from the median are multiplied by one factor.
- conformal: the sample at level p is moved by the shift of that level, in units of the history's root mean square
  one-bar move; shifts were the forecast quantiles' own errors on held-out bars (split conformal prediction).

Both keep the order of the paths at a bar, so that quantiles, probabilities and summaries of the moved paths agree with
each other. A candle's four prices move by what its close moves by; volume and amount stay.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from model.errors import CheckpointMismatchError, InputError
from model.types import AppliedCalibration

CALIBRATION_FILE = "calibration.json"
VERSION = 1
METHODS = ("scale", "conformal")
CLOSE = 3


@dataclass(frozen=True)
class Entry:
    """What was fitted for one symbol and bar size, or for several together.

    symbol, bar_seconds: None where they do not matter. n: forecasts it was fitted on.
    first_bars: [B], rising from 1: group b holds for bars ahead from first_bars[b] to before first_bars[b + 1].
    factors: [B] for scale. levels [L] and shifts [B, L] for conformal.
    raw_coverage, calibrated_coverage: nominal level → measured share, the latter out of fold.
    """

    method: str
    symbol: str | None
    bar_seconds: int | None
    n: int
    first_bars: np.ndarray
    factors: np.ndarray | None
    levels: np.ndarray | None
    shifts: np.ndarray | None
    raw_coverage: dict[str, float]
    calibrated_coverage: dict[str, float]

    @property
    def name(self) -> str:
        """symbol | bar_size | pooled: what the entry was chosen by."""
        if self.symbol is not None:
            return "symbol"
        return "pooled" if self.bar_seconds is None else "bar_size"

    def closes(self, closes: np.ndarray, *, unit: float, first: int) -> np.ndarray:
        """Closes [S, n] of the bars first, first + 1, … (from 0) of a forecast, calibrated.

        unit: the history's root mean square one-bar move.
        """
        group = np.searchsorted(self.first_bars, np.arange(first, first + closes.shape[1]) + 1, side="right") - 1
        if self.factors is not None:
            middle = np.median(closes, axis=0)
            return middle + self.factors[group] * (closes - middle)
        order = np.argsort(closes, axis=0, kind="stable")
        ordered = np.take_along_axis(closes, order, axis=0)
        own = np.arange(1, len(closes) + 1) / (len(closes) + 1)
        levels = np.asarray(self.levels)
        shifts = np.stack([np.interp(own, levels, row) for row in np.asarray(self.shifts)], axis=1)  # [S, B]
        # Shifts that cross would change the order of the paths.
        moved = np.maximum.accumulate(ordered + unit * shifts[:, group], axis=0)
        calibrated = np.empty_like(moved)
        np.put_along_axis(calibrated, order, moved, axis=0)
        return calibrated

    def candles(self, values: np.ndarray, *, unit: float, first: int = 0) -> np.ndarray:
        """Paths [S, n, 6] of the bars first, first + 1, …, in the order of model.types.COLUMNS, calibrated."""
        moved = self.closes(values[:, :, CLOSE], unit=unit, first=first) - values[:, :, CLOSE]
        calibrated = values.copy()
        calibrated[:, :, : CLOSE + 1] += moved[:, :, None]
        return calibrated


@dataclass(frozen=True)
class Calibration:
    """All entries of a bundle. fitted_on: the period, data and setting, as they stand in the file.

    digest: sha256 of the file: two that are equal move paths alike.
    """

    method: str
    model_sha256: str
    fitted_on: dict[str, Any]
    entries: tuple[Entry, ...]
    digest: str = ""

    def entry(self, symbol: str | None, bar_seconds: int | None) -> Entry:
        """The entry of the symbol and its bar size; else the bar size's; else the pooled one, which is always there."""
        by_key = {(entry.symbol, entry.bar_seconds): entry for entry in self.entries}
        keys = ((symbol, bar_seconds), (None, bar_seconds), (None, None))
        return next(by_key[key] for key in keys if key in by_key)

    def applied(self, entry: Entry) -> AppliedCalibration:
        """What an answer says about it."""
        fitted = self.fitted_on
        return AppliedCalibration(
            method=self.method,
            entry=entry.name,
            symbol=entry.symbol,
            forecasts=entry.n,
            fitted_from=fitted["from"],
            fitted_to=fitted["to"],
            fitted_horizon=fitted["horizon"],
            raw_coverage=entry.raw_coverage,
            calibrated_coverage=entry.calibrated_coverage,
        )

    def fits(self, temperature: float, top_k: int, top_p: float) -> bool:
        """Whether forecasts drawn like this are what was fitted: narrower ones have other errors."""
        asked = {"temperature": temperature, "top_k": top_k, "top_p": 1.0 if top_k > 0 else top_p}
        return all(self.fitted_on["sampling"][name] == value for name, value in asked.items())


def typical_move(closes: np.ndarray) -> float:
    """The unit of shifts: root mean square one-bar move of a history of closes [T]; 0 for one bar."""
    moves = np.diff(np.asarray(closes, dtype=np.float64))
    return float(np.sqrt(np.mean(moves**2))) if len(moves) else 0.0


def usual_bar_seconds(times: np.ndarray) -> int | None:
    """The usual distance of neighbouring bars of times datetime64 [T]: the median. None for fewer than 2."""
    if len(times) < 2:
        return None
    return int(np.median(np.diff(times.astype("datetime64[s]").astype(np.int64))))


def load_calibration(folder: Path, sha256: str) -> Calibration | None:
    """The calibration of a bundle's folder, None if it has none.

    sha256: of the weights that it is loaded for. Raises CheckpointMismatchError for a file that is not a calibration of
    this version, or one of other weights.
    """
    path = Path(folder) / CALIBRATION_FILE
    if not path.is_file():
        return None
    try:
        content = path.read_bytes()
        calibration = parse_calibration(json.loads(content, parse_constant=_refuse))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointMismatchError(
            f"{CALIBRATION_FILE} is not a calibration of version {VERSION}: {error}; fit it again with "
            "python -m cluster.calibration fit, or remove it"
        ) from None
    if calibration.model_sha256 != sha256:
        raise CheckpointMismatchError(
            f"{CALIBRATION_FILE} was fitted for other weights (these are {sha256[:12]}): fit it again "
            "with python -m cluster.calibration fit, or remove it"
        )
    return replace(calibration, digest=hashlib.sha256(content).hexdigest())


def _refuse(text: str) -> float:
    raise InputError(f"{text} is no number", code="not_finite")


def parse_calibration(raw: Any) -> Calibration:
    """A calibration from its JSON. Raises InputError, KeyError or TypeError for what is not one."""
    _require(isinstance(raw, dict), "it is not an object")
    _require(raw["version"] == VERSION, f"version {raw['version']!r}")
    _require(raw["method"] in METHODS, f"method {raw['method']!r}")
    _require_keys(raw, {"version", "method", "model_sha256", "fitted_on", "entries"})
    fitted = raw["fitted_on"]
    _require(isinstance(fitted["from"], str) and isinstance(fitted["to"], str), "fitted_on.from and .to must be texts")
    _require(isinstance(fitted["horizon"], int) and fitted["horizon"] > 0, "fitted_on.horizon must be positive")
    _require({"temperature", "top_k", "top_p"} <= set(fitted["sampling"]), "fitted_on.sampling is incomplete")
    entries = tuple(_parse_entry(entry, raw["method"]) for entry in raw["entries"])
    keys = [(entry.symbol, entry.bar_seconds) for entry in entries]
    _require(len(set(keys)) == len(keys), "two entries are for the same symbol and bar size")
    _require((None, None) in keys, "there is no pooled entry")
    return Calibration(raw["method"], str(raw["model_sha256"]), raw["fitted_on"], entries)


def _parse_entry(raw: dict[str, Any], method: str) -> Entry:
    own = {"factors"} if method == "scale" else {"levels", "shifts"}
    _require_keys(raw, {"symbol", "bar_seconds", "n", "first_bars", "raw_coverage", "calibrated_coverage"} | own)
    first_bars = _numbers(raw["first_bars"], 1)
    _require(first_bars[0] == 1 and (np.diff(first_bars) > 0).all(), "first_bars must rise from 1")
    factors = _numbers(raw["factors"], 1) if method == "scale" else None
    levels = _numbers(raw["levels"], 1) if method == "conformal" else None
    shifts = _numbers(raw["shifts"], 2) if method == "conformal" else None
    if factors is not None:
        _require(len(factors) == len(first_bars) and (factors > 0).all(), "factors must be positive, one per group")
    if levels is not None and shifts is not None:
        _require((np.diff(levels) > 0).all() and levels[0] > 0 and levels[-1] < 1, "levels must rise inside 0 and 1")
        _require(
            shifts.shape == (len(first_bars), len(levels)), "shifts must be one row per group, one number per level"
        )
    symbol, seconds = raw["symbol"], raw["bar_seconds"]
    _require(symbol is None or isinstance(symbol, str), "symbol must be a name or null")
    _require(seconds is None or (isinstance(seconds, int) and seconds > 0), "bar_seconds must be positive or null")
    _require(symbol is None or seconds is not None, "an entry of a symbol needs its bar size")
    _require(isinstance(raw["n"], int) and raw["n"] > 0, "n must be positive")
    coverages = [
        {str(level): float(share) for level, share in raw[name].items()}
        for name in ("raw_coverage", "calibrated_coverage")
    ]
    _require(all(0 <= share <= 1 for coverage in coverages for share in coverage.values()), "coverage must be a share")
    return Entry(method, symbol, seconds, raw["n"], first_bars, factors, levels, shifts, coverages[0], coverages[1])


def _numbers(raw: Any, dimensions: int) -> np.ndarray:
    values = np.array(raw, dtype=np.float64)
    _require(
        values.ndim == dimensions and values.size > 0 and np.isfinite(values).all(), "a list of finite numbers is not"
    )
    return values


def _require_keys(raw: dict[str, Any], keys: set[str]) -> None:
    _require(set(raw) == keys, f"its keys are {sorted(raw)}, not {sorted(keys)}")


def _require(holds: bool | np.bool_, otherwise: str) -> None:
    if not holds:
        raise InputError(otherwise, code="bad_calibration")


def sampling_text(calibration: Calibration) -> str:
    """How forecasts have to be drawn for it, for messages."""
    sampling = calibration.fitted_on["sampling"]
    return f"temperature {sampling['temperature']:g}, top_k {sampling['top_k']} and top_p {sampling['top_p']:g}"


def group_bounds(horizon: int) -> list[int]:
    """First bars ahead of the groups that share a fit: 1, 2, 4, 8, … up to the horizon."""
    return [2**power for power in range(math.floor(math.log2(horizon)) + 1)]
