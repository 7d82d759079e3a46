"""Forecasts the end of a file of candles over HTTP and plots it against what really happened.

    python examples/forecast_http.py CANDLES.csv [--history 400] [--horizon 120] [--samples 5] [--seed 7]

CANDLES.csv: columns timestamps, open, high, low, close, volume, amount, oldest first. The server must be running
(`make serve`). Writes a PNG: history, median, 10–90 % band, actual.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

from serve_app.client import KronosClient

COLUMNS = ("open", "high", "low", "close", "volume", "amount")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candles", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", help="absent: the server's default model")
    parser.add_argument("--start", type=int, default=0, help="first bar of the history")
    parser.add_argument("--history", type=int, default=400)
    parser.add_argument("--horizon", type=int, default=120)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("out/forecast.png"))
    options = parser.parse_args()

    bars = pd.read_csv(options.candles, parse_dates=["timestamps"])[options.start :].reset_index(drop=True)
    end = options.history + options.horizon
    if len(bars) < end:
        parser.error(f"{options.candles} holds {len(bars)} bars from --start, {end} are needed")
    times = [time.isoformat() for time in bars.timestamps[:end]]
    history = bars[: options.history]
    series = {name: history[name].tolist() for name in COLUMNS if name in history}
    series |= {"timestamps": times[: options.history], "future_timestamps": times[options.history :]}
    settings = {"samples": options.samples, "seed": options.seed, "quantiles": [0.1, 0.5, 0.9], "top_p": 1.0}
    if options.model:
        settings["model"] = options.model

    with KronosClient(options.url) as client:
        answers = []
        for attempt in ("first", "second"):
            started = time.perf_counter()
            answers.append(client.forecast([series], **settings))
            print(f"{attempt} request: {time.perf_counter() - started:.2f} s")
    first, second = (answer["series"][0] for answer in answers)
    print(f"same seed, equal numbers: {first == second}")
    print(f"model {answers[0]['model']['id']} on {answers[0]['device']}, warning: {answers[0]['device_warning']}")
    print(f"summary: {first['summary']}")
    plot(bars[:end], options.history, first, options.output)
    print(f"plot: {options.output}")


def plot(bars: pd.DataFrame, history: int, forecast: dict, output: Path) -> None:
    """History, median, 10–90 % band and what happened; x counts bars, so that nights leave no gap."""
    past, future = range(history), range(history, len(bars))
    bands = {level: forecast["quantiles"][level]["close"] for level in ("0.1", "0.5", "0.9")}
    figure, axes = plt.subplots(figsize=(11, 4.5), layout="constrained")
    axes.plot(past, bars.close[:history], color="#444444", linewidth=1, label="history")
    axes.fill_between(future, bands["0.1"], bands["0.9"], color="#1f77b4", alpha=0.2, label="10–90 %")
    axes.plot(future, bands["0.5"], color="#1f77b4", linewidth=1.5, label="median")
    axes.plot(future, bars.close[history:], color="#d62728", linewidth=1, label="actual")
    ticks = range(0, len(bars), max(1, len(bars) // 8))
    axes.set_xticks(list(ticks), [f"{bars.timestamps[i]:%m-%d %H:%M}" for i in ticks])
    axes.set_ylabel("close")
    axes.legend(loc="upper left", frameon=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    main()
