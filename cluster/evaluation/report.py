"""The report of an evaluation: report.json, report.html (self-contained), forecasts.csv, signals.csv."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cluster.evaluation.charts import COLOURS, bar_chart, line_chart
from cluster.evaluation.scores import INTERVALS

if TYPE_CHECKING:
    from cluster.evaluation.backtesting import Backtest
    from cluster.evaluation.comparison import Evaluation

REPORT_FILE = "report.json"
FILES = (REPORT_FILE, "report.html", "forecasts.csv", "signals.csv")
NAMES = {
    "model": "model",
    "calibrated": "model, calibrated",
    "parent": "parent",
    "last_price": "last price (point)",
    "drift": "drift",
    "historical_volatility": "historical volatility",
    "seasonal_naive": "seasonal naive",
    "garch": "GARCH(1,1)",
    "ets": "ETS",
}
SHOWN_AS_IS = ("model", "parent", "setting", "leakage", "calibration")
STYLE = """body{font:14px/1.45 sans-serif;max-width:1180px;margin:24px auto;padding:0 16px;color:#222}
table{border-collapse:collapse;margin:8px 0 20px;font-size:13px}
td,th{border:1px solid #ddd;padding:3px 6px;text-align:right}
td:first-child,th:first-child{text-align:left}td{white-space:nowrap}.wide,pre{overflow-x:auto}code{overflow-wrap:anywhere}
.verdict{padding:10px;background:#f2f5f9}.verdict b{display:block;font-size:18px}
.beats{color:#1a7f37}.loses{color:#b42318}.warning{background:#fff4d6;padding:6px 10px;margin:4px 0}
.charts{display:flex;flex-wrap:wrap;gap:24px;align-items:flex-start}svg{max-width:100%;height:auto}"""


def verdict_line(verdict: str, comparisons: Sequence[dict[str, Any]]) -> str:
    """beats | ties | loses, against whom, and by which test."""
    parts = []
    for found in comparisons:
        p = "no test: too few origins, or no difference" if found["p_value"] is None else f"p = {found['p_value']:.3g}"
        ratio = "–" if found["ratio"] is None else f"{found['ratio']:.3f}"
        where = f" where it could be fitted, {_share(found)}" if found["left_out"] else ""
        parts.append(f"{found['verdict']} {NAMES[found['against']]}{where} (CRPS ratio {ratio}, {p})")
    return (
        f"verdict: {verdict} | {'; '.join(parts)} | Diebold–Mariano test on CRPS with the Harvey–Leybourne–Newbold "
        "correction, two-sided, 5 %"
    )


def _share(found: dict[str, Any]) -> str:
    return f"{found['forecasts']} of {found['forecasts'] + found['left_out']} forecasts"


def _score_rows(summary: dict[str, Any]) -> list[list[str]]:
    """The table of scores, as the console and the page show it."""
    return [[_row_name(name, metrics), *_cells(metrics)] for name, metrics in summary["metrics"].items()]


def _row_name(name: str, metrics: dict[str, Any]) -> str:
    return f"{NAMES[name]} ({metrics['left_out']} left out)" if metrics["left_out"] else NAMES[name]


def write(folder: Path, evaluation: Evaluation, traded: Backtest | None = None) -> None:
    """Writes the four files into folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    # NaN is no JSON: better an error here than a report that nobody can read.
    text = json.dumps(evaluation.summary, indent=2, allow_nan=False)
    (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    (folder / "report.html").write_text(_html(evaluation.summary, traded), encoding="utf-8")
    _table(evaluation).to_csv(folder / "forecasts.csv", index=False)
    evaluation.signals().to_csv(folder / "signals.csv", index=False)


def _table(evaluation: Evaluation) -> pd.DataFrame:
    """One row a forecast and forecaster; means over the horizon, pit at its last bar."""
    parts = []
    for name, scored in evaluation.scored.items():
        error = np.stack(scored.error).mean(axis=1)
        truth = evaluation.truth.only(np.array(scored.numbers))
        columns: dict[str, Any] = {
            "symbol": truth.symbol,
            "origin": [evaluation.windows[number].origin for number in scored.numbers],
            "forecaster": name,
            "crps": np.stack(scored.crps).mean(axis=1),
            "mae": error,
            "mase": error / truth.mase_scale,
            "predicted_return": scored.predicted,
            "actual_return": truth.returns,
            "predicted_volatility": scored.volatility,
            "actual_volatility": truth.volatility,
            "pit": [None if pit is None else pit[-1] for pit in scored.pit],
        }
        for i, level in enumerate(INTERVALS):
            columns[f"covered_{level:g}"] = [None if inside is None else inside[i].mean() for inside in scored.covered]
        parts.append(pd.DataFrame(columns))
    return pd.concat([part.dropna(axis="columns", how="all") for part in parts], ignore_index=True)


def _cells(metrics: dict[str, Any]) -> list[str]:
    def share(value: Any) -> str:
        return "–" if value is None else f"{value:.3f}"

    def tested(entry: Any) -> str:
        return (
            "–"
            if entry is None
            else f"{entry['mean']:+.3f} (t {'–' if entry['t'] is None else format(entry['t'], '+.1f')})"
        )

    coverage, hit, volatility = metrics["coverage"], metrics["hit_rate"], metrics["volatility"]
    return [
        f"{metrics['crps']:.4f}",
        f"{metrics['wql']:.5f}",
        f"{metrics['mase']:.3f}",
        f"{metrics['mae']:.5g}",
        "–" if coverage is None else " / ".join(f"{coverage[str(level)]['value']:.2f}" for level in INTERVALS),
        "–" if metrics["pit"] is None else f"{metrics['pit']['ks']:.3f} (p {metrics['pit']['p_value']:.2g})",
        tested(metrics["ic"]),
        tested(metrics["rank_ic"]),
        "–" if hit is None else f"{hit['value']:.3f} ({hit['base_rate']:.3f})",
        "–" if volatility is None else f"{volatility['mae']:.5f}",
        "–" if volatility is None else share(volatility["r2"]),
    ]


HEADS = (
    "CRPS",
    "WQL",
    "MASE",
    "MAE",
    "covers 50/80/90 %",
    "PIT KS",
    "IC",
    "RankIC",
    "hits (base rate)",
    "vol. MAE",
    "vol. R²",
)


def console_table(summary: dict[str, Any]) -> str:
    rows = [["", *HEADS], *_score_rows(summary)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _html(summary: dict[str, Any], traded: Backtest | None) -> str:
    model, data, period = summary["model"], summary["data"], summary["period"]
    verdict, _, details = summary["verdict_line"].partition(" | ")
    warnings = "".join(f'<div class="warning">{escape(warning)}</div>' for warning in summary["warnings"])
    body = [
        f"<h1>Evaluation of {escape(model['name'])}</h1>",
        f'<p class="verdict"><b class="{summary["verdict"]}">{escape(verdict)}</b> {escape(details)}</p>',
        warnings,
        f"<p>{data['forecasts']} forecasts of {len(data['symbols'])} symbols at {data['origins']} origins, "
        f"{period['first_origin']} to {period['last_origin']}; period from {period['from'] or 'the start'} to "
        f"{period['to'] or 'the end'} (exclusive). Weights sha256 <code>{model['sha256']}</code>.</p>",
        "<h2>Scores</h2>",
        _html_table(["", *HEADS], _score_rows(summary)),
        "<p>CRPS: fair estimator, mean over the bars, in units of the history's root mean square one-bar move. WQL: "
        "2Σρ/Σ|y|, mean of the levels 0.1 to 0.9. MASE: m = 1. MAE of the median, in price. "
        f"{_ic_kind(summary)} Volatility: √Σ(Δ log p)² over the horizon. Lower is better, but for IC, hits and R².</p>",
        "<h2>Against the model</h2>",
        _comparison_table(summary["comparisons"]),
        "<h2>Intervals</h2>",
        _coverage_table(summary["metrics"]),
        '<div class="charts">',
        *_charts(summary["metrics"]),
        "</div>",
        *([] if traded is None else ["<h2>Backtest</h2>", traded.html()]),
        "<h2>Setting</h2>",
        f"<pre>{escape(json.dumps({key: summary[key] for key in SHOWN_AS_IS}, indent=2))}</pre>",
    ]
    return page(f"Evaluation of {model['name']}", body)


def page(title: str, body: Sequence[str]) -> str:
    """A page that loads nothing from elsewhere."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _ic_kind(summary: dict[str, Any]) -> str:
    entry = summary["metrics"]["model"]["ic"]
    if entry is None:
        return "IC: not defined here, the returns do not vary."
    how = "per origin, across symbols" if entry["kind"] == "cross-sectional" else "over time, per symbol"
    return f"IC of the return at the horizon: {how}; Newey–West t with {entry['lag']} lags over {entry['n']} origins."


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'


def _comparison_table(comparisons: Sequence[dict[str, Any]]) -> str:
    rows = []
    for found in comparisons:
        numbers = [
            "–" if found[k] is None else f"{found[k]:.4g}" for k in ("ratio", "low", "high", "statistic", "p_value")
        ]
        rows.append(
            [NAMES[found["against"]], *numbers, str(found["forecasts"]), str(found["origins"]), found["verdict"]]
        )
    heads = [
        "CRPS of the model over that of",
        "ratio",
        "95 % low",
        "high",
        "DM statistic",
        "p",
        "forecasts",
        "origins",
        "verdict",
    ]
    return _html_table(heads, rows)


def _coverage_table(metrics: dict[str, Any]) -> str:
    rows = []
    for name, one in metrics.items():
        for level, entry in (one["coverage"] or {}).items():
            blocks = entry["bootstrap"]
            rows.append(
                [
                    NAMES[name],
                    f"{float(level):.0%}",
                    f"{entry['value']:.3f}",
                    f"{entry['low']:.3f}–{entry['high']:.3f}",
                    "–" if blocks is None else f"{blocks[0]:.3f}–{blocks[1]:.3f}",
                ]
            )
    return _html_table(["forecaster", "interval", "covers", "95 % binomial", "95 % block bootstrap"], rows)


def _charts(metrics: dict[str, Any]) -> list[str]:
    steps = list(range(1, len(metrics["model"]["crps_by_step"]) + 1))
    crps = {NAMES[name]: one["crps_by_step"] for name, one in metrics.items()}
    spread = {name: one for name, one in metrics.items() if one["coverage"] is not None}
    nominal = {NAMES[n]: [one["coverage"][f"{level}"]["value"] for level in INTERVALS] for n, one in spread.items()}
    by_step = {NAMES[n]: one["coverage"]["0.8"]["by_step"] for n, one in spread.items()}
    # A forecaster keeps its colour where others have no line.
    colours = dict(zip(crps, cycle(COLOURS), strict=False))
    charts = [
        line_chart("CRPS by bars ahead", steps, crps, x_label="bars ahead", colours=colours),
        line_chart(
            "Coverage: nominal and actual", INTERVALS, nominal, diagonal=True, x_label="nominal", colours=colours
        ),
        line_chart("Coverage of the 80 % interval", steps, by_step, x_label="bars ahead", colours=colours),
    ]
    for name in ("model", "calibrated", "historical_volatility"):
        if name in spread:
            histogram = spread[name]["pit"]["histogram"]
            charts.append(bar_chart(f"PIT: {NAMES[name]}", histogram, expected=1 / len(histogram), x_label="PIT"))
    return charts
