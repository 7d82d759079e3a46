"""The engine against the public implementation: the same weights, threads and forecasts, in one run.

    make bench ARGS="--reference PATH_OF_A_PUBLIC_CHECKOUT"
    python benchmarks/engine.py --reference PATH [--shapes small,mini] [--variants fp32,compiled,int8]

The public implementation takes minutes for a long forecast, so its time is put together from measured parts: single
steps at three window lengths, between which the cost is interpolated, and the tokenizer once. `check` runs one forecast
whole beside its estimate. Both sides alternate; figures are medians; ratio = public time / ours. Without --reference
only our times are measured. "compiled" is fp32, and "bf16-compiled" bf16, with KronosPredictor's compile=True; a
variant that this machine cannot compute is left out and named. On a GPU the variants are fp32, bf16, and both without
CUDA graphs.

Results go to benchmarks/results/DATE-engine-DEVICE.json with the command that made them; those of some shapes only,
which have no mixed stream, to a file that names the shapes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from benchmarks.shapes import CONTEXT, random_pair, random_series, save_pair
from model.device import device_info, precision_obstacle, resolve_device
from model.engine.engine import Engine
from model.engine.packing import packed
from model.engine.types import EngineConfig, Request, WindowPolicy
from model.predictor import COMPILED_ROWS
from model.types import Sampling

RESULTS = Path(__file__).parent / "results"
ALL_SHAPES = "small,mini,base"

VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "compiled": {"precision": "fp32", "compile_rows": COMPILED_ROWS},
    "bf16": {"precision": "bf16"},
    "bf16-compiled": {"precision": "bf16", "compile_rows": COMPILED_ROWS},
    "int8": {"precision": "int8"},
    "fp32-eager": {"precision": "fp32", "graphs": False},
    "bf16-eager": {"precision": "bf16", "graphs": False},
}

CASES = [
    # shape, history, horizon, series, samples, window policy
    ("small", 400, 112, 1, 1, "exact"),
    ("small", 400, 112, 1, 5, "exact"),
    ("small", 400, 112, 1, 30, "exact"),
    ("small", 400, 112, 8, 1, "exact"),
    ("small", 400, 112, 8, 5, "exact"),
    ("small", 400, 120, 1, 1, "exact"),
    ("small", 400, 120, 1, 1, "hop:16"),
    ("small", 400, 240, 1, 1, "exact"),
    ("small", 400, 240, 1, 1, "hop:16"),
    ("mini", 400, 112, 1, 1, "exact"),
    ("mini", 400, 112, 1, 30, "exact"),
    ("mini", 1900, 112, 1, 1, "exact"),
    ("base", 400, 112, 1, 1, "exact"),
]


class PublicImplementation:
    """Times of the public code, from a worker process."""

    def __init__(self, checkout: str, weights: Path, threads: int) -> None:
        command = [sys.executable, str(Path(__file__).with_name("reference_worker.py"))]
        self._process = subprocess.Popen(
            [*command, checkout, str(weights), str(threads)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def seconds(self, **job: int) -> float:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def estimate(self, rows: int, history: int, horizon: int, max_context: int) -> float:
        """A forecast's time from its parts: every step at its window's length, interpolated between three lengths."""
        windows = [min(history + i, max_context) for i in range(horizon)]
        lengths = sorted({windows[0], windows[len(windows) // 2], windows[-1]})
        # One step before the measured one warms the caches up, as the steps of a loop do.
        measured = [min(self.seconds(rows=rows, window=length) for _ in range(2)) for length in lengths]
        steps = float(np.interp(windows, lengths, measured).sum())
        return steps + self.seconds(rows=rows, encode=history) + self.seconds(rows=rows, decode=windows[-1])

    def close(self) -> None:
        self._process.communicate()


def our_seconds(engine: Engine, history: int, horizon: int, series: int, samples: int, window: str) -> float:
    requests = [
        Request(random_series(history, horizon, i), Sampling(samples=samples, seed=i), WindowPolicy.parse(window))
        for i in range(series)
    ]
    started = time.perf_counter()
    engine.run(requests)
    return time.perf_counter() - started


def variants_of(names: str, device: torch.device) -> list[str]:
    """The variants that the device can compute, in their order."""
    chosen = []
    for name in names.split(","):
        settings = VARIANTS[name]
        if "graphs" in settings and device.type != "cuda":
            continue  # there it is what the plain variant is
        obstacle = precision_obstacle(settings["precision"], device)
        if obstacle is None and "compile_rows" in settings and device.type != "cpu":
            obstacle = "torch.compile is for the CPU"
        if obstacle is None:
            chosen.append(name)
        else:
            print(f"{name} is left out: {obstacle}", flush=True)
    return chosen


def compare(options: argparse.Namespace, shape: str, device: torch.device) -> list[dict[str, Any]]:
    """All cases of one shape, public and ours in turn."""
    model, tokenizer = random_pair(shape)
    model, tokenizer = model.to(device), tokenizer.to(device)
    engines = {
        variant: Engine(
            model,
            tokenizer,
            EngineConfig(max_context=CONTEXT[shape], cache_bytes=2**31, max_rows=256, **VARIANTS[variant]),
            device,
        )
        for variant in variants_of(options.variants, device)
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_pair(shape, Path(folder))
        public = PublicImplementation(options.reference, Path(folder), options.threads) if options.reference else None
        for _, history, horizon, series, samples, window in [case for case in CASES if case[0] == shape]:
            public_times: list[float] = []
            times: dict[str, list[float]] = {variant: [] for variant in engines}
            for engine in engines.values():
                # Kernels are made for every new shape; the public side's steps are warmed up likewise.
                our_seconds(engine, history, 2, series, samples, window)
            for _ in range(options.repeat):
                if public:
                    public_times.append(public.estimate(series * samples, history, horizon, CONTEXT[shape]))
                for variant, engine in engines.items():
                    times[variant].append(our_seconds(engine, history, horizon, series, samples, window))
            row: dict[str, Any] = {
                "case": f"{shape} {history}/{horizon}, {series} × {samples}, {window}",
                "public_s": round(statistics.median(public_times), 3) if public else None,
            }
            for variant, seconds in times.items():
                row[f"{variant}_s"] = round(statistics.median(seconds), 4)
                if public:
                    row[f"{variant}_ratio"] = round(row["public_s"] / statistics.median(seconds), 1)
            rows.append(row)
            print(json.dumps(row), flush=True)
        if public:
            whole = public.seconds(rows=1, history=400, horizon=24, max_context=512)
            row = {"case": f"check: {shape} 400/24 whole, estimate", "whole_s": round(whole, 2)}
            row["estimate_s"] = round(public.estimate(1, 400, 24, 512), 2)
            rows.append(row)
            print(json.dumps(row), flush=True)
            public.close()
    return rows


def machine_limits(device: torch.device) -> dict[str, float]:
    """What the machine can do at best, measured now: fp32 matrix products and reading memory."""

    def best(run: Callable[[], object], repeat: int = 5) -> float:
        seconds = []
        for _ in range(repeat):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    a = torch.randn(1536, 1536, device=device)
    # The engine's packed layers pass torch's own matrix product, so the limit is the better of the two.
    linear = packed(torch.nn.Sequential(torch.nn.Linear(1536, 1536, bias=False, device=device)), "fp32", device)
    memory = torch.randn(100 * 2**20, device=device)
    return {
        "gemm_gflops": round(2 * 1536**3 / min(best(lambda: a @ a), best(lambda: linear(a))) / 1e9, 1),
        "read_gb_per_s": round(4 * memory.numel() / best(lambda: float(memory.sum())) / 1e9, 1),
    }


def shares_of_limits(limits: dict[str, float], device: torch.device) -> list[dict[str, Any]]:
    """Kronos-small: what prefill reaches of the matrix peak, and a decode step of one row of the memory's speed."""
    model, tokenizer = random_pair("small")
    engine = Engine(model.to(device), tokenizer.to(device), EngineConfig(cache_bytes=2**30), device)
    our_seconds(engine, 64, 2, 1, 1, "exact")
    weights = sum(p.numel() for block in (model.transformer, model.dep_layer, model.head) for p in block.parameters())
    prefill, one, two = (
        statistics.median(our_seconds(engine, *shape, 1, 1, "exact") for _ in range(5))
        for shape in ((400, 1), (400, 33), (400, 97))
    )
    step = (two - one) / 64
    layers, width = 8, 512
    attention = 400 * 400 * width * 2 * layers
    gflops = (2 * weights * 400 + attention) / prefill / 1e9
    read = (4 * weights + 4 * 450 * width * 2 * (layers + 1)) / step / 1e9
    return [
        {
            "what": "prefill of 400 bars with tokenizer, % of measured fp32 GEMM",
            "value": round(100 * gflops / limits["gemm_gflops"], 1),
        },
        {
            "what": "decode step of one row, % of measured memory read",
            "value": round(100 * read / limits["read_gb_per_s"], 1),
        },
        {"what": "decode steps/s at one row", "value": round(1 / step, 1)},
    ]


def mixed_stream(device: torch.device) -> dict[str, Any]:
    """64 requests of many shapes: all at once, against one after another, through the same engine."""
    model, tokenizer = random_pair("small")
    engine = Engine(model.to(device), tokenizer.to(device), EngineConfig(cache_bytes=2**31), device)
    rng = np.random.default_rng(0)
    shapes = [(int(rng.integers(64, 481)), int(rng.integers(8, 97)), int(rng.integers(1, 9))) for _ in range(64)]

    def requests() -> list[Request]:
        return [
            Request(random_series(history, min(horizon, 512 - history + 1), i), Sampling(samples=samples, seed=i))
            for i, (history, horizon, samples) in enumerate(shapes)
        ]

    batch = requests()
    started = time.perf_counter()
    engine.run(batch)
    together = time.perf_counter() - started
    batch = requests()
    started = time.perf_counter()
    for request in batch:
        engine.run([request])
    alone = time.perf_counter() - started
    return {"together_s": round(together, 2), "one_by_one_s": round(alone, 2), "ratio": round(alone / together, 2)}


def stall(device: torch.device) -> dict[str, Any]:
    """The longest time between two bars of a running forecast while long histories join and windows slide beside it."""
    result = {}
    for shape in ("small", "base"):
        model, tokenizer = random_pair(shape)
        engine = Engine(model.to(device), tokenizer.to(device), EngineConfig(cache_bytes=2**31), device)
        our_seconds(engine, 400, 4, 1, 1, "exact")
        times: list[float] = []

        def note(step: int, times: list[float] = times) -> None:
            times.append(time.monotonic())

        running = Request(random_series(64, 100, 0), Sampling(seed=0), on_step=note)
        others = [Request(random_series(480, 40, i), Sampling(seed=i)) for i in (1, 2)]
        engine.submit([running])
        while len(times) < 20:
            engine.step()
        alone = statistics.median(np.diff(times))
        engine.submit(others)
        engine.wait([running])
        for request in others:
            request.should_stop = lambda: True
        engine.step()
        gaps = np.diff(times)[20:]
        result[shape] = {
            "ms per bar alone": round(1000 * float(alone), 1),
            "longest ms between bars": round(1000 * float(max(gaps)), 1),
            "median ms between bars": round(1000 * float(statistics.median(gaps)), 1),
        }
    return result


def step_rates(device: torch.device) -> list[dict[str, Any]]:
    """Steps and rows a second of Kronos-small at several numbers of rows, with and without CUDA graphs."""
    model, tokenizer = random_pair("small")
    model, tokenizer = model.to(device), tokenizer.to(device)
    table = []
    for variant in variants_of("fp32,bf16,fp32-eager,bf16-eager", device):
        engine = Engine(model, tokenizer, EngineConfig(cache_bytes=2**33, max_rows=1024, **VARIANTS[variant]), device)
        for rows in (1, 64, 512):
            our_seconds(engine, 400, 40, 1, rows, "exact")
            long, short = (
                statistics.median(our_seconds(engine, 400, horizon, 1, rows, "exact") for _ in range(3))
                for horizon in (104, 8)
            )
            per_second = 96 / (long - short)
            table.append(
                {"variant": variant, "rows": rows, "steps/s": round(per_second), "rows/s": round(per_second * rows)}
            )
    return table


def plot(table: list[dict[str, Any]], path: Path) -> None:
    """The scaling table as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    for axis, kinds in zip(axes, (("rows of one series", "series of one row"), ("history",)), strict=True):
        for kind in kinds:
            points = [(row[kind], row["ms per bar and row"]) for row in table if kind in row]
            axis.plot(*zip(*points, strict=True), marker="o", label=kind)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_ylabel("ms per bar and row")
        axis.set_xlabel(" / ".join(kinds))
        axis.legend()
        axis.grid(alpha=0.3)
    figure.suptitle("Kronos-small, history 400 (left), one row (right)")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def scaling(device: torch.device) -> list[dict[str, Any]]:
    """Cost of a bar of one path against rows and against history, and the cache that a row takes."""
    model, tokenizer = random_pair("small")
    engine = Engine(
        model.to(device), tokenizer.to(device), EngineConfig(cache_bytes=2**32, max_rows=256, max_context=512), device
    )
    table = []
    for rows in (1, 2, 4, 8, 16, 30, 64, 128):
        long, short = (our_seconds(engine, 400, horizon, 1, rows, "exact") for horizon in (40, 8))
        table.append({"rows of one series": rows, "ms per bar and row": round(1000 * (long - short) / 32 / rows, 3)})
    for rows in (1, 2, 4, 8, 16):
        long, short = (our_seconds(engine, 400, horizon, rows, 1, "exact") for horizon in (40, 8))
        table.append({"series of one row": rows, "ms per bar and row": round(1000 * (long - short) / 32 / rows, 3)})
    for history in (32, 64, 128, 256, 448):
        long, short = (our_seconds(engine, history, horizon, 1, 1, "exact") for horizon in (40, 8))
        table.append({"history": history, "ms per bar and row": round(1000 * (long - short) / 32, 3)})
    first, second = (
        engine._runner.cache_size(Request(random_series(400, 112, 0), Sampling(samples=samples))) for samples in (1, 2)
    )
    table.append({"cache MB of a history of 400": round(4 * (2 * first - second) / 1e6, 2)})
    table.append({"cache MB of a row of 112 bars": round(4 * (second - first) / 1e6, 2)})
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", help="checkout of the public implementation")
    parser.add_argument("--shapes", default=ALL_SHAPES)
    parser.add_argument("--variants", default="fp32,compiled,bf16,bf16-compiled,int8,fp32-eager,bf16-eager")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--skip-scaling", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, warning = resolve_device(options.device)
    if warning:
        print(f"warning: {warning}")
    limits = machine_limits(device)
    print(json.dumps(limits), flush=True)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/engine.py " + " ".join(sys.argv[1:]).replace(options.reference or "\0", "PATH"),
        "device": device_info(device).summary(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": options.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "limits": limits,
        "cases": [row for shape in options.shapes.split(",") for row in compare(options, shape, device)],
    }
    if options.shapes == ALL_SHAPES:
        result |= {
            "mixed_stream": mixed_stream(device),
            "shares": shares_of_limits(limits, device),
            "stall": stall(device),
        }
    RESULTS.mkdir(exist_ok=True)
    part = "" if options.shapes == ALL_SHAPES else "-" + options.shapes.replace(",", "-")
    path = RESULTS / f"{result['date']}-engine-{device.type}{part}.json"
    if device.type == "cuda":
        result["step_rates"] = step_rates(device)
    if not options.skip_scaling:
        result["scaling"] = scaling(device)
        plot(result["scaling"], path.with_suffix(".png"))
    for part in ("mixed_stream", "shares", "stall", "step_rates", "scaling"):
        print(part, json.dumps(result.get(part)))
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {path.relative_to(RESULTS.parents[1])}")


if __name__ == "__main__":
    main()
