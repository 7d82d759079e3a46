"""Trains or finetunes the tokenizer, the predictor or both.

    python -m cluster.train --config cluster/configs/bundled.yaml [run.seed=1 ...]
    python -m cluster.train --config cluster/configs/finetune.yaml --dry-run

One function trains in this process, on one Ray worker, or on many, on CPUs or GPUs. The run's folder holds checkpoints,
metrics and the configuration as used; the same command again goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

from cluster.placement import WorkerPlacement, place_here, place_workers
from cluster.ray_session import node_resources, ray_session
from cluster.training.checkpoints import Checkpoints
from cluster.training.config import STAGES, TokenizerStage, TrainConfig
from cluster.training.config_file import load_config
from cluster.training.group import Group
from cluster.training.lineage import code_drift, inputs_of
from cluster.training.loop import STOP_FILE, ray_train_loop, run_stage
from cluster.training.run_folder import (
    alone_in,
    copy_tokenizer,
    export,
    fingerprint,
    nothing_kept_of_a_failed_start,
    record,
    remember,
)
from model.device import resolve_device
from model.errors import KronosError

logger = logging.getLogger(__name__)

EXIT_TERMINATED = 128 + signal.SIGTERM
EXIT_INTERRUPTED = 128 + signal.SIGINT


class Stopped(Exception):
    """SIGTERM came; a checkpoint was saved, and the same configuration resumes."""


class _Signals:
    """Turns SIGTERM into a file that the workers look for: they may be on other machines."""

    def __init__(self) -> None:
        self.came = False
        self.stop_file: Path | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        if self.stop_file is not None:
            self.stop_file.touch()
        print("SIGTERM: saving at the next step boundary", file=sys.stderr, flush=True)

    def watch(self, stop_file: Path) -> None:
        """From now on the signal goes to this folder's workers. Raises Stopped if it has come already."""
        stop_file.unlink(missing_ok=True)
        self.stop_file = stop_file
        self.check()

    def check(self) -> None:
        if self.came:
            raise Stopped("stopped by SIGTERM; the same command goes on from the last checkpoint")


@contextmanager
def _catch_sigterm() -> Iterator[_Signals]:
    signals = _Signals()
    if threading.current_thread() is not threading.main_thread():  # only there may a handler be set
        yield signals
        return
    before = signal.signal(signal.SIGTERM, signals)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGTERM, before)


def train(config: TrainConfig, *, command: str = "cluster.train.train(config)") -> dict[str, Path]:
    """Runs the configured stages in order and returns stage → folder of its network below run.output.

    command: how this was called, for training.json in run.output.
    Uses the Ray cluster this process is connected to; else joins training.ray_address, or starts a private one on this
    machine and stops it at the end. With training.num_workers = 0 there is no Ray cluster at all.
    Raises InputError for configuration and data, CheckpointError for weights, DivergedError, Stopped after a SIGTERM,
    and KronosError for workers that failed more often than training.max_failures.
    """
    made: dict[str, Path] = {}
    with _ray_for(config), _catch_sigterm() as signals:
        for stage in STAGES:
            if getattr(config, stage) is None:
                continue
            tokenizer = None
            if stage == "predictor" and config.predictor is not None:
                tokenizer = made.get("tokenizer") or config.predictor.tokenizer
            made[stage] = _train_stage(config, stage, tokenizer, signals, command)
            logger.info("%s: written to %s", stage, made[stage])
            signals.check()
        if config.tokenizer is None and config.predictor is not None and config.predictor.tokenizer is not None:
            copy_tokenizer(config.predictor.tokenizer, config.run.output / STAGES["tokenizer"])
    return made


@contextmanager
def _ray_for(config: TrainConfig) -> Iterator[None]:
    if config.training.num_workers == 0:
        yield
        return
    # Ray Train asks its workers for news this often; each report waits for it (default 2 s).
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Ray Train copies what workers print into its own log, so that every line would come twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if config.training.ray_address in (None, "local"):
        # Nothing a user could act on, every second or at every validation: a private cluster has no dashboard to ask,
        # and what is reported has been printed.
        noise = "Failed to query Ray Train Controller|Reporting training result"
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", noise)
    with ray_session(config.training.ray_address):
        yield


def _train_stage(config: TrainConfig, stage: str, tokenizer: Path | None, signals: _Signals, command: str) -> Path:
    options = getattr(config, stage)
    folder = (config.run.storage / config.run.name / stage).resolve()
    placement = _place(config)
    inputs = inputs_of(config, stage, tokenizer)
    mark = fingerprint(config, stage, inputs)
    checkpoints = Checkpoints(folder, mark)
    settings: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "stage": stage,
        "tokenizer_folder": str(tokenizer.resolve() if tokenizer.is_dir() else tokenizer) if tokenizer else None,
        "use_gpu": placement.use_gpu,
        "device": placement.device,
        "run_folder": str(folder),
        "directory": str(Path.cwd()),
        "fingerprint": mark,
    }
    with alone_in(folder):
        remember(config, stage, inputs, checkpoints)
        outcome = _run(config, stage, settings, placement, checkpoints, signals)
    warnings = [*placement.warnings, *outcome["warnings"], *outcome["refused"]]
    for warning in outcome["warnings"]:
        logger.warning(warning)
    best = checkpoints.best()
    if best is None:
        raise KronosError(f"{folder} holds no checkpoint that is whole: train again under another run.name")
    target = config.run.output / STAGES[stage]
    export(options, tokenizer, best, target)
    drift = None
    if isinstance(options, TokenizerStage) and options.init_from is not None:
        drift = code_drift(config, options, target)
        logger.warning(
            "tokenizer: %.1f %% of the validation bars have another code than the parent's (s1: %.1f %%); a predictor "
            "of the parent's must be trained on the new codes",
            drift["percent"],
            drift["s1_percent"],
        )
    record(config, stage, inputs=inputs, outcome=outcome, best=best, warnings=warnings, drift=drift, command=command)
    return target


def _run(
    config: TrainConfig,
    stage: str,
    settings: dict[str, Any],
    placement: WorkerPlacement,
    checkpoints: Checkpoints,
    signals: _Signals,
) -> dict[str, Any]:
    """What run_stage returns, computed in this process or on Ray. Raises what it returns as an error, and Stopped."""
    stop_file = checkpoints.folder / STOP_FILE
    with nothing_kept_of_a_failed_start(checkpoints):
        signals.watch(stop_file)
        if config.training.num_workers == 0:
            outcome = run_stage(settings, Group(device=resolve_device(placement.device)[0]), lambda metrics: None)
        else:
            outcome = _run_on_ray(config, stage, settings, placement)
        if "error" in outcome:
            raise outcome["error"]
        if outcome["stopped"]:
            stop_file.unlink(missing_ok=True)
            logger.warning("%s: stopped at step %d of %d", stage, outcome["steps"], getattr(config, stage).steps)
            signals.came = True
            signals.check()
    return outcome


def _place(config: TrainConfig) -> WorkerPlacement:
    here = config.training.num_workers == 0
    placement = place_here(config.training) if here else place_workers(config.training, node_resources())
    for warning in placement.warnings:
        logger.warning(warning)
    return placement


def _run_on_ray(
    config: TrainConfig, stage: str, settings: dict[str, Any], placement: WorkerPlacement
) -> dict[str, Any]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
    from ray.train.torch import TorchTrainer

    training = config.training
    resources = {"CPU": training.cpus_per_worker} | ({"GPU": 1.0} if placement.use_gpu else {})
    trainer = TorchTrainer(
        cast(Any, ray_train_loop),  # Ray's type has no return value, and the result does
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=cast(Any, training.num_workers), use_gpu=placement.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=stage,
            storage_path=str(Path(settings["run_folder"]).parent),
            failure_config=FailureConfig(max_failures=training.max_failures),
        ),
    )
    try:
        return cast(Any, trainer.fit()).return_value
    except WorkerGroupError as error:
        causes = [getattr(failure, "_base_exc", failure) for failure in error.worker_failures.values()]
        for cause in causes:
            if isinstance(cause, KronosError):
                raise cause from error
        raise KronosError(
            f"{stage}: workers failed more often than training.max_failures={training.max_failures} allows, the "
            f"last time with {causes[0] if causes else error}; the same command goes on from the last checkpoint"
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.train",
        description="Train or finetune the tokenizer, the predictor or both. The same command again resumes.",
        epilog="Exit status: 0 done, 2 a mistake in configuration or data, or workers that kept failing, "
        "130 interrupted, 143 stopped by SIGTERM with a checkpoint.",
    )
    parser.add_argument("--config", required=True, type=Path, help="YAML file; training/config.py lists all its keys")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check configuration and data, train two steps, save, reload, forecast; leaves no files",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = load_config(options.config, options.overrides)
        if options.dry_run:
            from cluster.training.dry_run import dry_run

            for line in dry_run(config):
                print(line, flush=True)
            return 0
        command = " ".join(["python -m cluster.train --config", options.config.as_posix(), *options.overrides])
        made = train(config, command=command)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (KronosError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for stage, folder in made.items():
        print(f"{stage}: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
