"""What one batch forecast is asked to do: the command line, and what is refused before a file is opened."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.batching.files import Layout
from cluster.batching.plan import SPREAD_BYTES
from cluster.batching.symbols import HistoryRules
from model.calendars import CalendarError, parse_freq, require_known
from model.device import PRECISIONS
from model.engine.types import WindowPolicy
from model.errors import InputError
from model.registry import CheckpointSource, named_source
from model.sampler import check_sampling
from model.types import Sampling


@dataclass(frozen=True)
class BatchConfig:
    """One batch forecast. The names are those of the command line; see --help for what each means."""

    input: tuple[str, ...]
    output: Path
    model: CheckpointSource
    rules: HistoryRules
    sampling: Sampling = field(default_factory=lambda: Sampling(samples=30, seed=0))
    quantiles: tuple[float, ...] = (0.1, 0.5, 0.9)
    paths: bool = False
    window: str = "exact"
    precision: str = "auto"
    layout: Layout = field(default_factory=Layout)
    device: str = "auto"
    actors: int | None = None
    num_cpus: float = 1.0
    num_gpus: float = 1.0
    symbols_per_part: int | None = None
    ray_address: str | None = None
    spread_bytes: int = SPREAD_BYTES


def check(config: BatchConfig) -> None:
    """Everything that can be refused before a file is opened. Raises InputError."""
    check_sampling(config.sampling)
    for name, value in (("--horizon", config.rules.horizon), ("--min-history", config.rules.shortest)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}", code="bad_size")
    if config.rules.history is not None and config.rules.history < config.rules.shortest:
        raise InputError(
            f"--history {config.rules.history} is less than --min-history {config.rules.shortest}", code="bad_size"
        )
    if config.symbols_per_part is not None and config.symbols_per_part < 1:
        raise InputError("--symbols-per-part must be at least 1", code="bad_size")
    for level in config.quantiles:
        if not 0 <= level <= 1:
            raise InputError(f"--quantiles: {level:g} must lie between 0 and 1", code="invalid_quantile")
    if len({f"{level:g}" for level in config.quantiles}) < len(config.quantiles):
        raise InputError("--quantiles names a level twice", code="invalid_quantile")
    policy = WindowPolicy.parse(config.window)
    if policy.name == "fit" and config.rules.horizon > config.model.max_context:
        raise InputError(
            f"--window fit needs a horizon of at most {config.model.max_context} bars: use exact or hop:16",
            code="invalid_window",
        )
    try:
        if config.rules.freq is not None:
            parse_freq(config.rules.freq)
        if config.rules.calendar is not None:
            require_known(config.rules.calendar)
    except CalendarError as error:
        raise InputError(f"--{error.field}: {error}", code=error.code) from None


def parse_arguments(arguments: Sequence[str] | None, description: str | None) -> BatchConfig:
    """The command line. Exits with 2 and a usage line for what it does not know; raises InputError for bad values."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.batch", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="PATH", help="CSV or Parquet files, folders of them, or globs")
    add("--output", required=True, type=Path, help="folder for the forecasts; the same again resumes")
    add("--model", default="bundled", help="bundled, kronos-mini | -small | -base, a bundle's folder, or a Hub repo")
    add("--tokenizer", help="folder or Hub repository, where the model does not bring one")
    add("--revision", help="of the model's Hub repository")
    add("--tokenizer-revision", help="of the tokenizer's Hub repository")
    add("--max-context", type=int, help="bars that the model sees at once; default: the model's, or 512")
    add("--horizon", type=int, required=True, help="bars to forecast")
    add("--samples", type=int, default=30, help="paths a symbol")
    add("--history", type=int, help="use the latest N bars only; default: all there are")
    add("--min-history", type=int, default=HistoryRules.shortest, help="fewer bars are an error of the symbol")
    add("--quantiles", default="0.1,0.5,0.9", help="levels, separated by commas; '' for none")
    add("--paths", action="store_true", help="also write every path, as list columns")
    add("--seed", type=int, default=0, help="with it and a symbol's name its paths are the same in any run")
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top-p", type=float, default=0.9, help="1 is off")
    add("--top-k", type=int, default=0, help="0 is off; else top-p is ignored")
    add("--freq", "--bar", help="bar size, such as 5min or 1d; default: each history's own")
    add("--calendar", help="exchange calendar (XNYS, XSHG, …) or 24/7, where histories have gaps")
    add("--window", default="exact", help="past the model's context: exact, hop:K or fit")
    add("--precision", default="auto", choices=("auto", *PRECISIONS), help="what the device lacks falls back, visibly")
    add("--time-column", default=Layout.time, help="name of the column with the times")
    add("--symbol-column", default=Layout.symbol, help="name of the column with the symbols")
    add("--device", default="auto", help="auto (GPUs where the cluster has them), cuda, cpu or mps")
    add("--actors", type=int, help="default: as many as fit into the cluster now")
    add("--num-cpus", type=float, default=1.0, help="CPUs, and torch threads, of an actor")
    add("--num-gpus", type=float, default=1.0, help="GPUs of an actor where there are any; 0.5 puts two on one")
    add("--symbols-per-part", type=int, help="symbols that are computed and written together; default: by --samples")
    add("--ray-address", help="Ray cluster to join; default: a private one on this machine")
    given = parser.parse_args(arguments)
    try:
        quantiles = tuple(float(level) for level in given.quantiles.split(",") if level.strip())
    except ValueError:
        raise InputError(
            f"--quantiles {given.quantiles!r} must be numbers separated by commas", code="bad_list"
        ) from None
    if given.max_context is not None and given.max_context < 1:
        raise InputError("--max-context must be at least 1", code="bad_size")
    return BatchConfig(
        input=tuple(given.input),
        output=given.output,
        model=named_source(
            given.model,
            tokenizer=given.tokenizer,
            revision=given.revision,
            tokenizer_revision=given.tokenizer_revision,
            max_context=given.max_context,
        ),
        rules=HistoryRules(given.horizon, given.history, given.min_history, given.freq, given.calendar),
        sampling=Sampling(given.temperature, given.top_k, given.top_p, given.samples, given.seed),
        quantiles=quantiles,
        paths=given.paths,
        window=given.window,
        precision=given.precision,
        layout=Layout(given.time_column, given.symbol_column),
        device=given.device,
        actors=given.actors,
        num_cpus=given.num_cpus,
        num_gpus=given.num_gpus,
        symbols_per_part=given.symbols_per_part,
        ray_address=given.ray_address,
    )
