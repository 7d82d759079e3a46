"""A service of our own to measure and to break: `python -m serve_app.run` as a child process."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
import yaml

ROOT = Path(__file__).parents[1]
KINDS = {"proxy": "ray::ProxyActor", "controller": "ray::ServeController", "ingress": ":ingress"}
"""What the titles of Serve's processes hold."""


def free_port() -> int:
    """A port that nobody has, below those that the system gives to connections: one of Ray's could take it first."""
    ports = list(range(8300, 8400))
    random.shuffle(ports)
    for port in ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port between 8300 and 8399")


def shipped_config(**args: Any) -> dict[str, Any]:
    """serve_config.yaml on a free port of this machine, with these entries of `args:` replaced."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
    config["http_options"].update(host="127.0.0.1", port=free_port())
    config["applications"][0]["args"].update(args)
    return config


def bundled_config(replicas: int = 2, **args: Any) -> dict[str, Any]:
    """The bundled model alone on CPU replicas that together take what one machine of 2 cores has."""
    group = {"num_cpus": 0.5, "replicas": replicas, **args.pop("cpu", {})}
    models = {"kronos-bundled": {"source": "bundled"}}
    return shipped_config(models=models, groups={"gpu": {"mode": "off"}, "cpu": group}, **args)


class Service:
    """Starts the configuration, waits until it is ready, and stops it with the signal that Ctrl-C sends."""

    def __init__(
        self, config: dict[str, Any], *, options: Sequence[str] = (), environ: Mapping[str, str] | None = None
    ) -> None:
        self.config = config
        self.url = f"http://127.0.0.1:{config['http_options']['port']}"
        self._folder = tempfile.TemporaryDirectory()
        self._path = Path(self._folder.name) / "serve_config.yaml"
        self.log_path = Path(self._folder.name) / "log"
        self._options = list(options)
        self._environ = dict(environ or {})

    def __enter__(self) -> Self:
        self._path.write_text(yaml.safe_dump(self.config), encoding="utf-8")
        environ = {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serve_app.run", str(self._path), *self._options],
                cwd=ROOT,
                env=os.environ | environ | self._environ,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A parent that runs in the background ignores Ctrl-C, and the child would inherit that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )
        try:
            self.wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.process.poll() is None:
            self.stop()
        try:
            self.process.wait(60)
        finally:
            if self.process.poll() is None:
                self.process.kill()
            self._folder.cleanup()

    def stop(self) -> None:
        """As Ctrl-C does: the signal goes to every process of the group. Returns at once."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait_ready(self, timeout_s: float = 120) -> None:
        """Raises RuntimeError with the end of the log if the service ends or is not ready in time."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self.process.poll() is None:
            if self.ready():
                return
            time.sleep(0.1)
        raise RuntimeError(f"the service is not ready:\n{self.log_path.read_text()[-3000:]}")

    def ready(self) -> bool:
        """True once readyz is 200 and every replica of the configuration is listed."""
        try:
            if httpx.get(f"{self.url}/v1/readyz", timeout=5).status_code != 200:
                return False
            return len(self.replicas()) >= self._expected()
        except (httpx.TransportError, ValueError):
            return False

    def _expected(self) -> int:
        cpu = self.config["applications"][0]["args"].get("groups", {}).get("cpu", {})
        scaling = cpu.get("autoscaling")
        return int(scaling["min_replicas"] if scaling else cpu.get("replicas") or 1)

    def dashboard(self) -> str:
        """Address of the cluster's dashboard: `serve deploy` speaks to it."""
        found = re.search(r"dashboard at \S*?(https?://)?(127\.0\.0\.1:\d+)", self.log_path.read_text())
        if found is None:
            raise RuntimeError("the cluster has no dashboard")
        return f"http://{found[2]}"

    def redeploy(self, config: dict[str, Any]) -> None:
        """As `serve deploy` of the changed configuration does. Returns at once."""
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        ServeSubmissionClient(self.dashboard()).deploy_applications(config)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples; 0 if there is none."""
        lines = httpx.get(f"{self.url}/v1/metrics", timeout=10).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"{name}[{{ ]", line))

    def replicas(self) -> list[dict[str, Any]]:
        answer = httpx.get(f"{self.url}/v1/replicas", timeout=10)
        if answer.status_code != 200:
            raise ValueError(f"/v1/replicas answered {answer.status_code}")
        listed: list[dict[str, Any]] = answer.json()["replicas"]
        return listed

    def processes(self, kind: str) -> list[psutil.Process]:
        """This service's processes of one of KINDS, or its model replicas with kind "replica"."""
        if kind == "replica":
            return [psutil.Process(one["pid"]) for one in self.replicas()]
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if KINDS[kind] in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue  # ended while we looked
        return found
