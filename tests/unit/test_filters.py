"""Windows that the rules leave out: they straddle a gap, or hold bars that teach nothing."""

import numpy as np
import pandas as pd
import pytest

from cluster.candles.bars import SymbolBars
from cluster.candles.data_config import BarFilter
from cluster.candles.filters import WindowRules, jumps, long_runs, stagnant
from cluster.data import SplitBars, WindowSet
from model.errors import InputError
from model.frames import time_marks

LENGTH = 10


def hourly(bars=200, hole=None, change=None):
    rng = np.random.default_rng(0)
    close = 100 * np.exp(np.cumsum(rng.normal(size=bars) * 0.01))
    candles = np.stack([close, close * 1.01, close * 0.99, close, np.full(bars, 5.0), close * 5], axis=1)
    times = pd.date_range("2024-01-01", periods=bars + (hole[1] - hole[0] if hole else 0), freq="h")
    if hole:
        times = times.delete(range(*hole))
    if change:
        change(candles)
    return SymbolBars("S", times.to_numpy().astype("datetime64[ns]"), candles.astype(np.float32), time_marks(times))


def starts(bars, rules):
    windows = WindowSet(SplitBars("train", [bars], rules=rules), LENGTH, min_context=4)
    return set(windows.start.tolist()), windows.refused


def test_windows_never_straddle_a_larger_gap():
    bars = hourly(hole=(100, 105))
    everything = set(range(191))
    for most, expected in ((5, everything), (4, everything - set(range(91, 100))), (None, everything)):
        found, refused = starts(bars, WindowRules(most))
        assert found == expected
        assert refused == ({} if most is None else {"gap": len(everything) - len(expected)})
    steps = np.diff(bars.times) / np.timedelta64(1, "h")
    assert all((steps[s : s + LENGTH - 1] == 1).all() for s in starts(bars, WindowRules(0))[0])


def set_close(begin, end, factor):
    def change(candles):
        candles[begin:end, :4] *= factor

    return change


def freeze(candles):
    candles[50:60, :4] = candles[50, 3]


def silence(candles):
    candles[80:84, 4:] = 0


@pytest.mark.parametrize(
    ("rule", "change", "refused"),
    [
        ({"jump": 0.3}, set_close(120, 200, 2.0), range(111, 120)),
        ({"stagnant_bars": 10}, freeze, range(41, 60)),
        ({"stagnant_bars": 11}, freeze, []),
        ({"illiquid_bars": 4}, silence, range(71, 84)),
        ({"illiquid_bars": 5}, silence, []),
    ],
)
def test_the_filter_leaves_out_what_it_says(rule, change, refused):
    off = {"jump": None, "stagnant_bars": None, "illiquid_bars": None}
    found, counts = starts(hourly(change=change), WindowRules(filter=BarFilter(**off | rule)))
    assert found == set(range(191)) - set(refused)
    assert sum(counts.values()) == len(refused)


def test_a_split_without_a_window_left_says_why():
    with pytest.raises(InputError, match=r"its rules refused 191 windows .*illiquid") as caught:
        starts(hourly(change=lambda c: c[:, 4:].fill(0)), WindowRules(filter=BarFilter()))
    assert caught.value.code == "too_short"


def test_runs_and_jumps():
    flags = np.array([1, 1, 0, 1, 1, 1, 0, 1], dtype=bool)
    assert long_runs(flags, 3).tolist() == [0, 0, 0, 1, 1, 1, 0, 0]
    assert long_runs(flags, 1).tolist() == flags.tolist()
    close = np.array([1, 2, 2, 2, 3, 3, 4.0])
    candles = np.repeat(close[:, None], 6, axis=1)
    assert stagnant(candles, 3).tolist() == [0, 1, 1, 1, 0, 0, 0]
    assert stagnant(candles, 2).tolist() == [0, 1, 1, 1, 1, 1, 0]
    assert jumps(candles)[[0, 1, 2]] == pytest.approx([0, np.log(2), 0])
    candles[3, 0] = -1
    assert jumps(candles)[3] == np.inf
