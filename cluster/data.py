"""Windows of bars for training and scoring: split by calendar time, scaled with what a forecaster would have known.

How a window is made, and why:
- Statistics come from its first bars only, the context, whose length is drawn per window and epoch; the bars after it
  are scaled with the same numbers, as a forecast's are. Positions inside the context are not scored by the predictor:
  they helped to make the mean and std they are scaled with, so that the future can be guessed from them (a series with
  mean 0 comes back to 0), which no forecast ever can.
- Every draw is a function of (seed, epoch, window). Which worker, process or restart asks changes nothing.

    python -m cluster.data check bars/*.parquet --window 512 --validation-share 0.15 --test-share 0.15
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from cluster.candles.bars import SymbolBars
from cluster.candles.data_config import BarFilter, DataConfig, SimulatedSource, TimeSplit
from cluster.candles.filters import WindowRules
from cluster.candles.simulate import simulate
from cluster.candles.sources import read_source
from model.errors import InputError
from model.frames import normalise

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class SplitBars:
    """The bars a split's windows may read, and where its own bars begin and end.

    begins, ends: datetime64[ns] or None (open); a window is the split's if its last bar is in [begins, ends).
    Bars before begins, and the embargo_bars bars of a symbol after it, may be read as context and are never scored.
    reach_back: whether windows may begin before begins at all. rules: which windows are left out.
    """

    name: str
    series: list[SymbolBars]
    begins: np.datetime64 | None = None
    ends: np.datetime64 | None = None
    embargo_bars: int = 0
    reach_back: bool = True
    rules: WindowRules = field(default_factory=WindowRules)

    def first_scored(self, bars: SymbolBars) -> int:
        """Row of the first bar of a series that this split may score; len(bars) or more if it has none."""
        if self.begins is None:
            return 0
        return int(np.searchsorted(bars.times, np.asarray(self.begins))) + self.embargo_bars


def load_splits(config: DataConfig) -> dict[str, SplitBars]:
    """The splits of a configured source: train and validation, and test where the source has one.

    Real bars are split by calendar time, at the same moment for all symbols. Simulated series, whose calendars have
    nothing in common, are split by series: validation has its own seed. Raises InputError.
    """
    source = config.source
    if isinstance(source, SimulatedSource):
        settings = {
            "train": (source.seed, source.series),
            "validation": (source.validation_seed, source.validation_series),
        }
        splits = {
            name: SplitBars(name, simulate(seed, count, source.bars, bar_minutes=source.bar_minutes))
            for name, (seed, count) in settings.items()
        }
    else:
        series = read_source(source)
        splits = split_by_time(
            series, boundaries(source, series), embargo_bars=source.embargo_bars, reach_back=source.reach_back
        )
    return {
        name: replace(split, rules=window_rules(config.max_gap_bars, config.filter, name))
        for name, split in splits.items()
    }


def window_rules(max_gap_bars: int | None, bar_filter: BarFilter | None, split: str) -> WindowRules:
    """The rules of one split."""
    # Only training may choose by what happens in a window: a score without the windows that went wild would flatter.
    return WindowRules(max_gap_bars, bar_filter if split == "train" else None)


def boundaries(split: TimeSplit, series: Sequence[SymbolBars]) -> list[np.datetime64]:
    """The one or two moments that a source is cut at. Shares count the distinct bar times of all symbols together."""
    if split.validation_share is None:
        return split.moments()
    times = np.unique(np.concatenate([bars.times for bars in series]))
    last = [split.test_share] if split.test_share is not None else []
    counts = [round(len(times) * share) for share in (sum(last) + split.validation_share, *last)]
    if 0 in counts or counts[0] >= len(times) or len(set(counts)) < len(counts):
        raise InputError(
            f"{len(times)} bar times cannot be split into shares of {split.validation_share:g} for validation"
            + (f" and {split.test_share:g} for test" if last else "")
            + ": give more bars or larger shares",
            code="too_short",
        )
    return [times[len(times) - count] for count in counts]


def describe_splits(config: DataConfig) -> dict[str, str | None]:
    """{"validation_from", "test_from"} as ISO times, also where they are configured as shares; {} for simulated series.

    Where nothing is kept for a test, also "last_bar": up to it the checkpoint was chosen. For a run's record: whoever
    scores the model later must know what it was trained on. Raises InputError.
    """
    if isinstance(config.source, SimulatedSource):
        return {}
    moments, series = config.source.moments(), None
    if len(moments) < 2:
        series = read_source(config.source)
        moments = moments or boundaries(config.source, series)
    return {"test_from": None} | split_moments(moments, series or ())


def split_moments(moments: Sequence[np.datetime64], series: Sequence[SymbolBars]) -> dict[str, str]:
    """{"validation_from", and "test_from" or else "last_bar" of all symbols} as ISO times; {} without moments.

    moments: where validation and, if there is one, the test period begin. series: read where there is none.
    """
    found = {
        name: str(moment.astype("datetime64[s]"))
        for name, moment in zip(("validation_from", "test_from"), moments, strict=False)
    }
    if len(moments) == 1:
        found["last_bar"] = str(max(bars.times[-1] for bars in series).astype("datetime64[s]"))
    return found


def split_by_time(
    series: Sequence[SymbolBars],
    boundaries: Sequence[np.datetime64],
    *,
    embargo_bars: int = 0,
    reach_back: bool = True,
) -> dict[str, SplitBars]:
    """train, validation (and test) of the same symbols, cut at one or two moments. Later splits may look back."""
    if not 1 <= len(boundaries) <= 2 or any(a >= b for a, b in pairwise(boundaries)):
        raise InputError(
            f"split boundaries {[str(b) for b in boundaries]} must be one or two times in rising order",
            code="bad_split",
        )
    begins = [None, *boundaries]
    ends = [*boundaries, None]
    return {
        name: SplitBars(name, [_before(bars, end) for bars in series], begin, end, embargo_bars, reach_back)
        for name, begin, end in zip(SPLITS, begins, ends, strict=False)
    }


def _before(bars: SymbolBars, end: np.datetime64 | None) -> SymbolBars:
    if end is None:
        return bars
    keep = int(np.searchsorted(bars.times, np.asarray(end)))
    return replace(bars, times=bars.times[:keep], candles=bars.candles[:keep], marks=bars.marks[:keep])


@dataclass(frozen=True)
class Batch:
    """B windows of L bars.

    x: float32 [B, L, 6], scaled and clipped. marks: int64 [B, L, 5]. context: int64 [B], bars the statistics come from.
    scored: bool [B, L], positions whose bar counts as a target: after the context, and in the split.
    """

    x: np.ndarray
    marks: np.ndarray
    context: np.ndarray
    scored: np.ndarray


class WindowSet:
    """All windows of `length` bars of one split, `stride` bars apart, counted from the end of each series."""

    def __init__(
        self,
        split: SplitBars,
        length: int,
        *,
        stride: int = 1,
        clip: float = 5.0,
        min_context: int = 32,
        reach_back: bool = True,
    ) -> None:
        """reach_back: whether a window may begin before its split does (those bars are context, never scored).

        Raises InputError if no series is long enough.
        """
        if not 2 <= min_context < length:
            raise InputError(f"min_context must be from 2 to {length - 1}, not {min_context}", code="bad_size")
        self.split, self.length, self.clip, self.min_context = split, length, clip, min_context
        self.refused: dict[str, int] = {}
        """Reason → windows that a rule of the split left out; one may have several reasons."""
        owners, starts, before = [], [], 0
        for number, bars in enumerate(split.series):
            first = split.first_scored(bars)
            # A window that reaches back needs one bar of its own after the shortest context; others lie inside.
            lowest = max(0, first - length + 1) if reach_back and split.reach_back else first
            begin = np.arange(len(bars) - length, lowest - 1, -stride, dtype=np.int64)[::-1]
            before += len(begin)
            begin = begin[self._allowed(bars, begin)]
            owners.append(np.full(len(begin), number, dtype=np.int32))
            starts.append(begin)
        self.owner = np.concatenate(owners) if owners else np.empty(0, dtype=np.int32)
        self.start = np.concatenate(starts) if starts else np.empty(0, dtype=np.int64)
        self._report_refused(before)
        if len(self.start) == 0:
            longest = max((len(bars) for bars in split.series), default=0)
            own = max((len(bars) - split.first_scored(bars) for bars in split.series), default=0)
            after = f" after the embargo of {split.embargo_bars}" if split.embargo_bars else ""
            raise InputError(
                f"the {split.name} split has no window of {length} bars: its longest series has {longest}"
                + (f", of which {max(0, own)} may be scored{after}" if split.begins is not None else "")
                + (f", and its rules refused {before} windows ({self.refused})" if before else "")
                + "; give more bars, move the split or take a shorter window",
                code="too_short",
            )

    def _allowed(self, bars: SymbolBars, starts: np.ndarray) -> np.ndarray:
        allowed = np.ones(len(starts), dtype=bool)
        if len(starts) == 0:
            return allowed
        for reason, refused in self.split.rules.refused(bars, starts, self.length).items():
            self.refused[reason] = self.refused.get(reason, 0) + int(refused.sum())
            allowed &= ~refused
        return allowed

    def _report_refused(self, before: int) -> None:
        for reason, count in self.refused.items():
            share = count / before if before else 0.0
            logger.info(
                "%s: %d of %d windows left out: %s (%.2f %%)", self.split.name, count, before, reason, 100 * share
            )

    def __len__(self) -> int:
        return len(self.start)

    def contexts(self, seed: int, epoch: int) -> np.ndarray:
        """int64 [N]: every window's context length in one epoch, log-uniform from min_context to length − 1."""
        draw = np.random.default_rng([seed, epoch, 1]).random(len(self))
        low, high = np.log(self.min_context), np.log(self.length)
        return np.exp(low + draw * (high - low)).astype(np.int64).clip(self.min_context, self.length - 1)

    def batch(self, windows: np.ndarray, contexts: np.ndarray) -> Batch:
        """The windows with these numbers, scaled with these context lengths; both int64 [B]."""
        x = np.empty((len(windows), self.length, 6), dtype=np.float32)
        marks = np.empty((len(windows), self.length, 5), dtype=np.int64)
        scored = np.arange(self.length) >= contexts[:, None]
        for row, (window, context) in enumerate(zip(windows, contexts, strict=True)):
            bars, start = self.split.series[self.owner[window]], int(self.start[window])
            candles = bars.candles[start : start + self.length]
            _, mean, scale = normalise(candles[:context], self.clip)
            x[row] = np.clip((candles - mean) / scale, -self.clip, self.clip)
            marks[row] = bars.marks[start : start + self.length]
            scored[row] &= np.arange(start, start + self.length) >= self.split.first_scored(bars)
        return Batch(x, marks, np.asarray(contexts, dtype=np.int64), scored)


class WindowStream:
    """An endless stream of batches: every window once an epoch, in an order that the seed alone decides."""

    def __init__(self, windows: WindowSet, seed: int, batch_size: int) -> None:
        self.windows, self.seed, self.batch_size = windows, seed, batch_size
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)
        self._contexts = np.empty(0, dtype=np.int64)

    def ids(self, step: int) -> list[tuple[int, int]]:
        """(epoch, window) of each row of global batch `step`, counted from 0. A batch may straddle two epochs."""
        n = len(self.windows)
        return [divmod(p, n) for p in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Rows rank, rank + world_size, … of the global batch: together the workers see what one worker would."""
        windows, contexts = [], []
        for epoch, place in self.ids(step)[rank::world_size]:
            self._turn_to(epoch)
            windows.append(self._order[place])
            contexts.append(self._contexts[windows[-1]])
        return self.windows.batch(np.array(windows), np.array(contexts))

    def _turn_to(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(len(self.windows))
            self._contexts = self.windows.contexts(self.seed, epoch)
            self._epoch = epoch


def fixed_subset(windows: WindowSet, count: int, seed: int, batch_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """At most `count` windows for validation, the same every time: (windows, contexts) a batch."""
    chosen = np.random.default_rng([seed, 2]).permutation(len(windows))[:count]
    contexts = windows.contexts(seed, 0)[chosen]
    return [(chosen[i : i + batch_size], contexts[i : i + batch_size]) for i in range(0, len(chosen), batch_size)]


def main(arguments: Sequence[str] | None = None) -> int:
    from cluster.candles.check import main as check_main  # it reads this module

    return check_main(arguments)


if __name__ == "__main__":
    sys.exit(main())
