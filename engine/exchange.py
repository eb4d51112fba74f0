"""One request's life: attempts until one succeeds, the answer sent, and everything settled exactly once.

There is one attempt loop for every dialect, streaming or not: `first_success`. It knows no platform, no level and no
wire format: router.py says where to go, providers.py how to ask, protection.py what a failure costs. `Exchange` is the
one mutable record of a request; what belongs to one attempt lives in `Running` and ends with it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from random import Random
from typing import Any, TypeVar
from urllib.parse import quote

import orjson

from adapters.base import Reply
from adapters.stream import cut_short
from config.catalog_files import CatalogFiles
from config.settings import Settings
from protection import Active, Cooling, Failure, Kind, Phase, Protection, Scope, UpstreamError
from providers import Providers
from records.database import Connection, Store
from records.eventlog import EventLog
from records.keys import set_key_status
from records.metrics import Metrics
from records.models import Snapshot, load_snapshot
from records.rows import Row
from router import Attempt, Plan, Router, exhausted, refusal, request_is_bad
from routing.catalog import KeyStatus
from routing.route import Route
from transport.client import ClientGone, CutShort, Receive, Send, Stopping, Watch, Watches, unless_disconnected
from transport.deadlines import Deadlines, Limit
from wire.chat import Chat, Dialect, Encoder, Mode, Tally
from wire.errors import GatewayError, NoProviders

T = TypeVar("T")
SESSION_MODES = (Mode.SMART, Mode.FAST)  # the others have no sessions (SPEC 7.1)
HEADER_SAFE = "".join(map(chr, range(33, 127))).replace("%", "") + " "
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
JSON_HEADERS = [(b"content-type", b"application/json")]


@dataclass(eq=False, slots=True)
class Exchange:
    """One request from its first byte to its last."""

    id: str
    started: float  # monotonic seconds
    utc: float  # seconds since 1970, at the same moment
    deadline: float  # no new attempt starts after this
    limit: Limit  # on what its task waits for
    session: str = ""
    chat: Chat | None = None
    plan: Plan | None = None
    failures: list[Attempt] = field(default_factory=list)
    route: Route | None = None  # of the attempt that is running or has answered
    status: str = "error"
    first_event_ms: int | None = None
    tally: Tally | None = None  # of a stream that has begun
    blocked_since: float | None = None  # when the client stopped taking bytes
    id_headers: tuple[bytes, ...] = (b"x-request-id",)


@dataclass(slots=True)
class Running:
    """One attempt while it runs."""

    route: Route
    chat: Chat
    plan: Plan
    number: int
    started: float
    active: Active
    skipped: list[str]
    reply: Reply | None = None
    finished: bool = False  # the provider has answered to the end
    error: UpstreamError | None = None
    ttfb_ms: int | None = None


def session_key(chat: Chat, session_id: str) -> str:
    """A conversation's key: its mode and the client's own id, else its first user message. Empty: no session."""
    text = session_id or chat.first_user_text
    if chat.need.pinned is not None or chat.need.mode not in SESSION_MODES or not text:
        return ""
    source = "id" if session_id else "text"
    return blake2b(f"{chat.need.mode}\0{source}\0{text}".encode(errors="replace"), digest_size=16).hexdigest()


class Engine:
    """Serves exchanges. Holds what they share."""

    def __init__(
        self,
        settings: Settings,
        files: CatalogFiles,
        protection: Protection,
        router: Router,
        store: Store,
        log: EventLog,
        rng: Random,
    ) -> None:
        self.settings = settings
        self.files = files
        self.protection = protection
        self.router = router
        self.store = store
        self.log = log
        self.metrics = Metrics()
        self.running: set[Exchange] = set()
        self.deadlines: Deadlines  # these two are set while the lifespan holds them
        self.providers: Providers
        self._rng = rng
        self._idle_s = settings.keepalive_interval_ms / 1000
        self._watches = Watches()
        self._attempts_max = settings.max_fallback_attempts

    async def apply(self, change: Callable[[Connection], T]) -> T:
        """Make an operator's change, all of it or nothing; it holds from the next request on."""

        def changed(db: Connection) -> tuple[T, Snapshot]:
            return change(db), self.snapshot(db)

        result, snapshot = await self.store.write(changed)
        self.router.load(snapshot.catalog, snapshot.key_status)
        return result

    def snapshot(self, db: Connection) -> Snapshot:
        return load_snapshot(db, self.store.vault, self.files.platforms, self.files.models)

    def exchange(self) -> Exchange:
        """A request that has just begun, in the current task. Whoever asks for it closes its limit."""
        now, utc = time.monotonic(), time.time()
        # Ids grow with time, so that the log's index over them grows at its end.
        id = f"req_{int(utc * 1000):012x}{self._rng.getrandbits(48):012x}"
        return Exchange(id, now, utc, now + self.settings.request_budget_ms / 1000, self.deadlines.limit())

    async def answer(self, exchange: Exchange, dialect: Dialect, receive: Receive, send: Send) -> None:
        """Serve a parsed exchange to its end. Raises GatewayError while nothing has been sent."""
        self.running.add(exchange)
        assert exchange.chat is not None
        exchange.id_headers = dialect.id_headers
        if exchange.chat.answered is not None:
            await self._answer_here(exchange, exchange.chat.answered, stream=exchange.chat.stream, send=send)
            return
        encoder = dialect.encoder(exchange.chat, exchange.utc)
        task = exchange.limit.task
        watch = Watch(receive, task, time.monotonic())
        self._watches.add(watch)
        try:
            try:
                last = await unless_disconnected(watch, task, self._answer(exchange, exchange.chat, encoder, send))
            except asyncio.CancelledError:
                last = stopping(exchange, encoder)
            if last is None:
                raise CutShort
            exchange.blocked_since = time.monotonic()
            try:
                await send(last)  # the last await: from here on receive() would report a disconnect of our own making
            except asyncio.CancelledError:  # its client takes nothing any more; for the provider all has been settled
                return
        except ClientGone:
            exchange.status = "cancelled"
        finally:
            self.running.discard(exchange)
            self._close(exchange)

    async def _answer_here(self, exchange: Exchange, body: bytes, *, stream: bool, send: Send) -> None:
        """What needs no provider leaves no row: statistics and limits are about providers."""
        length = (b"content-length", str(len(body)).encode())
        headers = STREAM_HEADERS if stream else JSON_HEADERS
        exchange.status = "success"
        await send(response_start(200, [*headers, length, *route_headers(exchange)]))
        await send({"type": "http.response.body", "body": body})
        self.running.discard(exchange)
        self._close(exchange)

    async def _answer(self, exchange: Exchange, chat: Chat, encoder: Encoder, send: Send) -> dict[str, Any] | None:
        """Everything but the last message, which it returns: by then the provider's connection is closed. None where
        the client is told best by closing its connection."""
        running = await self.first_success(exchange, chat)
        try:
            reply = running.reply
            assert reply is not None
            last: bytes | None
            if reply.completion is not None:
                last = encoder.whole(reply.completion)
                running.finished = True
                length = (b"content-length", str(len(last)).encode())
                await send(response_start(200, [*JSON_HEADERS, length, *route_headers(exchange)]))
            else:
                await send(response_start(200, [*STREAM_HEADERS, *route_headers(exchange)]))
                exchange.tally = reply.tally
                last = await self._relay(exchange, running, reply, encoder, send)
        finally:
            self._settle(exchange, running)
        return None if last is None else {"type": "http.response.body", "body": last}

    async def _relay(
        self, exchange: Exchange, running: Running, reply: Reply, encoder: Encoder, send: Send
    ) -> bytes | None:
        """Send a stream's events as they arrive; gives its last bytes, with which the events go out that came last."""
        body = b""
        try:
            while (events := await reply.next_batch(self._idle_s)) is not None:
                body += encoder.feed(events) if events else encoder.heartbeat()
                del events  # a slow client would keep them: parsed, they are several times the size
                if body and not reply.ended:
                    exchange.blocked_since = time.monotonic()
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                    exchange.blocked_since, body = None, b""
        except UpstreamError as error:  # the client has bytes already: say so in the stream, then end it
            running.error = error
            stalled = error.failure is Failure.STALL
            name = "stream_timeout" if stalled else "stream_error"
            words = "stopped sending" if stalled else "failed in the middle of its answer"
            platform = running.route.model.platform.name
            message = f"{platform} {words}. The answer is incomplete; send the request again."
            last = encoder.fail(message, name, 504 if stalled else 502, reply.tally)
            return None if last is None else body + last
        running.finished = True
        return body + encoder.end(reply.tally)

    async def first_success(self, exchange: Exchange, chat: Chat) -> Running:
        """Open the first route that answers. Whoever gets it settles it. Raises GatewayError."""
        try:
            plan = self._plan(exchange, chat)
        except NoProviders:
            raise self._exhausted(exchange, Plan([], chat.need.tokens), chat) from None
        while (route := self._next_route(exchange, plan)) is not None:
            now, model = time.monotonic(), route.model
            active = self.protection.begin(exchange.session, model.platform.id, model.id, now)
            running = Running(route, chat, plan, len(exchange.failures) + 1, now, active, plan.skipped_labels())
            try:
                running.reply = await self.providers.open(route, chat, exchange.limit)
            except UpstreamError as error:
                running.error = error
            finally:  # also when it was cancelled
                if running.reply is None:
                    self._settle(exchange, running)
            if running.error is None:
                self._committed(exchange, running)
                return running
            if running.error.rule.scope is Scope.REQUEST and self.settings.content_filter == "propagate":
                raise refusal(exchange.failures)
        raise self._exhausted(exchange, plan, chat)

    def _plan(self, exchange: Exchange, chat: Chat) -> Plan:
        now = time.monotonic()
        self.router.ledger.utc_offset_s = time.time() - now
        standing = self.protection.standing(exchange.session, now, auto=chat.need.pinned is None)
        plan = self.router.plan(chat.need, standing, now, self._rng)
        exchange.plan = plan
        return plan

    def _next_route(self, exchange: Exchange, plan: Plan) -> Route | None:
        """The next attempt's route, within the limits of attempts and time."""
        now = time.monotonic()
        failures = exchange.failures
        if failures and (now >= exchange.deadline or len(failures) >= self._attempts_max or request_is_bad(failures)):
            return None
        exchange.route = self.router.next_route(plan, now)
        return exchange.route

    def _committed(self, exchange: Exchange, running: Running) -> None:
        now = time.monotonic()
        running.ttfb_ms = round((now - running.started) * 1000)
        exchange.first_event_ms = round((now - exchange.started) * 1000)
        model = running.route.model
        self.protection.used(exchange.session, model.platform.id, model.id, now)

    def _settle(self, exchange: Exchange, running: Running) -> None:
        """Let go of the provider and close the books on one attempt, however it ended: ledger, protection, session,
        log row."""
        if running.reply is not None:
            running.reply.close()
        self.protection.end(running.active)
        now = time.monotonic()
        route, chat, error = running.route, running.chat, running.error
        tally = running.reply.tally if running.reply else None
        row = Row(
            request_id=exchange.id,
            created_at=exchange.utc + running.started - exchange.started,
            platform=route.model.platform.id,
            model_id=route.model.model_id,
            key_id=route.key.id or None,
            requested_model=chat.model or "auto",
            routing_mode=str(chat.need.mode),
            latency_ms=round((now - running.started) * 1000),
            ttfb_ms=running.ttfb_ms,
            attempt=running.number,
            streamed=chat.stream,
            skipped_models=orjson.dumps(running.skipped).decode() if running.skipped else None,
        )
        tokens = 0
        if tally is not None:
            row.input_tokens = tally.usage.input_tokens if tally.usage else chat.prompt_tokens
            row.output_tokens = tally.output_tokens()
            tokens = row.input_tokens + row.output_tokens
            if tally.malformed:
                self.metrics.malformed(tally.malformed)
        self.router.ledger.settle(route.reservation, tokens)
        if error is not None:
            self._failed(exchange, running, error, now)
            row.error_kind, row.http_status, row.error = str(error.failure), error.status, error.message
        elif running.finished:
            row.status, row.http_status = "success", 200
            self._succeeded(exchange, running, now)
        else:
            row.status = "cancelled"
        exchange.status = row.status
        self.metrics.attempt(row)
        self.store.log(row)

    def _failed(self, exchange: Exchange, running: Running, error: UpstreamError, now: float) -> None:
        """What one failure costs: this request, everybody, and the session (SPEC 5.2, 7)."""
        rule, model, key, plan = error.rule, running.route.model, running.route.key, running.plan
        error.__traceback__ = error.__context__ = None  # their frames hold this exchange: nothing would be freed
        exchange.failures.append(Attempt(running.route, error, round((now - running.started) * 1000)))
        if rule.cooling is Cooling.TRANSIENT:
            until = now + self.settings.transient_cooldown_ms / 1000
            self.protection.transient.set(model.id, until, now)
            self.log.write("info", "cooldown", model=model.label, kind=error.failure)
        elif rule.cooling is Cooling.KEY:
            setting_s = rule.cooldown_s or self.settings.rate_limit_cooldown_ms / 1000
            wait_s = error.retry_after_s if error.retry_after_s is not None else setting_s
            self.protection.keys.set((key.id, model.id), now + wait_s, now)
            if error.failure is Failure.RATE_LIMITED:
                self._set_key_status(key.id, KeyStatus.RATE_LIMITED)
        elif rule.cooling is Cooling.INVALID:
            self._set_key_status(key.id, KeyStatus.INVALID, error.message)
            self.protection.sessions.clear_key(exchange.session, key.id, now)
        kind: Kind | None = error.kind
        if rule.scope is Scope.KEY:
            plan.failed_keys.add((key.id, model.id))
            if self.router.usable_key(model, plan, now) is not None:
                return
            if error.failure is Failure.RATE_LIMITED:
                self.router.penalties.add(model.id, now)
        elif rule.scope is Scope.WINDOW:
            plan.skip_window(model)
        else:
            plan.skip(model)
        if kind is not None:
            phase = Phase.MID_STREAM if running.reply else Phase.BEFORE_STREAM
            self._punish(exchange, running, kind, phase, now)

    def _punish(self, exchange: Exchange, running: Running, kind: Kind, phase: Phase, now: float) -> None:
        model = running.route.model
        action = self.protection.punish(exchange.session, model.platform.id, model.id, kind, phase, now)
        if action.ban_provider:
            running.plan.ban(model.platform.id)
            self.log.write("info", "ban", platform=model.platform.id, reason=action.reason, request_id=exchange.id)

    def _succeeded(self, exchange: Exchange, running: Running, now: float) -> None:
        route, reply = running.route, running.reply
        assert reply is not None
        self._set_key_status(route.key.id, KeyStatus.HEALTHY)
        self.router.penalties.success(route.model.id, now)
        self.protection.used(exchange.session, route.model.platform.id, route.model.id, now)
        self.protection.sessions.pin(exchange.session, route.model.id, route.key.id, now)
        if cut_short(reply.tally, running.chat, route.model):
            self._punish(exchange, running, Kind.TRUNCATION, Phase.MID_STREAM, now)

    def _set_key_status(self, key: int, status: KeyStatus, error: str | None = None) -> None:
        """Remember it; tell the database when it is news. A success that began before does not lift invalid."""
        if not key or (status is KeyStatus.HEALTHY and self.router.key_status.get(key) is KeyStatus.INVALID):
            return
        if self.router.set_key_status(key, status):
            self.store.write_later(key, lambda db: set_key_status(db, key, status, error))

    def _exhausted(self, exchange: Exchange, plan: Plan, chat: Chat) -> GatewayError:
        """The client's error when nothing is left; counted, and told to the operator (SPEC 5.4)."""
        now = time.monotonic()
        soonest_s = self.router.soonest_s(plan, now)
        error = exhausted(plan, exchange.failures, stream=chat.stream, retry_after_s=soonest_s)
        self.metrics.exhausted()
        pool = {
            "candidates": len(plan.complete()),
            "skipped": plan.skipped_labels(),
            "blocked": [f"{self.router.catalog.by_id[id].label}={b.reason}" for id, b in plan.blocked.items()],
            "transient_cooldowns": len(self.protection.transient),
            "key_cooldowns": len(self.protection.keys),
        }
        self.log.write(
            "warning",
            "all_models_exhausted",
            request_id=exchange.id,
            code=error.code,
            attempts=len(exchange.failures),
            retry_after_s=soonest_s,
            pool=pool,
        )
        return error

    def refuse(self, exchange: Exchange, error: GatewayError) -> None:
        """Log a request that was refused before any attempt."""
        chat = exchange.chat
        if exchange.failures or chat is None:
            return
        row = Row(request_id=exchange.id, created_at=exchange.utc, requested_model=chat.model or "auto")
        row.routing_mode, row.streamed = str(chat.need.mode), chat.stream
        row.http_status, row.error = error.status, error.message
        row.latency_ms = round((time.monotonic() - exchange.started) * 1000)
        row.skipped_models = skipped_text(exchange.plan)
        self.store.log(row)

    def _close(self, exchange: Exchange) -> None:
        failed = len(exchange.failures)
        self.metrics.request(exchange.status, failed - (exchange.status == "error" and failed > 0))
        if not self.log.wants("info"):
            return
        chat, route = exchange.chat, exchange.route
        self.log.write(
            "info",
            "request",
            request_id=exchange.id,
            model=chat.model if chat else None,
            route=route.model.label if route else None,
            attempts=len(exchange.failures) + (exchange.status == "success"),
            failures=trail(exchange) or None,
            status=exchange.status,
            first_event_ms=exchange.first_event_ms,
            total_ms=round((time.monotonic() - exchange.started) * 1000),
        )


def stopping(exchange: Exchange, encoder: Encoder) -> dict[str, Any] | None:
    """The last message of an exchange that has been cancelled from outside: even then no stream just stops. None as in
    `Encoder.fail`."""
    if exchange.blocked_since is not None:  # because its client takes nothing: then nothing can be said either
        raise ClientGone
    if exchange.tally is None:
        raise Stopping
    body = encoder.fail(Stopping.words, "stream_error", 503, exchange.tally)
    return None if body is None else {"type": "http.response.body", "body": body}


def skipped_text(plan: Plan | None) -> str | None:
    labels = plan.skipped_labels() if plan else []
    return orjson.dumps(labels).decode() if labels else None


def response_start(status: int, headers: list[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def trail(exchange: Exchange) -> str:
    """Which attempts failed and how: `platform/model=kind; …`."""
    return "; ".join(f"{attempt.route.model.label}={attempt.error.failure}" for attempt in exchange.failures)


def route_headers(exchange: Exchange) -> list[tuple[bytes, bytes]]:
    """The headers that tell how a request was routed (SPEC 3.8)."""
    headers = [(name, exchange.id.encode()) for name in exchange.id_headers]
    if exchange.route is not None:
        headers.append((b"x-routed-via", header_value(exchange.route.model.label)))
    if exchange.failures:
        headers.append((b"x-fallback-attempts", str(len(exchange.failures)).encode()))
        headers.append((b"x-fallback-trail", header_value(trail(exchange))))
    return headers


@lru_cache(maxsize=1024)  # models, and the trails of a bad hour
def header_value(text: str) -> bytes:
    """Printable ASCII; everything else percent-encoded."""
    return quote(text, safe=HEADER_SAFE).encode()
