"""Which windows a series offers: none over a gap that is too large, none over bars that teach nothing.

The rules are those of the published model's training data (jumps, illiquid and stagnant stretches); the paper's
thresholds are not all public, so that these are this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.candles.bars import SymbolBars
from cluster.candles.data_config import BarFilter
from cluster.candles.gaps import find_gaps

CLOSE, VOLUME = 3, 4


@dataclass(frozen=True)
class WindowRules:
    """max_gap_bars: missing bars that a window may straddle; None: any number. filter: bars that it must not hold."""

    max_gap_bars: int | None = None
    filter: BarFilter | None = None

    def refused(self, bars: SymbolBars, starts: np.ndarray, length: int) -> dict[str, np.ndarray]:
        """Reason → bool [N]: which windows of `length` bars from these starts (int64 [N]) the rule leaves out."""
        found: dict[str, np.ndarray] = {}
        if self.max_gap_bars is not None:
            found["gap"] = _straddles(find_gaps(bars.times).missing > self.max_gap_bars, starts, length)
        if self.filter is None:
            return found
        if self.filter.jump is not None:
            found["jump"] = _straddles(jumps(bars.candles) > self.filter.jump, starts, length)
        if self.filter.illiquid_bars is not None:
            idle = long_runs(bars.candles[:, VOLUME] == 0, self.filter.illiquid_bars)
            found["illiquid"] = _holds(idle, starts, length)
        if self.filter.stagnant_bars is not None:
            found["stagnant"] = _holds(stagnant(bars.candles, self.filter.stagnant_bars), starts, length)
        return found


def _holds(bad: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Whether any of the bars start … start + length − 1 is bad."""
    total = np.concatenate([[0], np.cumsum(bad)])
    return total[starts + length] > total[starts]


def _straddles(bad: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """Whether any step between two bars of a window is bad; bad [T] is about the step to a bar from the one before."""
    return _holds(bad, starts + 1, length - 1)


def long_runs(flags: np.ndarray, at_least: int) -> np.ndarray:
    """bool [T]: the flags that stand in a row of at least so many."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    keep = np.zeros(len(flags), dtype=bool)
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        keep[begin:end] = end - begin >= at_least
    return keep


def stagnant(candles: np.ndarray, at_least: int) -> np.ndarray:
    """bool [T]: bars of candles [T, 6] in a run of at least so many with one close."""
    close = candles[:, CLOSE]
    same = np.concatenate([[False], close[1:] == close[:-1]])
    runs = long_runs(same, at_least - 1)
    return runs | np.concatenate([runs[1:] & ~same[:-1], [False]])


def jumps(candles: np.ndarray) -> np.ndarray:
    """float64 [T]: the larger of |log(open / close before)| and |log(close / close before)|; 0 for the first bar.

    Infinite where a price is not positive.
    """
    prices = candles.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        moves = np.abs(np.log(prices[1:][:, [0, CLOSE]]) - np.log(prices[:-1, CLOSE])[:, None])
    return np.concatenate([[0.0], np.nan_to_num(moves, nan=np.inf, posinf=np.inf).max(axis=1)])
