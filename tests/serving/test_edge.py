"""What a client can do to Ray's proxy, and cannot do to us."""

import contextlib
import json
import re
import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest


def all_idle(client):
    replicas = client.get("/v1/replicas").json()["replicas"]
    return all(replica["running_rows"] == replica["queued"] == 0 for replica in replicas)


@pytest.mark.parametrize("given", ["a b", "x" * 65, "", "caf\u00e9".encode("latin-1")])
def test_an_unusable_request_id_does_not_come_back(real, given):
    ids = real.get("/v1/healthz", headers={"x-request-id": given}).headers.get_list("x-request-id")
    assert len(ids) == 1
    assert re.fullmatch(r"[0-9a-f-]{32,36}", ids[0])


ORDERS = {"x-request-disconnect-disabled": "?1", "x-request-timeout-seconds": "0"}


def test_rays_headers_do_not_lengthen_a_deadline(slow, request_body):
    started = time.monotonic()
    response = slow.post("/v1/forecast", json=request_body(16, 500, deadline_ms=500), headers=ORDERS)
    assert response.status_code == 408
    assert time.monotonic() - started < 10


def test_rays_headers_do_not_keep_the_computing_alive(slow, request_body, wait):
    with pytest.raises(httpx.ReadTimeout):
        slow.post("/v1/forecast", json=request_body(16, 500), timeout=1.5, headers=ORDERS)
    # It would have taken 25 s.
    wait(lambda: all_idle(slow), 5)


def test_a_declared_size_over_the_limit_is_refused_before_the_body_comes(applications):
    url = urlsplit(applications["real"])
    head = (
        f"POST {url.path}/v1/forecast HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {2**40}\r\n\r\n"
    )
    with contextlib.closing(socket.create_connection((url.hostname, url.port), timeout=10)) as connection:
        connection.sendall(head.encode())
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    status, _, body = answer.partition(b"\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 413 ")
    assert json.loads(body[body.index(b"{") : body.rindex(b"}") + 1])["error"]["code"] == "body_too_large"
