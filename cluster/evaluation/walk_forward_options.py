"""The options that the command lines of evaluation and calibration share."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np

from cluster.bundles.training_record import utc_moment
from cluster.evaluation.walk_forward import WalkForward
from model.errors import InputError


def moment(text: str | None, option: str) -> np.datetime64 | None:
    """A command-line date or time. Raises InputError for what is not ISO 8601."""
    if text is None:
        return None
    try:
        return utc_moment(text)
    except ValueError:
        raise InputError(f"{option} {text!r} is not a date such as 2024-07-01", code="not_a_time") from None


def add_walk_forward_arguments(parser: argparse.ArgumentParser) -> None:
    """What evaluation and calibration ask alike."""
    defaults = WalkForward()
    parser.add_argument(
        "--model", "--bundle", default="bundled", help="bundle folder, published alias, org/repo, or bundled"
    )
    parser.add_argument("--tokenizer", help="folder or org/repo, where the model's folder holds none")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="CSV or Parquet files, folders or quoted globs")
    parser.add_argument("--time-column", default="timestamps", help="column of the bars' times")
    parser.add_argument("--symbol-column", default="symbol", help="column of the symbol; absent: one symbol a file")
    parser.add_argument("--from", dest="begins", metavar="DATE", help="first moment of the period; default: all data")
    parser.add_argument("--to", dest="ends", metavar="DATE", help="end of the period, exclusive; default: all data")
    parser.add_argument("--history", type=int, default=defaults.history, help="bars a forecast sees")
    parser.add_argument("--horizon", type=int, default=defaults.horizon, help="bars to forecast")
    parser.add_argument("--samples", type=int, default=defaults.samples, help="paths a forecast")
    parser.add_argument("--every", type=int, help="bars between neighbouring origins; default: the horizon")
    parser.add_argument("--window", default=defaults.window, help="past the context: exact, hop:K or fit")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="of all forecasts")
    parser.add_argument("--workers", type=int, default=0, help="Ray actors; 0: this process, without Ray")
    parser.add_argument("--threads", type=int, default=1, help="torch threads a worker; rounding depends on them")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


def walk_forward_of(options: argparse.Namespace, **sampling: Any) -> WalkForward:
    """Raises InputError for values that make no sense."""
    for name, least in (("workers", 0), ("threads", 1)):
        if getattr(options, name) < least:
            raise InputError(f"--{name} must be at least {least}, not {getattr(options, name)}", code="bad_size")
    return WalkForward(
        begins=moment(options.begins, "--from"),
        ends=moment(options.ends, "--to"),
        history=options.history,
        horizon=options.horizon,
        samples=options.samples,
        every=options.horizon if options.every is None else options.every,
        seed=options.seed,
        window=options.window,
        **sampling,
    )


def print_progress(what: str, done: int, total: int) -> None:
    print(f"{what}: {done}/{total} forecasts", file=sys.stderr, flush=True)
