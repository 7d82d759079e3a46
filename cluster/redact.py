"""Takes keys and secrets out of what is about to be written: configurations, records, command lines."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "[redacted]"
SHORTEST = 6
"""Characters of an environment variable's value that is looked for elsewhere; "1" or "true" would be everywhere."""

_SECRET_NAME = re.compile(
    r"secret|passw(or)?d|passphrase|credential|api_?key|access_?key|private_?key|auth_?key|bearer|(^|_)pat$"
    r"|(^|_)tokens?$"
)
# Most of what has "token" in its name here is about the model's tokens: tokenizer, token_dropout_p.
_TOKEN_TEXT = re.compile(r"(^|_)tokens?(_|$)")
_USER_INFO = re.compile(r"(?<=://)[^/\s@]+(?=@)")


def looks_secret(name: str, value: Any = None) -> bool:
    """Whether a key of that name holds a secret, as api_key, HF_TOKEN or clientSecret do."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_")
    return bool(_SECRET_NAME.search(snake) or (isinstance(value, str) and _TOKEN_TEXT.search(snake)))


def redact(value: Any, environment: Mapping[str, str] | None = None) -> Any:
    """A copy of nested dicts, lists and strings without secrets.

    Left out are values of keys that look secret, values of environment variables whose names do, wherever they stand in
    a text, and user:password of an address. environment: os.environ by default.
    """
    variables = os.environ if environment is None else environment
    secrets = {v for name, v in variables.items() if looks_secret(name, v) and len(v) >= SHORTEST}
    # The longest first: one may begin as another does.
    return _redact(value, sorted(secrets, key=len, reverse=True))


def _redact(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            _redact(key, secrets): REDACTED
            if looks_secret(str(key), item) and item not in (None, "") and not isinstance(item, bool | Mapping)
            else _redact(item, secrets)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redact(item, secrets) for item in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, REDACTED)
        return _USER_INFO.sub(REDACTED, value)
    return value
