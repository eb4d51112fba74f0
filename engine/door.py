"""The door of the service: who may come in, in which dialect, and the one place where an error becomes a response."""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException

from config.settings import LOOPBACK_HOSTS
from engine.delivery import JSON_HEADERS, response_start
from engine.exchange import Engine
from engine.record import Exchange, route_headers
from transport.client import ClientGone, CutShort, Receive, Send, read_body
from wire.chat import Chat, Dialect, Mode
from wire.errors import GatewayError, InvalidRequest, Unauthorized

PATH_CHARS_MAX = 200  # of an address in the log
OPEN_PATHS = frozenset({"/healthz", "/"})  # everything else needs a key; the page holds no secret
SESSION_MODES = (Mode.SMART, Mode.FAST)  # the others have no sessions (SPEC 7.1)
WAIT_S_MAX = 86_400.0  # the request's budget ends it long before
ADMIN_PREFIXES = ("/api", "/metrics")
Given = Mapping[bytes, bytes]  # a request's headers


class Door:
    """Takes in every HTTP request. `endpoints` is the ASGI app for all that is not a dialect's own path."""

    def __init__(self, engine: Engine, dialects: Sequence[Dialect], endpoints: Any, *, api_key: str, admin_key: str):
        self._engine = engine
        self._log = engine.log
        self._endpoints = endpoints
        self._dialects = {path: dialect for dialect in dialects for path in dialect.paths}
        self._default = dialects[0]  # for requests outside every dialect
        self._beside = {route.path: d for d in dialects for route in d.extra_routes()}
        self._open_paths = OPEN_PATHS | {r.path for d in dialects for r in d.extra_routes() if r.keyless}
        self._api_key, self._admin_key = api_key.encode(), admin_key.encode()
        self._loopback_only = engine.settings.host in LOOPBACK_HOSTS
        self._body_bytes_max = engine.settings.max_body_bytes

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        exchange = self._engine.exchange()
        path, headers = scope["path"], dict(scope["headers"])
        dialect = self._dialects.get(path)
        if dialect is None:
            path = scope["path"] = tidy_path(path)
            dialect = self._dialects.get(path)
        spoken = dialect or self._spoken(path, headers)
        try:
            self._admit(path, headers)
            if dialect is not None and scope["method"] == "POST":
                await self._serve(exchange, dialect, scope, headers, receive, send)
            else:
                await self._endpoints(
                    {**scope, "app": self}, receive, with_request_id(send, exchange.id, spoken.id_headers)
                )
        except GatewayError as error:
            if exchange.chat is None:  # what got further has a line of its own
                told = {"path": path[:PATH_CHARS_MAX], "status": error.status, "code": error.code}
                self._log.write("info", "refused", request_id=exchange.id, **told)
            await send_error(send, error, exchange, spoken)
        except HTTPException as error:
            code = "method_not_allowed" if error.status_code == 405 else "not_found"
            answer = InvalidRequest(f"{error.detail}: {scope['method']} {path}", code=code, status=error.status_code)
            allow = (error.headers or {}).get("Allow")
            await send_error(send, answer, exchange, spoken, [(b"allow", allow.encode())] if allow else [])
        except ClientGone:
            return
        except CutShort:
            raise  # the server closes the connection
        except Exception as error:  # a defect of ours: the client gets an error, the operator its place
            self._log.write(
                "error", "defect", request_id=exchange.id, type=type(error).__name__, traceback=traced(error)
            )
            if exchange.begun:
                raise  # the server cuts the connection: a broken answer must not look like a finished one
            await send_error(send, GatewayError("Internal error.", code="internal_error"), exchange, spoken)

    def _spoken(self, path: str, headers: Given) -> Dialect:
        """The dialect of a client that asks for something beside a dialect's own paths."""
        for dialect in self._dialects.values():
            if dialect.is_spoken(path, headers):
                return dialect
        return self._default

    def _admit(self, path: str, headers: Given) -> None:
        """Refuse foreign hosts (DNS rebinding), and everyone without the path's key."""
        if self._loopback_only and host_name(headers.get(b"host", b"")) not in LOOPBACK_HOSTS:
            raise InvalidRequest("Unknown host: use 127.0.0.1, localhost or [::1].", code="invalid_host", status=403)
        if path in self._open_paths:
            return
        admin = path.startswith(ADMIN_PREFIXES)
        if not hmac.compare_digest(credential(headers), self._admin_key if admin else self._api_key):
            raise Unauthorized

    async def _serve(
        self, exchange: Exchange, dialect: Dialect, scope: Any, headers: Given, receive: Receive, send: Send
    ) -> None:
        """One request of any dialect."""
        # The body has no name here: it would live as long as its answer.
        chat = dialect.parse(await read_body(headers, receive, self._body_bytes_max), exchange.utc)
        need = self._engine.router.catalog.meant(chat.need)
        if headers.get(b"x-fallback", b"").strip().lower() == b"none":
            need = replace(need, strict=True)
        exchange.chat = chat = chat if need is chat.need else replace(chat, need=need)
        exchange.session = session_key(chat, headers.get(b"x-session-id", b"").decode("latin-1"))
        exchange.rescue = headers.get(b"x-rescue", b"").strip().lower() != b"off"
        if (wait := headers.get(b"x-max-wait")) is not None:
            exchange.wait_max_s = wait_seconds(wait)
        try:
            await self._engine.answer(exchange, dialect, scope["freeway.client"], send)
        except GatewayError as error:
            self._engine.refuse(exchange, error)
            raise


def session_key(chat: Chat, session_id: str) -> str:
    """A conversation's key: its mode and the client's own id, else its first user message. Empty: no session."""
    text = session_id or chat.first_user_text
    if chat.need.pinned is not None or chat.need.mode not in SESSION_MODES or not text:
        return ""
    source = "id" if session_id else "text"
    return blake2b(f"{chat.need.mode}\0{source}\0{text}".encode(errors="replace"), digest_size=16).hexdigest()


def wait_seconds(text: bytes) -> float:
    """How long a request may wait for a route, as its X-Max-Wait says. Raises InvalidRequest."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= WAIT_S_MAX:
        raise InvalidRequest("X-Max-Wait must be a number of seconds, 0 or more.", param="X-Max-Wait")
    return seconds


def tidy_path(path: str) -> str:
    """Clients are configured with and without /v1, twice, and with a slash at the end."""
    if len(path) > 1:
        path = path.rstrip("/") or "/"
    while path.startswith("/v1/v1/"):
        path = path[3:]
    if path.startswith(("/chat/completions", "/completions", "/embeddings", "/messages", "/models", "/responses")):
        return "/v1" + path
    return path


def credential(headers: Given) -> bytes:
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
