"""What the service says of itself: health, models, replicas, settings, metrics, log lines. Over a fake backend."""

import json
import re
import time
from dataclasses import replace

import pytest

from serve_app.jobs import LoadFailure


def test_health_and_readiness(make_http, fake_backend):
    ready, loading = make_http(), make_http(fake_backend(loaded=False))
    assert ready.get("/v1/healthz").json() == {"status": "ok"}
    assert ready.request("HEAD", "/v1/healthz").status_code == ready.request("HEAD", "/v1/readyz").status_code == 200
    response = ready.get("/v1/readyz")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ok",
        "model_loaded": True,
        "device": "cpu",
        "device_warning": None,
        "models": [{"id": "kronos-bundled", "state": "loaded"}],
    }
    assert loading.request("HEAD", "/v1/readyz").status_code == 503
    response = loading.get("/v1/readyz")
    assert response.status_code == 503
    assert response.json()["status"] == "loading"
    assert "retry-after" in response.headers
    assert loading.get("/v1/healthz").status_code == 200


def test_detailed_health(make_http, fake_backend):
    body = make_http().get("/v1/healthz/detailed").json()
    assert body["status"] in ("healthy", "degraded")
    assert set(body) == {"status", "timestamp", "uptime_seconds", "checks", "device"}
    assert body["checks"]["model"] == {"status": "healthy", "loaded": True, "version": "bundled-model+0"}
    assert set(body["checks"]["memory"]) == {
        "status", "process_mb", "system_total_mb", "system_available_mb", "system_percent",
    }  # fmt: skip
    assert set(body["checks"]["disk"]) == {"status", "total_gb", "free_gb", "percent"}
    assert set(body["device"]) == {
        "device_type", "device_name", "gpu_available", "cuda_available", "mps_available",
        "precision", "precision_reason",
    }  # fmt: skip
    assert make_http(fake_backend(loaded=False)).get("/v1/healthz/detailed").json()["status"] == "degraded"


def test_models_and_replicas(http):
    (model,) = http.get("/v1/models").json()["models"]
    assert model["state"] == "loaded"
    assert (model["id"], model["parameters"], model["context"], model["groups"], model["replicas"]) == (
        "kronos-bundled", 1000, 512, ["cpu"], 1,
    )  # fmt: skip
    (replica,) = http.get("/v1/replicas").json()["replicas"]
    assert replica["replica_id"] == "abc"
    assert (replica["group"], replica["pid"], replica["device"], replica["state"]) == ("cpu", 17, "cpu", "running")
    assert (replica["queued"], replica["running_rows"]) == (1, 2)


def test_a_service_that_sleeps_is_ready_unless_it_was_woken_in_vain(make_http, fake_backend):
    backend = fake_backend()
    backend.asleep = True
    http = make_http(backend, groups={"cpu": {"autoscaling": {"min_replicas": 0, "max_replicas": 1}}})
    assert http.get("/v1/readyz").json()["models"] == [{"id": "kronos-bundled", "state": "idle"}]
    assert http.get("/v1/readyz").status_code == 200
    backend.failures = {"kronos-bundled": LoadFailure("NaN in head", time.monotonic())}
    response = http.get("/v1/readyz")
    assert (response.status_code, response.json()["models"][0]["state"]) == (503, "failed")
    (model,) = http.get("/v1/models").json()["models"]
    assert (model["state"], model["error"]) == ("failed", "NaN in head")
    assert http.get("/v1/healthz/detailed").json()["status"] == "degraded"
    # Nothing but a request would try again, and none would come to a service that says it is not ready.
    backend.failures = {"kronos-bundled": LoadFailure("NaN in head", time.monotonic() - 31)}
    assert http.get("/v1/readyz").status_code == 200
    backend.failures = {"another": LoadFailure("no matter", time.monotonic())}
    assert http.get("/v1/readyz").status_code == 200


def test_what_is_loaded_stands_beside_its_checksum_and_not_what_shall_replace_it(make_http):
    wanted = {"kronos-bundled": {"source": "some/where", "revision": "v2", "max_context": 1024}}
    (model,) = make_http(models=wanted, default_model="kronos-bundled").get("/v1/models").json()["models"]
    assert (model["repo"], model["revision"], model["context"]) == ("bundled", None, 512)
    assert model["sha256"] == "0" * 64


def test_what_a_replica_does_without_is_said_everywhere(make_http, fake_backend):
    backend = fake_backend(device_warning="no GPU")
    views = backend.replicas
    without = replace(views()[0].device, device_warning="no CUDA")
    backend.replicas = lambda: [replace(view, device=without) for view in views()]
    http = make_http(backend)
    for route in ("/v1/readyz", "/v1/info"):
        assert http.get(route).json()["device_warning"] == "no GPU; no CUDA"
    assert http.get("/v1/replicas").json()["replicas"][0]["device_warning"] == "no GPU; no CUDA"


def test_info_shows_effective_settings_and_no_path(make_http, tmp_path):
    models = {"mine": {"source": str(tmp_path), "tokenizer": str(tmp_path)}}
    response = make_http(warnings=["careful"], models=models, default_model="mine").get("/v1/info")
    assert response.json()["limits"]["max_horizon"] == 512
    assert response.json()["warnings"] == ["careful"]
    assert response.json()["settings"]["models"]["mine"]["source"] == "local"
    assert str(tmp_path) not in response.text


def test_index_and_openapi(http):
    page = http.get("/", headers={"accept": "text/html,*/*;q=0.8"})
    assert page.headers["content-type"].startswith("text/html")
    assert "http://" not in page.text
    assert "https://" not in page.text
    assert "/v1/forecast" in http.get("/").json()["routes"]
    document = http.get("/openapi.json").json()
    body = document["paths"]["/v1/forecast"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ForecastRequest"}
    text = json.dumps(document)
    for name in set(re.findall(r"#/components/schemas/(\w+)", text)):
        assert name in document["components"]["schemas"]
    assert http.get("/docs").status_code == 200


# --- metrics ----------------------------------------------------------------------------------------------------------

NAMES = (
    "kronos_requests_total",
    "kronos_request_duration_seconds",
    "kronos_model_inference_seconds",
    "kronos_concurrent_requests",
    "kronos_timeouts_total",
    "kronos_prediction_input_size",
    "kronos_security_events_total",
    "kronos_rate_limit_hits_total",
    "kronos_request_size_rejections_total",
)


def sample(text, pattern):
    """The value of the first sample whose line matches, or 0."""
    found = re.search(rf"^{pattern}[^\n]* ([0-9.e+-]+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_metrics_move_with_traffic(make_http, fake_backend, candle_items):
    http = make_http(limits={"max_request_mb": 0.001, "rate_limit_per_minute": 4})
    assert http.post("/v1/predict/single", candle_items(4, 1)).status_code == 200
    assert http.post("/v1/predict/single", raw=b"x" * 2000).status_code == 413
    assert http.post("/v1/predict/single", raw=b"{").status_code == 400
    assert http.post("/v1/predict/single", candle_items(4, 1)).status_code == 200
    limited = http.post("/v1/predict/single", candle_items(4, 1))
    assert limited.status_code == 429
    assert int(limited.headers["retry-after"]) >= 1
    http.get("/../../etc/passwd%00")
    text = http.get("/v1/metrics").text
    # There before the first of them: a rate() over what begins at 1 sees nothing happen.
    assert sample(text, 'kronos_errors_total{code="no_replica"}') == 0
    assert 'kronos_errors_total{code="no_replica"} 0' in text
    for name in NAMES:
        assert re.search(rf"^# TYPE {name}", text, re.MULTILINE) or name in text
    route = "/v1/predict/single"
    assert sample(text, rf'kronos_requests_total{{route="{route}",status="200"}}') == 2
    assert sample(text, rf'kronos_requests_total{{route="{route}",status="429"}}') == 1
    assert sample(text, rf'kronos_request_duration_seconds_count{{route="{route}"}}') == 5
    assert sample(text, rf'kronos_model_inference_seconds_count{{endpoint="{route}"}}') == 2
    assert sample(text, rf'kronos_model_inference_seconds_sum{{endpoint="{route}"}}') == pytest.approx(0.04)
    assert sample(text, rf'kronos_prediction_input_size_sum{{endpoint="{route}"}}') == 8
    assert sample(text, "kronos_concurrent_requests") == 0
    assert sample(text, "kronos_rate_limit_hits_total{container=") == 1
    assert sample(text, "kronos_request_size_rejections_total{container=") == 1
    for event in ("oversize", "malformed", "rate_limited"):
        assert sample(text, f'kronos_security_events_total{{container="[^"]*",event="{event}"}}') == 1

    slow = make_http(fake_backend(delay_s=5), limits={"request_timeout_s": 0.2})
    assert slow.post("/v1/predict/single", candle_items()).status_code == 408
    assert sample(slow.get("/v1/metrics").text, rf'kronos_timeouts_total{{endpoint="{route}"}}') == 1


def test_security_off_switches_the_rate_limit_off(make_http, candle_items):
    http = make_http(limits={"rate_limit_per_minute": 1, "security_enabled": False})
    assert [http.post("/v1/predict/single", candle_items()).status_code for _ in range(3)] == [200] * 3


PROMISED = {
    "request_id", "route", "status_code", "latency_ms", "model_inference_ms", "queue_time_ms", "series_count", "rows",
    "pred_len", "request_size_bytes", "response_size_bytes", "client", "error_type", "error_message",
}  # fmt: skip


def test_every_request_has_a_log_line_with_the_promised_fields(http, columns, log_lines):
    for body in ({"series": [columns(), columns(4)], "horizon": 3}, {"series": []}):
        http.post("/v1/forecast", body, headers={"x-request-id": "mine"})
    done, refused = log_lines
    assert done.keys() >= PROMISED
    assert refused.keys() >= PROMISED
    assert (done["request_id"], done["route"], done["status_code"], done["client"]) == (
        "mine", "/v1/forecast", 200, "anonymous",
    )  # fmt: skip
    assert (done["series_count"], done["rows"], done["pred_len"]) == (2, 12, 3)
    assert (done["model_inference_ms"], done["queue_time_ms"], done["error_type"]) == (20.0, 1.0, None)
    assert min(done["latency_ms"], done["request_size_bytes"], done["response_size_bytes"]) > 0
    assert (refused["status_code"], refused["error_type"], refused["rows"]) == (422, "invalid_fields", None)
    assert refused["error_message"]


def test_probes_are_quiet_and_refusals_are_not(make_http, fake_backend, log_lines):
    http = make_http(fake_backend(loaded=False))
    for path in ("/v1/healthz", "/v1/readyz", "/v1/metrics", "/v1/forecast", "/v1/nothing"):
        http.get(path)
    http.request("HEAD", "/v1/healthz")
    assert [(line["route"], line["status_code"]) for line in log_lines] == [("/v1/forecast", 405), ("unmatched", 404)]
