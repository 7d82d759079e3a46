"""The real engine: a checkpoint on a device. The only place of the service that loads torch.

torch is imported when an engine is made, not with this module, so that the ingress and the builder stay light.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from model.calibration import Calibration, load_calibration
from model.engine.types import BarsCallback
from model.types import Paths, Sampling, Series, StepCallback, StopCheck
from serve_app.config import AppConfig, ModelConfig
from serve_app.jobs import Candidate, DeviceFacts, Identity, joined_warnings

REHEARSAL_CACHE_BYTES = 32 * 2**20
"""Cache of the engine that only shows whether a checkpoint works."""


class PredictorEngine:
    """One checkpoint on one device. Thread-safe."""

    def __init__(
        self, identity: Identity, device: DeviceFacts, predictor: Any, calibration: Calibration | None = None
    ) -> None:
        self.identity = identity
        self.calibration = calibration
        self._facts = device
        self._predictor = predictor
        # Made here, with its whole cache: what does not fit fails now, and not in somebody's request.
        self._engine = predictor.engine

    @property
    def device(self) -> DeviceFacts:
        """With what the engine found out since: that it cannot compile, or capture CUDA graphs, here."""
        if not self._engine.warnings:
            return self._facts
        return replace(self._facts, device_warning=joined_warnings(self._facts.device_warning, *self._engine.warnings))

    def forecast(
        self,
        series: Series,
        sampling: Sampling,
        *,
        window: str = "exact",
        should_stop: StopCheck | None = None,
        on_step: StepCallback | None = None,
        on_bars: BarsCallback | None = None,
        companions: object | None = None,
    ) -> Paths:
        paths: Paths = self._predictor.forecast_series(
            series,
            sampling,
            window=window,
            should_stop=should_stop,
            on_step=on_step,
            on_bars=on_bars,
            companions=companions,
        )
        return paths

    def release_thread(self) -> None:
        self._engine.release_thread()

    def cache_slots(self) -> tuple[int, int]:
        slots: tuple[int, int] = self._engine.cache_slots()
        return slots

    def stats(self) -> Mapping[str, float]:
        return asdict(self._engine.stats())

    def stalled_s(self) -> float:
        seconds: float = self._engine.stalled_s()
        return seconds


class EngineFactory:
    """(alias, settings) → a candidate for an engine in a replica of the group."""

    def __init__(self, config: AppConfig, group: str) -> None:
        self._group = group
        self._settings = config.group(group)
        self._clip = config.clip
        self._default_device = config.models[config.default_model].device

    def __call__(self, alias: str, settings: ModelConfig) -> Candidate:
        """Blocks until the checkpoint is read and verified. Raises model.errors.CheckpointError."""
        from model.device import resolve_device
        from model.engine.packing import copies_of_weights
        from model.predictor import COMPILED_ROWS
        from model.registry import BUNDLED_FOLDER, CheckpointSource, load_checkpoint

        checkpoint = load_checkpoint(
            CheckpointSource(
                id=alias,
                model=settings.source,
                tokenizer=settings.tokenizer,
                revision=settings.revision,
                tokenizer_revision=settings.tokenizer_revision,
                max_context=settings.max_context,
            )
        )
        folder = BUNDLED_FOLDER if settings.source == "bundled" else Path(settings.source)
        calibration = load_calibration(folder, checkpoint.sha256)
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
        requested, warning = group_device(settings.device, self._group)
        device, fallback = resolve_device(requested)
        facts = device_facts(device, self._settings.precision, warning or fallback)
        cache_bytes = int(self._settings.cache_gb * 2**30)

        def engine(cache_bytes: int, **options: Any) -> PredictorEngine:
            from model.predictor import KronosPredictor

            predictor = KronosPredictor(
                checkpoint.model,
                checkpoint.tokenizer,
                device,
                settings.max_context,
                self._clip,
                precision=facts.precision,
                cache_bytes=cache_bytes,
                own_thread=True,
                **options,
            )
            return PredictorEngine(identity, facts, predictor, calibration)

        weights = sum(
            tensor.nbytes for network in (checkpoint.model, checkpoint.tokenizer) for tensor in network.parameters()
        )
        options = {"compile": True} if self._settings.compile else {}
        compiled = len(COMPILED_ROWS) if options else 0
        copies = copies_of_weights(checkpoint.model, facts.precision, device, compiled)
        return Candidate(
            size=weights * (1 + copies) + cache_bytes,
            start=lambda: engine(cache_bytes, **options),
            rehearse=lambda: engine(min(cache_bytes, REHEARSAL_CACHE_BYTES)),
        )

    def device(self) -> DeviceFacts:
        """What a replica of the group runs the default model on, before anything is loaded. Raises nothing."""
        from model.device import resolve_device

        requested, warning = group_device(self._default_device, self._group)
        resolved, fallback = resolve_device(requested)
        return device_facts(resolved, self._settings.precision, warning or fallback)

    def prepare_process(self, threads: int) -> None:
        """For this process: the threads that torch computes one forecast with; in the CPU group, no GPU to see."""
        if self._group == "cpu":
            # Belt and braces beside the forced device. Before anything imports torch, and not as a runtime_env, for
            # which Ray starts every worker anew.
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
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


def device_facts(device: Any, precision: str, warning: str | None) -> DeviceFacts:
    """DeviceFacts of a torch device at a requested precision."""
    from model.device import device_info, resolve_precision

    info = device_info(device)
    used, reason, fallback = resolve_precision(precision, device)
    return DeviceFacts(
        device=str(device),
        device_type=info.device_type,
        device_name=info.device_name,
        precision=used,
        precision_reason=reason if fallback is None else f"{reason}; {fallback}",
        gpu_available=info.gpu_available,
        cuda_available=info.cuda_available,
        mps_available=info.mps_available,
        device_warning=joined_warnings(warning, fallback),
    )
