"""What the replicas and the service as a whole look like, for /v1/metrics.

Replicas have no HTTP of their own, and the ingress's listing brings their news every second anyway; a scrape makes no
remote call. Every ingress replica shows all model replicas: over several scrapes take `max by (replica)`, not a sum.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import psutil
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve_app.jobs import Backend, Engine, ReplicaView

COUNTERS = {
    "steps": ("kronos_engine_steps", "Decode steps of the engine"),
    "rows": ("kronos_engine_rows", "Paths advanced by one bar; over steps: rows per step"),
    "tokens": ("kronos_engine_tokens", "Tokens sampled, two per row"),
    "prefill_bars": ("kronos_engine_prefill_bars", "Rows and bars of histories and moved windows computed"),
    "prefill_seconds": ("kronos_engine_prefill_seconds", "Time spent on histories and moved windows"),
    "decode_seconds": ("kronos_engine_decode_seconds", "Time spent on decode steps"),
    "finished": ("kronos_engine_series_finished", "Series forecast to their end"),
    "cancelled": ("kronos_engine_series_cancelled", "Series stopped by client or deadline"),
    "failed": ("kronos_engine_series_failed", "Series that failed while computing"),
    "model_loads": ("kronos_model_loads", "Models loaded"),
    "model_load_failures": ("kronos_model_load_failures", "Models that could not be loaded"),
    "model_evictions": ("kronos_model_evictions", "Models dropped from memory to make room"),
    "cpu_seconds": ("kronos_replica_cpu_seconds", "Processor time of the replica's process"),
}
"""Name in a replica's news → metric, which ends in _total, and help."""
GAUGES = {
    "memory_bytes": ("kronos_replica_memory_bytes", "Resident memory of the replica's process"),
    "open_files": ("kronos_replica_open_files", "Open file descriptors of the replica's process"),
    "threads": ("kronos_replica_threads", "Threads of the replica's process"),
}
VIEW_GAUGES: dict[str, tuple[str, Callable[[ReplicaView], int]]] = {
    "kronos_queue_depth": ("Series that wait in the replica", lambda view: view.queued),
    "kronos_running_rows": ("Paths that the replica computes now", lambda view: view.running_rows),
    "kronos_cache_slots_used": ("Cache slots in use; one holds a bar of a path", lambda view: view.cache_slots_used),
    "kronos_cache_slots_free": ("Cache slots free", lambda view: view.cache_slots_free),
}
_LABELS = ("replica", "group")


def replica_counters(engines: Iterable[Engine], counts: Mapping[str, float]) -> dict[str, float]:
    """In a replica: its engines' counters, summed; `counts` of its models; its process. Milliseconds at most."""
    totals: dict[str, float] = dict(counts)
    for engine in engines:
        for name, value in engine.stats().items():
            totals[name] = totals.get(name, 0) + value
    totals["tokens"] = 2 * totals.get("rows", 0)
    process = psutil.Process(os.getpid())
    with process.oneshot():
        times = process.cpu_times()
        totals.update(
            cpu_seconds=round(times.user + times.system, 2),
            memory_bytes=process.memory_info().rss,
            open_files=process.num_fds(),
            threads=process.num_threads(),
        )
    return totals


class ServiceCollector(Collector):
    """The live replicas, and whether the service is ready and where it wants to be."""

    def __init__(self, backend: Backend, readiness: Callable[[], tuple[Mapping[str, Any], bool]]) -> None:
        """readiness: (body of /v1/readyz, ready)."""
        self._backend = backend
        self._readiness = readiness

    def describe(self) -> list[Metric]:
        """Nothing: prometheus_client would collect, while the backend is still being made, to learn the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        views = self._backend.replicas()
        body, ready = self._readiness()
        yield _single("kronos_ready", "1 if the service takes forecasts", ready)
        fallback = body["device_warning"] is not None
        yield _single("kronos_device_fallback_active", "1 if the device is another than was wanted", fallback)
        groups = GaugeMetricFamily("kronos_replicas", "Live replicas", labels=["group"])
        for group in self._backend.groups():
            groups.add_metric([group], sum(view.group == group for view in views))
        yield groups
        models = GaugeMetricFamily("kronos_model_replicas", "Replicas with the model", labels=["model", "state"])
        states = [(alias, str(facts["state"])) for view in views for alias, facts in view.models.items()]
        for alias, state in sorted(set(states)):
            models.add_metric([alias, state], states.count((alias, state)))
        yield models
        for name, (text, read) in VIEW_GAUGES.items():
            yield _per_replica(GaugeMetricFamily(name, text, labels=_LABELS), views, read)
        for key, (name, text) in GAUGES.items():
            yield _per_replica(GaugeMetricFamily(name, text, labels=_LABELS), views, _reader(key))
        for key, (name, text) in COUNTERS.items():
            yield _per_replica(CounterMetricFamily(name, text, labels=_LABELS), views, _reader(key))


def _single(name: str, text: str, value: bool) -> Metric:
    return GaugeMetricFamily(name, text, value=float(value))


def _reader(key: str) -> Callable[[ReplicaView], float]:
    return lambda view: view.counters.get(key, 0)


def _per_replica(
    family: GaugeMetricFamily | CounterMetricFamily, views: Iterable[ReplicaView], read: Callable[[ReplicaView], float]
) -> Metric:
    for view in views:
        family.add_metric([view.replica_id, view.group], read(view))
    return family
