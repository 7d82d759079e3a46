"""/openapi.json. Bodies are read by our own strict readers, so their schemas are put in here, from the same types."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve_app import schemas

_REF = "#/components/schemas/{model}"
BODIES: tuple[type[BaseModel], ...] = (
    schemas.PredictRequest,
    schemas.PredictBatchRequest,
    schemas.ForecastRequest,
)

_STATUSES = {
    400: "malformed JSON",
    404: "unknown model or route",
    405: "unknown method of a route",
    408: "a deadline passed",
    413: "body or cost over the limit",
    415: "not JSON, or a Content-Encoding",
    422: "field errors, at most 20, each with its place",
    429: "over the rate limit, or the queue is full; see Retry-After",
    503: "no replica or model for this now; see Retry-After",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.ErrorBody, "description": text} for status, text in _STATUSES.items()
}


def request_body(schema: type[BaseModel]) -> dict[str, Any]:
    """openapi_extra of a route whose body is `schema`."""
    reference = {"$ref": _REF.format(model=schema.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def describe_bodies(app: FastAPI) -> None:
    """Makes app.openapi() hold the schemas that request_body refers to."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = original()
            _, definitions = models_json_schema([(body, "validation") for body in BODIES], ref_template=_REF)
            document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
