"""The bytes of a request → JSON, and the refusals that come before any schema: size, kind, encoding, syntax."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request

from model.errors import clip_text
from serve_app.errors import ServiceError

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
ANY_BYTES = 2**16
"""A body up to this size may be whatever it likes; it is looked at when it is parsed."""
BYTES_PER_CONTAINER = 8
"""The shortest series that is worth a forecast has six lists and objects in 70 bytes."""
_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
"""A JSON string; without its end too, so that every byte is looked at once."""


def body_kind(request: Request, kinds: Sequence[str]) -> str:
    """Which of the media types the body has. Raises ServiceError not_json, content_encoding."""
    kind = request.headers.get("content-type", "").split(";", 1)[0].strip().lower()
    if kind not in kinds:
        raise ServiceError("not_json", f"send the body with Content-Type: {' or '.join(kinds)}")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ServiceError("content_encoding", "send the body without Content-Encoding")
    return kind


async def read_body(request: Request, max_bytes: int, timeout_s: float, take: Callable[[int], None]) -> bytes:
    """The whole body. take: told of the bytes as they arrive, see ClientLimits.body.

    Raises ServiceError: body_too_large, body_timeout, malformed_json (cut short), and what take raises.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > max_bytes:
        raise _too_large(max_bytes)
    # Counted as it arrives: a chunked body declares no length, and a declared one may lie.
    chunks, size = [], 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    raise _too_large(max_bytes)
                take(len(chunk))
                chunks.append(chunk)
    except TimeoutError:
        raise ServiceError("body_timeout", f"the body did not arrive within {timeout_s:g} s") from None
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
    _require_few_containers(body)
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
    except _DuplicateKeyError as error:
        raise ServiceError("malformed_json", f"an object of the body has the key {str(error)!r} twice") from None
    except RecursionError:
        raise ServiceError("malformed_json", "the body is nested too deeply") from None
    except UnicodeEncodeError:
        raise ServiceError("malformed_json", "a string of the body holds half a surrogate pair") from None
    return value


def _require_few_containers(body: bytes) -> None:
    """Raises ServiceError malformed_json for a large body of hardly anything but brackets.

    A list of two bytes takes thirty times as many in memory, and the interpreter's lock while it is made.
    """
    if len(body) <= ANY_BYTES or _containers(body) <= len(body) // BYTES_PER_CONTAINER:
        return
    # Brackets in a text are none.
    if _containers(_TEXT.sub(b"", body)) > len(body) // BYTES_PER_CONTAINER:
        text = f"more than one list or object per {BYTES_PER_CONTAINER} bytes of the body: no request needs so many"
        raise ServiceError("malformed_json", text)


def _containers(body: bytes) -> int:
    return body.count(b"[") + body.count(b"{")


class _DuplicateKeyError(ValueError):
    """An object says one thing twice; which of the two was meant cannot be known."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _DuplicateKeyError(clip_text(counts.most_common(1)[0][0]))
    return found


def _loads(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (json.JSONDecodeError, _DuplicateKeyError):
        raise
    except ValueError:
        return json.loads(text, parse_int=_integer, object_pairs_hook=_unique)


def _integer(digits: str) -> int | float:
    """An integer; infinite, which the schemas refuse, with more digits than Python converts."""
    try:
        return int(digits)
    except ValueError:
        return float(digits)
