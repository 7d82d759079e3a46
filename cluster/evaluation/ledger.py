"""A portfolio in shares and cash: decided at a bar's close, traded at the next bar's open, with costs. numpy only.

Rules, all of them:
- A decision at time t knows the signals of t. It trades at the open of the first bar of the calendar after t. The
  calendar is every time at which any symbol has a bar.
- top-k/drop-n: the book holds up to k symbols. Those held and the best that are not are ranked together; of what comes
  after the k best, held ones among the last n are sold, and as many of the best are bought as make k again. Ties go by
  name. A held symbol without a signal ranks last.
- Long only: what cash there is after selling is divided equally among the symbols to buy; those held are left as they
  are. Long-short: each new position is 1/k of the account's value, long in the best k and short in the worst k, so that
  both sides have the account's value at first; cash earns nothing.
- A symbol without a bar where it should be traded is not traded: what should be sold is kept, and what should be bought
  is not bought until a later decision asks again. It is valued at its last close.
- Costs are a share of what is traded, at opening and closing a position, and at least min_cost a trade.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from model.errors import InputError


@dataclass(frozen=True)
class Rules:
    """top_k: symbols held (per side). drop_n: of them replaced at most per decision.

    *_bps: basis points of what is traded. min_cost and capital are in money.
    """

    top_k: int
    drop_n: int
    long_short: bool = False
    open_cost_bps: float = 0.0
    close_cost_bps: float = 0.0
    min_cost: float = 0.0
    capital: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k < 1 or not 1 <= self.drop_n <= self.top_k:
            raise InputError(
                f"top-k must be at least 1 and drop-n from 1 to top-k, not {self.top_k} and {self.drop_n}",
                code="bad_size",
            )
        if min(self.open_cost_bps, self.close_cost_bps, self.min_cost) < 0 or not self.capital > 0:
            raise InputError("costs must not be negative, and capital must be positive", code="bad_size")
        if max(self.open_cost_bps, self.close_cost_bps) >= 10_000:
            raise InputError("costs of 10000 basis points leave nothing to trade with", code="bad_size")


@dataclass(frozen=True)
class SymbolPrices:
    """times datetime64[ns] [T]; opens, closes float64 [T]: as they were read, because a ledger is exact.

    zone: the times' own, which are in UTC then; None for a wall clock.
    """

    symbol: str
    times: np.ndarray
    opens: np.ndarray
    closes: np.ndarray
    zone: str | None = None


@dataclass(frozen=True)
class Prices:
    """times [T], all bars of all symbols; opens, closes [T, M], NaN where a symbol has no bar."""

    symbols: list[str]
    times: np.ndarray
    opens: np.ndarray
    closes: np.ndarray

    @classmethod
    def of(cls, series: Sequence[SymbolPrices]) -> Prices:
        """Raises InputError for a price that is not positive, and for no series."""
        if not series:
            raise InputError("there are no prices to trade at", code="no_rows")
        times = np.unique(np.concatenate([own.times for own in series]))
        opens, closes = (np.full((len(times), len(series)), np.nan) for _ in range(2))
        for column, own in enumerate(series):
            lowest = np.minimum(own.opens, own.closes)
            if not (lowest > 0).all():
                row = int(np.flatnonzero(~(lowest > 0))[0])
                raise InputError(
                    f"symbol {own.symbol!r}, {own.times[row]}: nobody trades at an open or close of {lowest[row]:g}: "
                    "repair or drop the bar",
                    code="bad_price",
                )
            rows = np.searchsorted(times, own.times)
            opens[rows, column], closes[rows, column] = own.opens, own.closes
        return cls([own.symbol for own in series], times, opens, closes)


@dataclass(frozen=True)
class Trade:
    """side: buy | sell | short | cover. shares > 0."""

    bar: int
    symbol: str
    side: str
    shares: float
    price: float
    cost: float

    @property
    def notional(self) -> float:
        return self.shares * self.price


@dataclass
class Ledger:
    """value: [n] account value at the closes of the bars first, first + 1, …; trades: in order.

    traded, costs: [n] money traded and paid at each bar; opening: [n] value at each open, before trading.
    missed: reason → how many orders or decisions were not carried out.
    """

    first: int
    value: np.ndarray
    opening: np.ndarray
    traded: np.ndarray
    costs: np.ndarray
    trades: list[Trade]
    holdings: dict[str, float]
    missed: Counter[str] = field(default_factory=Counter)


class _Account:
    def __init__(self, prices: Prices, rules: Rules) -> None:
        self.prices, self.rules = prices, rules
        self.cash = rules.capital
        self.shares = np.zeros(len(prices.symbols))
        self.known = np.full(len(prices.symbols), np.nan)  # last close
        self.trades: list[Trade] = []
        self.missed: Counter[str] = Counter()

    def value(self, at: np.ndarray) -> float:
        """at: prices [M]; the last close counts where there is none."""
        held = self.shares != 0
        price = np.where(np.isnan(at), self.known, at)
        return self.cash + float(self.shares[held] @ price[held])

    def order(self, bar: int, symbol: int, shares: float, side: str) -> None:
        price = float(self.prices.opens[bar, symbol])
        notional = abs(shares) * price
        opening = side in ("buy", "short")
        rate = (self.rules.open_cost_bps if opening else self.rules.close_cost_bps) / 10_000
        cost = max(notional * rate, self.rules.min_cost)
        self.cash -= shares * price + cost
        self.shares[symbol] = self.shares[symbol] + shares if opening else 0.0
        self.trades.append(Trade(bar, self.prices.symbols[symbol], side, abs(shares), price, cost))

    def tradable(self, bar: int, symbol: int, what: str) -> bool:
        if np.isnan(self.prices.opens[bar, symbol]):
            self.missed[f"{what}: no bar at the time of trading"] += 1
            return False
        return True


def choose(
    held: Sequence[int], signal: Mapping[int, float], names: Sequence[str], rules: Rules
) -> tuple[list[int], list[int]]:
    """(to sell, to buy) of a book that wants high signals, as the module says. held, keys of signal: symbol numbers."""

    def rank(symbols: Sequence[int]) -> list[int]:
        return sorted(symbols, key=lambda s: (-signal.get(s, -np.inf), names[s]))

    fresh = rank([s for s in signal if s not in set(held)])[: rules.drop_n + rules.top_k - len(held)]
    together = rank([*held, *fresh])
    # Only what a better one replaces is dropped.
    worst = together[rules.top_k :][-rules.drop_n :]
    sell = [s for s in held if s in worst]
    return sell, fresh[: len(sell) + rules.top_k - len(held)]


def run_ledger(prices: Prices, decisions: Mapping[np.datetime64, Mapping[str, float]], rules: Rules) -> Ledger:
    """decisions: time → symbol → signal, finite. Raises InputError if none can be carried out."""
    account, number = _Account(prices, rules), {name: i for i, name in enumerate(prices.symbols)}
    due: dict[int, dict[int, float]] = {}
    for time in sorted(decisions):
        bar = int(np.searchsorted(prices.times, time, side="right"))
        if bar == len(prices.times):
            account.missed["decision: no bar after it"] += 1
            continue
        if bar in due:
            account.missed["decision: a later one trades at the same bar"] += 1
        due[bar] = {number[name]: signal for name, signal in decisions[time].items()}
    if not due:
        raise InputError(
            "no signal has a bar after it: signals must lie before the end of the prices", code="no_trading_bar"
        )
    first = min(due)
    columns: dict[str, list[float]] = {name: [] for name in ("value", "opening", "traded", "costs")}
    for row in prices.closes[:first]:
        account.known = np.where(np.isnan(row), account.known, row)
    for bar in range(first, len(prices.times)):
        opening, before = account.value(prices.opens[bar]), len(account.trades)
        if bar in due:
            if opening <= 0:
                account.missed["decision: the account is empty"] += 1
            else:
                _rebalance(account, bar, due[bar], opening)
        account.known = np.where(np.isnan(prices.closes[bar]), account.known, prices.closes[bar])
        done = account.trades[before:]
        columns["opening"].append(opening)
        columns["traded"].append(sum(trade.notional for trade in done))
        columns["costs"].append(sum(trade.cost for trade in done))
        columns["value"].append(account.value(prices.closes[bar]))
    holdings = {prices.symbols[s]: float(account.shares[s]) for s in np.flatnonzero(account.shares)}
    arrays = {name: np.array(column) for name, column in columns.items()}
    return Ledger(first=first, trades=account.trades, holdings=holdings, missed=account.missed, **arrays)


def _rebalance(account: _Account, bar: int, signal: Mapping[int, float], value: float) -> None:
    if account.rules.long_short:
        _rebalance_both(account, bar, signal, value)
        return
    buy = _close(account, bar, signal, 1, "sell")
    _open(account, bar, buy, account.cash / len(buy) if buy else 0.0, "buy")


def _close(account: _Account, bar: int, signal: Mapping[int, float], sign: int, side: str) -> list[int]:
    """Closes what one side of the book (1: long, -1: short) drops; the symbols that it wants to open instead."""
    held = np.flatnonzero(account.shares * sign > 0).tolist()
    sell, buy = choose(held, signal, account.prices.symbols, account.rules)
    closed = [symbol for symbol in sell if account.tradable(bar, symbol, side)]
    for symbol in closed:
        account.order(bar, symbol, -account.shares[symbol], side)
    # The place of what could not be sold is not free.
    return buy[: account.rules.top_k - (len(held) - len(closed))]


def _open(account: _Account, bar: int, symbols: Sequence[int], budget: float, side: str) -> None:
    """side buy: budget pays for the costs too. side short, or buy on credit: budget is what is traded."""
    rate = account.rules.open_cost_bps / 10_000
    notional = budget
    if not account.rules.long_short:
        notional = budget / (1 + rate)
        if notional * rate < account.rules.min_cost:
            notional = budget - account.rules.min_cost
    for symbol in symbols:
        if not account.tradable(bar, symbol, side):
            continue
        if notional <= 0:
            account.missed[f"{side}: no cash left"] += 1
            continue
        shares = notional / float(account.prices.opens[bar, symbol])
        account.order(bar, symbol, shares if side == "buy" else -shares, side)


def _rebalance_both(account: _Account, bar: int, signal: Mapping[int, float], value: float) -> None:
    rules, names = account.rules, account.prices.symbols
    if len(signal) < 2 * rules.top_k:
        account.missed["decision: fewer than twice top-k symbols have a signal"] += 1
        return
    ordered = sorted(signal, key=lambda s: (-signal[s], names[s]))
    half = len(ordered) // 2
    longs = _close(account, bar, {s: signal[s] for s in ordered[:half]}, 1, "sell")
    shorts = _close(account, bar, {s: -signal[s] for s in ordered[half:]}, -1, "cover")
    for symbols, side in ((longs, "buy"), (shorts, "short")):
        # A symbol that the other side could not get rid of is nobody's to open.
        free = [symbol for symbol in symbols if account.shares[symbol] == 0]
        _open(account, bar, free, value / rules.top_k, side)
