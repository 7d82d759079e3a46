"""What can go wrong for a client: one table from error code to status, one body, at most 20 field errors.

No answer holds a stack, a path, or more than 64 characters of the input.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from model.errors import clip_text

MAX_FIELD_ERRORS = 20

STATUS = {
    "malformed_json": 400,
    "malformed_arrow": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "unknown_model": 404,
    "unknown_route": 404,
    "method_not_allowed": 405,
    "deadline_passed": 408,
    "body_timeout": 408,
    "not_calibrated": 409,
    "body_too_large": 413,
    "cost_over_limit": 413,
    "not_json": 415,
    "content_encoding": 415,
    "invalid_fields": 422,
    "rate_limited": 429,
    "concurrency_limited": 429,
    "queue_full": 429,
    "internal": 500,
    "draining": 503,
    "model_unavailable": 503,
    "no_replica": 503,
    "not_ready": 503,
}
"""Error code → HTTP status."""

RETRY_AFTER_S = {
    "rate_limited": 60.0,
    "concurrency_limited": 1.0,
    "queue_full": 1.0,
    "draining": 15.0,
    "model_unavailable": 30.0,
    "no_replica": 5.0,
    "not_ready": 2.0,
}
"""Seconds that a client is told to wait, where the error does not say it better."""

HEADERS = {
    "unauthorized": {"WWW-Authenticate": 'Bearer realm="kronos"'},
    # The rest of such a body is not worth reading: it may come drop by drop, or without end.
    "body_timeout": {"Connection": "close"},
    "body_too_large": {"Connection": "close"},
}
"""Headers that go with an error, Retry-After aside."""

ALL_FULL = "all replicas have as much work as they may; try again"
"""Message of queue_full, from the ingress and from serve_app.door."""

Loc = tuple[str | int, ...]


@dataclass(frozen=True)
class FieldError:
    """One thing wrong in a request: where, a stable short name, and a sentence with the remedy."""

    loc: Loc
    code: str
    message: str

    def as_json(self) -> dict[str, Any]:
        return {
            "loc": [clip_text(part) if isinstance(part, str) else part for part in self.loc],
            "code": self.code,
            "message": self.message,
        }


class ServiceError(Exception):
    """An answer other than 2xx. code is a key of STATUS."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        fields: Sequence[FieldError] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.fields = tuple(fields[:MAX_FIELD_ERRORS])
        self.retry_after_s = retry_after_s if retry_after_s is not None else RETRY_AFTER_S.get(code)

    @property
    def status(self) -> int:
        return STATUS[self.code]

    @property
    def headers(self) -> dict[str, str]:
        retry = {} if self.retry_after_s is None else {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}
        return {**HEADERS.get(self.code, {}), **retry}

    def body(self, request_id: str) -> dict[str, Any]:
        fields = [field.as_json() for field in self.fields]
        error = {"code": self.code, "message": self.message, "request_id": request_id, "fields": fields}
        return {"error": error, "detail": self.message}


def invalid_fields(fields: Sequence[FieldError]) -> ServiceError:
    """422, or 413 if the only fault is the work that the request asks for."""
    code = "cost_over_limit" if {field.code for field in fields} == {"cost_over_limit"} else "invalid_fields"
    count = len(fields)
    shown = (
        f"the first {MAX_FIELD_ERRORS} errors"
        if count > MAX_FIELD_ERRORS
        else f"{count} error{'s' if count != 1 else ''}"
    )
    return ServiceError(code, f"the request has {shown}, see fields; the first: {fields[0].message}", fields=fields)


def value_errors(faults: Iterable[FieldError]) -> ValidationError:
    """Field errors as what a pydantic validator may raise: pydantic puts the value's own place before each loc."""
    details = [
        # Braces would be read as pydantic's template fields.
        InitErrorDetails(
            type=PydanticCustomError(fault.code, "{text}", {"text": fault.message}),
            loc=fault.loc,
            input=None,
        )
        for fault in faults
    ]
    return ValidationError.from_exception_data("request", details)


UNKNOWN_FIELD = ("unknown_field", "unknown field; see /docs for the fields of this object")

_PYDANTIC_CODES = {
    "extra_forbidden": UNKNOWN_FIELD,
    "missing": ("missing", "this field is required"),
    "finite_number": ("not_finite", "must be a finite number"),
    "float_type": ("not_a_number", "must be a number"),
    "int_type": ("not_an_integer", "must be an integer"),
    "int_from_float": ("not_an_integer", "must be an integer"),
    "bool_type": ("not_a_boolean", "must be true or false"),
    "string_type": ("not_a_string", "must be a string"),
    "string_unicode": ("not_a_string", "must be valid Unicode text"),
    "list_type": ("not_a_list", "must be a list"),
    "model_type": ("not_an_object", "must be a JSON object"),
    "model_attributes_type": ("not_an_object", "must be a JSON object"),
    "dict_type": ("not_an_object", "must be a JSON object"),
    "int_parsing_size": ("out_of_range", "is too large"),
    "too_short": ("too_few", None),
    "too_long": ("too_many", None),
    "string_too_long": ("too_long", None),
    "string_too_short": ("too_short", None),
    "greater_than": ("out_of_range", None),
    "greater_than_equal": ("out_of_range", None),
    "less_than": ("out_of_range", None),
    "less_than_equal": ("out_of_range", None),
    "literal_error": ("unknown_value", None),
}
"""pydantic's error type → our code and message (None: pydantic's message, which holds no input)."""


def field_errors(error: ValidationError) -> list[FieldError]:
    """What a client is told about a body that does not fit its schema."""
    faults = []
    for item in error.errors(include_url=False, include_input=False)[: MAX_FIELD_ERRORS + 1]:
        code, message = _PYDANTIC_CODES.get(item["type"], (item["type"], None))
        faults.append(FieldError(tuple(item["loc"]), code, message or item["msg"]))
    return faults
