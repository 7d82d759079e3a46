"""AppConfig: the `args:` of serve_config.yaml. Unknown keys are errors that name the nearest known one, at every level.

Environment variables are applied on top by serve_app.environment, once, when the application is built.
"""

from __future__ import annotations

import difflib
import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from model.engine.types import WindowPolicy
from serve_app.keys import KeyRing, address_error, parse_keys
from serve_app.schemas import Temperature

ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
DEVICE = re.compile(r"auto|cpu|mps|cuda(:[0-9]{1,4})?")
BUNDLED_ALIAS = "kronos-bundled"


def nearest(name: str, known: list[str]) -> str:
    """A hint such as ", did you mean 'models'?"; the list of what is known if nothing is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"


class Strict(BaseModel):
    """A section of the configuration. Errors do not show what was given: it may be a secret in the wrong place."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    hint = nearest(str(key), list(cls.model_fields))
                    raise PydanticCustomError(
                        "unknown_key", "unknown key {key}{hint}", {"key": repr(key), "hint": hint}
                    )
        return data


def _public_name(source: str) -> str:
    """A local folder's path is nobody's business, and a relative one may look like a repository."""
    is_repo = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", source) and not os.path.isdir(source)
    return source if source == "bundled" or is_repo else "local"


def _check_device(device: str) -> str:
    if not DEVICE.fullmatch(device):
        raise ValueError("must be auto, cpu, cuda, cuda:N (N = 0, 1, …) or mps")
    return device


Device = Annotated[str, AfterValidator(_check_device)]


def _check_window(policy: str) -> str:
    return str(WindowPolicy.parse(policy))


class ModelConfig(Strict):
    """Where a model comes from and how it runs.

    source: "bundled", a local folder (that holds model/ and tokenizer/, or a model folder with `tokenizer` given), or a
        Hub repository "org/name".
    revision, tokenizer_revision: a commit, tag or branch; Hub repositories only.
    device: what to run on where the replica group leaves a choice; a CPU group always runs on the CPU.
    max_context: bars that the model sees at once.
    always_on: loaded and warmed up when a replica starts, and waited for by /v1/readyz; otherwise on first use.
    """

    source: str = Field(min_length=1)
    revision: str | None = None
    tokenizer: str | None = None
    tokenizer_revision: str | None = None
    device: Device = "auto"
    max_context: int = Field(default=512, ge=1, le=65536)
    always_on: bool = False

    @property
    def repo(self) -> str:
        """What may be shown of the source: "bundled", the repository, or "local"."""
        return _public_name(self.source)

    @property
    def tokenizer_repo(self) -> str | None:
        return None if self.tokenizer is None else _public_name(self.tokenizer)


class Autoscaling(Strict):
    """Replicas follow the work, rows × steps, that is waiting or running.

    min_replicas: 0 lets a group sleep; the next request wakes it and waits for it, at most limits.replica_wait_s.
    target_work: how much of it one replica should have.
    upscale_delay_s, downscale_delay_s: for how long more or fewer replicas must have been right before they come or go.
    """

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(ge=1)
    target_work: int = Field(default=65_536, ge=1)
    upscale_delay_s: float = Field(default=2.0, ge=0)
    downscale_delay_s: float = Field(default=300.0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Autoscaling:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas is above max_replicas")
        return self


class GroupConfig(Strict):
    """One replica group.

    num_cpus: CPUs that Ray reserves per replica; also the number of threads torch computes with (at least 1).
    replicas: a fixed number, or give `autoscaling` instead.
    workers: series that step together in a replica's engine; others wait in its queue.
    cache_gb: memory for keys and values of each loaded model, set aside once; what could never fit is refused.
    model_memory_gb: for all loaded models of a replica, weights and caches; those neither always on nor in use make
        room for others. While a model is replaced, its two versions count as one.
    max_outstanding_work: rows × steps that may wait or run per live replica; more goes to the other group or is a 429.
    max_wait_s: the same in seconds, at the rate at which the group's work came back lately; holds once there are more
        series than workers.
    precision: of the model's arithmetic; "auto" is what suits the device. What a device cannot do falls back to auto.
    compile: compile the model for its device; slower to start.
    hang_timeout_s: a replica whose engine has work and finishes no step for so long is replaced.
    """

    num_cpus: float = Field(default=1.0, gt=0)
    replicas: int | None = Field(default=None, ge=1)
    autoscaling: Autoscaling | None = None
    workers: int = Field(default=16, ge=1, le=256)
    cache_gb: float = Field(default=2.0, gt=0)
    model_memory_gb: float = Field(default=8.0, gt=0)
    max_outstanding_work: int = Field(default=524_288, ge=1)
    max_wait_s: float = Field(default=3.0, gt=0)
    precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    compile: bool = False
    hang_timeout_s: float = Field(default=60.0, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> GroupConfig:
        if self.replicas is not None and self.autoscaling is not None:
            raise ValueError("give either replicas or autoscaling, not both")
        if self.cache_gb >= self.model_memory_gb:
            raise ValueError("cache_gb fills model_memory_gb: no model would fit")
        return self


class CpuGroupConfig(GroupConfig):
    """The CPU group. It never touches a GPU, and always exists: it answers where the GPU group does not."""

    num_gpus: float = Field(default=0.0, ge=0, le=0)


class GpuGroupConfig(GroupConfig):
    """The GPU group.

    mode: "auto" has at every moment as many replicas as the cluster's GPUs hold, up to `replicas` or max_replicas;
        "fixed" always asks Ray for them (so that a node autoscaler sees the demand), "off" never.
    num_gpus: GPUs per replica; a fraction shares one.
    num_cpus: so few by default that both groups fit on a host with two CPUs.
    """

    num_cpus: float = Field(default=0.5, gt=0)
    mode: Literal["auto", "fixed", "off"] = "auto"
    num_gpus: float = Field(default=1.0, gt=0)


class GroupsConfig(Strict):
    gpu: GpuGroupConfig = GpuGroupConfig()
    cpu: CpuGroupConfig = CpuGroupConfig()


class IngressConfig(Strict):
    """The HTTP side. /v1/metrics counts per process: with more than one replica, each answers with its own numbers."""

    num_cpus: float = Field(default=0.1, ge=0)
    replicas: int = Field(default=1, ge=1)


class Limits(Strict):
    """What a client may ask for, and how long anything may take. Published at /v1/info."""

    max_request_mb: float = Field(default=32.0, gt=0)
    max_bodies_mb: float = Field(
        default=256.0,
        gt=0,
        description="bodies of all requests in work, per ingress process; more are a 429, but one alone always fits",
    )
    max_series: int = Field(default=512, ge=1)
    max_history: int = Field(default=2048, ge=1)
    max_horizon: int = Field(default=512, ge=1)
    max_samples: int = Field(default=512, ge=1)
    max_quantiles: int = Field(default=32, ge=1)
    max_cost: int = Field(default=262_144, ge=1, description="samples × horizon, summed over the series")
    max_answer_rows: int = Field(
        default=2_097_152, ge=1, description="(mean + quantiles + paths, if returned) × horizon, summed over the series"
    )
    max_concurrent: int = Field(
        default=512, ge=1, description="forecast requests in work at once, per ingress process; more are a 429"
    )
    max_concurrent_per_client: int = Field(
        default=0, ge=0, description="the same per API key, or per address where there are no keys; 0 is off"
    )
    body_timeout_s: float = Field(default=30.0, gt=0, description="a body that takes longer to arrive is a 408")
    request_timeout_s: float = Field(default=120.0, gt=0)
    inference_timeout_s: float = Field(default=110.0, gt=0)
    replica_wait_s: float = Field(default=20.0, ge=0, description="wait for a replica if there is none, then 503")
    load_wait_s: float = Field(default=10.0, ge=0, description="wait for a model that is being loaded, then 503")
    load_retry_s: float = Field(default=30.0, gt=0, description="pause before a failed checkpoint is tried again")
    rate_limit_per_minute: int = Field(
        default=0, ge=0, description="forecast requests per API key or address; 0 is off"
    )
    security_enabled: bool = Field(
        default=True, description="the limits per client; API keys and the total limits hold in any case"
    )


class AuthConfig(Strict):
    """Who may ask; see docs/security.md. Without keys everybody may, and only the loopback address is listened on.

    keys_file: one line per API key, as `python -m serve_app.cli new-key` prints it; read again when it changes.
    keys: the same lines as text, for the environment variable KRONOS_API_KEYS; hashes, never keys.
    allow_anonymous_on_public_address: true serves anybody who can reach a public address, without keys.
    """

    keys_file: str | None = None
    keys: str = ""
    allow_anonymous_on_public_address: bool = False

    @field_validator("keys")
    @classmethod
    def _readable(cls, keys: str) -> str:
        parse_keys(keys)
        return keys

    @property
    def required(self) -> bool:
        """True if requests need a key."""
        return bool(self.keys_file or self.keys.strip())

    def key_ring(self) -> KeyRing | None:
        """The keys in force; None if there are none. Reads the file. Raises serve_app.keys.KeyFileError."""
        return KeyRing(self.keys_file, self.keys) if self.required else None

    def address_error(self, host: str | None) -> str | None:
        """Why the service must not listen on this address; None if it may. host None: there is no HTTP."""
        return address_error(host, self.required, self.allow_anonymous_on_public_address)


class Defaults(Strict):
    """What a request that does not say gets. pred_len is the horizon of a /v1/forecast that names none."""

    pred_len: int = Field(default=24, ge=1)
    temperature: Temperature = 1.0
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=0.9, ge=0, le=1)
    sample_count: int = Field(default=1, ge=1)
    window: Annotated[str, AfterValidator(_check_window)] = Field(
        default="exact", description="what happens when a forecast outgrows the context: exact, hop:K or fit"
    )


LIVE = ("models", "default_model", "models_root", "limits", "defaults")
"""Keys of AppConfig that a running service takes over without a restart, as `user_config` of its deployments."""


class AppConfig(Strict):
    """The whole application. See serve_config.yaml for an example with comments.

    models_root: a folder of checkpoints, seen by every node. <models_root>/<name>/ with the folders model/ and
        tokenizer/ is served as the model <name>, from when it appears.
    hybrid: the CPU group also takes what a full GPU group cannot; otherwise it answers only where no GPU replica lives.
    """

    models: dict[str, ModelConfig] = Field(
        default_factory=lambda: {BUNDLED_ALIAS: ModelConfig(source="bundled", always_on=True)}, min_length=1
    )
    default_model: str = BUNDLED_ALIAS
    models_root: str | None = None
    hybrid: bool = True
    groups: GroupsConfig = GroupsConfig()
    ingress: IngressConfig = IngressConfig()
    limits: Limits = Limits()
    auth: AuthConfig = AuthConfig()
    defaults: Defaults = Defaults()
    clip: float = Field(default=5.0, gt=0)
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"

    @model_validator(mode="after")
    def _consistent(self) -> AppConfig:
        for alias in self.models:
            if not ALIAS.fullmatch(alias):
                raise ValueError(f"model name {alias[:64]!r} must match {ALIAS.pattern}")
        if self.default_model not in self.models:
            raise ValueError(
                f"default_model {self.default_model!r} is not in models{nearest(self.default_model, list(self.models))}"
            )
        for field, default, limit in (
            ("pred_len", self.defaults.pred_len, self.limits.max_horizon),
            ("sample_count", self.defaults.sample_count, self.limits.max_samples),
        ):
            if default > limit:
                raise ValueError(f"defaults.{field} is {default}, over the limit of {limit}")
        return self

    def is_always_on(self, alias: str) -> bool:
        """The default model is always on, whether it says so or not: it is what /v1/predict answers with."""
        return alias == self.default_model or self.models[alias].always_on

    def group(self, name: str) -> GroupConfig:
        return self.groups.gpu if name == "gpu" else self.groups.cpu

    @property
    def may_sleep(self) -> bool:
        """True if the service may be without a replica because nobody asks for anything."""
        scaling = self.groups.cpu.autoscaling
        return scaling is not None and scaling.min_replicas == 0

    @property
    def always_on(self) -> list[str]:
        return [alias for alias in self.models if self.is_always_on(alias)]
