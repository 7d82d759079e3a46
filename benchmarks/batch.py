"""Batch forecasts against the engine alone on the same symbols, and with two actors against one. CPU, one thread each.

    make batch-bench ARGS="[--shape small] [--symbols 64] [--samples 30] [--horizon 24] [--repeat 3] [--quick]"

The engine's side is one process that has the histories in memory and hands all of them to forecast_many; the batch's
side reads Parquet, computes in actors and writes Parquet. Rates are symbols a second from the first actor's first call
on: what starting costs is a column of its own. Both sides alternate; figures are medians.

Results go to benchmarks/results/DATE-batch-SHAPE-cpu.json, of which benchmarks/capacity.py makes the tables of
docs/capacity.md; a quick run only prints.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import pandas as pd
import ray
import torch

from benchmarks.records import table, write
from benchmarks.shapes import CONTEXT, random_frame, save_pair
from cluster.batch import run_batch
from cluster.batching.config import BatchConfig
from cluster.batching.files import Layout
from cluster.batching.forecaster import CPU_ROWS, Work, cache_bytes, symbol_seed
from cluster.batching.symbols import HistoryRules, symbol_history
from model.predictor import KronosPredictor
from model.registry import CheckpointSource, load_checkpoint
from model.types import Sampling


def write_bars(folder: Path, symbols: int, history: int) -> Path:
    """One long table of random walks; a third of the symbols have half the history."""
    frames = []
    for number in range(symbols):
        bars = history if number % 3 else history // 2
        frames.append(random_frame(bars, number).assign(symbol=f"S{number:06d}"))
    path = folder / "bars.parquet"
    pd.concat(frames, ignore_index=True).to_parquet(path)
    return path


def engine_rate(config: BatchConfig, bars: Path) -> float:
    """Symbols a second of the engine alone, in this process, with the settings that an actor has."""
    checkpoint = load_checkpoint(config.model)
    work = Work(
        config.model, checkpoint.sha256, config.rules, Layout(), config.sampling, (), False, "exact", "fp32", "cpu", 1
    )
    device = torch.device("cpu")
    predictor = KronosPredictor(
        checkpoint.model,
        checkpoint.tokenizer,
        device,
        config.model.max_context,
        precision="fp32",
        cache_bytes=cache_bytes(checkpoint.model, work, device),
        max_rows=CPU_ROWS,
        throughput=True,
    )
    batch = []
    for symbol, frame in pd.read_parquet(bars).groupby("symbol"):
        history = symbol_history(str(symbol), [frame.reset_index(drop=True)], Layout(), config.rules)
        seed = symbol_seed(0, str(symbol))
        batch.append((history.series, Sampling(samples=config.sampling.samples, seed=seed)))
    predictor.forecast_many(batch[:1])  # makes the engine
    started = time.perf_counter()
    results = predictor.forecast_many(batch)
    seconds = time.perf_counter() - started
    if failed := [result for result in results if isinstance(result, Exception)]:
        raise failed[0]
    return len(batch) / seconds


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    save_pair(options.shape, folder / "weights")
    bars = write_bars(folder, options.symbols, options.history)
    source = CheckpointSource("random", str(folder / "weights"), max_context=CONTEXT[options.shape])
    sides: dict[str, list[float]] = {"engine alone": [], "batch, 1 actor": [], "batch, 2 actors": []}
    started: dict[int, list[float]] = {1: [], 2: []}
    sizes = []
    for turn in range(options.repeat):
        for actors in (1, 2):
            output = folder / f"out-{turn}-{actors}"
            config = BatchConfig(
                (str(bars),),
                output,
                source,
                HistoryRules(options.horizon),
                Sampling(samples=options.samples, seed=0),
                precision="fp32",
                device="cpu",
                actors=actors,
            )
            if actors == 1:
                sides["engine alone"].append(engine_rate(config, bars))
            summary = run_batch(config)
            if summary.errors or summary.computed != options.symbols:
                raise RuntimeError(f"{summary.errors} symbols failed, {summary.computed} were computed")
            sides[f"batch, {actors} actor{'s' if actors > 1 else ''}"].append(summary.computed / summary.forecast_s)
            started[actors].append(summary.seconds - summary.forecast_s)
            sizes.append(sum(part.stat().st_size for part in output.glob("part-*")))
    engine, one, two = (statistics.median(rates) for rates in sides.values())
    symbols = f"{options.symbols} symbols × {options.samples}"
    return [
        {
            "case": f"{options.shape} {options.history}/{options.horizon}, {symbols}",
            "shape": options.shape,
            "engine symbols/s": round(engine, 3),
            "1 actor symbols/s": round(one, 3),
            "1 actor / engine": round(one / engine, 3),
            "2 actors symbols/s": round(two, 3),
            "2 actors / 1 actor": round(two / one, 3),
            "start s": round(statistics.median(started[1] + started[2]), 1),
            "input bytes a symbol": round(bars.stat().st_size / options.symbols),
            "output bytes a symbol": round(statistics.median(sizes) / options.symbols),
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=list(CONTEXT))
    parser.add_argument("--symbols", type=int, default=64)
    parser.add_argument("--history", type=int, default=400, help="bars; a third of the symbols have half of it")
    parser.add_argument("--horizon", type=int, default=24)
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="mini, 16 symbols, once: shows that it runs")
    options = parser.parse_args()
    if options.quick:
        options.shape, options.symbols, options.repeat = "mini", 16, 1
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(options, Path(folder))
    finally:
        ray.shutdown()
    print(table([{key: value for key, value in row.items() if key != "shape"} for row in rows]))
    facts = {"torch": torch.__version__, "threads": 1, "repeat": options.repeat, "setting": vars(options)}
    if not options.quick:
        print(f"written to {write(f'batch-{options.shape}-cpu', rows, **facts)}")


if __name__ == "__main__":
    main()
