"""Freeway: one OpenAI-compatible endpoint over many unreliable LLM providers.

The service: settings in, lifespan, the doorman every request passes, the endpoints, `main()`. What happens to a chat
request behind the door is in exchange.py; a tour of the files is in the README.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import hmac
import logging
import math
import os
import re
import resource as resource_limits
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

import store
from admin import Admin, json_response, resource
from catalog import is_demo
from chat import ChatDialect
from client import ClientGone, Receive, Send, read_body
from connection import Connection
from deadlines import Deadlines
from discovery import keep_discovering
from eventlog import EventLog
from eventlog import Handler as LibraryLog
from exchange import JSON_HEADERS, Engine, Exchange, response_start, route_headers, session_key
from page import Page
from protection import Protection, parse_levels
from providers import Providers, Timeouts
from responses import ResponsesDialect
from router import Router as ModelRouter
from scores import Stats, chances
from settings import (
    LOOPBACK_HOSTS,
    CatalogFiles,
    Settings,
    SettingsError,
    check_binding,
    load_catalog,
    load_settings,
)
from store import Store, StoreError
from upstream import Upstream
from wire import MODELS_PREFIX, VIRTUAL_MODELS, Dialect, GatewayError, InvalidRequest, ModelNotFound, Unauthorized

BACKLOG = 2048  # connections waiting to be accepted; uvicorn's own figure
PATH_CHARS_MAX = 200  # of an address in the log
FILES_MAX = 65_536  # open at once, where the system allows it
STOP_S = 10  # for running streams, after a signal (SPEC 1.6)
CLIENT_STALL_S = 300.0  # a client that takes no bytes for so long is gone, whatever its connection says
SWEEP_S = 5.0
MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None)
STATS_SHARE = 0.01  # of a core, at most, for the statistics: a million rows take 2 s, and say the same for minutes
RETENTION_S = 3600.0  # SPEC 12.3
OPEN_PATHS = frozenset({"/healthz", "/"})  # everything else needs a key; the page holds no secret
ADMIN_PREFIXES = ("/api", "/metrics")


class Gateway:
    """The ASGI app. Constructing it opens the database; its lifespan owns everything that runs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.files: CatalogFiles = load_catalog(settings)
        defaults = {p.id: p.protection for p in self.files.platforms.values()}
        levels, warnings = parse_levels(settings.thread_protection_platforms, defaults)
        self.warnings = [*self.files.warnings, *warnings]
        self.log = EventLog(settings.log_level)
        self.store = Store(settings.db, settings.encryption_key)
        self.api_key, self.made_key = settings.api_key or "", False
        if not self.api_key:
            self.api_key, self.made_key = self.store.write_now(lambda db: store.client_key(db, self.store.vault))
        self.admin_key = settings.admin_key or self.api_key
        check_binding(settings.host, [self.api_key, self.admin_key])
        protection = Protection(
            levels=levels,
            sticky_ttl_s=settings.sticky_ttl_ms / 1000,
            thread_cooldown_s=settings.thread_cooldown_ms / 1000,
        )
        router = ModelRouter(protection.transient, protection.keys)
        self.engine = Engine(settings, self.files, protection, router, self.store, self.log, Random())
        snapshot = self.store.write_now(self._sync)
        router.load(snapshot.catalog, snapshot.key_status)
        self._restore_ledger()
        self._responses = ResponsesDialect(lambda: secrets.token_hex(24))
        self._dialects: dict[str, Dialect] = {
            "/v1/chat/completions": ChatDialect(),
            "/v1/responses": self._responses,
        }
        self._api_key, self._admin_key = self.api_key.encode(), self.admin_key.encode()
        self._started = int(time.time())
        self._loopback_only = settings.host in LOOPBACK_HOSTS
        self._cold = Router(
            [
                Route("/v1/models", self.list_models),
                Route("/v1/models/{id:path}", self.show_model),
                # With its prefix, so that /v1/responses/compact and the like are a 404, which clients survive.
                Route("/v1/responses/resp_{token}", self.show_response, methods=["GET"]),
                Route("/v1/responses/resp_{token}", self.delete_response, methods=["DELETE"]),
                Route("/healthz", self.healthz),
                resource("/", GET=Page().show),
                *Admin(self.engine).routes(),
            ],
            redirect_slashes=False,
            default=self._not_found,
        )

    def _sync(self, db: store.Connection) -> store.Snapshot:
        """Bring catalogue and keys into the database; gives what routing needs out of it."""
        store.sync_models(db, self.files.models)
        vault = self.store.vault
        keys = self.files.keys
        store.sync_file_keys(db, vault, [(key.platform, key.secret, key.label) for key in keys if not key.env])
        store.sync_environment_keys(db, vault, [(key.platform, key.secret, key.label) for key in keys if key.env])
        return self.engine.snapshot(db)

    def _restore_ledger(self) -> None:
        """Quotas go on where the last process stopped."""
        router, utc, now = self.engine.router, time.time(), time.monotonic()
        router.ledger.utc_offset_s = utc - now
        for model, key, ago_s, requests, tokens in self.store.write_now(lambda db: store.todays_use(db, utc)):
            router.ledger.restore(model, key, at=now - ago_s, requests=requests, tokens=tokens, now=now)

    # The lifespan: what runs besides requests.

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        self.log.start()
        for warning in self.warnings:
            self.log.write("warning", "configuration", message=warning)
        s = self.settings
        timeouts = Timeouts(
            request_s=s.request_timeout_ms / 1000,
            stall_s=s.max_stream_stall_ms / 1000,
            first_token_s=s.first_token_timeout_ms / 1000,
        )
        try:
            jobs = (self._refresh(), self._sweep(), self._retain(), keep_discovering(self.engine))
            self.engine.deadlines = Deadlines()
            async with Upstream(s.connect_timeout_ms / 1000) as upstream, background(self.log, *jobs):
                self.engine.providers = Providers(timeouts, upstream)
                await send({"type": "lifespan.startup.complete"})
                await receive()
                await self._drain()
        finally:
            await self.store.close()
            if self.store.dropped:
                self.log.write("error", "rows_lost", count=self.store.dropped)
            self.log.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _drain(self) -> None:
        """The server has waited for running requests; what it has cancelled since gets a moment to settle."""
        tasks = [exchange.limit.task for exchange in self.engine.running]
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)

    async def _refresh(self) -> None:
        """Keep the statistics that routing learns from fresh, off the request's path."""
        days = self.settings.analytics_window_days

        def learned(db: store.Connection) -> tuple[dict[tuple[str, str], Stats], float]:
            began = time.thread_time()
            by_name = store.model_stats(db, days)
            for stats in by_name.values():
                chances(stats)
            return by_name, time.thread_time() - began

        while True:
            await self.store.flush()
            pause_s = self.settings.stats_refresh_ms / 1000
            try:
                by_name, spent_s = await self.store.read(learned)
            except store.DatabaseError as error:
                self.log.write("warning", "statistics", message=str(error))
            else:
                models = self.engine.router.catalog.models
                self.engine.router.scores.learn(
                    {m.id: by_name[m.platform.id, m.model_id] for m in models if (m.platform.id, m.model_id) in by_name}
                )
                pause_s = max(pause_s, spent_s / STATS_SHARE)
            await asyncio.sleep(pause_s)

    async def _sweep(self) -> None:
        """Let go of clients that have stopped taking bytes and of memory that is free, and say when rows had to be
        dropped."""
        dropped = 0
        while True:
            await asyncio.sleep(SWEEP_S)
            trim_memory()
            now = time.monotonic()
            for exchange in list(self.engine.running):
                blocked = exchange.blocked_since
                if blocked is not None and now - blocked > CLIENT_STALL_S:
                    exchange.limit.task.cancel()
            if self.store.dropped > dropped:
                self.log.write("error", "rows_dropped", count=self.store.dropped - dropped)
                dropped = self.store.dropped

    async def _retain(self) -> None:
        """Remove old rows, slice by slice so that the log's writer is never held up for long."""
        days = self.settings.log_retention_days
        while True:
            try:
                while await self.store.write(lambda db: store.delete_old_rows(db, days)):
                    pass
            except store.DatabaseError as error:
                self.log.write("warning", "retention", message=str(error))
            await asyncio.sleep(RETENTION_S)

    # The door.

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        exchange = self.engine.exchange()
        path = scope["path"]
        try:
            dialect = self._dialects.get(path)
            if dialect is None:
                path = scope["path"] = tidy_path(path)
                dialect = self._dialects.get(path)
            headers = dict(scope["headers"])
            self._admit(path, headers)
            if dialect is not None and scope["method"] == "POST":
                await self._serve(exchange, dialect, headers, receive, send)
            else:
                await self._cold({**scope, "app": self}, receive, with_request_id(send, exchange.id))
        except GatewayError as error:
            if exchange.chat is None:  # what got further has a line of its own
                told = {"path": path[:PATH_CHARS_MAX], "status": error.status, "code": error.code}
                self.log.write("info", "refused", request_id=exchange.id, **told)
            await send_error(send, error, exchange)
        except HTTPException as error:
            code = "method_not_allowed" if error.status_code == 405 else "not_found"
            answer = InvalidRequest(f"{error.detail}: {scope['method']} {path}", code=code, status=error.status_code)
            allow = (error.headers or {}).get("Allow")
            await send_error(send, answer, exchange, [(b"allow", allow.encode())] if allow else [])
        except ClientGone:
            return
        except Exception as error:  # a defect of ours: the client gets an error, the operator its place
            self.log.write(
                "error", "defect", request_id=exchange.id, type=type(error).__name__, traceback=traced(error)
            )
            if exchange.first_event_ms is not None:
                raise  # the server cuts the connection: a broken answer must not look like a finished one
            await send_error(send, GatewayError("Internal error.", code="internal_error"), exchange)
        finally:
            exchange.limit.close()

    def _admit(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Refuse foreign hosts (DNS rebinding), and everyone without the path's key."""
        if self._loopback_only and host_name(headers.get(b"host", b"")) not in LOOPBACK_HOSTS:
            raise InvalidRequest("Unknown host: use 127.0.0.1, localhost or [::1].", code="invalid_host", status=403)
        if path in OPEN_PATHS:
            return
        admin = path.startswith(ADMIN_PREFIXES)
        if not hmac.compare_digest(credential(headers), self._admin_key if admin else self._api_key):
            raise Unauthorized

    async def _serve(
        self, exchange: Exchange, dialect: Dialect, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        """One request of any dialect."""
        # The body has no name here: it would live as long as its answer.
        exchange.chat = chat = dialect.parse(
            await read_body(headers, receive, self.settings.max_body_bytes, exchange.limit), exchange.utc
        )
        exchange.session = session_key(chat, headers.get(b"x-session-id", b"").decode("latin-1"))
        exchange.strict = headers.get(b"x-fallback", b"").strip().lower() == b"none"
        try:
            await self.engine.answer(exchange, dialect, receive, send)
        except GatewayError as error:
            self.engine.refuse(exchange, error)
            raise

    # Endpoints that are not chat.

    async def _not_found(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["path"] in self._dialects:  # with another method: many open a base URL in their browser
            raise HTTPException(405, headers={"Allow": "POST"})
        raise HTTPException(404, "Not found")

    async def list_models(self, request: Request) -> Response:
        listed = {id: self._describe(id) for id in VIRTUAL_MODELS}
        for model in self.engine.router.catalog.models:
            if model.enabled and model.model_id not in listed:
                listed[model.model_id] = self._describe(model.model_id)
        return json_response({"object": "list", "data": list(listed.values())})

    async def show_model(self, request: Request) -> Response:
        name = request.path_params["id"].removeprefix(MODELS_PREFIX).replace("auto:", "auto-")
        if name not in VIRTUAL_MODELS:
            try:
                self.engine.router.catalog.resolve(name)
            except ModelNotFound as error:
                raise ModelNotFound(error.message, status=404) from None
        return json_response(self._describe(name))

    def _describe(self, name: str) -> dict[str, Any]:
        """A model as OpenAI lists it, with the context window that agents look for."""
        entry: dict[str, Any] = {"id": name, "object": "model", "created": self._started, "owned_by": "freeway"}
        if name not in VIRTUAL_MODELS:
            models = self.engine.router.catalog.resolve(name)
            entry["owned_by"] = models[0].platform.id
        else:
            models = self.engine.router.catalog.auto_chain
        if models:
            entry["context_window"] = entry["context_length"] = max(m.context_window for m in models)
        return entry

    async def show_response(self, request: Request) -> Response:
        body = self._responses.show(f"resp_{request.path_params['token']}", time.time())
        return Response(body, media_type="application/json")

    async def delete_response(self, request: Request) -> Response:
        return json_response(self._responses.delete(f"resp_{request.path_params['token']}", time.time()))

    async def healthz(self, request: Request) -> Response:
        try:
            await self.store.read(store.ping)
        except store.DatabaseError:
            return json_response({"status": "database unavailable"}, 503)
        return json_response({"status": "ok"})


@contextlib.asynccontextmanager
async def background(log: EventLog, *jobs: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run jobs beside the block; they end with it. A defect ends the one job that has it, never the service."""

    async def kept(job: Coroutine[Any, Any, None]) -> None:
        try:
            await job
        except Exception as error:
            log.write("error", "defect", type=type(error).__name__, traceback=traced(error))

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(kept(job)) for job in jobs]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


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


def with_request_id(send: Send, id: str) -> Send:
    async def sender(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", id.encode())]}
        await send(message)

    return sender


async def send_error(
    send: Send, error: GatewayError, exchange: Exchange, more: Sequence[tuple[bytes, bytes]] = ()
) -> None:
    """The one place where an error becomes a response."""
    body = error.body()
    headers = [*JSON_HEADERS, *more, (b"content-length", str(len(body)).encode()), *route_headers(exchange)]
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(error.retry_after_s))).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send(response_start(error.status, headers))
    await send({"type": "http.response.body", "body": body})


def traced(error: BaseException) -> list[str]:
    """Where it happened, innermost last; no values, which might be secrets."""
    places, frame = [], error.__traceback__
    while frame is not None:
        code = frame.tb_frame.f_code
        places.append(f"{Path(code.co_filename).name}:{frame.tb_lineno} {code.co_name}")
        frame = frame.tb_next
    return places[-8:]


def uvicorn_config(app: Gateway) -> uvicorn.Config:
    """The server as in production."""
    return uvicorn.Config(
        app,
        host=app.settings.host,
        port=app.settings.port,
        loop="uvloop",
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=STOP_S,
        timeout_keep_alive=65,  # longer than the pools of common clients keep a connection, so that they close it
    )


def listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, or asyncio leaves Nagle on
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(BACKLOG)  # whoever connects from now on waits for the server instead of being refused
    except OSError as error:
        listener.close()
        where = f"GATEWAY_HOST={settings.host!r}, GATEWAY_PORT={settings.port}"
        raise SettingsError(f"{where}: cannot listen there: {error.strerror or error}") from None
    return listener


def allow_many_files() -> None:
    """Each request holds two connections, and the usual limit of a shell's children is 1024 files, or 256."""
    _, most = resource_limits.getrlimit(resource_limits.RLIMIT_NOFILE)
    wanted = FILES_MAX if most == resource_limits.RLIM_INFINITY else min(FILES_MAX, most)
    with contextlib.suppress(OSError, ValueError):
        resource_limits.setrlimit(resource_limits.RLIMIT_NOFILE, (wanted, most))


def announce(app: Gateway, port: int) -> None:
    host = f"[{app.settings.host}]" if ":" in app.settings.host else app.settings.host
    catalog = app.engine.router.catalog
    served = [p.name for p in catalog.platforms.values() if catalog.keys.get(p.id) or (p.keyless and not is_demo(p))]
    print(f"Freeway is listening on http://{host}:{port}/v1")
    print(f"  dashboard:  http://{host}:{port}/")
    print(f"  platforms:  {', '.join(served) or 'none has a key yet: the built-in demo answers'}")
    if app.made_key:
        print(f"  API key:    {app.api_key}   (made just now and kept encrypted; clients send it as bearer token)")
    for warning in app.warnings:
        print(f"  warning:    {warning}")
    print(end="", flush=True)


def trim_memory() -> None:
    """Give the system back what a burst of large requests has left free: glibc keeps it, a hundred megabytes and more.
    10 us when there is nothing, 1 ms for 15 MB; other C libraries have no such call."""
    if MALLOC_TRIM is not None:
        MALLOC_TRIM(0)


def spare_the_collector() -> None:
    """What stands at the start stays; walking through it again and again took a thirtieth of the time under load. A
    request leaves no cycles (tests/test_garbage.py), so there is little to find: the young are looked at in portions of
    which each holds up the streams for a millisecond."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 50, 50)


def main() -> int:
    """Run until a signal; 0 after an orderly stop, 2 when it cannot start."""
    try:
        settings = load_settings(sys.argv[1:], os.environ, Path.cwd())
        listener = listen(settings)
        app = Gateway(settings)
    except (SettingsError, StoreError) as error:
        print(f"freeway: {error}", file=sys.stderr)
        return 2
    server = uvicorn.Server(uvicorn_config(app))

    def stop(*_: object) -> None:
        server.should_exit = True

    # uvicorn puts its own in place once it runs, and raises the signal once more after the orderly stop. A signal
    # between the announcement and that moment must not be lost.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    allow_many_files()
    spare_the_collector()
    logging.getLogger().addHandler(LibraryLog(app.log))
    with contextlib.suppress(OSError):  # nobody may be reading
        announce(app, listener.getsockname()[1])
    server.run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
