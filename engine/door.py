"""The door of the service: host and key checks, path spelling, and the one place where an error becomes a response."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.exchange import JSON_HEADERS, Exchange, response_start, route_headers
from transport.client import Send
from wire.chat import Dialect
from wire.errors import GatewayError

PATH_CHARS_MAX = 200  # of an address in the log
OPEN_PATHS = frozenset({"/healthz", "/"})  # everything else needs a key; the page holds no secret
ADMIN_PREFIXES = ("/api", "/metrics")


def tidy_path(path: str) -> str:
    """Clients are configured with and without /v1, twice, and with a slash at the end."""
    if len(path) > 1:
        path = path.rstrip("/") or "/"
    while path.startswith("/v1/v1/"):
        path = path[3:]
    if path.startswith(("/chat/completions", "/models", "/responses")):
        return "/v1" + path
    return path


def credential(headers: dict[bytes, bytes]) -> bytes:
    """The key a client sent: as bearer token, or as the header its own protocol uses."""
    given = headers.get(b"authorization", b"")
    if given[:7].lower() == b"bearer ":
        return given[7:].strip()
    return b"" if given else headers.get(b"x-api-key", b"") or headers.get(b"api-key", b"")


HOST = re.compile(rb"(?:\[([0-9a-f:.]+)\]|([^\[\]:@]*))(?::\d*)?")


@lru_cache(maxsize=64)  # clients send one of a few
def host_name(host: bytes) -> str:
    """A Host header without its port and brackets; empty when it is none."""
    found = HOST.fullmatch(host.lower())
    return (found[1] or found[2] or b"").decode("latin-1") if found else ""


def with_request_id(send: Send, id: str, names: Sequence[bytes]) -> Send:
    ids = [(name, id.encode()) for name in names]

    async def sender(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *ids]}
        await send(message)

    return sender


async def send_error(
    send: Send, error: GatewayError, exchange: Exchange, dialect: Dialect, more: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """The one place where an error becomes a response."""
    status, body = dialect.status(error), dialect.error(error, exchange.id)
    exchange.id_headers = dialect.id_headers
    headers = [*JSON_HEADERS, *more, (b"content-length", str(len(body)).encode()), *route_headers(exchange)]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send(response_start(status, headers))
    await send({"type": "http.response.body", "body": body})


def traced(error: BaseException) -> list[str]:
    """Where it happened, innermost last; no values, which might be secrets."""
    places, frame = [], error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        places.append(f"{Path(code.co_filename).name}:{frame.tb_lineno} {code.co_name}")
        frame = frame.tb_next
    return places[-8:]
