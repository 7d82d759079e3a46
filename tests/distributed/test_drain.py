"""`python -m serve_app.run` under SIGINT and SIGTERM: whoever is being answered is answered."""

import contextlib
import copy
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from benchmarks.service import ROOT, Service, bundled_config, shipped_config

BARS = 40
"""Of 0.05 s each: 2 s of computing."""


def slow_config(**groups):
    config = shipped_config(models={"kronos-bundled": {"source": "bundled"}}, groups=groups)
    config["applications"][0]["import_path"] = "tests.serving.slow_engine:build_app"
    return config


def body(horizon):
    close = [100.0 + i for i in range(8)]
    stamps = [f"2024-01-01T{i:02d}:00:00Z" for i in range(8)]
    series = {"timestamps": stamps, "open": close, "high": close, "low": close, "close": close}
    return {"series": [series], "horizon": horizon, "freq": "1h", "seed": 1}


def answers(port):
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("options", [[], pytest.param(["--fast"], marks=pytest.mark.slow)], ids=["default", "fast"])
def test_requests_in_flight_finish_and_new_ones_are_refused(options):
    config = slow_config(cpu={"num_cpus": 0.5, "replicas": 1, "workers": 16})
    with Service(config, options=options) as service, httpx.Client(base_url=service.url, timeout=60) as http:
        in_flight = threading.Semaphore(0)

        def forecast():
            with httpx.Client(base_url=service.url, timeout=60) as own:
                in_flight.release()
                return own.post("/v1/forecast", json=body(BARS))

        with ThreadPoolExecutor(20) as pool:
            running = [pool.submit(forecast) for _ in range(20)]
            for _ in running:
                in_flight.acquire()
            wait_for_gauge(http, 20)
            service.stop()
            stopped = time.monotonic()
            refusal = wait_for_refusal(http)
            assert refusal.json()["error"]["code"] == "draining"
            assert int(refusal.headers["retry-after"]) > 0
            assert len(refusal.headers.get_list("x-request-id")) == 1
            ready = http.get("/v1/readyz")
            assert (ready.status_code, ready.json()["status"]) == (503, "draining")
            assert "retry-after" in ready.headers
            assert http.get("/v1/healthz").status_code == 200
            results = [job.result() for job in running]
        assert [one.status_code for one in results] == [200] * 20
        assert all(len(one.json()["series"][0]["mean"]["close"]) == BARS for one in results)
        assert service.process.wait(25 - (time.monotonic() - stopped)) == 0
        assert not answers(config["http_options"]["port"])
        assert "nothing in flight" in service.log_path.read_text()


def wait_for_gauge(http, value):
    """All requests have reached the ingress."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if f"kronos_concurrent_requests {float(value)}" in http.get("/v1/metrics").text:
            return
        time.sleep(0.05)
    raise AssertionError(http.get("/v1/metrics").text)


def wait_for_refusal(http):
    """The signal has gone through: the first 503 of a new request. Those before it are answered as ever."""
    end = time.monotonic() + 5
    while time.monotonic() < end:
        answer = http.post("/v1/forecast", json=body(1))
        if answer.status_code == 503:
            return answer
        assert answer.status_code == 200, answer.text
    raise AssertionError("new work is still taken")


@pytest.mark.slow
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait(second):
    """A supervisor's SIGTERM to the process alone, and somebody in a hurry."""
    with Service(slow_config(cpu={"num_cpus": 0.5, "replicas": 1})) as service:
        with httpx.Client(base_url=service.url, timeout=60) as http, ThreadPoolExecutor(1) as pool:
            running = pool.submit(http.post, "/v1/forecast", json=body(512))
            with httpx.Client(base_url=service.url, timeout=60) as probe:
                wait_for_gauge(probe, 1)
                os.kill(service.process.pid, signal.SIGTERM)
                wait_for_refusal(probe)
            os.kill(service.process.pid, second)
            assert service.process.wait(14) == 0  # below DRAIN_S: the request would have gone on for 25 s
            # Unless Ray's proxy dies before it can pass the answer on.
            with contextlib.suppress(httpx.TransportError):
                assert running.result().status_code == 503
        assert "requests are cut off" in service.log_path.read_text()


@pytest.mark.slow
def test_a_code_update_cuts_nobody_off():
    """20 s of computing, begun again when its replica is stopped, for a client of an ingress that is stopped too."""
    config = slow_config(cpu={"num_cpus": 0.5, "replicas": 1})
    with Service(config) as service, ThreadPoolExecutor(2) as pool:
        sent = (body(400), {**body(400), "stream": True})
        answers = [pool.submit(httpx.post, f"{service.url}/v1/forecast", json=one, timeout=90) for one in sent]
        with httpx.Client(base_url=service.url) as http:
            wait_for_gauge(http, 2)
        changed = copy.deepcopy(config)
        changed["applications"][0]["args"]["groups"]["cpu"]["workers"] = 9
        service.redeploy(changed)
        whole, stream = (answer.result() for answer in answers)
        assert (whole.status_code, stream.status_code) == (200, 200)
        assert len(whole.json()["series"][0]["mean"]["close"]) == 400
        assert "event: answer" in stream.text


@pytest.mark.parametrize(
    ("num_cpus", "running"), [(0.1, 1), pytest.param(0.2, 0, marks=pytest.mark.slow)], ids=["same size", "other size"]
)
def test_a_code_update_starts_the_new_replica_first_where_it_can_count_on_room(num_cpus, running):
    config = slow_config(gpu={"mode": "off"}, cpu={"num_cpus": 0.1, "replicas": 1})
    with Service(config) as service:
        before = running_replicas(service)
        assert set(before) == {"ingress", "kronos_cpu"}
        changed = copy.deepcopy(config)
        changed["applications"][0]["args"]["groups"]["cpu"] |= {"workers": 9, "num_cpus": num_cpus}
        service.redeploy(changed)
        fewest = dict.fromkeys(before, 1)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            now = running_replicas(service)  # of no deployment while Ray builds the application anew
            for name, replicas in now.items():
                fewest[name] = min(fewest[name], len(replicas))
            if len(now) == 2 and all(replicas and not replicas & before[name] for name, replicas in now.items()):
                break
            time.sleep(0.05)
        else:
            raise AssertionError(service.log_path.read_text())
        assert fewest["ingress"] == 1
        assert fewest["kronos_cpu"] == running


@pytest.mark.slow
def test_a_code_update_that_cannot_start_leaves_the_old_replica_serving(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('a broken build')")
    with Service(bundled_config(1)) as service:
        before = running_replicas(service)
        broken = copy.deepcopy(service.config)
        paths = os.pathsep.join([str(tmp_path), str(ROOT)])
        broken["applications"][0]["runtime_env"] = {"env_vars": {"PYTHONPATH": paths}}
        service.redeploy(broken)
        statuses, end = set(), time.monotonic() + 90
        while details(service)["status"] != "DEPLOY_FAILED":
            assert time.monotonic() < end
            answer = httpx.post(f"{service.url}/v1/forecast", json={**body(1), "samples": 1}, timeout=60)
            statuses.add(answer.status_code)
            time.sleep(0.2)
        assert statuses == {200}
        assert running_replicas(service)["kronos_cpu"] == before["kronos_cpu"]


def details(service):
    """What Ray says of the application."""
    return ServeSubmissionClient(service.dashboard()).get_serve_details()["applications"]["kronos"]


def running_replicas(service):
    """Deployment → the ids of its replicas that run, as Ray says."""
    return {
        name: {replica["replica_id"] for replica in one["replicas"] if replica["state"] == "RUNNING"}
        for name, one in details(service)["deployments"].items()
    }


@pytest.mark.slow
def test_what_cannot_start_ends_with_the_reason():
    config = slow_config(cpu={"num_cpus": 0.5})
    config["applications"][0]["import_path"] = "serve_app.app:no_such_builder"
    service = Service(config)
    with pytest.raises(RuntimeError, match="no_such_builder"):
        service.__enter__()
    assert service.process.returncode == 1
