"""One Ray cluster per session, with two applications: a tiny checkpoint, and a slow engine to break things under."""

import os
import socket
import time
from pathlib import Path

# Before Ray is imported: with its token it would write into the home directory.
os.environ["RAY_AUTH_MODE"] = "disabled"
# As `make serve` starts it.
os.environ["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = "serve_app.proxy:middlewares"

import httpx
import pytest

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
def ray_serve(free_port):
    """(serve module, base URL) of a cluster on this machine with room for a few replicas."""
    import ray
    from ray import serve

    ray.init(
        address="local",
        num_cpus=8,  # logical: the tests' replicas mostly sleep
        num_gpus=1,  # a number only: no CUDA device stands behind it
        include_dashboard=False,
        object_store_memory=150 * 2**20,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
    )
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 300})
    yield serve, f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="session")
def applications(ray_serve, golden):
    """Both applications, started together: {"real": URL, "slow": URL}.

    "real" is planned from what the cluster says of itself, which claims a GPU that no CUDA device stands behind; "slow"
    as on a cluster without one.
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
    slow = AppConfig(groups={"cpu": {"replicas": 2, "num_cpus": 0.5, "workers": 4}})
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
