"""JSON numbers → float64 columns, after a strict type check; every refusal says which row.

The common case runs at C speed over whole columns; only a column with a fault is looked at value by value.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from model.types import COLUMNS
from serve_app.errors import MAX_FIELD_ERRORS, FieldError, value_errors

PRICES = COLUMNS[:4]
LARGEST = 1e17
"""The model works in float32, whose squares, summed over 2048 bars for the standard deviation, overflow beyond this."""
SMALLEST_PRICE = 1e-15
"""Below this, returns are beyond any meaning, and dividing by it leaves the range of numbers."""


def number_column(raw: Any, name: str) -> np.ndarray:
    """A list of numbers, or a float64 array, as float64 [T] that is valid as column `name`.

    Prices are positive, volume and amount not negative. Raises pydantic's ValidationError with field errors, whose loc
    is the row.
    """
    if isinstance(raw, np.ndarray):
        column, faults = _checked(raw, name)
    elif isinstance(raw, list):
        column, faults = _column(raw, name)
    else:
        raise value_errors([FieldError((), "not_a_list", "must be a list of numbers")])
    if faults:
        raise value_errors(faults)
    return column


def candle_columns(raw: Any) -> dict[str, np.ndarray]:
    """A JSON list of candle objects as columns, float64 [T] each; volume and amount are left out if no candle has them.

    Raises pydantic's ValidationError with field errors whose loc is (row, name).
    """
    if not isinstance(raw, list):
        raise value_errors([FieldError((), "not_a_list", "must be a list of candles")])
    if not raw:
        raise value_errors([FieldError((), "too_few", "must hold at least one candle")])
    if set(map(type, raw)) != {dict}:
        rows = [row for row, candle in enumerate(raw) if not isinstance(candle, dict)][: MAX_FIELD_ERRORS + 1]
        raise value_errors(FieldError((row,), "not_an_object", "must be a candle object") for row in rows)
    given = set().union(*raw)
    faults = _key_faults(raw) if not given.issubset(COLUMNS) else []
    columns: dict[str, np.ndarray] = {}
    for name in COLUMNS:
        if name in PRICES:
            missing = [row for row, candle in enumerate(raw) if name not in candle][: MAX_FIELD_ERRORS + 1]
            faults += [FieldError((row, name), "missing", "this field is required") for row in missing]
            if missing:
                continue
        elif name not in given:
            continue
        columns[name], bad = _column([candle.get(name, 0) for candle in raw], name)
        faults += [FieldError((*fault.loc, name), fault.code, fault.message) for fault in bad]
    if not faults:
        faults = [FieldError((*fault.loc, "high"), fault.code, fault.message) for fault in range_faults(columns)]
    if faults:
        raise value_errors(faults[: MAX_FIELD_ERRORS + 1])
    return columns


def range_faults(columns: dict[str, np.ndarray]) -> list[FieldError]:
    """Bars whose high is below their low; loc is the row."""
    rows = np.flatnonzero(columns["high"] < columns["low"])[: MAX_FIELD_ERRORS + 1].tolist()
    return [FieldError((row,), "high_below_low", "high is below low") for row in rows]


def candle_matrix(columns: dict[str, np.ndarray]) -> tuple[np.ndarray, list[FieldError]]:
    """float64 [T, 6] in the order of COLUMNS, and field errors (loc: name, row).

    No volume: volume is 0. No amount: volume × the mean of the four prices, as the model was trained.
    """
    volume = columns.get("volume", np.zeros(len(columns["close"])))
    amount = columns.get("amount")
    faults: list[FieldError] = []
    if amount is None:
        # Summed in the order of the columns, which rounds as the public implementation does.
        amount = volume * ((columns["open"] + columns["high"] + columns["low"] + columns["close"]) / 4)
        rows = np.flatnonzero(amount > LARGEST)[:MAX_FIELD_ERRORS].tolist()
        text = f"volume × price is over {LARGEST:g}: give the volume in larger units"
        faults = [FieldError(("volume", row), "out_of_range", text) for row in rows]
    return np.stack([*(columns[name] for name in PRICES), volume, amount], axis=1), faults


def _column(raw: list[Any], name: str) -> tuple[np.ndarray, list[FieldError]]:
    # bool is not float or int by type(), so it is caught here as well.
    if set(map(type, raw)) <= {float, int}:
        try:
            column = np.array(raw, dtype=np.float64)
        except OverflowError:
            return np.empty(0), _faults(raw, name)
        return _checked(column, name)
    return np.empty(0), _faults(raw, name)


def _checked(column: np.ndarray, name: str) -> tuple[np.ndarray, list[FieldError]]:
    lowest = SMALLEST_PRICE if name in PRICES else 0.0
    # NaN fails both comparisons.
    if ((column >= lowest) & (column <= LARGEST)).all():
        return column, []
    return np.empty(0), _faults(column.tolist(), name)


def _faults(raw: list[Any], name: str) -> list[FieldError]:
    faults: list[FieldError] = []
    for row, value in enumerate(raw):
        if fault := _fault(value, name):
            faults.append(FieldError((row,), *fault))
            if len(faults) > MAX_FIELD_ERRORS:
                break
    return faults


def _fault(value: Any, name: str) -> tuple[str, str] | None:
    """(code, message) of one value that may be refused."""
    if type(value) not in (float, int):
        return "not_a_number", "must be a number, not a string, boolean, null, list or object"
    if value != value or value in (float("inf"), float("-inf")):
        return "not_finite", "must be a finite number: fill the gap or drop the bar"
    if name in PRICES and value <= 0:
        return "not_positive", "a price must be above 0"
    if value < 0:
        return "negative", f"{name} must not be negative"
    if value > LARGEST:
        return "out_of_range", f"must be at most {LARGEST:g}: scale the column"
    if name in PRICES and value < SMALLEST_PRICE:
        return "out_of_range", f"a price must be at least {SMALLEST_PRICE:g}: scale the prices"
    return None


def _key_faults(raw: list[dict[str, Any]]) -> list[FieldError]:
    faults: list[FieldError] = []
    for row, candle in enumerate(raw):
        unknown = sorted(candle.keys() - set(COLUMNS))
        faults += [
            FieldError((row, key), "unknown_field", f"unknown field; a candle has {', '.join(COLUMNS)}")
            for key in unknown[:MAX_FIELD_ERRORS]
        ]
        if len(faults) > MAX_FIELD_ERRORS:
            break
    return faults
