"""/v1/metrics, and that dashboard and alert rules speak of what really comes out of it."""

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cluster.monitoring import dashboard
from model.engine.engine import Engine
from model.engine.types import EngineConfig, Request
from model.types import Sampling
from serve_app.deployment import warm_up_series
from serve_app.errors import STATUS
from serve_app.replica_metrics import COUNTERS, GAUGES, replica_counters

MONITORING = Path(dashboard.__file__).parent
RULES = [
    rule for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
FIXED = {
    "kronos_requests_total": {"route", "status"},
    "kronos_request_duration_seconds": {"route"},
    "kronos_model_inference_seconds": {"endpoint"},
    "kronos_concurrent_requests": set(),
    "kronos_timeouts_total": {"endpoint"},
    "kronos_prediction_input_size": {"endpoint"},
    "kronos_security_events_total": {"event", "container"},
    "kronos_rate_limit_hits_total": {"container"},
    "kronos_request_size_rejections_total": {"container"},
}
"""Names and labels that the interface promises."""


@pytest.fixture
def scraped(http, columns):
    """(sample name → label sets) after a forecast and an error."""
    assert http.post("/v1/forecast", {"series": [columns()], "horizon": 2}).status_code == 200
    assert http.post("/v1/forecast", {"series": []}).status_code == 422
    response = http.get("/v1/metrics")
    assert response.status_code == 200
    names = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            names.setdefault(sample.name, []).append(sample.labels)
    return names


def test_promised_names_and_labels(scraped):
    for name, labels in FIXED.items():
        samples = scraped.get(name) or scraped[f"{name}_bucket"]
        assert {key for sample in samples for key in sample} - {"le"} == labels, name


def test_what_replicas_tell_comes_out_per_replica(scraped):
    for name, _ in GAUGES.values():
        assert scraped[name] == [{"replica": "abc", "group": "cpu"}]
    for name, _ in COUNTERS.values():
        assert scraped[f"{name}_total"] == [{"replica": "abc", "group": "cpu"}]
    assert scraped["kronos_ready"] == [{}]
    assert {"model": "kronos-bundled", "state": "loaded"} in scraped["kronos_model_replicas"]


def test_values(make_http, fake_backend, columns):
    def value(http, line):
        return float(re.search(rf"^{re.escape(line)} (.+)$", http.get("/v1/metrics").text, re.M)[1])

    http = make_http(fake_backend(device_warning="no GPU"))
    http.post("/v1/forecast", {"series": [columns()], "horizon": 2})
    http.post("/v1/forecast", {"series": []})
    assert value(http, 'kronos_queue_depth{group="cpu",replica="abc"}') == 1
    assert value(http, 'kronos_running_rows{group="cpu",replica="abc"}') == 2
    assert value(http, "kronos_device_fallback_active") == 1
    assert value(http, "kronos_ready") == 1
    assert value(http, 'kronos_errors_total{code="invalid_fields"}') == 1
    assert value(http, 'kronos_queue_wait_seconds_sum{endpoint="/v1/forecast"}') == 0.001
    assert value(make_http(fake_backend(loaded=False)), "kronos_ready") == 0


def metrics_in(expression):
    """Names of ours, and of the process, in a PromQL expression."""
    return set(re.findall(r"\b(?:kronos|process)_\w+", expression)) - {"kronos_ray_serve"}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_speak_of_what_comes_out(scraped, rule):
    assert metrics_in(rule["expr"]) <= set(scraped) or rule["expr"].startswith("up{")
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert rule["annotations"].keys() == {"summary", "remedy"}
    selected = dict(re.findall(r"(\w+)=~?\"([^\"]+)\"", rule["expr"]))
    assert selected.keys() <= {"job", "status", "route", "code"}
    assert selected.get("code", "internal") in STATUS


def test_no_alert_fires_because_a_group_has_no_replica_by_right():
    """A GPU group without a GPU (the shipped configuration on a CPU host) and a sleeping group are no faults."""
    assert not [rule["alert"] for rule in RULES if "kronos_replicas" in rule["expr"]]


def test_the_dashboard_speaks_of_what_comes_out(scraped):
    shown = {
        name for _, row in dashboard.ROWS for _, _, queries in row for query, _ in queries for name in metrics_in(query)
    }
    assert shown <= set(scraped), shown - set(scraped)
    ours = {re.sub("_(bucket|sum|count)$", "", name) for name in scraped if name.startswith("kronos_")}
    assert ours == {re.sub("_bucket$", "", name) for name in shown if name.startswith("kronos_")}


def test_the_dashboard_is_up_to_date():
    assert json.loads((MONITORING / "dashboard.json").read_text()) == dashboard.dashboard()


def test_an_engine_counts_what_it_does(tiny):
    engine = Engine(*tiny, EngineConfig(cache_bytes=2**24))

    class Counted:
        def stats(self):
            return vars(engine.stats())

    def forecast(**request):
        request = Request(warm_up_series(), Sampling(samples=3, seed=1), **request)
        engine.run([request])

    forecast()
    totals = replica_counters([Counted()], {"model_loads": 2})
    # Eight bars of history, two to forecast, three paths.
    assert (totals["steps"], totals["rows"], totals["tokens"], totals["prefill_bars"]) == (2, 6, 12, 8)
    assert (totals["finished"], totals["cancelled"], totals["failed"], totals["model_loads"]) == (1, 0, 0, 2)
    assert totals["prefill_seconds"] > 0
    assert totals["decode_seconds"] > 0
    assert totals["memory_bytes"] > 2**20
    assert totals["threads"] >= 1
    forecast(should_stop=lambda: True)
    assert engine.stats().cancelled == 1
    assert replica_counters([Counted(), Counted()], {})["rows"] == 12
