"""Freeway: one OpenAI-compatible endpoint over many unreliable LLM providers.

The service: settings in, lifespan, the doorman every request passes, the endpoints, `main()`. What happens to a chat
request behind the door is in exchange.py; a tour of the files is in the README.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from random import Random
from typing import Any

if __name__ == "__main__":
    gc.disable()  # what imports make stays: walking through it again and again is a tenth of the start

import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from adapters.registry import ADAPTERS
from admin.api import admin_routes
from admin.bodies import json_response, resource
from admin.commands import COMMANDS
from admin.control import Control
from admin.discovery import keep_discovering
from admin.page import Page
from admin.rechecks import keep_rechecking
from config.catalog_files import load_catalog
from config.proxies import proxies
from config.settings import Settings, SettingsError, check_binding, load_settings
from dialects.chat import ChatDialect
from dialects.compaction import Seal
from dialects.completions import CompletionsDialect
from dialects.embeddings import EmbeddingsDialect
from dialects.messages import MessagesDialect
from dialects.responses import CompactDialect, ResponsesDialect
from engine.door import Door, traced
from engine.exchange import Engine
from engine.listing import Listing
from protection import parse_levels
from providers import Providers, Timeouts
from records.cipher import CipherProcess, MakeCipher, local_cipher
from records.connection import Connection, DatabaseAway, DatabaseRefused
from records.database import DatabaseError, Store, ping
from records.eventlog import EventLog
from records.eventlog import Handler as LibraryLog
from records.keys import client_key
from records.request_log import clients_use, delete_old_rows, model_stats, todays_use
from records.vault import StoreError
from router import Router as ModelRouter
from routing.catalog import is_demo
from routing.scores import Stats, success_probabilities
from routing.standing import Protection
from transport.client import Receive, Send, read_body
from transport.connection import ClientConnection
from transport.process import allow_many_files, bind, listen, spare_the_collector, trim_memory
from transport.siblings import Siblings
from transport.upstream import Upstream
from transport.workers import Place, Supervisor, place_of
from wire.chat import Dialect, LocalRoute

STOP_S = 10  # for running streams, after a signal (SPEC 1.6)
STORE_S = 8  # and then for the last rows and for what has been cancelled
CLIENT_STALL_S = 300.0  # a client that takes no bytes for so long is gone, whatever its connection says
SWEEP_S = 5.0
ORPHAN_S = 1.0
STATS_SHARE = 0.01  # of a core, at most, for the statistics: a million rows take 2 s, and say the same for minutes
RETENTION_S = 3600.0  # SPEC 12.3


class Gateway:
    """The ASGI app. Constructing it opens the database; its lifespan owns everything that runs."""

    def __init__(self, settings: Settings, place: Place | None = None, make_cipher: MakeCipher = local_cipher) -> None:
        """`place`: it is one of several workers."""
        self.settings = settings
        self.siblings = None if place is None else Siblings(place)
        self.proxies = proxies(settings.environ)
        files = load_catalog(settings, ADAPTERS)
        defaults = {p.id: p.protection for p in files.platforms.values()}
        levels, warnings = parse_levels(settings.thread_protection_platforms, defaults)
        self.warnings = [*files.warnings, *warnings]
        self.log = EventLog(settings.log_level)
        self.store = Store(settings.db, settings.encryption_key, settings.log, make_cipher)
        self.api_key, self.made_key = settings.api_key or "", False
        if not self.api_key:
            self.api_key, self.made_key = self.store.write_now(lambda db: client_key(db, self.store.vault))
        self.admin_key = settings.admin_key or self.api_key
        check_binding(settings.host, [self.api_key, self.admin_key])
        protection = Protection(
            levels=levels,
            sticky_ttl_s=settings.sticky_ttl_ms / 1000,
            thread_cooldown_s=settings.thread_cooldown_ms / 1000,
            trial_spacing_s=settings.trial_spacing_ms / 1000,
        )
        router = ModelRouter(protection)
        self.engine = Engine(settings, protection, router, self.store, self.log, Random())
        self.control = Control(files, self.store, router, self.engine.waiting.wake)
        self.control.start()
        self._restore_ledger()
        if settings.state is not None:
            self._share(settings.state)
        vault = self.store.vault
        responses = ResponsesDialect(lambda: secrets.token_hex(24), Seal(vault.seal, vault.opened))
        dialects: tuple[Dialect, ...] = (
            ChatDialect(),
            responses,
            CompactDialect(responses),
            MessagesDialect(lambda: secrets.token_hex(24)),
            CompletionsDialect(lambda: secrets.token_hex(24)),
            EmbeddingsDialect(),
        )
        self.paths = [path for dialect in dialects for path in dialect.paths]  # that are POSTed to
        self.endpoints = Router(
            [
                *Listing(self.engine.router, int(time.time())).routes(),
                *(self._local_route(route) for dialect in dialects for route in dialect.extra_routes()),
                Route("/healthz", self.healthz),
                resource("/", GET=Page().show),
                *admin_routes(self.engine, self.control, self.siblings),
            ],
            redirect_slashes=False,
            default=self._not_found,
        )
        clients = self.control.clients
        self._door = Door(
            self.engine, dialects, self.endpoints, clients, api_key=self.api_key, admin_key=self.admin_key
        )

    def _share(self, address: str) -> None:
        """With other gateways. The module is loaded here because its library is there only for those who want it."""
        try:
            module = importlib.import_module("shared.state")
        except ModuleNotFoundError as error:
            needed = f"GATEWAY_STATE needs the package {error.name}: pip install -r requirements-scale.txt"
            raise SettingsError(needed) from None
        try:
            shared = self._shared_state(module.SharedState, address)
        except ValueError:
            raise SettingsError("GATEWAY_STATE: not an address of a Redis (the value is not shown)") from None
        self.engine.metrics.gauge("freeway_shared_state_up", "Whether the shared state answers.", lambda: shared.up)
        self.engine.metrics.gauge("freeway_gateways", "Gateways that share it, lately.", lambda: shared.gateways)
        self.engine.share(shared)
        self.control.shared_with(shared.catalogue_changed)

    def _shared_state(self, made: Callable[..., Any], address: str) -> Any:
        return made(
            address,
            self.engine.protection,
            self.engine.router,
            sticky_ttl_s=self.settings.sticky_ttl_ms / 1000,
            log=self.log.write,
            freed=self.engine.waiting.wake,
            catalogue_changed=self._read_again,
        )

    async def _read_again(self) -> None:
        """The operator has changed something at another gateway, which may use the same database."""
        try:
            await self.control.reload()
        except DatabaseError as error:
            self.log.write("warning", "catalogue", message=str(error))

    def _restore_ledger(self) -> None:
        """Quotas go on where the last process stopped."""
        router, utc, now = self.engine.router, time.time(), time.monotonic()
        router.ledger.utc_offset_s = utc - now
        for model, key, ago_s, requests, tokens in self.store.write_now(lambda db: todays_use(db, utc)):
            router.ledger.restore(model, key, at=now - ago_s, requests=requests, tokens=tokens, now=now)
        for client, ago_s, requests, tokens in self.store.write_now(lambda db: clients_use(db, utc)):
            self.control.clients.restore(client, ago_s=ago_s, requests=requests, tokens=tokens, now=now, utc=utc)

    # The lifespan: what runs besides requests.

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        self.log.start()
        for warning in self.warnings:
            self.log.write("warning", "configuration", message=warning)
        s = self.settings
        self.store.backend.on_turn(self._database_turned)
        timeouts = Timeouts(
            request_s=s.request_timeout_ms / 1000,
            stall_s=s.max_stream_stall_ms / 1000,
            first_token_s=s.first_token_timeout_ms / 1000,
            error_body_s=s.error_body_ms / 1000,
        )
        try:
            shared = self.engine.shared
            jobs = (
                *(shared.jobs() if shared is not None else ()),
                self._refresh(),
                self._sweep(),
                self.store.backend.follow(self.control.reload),
                keep_discovering(self.engine, self.control),
                *self._jobs_of_one(),
                *(() if self.siblings is None else (stop_when_orphaned(self.siblings.place),)),
            )
            upstream = Upstream(s.connect_timeout_ms / 1000, proxies=self.proxies)
            together = contextlib.nullcontext() if self.siblings is None else self.siblings.listening()
            async with upstream, together, background(self.log, *jobs):
                whole_calls = s.tool_calls == "whole"
                self.engine.providers = Providers(timeouts, upstream, whole_calls=whole_calls)
                if self.engine.shared is not None:
                    await self.engine.shared.start()
                await send({"type": "lifespan.startup.complete"})
                await receive()
                await self._drain()
        finally:
            if self.engine.shared is not None:
                await self.engine.shared.close()
            await self.store.close()
            if self.store.dropped:
                self.log.write("error", "rows_lost", count=self.store.dropped)
            self.log.stop()
        await send({"type": "lifespan.shutdown.complete"})

    def _jobs_of_one(self) -> list[Coroutine[Any, Any, None]]:
        """What one of several workers does for all: they use one database."""
        if self.siblings is not None and self.siblings.place.number > 0:
            return []
        return [self._retain(), keep_rechecking(self.engine, self.control, self.settings.key_recheck_ms / 1000)]

    async def _drain(self) -> None:
        """The server has waited for running requests; what it has cancelled since gets a moment to settle."""
        tasks = [exchange.task for exchange in self.engine.running]
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)

    def _database_turned(self, up: bool, why: str) -> None:
        """A shared database went away, or is back; no request notices (SPEC 20.3)."""
        if up:
            self.log.write("warning", "database_up", rows_waiting=self.store.pending)
        else:
            self.log.write("error", "database_down", message=why, rows_waiting=self.store.pending)

    async def _refresh(self) -> None:
        """Keep the statistics that routing learns from fresh, off the request's path."""
        days = self.settings.analytics_window_days

        def learned(db: Connection) -> tuple[dict[tuple[str, str], Stats], float]:
            began = time.thread_time()
            by_name = model_stats(db, days)
            for stats in by_name.values():
                success_probabilities(stats)
            return by_name, time.thread_time() - began

        while True:
            await self.store.flush()
            pause_s = self.settings.stats_refresh_ms / 1000
            try:
                by_name, spent_s = await self.store.read(learned)
            except DatabaseAway:  # said once, when it was noticed
                pass
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
                blocked = exchange.delivery.blocked_since if exchange.delivery is not None else None
                if blocked is not None and now - blocked > CLIENT_STALL_S:
                    exchange.task.cancel()
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
            except DatabaseAway:
                pass
            except DatabaseError as error:
                self.log.write("warning", "retention", message=str(error))
            await asyncio.sleep(RETENTION_S)

    def __call__(self, scope: Any, receive: Receive, send: Send) -> Awaitable[None]:
        """An ASGI app. No coroutine of its own: each that waits for another is woken with every chunk of a stream."""
        if scope["type"] == "http":
            return self._door(scope, receive, send)
        if scope["type"] == "lifespan":
            return self._lifespan(receive, send)
        return send({"type": "websocket.close", "code": 1008})

    # Endpoints that are not chat.

    async def _not_found(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["path"] in self.paths:  # with another method: many open a base URL in their browser
            raise HTTPException(405, headers={"Allow": "POST"})
        raise HTTPException(404, "Not found")

    def _local_route(self, route: LocalRoute) -> Route:
        """An endpoint that a dialect answers by itself."""

        async def endpoint(request: Request) -> Response:
            raw = b""
            if route.method == "POST":
                headers = dict(request.scope["headers"])
                raw = await read_body(headers, request.receive, self.settings.max_body_bytes)
            given = {**request.query_params, **request.path_params}
            body = route.answer(given, raw, time.time(), request.scope.get("freeway.holder"))
            return Response(body, media_type="application/json")

        return Route(route.path, endpoint, methods=[route.method])

    async def healthz(self, request: Request) -> Response:
        try:
            await self.store.read(ping)
        except DatabaseAway:  # requests are served all the same: a balancer must not take every gateway out for it
            return json_response({"status": "ok", "database": "away"})
        except DatabaseError:
            return json_response({"status": "database unavailable"}, 503)
        return json_response({"status": "ok"})


async def stop_when_orphaned(place: Place) -> None:
    """A worker whose supervisor was killed would keep the port for ever."""
    while not place.orphaned():  # noqa: ASYNC110 - nobody can tell it
        await asyncio.sleep(ORPHAN_S)
    signal.raise_signal(signal.SIGTERM)


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
        interface="asgi3",  # which uvicorn would ask a coroutine function for
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=STOP_S,
        timeout_keep_alive=65,  # longer than the pools of common clients keep a connection, so that they close it
    )


def listener_of(settings: Settings, open: Callable[..., socket.socket] = listen) -> socket.socket:
    try:
        return open(settings.host, settings.port, together=settings.workers > 1)
    except OSError as error:
        where = f"GATEWAY_HOST={settings.host!r}, GATEWAY_PORT={settings.port}"
        raise SettingsError(f"{where}: cannot listen there: {error.strerror or error}") from None


def supervise(settings: Settings) -> int:
    """Start the workers and see to them until a signal."""
    log = EventLog(settings.log_level)
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
    holder = listener_of(settings, bind)
    log.start()
    try:
        return Supervisor(command, settings.workers, holder, stop_s=STOP_S + STORE_S, log=log.write).run()
    finally:
        log.stop()


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
    """Run until a signal; 0 after an orderly stop, 2 when it cannot start. With a command's word, that instead."""
    spare_the_collector()  # it is off until here
    if sys.argv[1:2] and (command := COMMANDS.get(sys.argv[1])) is not None:
        return command(sys.argv[2:], os.environ, Path.cwd(), lambda line: print(line, flush=True))
    try:
        settings = load_settings(sys.argv[1:], os.environ, Path.cwd())
        place = place_of(os.environ)
        if settings.workers > 1 and place is None:
            return supervise(settings)
        with CipherProcess() as process:
            listener = listener_of(settings)
            app = Gateway(settings, place, process.cipher)
    except (SettingsError, StoreError, DatabaseAway, DatabaseRefused) as error:
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
        if place is None or not place.number:
            announce(app, listener.getsockname()[1])
    server.run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
