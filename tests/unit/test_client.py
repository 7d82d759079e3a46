"""The client over an in-process service."""

import asyncio

import httpx
import pytest

from serve_app.client import KronosClient, KronosConnectionError, KronosResponseError


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

    with KronosClient("http://test", transport=httpx.MockTransport(refuse)) as client:
        assert not client.ready()
        with pytest.raises(KronosConnectionError):
            client.replicas()
