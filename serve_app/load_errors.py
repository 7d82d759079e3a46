"""Why a model cannot be used: what the log holds in full, and a client without paths and stacks."""

from __future__ import annotations

import logging
import re

from model.errors import CheckpointNotFoundError, KronosError
from serve_app.logs import LOGGER_NAME

_FOLDERS = re.compile(r"(?<![\w.-])(?:\.{0,2}/|[\w.-]+/[\w.-]+/)(?:[^\s:;,'\"/]+/)*")
"""All of a path but its last part; a repository's org/name is none."""
MAX_REASON = 200


class UnknownModelError(Exception):
    """No such model is served. str() is its name."""


class ModelUnavailableError(Exception):
    """A model that is served but cannot be used now. The message is fit for a client: no path, no stack."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class MemoryFullError(KronosError):
    """A model is larger than what the replica's always-on models leave of its budget."""

    def __init__(self, alias: str, size: float, left: float) -> None:
        super().__init__(
            f"{alias} needs {size / 2**30:.2f} GB and the always-on models leave {max(0.0, left) / 2**30:.2f} GB of "
            "model_memory_gb: raise it, or lower cache_gb"
        )


def report_failure(alias: str, error: Exception) -> str:
    """Logs the error in full and returns what a client may read of it."""
    known = isinstance(error, KronosError | OSError)
    logging.getLogger(LOGGER_NAME).error(
        "model failed to load",
        extra={"fields": {"model": alias, "error_type": type(error).__name__, "error_message": str(error)}},
        exc_info=None if known else error,
    )
    if isinstance(error, CheckpointNotFoundError):
        return f"the checkpoint of model {alias!r} cannot be found or fetched now: {public_reason(error)}"
    if isinstance(error, KronosError):
        return f"the checkpoint of model {alias!r} cannot be used: {public_reason(error)}"
    return f"the checkpoint of model {alias!r} cannot be used: {type(error).__name__}, see the server's log"


def public_reason(error: Exception) -> str:
    """The error's text without the folders of this machine."""
    return _FOLDERS.sub("", str(error))[:MAX_REASON]
