"""Kronos, the foundation model for candlesticks: the two networks, their checkpoints and the predictor.

The names below are a drop-in for the public package's imports. They load on first use, so that a process which needs
only the pandas rules or the error types (the HTTP ingress) does not pay for importing torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Kronos": "model.kronos",
    "KronosTokenizer": "model.tokenizer",
    "KronosPredictor": "model.predictor",
    "resolve_device": "model.device",
}

__all__ = ["Kronos", "KronosPredictor", "KronosTokenizer", "resolve_device"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'model' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
