"""The HTTP routes, over any Backend: no Ray and no torch here, so that they are tested in milliseconds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse

from serve_app import schemas
from serve_app.answers import forecast_json, prediction_json
from serve_app.bodies import parse_json, read_body
from serve_app.catalog import Catalog
from serve_app.config import AppConfig
from serve_app.draining import Drain, DrainMiddleware
from serve_app.errors import FieldError, Loc, ServiceError, clip_text, field_errors, invalid_fields
from serve_app.jobs import Answered, Backend, Job
from serve_app.limits import RateLimiter
from serve_app.metrics import Metrics
from serve_app.middleware import Record, RequestContext
from serve_app.openapi import ERRORS, describe_bodies, request_body
from serve_app.prepare import Prepared, prepare_forecast, prepare_predictions
from serve_app.replica_metrics import ServiceCollector
from serve_app.status import Status, joined

INDEX_PAGE = Path(__file__).parent / "static" / "index.html"
BodyT = TypeVar("BodyT", bound=BaseModel)
Read = Callable[[bytes], tuple[BaseModel, list[Prepared], int]]


def create_app(
    backend: Backend,
    config: AppConfig,
    warnings: Sequence[str] = (),
    *,
    behind_serve: bool = False,
    metrics: Metrics | None = None,
    drain: Drain | None = None,
) -> FastAPI:
    """The ASGI application.

    warnings: what the plan and the environment had to say, shown at /v1/info. behind_serve: see RequestContext.
    metrics: to go on counting where another application stopped. drain: for whoever wants to stop it (serve_app.run).
    """
    metrics = metrics or Metrics()
    drain = drain or Drain()
    app = FastAPI(
        title="Kronos on Ray Serve",
        description="Forecasts of candlesticks: sampled paths, their mean, quantiles and what they say.",
        version=schemas.API_VERSION,
        redirect_slashes=False,
    )
    app.state.metrics = metrics
    _add_error_handlers(app, metrics)
    status = Status(backend, config, warnings, drain)
    metrics.watch(ServiceCollector(backend, status.readiness))
    _add_status_routes(app, status, metrics)
    _add_forecast_routes(app, Forecasting(backend, config, metrics))
    describe_bodies(app)
    routes = frozenset(getattr(route, "path", "") for route in app.routes)
    app.add_middleware(DrainMiddleware, drain=drain)
    app.add_middleware(RequestContext, metrics=metrics, routes=routes, behind_serve=behind_serve)
    return app


@dataclass
class Forecasting:
    """The way of a forecast request: limits, body, job, backend, answer."""

    backend: Backend
    config: AppConfig
    metrics: Metrics

    def __post_init__(self) -> None:
        limits = self.config.limits
        self.catalog = Catalog(self.config)
        per_minute = limits.rate_limit_per_minute if limits.security_enabled else 0
        self.rate_limiter = RateLimiter(per_minute) if per_minute else None
        self.max_bytes = int(limits.max_request_mb * 2**20)

    async def answer(
        self, request: Request, read: Read, write: Callable[[Any, list[Prepared], int, Answered, str | None], Any]
    ) -> Response:
        """read: bytes → (body, prepared series, seed); write: those and the result → what is sent as JSON."""
        record: Record = request.state.record
        record.details.update(client="anonymous")
        self._limit_rate(request)
        prefer = _preferred_group(request)
        with self.metrics.concurrent.track_inprogress():
            raw = await read_body(request, self.max_bytes)
            record.request_size_bytes = len(raw)
            # Parsing and writing happen in a thread: a large body must not keep the others waiting.
            body, prepared, seed = await asyncio.to_thread(read, raw)
            model = getattr(body, "model", None) or self.config.default_model
            if self.catalog.get(model) is None:
                raise ServiceError("unknown_model", f"unknown model {clip_text(model)!r}, see /v1/models")
            self._record_input(record, prepared)
            deadline_ms = getattr(body, "deadline_ms", None)
            answered = await self._compute(record, model, prepared, prefer, deadline_ms)
            warning = joined(self.backend.device_warning, answered.done.device.device_warning, *answered.warnings)
            if warning is not None:
                self.metrics.fallbacks.inc()
            content = await asyncio.to_thread(lambda: _encode(write(body, prepared, seed, answered, warning)))
        done = answered.done
        timing = f"queue;dur={done.queue_ms:.2f}, batch;dur={done.batch_ms:.2f}, compute;dur={done.compute_ms:.2f}"
        headers = {"X-Backend-Used": done.device.backend, "Server-Timing": timing}
        return Response(content, media_type="application/json", headers=headers)

    def _limit_rate(self, request: Request) -> None:
        if self.rate_limiter is None:
            return
        wait = self.rate_limiter.wait_s(request.client.host if request.client else "")
        if wait > 0:
            self.metrics.rate_limit_hits.labels(self.metrics.container).inc()
            self.metrics.security_event("rate_limited")
            limit = self.rate_limiter.per_minute
            raise ServiceError("rate_limited", f"over the limit of {limit} requests a minute", retry_after_s=wait)

    def _record_input(self, record: Record, prepared: Sequence[Prepared]) -> None:
        rows = sum(len(item.candles) for item in prepared)
        self.metrics.input_size.labels(record.route).observe(rows)
        pred_len = max(item.task.series.horizon for item in prepared)
        record.details.update(series_count=len(prepared), rows=rows, pred_len=pred_len)

    async def _compute(
        self, record: Record, model: str, prepared: Sequence[Prepared], prefer: str | None, deadline_ms: float | None
    ) -> Answered:
        """Waits for the backend until the first deadline: the client's, or the server's for requests or computing."""
        limits = self.config.limits
        left = min(limits.request_timeout_s, (deadline_ms or float("inf")) / 1000) - record.seconds()
        timeout = min(left, limits.inference_timeout_s)
        try:
            if timeout <= 0:
                raise TimeoutError
            async with asyncio.timeout(timeout):
                job = Job(record.request_id, model, tuple(item.task for item in prepared), timeout)
                answered = await self.backend.forecast(job, prefer)
        except (TimeoutError, ServiceError) as error:
            if isinstance(error, ServiceError) and error.code != "deadline_passed":
                raise
            self.metrics.timeouts.labels(record.route).inc()
            raise ServiceError(
                "deadline_passed",
                "the deadline passed and the computing was stopped: ask for fewer bars or samples, or allow more time",
            ) from None
        done = answered.done
        self.metrics.inference.labels(record.route).observe(done.compute_ms / 1000)
        self.metrics.queue_wait.labels(record.route).observe(done.queue_ms / 1000)
        record.details.update(
            model=model,
            model_inference_ms=round(done.compute_ms, 2),
            queue_time_ms=round(done.queue_ms, 2),
            group=answered.group,
            replica=done.replica_id,
        )
        return answered

    def read_single(self, raw: bytes) -> tuple[BaseModel, list[Prepared], int]:
        body = _validated(schemas.PredictRequest, raw)
        return body, prepare_predictions([((), body)], self.config.limits, self.config.defaults), 0

    def read_batch(self, raw: bytes) -> tuple[BaseModel, list[Prepared], int]:
        body = _validated(schemas.PredictBatchRequest, raw)
        items: list[tuple[Loc, schemas.PredictRequest]] = [(("items", i), item) for i, item in enumerate(body.items)]
        return body, prepare_predictions(items, self.config.limits, self.config.defaults), 0

    def read_forecast(self, raw: bytes) -> tuple[BaseModel, list[Prepared], int]:
        body = _validated(schemas.ForecastRequest, raw)
        prepared, seed = prepare_forecast(body, self.config.limits, self.config.defaults)
        return body, prepared, seed


def _validated(schema: type[BodyT], raw: bytes) -> BodyT:
    try:
        return schema.model_validate(parse_json(raw))
    except ValidationError as error:
        raise invalid_fields(field_errors(error)) from None


def _encode(answer: Any) -> bytes:
    # NaN is not JSON: better an error that is logged than an answer that no client can read.
    return json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()


def _preferred_group(request: Request) -> str | None:
    group = request.headers.get("x-kronos-device")
    if group is not None and group not in ("cpu", "gpu"):
        fault = FieldError(("header", "X-Kronos-Device"), "unknown_value", "must be cpu or gpu")
        raise invalid_fields([fault])
    return group


def _add_forecast_routes(app: FastAPI, forecasting: Forecasting) -> None:
    @app.post(
        "/v1/predict/single",
        response_model=schemas.Prediction,
        responses=ERRORS,
        openapi_extra=request_body(schemas.PredictRequest),
        summary="The mean path of one series",
    )
    async def predict_single(request: Request) -> Response:
        def write(body: Any, prepared: list[Prepared], seed: int, answered: Answered, warning: str | None) -> Any:
            return prediction_json(prepared[0], answered.done.paths[0].values, answered.done, warning)

        return await forecasting.answer(request, forecasting.read_single, write)

    @app.post(
        "/v1/predict/batch",
        response_model=list[schemas.Prediction],
        responses=ERRORS,
        openapi_extra=request_body(schemas.PredictBatchRequest),
        summary="The mean paths of several series, in order",
    )
    async def predict_batch(request: Request) -> Response:
        def write(body: Any, prepared: list[Prepared], seed: int, answered: Answered, warning: str | None) -> Any:
            done = answered.done
            pairs = zip(prepared, done.paths, strict=True)
            return [prediction_json(item, paths.values, done, warning) for item, paths in pairs]

        return await forecasting.answer(request, forecasting.read_batch, write)

    @app.post(
        "/v1/forecast",
        response_model=schemas.ForecastAnswer,
        responses=ERRORS,
        openapi_extra=request_body(schemas.ForecastRequest),
        summary="Mean, quantiles, paths and what they say, of several series",
    )
    async def forecast(request: Request) -> Response:
        return await forecasting.answer(request, forecasting.read_forecast, forecast_json)


def _add_status_routes(app: FastAPI, status: Status, metrics: Metrics) -> None:
    @app.get("/v1/healthz", summary="The process lives")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/healthz/detailed", summary="Model, memory, disk, device")
    async def healthz_detailed() -> dict[str, Any]:
        return await asyncio.to_thread(status.health)

    @app.get(
        "/v1/readyz",
        summary="200 once every always-on model has made a warm-up forecast, until the service stops; else 503",
    )
    async def readyz() -> JSONResponse:
        body, ready = status.readiness()
        headers = {} if ready else ServiceError("not_ready", "not ready").headers
        return JSONResponse(body, 200 if ready else 503, headers)

    @app.get("/v1/models", summary="What can be asked for, and its state")
    async def models() -> dict[str, Any]:
        return {"models": status.models()}

    @app.get("/v1/replicas", summary="Every live replica of every group, with its device")
    async def replicas() -> dict[str, Any]:
        return {"replicas": status.replicas()}

    @app.get("/v1/info", summary="Limits and effective settings")
    async def info() -> dict[str, Any]:
        return status.info()

    @app.get("/v1/metrics", summary="Prometheus text of this ingress process", response_class=Response)
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type=metrics.content_type)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", "") and INDEX_PAGE.is_file():
            return HTMLResponse(INDEX_PAGE.read_text(encoding="utf-8"))
        return JSONResponse(status.index())


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    def respond(request: Request, error: ServiceError, headers: dict[str, str] | None = None) -> JSONResponse:
        record: Record = request.state.record
        record.details.update(error_type=error.code, error_message=error.message)
        if error.code == "body_too_large":
            metrics.size_rejections.labels(metrics.container).inc()
            metrics.security_event("oversize")
        elif error.code == "malformed_json":
            metrics.security_event("malformed")
        return JSONResponse(error.body(record.request_id), error.status, {**error.headers, **(headers or {})})

    async def on_service_error(request: Request, error: Exception) -> JSONResponse:
        return respond(
            request, error if isinstance(error, ServiceError) else ServiceError("internal", "internal error")
        )

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers = dict(getattr(error, "headers", None) or {})
        if status == 405:
            return respond(request, ServiceError("method_not_allowed", "this route does not take this method"), headers)
        if status == 404:
            return respond(request, ServiceError("unknown_route", "there is no such route, see /docs"))
        raise error

    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(HTTPException, on_http_error)
