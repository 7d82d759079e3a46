"""The cluster that a command joins: one that is not there is said soon."""

import socket
import time

import pytest

from cluster.ray_session import ray_session
from model.errors import InputError


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_address_where_nothing_listens_is_refused_in_seconds(host, monkeypatch):
    """Ray would try for many minutes, with two lines of its own log for each try."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # whatever an earlier test of this process has started
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else answers there meanwhile
        address = f"{host}:{taken.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(InputError, match=f"no Ray cluster answers at {address}") as caught, ray_session(address):
            pass
    assert caught.value.code == "no_cluster"
    assert time.monotonic() - began < 30
