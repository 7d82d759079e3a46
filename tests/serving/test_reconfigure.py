"""Other models and limits for a running service, by the command that a user gives, under load."""

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from serve_app.proxy import CALLBACK, CALLBACK_VARIABLE

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "serve_app.cli", "reconfigure"]


def checkpoint(golden, folder, change=lambda weights: None):
    """A copy of the golden pair whose model has other weights."""
    shutil.copytree(golden / "tokenizer", folder / "tokenizer")
    shutil.copytree(golden / "model", folder / "model")
    weights = dict(load_file(folder / "model" / "model.safetensors"))
    change(weights)
    save_file(weights, folder / "model" / "model.safetensors")
    return folder


def head(weights):
    return next(name for name in sorted(weights) if name.startswith("head.") and name.endswith("weight"))


def reverse(weights):
    name = head(weights)
    weights[name] = weights[name][::-1].copy()


def spoil(weights):
    weights[head(weights)][0] = float("nan")


class Service:
    """A server, its configuration file, and the command that sends the file to it."""

    def __init__(self, port, path, data):
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        self.path, self.data, self.address = path, data, None
        # As in a user's shell, where Ray asks for a token and keeps it in the home directory.
        self.variables = {**VARIABLES, "HOME": str(path.parent / "home"), "RAY_AUTH_MODE": None}

    @property
    def args(self):
        return self.data["applications"][0]["args"]

    def write(self):
        self.path.write_text(yaml.safe_dump(self.data))

    def reconfigure(self):
        self.write()
        command = [*COMMAND, str(self.path), "--address", self.address]
        environ = {name: value for name, value in {**os.environ, **self.variables}.items() if value is not None}
        return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False)

    def model(self, name="m"):
        return next((one for one in self.http.get("/v1/models").json()["models"] if one["id"] == name), None)

    def pids(self):
        return [one["pid"] for one in self.http.get("/v1/replicas").json()["replicas"]]


VARIABLES = {"KRONOS_MAX_REQUEST_SIZE_MB": "3", "KRONOS_MAX_CONTEX": "1", CALLBACK_VARIABLE: CALLBACK}


@pytest.fixture(scope="module")
def service(golden, free_port, serve_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reconfigure")
    (folder / "root").mkdir()
    (folder / "home").mkdir()
    port = free_port()
    data = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "kronos",
                "route_prefix": "/",
                "import_path": "serve_app.app:build_app",
                "args": {
                    "models": {"m": {"source": str(checkpoint(golden, folder / "v1"))}},
                    "default_model": "m",
                    "models_root": str(folder / "root"),
                    "groups": {"gpu": {"mode": "off"}, "cpu": {"num_cpus": 0.5, "cache_gb": 0.1}},
                    "limits": {"load_retry_s": 1},
                },
            }
        ],
    }
    made = Service(port, folder / "serve_config.yaml", data)
    made.write()
    log = folder / "log"
    with serve_run(made.path, port, made.variables, log):
        made.address = re.search(r"http://[\d.]+:\d+", re.sub(r"\x1b\[\d*m", "", log.read_text()))[0]
        yield made


def test_who_has_no_token_is_told_so(service, tmp_path):
    variables, service.variables = service.variables, {**service.variables, "HOME": str(tmp_path)}
    try:
        done = service.reconfigure()
    finally:
        service.variables = variables
    assert done.returncode == 1
    assert done.stderr.startswith("error: Authentication required")
    assert "Traceback" not in done.stderr


def test_variables_of_the_shell_reach_it(service):
    info = service.http.get("/v1/info").json()
    assert info["limits"]["max_request_mb"] == 3
    assert any("KRONOS_MAX_CONTEX, did you mean" in warning for warning in info["warnings"])
    assert not any("Ray was started without" in warning for warning in info["warnings"])


def test_a_model_is_swapped_without_a_dropped_or_a_mixed_answer(service, golden, request_body, wait):
    body, before, pids = request_body(64, 8, seed=7, samples=4), service.model(), service.pids()
    two = {"series": [{**body["series"][0], "id": name} for name in "ab"], "seed": 7, "samples": 4}
    answers, over = [], threading.Event()

    def ask():
        with httpx.Client(base_url=service.http.base_url, timeout=60) as client:
            while not over.is_set():
                answers.append(client.post("/v1/forecast", json=two))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        new = checkpoint(golden, service.path.parent / "v2", reverse)
        service.args["models"]["m"]["source"] = str(new)
        done = service.reconfigure()
        assert done.returncode == 0, done.stderr
        wait(lambda: service.model()["sha256"] != before["sha256"], 60)
        after = len(answers)
        wait(lambda: len(answers) > after + 6, 60)
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert {answer.status_code for answer in answers} == {200}
    # One seed: each version has its own numbers, and both series of an answer come from one version.
    numbers = {}
    for answer in map(httpx.Response.json, answers):
        means = [series["mean"]["close"] for series in answer["series"]]
        numbers.setdefault(answer["model"]["sha256"], set()).add(str(means))
    assert {before["sha256"], service.model()["sha256"]} == set(numbers)
    assert [len(found) for found in numbers.values()] == [1, 1]
    assert numbers[before["sha256"]] != numbers[service.model()["sha256"]]
    assert service.pids() == pids


def test_a_bad_version_leaves_the_old_one_serving_and_says_why(service, golden, request_body, wait):
    before = service.model()
    good = service.args["models"]["m"]["source"]
    service.args["models"]["m"]["source"] = str(checkpoint(golden, service.path.parent / "v3", spoil))
    assert service.reconfigure().returncode == 0
    wait(lambda: (service.model()["pending"] or {}).get("state") == "failed", 60)
    now = service.model()
    assert (now["state"], now["sha256"]) == ("loaded", before["sha256"])
    assert "NaN" in now["error"]
    assert str(service.path.parent) not in now["error"]
    assert service.http.post("/v1/forecast", json=request_body(64, 8)).json()["model"]["sha256"] == before["sha256"]
    service.args["models"]["m"]["source"] = good
    assert service.reconfigure().returncode == 0
    wait(lambda: service.model()["pending"] is None, 60)


def test_limits_change_at_once_and_what_needs_a_restart_is_refused(service, request_body, wait):
    pids = service.pids()
    service.args["limits"] |= {"max_horizon": 32}
    assert service.reconfigure().returncode == 0
    wait(lambda: service.http.get("/v1/info").json()["limits"]["max_horizon"] == 32, 30)
    assert service.http.post("/v1/forecast", json=request_body(64, 33)).status_code == 422
    service.args["clip"] = 3
    refused = service.reconfigure()
    assert refused.returncode == 1
    assert "clip cannot change without a restart" in refused.stderr
    del service.args["clip"]
    port = service.data["http_options"]["port"]
    service.data["http_options"]["port"] = port + 1
    ignored = service.reconfigure()
    service.data["http_options"]["port"] = port
    assert ignored.returncode == 0
    assert "http_options.port stays as it is" in ignored.stdout
    assert "http_options.host" not in ignored.stdout
    assert "proxy_location" not in ignored.stdout
    assert service.pids() == pids


def test_a_new_default_model_is_waited_for(service, golden, request_body, wait):
    service.args["models"]["n"] = {"source": str(checkpoint(golden, service.path.parent / "n", reverse))}
    service.args["default_model"] = "n"
    assert service.reconfigure().returncode == 0
    codes = []

    def switched():
        response = service.http.post("/v1/forecast", json=request_body(64, 2))
        codes.append(response.status_code)
        return response.json()["model"]["id"] == "n"

    wait(switched, 60)
    assert set(codes) == {200}


def test_a_finetuned_folder_is_served_from_when_it_appears(service, golden, request_body, wait):
    body = request_body(64, 2, model="mine")
    assert service.http.post("/v1/forecast", json=body).status_code == 404
    for name in ("../../etc/passwd", "..", "root/mine"):
        assert service.http.post("/v1/forecast", json={**body, "model": name}).status_code == 404
    made = checkpoint(golden, service.path.parent / "made", reverse)
    made.rename(service.path.parent / "root" / "mine")
    wait(lambda: service.model("mine"), 10)
    answer = service.http.post("/v1/forecast", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"]["id"] == "mine"
    wait(lambda: service.model("mine")["state"] == "loaded", 10)
    assert service.model("mine")["sha256"] == answer.json()["model"]["sha256"]
    assert str(service.path.parent) not in str(service.model("mine"))
