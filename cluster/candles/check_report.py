"""What `python -m cluster.data check` found, as numbers, as text and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cluster.candles.check_series import SymbolReport
from cluster.candles.lenient import FAULT, WARNING, Finding

ROWS_SHOWN = 10
SYMBOLS_SHOWN = 50
HEAD = ["symbol", "rows", "first", "last", "zone", "bar", "missing", "pauses", "dup", "unsorted", "bad", "jumps"]
HEAD += ["no-volume", "stagnant", "windows"]


@dataclass
class DataReport:
    """unreadable: files that could not be opened at all.

    splits: name → where it begins, its windows, and those that rules left out.
    """

    files: list[str] = field(default_factory=list)
    symbols: list[SymbolReport] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    memory_bytes: int = 0

    def of_level(self, level: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == level]

    @property
    def exit_code(self) -> int:
        """2: something could not be read; 1: faults; 0: none (warnings at most)."""
        return 2 if self.unreadable else 1 if self.of_level(FAULT) else 0

    def totals(self) -> dict[str, Any]:
        """The counts over all symbols, the first and the last time, and the bar sizes."""
        counted = [name for name, value in vars(SymbolReport("", "", 0)).items() if isinstance(value, int)]
        times = [t for report in self.symbols for t in (report.first, report.last) if t is not None]
        return {
            "symbols": len({report.symbol for report in self.symbols}),
            **{name: sum(getattr(report, name) for report in self.symbols) for name in counted},
            "first": min(times, default=None),
            "last": max(times, default=None),
            "bar_seconds": sorted({r.bar_seconds for r in self.symbols if r.bar_seconds}),
            "windows": {name: split["windows"] for name, split in self.splits.items()},
            "memory_bytes": self.memory_bytes,
        }

    def as_dict(self) -> dict[str, Any]:
        return {
            "exit_code": self.exit_code,
            "files": self.files,
            "unreadable": self.unreadable,
            "totals": self.totals(),
            "splits": self.splits,
            "symbols": [vars(report) for report in self.symbols],
            "faults": [finding.as_dict() for finding in self.of_level(FAULT)],
            "warnings": [finding.as_dict() for finding in self.of_level(WARNING)],
        }


def as_text(report: DataReport) -> str:
    lines = [_head(report), ""]
    rows = [HEAD, *(_cells(symbol) for symbol in report.symbols[:SYMBOLS_SHOWN])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [*_left_out(report), "", *_sums(report)]
    for level in (FAULT, WARNING):
        found = report.of_level(level)
        lines += ["", f"{len(found)} {level}{'' if len(found) == 1 else 's'}{':' if found else ''}"]
        lines += [f"  {finding.code}: {_sentence(finding)}" for finding in found]
    return "\n".join(lines)


def as_markdown(report: DataReport) -> str:
    lines = ["# Data report", "", _head(report), "", _row(HEAD), _row(["---"] * len(HEAD))]
    lines += [_row(_cells(symbol)) for symbol in report.symbols[:SYMBOLS_SHOWN]]
    lines += [*_left_out(report), "", *(f"- {line}" for line in _sums(report))]
    for level in (FAULT, WARNING):
        found = report.of_level(level)
        lines += ["", f"## {len(found)} {level}{'' if len(found) == 1 else 's'}", ""]
        lines += [f"- **{finding.code}** {_sentence(finding)}" for finding in found]
    return "\n".join(lines) + "\n"


def _row(cells: Any) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _head(report: DataReport) -> str:
    totals = report.totals()
    return (
        f"{len(report.files)} files, {totals['symbols']} symbols, {totals['rows']:,} rows, {totals['bars']:,} usable "
        f"bars, {totals['first'] or '-'} to {totals['last'] or '-'}"
        + (f"; {len(report.unreadable)} could not be read" if report.unreadable else "")
    )


def _cells(symbol: SymbolReport) -> list[str]:
    windows = " + ".join(f"{count:,}" for count in symbol.windows.values()) or "-"
    bar = "-" if symbol.bar_seconds is None else bar_text(symbol.bar_seconds)
    numbers = [symbol.missing_bars, symbol.pauses, symbol.duplicates, symbol.unsorted, symbol.bad_candles]
    numbers += [symbol.jumps, symbol.zero_volume, symbol.stagnant_bars]
    texts = [symbol.symbol, f"{symbol.rows:,}", symbol.first or "-", symbol.last or "-", symbol.zone or "-", bar]
    return [*texts, *(f"{number:,}" for number in numbers), windows]


def bar_text(seconds: float) -> str:
    """300.0 → 5min."""
    for unit, name in ((86400, "D"), (3600, "h"), (60, "min")):
        if seconds % unit == 0:
            return f"{seconds / unit:g}{name}"
    return f"{seconds:g}s"


def _left_out(report: DataReport) -> list[str]:
    more = len(report.symbols) - SYMBOLS_SHOWN
    return [f"… and {more} more symbols, which --json has"] if more > 0 else []


def _sums(report: DataReport) -> list[str]:
    totals = report.totals()
    lines = [
        f"gaps inside sessions: {totals['gaps']:,}, {totals['missing_bars']:,} bars missing",
        f"pauses between sessions, no faults: {totals['pauses']:,}; short sessions: {totals['short_sessions']:,} "
        f"({totals['short_session_bars']:,} bars missing); weekdays without bars: {totals['closed_days']:,}",
    ]
    for name, split in report.splits.items():
        since = f" from {split['begins']}" if split["begins"] else ""
        left_out = ", ".join(f"{count:,} {reason}" for reason, count in split["left_out"].items())
        lines.append(f"{name}{since}: {split['windows']:,} windows" + (f"; left out: {left_out}" if left_out else ""))
    memory = f"memory: {totals['memory_bytes'] / 1e6:,.1f} MB in every worker"
    return [*lines, memory + (" (data.source.cache shares it)" if totals["memory_bytes"] > 100e6 else "")]


def _sentence(finding: Finding) -> str:
    place = [finding.file, f"symbol {finding.symbol}" if finding.symbol is not None else None]
    place += [f"column {finding.column}" if finding.column is not None else None, _rows(finding.rows)]
    where = ", ".join(part for part in place if part)
    return f"{where}{': ' if where else ''}{finding.message}: {finding.remedy}"


def _rows(rows: list[int]) -> str | None:
    if not rows:
        return None
    shown = ", ".join(map(str, rows[:ROWS_SHOWN]))
    more = f", … ({len(rows)} in all)" if len(rows) > ROWS_SHOWN else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"
