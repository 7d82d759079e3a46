"""Backtest of signals: top-k/drop-n, long only or long-short, traded at the next open, with costs.

    python -m cluster.backtest --signals signals.csv --prices 'bars/*.csv' --top-k 10 --drop-n 2 --cost-bps 10 --out DIR

Writes backtest.json, backtest.html, equity.csv and trades.csv. The rules are at the head of cluster.evaluation.ledger.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cluster.candles.bars import SymbolBars, bars_from_frame, find_files, read_frame, refuse_mixed_zones
from cluster.evaluation.charts import line_chart
from cluster.evaluation.ledger import Ledger, Prices, Rules, SymbolPrices, run_ledger
from cluster.files import require_writable_folder
from model.errors import InputError, KronosError
from model.frames import columns_by_name, time_index, with_names
from model.types import COLUMNS

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
            f"<tr><td>{escape(name.replace('_', ' '))}</td><td>{_shown(self.summary[name])}</td></tr>" for name in names
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


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.6g}"


def read_prices(
    paths: Sequence[str | Path], *, time_column: str = "timestamps", symbol_column: str = "symbol"
) -> list[SymbolPrices]:
    """open and close of every symbol, in float64. Raises InputError as cluster.candles.bars does."""
    found: dict[str, SymbolPrices] = {}
    for file in find_files(paths):
        frame = with_names(read_frame(file, symbol_column), (time_column, symbol_column, *COLUMNS), f"{file}: ")
        if {"open", "close"} <= set(frame.columns):
            # Only these two are traded at; what checks candles wants the others as well.
            pair = frame[["open", "close"]].apply(pd.to_numeric, errors="coerce")  # a text is named further down
            outer = {"high": pair.max, "low": pair.min}
            frame = frame.assign(**{name: find(axis=1) for name, find in outer.items() if name not in frame.columns})
        checked = bars_from_frame(frame, str(file), time_column=time_column, symbol_column=symbol_column)
        known = symbol_column in frame.columns
        groups = dict(iter(frame.groupby(frame[symbol_column].astype(str), sort=False))) if known else {}
        for bars in checked:
            if bars.symbol in found:
                raise InputError(
                    f"{file}: symbol {bars.symbol!r} was read from another file already: keep a symbol in one file",
                    code="duplicate_symbol",
                )
            own = groups.get(bars.symbol, frame)
            opens, closes = (own[name].to_numpy(np.float64) for name in ("open", "close"))
            found[bars.symbol] = SymbolPrices(bars.symbol, bars.times, opens, closes, bars.zone)
    refuse_mixed_zones({prices.symbol: prices.zone for prices in found.values()}, time_column)
    return list(found.values())


def prices_of(series: Sequence[SymbolBars]) -> list[SymbolPrices]:
    """What the evaluation's own candles say, in the precision that they are kept in."""
    found = []
    for bars in series:
        opens, closes = bars.candles[:, [0, 3]].astype(np.float64).T
        found.append(SymbolPrices(bars.symbol, bars.times, opens, closes, bars.zone))
    return found


def read_signals(path: Path, *, time_column: str = "timestamps", symbol_column: str = "symbol") -> pd.DataFrame:
    """symbol, timestamps, signal of a CSV or Parquet file. Raises InputError for a column that is missing or wrong.

    A file without the columns of these names may have symbol and timestamps, as cluster.evaluate writes them, whatever
    they are called in the prices.
    """
    frame = read_frame(path, symbol_column)
    there = columns_by_name(frame.columns, (symbol_column, "symbol", time_column, "timestamps"), f"{path}: ")
    if symbol_column not in there and "symbol" in there:
        frame, symbol_column = read_frame(path, "symbol"), "symbol"
    if time_column not in there and "timestamps" in there:
        time_column = "timestamps"
    frame = with_names(frame, (symbol_column, time_column, "signal"), f"{path}: ")
    for column in (symbol_column, time_column, "signal"):
        if column not in frame.columns:
            raise InputError(
                f"{path}: column {column!r} is missing, it has {', '.join(map(str, frame.columns))}: give "
                f"{symbol_column}, {time_column} and signal",
                code="missing_column",
                column=column,
            )
    if not pd.api.types.is_numeric_dtype(frame["signal"].dtype):
        raise InputError(f"{path}: column 'signal' holds {frame['signal'].dtype}, not numbers", code="not_a_number")
    return frame.rename(columns={symbol_column: "symbol", time_column: "timestamps"})


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
    from cluster.evaluation.report import page  # the report embeds backtests, and this page is made like it

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found.summary, indent=2, allow_nan=False)
    (folder / "backtest.json").write_text(text + "\n", encoding="utf-8")
    (folder / "backtest.html").write_text(page("Backtest", ["<h1>Backtest</h1>", found.html()]), encoding="utf-8")
    found.equity.to_csv(folder / "equity.csv", index=False)
    found.trades.to_csv(folder / "trades.csv", index=False)


# --- the command ------------------------------------------------------------------------------------------------------


def add_rule_arguments(parser: Any) -> None:
    parser.add_argument("--top-k", type=int, help="symbols to hold (per side)")
    parser.add_argument("--drop-n", type=int, help="symbols replaced at most per decision; default: top-k")
    parser.add_argument("--long-short", action="store_true", help="short the worst top-k as well")
    parser.add_argument("--cost-bps", type=float, default=0.0, help="cost of opening and of closing, in basis points")
    parser.add_argument("--open-cost-bps", type=float, help="cost of opening a position; default: --cost-bps")
    parser.add_argument("--close-cost-bps", type=float, help="cost of closing a position; default: --cost-bps")
    parser.add_argument("--min-cost", type=float, default=0.0, help="least cost of a trade, in money")
    parser.add_argument("--capital", type=float, default=1.0, help="money at the start")


def rules_given(options: argparse.Namespace) -> bool:
    """Whether any option of add_rule_arguments but --top-k was given."""
    parser = argparse.ArgumentParser()
    add_rule_arguments(parser)
    defaults = vars(parser.parse_args([]))
    return any(getattr(options, name) != value for name, value in defaults.items() if name != "top_k")


def rules_of(options: argparse.Namespace) -> Rules:
    return Rules(
        top_k=options.top_k,
        drop_n=options.top_k if options.drop_n is None else options.drop_n,
        long_short=options.long_short,
        open_cost_bps=options.cost_bps if options.open_cost_bps is None else options.open_cost_bps,
        close_cost_bps=options.cost_bps if options.close_cost_bps is None else options.close_cost_bps,
        min_cost=options.min_cost,
        capital=options.capital,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.backtest",
        description="Trade signals at the next open with costs: top-k/drop-n, long only or long-short.",
    )
    parser.add_argument("--signals", type=Path, required=True, help="CSV or Parquet: symbol, timestamps, signal")
    parser.add_argument("--prices", nargs="+", required=True, metavar="FILE", help="files, folders or quoted globs")
    parser.add_argument("--time-column", default="timestamps", help="column of the times, in signals and prices")
    parser.add_argument("--symbol-column", default="symbol", help="column of the symbols, in signals and prices")
    parser.add_argument("--benchmark", help="symbol, or column of the prices; default: the equal-weight universe")
    parser.add_argument("--bars-per-year", type=float, help="for annualised figures; default: as the calendar has them")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    add_rule_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        if options.top_k is None:
            raise InputError("--top-k is missing: say how many symbols to hold", code="missing_option")
        require_writable_folder(options.out, "--out")
        columns = {"time_column": options.time_column, "symbol_column": options.symbol_column}
        series = read_prices(options.prices, **columns)
        found = run(
            series,
            read_signals(options.signals, **columns),
            rules_of(options),
            benchmark=_benchmark(options, {own.symbol for own in series}),
            bars_per_year=options.bars_per_year,
        )
        write(found, options.out)
    except (KronosError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for warning in found.summary["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    shown = {name: value for name, value in found.summary.items() if isinstance(value, int | float)}
    print("\n".join(f"{name}: {_shown(value)}" for name, value in shown.items()))
    print(f"written: {options.out / 'backtest.html'}, backtest.json, equity.csv, trades.csv")
    return 0


def _benchmark(options: argparse.Namespace, symbols: set[str]) -> tuple[str, pd.Series] | str | None:
    """A symbol's name, or a column of the price files as levels by time."""
    name: str | None = options.benchmark
    if name is None or name in symbols:
        return name
    parts = []
    for file in find_files(options.prices):
        frame = with_names(read_frame(file), (options.time_column,), f"{file}: ")
        if name in frame.columns:
            index = pd.DatetimeIndex(pd.to_datetime(frame[options.time_column], format="ISO8601"))
            index = index.tz_convert("UTC").tz_localize(None) if index.tz is not None else index
            parts.append(pd.Series(frame[name].to_numpy(np.float64), index=index))
    if not parts:
        raise InputError(f"benchmark {name!r} is neither a symbol nor a column of the prices", code="unknown_benchmark")
    levels = pd.concat(parts).dropna()
    return name, levels[~levels.index.duplicated()]


if __name__ == "__main__":
    sys.exit(main())
