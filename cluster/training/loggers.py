"""Where a run's metrics go: JSON lines always; TensorBoard, MLflow and Weights & Biases where they are named.

A back end is imported only when it is named. Keys stay in the environment, where these tools look for them themselves:
the configuration that is logged is redacted.
"""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from cluster.redact import redact
from cluster.training.config import LoggingConfig
from model.errors import InputError

METRICS_FILE = "metrics.jsonl"
PACKAGES = {"tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
"""Name of a logger, which is also that of the pip extra → the module it needs."""


class BackEnd(Protocol):
    def log(self, step: int, record: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class RunLoggers:
    """Every back end of one run. To be used by one worker only."""

    def __init__(self, back_ends: list[BackEnd]) -> None:
        self._back_ends = back_ends

    def log(self, step: int, record: dict[str, float]) -> None:
        """record: name → number. Raises InputError for anything else: texts may hold what must not be logged."""
        values: dict[str, float] = {}
        for name, value in record.items():
            if not isinstance(value, numbers.Real):
                raise InputError(f"metric {name!r} is {type(value).__name__}, not a number", code="not_a_number")
            values[name] = int(value) if isinstance(value, numbers.Integral) else float(value)
        for back_end in self._back_ends:
            back_end.log(step, values)

    def close(self) -> None:
        """Writes what is pending. All back ends are closed, also if one of them fails."""
        errors = []
        for back_end in self._back_ends:
            try:
                back_end.close()
            except Exception as error:  # whatever a server or a disk does, the others are to be closed
                errors.append(error)
        if errors:
            raise ExceptionGroup("loggers could not be closed", errors)


def make_loggers(config: LoggingConfig, run_folder: Path, resolved_config: Mapping[str, Any]) -> RunLoggers:
    """resolved_config: the whole configuration as used; it is redacted here before any back end sees it.

    Raises InputError naming the pip extra if a logger's package is not installed.
    """
    run_folder.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[..., BackEnd]] = {"tensorboard": _TensorBoard, "mlflow": _MLflow, "wandb": _WandB}
    packages = logger_packages(config)  # all of them, before any of them starts a run
    settings = redact(resolved_config)
    back_ends: list[BackEnd] = [_JsonLines(run_folder / METRICS_FILE)]
    back_ends += [makers[name](package, config, run_folder, settings) for name, package in packages.items()]
    return RunLoggers(back_ends)


def logger_packages(config: LoggingConfig) -> dict[str, ModuleType]:
    """Name → module of every logger that is named. Raises InputError naming the pip extra of one that is absent."""
    return {name: _load(name) for name in config.loggers}


def _load(name: str) -> ModuleType:
    try:
        return import_module(PACKAGES[name])
    except ImportError as error:
        raise InputError(
            f"logging.loggers names {name}, which is not installed ({error}): pip install 'kronos-ray-serve[{name}]', "
            "or leave it out",
            code="missing_extra",
        ) from error


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as section.key → text."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: json.dumps(value)}
    return found


class _JsonLines:
    """A line a record: {"step": …, name: value}; NaN and infinities as null, because JSON has none."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, record: dict[str, float]) -> None:
        shown = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._file.write(json.dumps({"step": step, **shown}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, package: ModuleType, config: LoggingConfig, folder: Path, settings: dict[str, Any]) -> None:
        self._writer = package.SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("config", "```json\n" + json.dumps(settings, indent=2) + "\n```")

    def log(self, step: int, record: dict[str, float]) -> None:
        for name, value in record.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _MLflow:
    def __init__(self, package: ModuleType, config: LoggingConfig, folder: Path, settings: dict[str, Any]) -> None:
        # A client of its own: MLflow's global run would be shared with whatever else this process does.
        uri = config.mlflow_uri or f"sqlite:///{(folder / 'mlflow.db').absolute()}"
        self._client = package.MlflowClient(tracking_uri=uri)
        known = self._client.get_experiment_by_name(config.project)
        # Without a server, artifacts would go to wherever the process was started.
        place = None if config.mlflow_uri else (folder / "mlartifacts").absolute().as_uri()
        experiment = known.experiment_id if known else self._client.create_experiment(config.project, place)
        self._run = self._client.create_run(experiment, run_name=folder.name).info.run_id
        for name, text in _flat(settings).items():
            self._client.log_param(self._run, name, text)

    def log(self, step: int, record: dict[str, float]) -> None:
        for name, value in record.items():
            self._client.log_metric(self._run, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run)


class _WandB:
    def __init__(self, package: ModuleType, config: LoggingConfig, folder: Path, settings: dict[str, Any]) -> None:
        self._run = package.init(
            project=config.project,
            name=folder.name,
            dir=str(folder),
            config=settings,
            mode=config.wandb_mode,
            # Neither the command line, nor the repository, nor the environment's packages: only what is given here.
            settings=package.Settings(disable_git=True, save_code=False, x_disable_meta=True, console="off"),
        )

    def log(self, step: int, record: dict[str, float]) -> None:
        self._run.log(record, step=step)

    def close(self) -> None:
        self._run.finish()
