"""GPU nodes that join and leave while the service runs: several nodes, simulated on one machine."""

import os
import socket
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
NO_GPU = "the cluster has no GPU: forecasts run on the CPU"


def wait_until(condition, timeout_s):
    """Seconds until condition() was true; fails after timeout_s."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, f"not within {timeout_s} s"
        time.sleep(0.1)
    return time.monotonic() - started


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cluster():
    """(Cluster, URL of Serve): a head without a GPU."""
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    port, gcs_port = free_port(), free_port()
    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 8,
            "num_gpus": 0,
            "include_dashboard": False,
            "gcs_server_port": gcs_port,  # Ray's usual one may be another cluster's
            "object_store_memory": 100 * 2**20,
        },
    )
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(made.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}})
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield made, f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()
    made.shutdown()


def run(cluster, name, **gpu):
    """Deploys an application of slow engines and returns a client of it, without waiting for its GPU group."""
    from ray import serve

    from serve_app.app import assemble
    from serve_app.config import AppConfig
    from tests.serving.slow_engine import SlowFactory

    config = AppConfig(groups={"gpu": {"num_cpus": 0.1, **gpu}, "cpu": {"num_cpus": 0.1}})
    serve._run(assemble(config, {}, None, SlowFactory), name=name, route_prefix=f"/{name}", _blocking=False)
    client = httpx.Client(base_url=f"{cluster[1]}/{name}", timeout=60)

    def ready():
        response = client.get("/v1/readyz")
        return response.status_code == 200

    wait_until(ready, 60)
    return client


def add_gpu_node(cluster, gpus):
    return cluster[0].add_node(num_cpus=2, num_gpus=gpus, object_store_memory=100 * 2**20)


def forecast(client, bars, horizon=2):
    part = bars[: 16 + horizon]
    stamps = [f"{time:%Y-%m-%d %H:%M:%S}" for time in part["timestamps"]]
    series = {name: part[name][:16].astype(float).tolist() for name in ("open", "high", "low", "close")}
    series |= {"timestamps": stamps[:16], "future_timestamps": stamps[16:]}
    return client.post("/v1/forecast", json={"series": [series], "seed": 3})


def groups(client):
    return sorted(replica["group"] for replica in client.get("/v1/replicas").json()["replicas"])


def test_a_gpu_node_is_used_when_it_joins_and_its_work_goes_on_when_it_leaves(cluster, bars):
    client = run(cluster, "auto", replicas=8)
    assert groups(client) == ["cpu"]
    assert client.get("/v1/info").json()["groups"] == ["gpu", "cpu"]
    assert client.get("/v1/readyz").json()["device_warning"] == NO_GPU
    response = forecast(client, bars)
    assert (response.headers["x-backend-used"], response.json()["device_warning"]) == ("cpu", NO_GPU)
    (cpu,) = client.get("/v1/replicas").json()["replicas"]

    node = add_gpu_node(cluster, 2)
    took = wait_until(lambda: groups(client) == ["cpu", "gpu", "gpu"], 90)
    print(f"two GPU replicas {took:.1f} s after their node", file=sys.stderr)
    response = forecast(client, bars)
    assert (response.headers["x-backend-used"], response.json()["device_warning"]) == ("gpu", None)
    assert client.get("/v1/readyz").json()["device_warning"] is None

    answers, over = [], threading.Event()

    def ask():
        with httpx.Client(base_url=client.base_url, timeout=60) as own:
            while not over.is_set():
                answers.append(forecast(own, bars, 20))

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for thread in askers:
        thread.start()
    wait_until(lambda: len(answers) > 4, 20)
    cluster[0].remove_node(node)
    took = wait_until(lambda: groups(client) == ["cpu"], 90)
    print(f"GPU replicas gone {took:.1f} s after their node", file=sys.stderr)
    wait_until(lambda: answers[-1].headers.get("x-backend-used") == "cpu", 20)
    over.set()
    for thread in askers:
        thread.join()
    assert {answer.status_code for answer in answers} == {200}, [a.text for a in answers if a.status_code != 200][:1]
    wait_until(lambda: client.get("/v1/readyz").json()["device_warning"] == NO_GPU, 5)
    # Nothing was restarted for it.
    assert [replica["pid"] for replica in client.get("/v1/replicas").json()["replicas"]] == [cpu["pid"]]


@pytest.mark.slow
def test_fixed_shows_its_demand_and_the_cpu_serves_meanwhile(cluster, bars):
    from ray import serve
    from ray.autoscaler.v2.sdk import get_cluster_status

    client = run(cluster, "fixed", mode="fixed")
    assert serve.status().applications["fixed"].status == "DEPLOYING"
    assert groups(client) == ["cpu"]
    assert forecast(client, bars).json()["device_warning"] == NO_GPU
    demands = get_cluster_status(cluster[0].address).resource_demands.ray_task_actor_demand
    assert any(bundle.bundle.get("GPU") == 1 for demand in demands for bundle in demand.bundles_by_count)
    add_gpu_node(cluster, 1)
    wait_until(lambda: groups(client) == ["cpu", "gpu"], 30)
    assert forecast(client, bars).headers["x-backend-used"] == "gpu"
