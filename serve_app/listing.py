"""The live replicas, as Ray tells the routers of this process. Written by serve_app.listing_router, read by routing."""

from __future__ import annotations

from typing import Any

REPLICAS: dict[str, dict[str, dict[str, Any]]] = {}
"""Deployment name → replica id → {"node": …, "metadata": {…}, "stats": {…}}.

Each inner table is replaced as a whole, so that a reader never sees one half-written.
"""


def deployment_name(group: str) -> str:
    """Of the deployment that runs a replica group."""
    return f"kronos_{group}"
