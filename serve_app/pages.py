"""The HTML pages. Each is one file that loads nothing: its script and style are allowed by hash, all else is not."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from pathlib import Path

from starlette.responses import HTMLResponse

STATIC = Path(__file__).parent / "static"


def page(name: str) -> HTMLResponse:
    """static/NAME.html, with headers by which a browser runs nothing that is not in it."""
    content, policy = _load(name)
    headers = {
        "Content-Security-Policy": policy,
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(content, headers=headers)


@lru_cache
def _load(name: str) -> tuple[str, str]:
    content = (STATIC / f"{name}.html").read_text(encoding="utf-8")
    directives = [f"{tag}-src {_hashes(content, tag)}" for tag in ("script", "style")]
    directives += ["connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    return content, "; ".join(["default-src 'none'", *directives])


def _hashes(content: str, tag: str) -> str:
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", content, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
