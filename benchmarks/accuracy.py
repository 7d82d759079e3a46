"""What the inexact options cost in accuracy: window policies past max_context, and reduced precision.

    python benchmarks/accuracy.py [--candles FILE.csv] [--windows 24]

Over real candles with the bundled checkpoint. Window policies: the distribution of the next bar from the window that a
policy leaves, against the exact one, teacher-forced: KL divergence in nats, and the share of tokens that the same noise
turns into others. Both: fair CRPS of the close at the horizon, in units of the history's bar-to-bar deviation, from
paths with the same seeds. Results go to benchmarks/results/DATE-accuracy.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pandas as pd
import torch

from cluster.evaluation.scores import crps_of_samples
from model import KronosPredictor
from model.frames import normalise, series_from_frame
from model.registry import BUNDLED, load_checkpoint
from model.types import COLUMNS, Sampling, Series

CONTEXT = 256
HORIZON = 48
SAMPLES = 20
GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "candles.npz"


def read_bars(path: Path | None) -> pd.DataFrame:
    if path is not None:
        return pd.read_csv(path, parse_dates=["timestamps"])
    stored = np.load(GOLDEN)
    frame = pd.DataFrame(stored["candles"], columns=list(COLUMNS))
    return frame.assign(timestamps=pd.to_datetime(stored["timestamps"], unit="s"))


@torch.inference_mode()
def next_bar(predictor: KronosPredictor, series: Series, dropped: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of s1 and s2 (given the true s1) of the bar after the window, whose first `dropped` bars are left out."""
    x, _, _ = normalise(series.candles, 5)
    s1, s2 = predictor.tokenizer.encode(torch.from_numpy(np.ascontiguousarray(x))[None], half=True)
    marks = torch.from_numpy(series.marks)[None]
    window = slice(len(x) - 1 - CONTEXT + dropped, len(x) - 1)
    context = predictor.model.context(s1[:, window], s2[:, window], marks[:, window])
    return predictor.model.next_s1_logits(context)[0], predictor.model.next_s2_logits(context, s1[:, -1])[0]


def policy_divergence(predictor: KronosPredictor, series: list[Series], drops: list[int]) -> dict[str, float]:
    """Means over series and numbers of dropped bars."""
    sums = {"kl_s1": 0.0, "kl_s2": 0.0, "flips_s1": 0.0, "flips_s2": 0.0}
    generator = torch.Generator().manual_seed(0)
    for one in series:
        exact = next_bar(predictor, one, 0)
        for dropped in drops:
            cheap = next_bar(predictor, one, dropped)
            for head, (a, b) in zip(("s1", "s2"), zip(exact, cheap, strict=True), strict=True):
                p, q = a.log_softmax(-1), b.log_softmax(-1)
                noise = torch.empty(64, len(p)).exponential_(generator=generator)
                flips = ((p.exp() / noise).argmax(-1) != (q.exp() / noise).argmax(-1)).float().mean()
                sums[f"kl_{head}"] += float((p.exp() * (p - q)).sum())
                sums[f"flips_{head}"] += float(flips)
    return {name: round(total / len(series) / len(drops), 5) for name, total in sums.items()}


def crps(predictor: KronosPredictor, series: list[Series], actual: np.ndarray, window: str) -> float:
    """Mean over series of the CRPS of the last close, in units of sqrt(horizon) × the bar-to-bar deviation."""
    scores = []
    for i, (one, close) in enumerate(zip(series, actual, strict=True)):
        paths = predictor.forecast_series(one, Sampling(top_p=1.0, samples=SAMPLES, seed=i), window=window)
        scale = np.diff(one.candles[:, 3]).std() * HORIZON**0.5
        scores.append(float(crps_of_samples(paths.values[:, -1, 3], close)) / scale)
    return float(np.mean(scores))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candles", type=Path)
    parser.add_argument("--windows", type=int, default=24)
    options = parser.parse_args()
    bars = read_bars(options.candles)
    starts = np.linspace(0, len(bars) - CONTEXT - HORIZON, options.windows).astype(int)
    times = bars.timestamps
    series = [
        series_from_frame(bars[s : s + CONTEXT], times[s : s + CONTEXT], times[s + CONTEXT : s + CONTEXT + HORIZON])
        for s in starts
    ]
    longer = [
        series_from_frame(
            bars[s : s + CONTEXT + 1], times[s : s + CONTEXT + 1], times[s + CONTEXT + 1 : s + CONTEXT + 2]
        )
        for s in starts
    ]
    actual = bars.close.to_numpy()[starts + CONTEXT + HORIZON - 1]
    checkpoint = load_checkpoint(BUNDLED)

    def predictor(precision: str) -> KronosPredictor:
        return KronosPredictor(checkpoint.model, checkpoint.tokenizer, "cpu", max_context=CONTEXT, precision=precision)

    exact = predictor("fp32")
    rows: list[dict[str, Any]] = []
    for window, drops in (("exact", [0]), ("hop:4", [1, 2, 3]), ("hop:16", [4, 8, 12, 15]), ("fit", [12, 24, 36, 47])):
        row = {"window": window, **policy_divergence(exact, longer, drops)}
        rows.append(row | {"crps": round(crps(exact, series, actual, window), 4)})
        print(json.dumps(rows[-1]), flush=True)
    greedy = [exact.forecast_series(one, Sampling(temperature=0)).tokens[0] for one in series]
    for precision in ("fp32", "bf16", "int8"):
        reduced = predictor(precision)
        if reduced.precision_warning is not None:
            print(f"{precision} is left out: {reduced.precision_warning}", flush=True)
            continue
        tokens = [reduced.forecast_series(one, Sampling(temperature=0)).tokens[0] for one in series]
        same = np.array([(a == b).all(axis=1) for a, b in zip(tokens, greedy, strict=True)])
        rows.append(
            {
                "precision": precision,
                "greedy_first_bar_equal": round(float(same[:, 0].mean()), 3),
                "greedy_bars_equal": round(float(same.mean()), 3),
                "crps": round(crps(reduced, series, actual, "exact"), 4),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    result = {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/accuracy.py " + ("--candles FILE " if options.candles else ""),
        "checkpoint": checkpoint.model_version,
        "windows": len(series),
        "context": CONTEXT,
        "horizon": HORIZON,
        "samples": SAMPLES,
        "rows": rows,
    }
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    (folder / f"{result['date']}-accuracy.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
