"""The HTTP routes, over any Backend: no Ray and no torch here, so that they are tested in milliseconds."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse

from serve_app import schemas
from serve_app.answers import forecast_json, prediction_json
from serve_app.auth import Authentication
from serve_app.bodies import ARROW, JSON
from serve_app.config import AppConfig
from serve_app.door import PlacesReport
from serve_app.draining import Drain, DrainMiddleware
from serve_app.errors import ServiceError
from serve_app.forecasting import Forecasting, Formats, encode
from serve_app.jobs import Answered, Backend
from serve_app.keys import KeyRing
from serve_app.limits import ClientLimits
from serve_app.metrics import Metrics
from serve_app.middleware import HeadAsGet, Record, RequestContext
from serve_app.openapi import ERRORS, describe, forecast_formats, request_body
from serve_app.pages import page
from serve_app.reading import Asked, Reading
from serve_app.replica_metrics import ServiceCollector
from serve_app.status import Status


def create_app(
    backend: Backend,
    config: AppConfig,
    warnings: Sequence[str] = (),
    *,
    behind_serve: bool = False,
    behind_door: bool = False,
    metrics: Metrics | None = None,
    drain: Drain | None = None,
    keys: KeyRing | None = None,
    clients: ClientLimits | None = None,
) -> FastAPI:
    """The ASGI application.

    warnings: what the plan and the environment had to say, shown at /v1/info. behind_serve, behind_door: see
    RequestContext. metrics, clients: to go on counting where another application stopped. drain: for whoever wants to
    stop it (serve_app.run). keys: in place of those that config.auth names. Raises KeyFileError.
    """
    metrics = metrics or Metrics()
    drain = drain or Drain()
    app = FastAPI(
        title="Kronos on Ray Serve",
        description="Forecasts of candlesticks: sampled paths, their mean, quantiles and what they say.",
        version=schemas.API_VERSION,
        redirect_slashes=False,
        # FastAPI's own pages load scripts from elsewhere; ours is serve_app.pages.
        docs_url=None,
        redoc_url=None,
    )
    app.state.metrics = metrics
    _add_error_handlers(app, metrics)
    status = Status(backend, config, warnings, drain)
    metrics.watch(ServiceCollector(backend, status.readiness))
    _add_status_routes(app, status, metrics)
    clients = clients or ClientLimits(config.limits)
    _add_forecast_routes(app, Forecasting(backend, config, metrics, clients), Reading(config))
    describe(app)
    app.add_middleware(HeadAsGet)
    app.add_middleware(DrainMiddleware, drain=drain)
    keys = keys or config.auth.key_ring()
    if keys is not None:
        app.add_middleware(Authentication, keys=keys, metrics=metrics)
    routes = frozenset(getattr(route, "path", "") for route in app.routes)
    if behind_door:
        app.add_middleware(PlacesReport, places=backend.places, most=config.limits.max_concurrent)
    app.add_middleware(
        RequestContext, metrics=metrics, routes=routes, behind_serve=behind_serve, behind_door=behind_door
    )
    return app


def _add_forecast_routes(app: FastAPI, forecasting: Forecasting, reading: Reading) -> None:
    single, batch, forecasts = (
        Formats({JSON: reading.single}, {JSON: _write_single}),
        Formats({JSON: reading.batch}, {JSON: _write_batch}),
        Formats(
            {JSON: reading.forecast, ARROW: reading.forecast_arrow},
            {JSON: _write_forecast, ARROW: _write_forecast_arrow},
        ),
    )

    @app.post(
        "/v1/predict/single",
        response_model=schemas.Prediction,
        responses=ERRORS,
        openapi_extra=request_body(schemas.PredictRequest),
        summary="The mean path of one series",
    )
    async def predict_single(request: Request) -> Response:
        return await forecasting.answer(request, single)

    @app.post(
        "/v1/predict/batch",
        response_model=list[schemas.Prediction],
        responses=ERRORS,
        openapi_extra=request_body(schemas.PredictBatchRequest),
        summary="The mean paths of several series, in order",
    )
    async def predict_batch(request: Request) -> Response:
        return await forecasting.answer(request, batch)

    @app.post(
        "/v1/forecast",
        response_model=schemas.ForecastAnswer,
        responses={**ERRORS, **forecast_formats()},
        openapi_extra=request_body(schemas.ForecastRequest),
        summary="Mean, quantiles, paths and what they say, of several series",
    )
    async def forecast(request: Request) -> Response:
        return await forecasting.answer(request, forecasts)


def _write_single(asked: Asked, answered: Answered, warning: str | None) -> bytes:
    done = answered.done
    return encode(prediction_json(asked.items[0], done.paths[0].values, done, warning))


def _write_batch(asked: Asked, answered: Answered, warning: str | None) -> bytes:
    done = answered.done
    pairs = zip(asked.items, done.paths, strict=True)
    return encode([prediction_json(item, paths.values, done, warning) for item, paths in pairs])


def _write_forecast(asked: Asked, answered: Answered, warning: str | None) -> bytes:
    return encode(forecast_json(asked.body, asked.items, asked.seed, answered, warning))


def _write_forecast_arrow(asked: Asked, answered: Answered, warning: str | None) -> bytes:
    from serve_app.arrow import forecast_table  # on first use, as in Reading.forecast_arrow

    return forecast_table(asked, answered, warning)


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
        responses={503: {"description": "not ready; see Retry-After"}},
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

    @app.get("/v1/metrics", summary="Prometheus text of this ingress process", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type=metrics.content_type)

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return page("index") if "text/html" in request.headers.get("accept", "") else JSONResponse(status.index())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return page("docs")


def _add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    def respond(request: Request, error: ServiceError, headers: dict[str, str] | None = None) -> JSONResponse:
        record: Record = request.state.record
        record.details.update(error_type=error.code, error_message=error.message)
        if error.code == "body_too_large":
            metrics.size_rejections.labels(metrics.container).inc()
            metrics.security_event("oversize")
        elif error.code in ("malformed_json", "malformed_arrow"):
            metrics.security_event("malformed")
        elif error.code == "body_timeout":
            metrics.security_event("slow_body")
        return JSONResponse(error.body(record.request_id), error.status, {**error.headers, **(headers or {})})

    async def on_service_error(request: Request, error: Exception) -> JSONResponse:
        return respond(
            request, error if isinstance(error, ServiceError) else ServiceError("internal", "internal error")
        )

    async def on_http_error(request: Request, error: Exception) -> JSONResponse:
        status = error.status_code if isinstance(error, HTTPException) else 500
        headers = getattr(error, "headers", None) or {}
        if status == 405:
            allowed = "POST" if "POST" in headers["Allow"] else "GET, HEAD"
            error = ServiceError("method_not_allowed", f"this route takes {allowed}")
            return respond(request, error, {"Allow": allowed})
        if status == 404:
            return respond(request, ServiceError("unknown_route", "there is no such route, see /docs"))
        raise error

    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(HTTPException, on_http_error)
