"""Looks for everything that is wrong, or worth knowing, about tables of bars, before anything is trained on them.

A fault makes training wrong or impossible; a warning is for the user to judge. Both say where they are and what to do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import ValidationError

from cluster.candles.bars import SymbolBars, find_files, read_frame
from cluster.candles.check_report import DataReport, as_markdown, as_text
from cluster.candles.check_series import CheckOptions, SeriesCheck
from cluster.candles.data_config import BarFilter, TimeSplit
from cluster.candles.lenient import FAULT, WARNING, Finding, Lenient, RawSeries
from cluster.data import SplitBars, WindowSet, boundaries, split_by_time, window_rules
from model.errors import InputError, KronosError

WINDOW_BYTES = 28
"""A window's owner and start, and its places in an epoch's order."""


def check(paths: Sequence[str | Path], options: CheckOptions | None = None) -> DataReport:
    """Reads all files to their end, whatever is found. What cannot be read is in the report too; nothing is raised."""
    options = options or CheckOptions()
    report = DataReport()
    reader = Lenient(options.time_column, options.symbol_column)
    series: list[SymbolBars] = []
    seen: dict[str, tuple[str, str | None]] = {}
    for file in _existing(paths, report):
        try:
            frame = read_frame(file, options.symbol_column)
        except InputError as error:
            _unreadable(report, error, str(file))
            continue
        report.files.append(str(file))
        for raw in reader.series(frame, file):
            _check_uniqueness(raw, seen, report.findings)
            part = SeriesCheck(raw, options)
            report.symbols.append(part.report)
            report.findings += part.findings
            if part.usable is not None:
                series.append(part.usable)
    report.findings = reader.findings + report.findings
    _check_together(seen, report)
    _count_windows(series, options, report)
    return report


def _existing(paths: Sequence[str | Path], report: DataReport) -> list[Path]:
    found: dict[Path, None] = {}
    for path in paths:
        try:
            found.update(dict.fromkeys(find_files(path)))
        except InputError as error:
            _unreadable(report, error, str(path))
    return list(found)


def _unreadable(report: DataReport, error: InputError, file: str) -> None:
    report.unreadable.append(file)
    report.findings.append(Finding(FAULT, error.code, str(error), "give a CSV or Parquet file, or leave it out", file))


def _check_uniqueness(raw: RawSeries, seen: dict[str, tuple[str, str | None]], findings: list[Finding]) -> None:
    """seen: symbol → its file and time zone."""
    file, _ = seen.setdefault(raw.symbol, (raw.file, raw.zone))
    if file != raw.file:
        text = f"symbol {raw.symbol!r} is in {file} too"
        findings.append(Finding(FAULT, "duplicate_symbol", text, "keep a symbol in one file", raw.file, raw.symbol))


def _check_together(seen: dict[str, tuple[str, str | None]], report: DataReport) -> None:
    """What can be wrong between symbols."""
    naive = {symbol for symbol, (_, zone) in seen.items() if zone is None}
    if 0 < len(naive) < len(seen):
        fewer = naive if 2 * len(naive) <= len(seen) else seen.keys() - naive
        kind = "no time zone, others have one" if fewer == naive else "a time zone, others have none"
        report.findings += [
            Finding(FAULT, "mixed_time_zones", f"its times have {kind}", "give all of them one", seen[name][0], name)
            for name in sorted(fewer)
        ]
    sizes = sorted({r.bar_seconds for r in report.symbols if r.bar_seconds})
    if len(sizes) > 1:
        text = "symbols have bars of " + ", ".join(str(pd.Timedelta(seconds=size)) for size in sizes)
        report.findings.append(Finding(WARNING, "bar_sizes", text, "make sure that the mixture is meant"))


def _count_windows(series: list[SymbolBars], options: CheckOptions, report: DataReport) -> None:
    """Windows per split, as training would find them once the faults are gone, and the memory of it all."""
    report.memory_bytes = sum(symbol.memory_bytes for symbol in report.symbols)
    if options.window is None or not series:
        return
    try:
        splits = _splits(series, options.split)
    except InputError as error:
        report.findings.append(Finding(FAULT, error.code, str(error), "give more bars, or move the boundaries"))
        return
    for name, split in splits.items():
        counts, refused = np.zeros(len(series), dtype=np.int64), dict[str, int]()
        try:
            ruled = replace(
                split,
                rules=window_rules(options.max_gap_bars, options.filter, "train" if options.split is None else name),
            )
            windows = WindowSet(ruled, options.window, stride=options.stride, min_context=2)
            refused = windows.refused
            counts = np.bincount(windows.owner, minlength=len(series))
        except InputError as error:
            report.findings.append(Finding(FAULT, error.code, str(error), "see above", column="window"))
        total = int(counts.sum())
        begins = None if split.begins is None else str(pd.Timestamp(split.begins))
        report.splits[name] = {"begins": begins, "windows": total, "left_out": refused}
        report.memory_bytes += WINDOW_BYTES * total
        by_symbol = {bars.symbol: int(count) for bars, count in zip(series, counts, strict=True)}
        for symbol in report.symbols:
            symbol.windows[name] = by_symbol.get(symbol.symbol, 0)
        empty = [symbol for symbol, count in by_symbol.items() if count == 0]
        if empty and total:
            text = f"{len(empty)} of {len(by_symbol)} symbols have no window of {options.window} bars in {name}: "
            text += ", ".join(empty[:5]) + (", …" if len(empty) > 5 else "")
            report.findings.append(Finding(WARNING, "no_window", text, "give them more bars, or leave them out"))


def _splits(series: list[SymbolBars], split: TimeSplit | None) -> dict[str, SplitBars]:
    if split is None:
        return {"all": SplitBars("all", series)}
    return split_by_time(
        series, boundaries(split, series), embargo_bars=split.embargo_bars, reach_back=split.reach_back
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.data", description="Looks at data before it is trained on."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = _parser(commands).add_argument
    add("files", nargs="+", metavar="FILES", help="CSV or Parquet files, folders of them, or patterns in quotes")
    add("--time-column", default="timestamps", help="default: %(default)s")
    add("--symbol-column", default="symbol", help="where there is none, a file is a symbol; default: %(default)s")
    add("--bar", metavar="SIZE", help="expected distance of bars, such as 5min, 1h or 1D; default: inferred")
    add(
        "--window",
        type=int,
        metavar="N",
        help="count windows of N bars (a predictor reads one bar more)",
    )
    add("--stride", type=int, default=1, help="bars between the starts of neighbouring windows; default: %(default)s")
    add("--validation-from", metavar="TIME", help="first moment of validation (UTC if the times have a zone)")
    add("--test-from", metavar="TIME", help="first moment of the test period")
    add("--validation-share", type=float, metavar="SHARE", help="instead: share of the bar times, such as 0.15")
    add("--test-share", type=float, metavar="SHARE", help="the last share of the bar times")
    add("--embargo-bars", type=int, default=0, metavar="N", help="bars after each boundary that nobody scores")
    add("--max-gap-bars", type=int, metavar="N", help="as data.max_gap_bars: gaps are then warnings, not faults")
    add("--filter", action="store_true", help="as data.filter: {}, count train windows without illiquid and such bars")
    add("--jump-sigmas", type=float, default=10.0, metavar="K", help="what counts as a jump; default: %(default)s")
    add("--stagnant-bars", type=int, default=20, metavar="N", help="shortest run of one close; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write everything, all rows included, as JSON")
    add("--markdown", type=Path, metavar="FILE", help="write the report as Markdown")
    given = parser.parse_args(arguments)
    try:
        report = check(given.files, _options(given))
        if given.json:
            given.json.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
        if given.markdown:
            given.markdown.write_text(as_markdown(report), encoding="utf-8")
    except (KronosError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(as_text(report))
    return report.exit_code


def _parser(commands: Any) -> argparse.ArgumentParser:
    return commands.add_parser(
        "check",
        help="report rows, gaps, faults, windows and memory of tables of bars",
        description="Reports all that is wrong with tables of bars, or worth knowing, in one go. Rows count from 0, "
        "the header left out. Exit status: 0 no faults (perhaps warnings), 1 faults, 2 something could not be read.",
    )


def _option_fault(fault: Any) -> str:
    """One of pydantic's, with the option that it is about; none for what two options contradict each other in."""
    option = "".join(f"--{name}".replace("_", "-") + f" {fault['input']}: " for name in fault["loc"])
    return option + fault["msg"].removeprefix("Value error, ")


def _bar(text: str) -> pd.Timedelta:
    try:
        size = pd.Timedelta(text)
    except ValueError:
        size = pd.NaT
    if not size > pd.Timedelta(0) or text.replace(".", "").isdigit():
        raise InputError(f"--bar {text!r} must be a length of time such as 5min", code="bad_size")
    return size


def _options(given: argparse.Namespace) -> CheckOptions:
    """Raises InputError for values that make no sense."""
    names = ("validation_from", "test_from", "validation_share", "test_share")
    moments = {name: value for name in names if (value := getattr(given, name)) is not None}
    if given.window is None and (moments or given.filter or given.stride != 1):
        raise InputError("splits, --stride and --filter say which windows are counted: give their size with --window")
    if not moments and given.embargo_bars:
        raise InputError("--embargo-bars is about split boundaries: give --validation-from or --validation-share")
    try:
        split = TimeSplit(**moments, embargo_bars=given.embargo_bars) if moments else None
    except ValidationError as error:
        raise InputError("; ".join(map(_option_fault, error.errors()))) from None
    if given.bar is not None:
        bar = _bar(given.bar)
    for name, least in (("window", 3), ("stride", 1), ("max_gap_bars", 0), ("stagnant_bars", 2), ("jump_sigmas", 0)):
        if (value := getattr(given, name)) is not None and value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, not {value}", code="bad_size")
    return CheckOptions(
        given.time_column,
        given.symbol_column,
        None if given.bar is None else bar,
        given.window,
        given.stride,
        split,
        given.max_gap_bars,
        BarFilter() if given.filter else None,
        given.jump_sigmas,
        given.stagnant_bars,
    )
