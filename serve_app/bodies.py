"""The bytes of a request → JSON, and the refusals that come before any schema: size, kind, encoding, syntax."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import ClientDisconnect, Request

from serve_app.errors import ServiceError


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body. Raises ServiceError: not_json, content_encoding, body_too_large, malformed_json (cut short)."""
    kind = request.headers.get("content-type", "").split(";", 1)[0].strip().lower()
    if kind != "application/json":
        raise ServiceError("not_json", "send JSON with Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ServiceError("content_encoding", "send the body without Content-Encoding")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    # Counted as it arrives: a chunked body declares no length, and a declared one may lie.
    chunks, size = [], 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > max_bytes:
                raise _too_large(max_bytes)
            chunks.append(chunk)
    except ClientDisconnect:
        raise ServiceError("malformed_json", "the body was cut short") from None
    return b"".join(chunks)


def _too_large(max_bytes: int) -> ServiceError:
    return ServiceError("body_too_large", f"the body is over the limit of {max_bytes} bytes, see /v1/info")


def parse_json(body: bytes) -> Any:
    """JSON as Python values. The literals NaN and Infinity are let through: the schemas refuse them by field.

    Raises ServiceError malformed_json.
    """
    if not body:
        raise ServiceError("malformed_json", "the body is empty")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise ServiceError("malformed_json", "the body is not UTF-8") from None
    try:
        value = _loads(text)
        if "\\u" in text:
            # A lone surrogate is no Unicode text and could not be sent back; only an escape can bring one in.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise ServiceError(
            "malformed_json", f"the body is not JSON: {error.msg}, line {error.lineno} column {error.colno}"
        ) from None
    except RecursionError:
        raise ServiceError("malformed_json", "the body is nested too deeply") from None
    except UnicodeEncodeError:
        raise ServiceError("malformed_json", "a string of the body holds half a surrogate pair") from None
    return value


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:
        # An integer with more digits than Python converts. As a float it is infinite, which the schemas refuse.
        return json.loads(text, parse_int=float)
