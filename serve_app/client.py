"""A small client of the HTTP interface. No Ray, no torch, no pandas.

with KronosClient("http://127.0.0.1:8000") as client:
    answer = client.forecast(timestamps=times, close=close, open=open_, high=high, low=low, horizon=24, samples=30)
    print(answer["series"][0]["summary"])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import httpx

_SERIES_FIELDS = ("timestamps", "open", "high", "low", "close", "volume", "amount", "future_timestamps")


class KronosError(Exception):
    """The service refused, or could not be reached."""


class KronosConnectionError(KronosError):
    """No answer came."""


class KronosResponseError(KronosError):
    """An answer other than 2xx.

    status, code, request_id: as in the error body. fields: [{"loc": […], "code": …, "message": …}].
    retry_after_s: how long the service asks to wait, if it does.
    """

    def __init__(self, response: httpx.Response) -> None:
        try:
            error = response.json()["error"]
        except (ValueError, KeyError, TypeError):
            # A proxy in between, or Ray's own while the application starts, answers in its own words.
            error = {"code": f"http_{response.status_code}", "message": response.text[:200]}
        self.status = response.status_code
        self.code: str = error["code"]
        self.request_id: str = error.get("request_id") or response.headers.get("x-request-id", "")
        self.fields: list[dict[str, Any]] = error.get("fields", [])
        retry = response.headers.get("retry-after", "")
        self.retry_after_s = float(retry) if retry.isdecimal() else None
        super().__init__(f"{self.status} {self.code}: {error['message']}")


class KronosClient:
    """Speaks to one service. Every call raises KronosResponseError or KronosConnectionError."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        timeout_s: float = 130.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(base_url=base_url, timeout=timeout_s, transport=transport)

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
        volume, amount, future_timestamps) by name. settings: every other field of the body, such as horizon or seed.
        device: "cpu" or "gpu" to pick a replica group.
        """
        if series is None:
            series = [{name: settings.pop(name) for name in _SERIES_FIELDS if name in settings}]
        body = {"series": [dict(item) for item in series], **settings}
        answer: dict[str, Any] = self._post("/v1/forecast", body, device, request_id)
        return answer

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
        models: list[dict[str, Any]] = self._json(self._send("GET", "/v1/models"))["models"]
        return models

    def replicas(self) -> list[dict[str, Any]]:
        replicas: list[dict[str, Any]] = self._json(self._send("GET", "/v1/replicas"))["replicas"]
        return replicas

    def info(self) -> dict[str, Any]:
        info: dict[str, Any] = self._json(self._send("GET", "/v1/info"))
        return info

    def ready(self) -> bool:
        """True if the service takes forecasts; False while it loads, or if nobody answers."""
        try:
            return self._send("GET", "/v1/readyz").status_code == 200
        except KronosConnectionError:
            return False

    def _post(self, path: str, body: Any, device: str | None, request_id: str | None) -> Any:
        given = {"X-Kronos-Device": device, "X-Request-ID": request_id}
        headers = {name: value for name, value in given.items() if value is not None}
        return self._json(self._send("POST", path, json=body, headers=headers))

    def _send(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **kwargs)
        except httpx.TransportError as error:
            raise KronosConnectionError(f"{method} {path}: {type(error).__name__}: {error}") from error

    @staticmethod
    def _json(response: httpx.Response) -> Any:
        if not response.is_success:
            raise KronosResponseError(response)
        return response.json()
