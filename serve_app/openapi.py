"""/openapi.json. Bodies are read by our own strict readers, so their schemas are put in here, from the same types."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve_app import schemas
from serve_app.auth import ADMIN_ROUTES, OPEN_ROUTES
from serve_app.bodies import ARROW, JSON
from serve_app.keys import ADMIN, PREDICT
from serve_app.stream import EVENT_STREAM

_REF = "#/components/schemas/{model}"
SCHEMAS: tuple[type[BaseModel], ...] = (
    schemas.PredictRequest,
    schemas.PredictBatchRequest,
    schemas.ForecastRequest,
    schemas.ForecastBars,
)

_STATUSES = {
    400: "malformed JSON or Arrow",
    404: "unknown model or route",
    405: "unknown method of a route",
    408: "a deadline passed, or the body took too long to arrive",
    409: "the model has no calibration for such a forecast: leave calibrate out",
    413: "body or cost over the limit",
    415: "neither JSON nor, for a forecast, Arrow; or a Content-Encoding",
    422: "field errors, at most 20, each with its place",
    429: "over a rate or concurrency limit, or the queue is full; see Retry-After",
    500: "a fault of the service; quote the request id",
    503: "no replica or model for this now, or the service is stopping; see Retry-After",
}
_KEY_STATUSES = {401: "no API key, or one that is not known", 403: "the API key lacks the scope that this route needs"}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorBody, "description": text} for status, text in _STATUSES.items()
}
_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "an API key, where the service has keys"},
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "the same in a header of its own"},
}
_HEADERS = {
    "X-Kronos-Device": ("the replica group to use, if it runs", {"type": "string", "enum": ["cpu", "gpu"]}),
    "X-Request-ID": (
        "comes back in the answer and the log; another one is made unless it is short and printable",
        {"type": "string", "maxLength": 64},
    ),
}
_PARAMETERS = [
    {"name": name, "in": "header", "required": False, "description": text, "schema": schema}
    for name, (text, schema) in _HEADERS.items()
]
_TIMES = [f"2024-06-18T{9 + i // 60:02d}:{i % 60:02d}:00+08:00" for i in range(30, 60, 5)]
_PRICES = {
    "open": [11.26, 11.25, 11.27, 11.26, 11.28, 11.3],
    "high": [11.28, 11.28, 11.29, 11.29, 11.31, 11.32],
    "low": [11.25, 11.24, 11.25, 11.25, 11.27, 11.28],
    "close": [11.25, 11.27, 11.26, 11.28, 11.3, 11.29],
}
_ITEM = {
    "candles": [dict(zip(_PRICES, row, strict=True)) for row in zip(*_PRICES.values(), strict=True)],
    "timestamps": _TIMES,
    "prediction_timestamps": ["2024-06-18T10:00:00+08:00", "2024-06-18T10:05:00+08:00"],
}
EXAMPLES: dict[type[BaseModel], Any] = {
    schemas.PredictRequest: {**_ITEM, "overrides": {"sample_count": 5}},
    schemas.PredictBatchRequest: {"items": [{"series_id": "600977", **_ITEM}]},
    schemas.ForecastRequest: {
        "series": [{"id": "600977", "timestamps": _TIMES, **_PRICES}],
        "horizon": 4,
        "calendar": "XSHG",
        "samples": 30,
        "seed": 7,
    },
}
"""A body per schema that the service accepts as it stands."""

_ARROW_IN = (
    "An Arrow IPC stream, not compressed: one row per bar with columns series_id, timestamp, open, high, low, close "
    "and, where known, volume and amount. Everything else of ForecastRequest as JSON in the schema's metadata, "
    'key "kronos"; there, series may list settings by id.'
)
_ARROW_OUT = (
    "An Arrow IPC stream: rows by series_id, kind (mean, quantile with its level, path with its index) and timestamp; "
    'the rest of ForecastAnswer as JSON in the schema\'s metadata, key "kronos". Send it in Accept.'
)
_EVENTS = (
    "With stream: true. Server-sent events: `bars` (ForecastBars), then `answer` (ForecastAnswer) "
    "or `error` (ErrorBody)."
)


def request_body(schema: type[BaseModel]) -> dict[str, Any]:
    """openapi_extra of a route whose body is `schema`."""
    content: dict[str, Any] = {
        JSON: {"schema": _reference(schema), "examples": {"small": {"value": EXAMPLES[schema]}}},
    }
    if schema is schemas.ForecastRequest:
        content[ARROW] = {"schema": {"type": "string", "format": "binary", "description": _ARROW_IN}}
    return {"requestBody": {"required": True, "content": content}, "parameters": _PARAMETERS}


_EVENT = {
    "type": "object",
    "description": _EVENTS,
    "properties": {
        "event": {"type": "string", "enum": ["bars", "answer", "error"]},
        "data": {"type": "string", "description": "JSON", "contentMediaType": "application/json"},
    },
    "required": ["event", "data"],
}
"""Of one event: OpenAPI 3.1 has no word for a sequence of them, and tools check each."""


def forecast_formats() -> dict[int | str, dict[str, Any]]:
    """What a forecast may be answered with beside JSON."""
    return {
        200: {
            "description": "the forecast",
            "headers": {
                "X-Backend-Used": {"schema": {"type": "string", "enum": ["cpu", "gpu"]}},
                "Server-Timing": {"schema": {"type": "string"}},
            },
            "content": {
                EVENT_STREAM: {"schema": _EVENT},
                ARROW: {"schema": {"type": "string", "format": "binary", "description": _ARROW_OUT}},
            },
        }
    }


def describe(app: FastAPI) -> None:
    """Makes app.openapi() hold the schemas that request_body refers to, and say which routes need a key."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = original()
            _, definitions = models_json_schema([(schema, "validation") for schema in SCHEMAS], ref_template=_REF)
            components = document.setdefault("components", {})
            components.setdefault("schemas", {}).update(definitions["$defs"])
            components["securitySchemes"] = _SECURITY_SCHEMES
            for path, methods in document["paths"].items():
                if path not in OPEN_ROUTES:
                    for operation in methods.values():
                        _need_key(operation, ADMIN if path in ADMIN_ROUTES else PREDICT)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _need_key(operation: dict[str, Any], scope: str) -> None:
    operation["security"] = [{name: []} for name in _SECURITY_SCHEMES]
    text = f"Where the service has API keys, one with the scope {scope} is needed."
    operation["description"] = "\n\n".join(filter(None, (operation.get("description"), text)))
    content = {JSON: {"schema": _reference(schemas.ErrorBody)}}
    for status, meaning in _KEY_STATUSES.items():
        operation["responses"][str(status)] = {"description": meaning, "content": content}


def _reference(schema: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=schema.__name__)}
