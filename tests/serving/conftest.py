"""One Ray cluster per session, with two applications: a tiny checkpoint, and a slow engine to break things under."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from serve_app.run import ENVIRONMENT, ONE_LOOP

ROOT = Path(__file__).parents[2]


def wait_until(condition, timeout_s, step_s=0.1):
    """The first true value of condition(), asked again and again; fails after timeout_s."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(step_s)
    raise AssertionError(f"not within {timeout_s} s")


@pytest.fixture(scope="session")
def wait():
    return wait_until


@pytest.fixture(scope="session")
def free_port():
    def find():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def serve_run():
    """(configuration file, port, variables, log) → context: (process of `serve run`, once it is ready).

    A variable of None is taken away.

    At its end Ctrl-C stops the process, with status 0 and nobody left who answers.
    """

    @contextmanager
    def start(path, port, variables, log):
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "serve"), "run", str(path)],
            cwd=ROOT,
            env={name: value for name, value in {**os.environ, **variables}.items() if value is not None},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A parent that runs in the background ignores Ctrl-C, and the child would inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

        def ready():
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                return httpx.get(f"http://127.0.0.1:{port}/v1/readyz").status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_until(ready, 120, 0.25)
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
                process.wait(60)
        assert process.returncode == 0, log.read_text()[-3000:]
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/v1/healthz")

    return start


@pytest.fixture(scope="session")
def ray_serve(free_port):
    """(serve module, base URL) of a cluster on this machine with room for a few replicas, as `make serve` starts it."""
    import ray
    from ray import serve

    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **ENVIRONMENT, **ONE_LOOP}
    ray.init(
        address="local",
        num_cpus=8,  # logical: the tests' replicas mostly sleep
        num_gpus=1,  # a number only: no CUDA device stands behind it
        include_dashboard=False,
        object_store_memory=150 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": variables},
    )
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 300})
    yield serve, f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="session")
def applications(ray_serve, golden):
    """Both applications, started together: {"real": URL, "slow": URL}.

    "real" has a replica on the cluster's GPU, which no CUDA device stands behind; "slow" finds too few GPUs.
    """
    from serve_app.app import assemble, build_app
    from serve_app.config import AppConfig
    from tests.serving.slow_engine import SlowFactory

    real = AppConfig(
        models={
            "tiny": {"source": str(golden)},
            "wants-cuda": {"source": str(golden), "device": "cuda:0"},
            "gone": {"source": "/no/such/folder", "tokenizer": "/no/such/folder"},
        },
        default_model="tiny",
        hybrid=True,
        groups={"gpu": {"num_gpus": 0.5, "num_cpus": 0.5}, "cpu": {"num_cpus": 0.5}},
    )
    # Four GPUs a replica are more than the cluster has.
    cpu = {"replicas": 2, "num_cpus": 0.5, "workers": 4, "hang_timeout_s": 3}
    # Room for three models, and for 3,000 rows × steps.
    cpu |= {"model_memory_gb": 3, "max_outstanding_work": 1500}
    models = {name: {"source": "bundled"} for name in ("kronos-bundled", "b", "c", "d")}
    models["bad"] = {"source": "org/repo", "tokenizer": "org/repo", "revision": "bad"}
    slow = AppConfig(models=models, groups={"gpu": {"num_gpus": 4}, "cpu": cpu})
    serve, url = ray_serve
    serve.run_many(
        [
            serve.RunTarget(build_app(real), name="real", route_prefix="/real"),
            serve.RunTarget(assemble(slow, {}, {"CPU": 8.0}, SlowFactory), name="slow", route_prefix="/slow"),
        ]
    )
    urls = {name: f"{url}/{name}" for name in ("real", "slow")}
    for one in urls.values():
        wait_until(lambda one=one: httpx.get(f"{one}/v1/readyz").status_code == 200, 60)
        wait_until(lambda one=one: len(httpx.get(f"{one}/v1/replicas").json()["replicas"]) == 2, 60)
    return urls


@pytest.fixture
def real(applications):
    with httpx.Client(base_url=applications["real"], timeout=60) as client:
        yield client


@pytest.fixture
def slow(applications):
    with httpx.Client(base_url=applications["slow"], timeout=60) as client:
        yield client


@pytest.fixture
def request_body(bars):
    """(bars, horizon) → a body of /v1/forecast over real candles."""

    def make(count, horizon, **settings):
        part = bars[: count + horizon]
        stamps = [f"{time:%Y-%m-%d %H:%M:%S}" for time in part["timestamps"]]
        names = ("open", "high", "low", "close", "volume", "amount")
        series = {name: part[name][:count].astype(float).tolist() for name in names}
        series |= {"id": "600977", "timestamps": stamps[:count], "future_timestamps": stamps[count:]}
        return {"series": [series], **settings}

    return make
