"""The real engine: a checkpoint on a device. The only place of the service that loads torch.

torch is imported when an engine is made, not with this module, so that the ingress and the builder stay light.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from model.engine.types import BarsCallback
from model.types import Paths, Sampling, Series, StepCallback, StopCheck
from serve_app.config import AppConfig
from serve_app.jobs import DeviceFacts, Identity


class PredictorEngine:
    """One checkpoint on one device. Thread-safe."""

    def __init__(self, identity: Identity, device: DeviceFacts, predictor: Any) -> None:
        self.identity = identity
        self.device = device
        self._predictor = predictor

    def forecast(
        self,
        series: Series,
        sampling: Sampling,
        *,
        window: str = "exact",
        should_stop: StopCheck | None = None,
        on_step: StepCallback | None = None,
        on_bars: BarsCallback | None = None,
    ) -> Paths:
        paths: Paths = self._predictor.forecast_series(
            series, sampling, window=window, should_stop=should_stop, on_step=on_step, on_bars=on_bars
        )
        return paths

    def cache_slots(self) -> tuple[int, int]:
        slots: tuple[int, int] = self._predictor.engine.cache_slots()
        return slots

    def stats(self) -> Mapping[str, float]:
        return asdict(self._predictor.engine.stats())


class EngineFactory:
    """(alias, group) → a loaded engine, as the configuration says. Crosses processes as what it is made of."""

    def __init__(self, config: AppConfig) -> None:
        self.config = config

    def __call__(self, alias: str, group: str) -> PredictorEngine:
        """Blocks until the checkpoint is on its device. Raises model.errors.CheckpointError."""
        from model.predictor import KronosPredictor
        from model.registry import CheckpointSource, load_checkpoint

        settings = self.config.models[alias]
        source = CheckpointSource(
            id=alias,
            model=settings.source,
            tokenizer=settings.tokenizer,
            revision=settings.revision,
            tokenizer_revision=settings.tokenizer_revision,
            max_context=settings.max_context,
        )
        checkpoint = load_checkpoint(source)
        requested, warning = group_device(settings.device, group)
        replicas = self.config.groups.gpu if group == "gpu" else self.config.groups.cpu
        predictor = KronosPredictor(
            checkpoint.model,
            checkpoint.tokenizer,
            requested,
            settings.max_context,
            self.config.clip,
            cache_bytes=int(replicas.cache_gb * 2**30),
        )
        identity = Identity(
            id=alias,
            repo=settings.repo,
            revision=checkpoint.revision,
            sha256=checkpoint.sha256,
            parameters=checkpoint.parameters,
            max_context=settings.max_context,
            model_version=checkpoint.model_version,
            tokenizer_version=checkpoint.tokenizer_version,
        )
        return PredictorEngine(identity, device_facts(predictor.device, warning or predictor.device_warning), predictor)

    def device(self, group: str) -> DeviceFacts:
        """What a replica of the group runs the default model on, before anything is loaded. Raises nothing."""
        from model.device import resolve_device

        requested, warning = group_device(self.config.models[self.config.default_model].device, group)
        resolved, fallback = resolve_device(requested)
        return device_facts(resolved, warning or fallback)

    def prepare_process(self, threads: int) -> None:
        """Sets the number of threads that torch computes one forecast with."""
        import torch

        torch.set_num_threads(threads)


def group_device(requested: str, group: str) -> tuple[str, str | None]:
    """What to ask model.device for in a replica of the group, and a warning if that is not what the model asks for.

    The CPU group forces "cpu": on a GPU host, Ray hides no GPU from a replica that reserved none. It lets "mps"
    through, which Ray does not count as a GPU. A GPU group's "auto" asks for "cuda", so that an absent one is said.
    """
    if group == "gpu":
        return ("cuda" if requested == "auto" else requested), None
    if requested in ("auto", "cpu", "mps"):
        return ("mps" if requested == "mps" else "cpu"), None
    return "cpu", f"device {requested!r} was requested but this replica belongs to the CPU group; using 'cpu'"


def device_facts(device: Any, warning: str | None) -> DeviceFacts:
    """DeviceFacts of a torch device."""
    from model.device import device_info

    info = device_info(device)
    return DeviceFacts(
        device=str(device),
        device_type=info.device_type,
        device_name=info.device_name,
        precision=info.precision,
        precision_reason=info.precision_reason,
        gpu_available=info.gpu_available,
        cuda_available=info.cuda_available,
        mps_available=info.mps_available,
        device_warning=warning,
    )
