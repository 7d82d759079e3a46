"""The trainer's configuration: one YAML file, checked key by key before anything starts.

Top-level keys: run, data, logging, tokenizer, predictor. The last two are stages, run in that order; leave one out to
skip it.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from cluster.data_config import DataConfig, Strict
from model.errors import InputError

SOURCE_KINDS = ("simulated", "file", "qlib")
"""Values of data.source.kind. pydantic puts them into the path of a fault, although the file has no such key."""


class TokenizerShape(Strict):
    """Keyword arguments of model.KronosTokenizer."""

    d_in: Literal[6] = 6
    d_model: int = 256
    n_heads: int = 4
    ff_dim: int = 512
    n_enc_layers: int = Field(default=4, ge=1)
    n_dec_layers: int = Field(default=4, ge=1)
    ffn_dropout_p: float = 0.0
    attn_dropout_p: float = 0.0
    resid_dropout_p: float = 0.0
    s1_bits: int = Field(default=10, ge=1, le=16)
    s2_bits: int = Field(default=10, ge=1, le=16)
    beta: float = 0.05
    gamma0: float = 1.0
    gamma: float = 1.1
    zeta: float = 0.05
    group_size: int = 4


class PredictorShape(Strict):
    """Keyword arguments of model.Kronos; the token sizes come from the tokenizer."""

    n_layers: int = Field(default=4, ge=1)
    d_model: int = 256
    n_heads: int = 4
    ff_dim: int = 512
    ffn_dropout_p: float = 0.0
    attn_dropout_p: float = 0.0
    resid_dropout_p: float = 0.0
    token_dropout_p: float = 0.0
    learn_te: bool = True


class Phase(Strict):
    """A stretch of training with one window length. window: bars the network reads at once."""

    steps: int = Field(ge=1)
    window: int = Field(ge=8)
    batch_size: int = Field(ge=1, description="windows a step, over all workers")


class Optimisation(Strict):
    learning_rate: float = Field(default=1e-3, gt=0)
    final_share: float = Field(default=0.05, ge=0, le=1, description="last learning rate as a share of the peak")
    warmup_steps: int = Field(default=100, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.05, ge=0, description="on matrices only")
    clip_norm: float = Field(default=1.0, gt=0)


class Stage(Strict):
    phases: tuple[Phase, ...] = Field(min_length=1)
    optimisation: Optimisation = Optimisation()
    init_from: Path | None = Field(default=None, description="folder of weights to start from; default: from scratch")
    validate_every: int = Field(default=200, ge=1)
    validation_windows: int = Field(default=128, ge=1)
    log_every: int = Field(default=20, ge=1)

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)


class ColumnWeights(Strict):
    """How much each column's squared error counts; only their proportions matter."""

    open: float = Field(default=1.0, ge=0)
    high: float = Field(default=1.0, ge=0)
    low: float = Field(default=1.0, ge=0)
    close: float = Field(default=1.0, gt=0)
    volume: float = Field(default=1.0, ge=0)
    amount: float = Field(default=1.0, ge=0)


class TokenizerStage(Stage):
    network: TokenizerShape = TokenizerShape()
    column_weights: ColumnWeights | None = Field(default=None, description="default: all alike, as published")


class PredictorStage(Stage):
    network: PredictorShape = PredictorShape()
    tokenizer: Path | None = Field(default=None, description="folder of the tokenizer; default: the one this run makes")
    s2_conditioning: Literal["teacher", "sampled"] = Field(
        default="teacher",
        description="what s2 is conditioned on: the true s1, or one drawn as the published trainer does",
    )
    cross_attention: Literal["consistent", "published"] = Field(
        default="consistent",
        description="rotary of the s2 head: none, as forecasts are made; or as the published trainer has it",
    )


class RunConfig(Strict):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    storage: Path = Field(default=Path("runs"), description="folder of runs: checkpoints, metrics, the config as used")
    output: Path = Field(description="folder that gets tokenizer/ and model/ at the end")
    seed: int = Field(default=0, ge=0)
    device: str = "auto"
    num_workers: int = Field(default=1, ge=0, description="0: in this process, without Ray; no resume")
    cpus_per_worker: float = Field(default=1, gt=0)
    threads: int | None = Field(default=None, ge=1, description="torch threads a worker; default: cpus_per_worker")
    ray_address: str | None = Field(default=None, description="cluster to join; default: a private one on this machine")
    max_failures: int = Field(default=1, ge=0, description="restarts of the workers from the last checkpoint")
    keep_checkpoints: int = Field(default=2, ge=1)


class LoggingConfig(Strict):
    """Where metrics go beside metrics.jsonl in the run's folder, which is always written."""

    loggers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        default=(), description="each needs the extra of its name: pip install 'kronos-ray-serve[tensorboard]'"
    )
    project: str = Field(default="kronos", min_length=1, description="MLflow's experiment, W&B's project")
    mlflow_uri: str | None = Field(default=None, description="tracking server; default: mlruns/ in the run's folder")
    wandb_mode: Literal["offline", "online"] = "offline"


class TrainConfig(Strict):
    run: RunConfig
    data: DataConfig
    logging: LoggingConfig = LoggingConfig()
    tokenizer: TokenizerStage | None = None
    predictor: PredictorStage | None = None

    @model_validator(mode="after")
    def _something_to_do(self) -> TrainConfig:
        if self.tokenizer is None and self.predictor is None:
            raise ValueError("give a tokenizer stage, a predictor stage or both")
        if self.predictor is not None and self.tokenizer is None and self.predictor.tokenizer is None:
            raise ValueError("predictor.tokenizer must name a folder when no tokenizer is trained")
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a YAML file and applies overrides such as "run.seed=3" (the value is YAML too).

    Raises InputError for what cannot be read, unknown keys (with the nearest known one) and wrong values.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", code="unreadable_config") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {error}", code="unreadable_config") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path} must hold keys and values", code="unreadable_config")
    for override in overrides:
        _apply(raw, override)
    return parse_config(raw)


def _apply(raw: dict[str, Any], override: str) -> None:
    """Sets one value in place; list items go by their number, as in tokenizer.phases.0.steps=5."""
    dotted, separator, text = override.partition("=")
    keys = dotted.split(".")
    if not separator or not all(keys):
        raise InputError(f"override {override!r} must look like section.key=value", code="bad_override")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r}: the value is not YAML: {error}", code="bad_override") from error
    place: Any = raw
    for depth, key in enumerate(keys):
        if isinstance(place, list) and not (key.isdigit() and int(key) < len(place)):
            raise InputError(f"override {override!r}: there is no item {key!r}", code="bad_override")
        if not isinstance(place, dict | list):
            raise InputError(f"override {override!r}: {keys[depth - 1]!r} is a value, no section", code="bad_override")
        at: Any = int(key) if isinstance(place, list) else key
        if depth == len(keys) - 1:
            place[at] = value
        else:
            place = place[at] if isinstance(place, list) else place.setdefault(at, {})


def parse_config(raw: dict[str, Any]) -> TrainConfig:
    """Checks a nested dict. Raises InputError that lists every fault."""
    try:
        return TrainConfig.model_validate(raw)
    except ValidationError as error:
        faults = [_describe(raw, fault) for fault in error.errors()]
        raise InputError("configuration: " + "; ".join(faults), code="bad_config") from None


def _describe(raw: dict[str, Any], fault: Any) -> str:
    path = [part for part in fault["loc"] if part not in SOURCE_KINDS]
    name = ".".join(str(part) for part in path) or "the file"
    if fault["type"] != "extra_forbidden":
        return f"{name}: {fault['msg'].removeprefix('Value error, ')}"
    known = _known_keys(TrainConfig, [str(part) for part in fault["loc"][:-1]])
    near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.0)
    return f"{name} is not a key; the nearest known one is {near[0]!r}" if near else f"{name} is not a key"


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    """Field names of the model that the path leads to; list indices and union tags are stepped over."""
    for part in path:
        field = model.model_fields.get(part)
        if field is None:  # an index or a union's tag
            continue
        choices = _models_in(field.annotation)
        if not choices:
            return []
        tag = next((p for p in path if p in SOURCE_KINDS), None)
        tagged = [m for m in choices if "kind" in m.model_fields and tag in get_args(m.model_fields["kind"].annotation)]
        model = (tagged or choices)[0]
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, tuple, Annotated):
        return [model for part in get_args(annotation) for model in _models_in(part)]
    return []
