"""Which web pages may call the endpoints under /v1 from a browser (SPEC 3.9). Pure.

None may, unless the operator has listed their origins. A page still needs a key, so no cookie or the like is ever
allowed; and the operator's own endpoints are for their own page alone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Collection, Mapping
from typing import Any

from engine.delivery import Headers
from transport.client import Send

EVERY_ORIGIN = "*"
METHODS = b"GET, HEAD, POST, DELETE, OPTIONS"
USUAL_HEADERS = b"authorization, content-type"  # where a preflight names none
SHOWN = b"*"  # every header of an answer may be read: none is a secret
PREFLIGHT_S = b"7200"  # the longest that browsers remember one


def allowed(origins: Collection[str], path: str, headers: Mapping[bytes, bytes]) -> bytes | None:
    """The origin to name in the answer; None for a request that no listed page sent."""
    origin = headers.get(b"origin")
    if origin is None or not origins or not path.startswith("/v1/"):
        return None
    if EVERY_ORIGIN in origins or origin.decode("latin-1").lower() in origins:
        return origin
    return None


def is_preflight(method: str, headers: Mapping[bytes, bytes]) -> bool:
    """Whether a browser asks if it may ask; it sends no key with that."""
    return method == "OPTIONS" and b"access-control-request-method" in headers


def preflight_headers(headers: Mapping[bytes, bytes]) -> Headers:
    told: Headers = [
        (b"access-control-allow-methods", METHODS),
        (b"access-control-allow-headers", headers.get(b"access-control-request-headers", USUAL_HEADERS)),
        (b"access-control-max-age", PREFLIGHT_S),
        (b"content-length", b"0"),
    ]
    if headers.get(b"access-control-request-private-network") == b"true":  # a page of the web asks a local address
        told.append((b"access-control-allow-private-network", b"true"))
    return told


def shown_to(origin: bytes, send: Send) -> Send:
    """A sender whose answers this origin may read."""
    told = [(b"access-control-allow-origin", origin), (b"access-control-expose-headers", SHOWN), (b"vary", b"Origin")]

    def sender(message: Any) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *told]}
        return send(message)

    return sender
