"""The training loop that runs in every worker: one for both stages, in this process or on Ray Train, CPU or GPU."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from cluster.training.checkpoints import Checkpoints
from cluster.training.config_file import parse_config
from cluster.training.group import Group
from cluster.training.memory import is_out_of_memory, settle_batch_sizes, too_large
from cluster.training.progress import Progress
from cluster.training.worker import DivergedError, Worker
from model.device import resolve_device
from model.errors import KronosError

STOP_FILE = "stop"
"""In the run folder: the driver puts it there when it is told to end; the workers save at the next step boundary."""

Report = Callable[[dict[str, Any]], None]

logger = logging.getLogger(__name__)


def ray_train_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train calls in each worker. settings: as for run_stage, and use_gpu."""
    import ray.train
    import ray.train.torch

    if Path(settings["directory"]).is_dir():
        # Ray Train starts workers elsewhere, and the paths of the configuration are the driver's.
        os.chdir(settings["directory"])
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if settings["use_gpu"] else resolve_device(settings["device"])[0]
    group = Group(context.get_world_rank(), context.get_world_size(), device)
    return run_stage(settings, group, ray.train.report)


def run_stage(settings: dict[str, Any], group: Group, report: Report) -> dict[str, Any]:
    """Trains one stage from its last checkpoint to its end, or until it is told to stop, and says what it did.

    settings: config (a nested dict), stage, tokenizer_folder, run_folder, fingerprint. report: gets the metrics of each
    validation. A mistake that another try would only repeat comes back as "error", so that Ray Train does not try.
    """
    config = parse_config(settings["config"])
    torch.set_num_threads(config.training.threads or max(1, int(config.training.cpus_per_worker)))
    folder = Path(settings["run_folder"])
    tokenizer_folder = settings["tokenizer_folder"]
    try:
        worker = Worker(
            config, settings["stage"], Path(tokenizer_folder) if tokenizer_folder else None, group.device, group
        )
        checkpoints = Checkpoints(folder, settings["fingerprint"], keep=worker.stage.keep)
        resume(worker, checkpoints)
        settle_batch_sizes(worker, folder)
        progress = Progress(worker, folder)
        progress.begin()
        try:
            stopped = train_to_the_end(worker, checkpoints, progress, report, folder / STOP_FILE)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise too_large(worker, _rows_at_once(worker)) from error
        finally:
            progress.close()
    except (KronosError, ValueError) as error:
        # One worker of several may be alone with it, and the others wait for it: only a failure tells them.
        if group.size > 1 and not isinstance(error, DivergedError):
            raise
        return {"error": error}
    return _outcome(worker) | {"stopped": stopped, "refused": checkpoints.refused}


def _rows_at_once(worker: Worker) -> int:
    """Of the phase that the worker is in."""
    ends = accumulate(phase.steps for phase in worker.stage.phases)
    sizes = (size for size, end in zip(worker.batch_sizes, ends, strict=True) if worker.step < end)
    size = next(sizes, worker.batch_sizes[-1])  # the last validation comes after the last step
    mine = -(-int(size) // worker.group.size)
    return min(mine, worker.micro_batch_size) if isinstance(worker.micro_batch_size, int) else mine


def resume(worker: Worker, checkpoints: Checkpoints) -> None:
    """Takes up the last good checkpoint, the same on all workers: rank 0 looks, the others follow."""
    first = worker.group.rank == 0
    latest = checkpoints.latest() if first else None
    folder = worker.group.from_first(latest.folder if latest else None)
    if folder is not None:
        worker.restore(folder)
    elif first and checkpoints.refused:
        logger.warning("%s: no checkpoint is good; training starts at step 0", worker.name)


def train_to_the_end(
    worker: Worker, checkpoints: Checkpoints, progress: Progress, report: Report, stop_file: Path
) -> bool:
    """True if it was told to stop: a checkpoint of this very step is there then."""
    since = time.monotonic()
    saved = worker.step

    def clock() -> None:
        nonlocal since
        now = time.monotonic()
        worker.seconds, since = worker.seconds + now - since, now

    while not worker.finished:
        asked = worker.group.rank == 0 and stop_file.exists()
        if worker.group.sums(float(asked))[0]:
            clock()
            if worker.step != saved:
                save(worker, checkpoints, {})
            return True
        losses, bars = worker.train_step()
        progress.step(losses, bars)
        if worker.step % worker.stage.validate_every == 0 or worker.step == worker.stage.steps:
            metrics = worker.validate()
            worker.note_validation(metrics["validation_loss"])
            clock()
            progress.validation(metrics)
            save(worker, checkpoints, metrics)
            saved = worker.step
            report({"step": worker.step, **metrics})
    return False


def save(worker: Worker, checkpoints: Checkpoints, metrics: dict[str, float]) -> None:
    """Rank 0 writes; nobody goes on before the checkpoint is there."""
    if worker.group.rank == 0:
        checkpoints.save(worker.step, worker.save, metrics)
    worker.group.sums(0.0)


def _outcome(worker: Worker) -> dict[str, Any]:
    """What the driver records of a stage."""
    everything, trained = worker.weights()
    return {
        "weights": everything,
        "trained_weights": trained,
        "steps": worker.step,
        "stopped_early": worker.stopped_early and worker.step < worker.stage.steps,
        "bars": worker.bars,
        "seconds": worker.seconds,
        "skipped_steps": worker.skipped,
        "batch_sizes": worker.batch_sizes,
        "micro_batch_size": worker.micro_batch_size,
        "workers": worker.group.size,
        "device": str(worker.device),
        "precision": worker.precision.name,
        "splits": worker.split_moments(),
        "warnings": worker.warnings(),
    }
