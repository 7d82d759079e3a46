"""The live replicas, as Ray tells the routers of this process. Written by serve_app.listing_router, read by routing."""

from __future__ import annotations

from typing import Any

REPLICAS: dict[str, dict[str, dict[str, Any]]] = {}
"""Deployment name → replica id → {"node": …, "metadata": {…}, "stats": {…}}.

Each inner table is replaced as a whole, so that a reader never sees one half-written.
"""


LOAD_FAILURES: dict[str, str] = {}
"""Alias → why a replica could not load it, until one has: also when no replica is left to say so."""


def publish(deployment: str, replicas: dict[str, dict[str, Any]]) -> None:
    """Takes over what Ray told a router of all replicas of its deployment."""
    REPLICAS[deployment] = replicas
    news = [replica["stats"] or replica["metadata"] or {} for replica in replicas.values()]
    models = [entry for one in news for entry in one.get("models", {}).items()]
    LOAD_FAILURES.update((alias, facts["error"]) for alias, facts in models if facts["state"] == "failed")
    for alias, facts in models:
        if facts["state"] == "loaded":
            LOAD_FAILURES.pop(alias, None)


def deployment_name(group: str) -> str:
    """Of the deployment that runs a replica group."""
    return f"kronos_{group}"
