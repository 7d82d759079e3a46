"""The client over an in-process service."""

import asyncio
import json

import httpx
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from serve_app.client import KronosClient, KronosConnectionError, KronosError, KronosResponseError
from serve_app.errors import ServiceError
from serve_app.keys import new_key


class Bridge(httpx.BaseTransport):
    """Lets the blocking client call an ASGI app."""

    def __init__(self, app):
        self.app = app

    def handle_request(self, request):
        async def go():
            response = await httpx.ASGITransport(app=self.app).handle_async_request(
                httpx.Request(request.method, request.url, headers=request.headers, content=request.read())
            )
            return response.status_code, response.headers, await response.aread()

        status, headers, content = asyncio.run(go())
        return httpx.Response(status, headers=headers, content=content)


@pytest.fixture
def client(http):
    with KronosClient("http://test", transport=Bridge(http.app)) as client:
        yield client


def test_calls(client, columns, candle_items):
    answer = client.forecast(**columns(), horizon=4, samples=3, seed=5, return_paths=True)
    assert len(answer["series"][0]["paths"]) == 3
    assert len(client.forecast([columns(), columns()], horizon=2)["series"]) == 2
    item = candle_items(5, 2)
    answer = client.predict(**item, sample_count=2, series_id="x", request_id="r-1")
    assert (answer["series_id"], len(answer["prediction"])) == ("x", 2)
    assert [one["series_id"] for one in client.predict_batch([dict(item, series_id=name) for name in "ab"])] == [
        "a",
        "b",
    ]
    assert client.replicas()[0]["device"] == "cpu"
    assert client.models()[0]["id"] == "kronos-bundled"
    assert client.info()["name"] == "kronos-ray-serve"
    assert client.ready()


def test_errors(client, columns):
    with pytest.raises(KronosResponseError, match="422 invalid_fields") as caught:
        client.forecast(**columns(), horizon=0, request_id="r-2")
    assert caught.value.fields[0]["loc"] == ["horizon"]
    assert caught.value.request_id == "r-2"


def test_answers_of_others_and_no_answer():
    other = httpx.MockTransport(
        lambda request: httpx.Response(404, text="Path not found", headers={"retry-after": "3"})
    )
    with KronosClient("http://test", transport=other) as client:
        with pytest.raises(KronosResponseError, match="404 http_404: Path not found") as caught:
            client.info()
        assert caught.value.retry_after_s == 3.0
        assert not client.ready()

    def refuse(request):
        raise httpx.ConnectError("refused")

    with KronosClient("http://test", transport=httpx.MockTransport(refuse), retries=0) as client:
        assert not client.ready()
        with pytest.raises(KronosConnectionError):
            client.replicas()


@pytest.fixture
def waits(monkeypatch):
    """How long the client slept; it does not."""
    slept = []
    monkeypatch.setattr("serve_app.client.time.sleep", slept.append)
    return slept


def test_columns_of_pandas_and_numpy(client, columns):
    expected = client.forecast(**columns(), horizon=2, seed=5)
    frame = pd.DataFrame(columns()).assign(timestamps=lambda bars: pd.to_datetime(bars.timestamps))
    for given in (
        {name: frame[name] for name in frame},
        {**{name: frame[name].to_numpy() for name in frame}, "timestamps": pd.DatetimeIndex(frame.timestamps)},
        {**columns(), "close": [np.float32(price) for price in frame.close], "timestamps": list(frame.timestamps)},
    ):
        answer = client.forecast(**given, horizon=np.int64(2), seed=5)
        assert answer["series"][0]["mean"] == expected["series"][0]["mean"]
        *_, (_, answer) = client.stream(**given, horizon=2, seed=5)
        assert answer["series"][0]["mean"] == expected["series"][0]["mean"]
    with pytest.raises(TypeError, match="object is neither"):
        client.forecast(**{**columns(), "close": object()})


def test_a_gap_is_told_with_its_place(client, columns):
    gap = {**columns(), "close": [*columns()["close"][:-1], float("nan")]}
    for call in (lambda: client.forecast(**gap), lambda: list(client.stream(**gap))):
        with pytest.raises(KronosResponseError, match=r"fill the gap or drop the bar \(at series\.0\.close\.7\)"):
            call()


def test_streams(client, columns):
    *bars, (name, answer) = client.stream(**columns(), horizon=5, samples=3, seed=5)
    assert [name for name, _ in bars] == ["bars"] * 3
    assert name == "answer"
    assert answer == client.forecast(**columns(), horizon=5, samples=3, seed=5)
    with pytest.raises(KronosResponseError, match="422 invalid_fields"):
        list(client.stream(**columns(), horizon=0))


def test_a_stream_that_fails_or_breaks(make_http, fake_backend, columns):
    backend = fake_backend(error=ServiceError("no_replica", "lost"), fail_after=1)
    with KronosClient("http://test", transport=Bridge(make_http(backend).app)) as client:
        stream = client.stream(**columns(), horizon=5)
        assert next(stream)[0] == "bars"
        with pytest.raises(KronosResponseError, match="200 no_replica: lost"):
            next(stream)
    short = httpx.MockTransport(lambda request: httpx.Response(200, text="event: bars\ndata: {}\n\n"))
    client = KronosClient("http://test", transport=short)
    with client, pytest.raises(KronosConnectionError, match="without an answer"):
        list(client.stream(**columns()))


def test_tables_and_frames(client, columns):
    frame = pd.DataFrame({"series_id": ["a"] * 8, **columns()}).rename(columns={"timestamps": "timestamp"})
    answer = client.forecast_frame(frame, horizon=2, samples=3, return_paths=True)
    assert answer["kind"].value_counts().to_dict() == {"path": 6, "quantile": 6, "mean": 2}
    table = client.forecast_table(pa.Table.from_pandas(frame), horizon=2, seed=9)
    facts = json.loads(table.schema.metadata[b"kronos"])
    assert (facts["seed"], facts["series"][0]["id"]) == (9, "a")
    with pytest.raises(KronosResponseError, match="422 invalid_fields"):
        client.forecast_frame(frame.drop(columns="close"))


def test_keys(make_http, columns):
    key, line = new_key("alice", ["predict"])
    bridge = Bridge(make_http(auth={"keys": line}).app)
    with KronosClient("http://test", api_key=key, transport=bridge) as client:
        assert client.models()
    with KronosClient("http://test", transport=bridge) as client:
        with pytest.raises(KronosResponseError, match="401 unauthorized"):
            client.models()
        assert client.ready()


def flaky(*answers):
    """A transport that gives these answers in turn, and the bodies that it was sent."""
    bodies, left = [], list(answers)

    def handle(request):
        bodies.append(json.loads(request.content or b"{}"))
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(*answer[:1], json={"error": {"code": "c", "message": "m"}}, headers=answer[1])

    return httpx.MockTransport(handle), bodies


def test_a_retry_asks_the_same_question_when_it_was_told_to(waits, columns):
    transport, bodies = flaky((503, {"retry-after": "3"}), httpx.ReadError("gone"), (200, {}))
    with KronosClient("http://test", transport=transport) as client:
        client.forecast(**columns())
    assert waits == [3.0, 1.0]
    assert bodies[0] == bodies[1] == bodies[2]
    assert isinstance(bodies[0]["seed"], int)


@pytest.mark.parametrize(
    ("answers", "options"),
    [
        ([(429, {"retry-after": "10"})], {"timeout_s": 5}),  # it would be over before
        ([(422, {})], {}),
        ([(408, {})], {}),
        ([httpx.ReadTimeout("late")], {}),
        ([(429, {})], {"retries": 0}),
        ([(429, {})] * 3, {}),
    ],
)
def test_when_there_is_no_other_try(waits, answers, options, columns):
    transport, bodies = flaky(*answers)
    with KronosClient("http://test", transport=transport, **options) as client, pytest.raises(KronosError):
        client.forecast(**columns())
    assert len(bodies) == len(answers)


RAYS_404 = "Path '/v1/forecast' not found. Ping http://.../-/routes for available routes."


@pytest.mark.parametrize("words", [(500, "Internal Server Error"), (404, RAYS_404)])
def test_what_a_lost_proxy_answers_is_asked_again(waits, columns, words):
    """Its words, an answer that breaks off, and a connection that is refused for some seconds."""
    answers = [httpx.ConnectError("refused")] * 4 + [
        httpx.Response(words[0], text=words[1]),
        httpx.Response(200, content=broken_off()),
        httpx.Response(200, json={"series": []}),
    ]

    def handle(request):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with KronosClient("http://test", transport=httpx.MockTransport(handle)) as client:
        assert client.forecast(**columns()) == {"series": []}
    assert not answers
    assert waits == [0.5, 0.5, 0.5, 0.5, 0.5, 1.0]


def broken_off():
    yield b'{"series'
    raise httpx.RemoteProtocolError("peer closed connection")


def test_an_error_of_the_service_itself_is_final(waits, columns):
    transport, bodies = flaky((500, {}))
    with KronosClient("http://test", transport=transport) as client, pytest.raises(KronosResponseError):
        client.forecast(**columns())
    assert len(bodies) == 1
