"""Compares models of a running server with each other and with the baselines, over HTTP, on candles it has not seen.

    python examples/compare_http.py CANDLES.csv --from 2024-08-19T13:50:00 --models kronos-bundled kronos-mine

CANDLES.csv: columns timestamps, open, high, low, close, volume, amount, oldest first. Prints the CRPS of the close (in
units of the history's root mean square one-bar move; lower is better), its ratio to historical volatility with a 90 %
interval, and the coverage of the 80 % interval. `python -m cluster.evaluate` does it thoroughly; this asks the server.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

from cluster.evaluation.baselines import drift, random_walk
from cluster.evaluation.scores import INTERVALS, Draws, Predictive, paired_ratio
from serve_app.client import KronosClient

COLUMNS = ("open", "high", "low", "close", "volume", "amount")
EIGHTY = INTERVALS.index(0.8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candles", type=Path)
    parser.add_argument("--from", dest="begin", required=True, type=pd.Timestamp, help="first bar that may be forecast")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--history", type=int, default=256)
    parser.add_argument("--horizon", type=int, default=24)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--every", type=int, default=6, help="bars between two forecasts")
    options = parser.parse_args()

    bars = pd.read_csv(options.candles, parse_dates=["timestamps"])
    first = max(options.history, int(bars.timestamps.searchsorted(options.begin)))
    origins = range(first, len(bars) - options.horizon + 1, options.every)
    if not len(origins):
        parser.error(f"no forecast of {options.horizon} bars fits between --from and the end of {options.candles}")
    windows = [bars[origin - options.history : origin + options.horizon] for origin in origins]
    history, horizon = options.history, options.horizon
    closes = [window.close.to_numpy() for window in windows]
    forecasts: dict[str, list[Predictive]] = {
        "historical volatility": [random_walk(close[:history], horizon) for close in closes],
        "drift": [drift(close[:history], horizon) for close in closes],
    }
    with KronosClient(options.url) as client:
        for model in options.models:
            asked = [_paths(client, model, number, window, options) for number, window in enumerate(windows)]
            forecasts[model] = [Draws(paths) for paths in asked]

    print(f"{len(windows)} forecasts of {horizon} bars from {history}, {options.samples} paths")
    actual = [close[history:] for close in closes]
    unit = np.array([random_walk(close[:history], 1).std[0] for close in closes])
    reference = None
    for name, made in forecasts.items():
        crps = np.array([one.crps(path).mean() for one, path in zip(made, actual, strict=True)]) / unit
        inside = np.mean([one.covered(path)[EIGHTY] for one, path in zip(made, actual, strict=True)])
        reference = crps if reference is None else reference
        ratio = paired_ratio(crps, reference)
        interval = f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
        print(f"{name:<24} CRPS {crps.mean():.3f}  ratio {interval}  80 % interval covers {inside:.2f}")


def _paths(
    client: KronosClient, model: str, number: int, window: pd.DataFrame, options: argparse.Namespace
) -> np.ndarray:
    """Closes of the paths that the server draws for one window [S, H]."""
    history = window[: options.history]
    times = [moment.isoformat() for moment in window.timestamps]
    series = {name: history[name].tolist() for name in COLUMNS if name in history}
    series |= {"timestamps": times[: options.history], "future_timestamps": times[options.history :]}
    answer = client.forecast(
        [series], model=model, samples=options.samples, temperature=1.0, top_p=1.0, seed=number, return_paths=True
    )
    return np.array([path["close"] for path in answer["series"][0]["paths"]])


if __name__ == "__main__":
    main()
