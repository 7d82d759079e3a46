"""What a client can do to Ray's proxy, and cannot do to us."""

import contextlib
import json
import re
import socket
import time
from urllib.parse import urlsplit

import httpx
import numpy as np
import pyarrow as pa
import pytest

from serve_app.client import KronosClient


def all_idle(client):
    replicas = client.get("/v1/replicas").json()["replicas"]
    return all(replica["running_rows"] == replica["queued"] == 0 for replica in replicas)


@pytest.mark.parametrize("given", ["a\tb", "x" * 65, "", "caf\u00e9".encode("latin-1")])
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


@pytest.mark.parametrize("name", ["x-session-id", "x_session_id", "serve-multiplexed_model_id"])
def test_a_header_that_ray_cannot_decode_does_no_harm(real, name):
    assert real.get("/v1/healthz", headers={name: b"\xff"}).status_code == 200


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


# --- streams and tables over the real model ---------------------------------------------------------------------------


def test_a_stream_ends_with_the_answer_that_is_not_streamed(real, request_body):
    body = request_body(64, 6, samples=3, seed=7, return_paths=True)
    whole = real.post("/v1/forecast", json=body)
    assert whole.status_code == 200, whole.text
    told = []
    with real.stream("POST", "/v1/forecast", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                told.append([value, None])
            elif field == "data":
                told[-1][1] = json.loads(value)
    *bars, (name, answer) = told
    assert (name, answer) == ("answer", whole.json())
    assert [name for name, _ in bars] == ["bars"] * len(bars)
    close = [price for _, data in bars for price in data["mean"]["close"]]
    np.testing.assert_allclose(close, answer["series"][0]["mean"]["close"], rtol=1e-6)


def test_bars_arrive_while_the_rest_is_computed(slow, request_body, wait):
    """The first events come long before the last bar, and closing the stream stops the computing."""
    started = time.monotonic()
    body = request_body(16, 400, stream=True)
    with slow.stream("POST", "/v1/forecast", json=body, headers=ORDERS) as response:
        lines = response.iter_lines()
        assert next(lines) == "event: bars"
        assert json.loads(next(lines).removeprefix("data: "))["first"] == 0
    # All of it would have taken 20 s.
    assert time.monotonic() - started < 10
    wait(lambda: all_idle(slow), 5)


def test_a_deadline_within_a_stream_is_its_last_event(slow, request_body, wait):
    text = slow.post("/v1/forecast", json=request_body(16, 400, stream=True, deadline_ms=2000)).text
    *_, last = text.strip().split("\n\n")
    assert last.startswith("event: error\n")
    assert json.loads(last.split("data: ", 1)[1])["error"]["code"] == "deadline_passed"
    wait(lambda: all_idle(slow), 5)


def test_arrow_over_ray(applications, request_body):
    body = request_body(64, 4, samples=3, seed=7, return_paths=True)
    (series,) = body["series"]
    columns = {name: series[name] for name in ("open", "high", "low", "close", "volume", "amount")}
    table = pa.table({"series_id": ["600977"] * 64, "timestamp": series["timestamps"], **columns})
    with KronosClient(applications["real"]) as client:
        settings = {"future_timestamps": series["future_timestamps"], "samples": 3, "seed": 7, "return_paths": True}
        answer = client.forecast_table(table, **settings)
        expected = client.forecast(**body)["series"][0]
    paths = answer.filter(pa.compute.equal(answer["kind"].cast(pa.string()), "path"))
    told = np.array([path["close"] for path in expected["paths"]]).ravel()
    np.testing.assert_allclose(paths["close"].to_numpy(), told, rtol=1e-8)
