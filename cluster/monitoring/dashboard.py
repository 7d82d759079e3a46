"""The Grafana dashboard as a table of panels. Run as a script, this writes dashboard.json beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("dashboard.json")
WIDTH, HEIGHT = 8, 7
FORECASTS = 'route=~"/v1/forecast|/v1/predict/.*"'

Query = tuple[str, str]
Panel = tuple[str, str, list[Query]]


def _quantiles(histogram: str, labels: str = "") -> list[Query]:
    rate = f"sum by (le) (rate({histogram}_bucket{{{labels}}}[$__rate_interval]))"
    return [(f"histogram_quantile({q}, {rate})", f"p{q * 100:g}") for q in (0.5, 0.9, 0.99)]


def _rate(counter: str, by: str = "replica") -> str:
    """Of a replica's counter, which every ingress shows."""
    return f"sum by ({by}) (max by (replica, group) (rate({counter}[$__rate_interval])))"


def _ratio(over: str, under: str) -> str:
    return f"{_rate(over)} / {_rate(under)}"


def _gauge(name: str) -> str:
    return f"max by (replica, group) ({name})"


ROWS: list[tuple[str, list[Panel]]] = [
    (
        "What clients see",
        [
            (
                "Requests by status",
                "reqps",
                [("sum by (status) (rate(kronos_requests_total[$__rate_interval]))", "{{status}}")],
            ),
            ("Latency of forecasts", "s", _quantiles("kronos_request_duration_seconds", FORECASTS)),
            ("Errors by code", "reqps", [("sum by (code) (rate(kronos_errors_total[$__rate_interval]))", "{{code}}")]),
            ("Being answered now", "short", [("sum(kronos_concurrent_requests)", "requests")]),
            (
                "Deadlines passed",
                "reqps",
                [("sum by (endpoint) (rate(kronos_timeouts_total[$__rate_interval]))", "{{endpoint}}")],
            ),
            ("History per request, bars", "short", _quantiles("kronos_prediction_input_size")),
        ],
    ),
    (
        "Where the time goes",
        [
            ("Wait before computing", "s", _quantiles("kronos_queue_wait_seconds")),
            ("Computing", "s", _quantiles("kronos_model_inference_seconds")),
            (
                "Share of time in prefill and decode",
                "percentunit",
                [
                    (_rate("kronos_engine_prefill_seconds_total"), "prefill {{replica}}"),
                    (_rate("kronos_engine_decode_seconds_total"), "decode {{replica}}"),
                ],
            ),
            ("Steps a second", "ops", [(_rate("kronos_engine_steps_total"), "{{replica}}")]),
            (
                "Rows per step",
                "short",
                [(_ratio("kronos_engine_rows_total", "kronos_engine_steps_total"), "{{replica}}")],
            ),
            ("Tokens a second", "ops", [(_rate("kronos_engine_tokens_total"), "{{replica}}")]),
            ("Bars of history a second", "ops", [(_rate("kronos_engine_prefill_bars_total"), "{{replica}}")]),
            (
                "Series by end",
                "ops",
                [
                    (_rate(f"kronos_engine_series_{end}_total", "group"), end)
                    for end in ("finished", "cancelled", "failed")
                ],
            ),
        ],
    ),
    (
        "Replicas",
        [
            ("Ready", "bool_yes_no", [("min(kronos_ready)", "ready")]),
            ("Live replicas", "short", [("max by (group) (kronos_replicas)", "{{group}}")]),
            ("Models", "short", [("max by (model, state) (kronos_model_replicas)", "{{model}} {{state}}")]),
            ("Queue depth", "short", [(_gauge("kronos_queue_depth"), "{{replica}}")]),
            ("Rows under way", "short", [(_gauge("kronos_running_rows"), "{{replica}}")]),
            (
                "Cache slots",
                "short",
                [
                    (_gauge("kronos_cache_slots_used"), "used {{replica}}"),
                    (_gauge("kronos_cache_slots_free"), "free {{replica}}"),
                ],
            ),
            (
                "Memory",
                "bytes",
                [
                    (_gauge("kronos_replica_memory_bytes"), "{{replica}}"),
                    ('process_resident_memory_bytes{job="kronos"}', "ingress {{instance}}"),
                ],
            ),
            ("Processor time", "percentunit", [(_rate("kronos_replica_cpu_seconds_total"), "{{replica}}")]),
            (
                "Files and threads",
                "short",
                [
                    (_gauge("kronos_replica_open_files"), "files {{replica}}"),
                    (_gauge("kronos_replica_threads"), "threads {{replica}}"),
                ],
            ),
        ],
    ),
    (
        "What should be rare",
        [
            (
                "Retries and fallbacks",
                "ops",
                [
                    ("sum(rate(kronos_retries_total[$__rate_interval]))", "sent again"),
                    ("sum(rate(kronos_device_fallbacks_total[$__rate_interval]))", "other device"),
                    ("max(kronos_device_fallback_active)", "fallback active"),
                ],
            ),
            (
                "Models loaded, failed, evicted",
                "short",
                [
                    (_rate("kronos_model_loads_total", "group"), "loaded"),
                    (_rate("kronos_model_load_failures_total", "group"), "failed"),
                    (_rate("kronos_model_evictions_total", "group"), "evicted"),
                ],
            ),
            (
                "Refused for safety",
                "reqps",
                [
                    ("sum by (event) (rate(kronos_security_events_total[$__rate_interval]))", "{{event}}"),
                    ("sum(rate(kronos_rate_limit_hits_total[$__rate_interval]))", "rate limit"),
                    ("sum(rate(kronos_request_size_rejections_total[$__rate_interval]))", "too large"),
                ],
            ),
        ],
    ),
]


def dashboard() -> dict[str, Any]:
    """Grafana's JSON model."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append({"type": "row", "title": title, "collapsed": False, "gridPos": {"h": 1, "w": 24, "x": 0, "y": y}})
        y += 1
        for i, (name, unit, queries) in enumerate(row):
            place = {"h": HEIGHT, "w": WIDTH, "x": i % 3 * WIDTH, "y": y + i // 3 * HEIGHT}
            panels.append(_panel(name, unit, queries, place))
        y += (len(row) + 2) // 3 * HEIGHT
    for number, panel in enumerate(panels, 1):
        panel["id"] = number
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Prometheus"}
    return {
        "uid": "kronos-ray-serve",
        "title": "Kronos on Ray Serve",
        "schemaVersion": 39,
        "refresh": "15s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source]},
        "panels": panels,
    }


def _panel(title: str, unit: str, queries: list[Query], place: dict[str, int]) -> dict[str, Any]:
    source = {"type": "prometheus", "uid": "${datasource}"}
    targets = [
        {"refId": chr(ord("A") + i), "expr": expr, "legendFormat": legend, "datasource": source}
        for i, (expr, legend) in enumerate(queries)
    ]
    defaults = {"unit": unit, "min": 0, "custom": {"fillOpacity": 5}}
    return {
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "gridPos": place,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": targets,
    }


if __name__ == "__main__":
    PATH.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")
