"""/v1/metrics: what this ingress process has seen, as Prometheus text; replica_metrics adds what the replicas tell it.

A registry of its own, so that nothing else of the process mixes in and tests start from zero. With several ingress
replicas every one counts by itself; sum over scrapes, or use Ray's own metrics for the cluster.
"""

from __future__ import annotations

import socket

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from serve_app.errors import STATUS

# One "_created" sample beside every counter would double the text for nobody's use.
disable_created_metrics()

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
CLIENT_GONE = "client_gone"
FORECAST_ROUTES = ("/v1/forecast", "/v1/predict/single", "/v1/predict/batch")
_ROWS = (1, 16, 64, 128, 256, 512, 1024, 2048, 8192, 32768, 131072, 524288, 1048576)

SECURITY_EVENTS = (
    "oversize",
    "malformed",
    "suspicious_path",
    "rate_limited",
    "concurrency_limited",
    "slow_body",
    "unauthorized",
    "forbidden",
)


class Metrics:
    """The counters of one ingress process. Labels hold no client input: routes are templates, events a fixed list."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, container: str | None = None) -> None:
        self.container = container or socket.gethostname()
        self.registry = CollectorRegistry()
        self._watched: Collector | None = None
        # Memory, open files and processor time of this ingress: process_*.
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "kronos_requests_total", "Requests answered", ["route", "status"], registry=self.registry
        )
        self.duration = Histogram(
            "kronos_request_duration_seconds",
            "From the first byte read to the last byte sent",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.inference = Histogram(
            "kronos_model_inference_seconds",
            "Computing time of the model per request",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.queue_wait = Histogram(
            "kronos_queue_wait_seconds",
            "Wait before the computing began, per request; also for a sleeping group, and with a lost replica",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.errors = Counter(
            "kronos_errors_total", "Answers other than 2xx, by error code", ["code"], registry=self.registry
        )
        self.concurrent = Gauge(
            "kronos_concurrent_requests", "Forecast requests being answered now", registry=self.registry
        )
        self.timeouts = Counter(
            "kronos_timeouts_total", "Requests that passed their deadline", ["endpoint"], registry=self.registry
        )
        self.input_size = Histogram(
            "kronos_prediction_input_size",
            "Candles of history per request, over all its series",
            ["endpoint"],
            buckets=_ROWS,
            registry=self.registry,
        )
        self.security_events = Counter(
            "kronos_security_events_total", "Refused for safety", ["event", "container"], registry=self.registry
        )
        self.rate_limit_hits = Counter(
            "kronos_rate_limit_hits_total", "Refused with 429 by the rate limit", ["container"], registry=self.registry
        )
        self.size_rejections = Counter(
            "kronos_request_size_rejections_total", "Bodies over the limit", ["container"], registry=self.registry
        )
        # A counter without a sample is invisible to whoever wants to alert on it.
        for endpoint in FORECAST_ROUTES:
            self.timeouts.labels(endpoint)
        self.retries = Counter(
            "kronos_retries_total", "Jobs sent again because their replica was lost", registry=self.registry
        )
        self.fallbacks = Counter(
            "kronos_device_fallbacks_total",
            "Forecasts that did not run where they were asked to",
            registry=self.registry,
        )
        # Shown as 0 before the first event, so that a rate() over them works from the start.
        self.rate_limit_hits.labels(self.container)
        self.size_rejections.labels(self.container)
        for code in (*STATUS, CLIENT_GONE):
            self.errors.labels(code)
        for event in SECURITY_EVENTS:
            self.security_events.labels(event, self.container)

    def error(self, code: str, count: int = 1) -> None:
        """Counts errors by their code; what is no code of ours is one that nobody caught."""
        self.errors.labels(code if code in STATUS or code == CLIENT_GONE else "internal").inc(count)

    def watch(self, collector: Collector) -> None:
        """Lets this collector answer scrapes too, in place of the one before it."""
        if self._watched is not None:
            self.registry.unregister(self._watched)
        self._watched = collector
        self.registry.register(collector)

    def security_event(self, event: str) -> None:
        self.security_events.labels(event, self.container).inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)
