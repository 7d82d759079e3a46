"""The live replicas, as Ray tells the routers of this process. Written by serve_app.listing_router, read by routing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from serve_app.jobs import LoadFailure

REPLICAS: dict[str, dict[str, dict[str, Any]]] = {}
"""Deployment name → replica id → {"node": …, "metadata": {…}, "stats": {…}}.

Each inner table is replaced as a whole, so that a reader never sees one half-written.
"""

_LAST_WORDS: dict[str, dict[str, LoadFailure | None]] = {}
"""Deployment name → alias → what its replicas said last of it, also when none is left to say so; None is "loaded"."""


def publish(deployment: str, replicas: dict[str, dict[str, Any]]) -> None:
    """Takes over what Ray told a router of all replicas of its deployment."""
    REPLICAS[deployment] = replicas
    news = [replica["stats"] or replica["metadata"] or {} for replica in replicas.values()]
    models = [entry for one in news for entry in one.get("models", {}).items()]
    now = time.monotonic()
    failed = {alias: LoadFailure(facts["error"], now) for alias, facts in models if facts["state"] == "failed"}
    loaded = {alias: None for alias, facts in models if facts["state"] == "loaded"}
    _LAST_WORDS[deployment] = {**_LAST_WORDS.get(deployment, {}), **failed, **loaded}


def load_failures() -> Mapping[str, LoadFailure]:
    """By alias, of models that no group could load when it tried last. A new process knows of none."""
    words = [entry for last in _LAST_WORDS.values() for entry in last.items()]
    loaded = {alias for alias, failure in words if failure is None}
    return {alias: failure for alias, failure in words if failure is not None and alias not in loaded}


def forget_load_failures() -> None:
    """For when the aliases mean other models."""
    _LAST_WORDS.clear()


def deployment_name(group: str) -> str:
    """Of the deployment that runs a replica group."""
    return f"kronos_{group}"
