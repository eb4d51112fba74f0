"""The door of the service: who may come in, in which dialect, and the one place where an error becomes a response."""

from __future__ import annotations

import hmac
import math
import re
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from starlette.exceptions import HTTPException

from config.settings import LOOPBACK_HOSTS, spelled
from engine.address import Given, credentials, tidy_path
from engine.conversation import session_key
from engine.delivery import JSON_HEADERS, response_start
from engine.drill import parse_drill
from engine.exchange import Engine
from engine.origins import allowed, is_preflight, preflight_headers, shown_to
from engine.record import Exchange, route_headers
from engine.sharing import Shared
from routing.catalog import Catalog
from routing.clients import Admission, Client, ClientKeys, allowed_models
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

    def __init__(
        self,
        engine: Engine,
        dialects: Sequence[Dialect],
        endpoints: Any,
        clients: ClientKeys,
        *,
        api_key: str,
        admin_key: str,
    ) -> None:
        self._engine = engine
        self._clients = clients
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
            client = self._admit(path, headers, exchange.utc)
            exchange.client = client.id if client is not None else None
            if dialect is not None and scope["method"] == "POST":
                await self._serve(exchange, dialect, scope, headers, receive, send, model, client)
            else:
                asked = {**scope, "app": self, "freeway.holder": exchange.client}
                await self._endpoints(asked, receive, with_request_id(send, exchange.id, spoken.id_headers))
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
            scope["freeway.client"].cut()
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

    def _admit(self, path: str, headers: Given, utc: float) -> Client | None:
        """Refuse everyone without the path's key; gives the client whose own key it is (SPEC 19), None for the
        gateway's. A client's key never opens what is the operator's."""
        if path in self._open_paths:
            return None
        operators = path.startswith(ADMIN_PREFIXES)
        key = self._admin_key if operators else self._api_key
        sent = credentials(headers)
        right = [hmac.compare_digest(given, key) for given in sent]  # all of them, whichever is right
        if any(right):
            return None
        found = () if operators else (self._clients.find(given, utc) for given in sent)
        if (client := next(filter(None, found), None)) is None:
            raise Unauthorized
        return client

    def _admit_drill(self, headers: Given) -> None:
        """Only the operator breaks anything on purpose."""
        try:
            self._admit(ADMIN_PREFIXES[0], {b"x-api-key": headers.get(b"x-admin-key", b"")}, 0.0)
        except Unauthorized:
            message = "X-Drill needs the admin key in X-Admin-Key."
            raise InvalidRequest(message, param="X-Admin-Key", code="drill_forbidden", status=403) from None

    async def _serve(
        self,
        exchange: Exchange,
        dialect: Dialect,
        scope: Any,
        headers: Given,
        receive: Receive,
        send: Send,
        model: str | None,
        client: Client | None,
    ) -> None:
        """One request of any dialect; `model` is the one that its address names."""
        # What is received has no name here: it would live as long as its answer.
        receiving = read_body(headers, receive, self._body_bytes_max, arrived=scope["freeway.client"].sent_all)
        chat = dialect.parse(await receiving, exchange.utc, exchange.client)
        chat = chat if model is None else chat.asking_for(model)
        private, catalog = self._private or (client is not None and client.private), self._engine.router.catalog
        exchange.chat, exchange.session = understood(chat, headers, catalog, private=private, client=exchange.client)
        exchange.uncached = wants_no_memory(headers)
        if (drill := headers.get(b"x-drill")) is not None:
            self._admit_drill(headers)
            exchange.begin_drill(parse_drill(drill.decode("latin-1")))
        if b"x-rescue" in headers:
            exchange.rescue = headers[b"x-rescue"].strip().lower() != b"off"
        if (wait := headers.get(b"x-max-wait")) is not None:
            exchange.wait_max_s = wait_seconds(wait)
        admission: Admission | None = None
        try:
            if client is not None:
                admission = self._admit_client(exchange, client)
                if self._engine.shared is not None:
                    admission = await self._admitted_by_all(self._engine.shared, client, admission)
            await self._engine.answer(exchange, dialect, scope["freeway.client"], send)
        except GatewayError as error:
            self._engine.refuse(exchange, error)
            raise
        finally:
            if client is not None and admission is not None:
                self._settle(exchange, client, admission)

    def _admit_client(self, exchange: Exchange, client: Client) -> Admission:
        """Hold the request to what its client's key allows, and take its place within the limits. Raises
        GatewayError."""
        chat = exchange.chat
        assert chat is not None
        need = chat.need
        ranks = [rank for rank in (need.min_rank, client.min_rank) if rank is not None]
        allowed = allowed_models(client, need, self._engine.router.catalog)
        exchange.chat = replace(chat, need=replace(need, min_rank=min(ranks, default=None), allowed=allowed))
        return self._clients.admit(client, need.tokens, time.monotonic(), time.time())

    async def _admitted_by_all(self, shared: Shared, client: Client, admission: Admission) -> Admission:
        """Its place among all gateways, too. Raises GatewayError."""
        admitted = False
        try:
            await shared.admit_client(client, admission)
            admitted = True
        finally:
            if not admitted:
                self._clients.give_back(admission)
        return admission

    def _settle(self, exchange: Exchange, client: Client, admission: Admission) -> None:
        """What the request has used counts from now on in place of the estimate. An answer from memory counts as a
        request without tokens, as it does in the log."""
        shared, estimate = self._engine.shared, admission.tokens
        if exchange.attempts == 0 and exchange.cache != "hit":
            self._clients.give_back(admission)
            if shared is not None:
                shared.client_settled(client, admission, -1, -estimate)
            return
        rows = [ended.row for ended in exchange.ended]
        used = sum((row.input_tokens or 0) + (row.output_tokens or 0) for row in rows)
        self._clients.settle(admission, used)
        if shared is not None:
            shared.client_settled(client, admission, 0, used - estimate)


def refuse_websocket(path: str, headers: Given) -> None:
    """Some clients try a WebSocket first, and only this answer makes them go on at once without."""
    if b"websocket" in headers[b"upgrade"].lower() and (path + "/").startswith("/v1/"):
        raise InvalidRequest("There are no WebSockets here: POST to this address.", code="upgrade_required", status=426)


def understood(
    chat: Chat, headers: Given, catalog: Catalog, *, private: bool, client: int | None = None
) -> tuple[Chat, str]:
    """A chat with all that it asks of routing, by its model's name and its headers; and its session's key.

    Raises InvalidRequest."""
    need = wished(catalog.meant(chat.need), headers, private=private)
    chat = chat if need is chat.need else replace(chat, need=need)
    return chat, session_key(chat, headers, client="" if client is None else str(client))


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
    if b"x-cache" in headers and headers[b"x-cache"].strip().lower() == b"off":
        return True
    if b"cache-control" not in headers:
        return False
    return any(word.strip() == b"no-store" for word in headers[b"cache-control"].lower().split(b","))


def wait_seconds(text: bytes) -> float:
    """How long a request may wait for a route, as its X-Max-Wait says. Raises InvalidRequest."""
    try:
        seconds = float(text) if b"_" not in text else -1.0  # which Python reads as 10 in 1_0
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
