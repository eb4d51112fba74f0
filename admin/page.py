"""The dashboard as it is served: one file, and the policy that lets it do nothing but talk to this gateway.

The page itself holds no secret, so it needs no key; everything on it is fetched from /api with the key that the
operator enters. Only the script and style whose hash is in the policy run, so nothing injected does.
"""

from __future__ import annotations

import re
from base64 import b64encode
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

DASHBOARD = Path(__file__).with_name("dashboard.html")


class Page:
    """Read once, at start."""

    def __init__(self, path: Path = DASHBOARD) -> None:
        self._body = path.read_bytes()
        self._headers = {
            "content-type": "text/html; charset=utf-8",
            "content-security-policy": policy(self._body.decode()),
            "cache-control": "no-cache",  # kept, and checked each time: a new version shows at once
            "etag": f'"{sha256(self._body).hexdigest()[:32]}"',
            "x-content-type-options": "nosniff",
            "x-frame-options": "DENY",
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
        }

    async def show(self, request: Request) -> Response:
        if self._headers["etag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=self._headers)
        return Response(self._body, headers=self._headers)


@lru_cache(maxsize=1)
def policy(html: str) -> str:
    """Allows this file's own script and style and calls to this gateway, and nothing else."""
    rules = {
        "default-src": "'none'",
        "script-src": hashes(html, "script"),
        "style-src": hashes(html, "style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def hashes(html: str, tag: str) -> str:
    contents = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL)
    return " ".join(f"'sha256-{b64encode(sha256(content.encode()).digest()).decode()}'" for content in contents)
