"""A small client of the HTTP interface. No Ray, no torch; pyarrow only for tables.

with KronosClient("http://127.0.0.1:8000") as client:
    answer = client.forecast(timestamps=times, close=close, open=open_, high=high, low=low, horizon=24, samples=30)
    print(answer["series"][0]["summary"])

A request is sent again when the service is full, not ready, or its connection breaks, and when a proxy lost it or does
not know the service yet, as long as the time limit allows: forecasts change nothing, and the seed is fixed before the
first try, so that every try has the same answer. A stream that has begun is not sent again.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import httpx

if TYPE_CHECKING:
    import pyarrow

ARROW = "application/vnd.apache.arrow.stream"
_SERIES_FIELDS = ("timestamps", "open", "high", "low", "close", "volume", "amount", "future_timestamps")
_AGAIN = (429, 503)
"""Statuses that mean: not now."""
_RAYS_404 = "/-/routes for available routes"
_PAUSE_S = 0.5
"""Before the second try, where the service names no time; doubled for each one after."""
_RESTART_S = 6.0
"""So long a refused connection counts as a proxy that is being restarted, and not as a try."""


class KronosError(Exception):
    """The service refused, or could not be reached."""


class KronosConnectionError(KronosError):
    """No answer came, or only a part of one."""


class KronosResponseError(KronosError):
    """An answer other than 2xx, or a stream that ended with an error (its status is 200).

    status, code, request_id: as in the error body. fields: [{"loc": […], "code": …, "message": …}].
    retry_after_s: how long the service asks to wait, if it does. foreign: the words are not the service's own.
    """

    def __init__(
        self, status: int, error: Mapping[str, Any], headers: Mapping[str, str], *, foreign: bool = False
    ) -> None:
        self.status = status
        self.foreign = foreign
        self.code: str = error["code"]
        self.request_id: str = error.get("request_id") or headers.get("x-request-id", "")
        self.fields: list[dict[str, Any]] = error.get("fields", [])
        retry = headers.get("retry-after", "")
        self.retry_after_s = float(retry) if retry.isdecimal() else None
        place = ".".join(map(str, self.fields[0]["loc"])) if self.fields else ""
        super().__init__(f"{self.status} {self.code}: {error['message']}" + (f" (at {place})" if place else ""))

    @classmethod
    def of(cls, response: httpx.Response) -> Self:
        """The error that a response, already read, tells."""
        try:
            return cls(response.status_code, response.json()["error"], response.headers)
        except (ValueError, KeyError, TypeError):
            # A proxy in between, or Ray's own while the application starts, answers in its own words.
            error = {"code": f"http_{response.status_code}", "message": response.text[:200]}
            return cls(response.status_code, error, response.headers, foreign=True)


class KronosClient:
    """Speaks to one service. Every call raises KronosResponseError or KronosConnectionError."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout_s: float = 130.0,
        retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """timeout_s: of a whole call, retries and the waits between them included. retries: 0 is one try only."""
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=base_url, headers=headers, transport=transport)
        self._timeout_s = timeout_s
        self._retries = retries

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def forecast(
        self,
        series: Sequence[Mapping[str, Any]] | None = None,
        *,
        device: str | None = None,
        request_id: str | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        """POST /v1/forecast.

        series: the list of the body; or leave it out and give one series' columns (timestamps, open, high, low, close,
        volume, amount, future_timestamps) by name: lists, arrays or columns of pandas. settings: every other field of
        the body, such as horizon or seed.
        device: "cpu" or "gpu" to pick a replica group.
        """
        answer: dict[str, Any] = self._post("/v1/forecast", _forecast_body(series, settings), device, request_id)
        return answer

    def stream(
        self,
        series: Sequence[Mapping[str, Any]] | None = None,
        *,
        device: str | None = None,
        request_id: str | None = None,
        **settings: Any,
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """POST /v1/forecast with `stream`: yields ("bars", bars that are final) and at the end ("answer", the whole).

        Arguments as in forecast(). Closing the iterator ends the computing.
        """
        request = _json_request({**_forecast_body(series, settings), "stream": True}, device, request_id)
        with _Response(self, "POST", "/v1/forecast", whole=False, **request) as response:
            for name, data in _events(response):
                if name == "error":
                    raise KronosResponseError(response.status_code, data["error"], response.headers)
                yield name, data
                if name == "answer":
                    return
        raise KronosConnectionError("POST /v1/forecast: the stream ended without an answer")

    def forecast_table(
        self, table: pyarrow.Table, *, device: str | None = None, request_id: str | None = None, **settings: Any
    ) -> pyarrow.Table:
        """POST /v1/forecast as Arrow in both directions: for many series, or with return_paths.

        table: columns series_id, timestamp, open, high, low, close, and volume and amount if known; one row per bar.
        Returns columns series_id, timestamp, kind (mean | quantile | path), level, path and the six of a candle; the
        rest of the answer is json.loads(table.schema.metadata[b"kronos"]).
        """
        import pyarrow as pa

        about = json.dumps(_with_seed(settings))
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), b"kronos": about})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        headers = {**_headers(device, request_id), "Content-Type": ARROW, "Accept": ARROW}
        content = sink.getvalue().to_pybytes()
        with _Response(self, "POST", "/v1/forecast", content=content, headers=headers) as response:
            return pa.ipc.open_stream(response.content).read_all()

    def forecast_frame(
        self, frame: Any, *, device: str | None = None, request_id: str | None = None, **settings: Any
    ) -> Any:
        """forecast_table for pandas: a long DataFrame in, a long DataFrame out; its index is not sent."""
        import pyarrow as pa

        table = pa.Table.from_pandas(frame, preserve_index=False)
        return self.forecast_table(table, device=device, request_id=request_id, **settings).to_pandas()

    def predict(
        self,
        candles: Sequence[Mapping[str, float]],
        timestamps: Sequence[str],
        prediction_timestamps: Sequence[str],
        *,
        series_id: str | None = None,
        device: str | None = None,
        request_id: str | None = None,
        **overrides: Any,
    ) -> dict[str, Any]:
        """POST /v1/predict/single. overrides: temperature, top_k, top_p, sample_count."""
        body: dict[str, Any] = {
            "candles": [dict(candle) for candle in candles],
            "timestamps": list(timestamps),
            "prediction_timestamps": list(prediction_timestamps),
        }
        if series_id is not None:
            body["series_id"] = series_id
        if overrides:
            body["overrides"] = overrides
        answer: dict[str, Any] = self._post("/v1/predict/single", body, device, request_id)
        return answer

    def predict_batch(
        self, items: Sequence[Mapping[str, Any]], *, device: str | None = None, request_id: str | None = None
    ) -> list[dict[str, Any]]:
        """POST /v1/predict/batch."""
        body = {"items": [dict(item) for item in items]}
        answer: list[dict[str, Any]] = self._post("/v1/predict/batch", body, device, request_id)
        return answer

    def models(self) -> list[dict[str, Any]]:
        models: list[dict[str, Any]] = self._get("/v1/models")["models"]
        return models

    def replicas(self) -> list[dict[str, Any]]:
        replicas: list[dict[str, Any]] = self._get("/v1/replicas")["replicas"]
        return replicas

    def info(self) -> dict[str, Any]:
        info: dict[str, Any] = self._get("/v1/info")
        return info

    def ready(self) -> bool:
        """True if the service takes forecasts; False while it loads, or if nobody answers. One try."""
        try:
            return self._http.get("/v1/readyz", timeout=self._timeout_s).status_code == 200
        except httpx.TransportError:
            return False

    def _post(self, path: str, body: Any, device: str | None, request_id: str | None) -> Any:
        with _Response(self, "POST", path, **_json_request(body, device, request_id)) as response:
            return response.json()

    def _get(self, path: str) -> Any:
        with _Response(self, "GET", path) as response:
            return response.json()


class _Response:
    """One call: tries until an answer begins, or it makes no sense any more. The answer is closed at the end."""

    def __init__(self, client: KronosClient, method: str, path: str, *, whole: bool = True, **request: Any) -> None:
        """whole: an answer counts only once all of it is here."""
        self._client = client
        self._what = f"{method} {path}"
        self._whole = whole
        self._request = {"method": method, "url": path, **request}
        self._began = time.monotonic()
        self._ends = self._began + client._timeout_s

    def __enter__(self) -> httpx.Response:
        tries = 0
        while True:
            pause = _PAUSE_S * 2**tries
            try:
                return self._try()
            except KronosResponseError as refusal:
                error: KronosError = refusal
                pause = refusal.retry_after_s or pause
                # In other words than the service's own: a proxy lost it, or Ray's has started and knows no routes yet.
                lost = refusal.foreign and (refusal.status >= 500 or _RAYS_404 in str(refusal))
                final = refusal.status not in _AGAIN and not lost
            except httpx.TransportError as broken:
                error = KronosConnectionError(f"{self._what}: {type(broken).__name__}: {broken}")
                # Out of time: another try would be, too.
                final = isinstance(broken, httpx.TimeoutException)
                refused = isinstance(broken, httpx.ConnectError) and self._client._retries > 0
                if refused and time.monotonic() < self._began + _RESTART_S:
                    tries, pause = tries - 1, _PAUSE_S
            if final or tries >= self._client._retries or time.monotonic() + pause >= self._ends:
                raise error
            tries += 1
            time.sleep(pause)

    def _try(self) -> httpx.Response:
        http = self._client._http
        timeout = max(0.001, self._ends - time.monotonic())
        self._response = http.send(http.build_request(**self._request, timeout=timeout), stream=True)
        try:
            if self._whole or not self._response.is_success:
                self._response.read()
            if not self._response.is_success:
                raise KronosResponseError.of(self._response)
        except BaseException:
            self._response.close()
            raise
        return self._response

    def __exit__(self, *exc_info: object) -> None:
        self._response.close()


def _events(response: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    try:
        for line in response.iter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                yield name, json.loads(value)
    except httpx.TransportError as error:
        raise KronosConnectionError(f"the stream broke off: {type(error).__name__}: {error}") from error


def _forecast_body(series: Sequence[Mapping[str, Any]] | None, settings: dict[str, Any]) -> dict[str, Any]:
    if series is None:
        series = [{name: settings.pop(name) for name in _SERIES_FIELDS if name in settings}]
    return {"series": [dict(item) for item in series], **_with_seed(settings)}


def _with_seed(settings: dict[str, Any]) -> dict[str, Any]:
    """The seed is drawn here if there is none: a second try has to ask the same question."""
    return settings if settings.get("seed") is not None else {**settings, "seed": secrets.randbelow(2**53)}


def _json_request(body: Any, device: str | None, request_id: str | None) -> dict[str, Any]:
    """What httpx sends. NaN is let through, which httpx would not: the service says at which bar it stands."""
    content = json.dumps(body, default=_plain).encode()
    return {"content": content, "headers": {**_headers(device, request_id), "Content-Type": "application/json"}}


def _plain(value: Any) -> Any:
    """Times, and columns and numbers of numpy and pandas, as JSON has them. Raises TypeError for anything else."""
    for method in ("isoformat", "tolist"):
        if hasattr(value, method):
            return getattr(value, method)()
    raise TypeError(f"{type(value).__name__} is neither a number, a text, a time nor a column of them")


def _headers(device: str | None, request_id: str | None) -> dict[str, str]:
    given = {"X-Kronos-Device": device, "X-Request-ID": request_id}
    return {name: value for name, value in given.items() if value is not None}
