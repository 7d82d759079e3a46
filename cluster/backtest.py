"""Backtest of signals: top-k/drop-n, long only or long-short, traded at the next open, with costs.

    python -m cluster.backtest --signals signals.csv --prices 'bars/*.csv' --top-k 10 --drop-n 2 --cost-bps 10 --out DIR

Writes backtest.json, backtest.html, equity.csv and trades.csv. The rules are at the head of cluster.evaluation.ledger.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from cluster.evaluation.backtesting import FILES, run, shown, write
from cluster.evaluation.trading_data import read_levels, read_prices, read_signals
from cluster.evaluation.trading_options import add_rule_arguments, rules_of
from cluster.files import require_free_folder
from model.errors import InputError, KronosError


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
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier backtest in --out")
    add_rule_arguments(parser)
    options = parser.parse_args(arguments)
    try:
        if options.top_k is None:
            raise InputError("--top-k is missing: say how many symbols to hold", code="missing_option")
        earlier = [options.out / name for name in FILES if (options.out / name).exists()]
        require_free_folder(options.out, "--out", earlier, options.overwrite)
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
    figures = {name: value for name, value in found.summary.items() if isinstance(value, int | float)}
    print("\n".join(f"{name}: {shown(value)}" for name, value in figures.items()))
    print(f"written: {options.out / 'backtest.html'}, backtest.json, equity.csv, trades.csv")
    return 0


def _benchmark(options: argparse.Namespace, symbols: set[str]) -> tuple[str, pd.Series] | str | None:
    """A symbol's name, or the name and levels of a column of the price files."""
    name: str | None = options.benchmark
    if name is None or name in symbols:
        return name
    return name, read_levels(options.prices, name, time_column=options.time_column)


if __name__ == "__main__":
    sys.exit(main())
