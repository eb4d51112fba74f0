"""The door of the service: who may come in, in which dialect, and the one place where an error becomes a response."""

from __future__ import annotations

import hmac
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException

from config.settings import LOOPBACK_HOSTS, spelled
from engine.address import Given, credentials, tidy_path
from engine.conversation import session_key
from engine.delivery import JSON_HEADERS, response_start
from engine.exchange import Engine
from engine.origins import allowed, is_preflight, preflight_headers, shown_to
from engine.record import Exchange, route_headers
from routing.catalog import Catalog
from transport.client import ClientGone, CutShort, Receive, Send, read_body
from wire.chat import Chat, Dialect, Need
from wire.errors import GatewayError, InvalidRequest, Unauthorized

PATH_CHARS_MAX = 200  # of an address in the log
OPEN_PATHS = frozenset({"/healthz", "/"})  # everything else needs a key; the page holds no secret
WAIT_S_MAX = 86_400.0  # the request's budget ends it long before
ADMIN_PREFIXES = ("/api", "/metrics")
NO_TRAIN = b"no-train"  # the one value of X-Privacy


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
        self._origins = engine.settings.origins
        self._private = engine.settings.privacy is not None

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        exchange = self._engine.exchange()
        path, headers = scope["path"], dict(scope["headers"])
        dialect, model = self._dialects.get(path), None
        if dialect is None:
            path, model = tidy_path(path)
            scope["path"], dialect = path, self._dialects.get(path)
        spoken = dialect or self._spoken(path, headers)
        origin = allowed(self._origins, path, headers)
        send = send if origin is None else shown_to(origin, send)
        try:
            self._refuse_foreign(headers)
            if b"upgrade" in headers:
                refuse_websocket(path, headers)
            if origin is not None and is_preflight(scope["method"], headers):
                await send(response_start(204, preflight_headers(headers)))
                await send({"type": "http.response.body"})
                return
            self._admit(path, headers)
            if dialect is not None and scope["method"] == "POST":
                await self._serve(exchange, dialect, scope, headers, receive, send, model)
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

    def _refuse_foreign(self, headers: Given) -> None:
        """No name but the machine's own, where only it can reach the port: another's page may have been given this
        address (DNS rebinding)."""
        if self._loopback_only and host_name(headers.get(b"host", b"")) not in LOOPBACK_HOSTS:
            raise InvalidRequest("Unknown host: use 127.0.0.1, localhost or [::1].", code="invalid_host", status=403)

    def _admit(self, path: str, headers: Given) -> None:
        """Refuse everyone without the path's key."""
        if path in self._open_paths:
            return
        key = self._admin_key if path.startswith(ADMIN_PREFIXES) else self._api_key
        right = [hmac.compare_digest(given, key) for given in credentials(headers)]  # all of them, whichever is right
        if not any(right):
            raise Unauthorized

    async def _serve(
        self,
        exchange: Exchange,
        dialect: Dialect,
        scope: Any,
        headers: Given,
        receive: Receive,
        send: Send,
        model: str | None,
    ) -> None:
        """One request of any dialect; `model` is the one that its address names."""
        # The body has no name here: it would live as long as its answer.
        chat = dialect.parse(await read_body(headers, receive, self._body_bytes_max), exchange.utc)
        chat = chat if model is None else chat.asking_for(model)
        exchange.chat, exchange.session = understood(chat, headers, self._engine.router.catalog, private=self._private)
        exchange.uncached = wants_no_memory(headers)
        exchange.rescue = headers.get(b"x-rescue", b"").strip().lower() != b"off"
        if (wait := headers.get(b"x-max-wait")) is not None:
            exchange.wait_max_s = wait_seconds(wait)
        try:
            await self._engine.answer(exchange, dialect, scope["freeway.client"], send)
        except GatewayError as error:
            self._engine.refuse(exchange, error)
            raise


def refuse_websocket(path: str, headers: Given) -> None:
    """Some clients try a WebSocket first, and only this answer makes them go on at once without."""
    if b"websocket" in headers[b"upgrade"].lower() and (path + "/").startswith("/v1/"):
        raise InvalidRequest("There are no WebSockets here: POST to this address.", code="upgrade_required", status=426)


def understood(chat: Chat, headers: Given, catalog: Catalog, *, private: bool) -> tuple[Chat, str]:
    """A chat with all that it asks of routing, by its model's name and its headers; and its session's key.

    Raises InvalidRequest."""
    need = wished(catalog.meant(chat.need), headers, private=private)
    chat = chat if need is chat.need else replace(chat, need=need)
    return chat, session_key(chat, headers, client="")


def wished(need: Need, headers: Given, *, private: bool) -> Need:
    """The need with what the headers say of routing, and `private` for all requests. Raises InvalidRequest."""
    strict = headers.get(b"x-fallback", b"").strip().lower() == b"none"
    rank, privacy = headers.get(b"x-min-rank"), headers.get(b"x-privacy")
    if not (strict or private) and rank is None and privacy is None:
        return need
    if privacy is not None and privacy.strip().lower() != NO_TRAIN:
        raise InvalidRequest("X-Privacy must be no-train.", param="X-Privacy", code="invalid_value")
    min_rank = need.min_rank
    if rank is not None and not (min_rank := spelled(rank.decode("latin-1").strip())):
        raise InvalidRequest("X-Min-Rank must be a whole number ≥ 1.", param="X-Min-Rank", code="invalid_value")
    return replace(need, strict=strict or need.strict, min_rank=min_rank, no_train=private or privacy is not None)


def wants_no_memory(headers: Given) -> bool:
    """Whether an answer must be made for this request alone (SPEC 18.1)."""
    if headers.get(b"x-cache", b"").strip().lower() == b"off":
        return True
    return any(word.strip() == b"no-store" for word in headers.get(b"cache-control", b"").lower().split(b","))


def wait_seconds(text: bytes) -> float:
    """How long a request may wait for a route, as its X-Max-Wait says. Raises InvalidRequest."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= WAIT_S_MAX:
        raise InvalidRequest("X-Max-Wait must be a number of seconds, 0 or more.", param="X-Max-Wait")
    return seconds


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
    elif status == 426:
        headers += [(b"upgrade", b"HTTP/1.1"), (b"connection", b"upgrade")]
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
