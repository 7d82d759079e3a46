"""The options of a command that trades: cluster.backtest, and cluster.evaluate with --top-k."""

from __future__ import annotations

import argparse
from typing import Any

from cluster.evaluation.ledger import Rules


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
