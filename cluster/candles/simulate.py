"""A seeded simulator of candles: for tests, and for the training of the bundled checkpoint.

Nothing here claims to be a market. It has the traits that a candle model must cope with: clustered and jumping
volatility, fat tails, drift, mean reversion, price ticks, overnight gaps, sessions with a lunch break, an intraday
shape of volume and volatility, volume that grows with |return|, instruments without volume, bars without a trade.

All series of one bar size are computed side by side; the loop over bars is the only Python loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cluster.candles.bars import SymbolBars
from model.errors import InputError
from model.frames import time_marks

BAR_MINUTES = (1, 5, 15, 30, 60, 240, 1440)
PROCESSES = ("stochastic_volatility", "garch", "jumps", "mean_reversion", "drift")
SUBSTEPS = 8
"""Prices inside a bar; open is the first and close the last of them."""
WARM_UP = 64
"""Bars simulated and thrown away, so that volatility starts from its own distribution."""


@dataclass(frozen=True)
class Calendar:
    """When bars exist. sessions: (first, last) minute of the day; stamp_end: bars carry the time they end at."""

    name: str
    sessions: tuple[tuple[int, int], ...]
    weekdays_only: bool
    stamp_end: bool


CALENDARS = (
    Calendar("lunch_break", ((570, 690), (780, 900)), weekdays_only=True, stamp_end=True),
    Calendar("day_session", ((570, 960),), weekdays_only=True, stamp_end=False),
    Calendar("around_the_clock", ((0, 1440),), weekdays_only=False, stamp_end=False),
    Calendar("weekdays", ((0, 1440),), weekdays_only=True, stamp_end=False),
)


@dataclass(frozen=True)
class Timeline:
    """times datetime64[ns] [T]; position [T]: share of the trading day that has passed, 0 to 1; break_minutes [T]: time
    without trading before the bar (0 inside a session)."""

    times: np.ndarray
    position: np.ndarray
    break_minutes: np.ndarray
    bars_per_day: int


def timeline(calendar: Calendar, bar_minutes: int, start: np.datetime64, n_bars: int) -> Timeline:
    """n_bars consecutive bars of a calendar, from the first bar on or after the day start."""
    if bar_minutes >= 1440:
        offsets, lengths = np.array([0]), np.array([1440])
    else:
        begins = [np.arange(first, last, bar_minutes) for first, last in calendar.sessions]
        # A bar longer than what is left of its session is cut short, as exchanges' own hourly bars are.
        ends = [
            np.minimum(begin + bar_minutes, last) for begin, (_, last) in zip(begins, calendar.sessions, strict=True)
        ]
        offsets, lengths = np.concatenate(begins), np.concatenate(ends) - np.concatenate(begins)
    per_day = len(offsets)
    days_needed = -(-n_bars // per_day)
    days = start.astype("datetime64[D]") + np.arange(days_needed * 7 // 5 + 7)
    if calendar.weekdays_only:
        days = days[np.is_busday(days)]
    minutes = (days[:days_needed, None].astype("datetime64[m]").astype(np.int64) + offsets).ravel()[:n_bars]
    bar_lengths = np.tile(lengths, days_needed)[:n_bars]
    breaks = np.zeros(n_bars)
    breaks[1:] = minutes[1:] - (minutes[:-1] + bar_lengths[:-1])
    stamped = minutes + (bar_lengths if calendar.stamp_end and bar_minutes < 1440 else 0)
    position = np.tile((np.arange(per_day) + 0.5) / per_day, days_needed)[:n_bars]
    return Timeline(stamped.astype("datetime64[m]").astype("datetime64[ns]"), position, breaks, per_day)


@dataclass(frozen=True)
class Traits:
    """What distinguishes n series; every field is an array [n]. Drawn by draw_traits."""

    process: np.ndarray  # index into PROCESSES
    bar_volatility: np.ndarray  # std of a bar's log return
    volatility_of_volatility: np.ndarray  # stationary std of the slow log-volatility
    persistence: np.ndarray  # AR(1) coefficient of the slow log-volatility
    garch_alpha: np.ndarray
    garch_beta: np.ndarray
    jump_rate: np.ndarray  # jumps a bar
    jump_size: np.ndarray  # std of a jump in bars' volatility
    pull: np.ndarray  # share of the distance to the anchor that a bar closes
    trend: np.ndarray  # |drift| of a bar in bars' volatility
    trend_switch: np.ndarray  # chance a bar that the drift changes sign
    seasonality: np.ndarray  # strength of the intraday shape, 0 to 1
    gap: np.ndarray  # std of an overnight move in units of a day's volatility
    continuous_open: np.ndarray  # bool: open equals the last close inside a session
    start_price: np.ndarray
    tick: np.ndarray  # price step, 0: none
    volume: np.ndarray  # typical volume a bar, 0: the instrument has none
    volume_noise: np.ndarray
    volume_on_return: np.ndarray  # exponent of the volume's growth with |return|
    lot: np.ndarray  # amount = volume × lot × price
    idle: np.ndarray  # chance that nobody trades during a bar


def draw_traits(rng: np.random.Generator, n: int, bars_per_day: np.ndarray) -> Traits:
    """Traits of n series; bars_per_day [n] scales a day's volatility (0.4 % to 6 %) to a bar's."""
    process = rng.integers(len(PROCESSES), size=n)

    def where(kind: str, values: np.ndarray) -> np.ndarray:
        return np.where(process == PROCESSES.index(kind), values, 0.0)

    def log_uniform(low: float, high: float) -> np.ndarray:
        return np.exp(rng.uniform(np.log(low), np.log(high), n))

    bar_volatility = log_uniform(0.004, 0.06) / np.sqrt(bars_per_day)
    start_price = log_uniform(0.5, 5000)
    alpha = where("garch", rng.uniform(0.03, 0.2, n))
    # Ticks from a sixteenth of a bar's move (invisible) to two moves (most bars unchanged); a third of all have none.
    tick = np.where(rng.random(n) < 0.35, 0.0, start_price * bar_volatility * log_uniform(1 / 16, 1.5))
    return Traits(
        process=process,
        bar_volatility=bar_volatility,
        volatility_of_volatility=np.where(process == PROCESSES.index("garch"), 0.15, rng.uniform(0.15, 0.7, n)),
        persistence=rng.uniform(0.95, 0.998, n),
        garch_alpha=alpha,
        garch_beta=where("garch", rng.uniform(0.9, 0.99, n) - alpha),
        jump_rate=where("jumps", log_uniform(0.002, 0.03)) + 0.0005,
        jump_size=rng.uniform(3, 7, n),
        pull=where("mean_reversion", log_uniform(0.005, 0.1)),
        trend=where("drift", rng.uniform(0.01, 0.1, n)),
        trend_switch=log_uniform(0.002, 0.02),
        seasonality=rng.uniform(0.0, 1.0, n),
        gap=rng.uniform(0.05, 0.6, n),
        continuous_open=rng.random(n) < 0.4,
        start_price=start_price,
        tick=tick,
        volume=np.where(rng.random(n) < 0.08, 0.0, log_uniform(30, 1e6)),
        volume_noise=rng.uniform(0.25, 0.7, n),
        volume_on_return=rng.uniform(0.3, 1.0, n),
        lot=rng.choice([1.0, 1.0, 10.0, 100.0], n),
        idle=np.where(rng.random(n) < 0.1, rng.uniform(0.01, 0.15, n), 0.0),
    )


def intraday_shape(position: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Multiplier of volatility over the trading day, mean about 1: a U whose open is higher than its close.

    position [n, T] in 0 to 1, strength [n] in 0 to 1 → [n, T].
    """
    u = 2 * position - 1
    shape = u**2 - 1 / 3 + 0.25 * np.maximum(-u, 0) ** 4 - 0.025
    return 1 + strength[:, None] * 0.9 * shape


def simulate(
    seed: int,
    n_series: int,
    n_bars: int,
    *,
    bar_minutes: tuple[int, ...] | list[int] = BAR_MINUTES,
    first_day: str = "2012-01-02",
) -> list[SymbolBars]:
    """n_series series of n_bars bars each. The same arguments give the same candles.

    bar_minutes: each series draws its bar size from these, in minutes (1440: a day).
    Raises InputError for sizes below 1 or bar sizes that are not in BAR_MINUTES.
    """
    if n_series < 1 or n_bars < 1:
        raise InputError(f"simulate needs at least 1 series of 1 bar, not {n_series} of {n_bars}", code="bad_size")
    unknown = sorted(set(bar_minutes) - set(BAR_MINUTES))
    if unknown or not bar_minutes:
        raise InputError(f"bar_minutes {unknown} are not simulated: choose from {list(BAR_MINUTES)}", code="bad_size")
    rng = np.random.default_rng([seed, n_series, n_bars])
    minutes = rng.choice(np.asarray(bar_minutes), n_series)
    calendars = rng.integers(len(CALENDARS), size=n_series)
    days = np.datetime64(first_day) + rng.integers(0, 4000, n_series)
    lines = [timeline(CALENDARS[calendars[i]], int(minutes[i]), days[i], WARM_UP + n_bars) for i in range(n_series)]
    traits = draw_traits(rng, n_series, np.array([line.bars_per_day for line in lines], dtype=np.float64))
    candles = _candles(rng, traits, lines)[:, WARM_UP:]
    return [
        SymbolBars(
            f"SIM{seed}-{i:05d}-{minutes[i]}m-{PROCESSES[traits.process[i]]}",
            lines[i].times[WARM_UP:],
            candles[i],
            time_marks(lines[i].times[WARM_UP:]),
        )
        for i in range(n_series)
    ]


def _candles(rng: np.random.Generator, traits: Traits, lines: list[Timeline]) -> np.ndarray:
    """float32 [n, T, 6]."""
    position = np.stack([line.position for line in lines])
    breaks = np.stack([line.break_minutes for line in lines])
    per_day = np.array([line.bars_per_day for line in lines], dtype=np.float64)
    season = np.where(per_day[:, None] > 1, intraday_shape(position, traits.seasonality), 1.0)
    # A night's move counts in full, a lunch break's by its share of a night.
    gap_scale = traits.gap[:, None] * np.sqrt(per_day)[:, None] * np.sqrt(np.minimum(breaks, 1050) / 1050)
    path, surprise = _log_prices(rng, traits, season, gap_scale)
    return _to_candles(rng, traits, season, path, surprise)


def _log_prices(
    rng: np.random.Generator, traits: Traits, season: np.ndarray, gap_scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log prices inside each bar [n, T, SUBSTEPS] and the size of each bar's move in typical bars' moves [n, T]."""
    n, n_bars = season.shape
    noise = rng.standard_normal((n_bars, n, SUBSTEPS), dtype=np.float32)
    jump = rng.standard_normal((n_bars, n)) * traits.jump_size * (rng.random((n_bars, n)) < traits.jump_rate)
    jump_step = rng.integers(SUBSTEPS, size=(n_bars, n))
    gap = rng.standard_normal((n_bars, n)) * gap_scale.T
    switch = rng.random((n_bars, n)) < traits.trend_switch
    shocks = rng.standard_normal((3, n_bars, n))
    rows = np.arange(n)

    slow = traits.volatility_of_volatility * rng.standard_normal(n)
    slow_shock = traits.volatility_of_volatility * np.sqrt(1 - traits.persistence**2)
    fast = np.zeros(n)
    garch = np.ones(n)
    direction = rng.choice([-1.0, 1.0], n)
    price, anchor = np.zeros(n), np.zeros(n)  # log prices in units of bar_volatility
    path = np.empty((n, n_bars, SUBSTEPS))
    for t in range(n_bars):
        slow = traits.persistence * slow + slow_shock * shocks[0, t]
        fast = 0.6 * fast + 0.16 * shocks[1, t]
        direction = np.where(switch[t], -direction, direction)
        anchor = anchor + 0.1 * shocks[2, t]
        # The exponent's mean is taken out, so that bar_volatility stays the root mean square of a bar's move.
        level = np.exp(slow + fast - traits.volatility_of_volatility**2 - 0.04) * np.sqrt(garch)
        sigma = level * season[:, t]
        steps = noise[t] * (sigma / np.sqrt(SUBSTEPS))[:, None]
        steps += ((traits.trend * direction * sigma + traits.pull * (anchor - price)) / SUBSTEPS)[:, None]
        steps[rows, jump_step[t]] += jump[t] * level
        # Inside a session some feeds open a bar at the last close; elsewhere the first trade has moved already.
        inside = traits.continuous_open & (gap_scale[:, t] == 0)
        steps[:, 1] += np.where(inside, steps[:, 0], 0.0)
        steps[:, 0] = np.where(inside, 0.0, steps[:, 0]) + gap[t] * level
        path[:, t] = price[:, None] + np.cumsum(steps, axis=1)
        moved = (path[:, t, -1] - price - gap[t] * level) / season[:, t]
        # GARCH(1,1) with unit unconditional variance (Bollerslev 1986); alpha = beta = 0 leaves it at 1.
        garch = 1 - traits.garch_alpha - traits.garch_beta + traits.garch_alpha * moved**2 + traits.garch_beta * garch
        garch = np.where(traits.garch_alpha > 0, np.minimum(garch, 100.0), 1.0)
        price = path[:, t, -1]
    before = np.concatenate([np.zeros((n, 1)), path[:, :-1, -1]], axis=1)
    surprise = np.abs(path[:, :, -1] - before) + (path.max(axis=2) - path.min(axis=2))
    return path * traits.bar_volatility[:, None, None], surprise


def _to_candles(
    rng: np.random.Generator, traits: Traits, season: np.ndarray, path: np.ndarray, surprise: np.ndarray
) -> np.ndarray:
    n, n_bars = season.shape
    prices = traits.start_price[:, None, None] * np.exp(path)
    tick = traits.tick[:, None, None]
    ticked = np.maximum(np.round(prices / np.where(tick > 0, tick, 1.0)), 1.0) * tick
    prices = np.where(tick > 0, ticked, prices)
    idle = rng.random((n, n_bars)) < traits.idle[:, None]
    idle[:, 0] = False
    # A bar without a trade repeats the close of the last bar that had one.
    last_traded = np.maximum.accumulate(np.where(idle, 0, np.arange(n_bars)), axis=1)
    carried = np.take_along_axis(prices[:, :, -1], last_traded, axis=1)
    prices = np.where(idle[:, :, None], carried[:, :, None], prices)

    noise = np.empty((n, n_bars))
    state = np.zeros(n)
    shocks = rng.standard_normal((n_bars, n))
    for t in range(n_bars):  # AR(1): busy bars follow busy bars
        state = 0.7 * state + 0.71 * shocks[t]
        noise[:, t] = state
    volume = traits.volume[:, None] * np.exp(traits.volume_noise[:, None] * noise) * season
    volume = volume * ((0.3 + surprise) / 2) ** traits.volume_on_return[:, None]
    volume = np.where(idle, 0.0, np.where(volume > 0, np.maximum(np.round(volume), 1.0), 0.0))
    amount = volume * traits.lot[:, None] * prices.mean(axis=2)
    columns = (prices[:, :, 0], prices.max(axis=2), prices.min(axis=2), prices[:, :, -1], volume, amount)
    return np.stack(columns, axis=2).astype(np.float32)
