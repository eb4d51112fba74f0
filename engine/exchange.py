"""One request's life: attempts until one succeeds, the answer sent, and everything settled exactly once.

There is one attempt loop for every dialect, streaming or not: `Engine._run`. It knows no platform, no level and no wire
format: router.py says where to go, providers.py how to ask, protection.py what a failure costs, settle.py closes the
books.
"""

from __future__ import annotations

import asyncio
import time
from random import Random

from adapters.stream import cut_short
from config.settings import Settings
from engine.delivery import Delivery
from engine.record import Exchange, route_headers, trail
from engine.refusals import exhausted, refusal, request_is_bad
from engine.settle import Books, Running, refused_row
from engine.waiting import WaitingRoom
from protection import Answered, Cancelled, Failed, Failure, Phase, Scope, UpstreamError, retry_s
from providers import Attempt, Providers
from records.database import Store
from records.eventlog import EventLog
from records.metrics import Metrics
from router import Plan, Router
from routing.route import Route
from routing.standing import Protection
from transport.client import Client, ClientGone, CutShort, Send, Stopping, unless_gone
from wire.chat import Chat, Dialect
from wire.errors import GatewayError, NoProviders


class Engine:
    """Serves exchanges. Holds what they share."""

    def __init__(
        self,
        settings: Settings,
        protection: Protection,
        router: Router,
        store: Store,
        log: EventLog,
        rng: Random,
    ) -> None:
        self.settings = settings
        self.protection = protection
        self.router = router
        self.store = store
        self.log = log
        self.metrics = Metrics()
        self.waiting = WaitingRoom()
        self.running: set[Exchange] = set()
        self.providers: Providers  # set while the lifespan holds it
        self._rng = rng
        self._books = Books(settings, protection, router, store, log, self.metrics, rng, self.waiting.wake)
        self._attempts_max = settings.max_fallback_attempts
        self._quiet_s = settings.first_token_timeout_ms / 1000

    def exchange(self) -> Exchange:
        """A request that has just begun, in the current task."""
        now, utc = time.monotonic(), time.time()
        # Ids grow with time, so that the log's index over them grows at its end.
        id = f"req_{int(utc * 1000):012x}{self._rng.getrandbits(48):012x}"
        task = asyncio.current_task()
        assert task is not None
        deadline = now + self.settings.request_budget_ms / 1000
        return Exchange(id, now, utc, deadline, task, self.settings.wait_for_capacity_ms / 1000)

    async def answer(self, exchange: Exchange, dialect: Dialect, client: Client, send: Send) -> None:
        """Serve a parsed exchange to its end. Raises GatewayError while nothing has been sent."""
        chat = exchange.chat
        assert chat is not None
        exchange.id_headers = dialect.id_headers
        self.running.add(exchange)
        exchange.delivery = delivery = Delivery(
            send,
            dialect.encoder(chat, exchange.utc),
            lambda: route_headers(exchange),
            interval_s=self.settings.keepalive_interval_ms / 1000,
            silence_s=self.settings.first_heartbeat_ms / 1000,
        )
        if chat.stream:
            delivery.keep_alive()
        try:
            try:
                last = await unless_gone(client, self._serve(exchange, chat, delivery))
            except asyncio.CancelledError:
                last = stopped(delivery)
            finally:
                delivery.rest()
            delivery.blocked_since = asyncio.get_running_loop().time()
            try:
                await finish(send, last)
            except asyncio.CancelledError:  # its client takes nothing any more; for the provider all has been settled
                return
        except ClientGone:
            exchange.status = "cancelled"
        finally:
            self.running.discard(exchange)
            exchange.delivery, exchange.begun = None, delivery.started
            self._close(exchange)

    async def _serve(self, exchange: Exchange, chat: Chat, delivery: Delivery) -> bytes | None:
        if chat.answered is None:
            return await self._run(exchange, chat, delivery)
        exchange.status = "success"  # what needs no provider leaves no row: statistics and limits are about providers
        if chat.stream:
            await delivery.begin_stream()
        else:
            await delivery.begin_whole(len(chat.answered))
        return chat.answered

    async def _run(self, exchange: Exchange, chat: Chat, delivery: Delivery) -> bytes | None:
        """The one loop. Gives the last bytes of the answer, when its provider has been let go of already; None where
        the client is told best by a connection that breaks off. Raises GatewayError while nothing has been sent."""
        try:
            plan = self._plan(exchange, chat)
            while (route := await self._next_route(exchange, plan)) is not None:
                running = self._begin(exchange, plan, route, chat)
                attempt = running.attempt
                try:
                    await attempt.open()
                    self._committed(exchange, attempt)
                    last = await self._relay(attempt, delivery)
                    attempt.outcome = Answered(cut_short(attempt.tally, chat, route.model))
                    return last
                except UpstreamError as error:
                    phase = Phase.BEFORE_STREAM if attempt.ttfb_ms is None else Phase.MID_STREAM
                    attempt.outcome = failed = Failed(error, phase)
                finally:
                    attempt.outcome = attempt.outcome or Cancelled()
                    self._books.settle(exchange, running)
                if failed.phase is Phase.MID_STREAM:
                    return broken(failed.error, attempt, delivery)
                if failed.error.rule.scope is Scope.REQUEST and self.settings.content_filter == "propagate":
                    raise refusal(exchange.failures)
                self._note_retry(exchange, plan, attempt, failed.error)
            raise self._exhausted(exchange, plan, chat)
        except GatewayError as error:
            if not delivery.streams:
                raise
            return delivery.fail(error.message, error.type, error.status)

    async def _relay(self, attempt: Attempt, delivery: Delivery) -> bytes:
        """Send the answer as it arrives; gives its last bytes, with which the events go out that came last."""
        encoder = delivery.encoder
        if attempt.completion is not None:
            body = encoder.whole(attempt.completion)
            await delivery.begin_whole(len(body))
            return body
        await delivery.begin_stream()
        body = b""
        while (events := await attempt.next_batch(self._quiet_s)) is not None:
            body += encoder.feed(events)
            del events  # a slow client would keep them: parsed, they are several times the size
            if body and not attempt.ended:
                await delivery.write(body)
                body = b""
        return body + encoder.end(attempt.tally)

    def _plan(self, exchange: Exchange, chat: Chat) -> Plan:
        now, auto = time.monotonic(), chat.need.pinned is None
        self.router.ledger.utc_offset_s = time.time() - now
        self.protection.sessions.arrived(exchange.session, now)
        standing = self.protection.standing(exchange.session, now, auto=auto)
        try:
            exchange.plan = plan = self.router.plan(chat.need, standing, now, self._rng)
        except NoProviders:
            raise self._exhausted(exchange, Plan(chat.need), chat) from None
        plan.attempts_left = self._attempts_max
        return plan

    async def _next_route(self, exchange: Exchange, plan: Plan) -> Route | None:
        """The next attempt's route, within the limits of attempts and time; waits for one that is coming back."""
        while True:
            now = time.monotonic()
            plan.attempts_left = self._attempts_max - exchange.attempts
            if exchange.failures and (
                plan.attempts_left <= 0 or now >= exchange.deadline or request_is_bad(exchange.failures)
            ):
                return None
            if exchange.retry is not None and not self.router.asked_for_left(plan, now):
                return await self._retry(exchange, plan)
            if (route := self.router.next_route(plan, now)) is not None:
                return route
            if plan.wait_s is None or plan.wait_s > exchange.wait_left_s(now) or self.waiting.is_full:
                if exchange.waited_s:
                    self.metrics.waited("in_vain")
                return None
            await self._wait(exchange, plan.wait_s)

    async def _wait(self, exchange: Exchange, seconds: float) -> None:
        began = time.monotonic()
        if exchange.waiting_since is None:
            exchange.waiting_since = began
        try:
            await self.waiting.wait(exchange.id, exchange.waiting_since, began, seconds)
        except asyncio.CancelledError:
            self.metrics.waited("left")
            raise
        finally:
            exchange.waited_s += time.monotonic() - began

    async def _retry(self, exchange: Exchange, plan: Plan) -> Route | None:
        """The pinned route once more, when its time has come (SPEC 5.1)."""
        assert exchange.retry is not None
        route, at = exchange.retry
        exchange.retry, exchange.retried = None, True
        pause_s = max(0.0, at - time.monotonic())
        await asyncio.sleep(pause_s)
        exchange.waited_s += pause_s
        now = time.monotonic()
        return self.router.again(route, plan.need.tokens, now) or self.router.next_route(plan, now)

    def _note_retry(self, exchange: Exchange, plan: Plan, attempt: Attempt, error: UpstreamError) -> None:
        pause_s, now = retry_s(error), time.monotonic()
        if exchange.retried or pause_s is None or attempt.route.model.id not in plan.asked_for:
            return
        if error.failure is Failure.RATE_LIMITED and pause_s > exchange.wait_left_s(now):
            return
        exchange.retry = attempt.route, now + pause_s

    def _begin(self, exchange: Exchange, plan: Plan, route: Route, chat: Chat) -> Running:
        exchange.attempts += 1
        exchange.route = route
        attempt = self.providers.attempt(route, chat, exchange.attempts)
        model = route.model
        active = self.protection.begin(exchange.session, model.platform.id, model.id, attempt.started)
        return Running(attempt, active, self._skipped(plan))

    def _committed(self, exchange: Exchange, attempt: Attempt) -> None:
        now, model = time.monotonic(), attempt.route.model
        attempt.ttfb_ms = round((now - attempt.started) * 1000)
        exchange.first_event_ms = round((now - exchange.started) * 1000)
        if exchange.delivery is not None:
            exchange.delivery.tally = attempt.tally
        self.protection.used(exchange.session, model.platform.id, model.id, now)
        if exchange.waited_s:
            self.metrics.waited("served")

    def _exhausted(self, exchange: Exchange, plan: Plan, chat: Chat) -> GatewayError:
        """The client's error when nothing is left; counted, and logged for the operator (SPEC 5.4)."""
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
            mode=chat.need.mode,
            model=chat.model or "auto",
            attempts=len(exchange.failures),
            waited_ms=round(exchange.waited_s * 1000),
            retry_after_s=soonest_s,
            pool=pool,
        )
        return error

    def refuse(self, exchange: Exchange, error: GatewayError) -> None:
        """Log a request that was refused before any attempt."""
        if exchange.failures or exchange.chat is None:
            return
        skipped = self._skipped(exchange.plan) if exchange.plan is not None else []
        self.store.log(refused_row(exchange, exchange.chat, error.status, error.message, skipped))

    def _skipped(self, plan: Plan) -> list[str]:
        """What this request leaves alone; at level debug with each one's reason."""
        if not self.log.wants("debug"):
            return plan.skipped_labels()
        reasons = self.router.reasons(plan, time.monotonic())
        return [f"{label}: {reason}" for label, reason in reasons.items()]

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
            attempts=exchange.attempts,
            failures=trail(exchange) or None,
            status=exchange.status,
            first_event_ms=exchange.first_event_ms,
            waited_ms=round(exchange.waited_s * 1000) or None,
            total_ms=round((time.monotonic() - exchange.started) * 1000),
        )


def broken(error: UpstreamError, attempt: Attempt, delivery: Delivery) -> bytes | None:
    """The last bytes of a stream that failed after its first token: the client is told in the stream (SPEC 8.5)."""
    stalled = error.failure is Failure.STALL
    name = "stream_timeout" if stalled else "stream_error"
    words = "stopped sending" if stalled else "failed in the middle of its answer"
    message = f"{attempt.route.model.platform.name} {words}. The answer is incomplete; send the request again."
    return delivery.fail(message, name, 504 if stalled else 502)


def stopped(delivery: Delivery) -> bytes | None:
    """The last bytes of an exchange that has been cancelled from outside: even then no stream just stops."""
    if delivery.blocked_since is not None:  # because its client takes nothing: then nothing can be said either
        raise ClientGone
    if not delivery.started:
        raise Stopping
    return delivery.fail(Stopping.words, "stream_error", 503) if delivery.streams else None


async def finish(send: Send, last: bytes | None) -> None:
    """End the response. Raises CutShort where the client is told best by a connection that breaks off."""
    if last is None:
        raise CutShort
    await send({"type": "http.response.body", "body": last})
