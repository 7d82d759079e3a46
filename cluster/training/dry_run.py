"""A run in small before the run at large: same data, networks and code, two steps a phase, in this process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cluster.candles.bars import SymbolBars
from cluster.data import SplitBars, load_splits
from cluster.train import train
from cluster.training.config import RAY_ONLY, STAGES, TrainConfig
from cluster.training.config_file import parse_config
from cluster.training.loggers import logger_packages
from model.checkpoint import WEIGHTS_FILE
from model.errors import KronosError
from model.kronos import Kronos
from model.predictor import KronosPredictor
from model.registry import network_folder, sha256_of
from model.tokenizer import KronosTokenizer
from model.types import Sampling, Series

STEPS = 2
VALIDATION_WINDOWS = 8
HISTORY, HORIZON = 64, 4


def dry_run(config: TrainConfig) -> Iterator[str]:
    """Yields a line for each thing that has worked; raises what the run would raise. Leaves no files."""
    since = time.monotonic()
    logger_packages(config.logging)  # they are there; a trial is no run to show to a tracking server
    with tempfile.TemporaryDirectory(prefix="kronos-dry-run-") as folder:
        small = _small(config, Path(folder))
        splits = load_splits(small.data)
        sizes = ", ".join(f"{name} {_own_bars(split):,} bars" for name, split in splits.items())
        yield f"data: {len(splits['train'].series)} symbols, {sizes}"
        made = train(small, command="dry run")
        yield f"trained {STEPS} steps a phase of {', '.join(made)}, saved"
        digests = {stage: sha256_of(path / WEIGHTS_FILE) for stage, path in made.items()}
        again = train(small, command="dry run")
        if digests != {stage: sha256_of(path / WEIGHTS_FILE) for stage, path in again.items()}:
            raise KronosError("the checkpoint that was read back gives other weights than the one that was saved")
        yield "reloaded: the weights are the same"
        yield _use(small, made, max(splits["validation"].series, key=len))
    yield f"dry run: ok, {time.monotonic() - since:.1f} s"


def _own_bars(split: SplitBars) -> int:
    """Bars that the split may score; a later split also reads those before it."""
    return sum(max(0, len(bars) - split.first_scored(bars)) for bars in split.series)


def _small(config: TrainConfig, folder: Path) -> TrainConfig:
    """Two steps of every phase, since each has a window and a batch of its own, and little validation; without Ray."""
    raw = config.model_dump(mode="json")
    raw["run"] |= {"storage": str(folder / "runs"), "output": str(folder / "out")}
    raw["logging"]["loggers"] = []
    if raw["data"]["source"].get("cache") is not None:
        raw["data"]["source"]["cache"] = str(folder / "cache")
    on_ray = raw["training"]["num_workers"] != 0
    if on_ray:  # the GPUs are the cluster's, and need not be this machine's
        raw["training"] |= {"num_workers": 0, "require_gpu": False}
    for key in RAY_ONLY:
        if on_ray or key not in config.training.without_effect:
            del raw["training"][key]
    for stage in STAGES:
        if raw[stage] is None:
            continue
        phases = [phase | {"steps": STEPS} for phase in raw[stage]["phases"]]
        steps = STEPS * len(phases)
        warmup = min(raw[stage]["optimisation"]["warmup_steps"], steps - 1)
        raw[stage] |= {
            "phases": phases,
            "optimisation": raw[stage]["optimisation"] | {"warmup_steps": warmup},
            "validate_every": steps,
            "validation_windows": VALIDATION_WINDOWS,
            "log_every": 1,
        }
    return parse_config(raw)


def _use(config: TrainConfig, made: dict[str, Path], bars: SymbolBars) -> str:
    """Forecasts the last bars of a series with the pair; with a tokenizer alone it must load."""
    named = made.get("tokenizer") or (config.predictor and config.predictor.tokenizer)
    tokenizer = KronosTokenizer.from_pretrained(network_folder(str(named), "tokenizer"))
    if "predictor" not in made:
        return f"loaded the tokenizer: {tokenizer.s1_bits} + {tokenizer.s2_bits} bits"
    predictor = KronosPredictor(Kronos.from_pretrained(made["predictor"]), tokenizer, device=config.training.device)
    first = max(0, len(bars) - HORIZON - HISTORY)
    history, marks = bars.candles[first:-HORIZON], bars.marks[first:]
    series = Series(history, marks[:-HORIZON], marks[-HORIZON:])
    paths = predictor.forecast_series(series, Sampling(samples=1, seed=0)).values
    if not np.isfinite(paths).all():
        raise KronosError("the forecast of one window is not finite")
    return f"forecast {HORIZON} bars from {len(history)}: close {paths[0, -1, 3]:.6g} after {history[-1, 3]:.6g}"
