"""The forecast routes of wire.md over a fake backend: answers, deadlines, refusals."""

import json
import math
import re

import pytest

from serve_app.errors import FieldError, ServiceError, invalid_fields


def codes(response):
    return [(tuple(field["loc"]), field["code"]) for field in response.json()["error"]["fields"]]


def assert_error(response, status, code):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "detail"}
    assert set(body["error"]) == {"code", "message", "request_id", "fields"}
    assert body["error"]["code"] == code
    assert body["detail"] == body["error"]["message"]
    assert body["error"]["request_id"] == response.headers["x-request-id"]
    assert len(body["error"]["fields"]) <= 20


# --- answers ---------------------------------------------------------------------------------------------------------


def test_predict_single(http, candle_items):
    response = http.post("/v1/predict/single", candle_items(8, 3))
    assert response.status_code == 200
    body = response.json()
    assert set(body) == {
        "series_id", "prediction", "model_version", "tokenizer_version", "device", "device_warning",
    }  # fmt: skip
    assert body["series_id"] is None
    assert [row["timestamp"] for row in body["prediction"]] == [f"2024-01-01 {hour:02d}:00:00" for hour in (8, 9, 10)]
    assert set(body["prediction"][0]) == {"timestamp", "open", "high", "low", "close", "volume", "amount"}
    assert response.headers["x-backend-used"] == "cpu"
    assert re.fullmatch(r"queue;dur=1\.00, batch;dur=0\.50, compute;dur=20\.00", response.headers["server-timing"])


def test_predict_single_returns_the_mean_over_samples(http, candle_items):
    body = candle_items(8, 2)
    body["overrides"] = {"sample_count": 3}
    close = http.post("/v1/predict/single", body).json()["prediction"][0]["close"]
    # Paths lie 0, 1 and 2 thousandths above the last close, and up to 1 thousandth more by the seed.
    assert 108 * 1.001 <= close <= 108 * 1.0021


def test_predict_batch_is_a_bare_list_in_order(http, candle_items):
    items = [dict(candle_items(4 + i, 1 + i), series_id=f"s{i}") for i in range(3)]
    items[1]["overrides"] = {"pred_len": 2, "temperature": 0.5}
    body = http.post("/v1/predict/batch", {"items": items}).json()
    assert [answer["series_id"] for answer in body] == ["s0", "s1", "s2"]
    assert [len(answer["prediction"]) for answer in body] == [1, 2, 3]


def test_forecast(http, columns):
    series = dict(columns(8), id="one")
    request = {
        "model": "kronos-bundled",
        "series": [series],
        "horizon": 4,
        "freq": None,
        "calendar": None,
        "future_timestamps": None,
        "samples": 30,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 0.9,
        "seed": 7,
        "quantiles": [0.1, 0.5, 0.9],
        "return_paths": False,
        "repair": "off",
        "stream": False,
        "deadline_ms": 30000,
    }
    body = http.post("/v1/forecast", request).json()
    assert set(body) == {
        "model", "device", "device_warning", "precision", "window", "seed", "parameters", "repaired", "series",
    }  # fmt: skip
    assert body["model"] == {"id": "kronos-bundled", "repo": "bundled", "revision": None, "sha256": "0" * 64}
    assert body["window"] == {"context_used": 8, "slid": False, "policy": "exact"}
    assert body["seed"] == 7
    assert body["repaired"] == 0
    (answer,) = body["series"]
    assert answer["id"] == "one"
    assert answer["timestamps"] == [f"2024-01-01T{hour:02d}:00:00Z" for hour in (8, 9, 10, 11)]
    assert list(answer["mean"]) == ["open", "high", "low", "close", "volume", "amount"]
    assert list(answer["quantiles"]) == ["0.1", "0.5", "0.9"]
    assert "paths" not in answer
    assert set(answer["summary"]) == {
        "last_close", "expected_return", "upside_probability", "volatility",
        "volatility_amplification_probability", "expected_max_drawdown",
    }  # fmt: skip
    assert answer["summary"]["last_close"] == 107.0
    low, middle, high = (answer["quantiles"][level]["close"][0] for level in ("0.1", "0.5", "0.9"))
    assert low < middle < high


def test_forecast_returns_paths_and_a_drawn_seed(http, columns):
    request = {"series": [columns()], "horizon": 2, "samples": 3, "return_paths": True}
    body = http.post("/v1/forecast", request).json()
    (answer,) = body["series"]
    assert answer["id"] == "0"
    assert len(answer["paths"]) == 3
    assert len(answer["paths"][0]["close"]) == 2
    again = http.post("/v1/forecast", {**request, "seed": body["seed"]}).json()
    assert again["series"] == body["series"]


def test_forecast_per_series_settings_win(make_http, fake_backend, columns):
    backend = fake_backend()
    series = [columns(), dict(columns(), horizon=5, samples=2, temperature=0.5, seed=3)]
    body = make_http(backend).post("/v1/forecast", {"series": series, "horizon": 2, "samples": 4, "seed": 1}).json()
    first, second = (task.sampling for task in backend.jobs[0].tasks)
    assert (first.samples, first.temperature, first.seed) == (4, 1.0, 1)
    assert (second.samples, second.temperature, second.seed) == (2, 0.5, 3)
    assert [len(answer["timestamps"]) for answer in body["series"]] == [2, 5]
    assert body["series"][1]["parameters"] == {
        "horizon": 5, "samples": 2, "temperature": 0.5, "top_k": 0, "top_p": 0.9, "seed": 3,
    }  # fmt: skip


def test_windows_come_from_the_series_the_request_or_the_configuration(make_http, fake_backend, columns, candle_items):
    backend = fake_backend()
    http = make_http(backend, defaults={"window": "fit"})
    series = [columns(), dict(columns(), window="exact")]
    body = http.post("/v1/forecast", {"series": series, "window": "hop:16"}).json()
    assert [one["window"]["policy"] for one in body["series"]] == ["hop:16", "exact"]
    http.post("/v1/forecast", {"series": [columns()]})
    http.post("/v1/predict/single", candle_items())
    assert [task.window for job in backend.jobs for task in job.tasks] == ["hop:16", "exact", "fit", "fit"]


def test_the_servers_defaults(make_http, fake_backend, columns, candle_items):
    backend = fake_backend()
    defaults = {"pred_len": 5, "temperature": 0.6, "top_k": 4, "top_p": 0.8, "sample_count": 3}
    http = make_http(backend, defaults=defaults)
    body = http.post("/v1/forecast", {"series": [columns()]}).json()
    assert len(body["series"][0]["timestamps"]) == 5
    http.post("/v1/predict/single", dict(candle_items(8, 3), overrides={"top_p": 0.7}))
    forecast, predict = (job.tasks[0].sampling for job in backend.jobs)
    assert (forecast.temperature, forecast.top_k, forecast.top_p, forecast.samples) == (0.6, 4, 0.8, 3)
    assert (predict.temperature, predict.top_k, predict.top_p, predict.samples) == (0.6, 4, 0.7, 3)


def test_amount_follows_from_volume_if_no_bar_has_one(make_http, fake_backend, candle_items):
    backend = fake_backend()
    http = make_http(backend)
    body = candle_items(2, 1)
    for candle in body["candles"]:
        candle["volume"] = 10
    http.post("/v1/predict/single", body)
    body["candles"][1]["amount"] = 7
    http.post("/v1/predict/single", body)
    derived, given = (job.tasks[0].series.candles[:, 5].tolist() for job in backend.jobs)
    assert derived == [10 * 100.5, 10 * 101.5]
    assert given == [0, 7]


def test_repair_makes_valid_candles_and_counts_them(make_http, fake_backend, columns):
    class Wild(fake_backend):
        async def forecast(self, job, prefer):
            answered = await super().forecast(job, prefer)
            for paths in answered.done.paths:
                paths.values[0, 0] = [100, 90, 110, 105, -5, 1]
            return answered

    request = {"series": [columns()], "horizon": 2, "return_paths": True, "repair": "ohlc"}
    body = make_http(Wild()).post("/v1/forecast", request).json()
    path = body["series"][0]["paths"][0]
    assert [path[name][0] for name in path] == [100, 105, 100, 105, 0, 1]
    assert body["repaired"] == 1


def test_constant_prices(http, columns):
    series = columns()
    for name in ("open", "high", "low", "close"):
        series[name] = [5.0] * 8
    response = http.post("/v1/forecast", {"series": [series], "horizon": 3})
    assert response.status_code == 200
    assert all(math.isfinite(value) for value in response.json()["series"][0]["summary"].values())


def test_the_device_header_reaches_the_backend_and_its_absence_is_said(make_http, fake_backend, candle_items):
    backend = fake_backend(device_warning="no GPU")
    http = make_http(backend)
    body = http.post("/v1/predict/single", candle_items(), headers={"X-Kronos-Device": "gpu"}).json()
    assert backend.preferred == ["gpu"]
    assert body["device_warning"] == "no GPU; the gpu group is not here"
    response = http.post("/v1/predict/single", candle_items(), headers={"X-Kronos-Device": "tpu"})
    assert_error(response, 422, "invalid_fields")
    assert codes(response) == [(("header", "X-Kronos-Device"), "unknown_value")]


def test_request_id_is_kept_if_it_is_short_and_printable(http):
    headers = http.get("/v1/healthz", headers={"x-request-id": "abc-1"}).headers
    assert headers["x-request-id"] == "abc-1"
    assert headers["server-timing"] == "queue;dur=0.00, batch;dur=0.00, compute;dur=0.00"
    assert http.get("/v1/healthz", headers={"x-request-id": "a b"}).headers["x-request-id"] == "a b"
    for bad in ("x" * 65, "a\tb", "caf\u00e9".encode("latin-1")):
        made = http.get("/v1/healthz", headers={"x-request-id": bad}).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", made)


# --- deadlines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{"request_timeout_s": 1.5}, {"inference_timeout_s": 1.5}, {}])
def test_a_deadline_stops_the_computing(make_http, fake_backend, columns, limits):
    backend = fake_backend(delay_s=10)
    body = {"series": [columns()], "horizon": 2, **({} if limits else {"deadline_ms": 1500})}
    response = make_http(backend, limits=limits).post("/v1/forecast", body)
    assert_error(response, 408, "deadline_passed")
    assert backend.cancelled == 1
    assert backend.jobs[0].timeout_s <= 1.5


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_errors_of_the_backend_keep_their_status(make_http, fake_backend, candle_items):
    for code, status in (("queue_full", 429), ("model_unavailable", 503), ("no_replica", 503)):
        http = make_http(fake_backend(error=ServiceError(code, "why", retry_after_s=3.2)))
        response = http.post("/v1/predict/single", candle_items())
        assert_error(response, status, code)
        assert response.headers["retry-after"] == "4"


def test_what_a_replica_refuses_has_its_place_in_the_body(make_http, fake_backend, columns, candle_items):
    refused = invalid_fields([FieldError((1, "window"), "invalid_window", "drops more than there is")])
    http = make_http(fake_backend(error=refused))
    response = http.post("/v1/forecast", {"series": [columns(), columns()], "window": "hop:9999"})
    assert_error(response, 422, "invalid_fields")
    assert codes(response) == [(("series", 1, "window"), "invalid_window")]
    items = [dict(candle_items(), series_id=name) for name in "ab"]
    response = http.post("/v1/predict/batch", {"items": items})
    assert codes(response) == [(("items", 1, "window"), "invalid_window")]


def test_an_unexpected_error_shows_nothing(make_http, fake_backend, candle_items):
    http = make_http(fake_backend(error=RuntimeError("secret in /some/path")))
    response = http.post("/v1/predict/single", candle_items())
    assert_error(response, 500, "internal")
    assert "secret" not in response.text
    counted = 'kronos_requests_total{route="/v1/predict/single",status="500"} 1.0'
    assert counted in http.get("/v1/metrics").text.splitlines()


def test_unknown_routes_methods_and_models(http, columns):
    assert_error(http.get("/v1/nothing"), 404, "unknown_route")
    assert_error(http.get("/v1/forecast/"), 404, "unknown_route")
    assert_error(http.get("/v1/forecast"), 405, "method_not_allowed")
    assert_error(http.post("/v1/healthz", {}), 405, "method_not_allowed")
    assert http.get("/v1/forecast").headers["allow"] == "POST"
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert http.request(method, "/v1/models").headers["allow"] == "GET, HEAD"
    for model in ("nope", "../../etc/passwd", "x" * 64):
        assert_error(http.post("/v1/forecast", {"series": [columns()], "model": model}), 404, "unknown_model")


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/openapi.json", "/v1/healthz", "/v1/healthz/detailed", "/v1/info", "/v1/models", "/v1/none"]
)
def test_head_is_answered_as_get_without_its_body(http, path, log_lines):
    got, head = http.get(path), http.request("HEAD", path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    # Health tells the time and the memory of the moment; the length may differ by a digit.
    assert {**head.headers, "content-length": "", "x-request-id": ""} == {
        **got.headers, "content-length": "", "x-request-id": "",
    }  # fmt: skip
    assert http.request("HEAD", "/v1/forecast").status_code == 405
    assert log_lines[-1]["method"] == "HEAD"


MALFORMED = {
    "empty": b"",
    "not json": b"{'a': 1}",
    "cut": b'{"series": [',
    "not utf-8": b'{"a": "\xff"}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "deep": b"[" * 100_000,
    "lone surrogate": b'{"model": "\\ud800"}',
    "two values": b"{} {}",
    "byte order mark": b"\xef\xbb\xbf{}",
    "duplicate key": b'{"horizon": 1, "horizon": 2}',
    "duplicate key below": b'{"series": [{"id": "a", "id": "a"}]}',
    "many duplicate keys": b"{" + b", ".join([b'"a": 1'] * 50_000) + b"}",
    "brackets": b'{"series": [' + b"[]," * 50_000 + b"[]]}",
    "braces, and a text without end": b'{"series": [' + b"{}," * 50_000 + b'"' + b'\\"' * 50_000,
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("route", ["/v1/forecast", "/v1/predict/single", "/v1/predict/batch"])
def test_malformed_bodies(http, route, name):
    assert_error(http.post(route, raw=MALFORMED[name]), 400, "malformed_json")


@pytest.mark.parametrize("raw", [b"null", b"1", b'"x"', b"[]", b"true", b"NaN", b"1e999"])
def test_bodies_that_are_not_objects(http, raw):
    for route in ("/v1/forecast", "/v1/predict/single", "/v1/predict/batch"):
        response = http.post(route, raw=raw)
        assert_error(response, 422, "invalid_fields")
        assert codes(response) == [((), "not_an_object")]


STRANGE_PATHS = (
    "/v1/models/../../etc/passwd",
    "/v1/models/..%2f..%2fetc%2fpasswd",
    "/v1/models/%2e%2e/%2e%2e/etc/passwd",
    "/v1/models/..%5c..%5cwindows",
    "/static/index.html",
    "/v1/models/kronos-bundled",
    "//etc/passwd",
    "/v1/%00",
    "/v1/%ff%fe",
    "/v1/forecast%20",
    "/%e2%80%ae",
    "/" + "a" * 5000,
)


@pytest.mark.parametrize("path", STRANGE_PATHS)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_strange_paths_are_unknown_routes(http, method, path):
    response = http.request(method, path)
    assert_error(response, 404, "unknown_route")
    assert "etc" not in response.text
    assert "a" * 65 not in response.text


def test_no_other_origin_is_let_in(http):
    for method in ("GET", "OPTIONS"):
        headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        response = http.request(method, "/v1/info", headers=headers)
        assert not [name for name in response.headers if name.startswith("access-control")]


def test_kinds_and_encodings(http, candle_items):
    raw = json.dumps(candle_items()).encode()
    assert_error(http.request("POST", "/v1/predict/single", content=raw), 415, "not_json")
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""):
        response = http.request("POST", "/v1/predict/single", content=raw, headers={"content-type": kind})
        assert_error(response, 415, "not_json")
    response = http.post("/v1/predict/single", raw=raw, headers={"content-encoding": "gzip"})
    assert_error(response, 415, "content_encoding")
    response = http.post("/v1/predict/single", raw=raw, headers={"content-type": "application/json; charset=utf-8"})
    assert response.status_code == 200


def test_body_size_with_and_without_a_declared_length(make_http):
    http = make_http(limits={"max_request_mb": 0.001})

    async def chunks():
        for _ in range(100):
            yield b" " * 100

    assert_error(http.post("/v1/forecast", raw=b" " * 1100), 413, "body_too_large")
    assert_error(http.post("/v1/forecast", raw=chunks()), 413, "body_too_large")
    lie = http.post("/v1/forecast", raw=b" " * 1100, headers={"content-length": "9" * 5000})
    assert_error(lie, 413, "body_too_large")


def test_at_most_twenty_field_errors(http, columns):
    series = dict(columns(100), timestamps=["x"] * 100, close=["x"] * 100)
    response = http.post("/v1/forecast", {"series": [series]})
    assert_error(response, 422, "invalid_fields")
    assert len(response.json()["error"]["fields"]) == 20
