"""What the service says about itself: readiness, health, models, replicas, settings. No remote call, path or secret."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import psutil

from serve_app import schemas
from serve_app.catalog import Catalog
from serve_app.config import AppConfig
from serve_app.draining import Drain
from serve_app.jobs import Backend, ReplicaView, joined_warnings

_STARTED = time.monotonic()
_STATES = ("loaded", "loading", "failed", "idle")
"""Of a model over all replicas: the first that any replica reports."""

ROUTES = (
    "/v1/forecast",
    "/v1/predict/single",
    "/v1/predict/batch",
    "/v1/models",
    "/v1/replicas",
    "/v1/readyz",
    "/v1/healthz",
    "/v1/healthz/detailed",
    "/v1/info",
    "/v1/metrics",
    "/docs",
)


def public_settings(config: AppConfig) -> dict[str, Any]:
    """The effective configuration without keys and local paths: /v1/models shows the checksum of a folder's model."""
    settings = config.model_dump(mode="json")
    for alias, model in config.models.items():
        settings["models"][alias]["source"] = model.repo
        settings["models"][alias]["tokenizer"] = model.tokenizer_repo
    settings["models_root"] = None if config.models_root is None else "local"
    allow = config.auth.allow_anonymous_on_public_address
    settings["auth"] = {"keys_required": config.auth.required, "allow_anonymous_on_public_address": allow}
    return settings


class Status:
    """Reads the backend's listing, which is kept up to date without our asking."""

    def __init__(
        self, backend: Backend, config: AppConfig, warnings: Sequence[str], drain: Drain | None = None
    ) -> None:
        self.backend = backend
        self.config = config
        self.warnings = tuple(warnings)
        self.drain = drain or Drain()
        self.catalog = Catalog(config)

    def _ordered(self) -> list[ReplicaView]:
        order = {name: i for i, name in enumerate(self.backend.groups())}
        return sorted(self.backend.replicas(), key=lambda view: (order.get(view.group, len(order)), view.replica_id))

    def readiness(self) -> tuple[dict[str, Any], bool]:
        views = self._ordered()
        failures = self.backend.load_failures()
        states = {alias: _state(views, alias, failures) for alias in self.config.always_on}
        awake = all(state == "loaded" for state in states.values())
        ready = (awake or self._asleep(views)) and not self.drain.draining
        body = {
            "status": "draining" if self.drain.draining else "ok" if ready else "loading",
            "model_loaded": states[self.config.default_model] == "loaded",
            "device": views[0].device.device if views else None,
            "device_warning": self._device_warning(views),
            "models": [{"id": alias, "state": state} for alias, state in states.items()],
        }
        return body, ready

    def _asleep(self, views: Sequence[ReplicaView]) -> bool:
        """A service that sleeps because nobody asks is well: the next request wakes it.

        Not for a while after the last did so in vain; then it may try again, since nothing else would.
        """
        since = time.monotonic() - self.config.limits.load_retry_s
        failures = self.backend.load_failures()
        failed = any(alias in failures and failures[alias].at > since for alias in self.config.always_on)
        return self.config.may_sleep and not views and not failed

    def _device_warning(self, views: Sequence[ReplicaView]) -> str | None:
        first = views[0].device.device_warning if views else None
        return joined_warnings(self.backend.device_warning, first)

    def health(self) -> dict[str, Any]:
        views = self._ordered()
        default = self.config.default_model
        loaded = _state(views, default) == "loaded"
        model_ok = loaded or self._asleep(views)
        facts = next((view.models[default] for view in views if _state([view], default) == "loaded"), {})
        process, system, disk = psutil.Process(), psutil.virtual_memory(), psutil.disk_usage("/")
        memory_ok, disk_ok = system.percent < 95, disk.percent < 95
        device = views[0].device if views else None
        return {
            "status": "healthy" if model_ok and memory_ok and disk_ok else "degraded",
            "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
            "uptime_seconds": round(time.monotonic() - _STARTED, 1),
            "checks": {
                "model": {"status": _word(model_ok), "loaded": loaded, "version": facts.get("model_version")},
                "memory": {
                    "status": _word(memory_ok),
                    "process_mb": _mb(process.memory_info().rss),
                    "system_total_mb": _mb(system.total),
                    "system_available_mb": _mb(system.available),
                    "system_percent": system.percent,
                },
                "disk": {
                    "status": _word(disk_ok),
                    "total_gb": round(disk.total / 2**30, 2),
                    "free_gb": round(disk.free / 2**30, 2),
                    "percent": disk.percent,
                },
            },
            "device": {
                name: getattr(device, name) if device else None
                for name in (
                    "device_type",
                    "device_name",
                    "gpu_available",
                    "cuda_available",
                    "mps_available",
                    "precision",
                    "precision_reason",
                )
            },
        }

    def models(self) -> list[dict[str, Any]]:
        views = self._ordered()
        answer, always_on, failures = [], self.config.always_on, self.backend.load_failures()
        for alias, spec in self.catalog.all().items():
            settings = spec.settings
            loaded = [view for view in views if _state([view], alias) == "loaded"]
            facts: Mapping[str, Any] = loaded[0].models[alias] if loaded else {}
            remembered = failures.get(alias)
            failed = next(
                (view.models[alias].get("error") for view in views if _state([view], alias) == "failed"),
                remembered and remembered.message,
            )
            state = _state(views, alias, failures)
            pending = next((p for view in loaded if (p := view.models[alias].get("pending"))), None)
            answer.append(
                {
                    "id": alias,
                    # What is loaded stands beside its sha256; what shall replace it is "pending".
                    "repo": facts.get("repo", settings.repo),
                    "revision": facts.get("revision", settings.revision),
                    "sha256": facts.get("sha256"),
                    "parameters": facts.get("parameters"),
                    "context": facts.get("max_context", settings.max_context),
                    "groups": sorted({view.group for view in loaded}),
                    "replicas": len(loaded),
                    "state": state,
                    "default": alias == self.config.default_model,
                    "always_on": alias in always_on,
                    "pending": pending,
                    "error": failed if state == "failed" else pending and pending["error"],
                }
            )
        return answer

    def replicas(self) -> list[dict[str, Any]]:
        return [self._replica(view) for view in self._ordered()]

    def _replica(self, view: ReplicaView) -> dict[str, Any]:
        loaded = [alias for alias, facts in view.models.items() if facts["state"] == "loaded"]
        loaded.sort(key=lambda alias: alias != self.config.default_model)
        warming = any(_state([view], alias) != "loaded" for alias in self.config.always_on)
        return {
            "replica_id": view.replica_id,
            "model": loaded[0] if loaded else None,
            "models": loaded,
            "group": view.group,
            "node": view.node,
            "pid": view.pid,
            "device": view.device.device,
            "device_name": view.device.device_name,
            "precision": view.device.precision,
            "precision_reason": view.device.precision_reason,
            "device_warning": joined_warnings(self.backend.device_warning, view.device.device_warning),
            "state": "loading" if warming else "running",
            "queued": view.queued,
            "running_rows": view.running_rows,
            "outstanding_work": view.work,
            "cache_slots_used": view.cache_slots_used,
            "cache_slots_free": view.cache_slots_free,
        }

    def info(self) -> dict[str, Any]:
        settings = public_settings(self.config)
        return {
            "name": "kronos-ray-serve",
            "version": schemas.API_VERSION,
            "default_model": self.config.default_model,
            "limits": settings["limits"],
            "defaults": settings["defaults"],
            "groups": list(self.backend.groups()),
            "device_warning": self._device_warning(self._ordered()),
            "warnings": list(self.warnings),
            "metrics": "per ingress process" if self.config.ingress.replicas > 1 else "whole service",
            "settings": settings,
        }

    def index(self) -> dict[str, Any]:
        return {"name": "kronos-ray-serve", "version": schemas.API_VERSION, "routes": list(ROUTES)}


def _state(views: Sequence[ReplicaView], alias: str, failures: Collection[str] = ()) -> str:
    """Over all views. failures: aliases that could not be loaded, also once the replicas that tried are asleep."""
    if not views and alias in failures:
        return "failed"
    reported = {view.models.get(alias, {}).get("state", "idle") for view in views}
    return next((state for state in _STATES if state in reported), "idle")


def _word(ok: bool) -> str:
    return "healthy" if ok else "degraded"


def _mb(size: int) -> float:
    return round(size / 2**20, 1)
