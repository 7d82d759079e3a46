"""Alarms: what looks more like the future in the inputs than like skill. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.candles.bars import SymbolBars
from cluster.evaluation.metrics import Table
from cluster.evaluation.significance import rank_correlation, ranks
from model.types import COLUMNS

CLOSE = 3
PRICE_ALARM = 0.8
"""|rank IC| of a price's own move with a later move: beyond any market, but a periodic series can reach it."""
QUANTITY_ALARM = 0.5
"""The same for volume and amount, which hardly know a direction."""
MODEL_ALARM = 0.5
"""|rank IC| of forecasts: published models report 0.03."""
CHANCE = 6.0
"""Standard errors that chance does not reach, over all the columns, leads and symbols that are looked at."""
FEWEST = 60
"""Pairs below which nothing is said."""
LONGEST_LEAD = 16


def future_in_inputs(series: Sequence[SymbolBars]) -> list[dict[str, Any]]:
    """Columns that foretell a later return of the close: [{symbol, column, form, lead, rank_ic, n}], worst per column.

    form: "level" (volume and amount only) or "change" of the column at bar t, against the return of bar t + lead.
    """
    found: list[dict[str, Any]] = []
    for bars in series:
        close = bars.candles[:, CLOSE].astype(np.float64)
        if len(close) < FEWEST + 2 or (close <= 0).any():
            continue
        returns = np.diff(np.log(close))
        for position, column in enumerate(COLUMNS):
            values = bars.candles[:, position].astype(np.float64)
            forms = {"change": np.diff(values)} | ({"level": values[1:]} if position > CLOSE else {})
            worst: dict[str, Any] | None = None
            for form, known in forms.items():
                for lead in range(1, min(LONGEST_LEAD, len(returns) - FEWEST) + 1):
                    coefficient = rank_correlation(known[:-lead], returns[lead:])
                    if np.isfinite(coefficient) and (worst is None or abs(coefficient) > abs(worst["rank_ic"])):
                        worst = {"form": form, "lead": lead, "rank_ic": coefficient, "n": len(returns) - lead}
            limit = max(PRICE_ALARM if position <= CLOSE else QUANTITY_ALARM, CHANCE / np.sqrt(len(returns)))
            if worst is not None and abs(worst["rank_ic"]) > limit:
                found.append({"symbol": bars.symbol, "column": column, **worst})
    return found


def shuffled_labels(table: Table, predicted: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """The rank IC of forecasts [N] with returns that were dealt out anew: it must be within 3/√n of 0.

    That it is not would mean that the evaluation itself gives skill away.
    """
    returns = np.random.default_rng([seed, 9]).permutation(table.truth.returns)
    kind, terms = table.coefficient_series(predicted, returns, ranks)
    bound = 3 / np.sqrt(len(predicted))
    value = float(terms.mean()) if len(terms) else None
    return {
        "rank_ic": value,
        "bound": float(bound),
        "n": len(predicted),
        "kind": kind,
        "passed": value is None or abs(value) < float(bound),
    }


def alarms(inputs: Sequence[dict[str, Any]], rank_ic: dict[str, Any] | None, shuffled: dict[str, Any]) -> list[str]:
    """Sentences for the report, one per alarm."""
    said = [
        f"leak alarm: in {found['symbol']!r}, the {found['form']} of {found['column']} foretells the return "
        f"{found['lead']} bars later (rank IC {found['rank_ic']:+.2f} over {found['n']} bars): unless the series is "
        "periodic by nature, the column holds the future; check how the data was made"
        for found in inputs
    ]
    certain = rank_ic is not None and abs(rank_ic["mean"]) > MODEL_ALARM and abs(rank_ic["t"] or 0) > 3
    if rank_ic is not None and certain:
        said.append(
            f"leak alarm: the model's rank IC is {rank_ic['mean']:+.2f} (published models: about 0.03): believe it "
            "only if the series is predictable by nature; else look for the future in its inputs or its training data"
        )
    if not shuffled["passed"]:
        said.append(
            f"leak alarm: with shuffled returns the rank IC is {shuffled['rank_ic']:+.3f}, beyond "
            f"±{shuffled['bound']:.3f}"
        )
    return said
