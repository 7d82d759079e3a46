"""Walk-forward evaluation: which moments, which symbols, which bars are known and which are to come."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cluster.candles.bars import SymbolBars
from model.calibration import usual_bar_seconds
from model.engine.types import WindowPolicy
from model.errors import InputError
from model.frames import PRICE_COLUMNS
from model.sampler import check_sampling
from model.types import Sampling

CLOSE = 3
_SPOILT_HISTORY = "a price of the history is not positive"
_SPOILT_HORIZON = "a price of the horizon is not positive"


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
        check_sampling(Sampling(self.temperature, self.top_k, self.top_p, self.samples, self.seed))
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
    by_size: dict[int, list[tuple[SymbolBars, np.ndarray]]] = defaultdict(list)
    left_out: Counter[str] = Counter()
    for bars in series:
        size = usual_bar_seconds(bars.times)
        if size is None:
            left_out["symbols of one bar"] += 1
        else:
            by_size[size].append((bars, _spoilt_before(bars)))
    chosen: list[Window] = []
    for group in by_size.values():
        calendar = np.unique(np.concatenate([bars.times for bars, _ in group]))
        first = 0 if setting.begins is None else int(np.searchsorted(calendar, setting.begins))
        first = max(first, setting.history)
        stop = len(calendar) if setting.ends is None else int(np.searchsorted(calendar, setting.ends))
        # The origin is the bar before the first forecast one.
        for origin in calendar[first - 1 : stop : setting.every]:
            for bars, spoilt in group:
                cut = int(np.searchsorted(bars.times, origin)) + 1
                reason = _unusable(bars, spoilt, cut, origin, setting)
                if reason is None:
                    chosen.append(Window(bars, cut, season or season_length(bars)))
                else:
                    left_out[reason] += 1
    if not chosen:
        raise InputError(_no_window(series, setting, left_out), code="no_window")
    chosen.sort(key=lambda window: (window.origin, window.bars.symbol))
    return Windows(chosen, dict(left_out))


def _spoilt_before(bars: SymbolBars) -> np.ndarray:
    """int64 [T + 1]: how many bars before each hold a price that is not positive, so that a window costs a difference.

    Scores and baselines take logarithms, and one such price in a history would spoil them without a word.
    """
    spoilt = ~(bars.candles[:, : len(PRICE_COLUMNS)] > 0).all(axis=1)
    return np.concatenate([[0], np.cumsum(spoilt)])


def _unusable(
    bars: SymbolBars, spoilt: np.ndarray, cut: int, origin: np.datetime64, setting: WalkForward
) -> str | None:
    """Why there is no window at the cut, if so. spoilt: of _spoilt_before."""
    if cut > len(bars) or bars.times[cut - 1] != origin:
        return "no bar at the origin"
    last = cut + setting.horizon - 1
    if last >= len(bars) or (setting.ends is not None and bars.times[last] >= setting.ends):
        return "the horizon leaves the period or the data"
    if cut < setting.history:
        return "too little history before the origin"
    if spoilt[cut] > spoilt[cut - setting.history]:
        return _SPOILT_HISTORY
    if spoilt[last + 1] > spoilt[cut]:
        return _SPOILT_HORIZON
    closes = bars.candles[cut - setting.history : cut, CLOSE]
    moves = np.diff(closes.astype(np.float64))
    if np.ptp(moves) <= 1e-12 * abs(float(closes[-1])):
        return "the close never moves, or always alike, in the history"
    return None


def _no_window(series: Sequence[SymbolBars], setting: WalkForward, left_out: Counter[str]) -> str:
    longest = max(series, key=len)
    reasons = ", ".join(f"{reason}: {count}" for reason, count in left_out.most_common())
    period = f"from {setting.begins or 'the start'} to {setting.ends or 'the end'}"
    spoilt = any(left_out[reason] for reason in (_SPOILT_HISTORY, _SPOILT_HORIZON))
    repair = "correct or drop the bars whose prices are not positive, " if spoilt else ""
    return (
        f"there is no window in the period {period}: one needs {setting.history} bars of history before it and "
        f"{setting.horizon} in it; the longest series, {longest.symbol!r}, has {len(longest)} bars from "
        f"{longest.times[0]} to {longest.times[-1]} ({reasons or 'no bar in the period'}); {repair}move the period, "
        "take a shorter history or horizon, or give more bars"
    )
