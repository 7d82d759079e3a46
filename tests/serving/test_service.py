"""The service on Ray: what only the whole can show."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from model.frames import time_marks
from model.types import COLUMNS, Sampling, Series
from serve_app.schemas import ForecastRequest


def metric(client, name):
    lines = client.get("/v1/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


# --- a real model -----------------------------------------------------------------------------------------------------


def test_a_forecast_is_the_models(real, request_body, predictor):
    """Over HTTP come the very numbers that the predictor gives in this process, twice."""
    body = request_body(64, 6, samples=3, seed=7, return_paths=True)
    first, second = (real.post("/v1/forecast", json=body) for _ in range(2))
    assert first.status_code == 200, first.text
    assert first.json() == second.json()
    assert first.headers["x-backend-used"] == "cpu"
    assert len(first.headers.get_list("x-request-id")) == 1

    (series,) = ForecastRequest.model_validate(body).series
    candles = [getattr(series, name) for name in COLUMNS]
    ours = predictor.forecast_series(
        Series(
            np.stack(candles, axis=1).astype(np.float32),
            time_marks(series.timestamps.local),
            time_marks(series.future_timestamps.local),
        ),
        Sampling(samples=3, seed=7),
    )
    theirs = np.array([[path[name] for name in path] for path in first.json()["series"][0]["paths"]])
    np.testing.assert_allclose(theirs.transpose(0, 2, 1), ours.values, rtol=1e-5)


def test_predictions(real, candle_body):
    single = real.post("/v1/predict/single", json=candle_body(20, 3))
    assert single.status_code == 200, single.text
    assert len(single.json()["prediction"]) == 3
    assert single.json()["device"] == "cpu"
    items = [dict(candle_body(10 + i, 1 + i), series_id=str(i)) for i in range(3)]
    batch = real.post("/v1/predict/batch", json={"items": items}).json()
    assert [len(answer["prediction"]) for answer in batch] == [1, 2, 3]


@pytest.fixture
def candle_body():
    def make(bars, horizon):
        candles = [{"open": 100.0 + i, "high": 102.0 + i, "low": 99.0 + i, "close": 101.0 + i} for i in range(bars)]
        stamps = [f"2024-01-{1 + i // 24:02d}T{i % 24:02d}:00:00Z" for i in range(bars + horizon)]
        return {"candles": candles, "timestamps": stamps[:bars], "prediction_timestamps": stamps[bars:]}

    return make


NO_GPU = "the cluster has 1 GPU(s), fewer than the 4 that one replica asks for: forecasts run on the CPU"


def test_a_cluster_without_a_gpu_says_so_everywhere(slow, request_body):
    assert slow.get("/v1/readyz").json()["device_warning"] == NO_GPU
    assert slow.get("/v1/info").json()["device_warning"] == NO_GPU
    replicas = slow.get("/v1/replicas").json()["replicas"]
    assert [(one["group"], one["device"], one["device_warning"]) for one in replicas] == [("cpu", "cpu", NO_GPU)] * 2
    body = slow.post("/v1/forecast", json=request_body(16, 1), headers={"X-Kronos-Device": "gpu"}).json()
    assert body["device_warning"].startswith(NO_GPU + "; the gpu group was requested")


def test_metrics_of_the_replicas_reach_the_ingress(real, request_body, wait):
    before = metric(real, "kronos_engine_rows_total")
    assert real.post("/v1/forecast", json=request_body(16, 4, samples=5)).status_code == 200
    # News come every second.
    wait(lambda: metric(real, "kronos_engine_rows_total") >= before + 20, 5)
    assert metric(real, "kronos_engine_prefill_seconds_total") > 0
    assert metric(real, "kronos_replica_memory_bytes") > 2**20
    assert metric(real, "kronos_model_loads_total") >= 2
    assert metric(real, "kronos_ready") == 1


def test_a_gpu_that_is_only_a_number(real, request_body):
    """The GPU group is placed with its share of the GPU, finds no CUDA device, says so and runs on the CPU."""
    import ray

    assert ray.available_resources()["GPU"] == 0.5
    assert real.get("/v1/info").json()["groups"] == ["gpu", "cpu"]
    gpu, cpu = real.get("/v1/replicas").json()["replicas"]
    assert (gpu["group"], gpu["device"]) == ("gpu", "cpu")
    assert "CUDA is not available" in gpu["device_warning"]
    assert (cpu["group"], cpu["device"], cpu["device_warning"]) == ("cpu", "cpu", None)

    response = real.post("/v1/forecast", json=request_body(16, 1))
    assert response.headers["x-backend-used"] == "cpu"
    assert "CUDA is not available" in response.json()["device_warning"]
    assert metric(real, "kronos_device_fallbacks_total") >= 1
    response = real.post("/v1/forecast", json=request_body(16, 1), headers={"X-Kronos-Device": "cpu"})
    assert response.json()["device_warning"] is None


def test_a_model_that_asks_for_cuda(real, request_body):
    body = request_body(16, 1, model="wants-cuda")
    for group in ("cpu", "gpu"):
        response = real.post("/v1/forecast", json=body, headers={"X-Kronos-Device": group})
        assert response.status_code == 200, response.text
        assert response.json()["device"] == "cpu"
        assert "'cuda:0' was requested" in response.json()["device_warning"]


def test_models_that_are_absent_or_unknown(real, request_body):
    response = real.post("/v1/forecast", json=request_body(16, 1, model="gone"))
    assert response.status_code == 503, response.text
    assert response.json()["error"]["code"] == "model_unavailable"
    assert int(response.headers["retry-after"]) > 0
    assert "/no/such" not in response.text
    assert real.post("/v1/forecast", json=request_body(16, 1, model="never")).status_code == 404
    assert real.post("/v1/forecast", json=request_body(16, 1)).status_code == 200


def test_model_states(real, request_body, wait):
    real.post("/v1/forecast", json=request_body(16, 1, model="gone"))
    real.post("/v1/forecast", json=request_body(16, 1, model="wants-cuda"))

    def states():
        models = {model["id"]: model for model in real.get("/v1/models").json()["models"]}
        found = [models[name]["state"] for name in ("tiny", "wants-cuda", "gone")]
        return models if found == ["loaded", "loaded", "failed"] else None

    models = wait(states, 5)
    assert models["tiny"]["parameters"] > 0
    assert len(models["tiny"]["sha256"]) == 64
    assert (models["tiny"]["groups"], models["tiny"]["replicas"]) == (["cpu", "gpu"], 2)
    assert "/no/such" not in models["gone"]["error"]


def test_bad_input_passes_through_ray_unharmed(real, request_body):
    body = request_body(16, 1)
    body["series"][0]["close"][3] = -1
    response = real.post("/v1/forecast", json=body, headers={"x-request-id": "mine"})
    assert response.status_code == 422
    assert response.json()["error"]["fields"][0]["loc"] == ["series", 0, "close", 3]
    assert response.json()["error"]["request_id"] == "mine"
    assert response.headers.get_list("x-request-id") == ["mine"]
    assert real.get("/v1/nothing").json()["error"]["code"] == "unknown_route"


# --- under way --------------------------------------------------------------------------------------------------------


def test_health_answers_while_forecasts_run(slow, request_body):
    body = request_body(16, 40, seed=1)
    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(slow.post, "/v1/forecast", json=body) for _ in range(6)]
        latencies = []
        while not all(job.done() for job in running):
            started = time.monotonic()
            assert slow.get("/v1/healthz").status_code == 200
            latencies.append(time.monotonic() - started)
        assert [job.result().status_code for job in running] == [200] * 6
    assert len(latencies) > 5
    assert sorted(latencies)[len(latencies) // 2] < 0.25


def test_deadline(slow, request_body, wait):
    timeouts = metric(slow, "kronos_timeouts_total")
    started = time.monotonic()
    response = slow.post("/v1/forecast", json=request_body(16, 500, deadline_ms=300))
    assert response.status_code == 408
    assert time.monotonic() - started < 5
    assert metric(slow, "kronos_timeouts_total") == timeouts + 1
    wait(lambda: all_idle(slow), 5)


def all_idle(client):
    replicas = client.get("/v1/replicas").json()["replicas"]
    return all(replica["running_rows"] == replica["queued"] == 0 for replica in replicas)


def test_a_client_that_leaves_stops_the_computing(slow, request_body, wait):
    with pytest.raises(httpx.ReadTimeout):
        slow.post("/v1/forecast", json=request_body(16, 500), timeout=1.5)
    # It would have taken 25 s.
    wait(lambda: all_idle(slow), 5)


def test_a_killed_replica_costs_no_forecast_and_is_replaced(slow, request_body, wait):
    before = {replica["pid"] for replica in slow.get("/v1/replicas").json()["replicas"]}
    retries = metric(slow, "kronos_retries_total")
    answers = []
    thread = threading.Thread(
        target=lambda: answers.append(slow.post("/v1/forecast", json=request_body(16, 60, seed=5, samples=3)))
    )
    thread.start()

    def busy():
        replicas = slow.get("/v1/replicas").json()["replicas"]
        return [replica["pid"] for replica in replicas if replica["running_rows"]]

    (victim,) = wait(busy, 5)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    wait(lambda: victim not in {replica["pid"] for replica in slow.get("/v1/replicas").json()["replicas"]}, 8)
    gone = time.monotonic() - killed
    thread.join(30)
    (answer,) = answers
    assert answer.status_code == 200, answer.text
    # The seed and its successors' mean: the retry computed what the first try would have.
    assert answer.json()["series"][0]["mean"]["close"] == [6.0] * 60
    assert metric(slow, "kronos_retries_total") == retries + 1

    def replaced():
        now = {replica["pid"] for replica in slow.get("/v1/replicas").json()["replicas"]}
        return len(now) == 2 and victim not in now and now & before

    wait(replaced, 30)
    print(f"gone from the listing after {gone:.1f} s, replaced after {time.monotonic() - killed:.1f} s")
