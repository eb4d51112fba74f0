"""Freeway: one OpenAI-compatible endpoint over many unreliable LLM providers.

The service: settings in, lifespan, the doorman every request passes, the endpoints, `main()`. What happens to a chat
request behind the door is in exchange.py; a tour of the files is in the README.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from adapters.registry import ADAPTERS
from admin.api import Admin, json_response, resource
from admin.discovery import keep_discovering
from admin.page import Page
from config.catalog_files import CatalogFiles, load_catalog
from config.settings import LOOPBACK_HOSTS, Settings, SettingsError, check_binding, load_settings
from dialects.chat import ChatDialect
from dialects.messages import ALIASES, MessagesDialect, model_entry, model_list
from dialects.responses import ResponsesDialect
from engine.door import (
    ADMIN_PREFIXES,
    OPEN_PATHS,
    PATH_CHARS_MAX,
    credential,
    host_name,
    send_error,
    tidy_path,
    traced,
    with_request_id,
)
from engine.exchange import Engine, Exchange, session_key
from protection import Protection, parse_levels
from providers import Providers, Timeouts
from records.database import Connection, DatabaseError, Store, ping
from records.eventlog import EventLog
from records.eventlog import Handler as LibraryLog
from records.keys import client_key, sync_environment_keys, sync_file_keys
from records.models import Snapshot, sync_models
from records.request_log import delete_old_rows, model_stats, todays_use
from records.vault import StoreError
from router import Router as ModelRouter
from routing.catalog import is_demo
from routing.scores import Stats, chances
from transport.client import ClientGone, CutShort, Receive, Send, read_body
from transport.connection import ClientConnection
from transport.deadlines import Deadlines
from transport.process import allow_many_files, listen, spare_the_collector, trim_memory
from transport.upstream import Upstream
from wire.chat import MODELS_PREFIX, VIRTUAL_MODELS, Dialect, LocalRoute
from wire.errors import GatewayError, InvalidRequest, ModelNotFound, Unauthorized

STOP_S = 10  # for running streams, after a signal (SPEC 1.6)
CLIENT_STALL_S = 300.0  # a client that takes no bytes for so long is gone, whatever its connection says
SWEEP_S = 5.0
STATS_SHARE = 0.01  # of a core, at most, for the statistics: a million rows take 2 s, and say the same for minutes
RETENTION_S = 3600.0  # SPEC 12.3


class Gateway:
    """The ASGI app. Constructing it opens the database; its lifespan owns everything that runs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.files: CatalogFiles = load_catalog(settings, ADAPTERS)
        defaults = {p.id: p.protection for p in self.files.platforms.values()}
        levels, warnings = parse_levels(settings.thread_protection_platforms, defaults)
        self.warnings = [*self.files.warnings, *warnings]
        self.log = EventLog(settings.log_level)
        self.store = Store(settings.db, settings.encryption_key)
        self.api_key, self.made_key = settings.api_key or "", False
        if not self.api_key:
            self.api_key, self.made_key = self.store.write_now(lambda db: client_key(db, self.store.vault))
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
        self._chat, self._messages = ChatDialect(), MessagesDialect(lambda: secrets.token_hex(24))
        dialects: tuple[Dialect, ...] = (self._chat, ResponsesDialect(lambda: secrets.token_hex(24)), self._messages)
        self._dialects = {path: dialect for dialect in dialects for path in dialect.paths}
        extra_routes = [route for dialect in dialects for route in dialect.extra_routes()]
        self._open_paths = OPEN_PATHS | {route.path for route in extra_routes if route.keyless}
        self._api_key, self._admin_key = self.api_key.encode(), self.admin_key.encode()
        self._started = int(time.time())
        self._loopback_only = settings.host in LOOPBACK_HOSTS
        self._cold = Router(
            [
                Route("/v1/models", self.list_models),
                Route("/v1/models/{id:path}", self.show_model),
                *(self._local_route(route) for route in extra_routes),
                Route("/healthz", self.healthz),
                resource("/", GET=Page().show),
                *Admin(self.engine).routes(),
            ],
            redirect_slashes=False,
            default=self._not_found,
        )

    def _sync(self, db: Connection) -> Snapshot:
        """Bring catalogue and keys into the database; gives what routing needs out of it."""
        sync_models(db, self.files.models)
        vault = self.store.vault
        keys = self.files.keys
        sync_file_keys(db, vault, [(key.platform, key.secret, key.label) for key in keys if not key.env])
        sync_environment_keys(db, vault, [(key.platform, key.secret, key.label) for key in keys if key.env])
        return self.engine.snapshot(db)

    def _restore_ledger(self) -> None:
        """Quotas go on where the last process stopped."""
        router, utc, now = self.engine.router, time.time(), time.monotonic()
        router.ledger.utc_offset_s = utc - now
        for model, key, ago_s, requests, tokens in self.store.write_now(lambda db: todays_use(db, utc)):
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

        def learned(db: Connection) -> tuple[dict[tuple[str, str], Stats], float]:
            began = time.thread_time()
            by_name = model_stats(db, days)
            for stats in by_name.values():
                chances(stats)
            return by_name, time.thread_time() - began

        while True:
            await self.store.flush()
            pause_s = self.settings.stats_refresh_ms / 1000
            try:
                by_name, spent_s = await self.store.read(learned)
            except DatabaseError as error:
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
                while await self.store.write(lambda db: delete_old_rows(db, days)):
                    pass
            except DatabaseError as error:
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
        headers = dict(scope["headers"])
        dialect = self._dialects.get(path)
        if dialect is None:
            path = scope["path"] = tidy_path(path)
            dialect = self._dialects.get(path)
        spoken = dialect or self._spoken(path, headers)
        try:
            self._admit(path, headers)
            if dialect is not None and scope["method"] == "POST":
                await self._serve(exchange, dialect, headers, receive, send)
            else:
                sender = with_request_id(send, exchange.id, spoken.id_headers)
                await self._cold({**scope, "app": self, "limit": exchange.limit}, receive, sender)
        except GatewayError as error:
            if exchange.chat is None:  # what got further has a line of its own
                told = {"path": path[:PATH_CHARS_MAX], "status": error.status, "code": error.code}
                self.log.write("info", "refused", request_id=exchange.id, **told)
            await send_error(send, error, exchange, spoken)
        except HTTPException as error:
            code = "method_not_allowed" if error.status_code == 405 else "not_found"
            answer = InvalidRequest(f"{error.detail}: {scope['method']} {path}", code=code, status=error.status_code)
            allow = (error.headers or {}).get("Allow")
            await send_error(send, answer, exchange, spoken, [(b"allow", allow.encode())] if allow else [])
        except ClientGone:
            return
        except CutShort:
            raise
        except Exception as error:  # a defect of ours: the client gets an error, the operator its place
            self.log.write(
                "error", "defect", request_id=exchange.id, type=type(error).__name__, traceback=traced(error)
            )
            if exchange.first_event_ms is not None:
                raise  # the server cuts the connection: a broken answer must not look like a finished one
            await send_error(send, GatewayError("Internal error.", code="internal_error"), exchange, spoken)
        finally:
            exchange.limit.close()

    def _spoken(self, path: str, headers: dict[bytes, bytes]) -> Dialect:
        """The dialect of a client that asks for something beside a dialect's own paths."""
        models = path == "/v1/models" or path.startswith("/v1/models/")
        if path.startswith("/v1/messages/") or (models and b"anthropic-version" in headers):
            return self._messages
        return self._chat

    def _admit(self, path: str, headers: dict[bytes, bytes]) -> None:
        """Refuse foreign hosts (DNS rebinding), and everyone without the path's key."""
        if self._loopback_only and host_name(headers.get(b"host", b"")) not in LOOPBACK_HOSTS:
            raise InvalidRequest("Unknown host: use 127.0.0.1, localhost or [::1].", code="invalid_host", status=403)
        if path in self._open_paths:
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
        exchange.chat = chat = replace(chat, need=self.engine.router.catalog.meant(chat.need))
        exchange.session = session_key(chat, headers.get(b"x-session-id", b"").decode("latin-1"))
        if headers.get(b"x-fallback", b"").strip().lower() == b"none":
            exchange.chat = chat = replace(chat, need=replace(chat.need, strict=True))
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

    def _local_route(self, route: LocalRoute) -> Route:
        """An endpoint that a dialect answers by itself."""

        async def endpoint(request: Request) -> Response:
            raw = b""
            if route.method == "POST":
                scope = request.scope
                headers = dict(scope["headers"])
                raw = await read_body(headers, request.receive, self.settings.max_body_bytes, scope["limit"])
            return Response(route.answer(request.path_params, raw, time.time()), media_type="application/json")

        return Route(route.path, endpoint, methods=[route.method])

    async def list_models(self, request: Request) -> Response:
        if "anthropic-version" in request.headers:
            ids = [*ALIASES, *VIRTUAL_MODELS, *{m.model_id: 1 for m in self.engine.router.catalog.models if m.enabled}]
            return Response(model_list(map(self._entry, ids)), media_type="application/json")
        listed = {id: self._describe(id) for id in VIRTUAL_MODELS}
        for model in self.engine.router.catalog.models:
            if model.enabled and model.model_id not in listed:
                listed[model.model_id] = self._describe(model.model_id)
        return json_response({"object": "list", "data": list(listed.values())})

    async def show_model(self, request: Request) -> Response:
        name = request.path_params["id"].removeprefix(MODELS_PREFIX).replace("auto:", "auto-")
        anthropic = "anthropic-version" in request.headers
        if name not in VIRTUAL_MODELS and not (anthropic and name in ALIASES):
            try:
                self.engine.router.catalog.resolve(name)
            except ModelNotFound as error:
                raise ModelNotFound(error.message, status=404) from None
        return json_response(self._entry(name) if anthropic else self._describe(name))

    def _entry(self, name: str) -> dict[str, Any]:
        """A model as Anthropic lists it."""
        catalog = self.engine.router.catalog
        own = name in ALIASES or name in VIRTUAL_MODELS
        models = catalog.auto_chain if own else catalog.resolve(name)
        windows = [model.context_window for model in models]
        lengths = [model.max_output for model in models if model.max_output is not None]
        shown = "Freeway " + name.removeprefix("claude-freeway").strip("-") if own else models[0].name
        return model_entry(name, shown.strip(), max(windows, default=None), max(lengths, default=None))

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

    async def healthz(self, request: Request) -> Response:
        try:
            await self.store.read(ping)
        except DatabaseError:
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


def uvicorn_config(app: Gateway) -> uvicorn.Config:
    """The server as in production."""
    return uvicorn.Config(
        app,
        host=app.settings.host,
        port=app.settings.port,
        loop="uvloop",
        http=ClientConnection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=STOP_S,
        timeout_keep_alive=65,  # longer than the pools of common clients keep a connection, so that they close it
    )


def listener_of(settings: Settings) -> socket.socket:
    try:
        return listen(settings.host, settings.port)
    except OSError as error:
        where = f"GATEWAY_HOST={settings.host!r}, GATEWAY_PORT={settings.port}"
        raise SettingsError(f"{where}: cannot listen there: {error.strerror or error}") from None


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


def main() -> int:
    """Run until a signal; 0 after an orderly stop, 2 when it cannot start."""
    try:
        settings = load_settings(sys.argv[1:], os.environ, Path.cwd())
        listener = listener_of(settings)
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
