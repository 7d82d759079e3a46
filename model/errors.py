"""Every error this package raises on purpose.

KronosError
├── InputError (also a ValueError)       the caller's data or arguments; says column, row and remedy
├── CheckpointError                      weights that cannot be used
│   ├── CheckpointNotFoundError          no such folder, repository, revision, or no network to fetch it
│   ├── UnsafeCheckpointError            a pickle where safetensors belong; never opened
│   └── CheckpointMismatchError          config, names, shapes or values do not make a Kronos network
├── EngineFullError                      the engine cannot take the request
│   ├── QueueFullError                   now: too much work waits already
│   └── RequestTooLargeError             ever: it would not fit into an empty engine
└── ForecastCancelledError               the caller asked for the computing to stop
"""

__all__ = [
    "CheckpointError",
    "CheckpointMismatchError",
    "CheckpointNotFoundError",
    "EngineFullError",
    "ForecastCancelledError",
    "InputError",
    "KronosError",
    "QueueFullError",
    "RequestTooLargeError",
    "UnsafeCheckpointError",
    "clip_text",
]

MAX_ECHO = 64
"""Characters of what a user gave that an error repeats."""


class KronosError(Exception):
    """Base of all errors of this package."""


class InputError(KronosError, ValueError):
    """Candles, timestamps or arguments that cannot be forecast.

    code: a stable, short name of the rule that was broken, such as "not_finite" or "unsorted_times".
    series, column, row: where, as far as known; row counts from 0 in the order given.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "invalid_input",
        series: int | None = None,
        column: str | None = None,
        row: int | None = None,
    ) -> None:
        super().__init__(message if series is None else f"series {series}: {message}")
        self.code = code
        self.series = series
        self.column = column
        self.row = row


class CheckpointError(KronosError):
    """Weights that cannot be used."""


class CheckpointNotFoundError(CheckpointError):
    """The checkpoint is not where its source says, or cannot be fetched from there."""


class UnsafeCheckpointError(CheckpointError):
    """A pickled file lies where safetensors belong. It was not opened."""


class CheckpointMismatchError(CheckpointError):
    """The files are there, but they do not make a Kronos network."""


class EngineFullError(KronosError):
    """The engine cannot take the request."""


class QueueFullError(EngineFullError):
    """More work waits already than the queue may hold; try again later."""


class RequestTooLargeError(EngineFullError):
    """The request would not fit into an empty engine; ask for fewer paths or bars."""


class ForecastCancelledError(KronosError):
    """The computing stopped because the caller asked for it; no result was made."""


def clip_text(text: str, limit: int = MAX_ECHO) -> str:
    """Text of a user, made safe to show: printable ASCII and at most `limit` characters."""
    safe = "".join(char if char.isascii() and char.isprintable() else "?" for char in text[:limit])
    return safe if len(text) <= limit else safe[: limit - 3] + "..."
