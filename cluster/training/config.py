"""The trainer's configuration: one YAML file, checked key by key before anything starts.

Top-level keys: run, training, data, logging, tokenizer, predictor. The last two are stages, run in that order; leave
one out to skip it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    field_validator,
    model_validator,
)

from cluster.candles.data_config import DataConfig, Seed, Strict
from cluster.redact import redact
from model.registry import KNOWN_NAMES, Part, brings_tokenizer, network_source

STAGES: dict[str, Part] = {"tokenizer": "tokenizer", "predictor": "model"}
"""Stage → folder of its network below run.output, in the order they run."""
RAY_ONLY = ("ray_address", "max_failures")
"""Keys of `training` that a run in this process does not read."""


def _count_or_auto(value: Any) -> int | str:
    if value == "auto" or (type(value) is int and value >= 1):
        return value
    raise ValueError(f"must be a whole number from 1 or auto, not {value!r}")


def _workers(value: Any) -> int | tuple[int, int]:
    """A number, or the least and the most that an elastic run may have."""
    if type(value) is int and value >= 0:
        return value
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(n) is int for n in value):
        low, high = value
        if 1 <= low <= high:
            return low, high
    raise ValueError(
        f"must be 0 (in this process), a number greater than or equal to 0, or [min, max] with 1 <= min <= max, "
        f"not {value!r}"
    )


_AsItIs = PlainSerializer(lambda value: value)
CountOrAuto = Annotated[int | Literal["auto"], PlainValidator(_count_or_auto), _AsItIs]
Workers = Annotated[int | tuple[int, int], PlainValidator(_workers), _AsItIs]


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
    batch_size: CountOrAuto = Field(
        description="windows a step, over all workers; auto: as many as fit into the workers' memory, found once a run"
    )


class Optimisation(Strict):
    learning_rate: float = Field(default=1e-3, gt=0)
    final_share: float = Field(default=0.05, ge=0, le=1, description="last learning rate as a share of the peak")
    warmup_steps: int = Field(default=100, ge=0, description="fewer than the steps of all phases together")
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.05, ge=0, description="on matrices only")
    clip_norm: float = Field(default=1.0, gt=0)
    max_skipped: int = Field(
        default=10, ge=0, description="steps in a row with a gradient that is not finite; one more ends the run"
    )


class Lora(Strict):
    """Low-rank adapters beside the linear layers of the transformer blocks (cluster.training.adapters)."""

    rank: int = Field(default=8, ge=1)
    alpha: float = Field(default=16.0, gt=0, description="the adapters' output is scaled by alpha / rank")
    targets: tuple[Literal["q", "k", "v", "o", "ffn"], ...] = Field(default=("q", "k", "v", "o", "ffn"), min_length=1)


class EarlyStopping(Strict):
    """Ends a stage once validation stops improving."""

    patience: int = Field(ge=1, description="validations in a row that may fail to improve")
    min_delta: float = Field(default=0.0, ge=0, description="what counts as better than the best before")


class Stage(Strict):
    phases: tuple[Phase, ...] = Field(min_length=1)
    optimisation: Optimisation = Optimisation()
    init_from: Path | None = Field(
        default=None,
        description="weights to start from: a bundle, a network's own folder, a name such as kronos-small, or a Hub "
        "repository; default: from scratch",
    )
    method: Literal["full", "lora"] = Field(default="full", description="train the weights, or adapters beside them")
    lora: Lora | None = Field(default=None, description="with method: lora; default: rank 8 on q, k, v, o and ffn")
    depth: int | None = Field(
        default=None, ge=1, le=5, description="what method: full trains: 1 the heads only … 5 everything (the default)"
    )
    early_stopping: EarlyStopping | None = Field(default=None, description="default: all steps are made")
    keep: int = Field(default=2, ge=1, description="checkpoints kept: this many of the best, and the last")
    validate_every: int = Field(default=200, ge=1, description="steps from one validation and checkpoint to the next")
    validation_windows: int = Field(default=128, ge=1)
    log_every: int = Field(default=20, ge=1)

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    @model_validator(mode="after")
    def _options_that_belong_together(self) -> Stage:
        fresh = self.init_from is None
        if self.method == "lora" and fresh:
            raise ValueError("method: lora needs init_from, the weights that the adapters stand beside")
        if self.method == "lora" and self.depth is not None:
            raise ValueError("depth is for method: full; with lora the adapters alone are trained: leave depth out")
        if self.method == "full" and self.lora is not None:
            raise ValueError("lora options are given, but method is full: set method: lora or leave them out")
        if fresh and self.depth not in (None, 5):
            raise ValueError("depth below 5 freezes weights, and without init_from they are random: give init_from")
        if not fresh and getattr(self, "network", None) is not None:
            raise ValueError("init_from brings its own network (config.json): leave network out")
        return self

    @model_validator(mode="after")
    def _a_warmup_that_ends(self) -> Stage:
        warmup = self.optimisation.warmup_steps
        if warmup >= self.steps:
            # Also where it is the default: a rate that only ever rises is nothing to choose in silence.
            raise ValueError(
                f"optimisation.warmup_steps={warmup} leaves no step after it, for the phases have {self.steps} in all: "
                f"set it to less than {self.steps}, or give the phases more steps"
            )
        return self


class ColumnWeights(Strict):
    """How much each column's squared error counts; only their proportions matter."""

    open: float = Field(default=1.0, ge=0)
    high: float = Field(default=1.0, ge=0)
    low: float = Field(default=1.0, ge=0)
    close: float = Field(default=1.0, gt=0)
    volume: float = Field(default=1.0, ge=0)
    amount: float = Field(default=1.0, ge=0)


class TokenizerStage(Stage):
    network: TokenizerShape | None = Field(default=None, description="default: the shape above, or init_from's")
    column_weights: ColumnWeights | None = Field(default=None, description="default: all alike, as published")


class PredictorStage(Stage):
    network: PredictorShape | None = Field(default=None, description="default: the shape above, or init_from's")
    tokenizer: Path | None = Field(
        default=None, description="named as init_from is; default: the one this run makes, else that of init_from"
    )
    s2_conditioning: Literal["teacher", "sampled", "mixed"] = Field(
        default="teacher",
        description="what s2 is conditioned on: the true s1, or one drawn as the published trainer does, or either",
    )
    mixed_share: float = Field(default=0.5, ge=0, le=1, description="with mixed: share of positions with a drawn s1")
    cross_attention: Literal["consistent", "published"] = Field(
        default="consistent",
        description="rotary of the s2 head: none, as forecasts are made; or as the published trainer has it",
    )

    @model_validator(mode="after")
    def _share_of_a_mixture(self) -> PredictorStage:
        if self.s2_conditioning != "mixed" and self.mixed_share != 0.5:
            raise ValueError(f"mixed_share is for s2_conditioning: mixed, not {self.s2_conditioning}: leave it out")
        return self


class RunConfig(Strict):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    storage: Path = Field(default=Path("runs"), description="folder of runs, which all nodes of a cluster must share")
    output: Path = Field(
        default_factory=lambda known: known["storage"] / known["name"] / "output",
        description="folder that gets tokenizer/ and model/ at the end; default: output in the run's own folder",
    )
    seed: Seed = 0


class TrainingConfig(Strict):
    """Where and how it is computed."""

    device: str = Field(default="auto", description="auto, cpu, cuda, mps; what is absent becomes cpu, with a warning")
    require_gpu: bool = Field(default=False, description="an absent GPU is an error instead")
    num_workers: Workers = Field(
        default=1, description="0: in this process, without Ray; [min, max]: as many as the cluster has room for"
    )
    cpus_per_worker: float = Field(default=1, gt=0)
    threads: int | None = Field(default=None, ge=1, description="torch threads a worker; default: cpus_per_worker")
    ray_address: str | None = Field(default=None, description="cluster to join; default: a private one on this machine")
    max_failures: int = Field(default=1, ge=0, description="restarts of the workers from the last checkpoint")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    micro_batch_size: CountOrAuto | None = Field(
        default=None, description="windows a worker computes at once, gradients add up; default: all of its share"
    )

    @property
    def most_workers(self) -> int:
        return max(1, self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1])

    @property
    def without_effect(self) -> tuple[str, ...]:
        """Keys of Ray's workers that were given although there are none: num_workers is 0."""
        given = (name for name in RAY_ONLY if name in self.model_fields_set and getattr(self, name) is not None)
        return tuple(given) if self.num_workers == 0 else ()


class LoggingConfig(Strict):
    """Where metrics go beside metrics.jsonl in the run's folder, which is always written."""

    loggers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        default=(), description="each needs the extra of its name: pip install 'kronos-ray-serve[tensorboard]'"
    )
    project: str = Field(default="kronos", min_length=1, description="MLflow's experiment, W&B's project")
    mlflow_uri: str | None = Field(default=None, description="tracking server; default: mlflow.db in the run's folder")
    wandb_mode: Literal["offline", "online"] = "offline"

    @field_validator("mlflow_uri")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        if uri is not None and redact(uri, {}) != uri:
            raise ValueError(
                "leave user and password out: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD say them"
            )
        return uri


class TrainConfig(Strict):
    run: RunConfig
    training: TrainingConfig = TrainingConfig()
    data: DataConfig
    logging: LoggingConfig = LoggingConfig()
    tokenizer: TokenizerStage | None = None
    predictor: PredictorStage | None = None

    @model_validator(mode="after")
    def _something_to_do(self) -> TrainConfig:
        if self.tokenizer is None and self.predictor is None:
            raise ValueError("give a tokenizer stage, a predictor stage or both")
        return self

    @model_validator(mode="after")
    def _one_tokenizer(self) -> TrainConfig:
        if self.predictor is None:
            return self
        named, parent = self.predictor.tokenizer, self.predictor.init_from
        if self.tokenizer is not None and named is not None:
            raise ValueError(
                f"predictor.tokenizer names {named}, but the predictor takes the tokenizer that this run makes: leave "
                "predictor.tokenizer out, or the tokenizer stage"
            )
        if self.tokenizer is None and named is None and (parent is None or not brings_tokenizer(parent)):
            raise ValueError(
                "predictor.tokenizer must name a folder, a model or a Hub repository when no tokenizer is trained"
                + (f": {_without_tokenizer(parent)}" if parent is not None else "")
            )
        return self

    @model_validator(mode="after")
    def _parents_stay(self) -> TrainConfig:
        for name, folder in STAGES.items():
            stage: Stage | None = getattr(self, name)
            if stage is None or stage.init_from is None:
                continue
            if Path(network_source(stage.init_from, folder)[0]).resolve() == (self.run.output / folder).resolve():
                raise ValueError(
                    f"{name}.init_from lies in run.output, which would overwrite it: choose another run.output"
                )
        return self

    @model_validator(mode="after")
    def _a_window_for_every_worker(self) -> TrainConfig:
        workers = self.training.most_workers
        for name in STAGES:
            for number, phase in enumerate(getattr(self, name).phases if getattr(self, name) else ()):
                if phase.batch_size != "auto" and phase.batch_size < workers:
                    raise ValueError(
                        f"{name}.phases.{number}.batch_size: {phase.batch_size} windows cannot be shared by {workers} "
                        "workers: raise it to their number"
                    )
        return self


def _without_tokenizer(parent: Path) -> str:
    """Why a parent brings no tokenizer, and what does. Most names that bring none are mistyped."""
    missing = "" if parent.is_dir() else "; there is no folder of that name"
    return f"init_from={parent} brings none, as a bundle's folder and {KNOWN_NAMES} do{missing}"
