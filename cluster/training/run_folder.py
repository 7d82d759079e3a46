"""What a run leaves behind: the configuration beside the checkpoints, the networks and training.json at the end."""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from cluster.bundles.training_record import TRAINING_FILE
from cluster.files import write_atomically
from cluster.redact import redact
from cluster.training.checkpoints import Checkpoints, Saved
from cluster.training.config import STAGES, Stage, TrainConfig
from cluster.training.lineage import parent_of
from cluster.training.memory import SIZES_FILE
from cluster.training.stages import make_task
from model.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from model.errors import InputError
from model.registry import network_folder, network_source

CONFIG_COPY = "config.yaml"
LOCK_FILE = ".lock"

logger = logging.getLogger(__name__)

# What may change between an interrupted run and its continuation without changing the numbers.
_FREE = {
    "run.storage",
    "run.output",
    "training.device",
    "training.require_gpu",
    "training.threads",
    "training.max_failures",
    "training.ray_address",
    *(f"{stage}.{key}" for stage in STAGES for key in ("keep", "log_every")),
}


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Makes a run's folder and holds its lock, which the system frees however this process ends.

    Raises InputError if another process has it: two of them would remove each other's checkpoints.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"another process is training in {folder}: wait for it, stop it, or choose another run.name",
                code="run_in_use",
            ) from None
        except OSError as error:  # a file system without locks
            logger.warning("%s cannot be locked (%s): let no other process train in it", folder, error.strerror)
        yield


def remember(config: TrainConfig, stage: str, inputs: dict[str, Any], checkpoints: Checkpoints) -> None:
    """Writes the configuration and the hashes of the inputs beside the checkpoints.

    Raises InputError for a folder with checkpoints of another configuration, other data or other weights. Without any,
    as where the process was killed before the first, nothing is lost by starting over.
    """
    folder = checkpoints.folder
    path = folder / CONFIG_COPY
    now = config.model_dump(mode="json", include={"run", "training", "data", stage}) | {"inputs": inputs}
    if path.is_file():
        changed = differences(yaml.safe_load(path.read_text(encoding="utf-8")), redact(now))
        if changed and checkpoints.empty:
            _forget(folder)
        elif changed:
            raise InputError(
                f"run {config.run.name!r} exists in {folder.parent} with another {', '.join(changed[:5])}: choose "
                "another run.name, or the old values to resume it",
                code="run_exists",
            )
    write_atomically(path, yaml.safe_dump(redact(now), sort_keys=False))


@contextmanager
def nothing_kept_of_a_failed_start(checkpoints: Checkpoints) -> Iterator[None]:
    """Whoever corrects a configuration that failed before its first checkpoint may do so under the same run.name."""
    try:
        yield
    except BaseException:
        if checkpoints.empty:
            _forget(checkpoints.folder)
        raise


def _forget(folder: Path) -> None:
    """What a start leaves before its first checkpoint, and must not decide over the next one."""
    for name in (CONFIG_COPY, SIZES_FILE):
        (folder / name).unlink(missing_ok=True)


def fingerprint(config: TrainConfig, stage: str, inputs: dict[str, Any]) -> str:
    """What a checkpoint's run must have in common with the run that resumes it: all that decides the numbers."""
    now = config.model_dump(mode="json", include={"run": {"seed"}, "training": True, "data": True, stage: True})
    return json.dumps(_without_free(now | {"inputs": inputs}), sort_keys=True)


def _without_free(value: Any, path: str = "") -> Any:
    if not isinstance(value, dict):
        return value
    paths = {key: f"{path}.{key}" if path else key for key in value}
    return {key: _without_free(part, paths[key]) for key, part in value.items() if paths[key] not in _FREE}


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted keys whose values differ, those that decide no number left out."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new or path in _FREE else [path]


def export(stage: Stage, tokenizer: Path | None, checkpoint: Saved, folder: Path) -> None:
    """Puts the network of a checkpoint into folder as config.json and model.safetensors; adapters are merged."""
    task = make_task(stage, tokenizer)
    task.load(checkpoint.folder)
    task.export(folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer that a run used and did not train, so that its output is a whole bundle."""
    found = network_folder(source, "tokenizer")
    if folder.exists() and folder.samefile(found):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(found / name, folder / name)


_NOT_OF_A_STAGE = ("stopped", "refused", "warnings", "seconds", "splits")


def record(
    config: TrainConfig,
    stage: str,
    *,
    inputs: dict[str, Any],
    outcome: dict[str, Any],
    best: Saved,
    warnings: list[str],
    drift: dict[str, float] | None,
    command: str,
) -> None:
    """Adds what a stage did to training.json in run.output, which the model card and the export are written from."""
    path = config.run.output / TRAINING_FILE
    options: Stage = getattr(config, stage)
    stages = _stages_before(config, stage, path)
    stages[stage] = {
        **{key: value for key, value in outcome.items() if key not in _NOT_OF_A_STAGE},
        "minutes": round(outcome["seconds"] / 60, 1),
        "validation_loss": best.score,
        "metrics": best.metrics,
        "best_step": best.step,
        "method": options.method,
        "depth": (options.depth or 5) if options.method == "full" else None,
        "parent": parent_of(options, inputs),
        "inputs": inputs,
        "warnings": warnings,
    } | ({"code_drift": drift} if drift is not None else {})
    whole = {
        "command": command,
        "torch": torch.__version__,
        "device": outcome["device"],
        "warnings": sorted({warning for entry in stages.values() for warning in entry.get("warnings", [])}),
        "data_sha256": inputs["data"],
        "splits": outcome["splits"],
        "tokenizer": None if config.tokenizer else {"folder": str(config.predictor and config.predictor.tokenizer)},
        "stages": stages,
        "config": config.model_dump(mode="json"),
    }
    write_atomically(path, json.dumps(redact(whole), indent=2) + "\n")


def _stages_before(config: TrainConfig, stage: str, path: Path) -> dict[str, Any]:
    """What training.json says of the tokenizer that a predictor in the same folder was trained with; else nothing.

    Whatever else an earlier run has left there is not what lies beside these weights any more.
    """
    if stage == "tokenizer" or not path.is_file():
        return {}
    used = config.predictor.tokenizer if config.predictor is not None else None
    beside = (path.parent / STAGES["tokenizer"]).resolve()
    if used is not None and Path(network_source(used, "tokenizer")[0]).resolve() != beside:
        return {}
    known = json.loads(path.read_text(encoding="utf-8")).get("stages", {})
    return {"tokenizer": known["tokenizer"]} if "tokenizer" in known else {}
