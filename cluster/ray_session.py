"""The Ray cluster that a command of this package runs on."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from model.errors import InputError

ANSWER_S = 10.0
"""How long a cluster's head may take to accept a connection. Ray itself tries for many minutes."""


@contextmanager
def ray_session(address: str | None, **options: Any) -> Iterator[None]:
    """The cluster this process is connected to; else the one at `address`; else a private one, stopped at the end.

    address: None or "local" for a private one, on this machine alone. options: of ray.init.
    Raises InputError where nothing listens at a host:port; for other addresses ConnectionError and ValueError, as Ray.
    """
    import ray  # seconds, and some commands do without

    if ray.is_initialized():
        yield
        return
    if address in (None, "local"):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **options)
    else:
        _require_listener(address)
        ray.init(address=address, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "://" in address:  # auto, ray://…: Ray says soon what is wrong with them
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        raise InputError(
            f"no Ray cluster answers at {address} ({error}): give the address of its head, as `ray start --head` "
            "printed it, or leave it out for a private cluster on this machine",
            code="no_cluster",
        ) from None


def node_resources(*, free: bool = False) -> list[dict[str, float]]:
    """What each living node of the connected cluster has, or with free has left: {"CPU": 8.0, "GPU": 2.0, …} a node."""
    import ray

    if not free:
        return [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # Ray's public functions tell what is free of all nodes together only, and a worker does not span nodes.
    from ray._private.state import available_resources_per_node

    return cast(list[dict[str, float]], list(available_resources_per_node().values()))
