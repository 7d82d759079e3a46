"""Forecasts every symbol of a table with Ray Data: candles in CSV or Parquet in, one long Parquet table out.

    python -m cluster.batch --input bars/*.parquet --output out --model kronos-small --horizon 24 --samples 30

A symbol that cannot be forecast costs its own row, which says why. The same command again goes on where it was
interrupted. Exit code: 0 all symbols are forecast, 1 some are not (see column error), 2 an error, nothing could be
started or an actor failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import ray
import ray.data
import ray.exceptions
from ray.data.exceptions import UserCodeException

from cluster.batch_files import Layout, Source, find_files, scan
from cluster.batch_forecaster import Forecaster, Work, unit_rows
from cluster.batch_place import Placement, place_actors, ray_session
from cluster.batch_plan import SPREAD_BYTES, Spread, Unit, plan_spread, plan_units, remove_spread, spread_file
from cluster.batch_store import SPREAD_FOLDER, Store
from cluster.batch_symbols import HistoryRules
from model.calendars import CalendarError, parse_freq
from model.device import PRECISIONS
from model.engine.types import WindowPolicy
from model.errors import InputError, KronosError
from model.registry import Checkpoint, CheckpointSource, load_checkpoint, named_source
from model.sampler import check_sampling
from model.types import Sampling

ROWS_AHEAD = {"cpu": 512, "cuda": 8192, "mps": 1024}
"""Paths of a unit: several times what steps together, so that the engine is full until near its end."""
UNITS_PER_ACTOR = 4
"""At least so many units for each actor, so that they end at about the same time."""
UNITS_PER_CALL = 8
PROGRESS_EVERY_S = 5.0


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


@dataclass
class Summary:
    """symbols, errors: of the whole output. computed: symbols of this run.

    seconds: of this run. forecast_s: of them, from the first actor's first bar to the end: without starting anything.
    """

    symbols: int = 0
    errors: int = 0
    computed: int = 0
    seconds: float = 0.0
    forecast_s: float = 0.0
    devices: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def text(self, output: Path) -> str:
        how = f" on {', '.join(self.devices)}" if self.devices else ""
        rate = f", {self.computed / self.forecast_s:.2f} symbols/s once started" if self.computed else ""
        return (
            f"{self.symbols} symbols in {output}: {self.symbols - self.errors} forecast, {self.errors} with an error; "
            f"{self.computed} of them computed now in {self.seconds:.1f} s{how}{rate}"
        )


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
    except CalendarError as error:
        raise InputError(f"--freq {error}", code=error.code) from None


def run_batch(config: BatchConfig, *, show: TextIO | None = None) -> Summary:
    """Forecasts what is not finished yet. show: where progress is written; None: nowhere.

    Raises InputError for arguments and an output of another run, CheckpointError for the model, and what Ray raises.
    """
    began = time.monotonic()
    check(config)
    checkpoint = load_checkpoint(config.model)
    output = config.output.resolve()
    files = _input_files(config, output)
    inputs = {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
    store = Store(output)
    complete = store.finished(_identity(config, checkpoint, None), inputs)
    if complete is not None:
        return Summary(complete.symbols, complete.errors, seconds=time.monotonic() - began)
    with ray_session(config.ray_address):
        place = place_actors(
            ray.available_resources(),
            device=config.device,
            actors=config.actors,
            num_cpus=config.num_cpus,
            num_gpus=config.num_gpus,
        )
        sources = scan(files, config.layout)
        parts = store.parts()
        done = {symbol for part in parts for symbol in part.symbols}
        _refuse_more_bars(sources, store.input_files(), done, output)
        store.claim(_identity(config, checkpoint, place), inputs)
        summary = Summary(len(done), sum(len(part.errors) for part in parts), warnings=list(place.warnings))
        for warning in place.warnings:
            _say(show, f"warning: {warning}")
        wanted = {symbol for source in sources for symbol in source.symbols} - done
        if wanted:
            spread = plan_spread(sources, output / SPREAD_FOLDER, config.spread_bytes)
            if spread is not None:
                _spread(spread, config, show)
            units = plan_units(sources, spread, done, _unit_size(config, place, len(wanted)))
            _forecast(config, checkpoint, place, store, units, summary, show)
        remove_spread(output / SPREAD_FOLDER)
        store.complete(summary.symbols, summary.errors)
    summary.seconds = time.monotonic() - began
    return summary


def _input_files(config: BatchConfig, output: Path) -> list[Path]:
    files = find_files(config.input)
    inside = [file for file in files if file.is_relative_to(output)]
    if inside:
        raise InputError(f"--input holds {inside[0]}, which lies in --output: take another folder", code="bad_output")
    return files


def _refuse_more_bars(sources: Sequence[Source], before: set[str], done: set[str], output: Path) -> None:
    """Files may be added to the input of a run, but not bars to what it has forecast."""
    for source in sources:
        again = sorted(done.intersection(source.symbols)) if source.path not in before else []
        if again:
            raise InputError(
                f"--output {output} holds a forecast of {again[0]!r}, of which {source.path} brings more bars: "
                "take another --output",
                code="input_changed",
            )


def _identity(config: BatchConfig, checkpoint: Checkpoint, place: Placement | None) -> dict[str, Any]:
    """What two runs into one output must have in common: all that decides the numbers. place: None if not known yet."""
    settings: dict[str, Any] = {
        **dataclasses.asdict(config.rules),
        **dataclasses.asdict(config.sampling),
        "quantiles": list(config.quantiles),
        "paths": config.paths,
        "window": config.window,
        "precision": config.precision,
        "max_context": config.model.max_context,
        "time_column": config.layout.time,
        "symbol_column": config.layout.symbol,
    }
    if place is not None:
        settings["device"] = place.kind
    model = {
        "model": checkpoint.model_version,
        "tokenizer": checkpoint.tokenizer_version,
        "revision": checkpoint.revision,
        "sha256": checkpoint.sha256,
    }
    return {"settings": settings, "model": model}


def _unit_size(config: BatchConfig, place: Placement, symbols: int) -> int:
    """Symbols of a unit. It decides no number: a path depends on its symbol and seed alone."""
    if config.symbols_per_part is not None:
        return config.symbols_per_part
    full = max(1, ROWS_AHEAD[place.kind] // config.sampling.samples)
    return max(1, min(full, -(-symbols // (place.actors * UNITS_PER_ACTOR)), 1024))


def _spread(spread: Spread, config: BatchConfig, show: TextIO | None) -> None:
    files = sorted(spread.files)
    _say(show, f"dividing {len(files)} large files into {spread.partitions} partitions by symbol")
    task = ray.remote(spread_file).options(num_cpus=config.num_cpus)
    ray.get([task.remote(path, number, spread, config.layout) for number, path in enumerate(files)])


def _forecast(
    config: BatchConfig,
    checkpoint: Checkpoint,
    place: Placement,
    store: Store,
    units: Sequence[Unit],
    summary: Summary,
    show: TextIO | None,
) -> None:
    """Runs the units through a pool of actors, counting what they have done in summary."""
    work = Work(
        source=_absolute(config.model),
        sha256=checkpoint.sha256,
        rules=config.rules,
        names=config.layout,
        sampling=config.sampling,
        quantiles=config.quantiles,
        paths=config.paths,
        window=config.window,
        precision=config.precision,
        device=place.device,
        threads=max(1, int(place.num_cpus)),
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    per_call = max(1, min(UNITS_PER_CALL, len(units) // (place.actors * UNITS_PER_ACTOR)))
    calls = -(-len(units) // per_call)
    actors = min(place.actors, calls)  # one without a call would only start
    total = sum(len(unit.symbols) for unit in units)
    _say(
        show,
        f"{total} symbols in {len(units)} units for {actors} actor(s) on {place.kind} "
        f"({place.num_cpus:g} CPU, {place.num_gpus:g} GPU each); {summary.symbols} finished before",
    )
    data = ray.data.from_items(unit_rows(units), override_num_blocks=calls).map_batches(
        Forecaster,
        fn_constructor_args=(work, store),
        batch_size=per_call,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=place.num_cpus,
        num_gpus=place.num_gpus or None,
    )
    began, shown = time.time(), time.monotonic()
    for row in data.iter_rows():
        summary.computed += int(row["symbols"])
        summary.symbols += int(row["symbols"])
        summary.errors += int(row["errors"])
        if row["device"] not in summary.devices:
            summary.devices.append(str(row["device"]))
        if row["warning"] and row["warning"] not in summary.warnings:
            summary.warnings.append(str(row["warning"]))
            _say(show, f"warning: {row['warning']}")
        # Clocks of two hosts may differ by a little.
        began = float(row["began"]) if not summary.forecast_s else min(began, float(row["began"]))
        summary.forecast_s = max(1e-3, time.time() - began)
        if time.monotonic() - shown >= PROGRESS_EVERY_S or summary.computed == total:
            shown = time.monotonic()
            rate = summary.computed / summary.forecast_s
            left = (total - summary.computed) / rate
            _say(
                show,
                f"{summary.computed}/{total} symbols, {rate:.2f} symbols/s, {left / 60:.1f} min left, "
                f"{summary.errors} with an error",
            )


def _absolute(source: CheckpointSource) -> CheckpointSource:
    """Local folders by their whole path: an actor's working directory is another one."""

    def whole(name: str | None) -> str | None:
        return str(Path(name).resolve()) if name is not None and Path(name).is_dir() else name

    return dataclasses.replace(source, model=whole(source.model) or source.model, tokenizer=whole(source.tokenizer))


def _say(show: TextIO | None, text: str) -> None:
    if show is not None:
        print(text, file=show, flush=True)


def parse_arguments(arguments: Sequence[str] | None) -> BatchConfig:
    """The command line. Exits with 2 and a usage line for what it does not know; raises InputError for bad values."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.batch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = parse_arguments(arguments)
        summary = run_batch(config, show=sys.stderr)
    except (KronosError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ray.exceptions.RayError, UserCodeException) as error:
        print(f"error: an actor failed, and the same command goes on from here: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    print(summary.text(config.output))
    return 1 if summary.errors else 0


if __name__ == "__main__":
    sys.exit(main())
