"""Starts the service, and stops it without cutting anybody off. What `make serve` and a container run.

    python -m serve_app.run serve_config.yaml

As `serve run serve_config.yaml`, which works too, but stops hard: there Ctrl-C closes the connections of all requests
that are being answered. Here the first SIGINT or SIGTERM makes every ingress refuse new work with 503 and Retry-After,
and fail its readiness; once nothing is in flight, or DRAIN_S seconds later, Serve and the Ray cluster end. A second
signal does not wait for requests. Exit status: 0 stopped by a signal, 1 could not start.

The Ray cluster is one of its own on this machine, unless RAY_ADDRESS names another, of which only Serve is stopped.
"""

from __future__ import annotations

import argparse
import logging
import os
import pkgutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from serve_app.cli import check_config, port_errors
from serve_app.logs import configure_logging, log
from serve_app.proxy import CALLBACK, CALLBACK_VARIABLE

DRAIN_S = 15.0
"""Longest wait for requests in flight. Stopping Ray takes up to 10 s more, and a supervisor usually kills after 30."""
STOP_S = 8.0
"""Longest wait for Serve's own stop, of 4 s as a rule, when no request is left."""
CUT_S = 3.0
"""The same when requests are cut off: replicas would wait for them."""
LAST_BYTES_S = 0.3
"""From the ingress's last byte to the client: the proxy passes it on."""
POLL_S = 0.2
BROADCAST_S = 2.0

ENVIRONMENT = {
    # It takes three failed checks: a killed proxy is back after 3 s instead of 25.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
    # glibc gives every few threads a heap of their own, and what is freed there stays: a soak grew by 5 % per 1,000
    # requests in all processes, and with two heaps by next to nothing.
    "MALLOC_ARENA_MAX": "2",
    # Drops the headers by which a client could give Ray's proxy orders, and refuses there what finds no room.
    CALLBACK_VARIABLE: CALLBACK,
    # Between proxy, ingress and replicas, in place of actor calls, which cost half as much processor time again.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(256 * 2**20),  # of 4 MiB: a large answer would be a 500
}
"""Ray's processes inherit these; what the caller has set wins."""
ONE_LOOP = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""The same, but not for this process: what Ray does in an ingress and in a replica shares the event loop with what we
do, where three threads would hand every request to each other. This process has no loop that a handle could use."""
FAST_ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # of 30 s: draining is ours
    # HAProxy is every connection's other end and passes X-Forwarded-For on as the client wrote it: believed, it
    # would let anybody choose the address that limits count by.
    "FORWARDED_ALLOW_IPS": "",
}
"""HAProxy in place of Ray's proxy. It opens ports on all interfaces: docs/operations.md."""

TRACE_FILES = "ray.serve._private.tracing_utils:default_tracing_exporter"
"""Ray's own exporter, to files beside its logs."""


class _Signals:
    """Counts SIGINT and SIGTERM. Ray installs handlers of its own in ray.init, so make this after it."""

    def __init__(self) -> None:
        self.first = threading.Event()
        self.second = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        (self.second if self.first.is_set() else self.first).set()


def start(config: dict[str, Any], options: argparse.Namespace) -> Any:
    """Ray, Serve and the applications, as `serve run` starts them. Returns Serve's client; does not wait."""
    import ray
    from ray.serve._private.api import serve_start  # what `serve run` calls: there is no public way to deploy a file
    from ray.serve.config import gRPCOptions
    from ray.serve.schema import ServeDeploySchema, TracingConfig

    schema = ServeDeploySchema.model_validate(config)
    ray.init(address=os.environ["RAY_ADDRESS"], namespace="serve", _metrics_export_port=options.ray_metrics_port)
    tracing = None
    if options.trace_ratio:
        tracing = TracingConfig(
            enabled=True, sampling_ratio=options.trace_ratio, exporter_import_path=options.trace_exporter or ""
        )
    client = serve_start(
        http_options=schema.http_options.model_dump(),
        proxy_location=schema.proxy_location,
        grpc_options=gRPCOptions(**schema.grpc_options.model_dump()),
        controller_options=schema.controller_options,
        global_tracing_config=tracing,
    )
    client.deploy_apps(schema, _blocking=False)
    return client


def wait_until_running(names: Iterable[str], stop: threading.Event) -> str | None:
    """Returns once every application runs, or stop is set; or what was wrong with one that could not be deployed."""
    from ray import serve

    while not stop.is_set():
        applications = serve.status().applications
        for name in names:
            if name in applications and applications[name].status == "DEPLOY_FAILED":
                return f"{name}: {applications[name].message}"
        if all(name in applications and applications[name].status == "RUNNING" for name in names):
            return None
        stop.wait(0.5)
    return None


def drain(names: Iterable[str], timeout_s: float, hurry: threading.Event) -> bool:
    """Every ingress refuses new work; True once none has a request in flight, False after timeout_s or on hurry."""
    from ray import serve

    end = time.monotonic() + timeout_s
    left = list(names)
    while time.monotonic() < end and not hurry.is_set():
        left = [name for name in left if _in_flight(serve, name) != 0]
        if not left:
            hurry.wait(LAST_BYTES_S)
            return True
        hurry.wait(POLL_S)
    return False


def _in_flight(serve: Any, name: str) -> int | None:
    """Requests in flight in all ingress replicas of an application; None if some could not be asked this time.

    Asked again and again: a replica that comes up meanwhile is told too.
    """
    try:
        handle = serve.get_app_handle(name)
        return sum(handle.broadcast("drain").results(timeout_s=BROADCAST_S))
    except Exception as error:  # whatever Ray or a dying replica raises: the time limit of drain() holds
        log(
            logging.WARNING, "an ingress could not be asked to drain", application=name, error_type=type(error).__name__
        )
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the process's exit status."""
    options = _parse(arguments)
    configure_logging("INFO")
    _set_environment(options)
    errors, warnings = check_config(options.path, os.environ)
    errors = errors or port_errors(options.path)
    for text in warnings:
        log(logging.WARNING, text)
    for text in errors:
        log(logging.ERROR, text)
    if errors:
        return 1
    with open(options.path, encoding="utf-8") as file:
        config = yaml.safe_load(file)

    import ray

    client = start(config, options)
    signals = _Signals()
    names = [application.get("name", "default") for application in config["applications"]]
    http = config.get("http_options", {})
    failure = wait_until_running(names, signals.first)
    if failure is not None:
        log(logging.ERROR, "the service could not start", error_message=failure)
    elif not signals.first.is_set():
        url = f"http://{http.get('host', '0.0.0.0')}:{http.get('port', 8000)}"
        log(logging.INFO, "the service runs; Ctrl-C stops it", url=url, docs=f"{url}/docs")
        signals.first.wait()
    started = time.monotonic()
    drained = True
    if failure is None:
        log(logging.INFO, "draining: new work is refused", timeout_s=options.drain_s)
        drained = drain(names, options.drain_s, signals.second)
        level, text = (logging.INFO, "nothing in flight") if drained else (logging.WARNING, "requests are cut off")
        log(level, text, seconds=round(time.monotonic() - started, 1))
    client.shutdown(timeout_s=STOP_S if drained else CUT_S)
    ray.shutdown()
    log(logging.INFO, "stopped", seconds=round(time.monotonic() - started, 1))
    return 0 if failure is None else 1


def _set_environment(options: argparse.Namespace) -> None:
    """What this process and Ray's shall find there. Ray reads it when it is imported, so that happens here."""
    for name, value in _environment(options).items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_ADDRESS", "local")
    not_here = {name: os.environ.pop(name, value) for name, value in ONE_LOOP.items()}
    import ray.serve  # noqa: F401

    os.environ.update(not_here)


def _environment(options: argparse.Namespace) -> dict[str, str]:
    tracing = {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": options.trace_exporter or TRACE_FILES,
        "RAY_SERVE_TRACING_SAMPLING_RATIO": str(options.trace_ratio),
    }
    return {
        **ENVIRONMENT,
        **(FAST_ENVIRONMENT if options.fast else {}),
        # Serve tells replicas of its tracing_config, on any cluster, but not its proxies: those read variables.
        **(tracing if options.trace_ratio else {}),
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serve_app.run", description=__doc__.split("\n", 1)[0])
    parser.add_argument("path", nargs="?", default="serve_config.yaml")
    parser.add_argument("--drain-s", type=float, default=DRAIN_S, help="longest wait for requests in flight")
    parser.add_argument("--fast", action="store_true", help="HAProxy, see docs/operations.md")
    parser.add_argument("--ray-metrics-port", type=int, help="Ray's own Prometheus metrics; a free port without it")
    parser.add_argument("--trace-ratio", type=_share, default=0.0, help="share of requests traced by OpenTelemetry")
    parser.add_argument("--trace-exporter", type=_importable, help="module:function that returns span processors")
    options = parser.parse_args(arguments)
    if options.trace_exporter and not options.trace_ratio:
        parser.error("--trace-exporter without --trace-ratio: nothing would be traced")
    return options


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError("must lie between 0 and 1")
    return share


def _importable(name: str) -> str:
    """Otherwise every process of the cluster would find out by itself, one failed start after another."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"cannot be imported here: {error}") from None
    return name


if __name__ == "__main__":
    sys.exit(main())
