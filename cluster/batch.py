"""Forecasts every symbol of a table with Ray Data: candles in CSV or Parquet in, one long Parquet table out.

    python -m cluster.batch --input bars/*.parquet --output out --model kronos-small --horizon 24 --samples 30

A symbol that cannot be forecast costs its own row, which says why. The same command again goes on where it was
interrupted. Exit code: 0 all symbols are forecast, 1 some are not (see column error), 2 an error, nothing could be
started or an actor failed, 130 interrupted.
"""

from __future__ import annotations

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

from cluster.batching.config import BatchConfig, check, parse_arguments
from cluster.batching.files import Source, find_files, scan
from cluster.batching.forecaster import Forecaster, Work, unit_rows
from cluster.batching.plan import Spread, Unit, plan_spread, plan_units, remove_spread, spread_file
from cluster.batching.store import RUN_FILE, SPREAD_FOLDER, Store
from cluster.files import require_writable_folder
from cluster.placement import ActorPlacement, place_when_free
from cluster.ray_session import node_resources, ray_session
from model.errors import InputError, KronosError
from model.registry import Checkpoint, load_checkpoint

ROWS_AHEAD = {"cpu": 512, "cuda": 8192, "mps": 1024}
"""Paths of a unit: several times what steps together, so that the engine is full until near its end."""
UNITS_PER_ACTOR = 4
"""At least so many units for each actor, so that they end at about the same time."""
UNITS_PER_CALL = 8
PROGRESS_EVERY_S = 5.0
READING_RULES = 2
"""Raised when the same table is read otherwise: under 1 a column Volume counted as none. An output begun before is not
gone on with."""


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


def run_batch(config: BatchConfig, *, show: TextIO | None = None) -> Summary:
    """Forecasts what is not finished yet. show: where progress is written; None: nowhere.

    Raises InputError for arguments and an output of another run, CheckpointError for the model, and what Ray raises.
    """
    began = time.monotonic()
    check(config)
    output = config.output.resolve()
    if not (output / RUN_FILE).is_file():  # else it has been written to, and may be complete
        require_writable_folder(config.output, "--output")
    checkpoint = load_checkpoint(config.model)
    files = _input_files(config, output)
    inputs = {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
    store = Store(output)
    complete = store.finished(_identity(config, checkpoint, None), inputs)
    if complete is not None:
        return Summary(complete.symbols, complete.errors, seconds=time.monotonic() - began)
    # What actors have to say comes back in their rows.
    with ray_session(config.ray_address, log_to_driver=False, logging_level=logging.WARNING):
        place = place_when_free(
            node_resources(),
            lambda: node_resources(free=True),
            device=config.device,
            actors=config.actors,
            num_cpus=config.num_cpus,
            num_gpus=config.num_gpus,
            say=lambda text: _say(show, text),
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


def _identity(config: BatchConfig, checkpoint: Checkpoint, place: ActorPlacement | None) -> dict[str, Any]:
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
        "reading": READING_RULES,
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


def _unit_size(config: BatchConfig, place: ActorPlacement, symbols: int) -> int:
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
    place: ActorPlacement,
    store: Store,
    units: Sequence[Unit],
    summary: Summary,
    show: TextIO | None,
) -> None:
    """Runs the units through a pool of actors, counting what they have done in summary."""
    work = Work(
        source=config.model,
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
    began, shown, errors_before = time.time(), time.monotonic(), summary.errors
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
                f"{summary.errors - errors_before} with an error",
            )


def _say(show: TextIO | None, text: str) -> None:
    if show is not None:
        print(text, file=show, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = parse_arguments(arguments, __doc__)
        summary = run_batch(config, show=sys.stderr)
    except (KronosError, ValueError, OSError) as error:
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
