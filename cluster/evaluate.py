"""Walk-forward evaluation of a model beside the baselines: report.json, report.html, forecasts.csv, signals.csv.

    python -m cluster.evaluate --model BUNDLE --data 'bars/*.parquet' --from 2024-07-01 --to 2024-10-01 --out DIR

With --card, --candles or --scores instead of --data it measures a bundle for its model card (evaluation.card_scores).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cluster.candles.bars import read_bars
from cluster.evaluation import backtesting, card_scores, report
from cluster.evaluation.baselines import EXTRAS
from cluster.evaluation.comparison import Evaluation, evaluate
from cluster.evaluation.forecasting import ModelChoice
from cluster.evaluation.trading_data import prices_of
from cluster.evaluation.trading_options import add_rule_arguments, rules_given, rules_of
from cluster.evaluation.walk_forward_options import add_walk_forward_arguments, print_progress, walk_forward_of
from cluster.files import require_free_folder
from model.errors import InputError, KronosError

BACKTEST_FOLDER = "backtest"
"""In --out, beside the report."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.evaluate",
        description="Score a model's walk-forward forecasts beside the last price, drift, historical volatility and "
        "the seasonal naive forecast.",
    )
    add_walk_forward_arguments(parser)
    parser.add_argument("--out", type=Path, help="folder of the report; needed with --data")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report in --out")
    parser.add_argument("--parent", help="the model that it was finetuned from, to compare with")
    parser.add_argument("--parent-tokenizer", help="folder or org/repo, where the parent's folder holds none")
    parser.add_argument("--season", type=int, help="bars of the seasonal naive forecast; default: a usual day")
    parser.add_argument("--extras", nargs="*", default=[], choices=EXTRAS, help="further baselines")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling; scores are honest at 1 only")
    parser.add_argument("--top-p", type=float, default=1.0, help="of the sampling; scores are honest at 1 only")
    add_rule_arguments(parser.add_argument_group("backtest of the predicted returns, with --top-k"))
    card = parser.add_argument_group("model card of a bundle, instead of a report")
    card_scores.add_arguments(card)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.data is None:
            if options.card is None and options.scores is None and options.candles is None:
                raise InputError("--data is missing: name the files to forecast, or --card", code="missing_option")
            return card_scores.run(options)
        _refuse_ignored(options)
        if options.out is None:
            raise InputError("--out is missing: name the folder that gets the report", code="missing_option")
        _run(options)
    except (KronosError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _refuse_ignored(options: argparse.Namespace) -> None:
    """Options that would say nothing here. Raises InputError."""
    if any(value is not None for value in (options.card, options.scores, options.candles)):
        raise InputError("--card, --scores and --candles measure a bundle for its card: leave --data out, or them")
    if options.parent is None and options.parent_tokenizer is not None:
        raise InputError("--parent-tokenizer is given without --parent: name the parent", code="missing_option")
    if options.top_k is None and rules_given(options):
        raise InputError("options of the backtest are given without --top-k: say how many symbols to hold")


def _report_files(folder: Path) -> list[Path]:
    """What an evaluation has written into the folder, its backtest included."""
    traded = [f"{BACKTEST_FOLDER}/{name}" for name in backtesting.FILES]
    return [folder / name for name in (*report.FILES, *traded) if (folder / name).exists()]


def _write(folder: Path, overwrite: bool, found: Evaluation, traded: backtesting.Backtest | None) -> Path:
    """Puts the report into the folder, in place of an earlier one only once it is whole. Returns where it is."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix="report-", dir=folder))
    report.write(fresh, found, traded)
    if traded is not None:
        backtesting.write(traded, fresh / BACKTEST_FOLDER)
    earlier = _report_files(folder)
    if earlier and not overwrite:
        print(f"warning: a report has come into {folder} meanwhile: this one is in {fresh}", file=sys.stderr)
        return fresh
    for file in earlier:  # a backtest that is not made again would seem to be of this report
        file.unlink()
    with suppress(OSError):  # what else is in it is not ours
        (folder / BACKTEST_FOLDER).rmdir()
    for file in _report_files(fresh):
        place = folder / file.relative_to(fresh)
        place.parent.mkdir(exist_ok=True)
        file.replace(place)
    shutil.rmtree(fresh)
    return folder


def _run(options: argparse.Namespace) -> None:
    setting = walk_forward_of(options, temperature=options.temperature, top_p=options.top_p)
    rules = rules_of(options) if options.top_k is not None else None
    # What cannot be written is said before the forecasts, which may take hours; what cannot be traded is not read.
    require_free_folder(options.out, "--out", _report_files(options.out), options.overwrite)
    series = read_bars(options.data, time_column=options.time_column, symbol_column=options.symbol_column)
    prices = prices_of(series) if rules is not None else []
    choice = ModelChoice(options.model, options.tokenizer, options.device, options.threads)
    parent = None
    if options.parent is not None:
        parent = ModelChoice(options.parent, options.parent_tokenizer, options.device, options.threads)
    found = evaluate(
        choice,
        series,
        setting,
        parent=parent,
        season=options.season,
        extras=options.extras,
        workers=options.workers,
        on_progress=print_progress,
    )
    traded = None
    if rules is not None:
        traded = backtesting.run(prices, found.signals(), rules)
        found.summary["backtest"] = traded.summary
    written = _write(options.out, options.overwrite, found, traded)
    for warning in found.summary["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    print(report.console_table(found.summary))
    print(found.summary["verdict_line"])
    print(f"written: {written / 'report.html'}, report.json, forecasts.csv, signals.csv")


if __name__ == "__main__":
    sys.exit(main())
