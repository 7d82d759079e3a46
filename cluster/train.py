"""Trains the tokenizer, the predictor or both on Ray Train.

    python -m cluster.train --config cluster/configs/bundled.yaml [run.seed=1 ...]

One worker on a CPU runs the same code as many on GPUs. The run's folder holds checkpoints, metrics and the
configuration as used; the same command again goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
import yaml
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cluster.card import TRAINING_FILE
from cluster.config import Stage, TrainConfig, load_config
from cluster.loop import NETWORK_FOLDER, train_loop
from model.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from model.device import resolve_device
from model.errors import InputError, KronosError

logger = logging.getLogger(__name__)

STAGES = {"tokenizer": "tokenizer", "predictor": "model"}
"""Stage → folder of its network below run.output, in the order they run."""


class Placement(NamedTuple):
    """use_gpu: workers ask Ray for a GPU each. device: what a worker without one resolves. warning: what differs."""

    use_gpu: bool
    device: str
    warning: str | None


def place_workers(device: str, num_workers: int, cpus_per_worker: float, resources: dict[str, float]) -> Placement:
    """Decides before the start what Ray would otherwise wait for without an end. resources: as ray.cluster_resources().

    Raises InputError if the cluster has fewer CPUs than the workers need, ValueError for a device that is not one.
    """
    wanted, cpus = num_workers * cpus_per_worker, resources.get("CPU", 0.0)
    if wanted > cpus:
        raise InputError(
            f"{num_workers} workers of {cpus_per_worker:g} CPUs need {wanted:g} CPUs and the cluster has {cpus:g}: "
            "lower run.num_workers or run.cpus_per_worker",
            code="too_few_cpus",
        )
    kind = device.strip().lower().partition(":")[0]
    gpus = resources.get("GPU", 0.0)
    if kind not in ("auto", "cuda"):
        resolve_device(device)  # refuses nonsense here, not in every worker
        return Placement(False, device, None)
    if gpus >= max(1, num_workers):
        return Placement(True, "cuda", None)
    if kind == "auto":
        return Placement(False, "mps" if resolve_device("auto")[0].type == "mps" else "cpu", None)
    warning = (
        f"device {device!r} was requested, but the cluster has {gpus:g} GPUs for {num_workers} workers; using 'cpu'"
    )
    return Placement(False, "cpu", warning)


def train(config: TrainConfig, *, command: str = "cluster.train.train(config)") -> dict[str, Path]:
    """Runs the configured stages in order and returns stage → folder of its network below run.output.

    command: how this was called, for training.json in run.output.
    Uses the Ray cluster this process is connected to; else joins run.ray_address, or starts a private one on this
    machine and stops it at the end. With run.num_workers = 0 there is no Ray cluster at all.
    Raises InputError for configuration and data, CheckpointError for weights, and what Ray Train raises for a worker
    that failed more often than run.max_failures.
    """
    made: dict[str, Path] = {}
    with _ray_for(config):
        for stage in STAGES:
            if getattr(config, stage) is None:
                continue
            tokenizer = made.get("tokenizer") or (config.predictor.tokenizer if config.predictor else None)
            result = _run_stage(config, stage, tokenizer if stage == "predictor" else None)
            made[stage] = _export(result, config.run.output / STAGES[stage])
            _record(config, stage, result, command)
            logger.info("%s: written to %s", stage, made[stage])
    return made


@contextmanager
def _ray_for(config: TrainConfig) -> Iterator[None]:
    # Ray Train asks its workers for news this often; each report waits for it (default 2 s).
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Ray Train copies what workers print into its own log, so that every line would come twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    if config.run.num_workers == 0 or ray.is_initialized():
        yield
        return
    if config.run.ray_address is None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=True)
    else:
        ray.init(address=config.run.ray_address)
    try:
        yield
    finally:
        ray.shutdown()


def _run_stage(config: TrainConfig, stage: str, tokenizer: Path | None) -> Result:
    run = config.run
    folder = (run.storage / run.name / stage).resolve()
    _remember_config(config, stage, folder)
    if run.num_workers == 0:
        # This process is the worker: its own device rules hold.
        placement = Placement(False, run.device, resolve_device(run.device)[1])
    else:
        placement = place_workers(run.device, run.num_workers, run.cpus_per_worker, ray.cluster_resources())
        if placement.warning:
            logger.warning(placement.warning)
    resources = {"CPU": run.cpus_per_worker} | ({"GPU": 1.0} if placement.use_gpu else {})
    settings: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "stage": stage,
        "tokenizer_folder": str(tokenizer.resolve()) if tokenizer else None,
        "use_gpu": placement.use_gpu,
        "device": placement.device,
        "run_folder": str(folder),
        "local": run.num_workers == 0,
    }
    trainer = TorchTrainer(
        train_loop,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=run.num_workers, use_gpu=placement.use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=stage,
            storage_path=str(folder.parent),
            failure_config=FailureConfig(max_failures=run.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=run.keep_checkpoints,
                checkpoint_score_attribute="validation_loss",
                checkpoint_score_order="min",
            ),
        ),
    )
    return trainer.fit()


def _remember_config(config: TrainConfig, stage: str, folder: Path) -> None:
    """Writes the configuration beside the checkpoints; refuses a folder that another configuration has used."""
    path = folder / "config.yaml"
    now = config.model_dump(mode="json", include={"run", "data", stage})
    if path.is_file():
        changed = _differences(yaml.safe_load(path.read_text(encoding="utf-8")), now)
        if changed:
            raise InputError(
                f"run {config.run.name!r} exists in {folder.parent} with another {', '.join(changed[:5])}: choose "
                "another run.name, or the old values to resume it",
                code="run_exists",
            )
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(now, sort_keys=False), encoding="utf-8")


# What may change between an interrupted run and its continuation without changing the numbers.
_FREE = {
    "run.storage",
    "run.output",
    "run.device",
    "run.threads",
    "run.max_failures",
    "run.keep_checkpoints",
    "run.ray_address",
}


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new or path in _FREE else [path]


def _best(result: Result) -> tuple[float, Checkpoint]:
    """The lowest validation loss and its checkpoint. Local mode keeps only the last one."""
    kept = [(metrics["validation_loss"], checkpoint) for checkpoint, metrics in result.best_checkpoints or []]
    if not kept and result.checkpoint is not None and result.metrics:
        kept = [(result.metrics["validation_loss"], result.checkpoint)]
    if not kept:
        raise RuntimeError("Ray Train returned no checkpoint")
    return min(kept, key=lambda pair: pair[0])


def _export(result: Result, folder: Path) -> Path:
    """Copies the best network into folder: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    with _best(result)[1].as_directory() as source:
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copyfile(Path(source) / NETWORK_FOLDER / name, folder / name)
    return folder


def _record(config: TrainConfig, stage: str, result: Result, command: str) -> None:
    """Adds what the stage did to training.json in run.output, which the model card is written from."""
    path = config.run.output / TRAINING_FILE
    known = json.loads(path.read_text(encoding="utf-8"))["stages"] if path.is_file() else {}
    options: Stage = getattr(config, stage)
    best, _ = _best(result)
    metrics = result.metrics or {}
    known[stage] = {
        "weights": metrics["weights"],
        "steps": options.steps,
        "bars": sum(phase.steps * phase.batch_size * phase.window for phase in options.phases),
        "minutes": round(metrics["seconds"] / 60, 1),
        "validation_loss": best,
    }
    record = {
        "command": command,
        "torch": torch.__version__,
        "device": metrics["device"],
        "stages": {name: known[name] for name in STAGES if name in known},
        "config": config.model_dump(mode="json"),
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.train", description="Train the tokenizer, the predictor or both."
    )
    parser.add_argument("--config", required=True, type=Path, help="YAML file; cluster/config.py lists every key")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        command = " ".join(["python -m cluster.train --config", options.config.as_posix(), *options.overrides])
        made = train(load_config(options.config, options.overrides), command=command)
    except (KronosError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for stage, folder in made.items():
        print(f"{stage}: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
