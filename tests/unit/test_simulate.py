"""The simulator makes candles that a market could print, the same ones for the same seed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.candles.bars import invalid_candles
from cluster.candles.simulate import BAR_MINUTES, CALENDARS, PROCESSES, draw_traits, intraday_shape, simulate, timeline
from model.errors import InputError

OPEN, HIGH, LOW, CLOSE, VOLUME, AMOUNT = range(6)


@pytest.fixture(scope="module")
def market():
    return simulate(3, 200, 400)


def calendar(name):
    return next(c for c in CALENDARS if c.name == name)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n_series=st.integers(1, 6),
    n_bars=st.integers(1, 40),
    minutes=st.lists(st.sampled_from(BAR_MINUTES), min_size=1, max_size=3, unique=True),
)
def test_any_market_is_well_formed(seed, n_series, n_bars, minutes):
    series = simulate(seed, n_series, n_bars, bar_minutes=minutes)
    assert len(series) == n_series
    assert len({bars.symbol for bars in series}) == n_series
    for bars in series:
        assert bars.candles.shape == (n_bars, 6)
        assert bars.candles.dtype == np.float32
        assert bars.marks.shape == (n_bars, 5)
        assert np.isfinite(bars.candles).all()
        assert (bars.candles[:, :4] > 0).all()
        assert (bars.candles[:, 4:] >= 0).all()
        assert not invalid_candles(bars.candles).any()
        assert (np.diff(bars.times).astype(np.int64) > 0).all()


def test_same_seed_same_candles_other_seed_others():
    first, again, other = (simulate(seed, 3, 50) for seed in (5, 5, 6))
    for a, b, c in zip(first, again, other, strict=True):
        assert a.candles.tobytes() == b.candles.tobytes()
        assert a.times.tobytes() == b.times.tobytes()
        assert not np.array_equal(a.candles, c.candles)


def test_lunch_break_and_weekends_have_no_bars():
    line = timeline(calendar("lunch_break"), 5, np.datetime64("2024-06-14"), 200)
    minutes = line.times.astype("datetime64[m]").astype(np.int64) % 1440
    assert set(minutes) == {*range(575, 691, 5), *range(785, 901, 5)}
    assert line.bars_per_day == 48
    assert np.is_busday(line.times.astype("datetime64[D]")).all()
    # 14 June 2024 is a Friday: 48 bars, then Monday.
    assert line.times[48].astype("datetime64[D]") == np.datetime64("2024-06-17")
    assert line.break_minutes[24] == 90
    assert line.break_minutes[48] == 3 * 1440 - 330
    assert line.break_minutes[1] == 0


def test_around_the_clock_never_pauses():
    line = timeline(calendar("around_the_clock"), 60, np.datetime64("2024-06-14"), 100)
    assert set(np.diff(line.times)) == {np.timedelta64(60, "m")}
    assert not line.break_minutes.any()


@pytest.mark.parametrize("minutes", BAR_MINUTES)
@pytest.mark.parametrize("calendar", CALENDARS, ids=lambda c: c.name)
def test_every_calendar_takes_every_bar_size(calendar, minutes):
    line = timeline(calendar, minutes, np.datetime64("2024-01-01"), 50)
    assert len(line.times) == len(line.position) == 50
    assert (np.diff(line.times).astype(np.int64) > 0).all()
    assert ((line.position > 0) & (line.position < 1)).all()


def test_all_processes_and_bar_sizes_occur(market):
    kinds = {bars.symbol.split("-", 3)[3] for bars in market}
    sizes = {int(bars.symbol.split("-")[2].rstrip("m")) for bars in market}
    assert kinds == set(PROCESSES)
    assert sizes == set(BAR_MINUTES)


def test_returns_have_fat_tails_and_clustered_volatility(market):
    kurtosis, clustering = [], []
    for bars in market:
        move = np.diff(np.log(bars.candles[:, CLOSE].astype(np.float64)))
        move -= move.mean()
        kurtosis.append((move**4).mean() / move.var() ** 2)
        clustering.append(np.corrcoef(np.abs(move[1:]), np.abs(move[:-1]))[0, 1])
    assert np.median(kurtosis) > 4  # a normal has 3
    assert np.median(clustering) > 0.05  # an independent series has 0


def test_volume_grows_with_the_size_of_the_move(market):
    traded = [bars.candles.astype(np.float64) for bars in market if bars.candles[:, VOLUME].any()]
    links = [np.corrcoef(np.abs(np.diff(np.log(c[:, CLOSE]))), c[1:, VOLUME])[0, 1] for c in traded]
    assert np.median(links) > 0.3
    assert 0 < len(market) - len(traded) < len(market) / 5  # a few instruments have no volume at all


def test_amount_is_volume_at_a_price_of_the_bar(market):
    for bars in market:
        candles = bars.candles.astype(np.float64)
        rows = candles[candles[:, VOLUME] > 0]
        if not len(rows):
            continue
        price = rows[:, AMOUNT] / rows[:, VOLUME]
        lot = np.round(np.median(price / rows[:, CLOSE]))
        assert lot in (1, 10, 100)
        assert (price / lot <= rows[:, HIGH] * (1 + 1e-5)).all()
        assert (price / lot >= rows[:, LOW] * (1 - 1e-5)).all()


def test_some_series_move_in_ticks(market):
    unchanged = [np.mean(np.diff(bars.candles[:, CLOSE]) == 0) for bars in market]
    assert np.min(unchanged) == 0
    assert np.max(unchanged) > 0.3


def test_intraday_shape_is_a_u_of_mean_one():
    position = (np.arange(48)[None] + 0.5) / 48
    flat, shaped = (intraday_shape(position, np.array([strength]))[0] for strength in (0.0, 1.0))
    assert (flat == 1).all()
    assert shaped[0] > shaped[-1] > shaped[24]
    assert shaped.mean() == pytest.approx(1, abs=0.02)


def test_volume_and_range_follow_the_shape():
    # Averaged over many series, the first and last bars of a day are wider and busier than its middle.
    series = [b for b in simulate(9, 150, 960, bar_minutes=[5]) if b.candles[:, VOLUME].any()]
    wide, busy = [], []
    for bars in series:
        hours = bars.marks[:, 1] * 60 + bars.marks[:, 0]
        if set(np.unique(hours)) != {*range(575, 691, 5), *range(785, 901, 5)}:
            continue
        candles = bars.candles.astype(np.float64)
        ranges = candles[:, HIGH] - candles[:, LOW]
        edge, middle = (hours <= 590) | (hours >= 890), (hours >= 660) & (hours <= 810)
        wide.append(ranges[edge].mean() / ranges[middle].mean())
        busy.append(candles[edge, VOLUME].mean() / candles[middle, VOLUME].mean())
    assert len(wide) > 10
    assert np.median(wide) > 1.1
    assert np.median(busy) > 1.1


def test_volatility_scales_with_the_bar():
    rng = np.random.default_rng(0)
    by_minute, by_day = (draw_traits(rng, 500, np.full(500, n)).bar_volatility for n in (240.0, 1.0))
    assert np.median(by_day) / np.median(by_minute) == pytest.approx(240**0.5, rel=0.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_series": 0, "n_bars": 5}, "at least 1 series"),
        ({"n_series": 1, "n_bars": 0}, "at least 1 series"),
        ({"n_series": 1, "n_bars": 5, "bar_minutes": [7]}, r"\[7\] are not simulated"),
        ({"n_series": 1, "n_bars": 5, "bar_minutes": []}, "choose from"),
    ],
)
def test_bad_sizes_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        simulate(0, **arguments)
