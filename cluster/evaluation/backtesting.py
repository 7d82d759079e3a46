"""A backtest: signals traded by the rules of cluster.evaluation.ledger beside a benchmark; figures, plot and files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cluster.evaluation.charts import line_chart
from cluster.evaluation.ledger import Ledger, Prices, Rules, SymbolPrices, run_ledger
from cluster.evaluation.report import page
from model.errors import InputError
from model.frames import time_index

YEAR = np.timedelta64(31_557_600, "s")


@dataclass(frozen=True)
class Backtest:
    """summary: what backtest.json holds. equity: a row a bar. trades: a row a trade."""

    summary: dict[str, Any]
    equity: pd.DataFrame
    trades: pd.DataFrame

    def html(self) -> str:
        """A part of a page: the numbers and the cumulative plot."""
        names: tuple[str, ...] = (
            "total_return",
            "annualised_return",
            "annualised_excess_return",
            "information_ratio",
            "max_drawdown",
        )
        names += ("mean_turnover", "total_cost", "benchmark_return")
        rows = "".join(
            f"<tr><td>{escape(name.replace('_', ' '))}</td><td>{shown(self.summary[name])}</td></tr>" for name in names
        )
        equity = self.equity
        steps = list(range(len(equity)))
        lines = {
            "strategy": equity["value"] / self.summary["rules"]["capital"],
            "costs added back": (equity["value"] + equity["cost"].cumsum()) / self.summary["rules"]["capital"],
            self.summary["benchmark"]: (1 + equity["benchmark_return"]).cumprod(),
        }
        ends = (str(equity["timestamps"].iloc[0]), str(equity["timestamps"].iloc[-1]))
        chart = line_chart(
            "Cumulative value, start = 1", steps, {n: v.tolist() for n, v in lines.items()}, x_names=ends
        )
        said = "".join(f'<div class="warning">{escape(text)}</div>' for text in self.summary["warnings"])
        return f"{said}<table>{rows}</table>{chart}"


def shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"


def _decisions(
    signals: pd.DataFrame, symbols: set[str], warnings: list[str], *, zoned: bool
) -> dict[np.datetime64, dict[str, float]]:
    """time → symbol → signal. zoned: whether the prices have a time zone. Says how many were left out, and why."""
    unique = pd.Series(signals["timestamps"].unique())
    index = time_index(unique.sort_values(), "timestamps")
    if index.tz is not None and not zoned:
        # In UTC they would meet bars of another hour, earlier or later than they are known.
        raise InputError(
            "the signals' times have a time zone and those of the prices have none: give both one, or neither",
            code="mixed_time_zones",
            column="timestamps",
        )
    clock = index.tz_convert("UTC").tz_localize(None) if index.tz is not None else index
    times = dict(zip(unique.sort_values(), clock.to_numpy().astype("datetime64[ns]"), strict=True))
    found: dict[np.datetime64, dict[str, float]] = {}
    missing = unknown = 0
    for symbol, time, signal in zip(signals["symbol"], signals["timestamps"], signals["signal"], strict=True):
        if str(symbol) not in symbols:
            unknown += 1
        elif not math.isfinite(signal):
            missing += 1
        else:
            decision = found.setdefault(times[time], {})
            if str(symbol) in decision:
                raise InputError(
                    f"symbol {symbol!r} has two signals at {time}: keep one", code="duplicate_signal", column="signal"
                )
            decision[str(symbol)] = float(signal)
    if unknown:
        warnings.append(f"{unknown} signals are of symbols without prices and were left out")
    if missing:
        warnings.append(f"{missing} signals are missing or infinite and were left out")
    if not found:
        raise InputError("no signal is of a symbol that has prices: check the names", code="no_signal", column="signal")
    return found


def run(
    series: Sequence[SymbolPrices],
    signals: pd.DataFrame,
    rules: Rules,
    *,
    benchmark: tuple[str, pd.Series] | str | None = None,
    bars_per_year: float | None = None,
) -> Backtest:
    """signals: columns symbol, timestamps, signal; a signal is known at the close of the bar of its time.

    Where the prices have a time zone, signals without one are in UTC.
    benchmark: a symbol of series, which is then not traded; (name, levels by time); None: the equal-weight universe,
    rebalanced at every bar. bars_per_year: None takes those of the calendar. Raises InputError.
    """
    if bars_per_year is not None and not bars_per_year > 0:
        raise InputError(f"bars_per_year must be positive, not {bars_per_year:g}", code="bad_size")
    warnings: list[str] = []
    levels = None
    if isinstance(benchmark, str):
        levels = next((_levels(own) for own in series if own.symbol == benchmark), None)
        if levels is None:
            raise InputError(f"benchmark {benchmark!r} is neither a symbol nor a column", code="unknown_benchmark")
        series = [own for own in series if own.symbol != benchmark]
    elif benchmark is not None:
        benchmark, levels = benchmark
    prices = Prices.of(series)
    zoned = all(own.zone is not None for own in series)
    ledger = run_ledger(prices, _decisions(signals, set(prices.symbols), warnings, zoned=zoned), rules)
    warnings += [f"{reason}: {count}" for reason, count in ledger.missed.items()]
    times = prices.times[ledger.first :]
    last_seen = dict(zip(prices.symbols, _last_bars(prices), strict=True))
    warnings += [
        f"{symbol!r} is held at the end although its last bar is at {last_seen[symbol]}: it counts at that close"
        for symbol in ledger.holdings
        if last_seen[symbol] < times[-1]
    ]
    compared = (
        _universe_returns(prices, ledger.first) if levels is None else _level_returns(levels, prices.times, ledger)
    )
    equity = _equity(times, ledger, compared, rules)
    if bars_per_year is None:
        start = prices.times[ledger.first - 1] if ledger.first else times[0]
        bars_per_year = float(len(times) / max((times[-1] - start) / YEAR, 1e-9))
    return Backtest(
        {
            "schema": 1,
            "rules": asdict(rules),
            "from": str(times[0].astype("datetime64[s]")),
            "to": str(times[-1].astype("datetime64[s]")),
            "benchmark": benchmark or "equal-weight universe",
            "bars_per_year": bars_per_year,
            **_figures(equity, ledger, rules, bars_per_year),
            "warnings": warnings,
        },
        equity,
        _trades(prices, ledger),
    )


def _levels(own: SymbolPrices) -> pd.Series:
    return pd.Series(own.closes, index=pd.DatetimeIndex(own.times))


def _last_bars(prices: Prices) -> list[np.datetime64]:
    return [prices.times[np.flatnonzero(~np.isnan(column))[-1]] for column in prices.closes.T]


def _universe_returns(prices: Prices, first: int) -> np.ndarray:
    """[n]: mean return of the symbols that have a bar, close to close; at the first bar open to close."""
    closes = pd.DataFrame(prices.closes)
    before = closes.ffill().shift().to_numpy(copy=True)[first:]
    before[0] = prices.opens[first]
    with np.errstate(invalid="ignore"):
        returns = prices.closes[first:] / before - 1
    known = np.isfinite(returns)
    return np.where(known, returns, 0.0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)


def _level_returns(levels: pd.Series, times: np.ndarray, ledger: Ledger) -> np.ndarray:
    """[n]: from the level at the bar before to that at each bar; 0 where the benchmark has not begun."""
    known = levels.sort_index().reindex(pd.DatetimeIndex(times), method="ffill")
    return known.pct_change(fill_method=None).fillna(0.0).to_numpy()[ledger.first :]


def _equity(times: np.ndarray, ledger: Ledger, compared: np.ndarray, rules: Rules) -> pd.DataFrame:
    before = np.concatenate([[rules.capital], ledger.value[:-1]])
    return pd.DataFrame(
        {
            "timestamps": times,
            "value": ledger.value,
            "return": ledger.value / before - 1,
            "benchmark_return": compared,
            "turnover": ledger.traded / ledger.opening,
            "cost": ledger.costs,
        }
    )


def _figures(equity: pd.DataFrame, ledger: Ledger, rules: Rules, per_year: float) -> dict[str, Any]:
    """Returns are of the whole account. Annualised: mean per bar × bars a year. information_ratio: of the excess."""
    returns, excess = equity["return"].to_numpy(), (equity["return"] - equity["benchmark_return"]).to_numpy()
    turnover = equity["turnover"].to_numpy()
    trading = turnover[turnover > 0]

    def ratio(series: np.ndarray) -> float | None:
        spread = float(series.std(ddof=1)) if len(series) > 1 else 0.0
        return float(series.mean() / spread * math.sqrt(per_year)) if spread > 1e-15 else None

    value = np.concatenate([[rules.capital], ledger.value])
    return {
        "bars": len(returns),
        "total_return": float(ledger.value[-1] / rules.capital - 1),
        "annualised_return": float(returns.mean() * per_year),
        "annualised_volatility": float(returns.std(ddof=1) * math.sqrt(per_year)) if len(returns) > 1 else None,
        "sharpe_ratio": ratio(returns),
        "benchmark_return": float((1 + equity["benchmark_return"]).prod() - 1),
        "annualised_excess_return": float(excess.mean() * per_year),
        "information_ratio": ratio(excess),
        "max_drawdown": float((1 - value / np.maximum.accumulate(value)).max()),
        "trades": len(ledger.trades),
        "rebalances": len(trading),
        "mean_turnover": float(trading.mean()) if len(trading) else 0.0,
        "total_traded": float(ledger.traded.sum()),
        "total_cost": float(ledger.costs.sum()),
        "holdings": ledger.holdings,
    }


def _trades(prices: Prices, ledger: Ledger) -> pd.DataFrame:
    columns = ["timestamps", "symbol", "side", "shares", "price", "notional", "cost"]
    rows = [(prices.times[t.bar], t.symbol, t.side, t.shares, t.price, t.notional, t.cost) for t in ledger.trades]
    return pd.DataFrame(rows, columns=columns)


FILES = ("backtest.json", "backtest.html", "equity.csv", "trades.csv")


def write(found: Backtest, folder: Path) -> None:
    """Writes FILES into folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found.summary, indent=2, allow_nan=False)
    (folder / "backtest.json").write_text(text + "\n", encoding="utf-8")
    (folder / "backtest.html").write_text(page("Backtest", ["<h1>Backtest</h1>", found.html()]), encoding="utf-8")
    found.equity.to_csv(folder / "equity.csv", index=False)
    found.trades.to_csv(folder / "trades.csv", index=False)
