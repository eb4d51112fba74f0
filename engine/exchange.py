"""One request's life: attempts until one succeeds, the answer sent, and everything settled exactly once.

There is one attempt loop for every dialect, streaming or not: `Engine._run`. It knows no platform, no level and no wire
format: router.py says where to go, providers.py how to ask, protection.py what a failure costs, settle.py closes the
books.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from math import inf
from random import Random
from typing import Any

from adapters.stream import cut_short
from config.settings import Settings
from engine.delivery import Delivery, stopped
from engine.drill import DrilledAttempt
from engine.explain import Explanations
from engine.hedging import Hedging, let_go
from engine.journal import Journal
from engine.recall import Recall
from engine.record import Exchange, Running, route_headers
from engine.refusals import refusal, request_is_bad
from engine.resuming import Resuming, Resumption
from engine.settle import Books, called_off, judged
from engine.sharing import Shared
from engine.waiting import WaitingRoom
from protection import Answered, Cancelled, Failed, Failure, LostRace, Outcome, Phase, Scope, UpstreamError, retry_s
from providers import Attempt, Providers
from records.database import Store
from records.eventlog import EventLog
from records.metrics import Metrics
from router import Router
from routing.plan import LAST_ATTEMPTS, Plan
from routing.route import Route
from routing.standing import Protection
from transport.client import Client, ClientGone, Send, unless_gone
from wire.chat import Chat, Dialect, Event
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
        self.explanations = Explanations(router)
        self.recall: Recall | None = None
        if settings.cache_mb:
            self.recall = Recall(
                settings.cache_mb << 20, settings.cache_ttl_ms / 1000, store.log, self.metrics.looked_up
            )
        self.running: set[Exchange] = set()
        self.providers: Providers  # set while the lifespan holds it
        self._rng = rng
        self._journal = Journal(protection, router, store, log, self.metrics)
        self._books = Books(settings, protection, router, store, log, self.metrics, rng, self.waiting.wake)
        self.shared: Shared | None = None  # see `share`
        self._attempts_max = settings.max_fallback_attempts
        self._first_token_s = settings.first_token_timeout_ms / 1000
        self._heartbeat_s = settings.keepalive_interval_ms / 1000
        self._first_heartbeat_s = settings.first_heartbeat_ms / 1000
        self._budget_s = settings.request_budget_ms / 1000
        self._wait_max_s = settings.wait_for_capacity_ms / 1000
        self._rescue_after_s = settings.rescue_after_ms / 1000
        self._hedging = Hedging(router, settings)
        self._no_prefill: set[int] = set()  # models that have refused a prefill; bounded by the catalogue

    def share(self, shared: Shared) -> None:
        """Share with other gateways from now on."""
        self.shared = self._books.shared = shared

    def exchange(self) -> Exchange:
        """A request that has just begun, in the current task."""
        now, utc = time.monotonic(), time.time()
        # Ids grow with time, so that the log's index over them grows at its end.
        id = f"req_{int(utc * 1000):012x}{self._rng.getrandbits(48):012x}"
        task = asyncio.current_task(self.providers.loop)
        assert task is not None
        return Exchange(id, now, utc, now + self._budget_s, task, self._wait_max_s)

    async def answer(self, exchange: Exchange, dialect: Dialect, client: Client, send: Send) -> None:
        """Serve a parsed exchange to its end. Raises GatewayError while nothing has been sent."""
        chat = exchange.chat
        assert chat is not None
        exchange.id_headers = dialect.id_headers
        self.running.add(exchange)
        exchange.delivery = delivery = Delivery(
            send,
            dialect.encoder(chat, exchange.utc),
            partial(route_headers, exchange),
            self.providers.loop,
            self._heartbeat_s,
            self._first_heartbeat_s,
        )
        if chat.stream:
            delivery.keep_alive()
            if self.settings.rescue and exchange.rescue:
                exchange.resuming = Resuming(chat, self._rescue_after_s)
        try:
            try:
                last = await unless_gone(client, exchange.task, self._work(exchange, chat, delivery))
            except asyncio.CancelledError:
                last = stopped(delivery)
            finally:
                delivery.rest()
            try:
                await delivery.finish(last)
            except asyncio.CancelledError:  # its client takes nothing any more; for the provider all has been settled
                return
        except ClientGone:
            exchange.status = "cancelled"
        except Exception:  # a refusal, or a defect of ours, for which its attempt was called off
            exchange.status = "error"
            raise
        finally:
            self.running.discard(exchange)
            exchange.delivery, exchange.begun = None, delivery.started
            self._journal.ended(exchange)
            self.explanations.keep(exchange)

    def _work(self, exchange: Exchange, chat: Chat, delivery: Delivery) -> Coroutine[Any, Any, bytes | None]:
        """What has to be done for this request; gives the last bytes of the answer."""
        if chat.answered is not None:
            return self._told(exchange, chat.answered, chat, delivery)
        if self.recall is None:
            return self._run(exchange, chat, delivery)
        return self.recall.serve(exchange, chat, delivery, lambda: self._run(exchange, chat, delivery))

    async def _told(self, exchange: Exchange, answered: bytes, chat: Chat, delivery: Delivery) -> bytes:
        exchange.status = "success"  # what needs no provider leaves no row: statistics and limits are about providers
        if chat.stream:
            await delivery.begin_stream()
        else:
            await delivery.begin_whole(len(answered))
        return answered

    async def _run(self, exchange: Exchange, chat: Chat, delivery: Delivery) -> bytes | None:
        """The one loop. Gives the last bytes of the answer, when its provider has been let go of already; None where
        the client is told best by a connection that breaks off. Raises GatewayError while nothing has been sent."""
        try:
            if self.shared is not None:
                await self.shared.recall(exchange.session)
            plan = self._plan(exchange, chat)
            while (route := await self._next_route(exchange, plan)) is not None:
                exchange.current = running = self._start(exchange, plan, route, chat)
                try:
                    if not await running.attempt.open(self._hedging.late_at(running.attempt, chat.need)):
                        running = await self._joined(exchange, plan, running, chat)
                    self._committed(exchange, plan, running)
                    last = await self._relay(exchange, running, delivery)
                    attempt = running.attempt
                    attempt.outcome = Answered(cut_short(attempt.tally, attempt.chat, attempt.route.model))
                    return last
                except UpstreamError as error:
                    failed = judged(exchange.current, error)
                except Exception as error:
                    called_off(exchange.current, error)
                    raise
                finally:
                    if exchange.current is not None:
                        running = self._settled(exchange)
                if not self._goes_on(exchange, plan, running, failed):
                    return self._lost(exchange, delivery)
            if exchange.broken is not None:
                return self._lost(exchange, delivery)
            raise self._journal.exhausted(exchange, plan, chat)
        except GatewayError as error:
            if not delivery.streams:
                raise
            return delivery.fail(error)

    async def _joined(self, exchange: Exchange, plan: Plan, first: Running, chat: Chat) -> Running:
        """An answer that is late: a second route joins, where one may (SPEC 15). Gives the attempt that has begun to
        answer. Raises UpstreamError."""
        second = self._second_route(exchange, plan, first)
        if second is None or (self.shared is not None and not await self._granted(second, self.shared)):
            await first.attempt.open()
            return first
        return await self._race(exchange, plan, self._start(exchange, plan, second, chat, hedge=True))

    async def _relay(self, exchange: Exchange, running: Running, delivery: Delivery) -> bytes:
        """Send the answer as it arrives; gives its last bytes, with which the events go out that came last."""
        attempt, encoder, resuming = running.attempt, delivery.encoder, exchange.resuming
        if attempt.completion is not None:
            body = encoder.whole(attempt.completion)
            await delivery.begin_whole(len(body))
            return body
        await delivery.begin_stream()
        body, longest_s = b"", self._first_token_s
        quiet_s: Callable[[], float] = partial(float, longest_s)
        if resuming is not None:
            quiet_s = partial(resuming.quiet_s, running.resumption, longest_s)

        def forward(events: list[Event]) -> Awaitable[None] | None:
            nonlocal body
            if resuming is None:
                body += encoder.feed(events)
            else:
                body += resuming.feed(running.resumption, events, encoder, attempt.route.model)
            if not body or attempt.ended:
                return None
            told, body = body, b""
            return delivery.write(told)

        try:
            await attempt.pour(forward, quiet_s)
            if resuming is None:
                return body + encoder.end(attempt.tally)
            body += resuming.feed(running.resumption, None, encoder, attempt.route.model)
            return body + encoder.end(resuming.told(attempt.tally))
        except UpstreamError:
            if body and (waiting := delivery.write(body)) is not None:  # whoever goes on takes it for delivered
                await waiting
            raise

    async def _race(self, exchange: Exchange, plan: Plan, second: Running) -> Running:
        """Both go on until one has begun to answer; the other is let go of. Raises UpstreamError when both fail."""
        first, exchange.current = exchange.current, None
        assert first is not None
        tasks = {asyncio.create_task(running.attempt.open()): running for running in (first, second)}
        outcome: Outcome = Cancelled()
        try:
            while True:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                task = next(task for task in tasks if task.done())
                running = exchange.current = tasks.pop(task)
                try:
                    task.result()
                except UpstreamError as error:
                    if not tasks:
                        self.metrics.hedged("failed")
                        raise
                    failed = judged(running, error)
                    self._goes_on(exchange, plan, self._settled(exchange), failed)
                else:
                    outcome = LostRace()
                    self.metrics.hedged("won" if running is second else "lost")
                    return running
        finally:
            for task, running in tasks.items():
                let_go(task, running.attempt)
                running.attempt.outcome = outcome
                self._books.settle(exchange, running)

    def _settled(self, exchange: Exchange) -> Running:
        """Close the books on the attempt that has ended, however it did."""
        running, exchange.current = exchange.current, None
        assert running is not None
        running.attempt.outcome = running.attempt.outcome or Cancelled()
        self._books.settle(exchange, running)
        return running

    def _goes_on(self, exchange: Exchange, plan: Plan, running: Running, failed: Failed) -> bool:
        """Whether another attempt can follow this failure. Raises GatewayError for what no other route would mend."""
        attempt, error = running.attempt, failed.error
        if failed.blameless:
            self._no_prefill.add(attempt.route.model.id)
            exchange.reask = attempt.route
        elif failed.phase is Phase.MID_STREAM:
            return self._resumes(exchange, plan, running, error)
        elif (
            error.rule.scope is Scope.REQUEST
            and self.settings.content_filter == "propagate"
            and exchange.broken is None
        ):
            raise refusal(exchange.failures)
        else:
            self._note_retry(exchange, plan, attempt, error)
        return True

    def _resumes(self, exchange: Exchange, plan: Plan, running: Running, error: UpstreamError) -> bool:
        """Whether another route may go on with the answer that this one broke off (SPEC 14.1, 14.3)."""
        resuming, resumption, attempt = exchange.resuming, running.resumption, running.attempt
        exchange.broken = exchange.broken or exchange.failures[-1]
        if resuming is None or not resuming.goes_on_after(resumption, attempt.tally, error):
            return False
        if resumption is None or resumption.seam.joined:  # it has been at work on the answer
            now = time.monotonic()
            failed_at = inf if exchange.pause_s(now) is None else now
            plan.continue_like(attempt.route, failed_at, self.router.has_other_keys(plan, attempt.route))
        plan.grow(resuming.need, resuming.tokens_min)
        return True

    def _lost(self, exchange: Exchange, delivery: Delivery) -> bytes | None:
        """The last bytes of a stream that broke and was not mended: the client is told in the stream (SPEC 8.5)."""
        assert exchange.broken is not None
        if exchange.resuming is not None and exchange.drill is None:
            self.metrics.rescued("lost")
        return delivery.fail(exchange.broken.in_mid_stream())

    def _plan(self, exchange: Exchange, chat: Chat) -> Plan:
        now, auto = time.monotonic(), chat.need.pinned is None
        self.router.ledger.utc_offset_s = time.time() - now
        self.protection.sessions.arrived(exchange.session, now)
        standing = self.protection.standing(exchange.session, now, auto=auto)
        try:
            self._hedging.arrived()
            drilled = exchange.drill is not None
            exchange.plan = plan = self.router.plan(chat.need, standing, now, self._rng, rehearsal=drilled)
        except GatewayError as error:
            exchange.moment = self.router.moment(Plan(chat.need), now)
            if not isinstance(error, NoProviders):
                raise
            raise self._journal.exhausted(exchange, Plan(chat.need), chat) from None
        if drilled:
            plan.trial = None  # of which no gate would hear
        exchange.moment = self.router.moment(plan, now)
        plan.attempts_left = self._attempts_max
        plan.reserve = min(LAST_ATTEMPTS, self._attempts_max // 5)
        plan.patient = exchange.wait_max_s > 0
        return plan

    def _next_route(self, exchange: Exchange, plan: Plan) -> Awaitable[Route | None]:
        """The next attempt's route."""
        if self.shared is None:
            return self._free_route(exchange, plan)
        return self._granted_route(exchange, plan, self.shared)

    async def _granted_route(self, exchange: Exchange, plan: Plan, shared: Shared) -> Route | None:
        """The same with its capacity and its trial granted, where other gateways share them."""
        while (route := await self._free_route(exchange, plan)) is not None:
            if await self._granted(route, shared):
                break
        return route

    async def _granted(self, route: Route, shared: Shared) -> bool:
        granted = False
        try:
            granted = await shared.admits(route)
        finally:  # also where its client has left
            if not granted:
                self.router.give_back(route)
                shared.trial_ended(route.model.id)
        return granted

    async def _free_route(self, exchange: Exchange, plan: Plan) -> Route | None:
        """The best route that is left, within the limits of attempts and time; waits for one that is coming back."""
        while True:
            now = time.monotonic()
            if exchange.failures and (
                plan.attempts_left <= 0
                or not exchange.may_ask(1)
                or now >= exchange.deadline
                or request_is_bad(exchange.failures)
            ):
                return None
            if exchange.reask is not None:
                refused, exchange.reask = exchange.reask, None
                if (route := self.router.again(refused, plan.need.tokens, now)) is not None:
                    return route
            if exchange.retry is not None and not self.router.asked_for_left(plan, now):
                return await self._retry(exchange, plan)
            if (route := self.router.next_route(plan, now)) is not None:
                return route
            wait_s, left_s = plan.wait_s, exchange.wait_left_s(now)
            if wait_s is not None and plan.at_any_moment:
                wait_s = min(wait_s, left_s)
            if wait_s is not None and wait_s <= left_s > 0 and not self.waiting.is_full:
                await self._wait(exchange, plan, wait_s)
            elif plan.patient:
                plan.patient = False  # rather in a crowd than not at all
            else:
                return None

    async def _wait(self, exchange: Exchange, plan: Plan, seconds: float) -> None:
        began, catalog = time.monotonic(), self.router.catalog
        if exchange.waiting_since is None:
            exchange.waiting_since = began
        try:
            await self.waiting.wait(exchange.id, exchange.waiting_since, began, seconds)
        finally:
            exchange.waited_s += (now := time.monotonic()) - began
        if self.router.catalog is not catalog:  # the operator has changed what there is
            standing = self.protection.standing(exchange.session, now, auto=plan.need.pinned is None)
            self.router.renew(plan, standing, now, self._rng)

    async def _retry(self, exchange: Exchange, plan: Plan) -> Route | None:
        """The pinned route once more, when its time has come (SPEC 5.1)."""
        assert exchange.retry is not None
        route, at = exchange.retry
        exchange.retry, exchange.retried = None, True
        while (now := time.monotonic()) < at and not self.waiting.is_full:
            await self._wait(exchange, plan, at - now)
        again = self.router.again(route, plan.need.tokens, now) if now >= at else None
        return again or self.router.next_route(plan, now)

    def _note_retry(self, exchange: Exchange, plan: Plan, attempt: Attempt, error: UpstreamError) -> None:
        pause_s, now = retry_s(error), time.monotonic()
        if exchange.retried or pause_s is None or attempt.route.model.id not in plan.asked_for:
            return
        if error.failure is Failure.RATE_LIMITED and pause_s > exchange.wait_left_s(now):
            return
        exchange.retry = attempt.route, now + pause_s

    def _start(self, exchange: Exchange, plan: Plan, route: Route, chat: Chat, *, hedge: bool = False) -> Running:
        """One more attempt, on its way to its provider once it is opened."""
        exchange.attempts += 1
        plan.attempts_left = self._attempts_max - exchange.attempts
        exchange.route = route
        resumption: Resumption | None = None
        if exchange.broken is not None and exchange.resuming is not None:
            resumption = exchange.resuming.resumption(route.model, prefill=route.model.id not in self._no_prefill)
            chat = resumption.asked.chat
        attempt: Attempt
        if exchange.drill is not None and exchange.attempts == 1:
            attempt = DrilledAttempt(self.providers, route, chat, exchange.attempts, drill=exchange.drill)
        else:
            attempt = Attempt(self.providers, route, chat, exchange.attempts)
        if resumption is not None and self._is_replaceable(exchange, plan, route):
            attempt.hurry(self._rescue_after_s)
        active = self.protection.begin(exchange.session, route.model.platform.id, route.model.id, attempt.started)
        return Running(attempt, active, self._journal.skipped(plan), resumption, hedge)

    def _is_replaceable(self, exchange: Exchange, plan: Plan, route: Route) -> bool:
        """Whether another model could go on with the answer, should this one not begin: its client has been waiting in
        the middle of it (SPEC 14.2). One that has failed in this request, or rests, is no better than a slow one."""
        now = time.monotonic()
        if plan.attempts_left <= 0 or not exchange.may_ask(1) or now + self._rescue_after_s >= exchange.deadline:
            return False
        return self.router.has_fresh_other(plan, route, now)

    def _second_route(self, exchange: Exchange, plan: Plan, first: Running) -> Route | None:
        """The route that joins one that is late, within the limits of attempts and time."""
        if exchange.attempts >= self._attempts_max or time.monotonic() >= exchange.deadline or not exchange.may_ask(2):
            return None
        return self._hedging.second_route(plan, first.attempt.route)

    def _committed(self, exchange: Exchange, plan: Plan, running: Running) -> None:
        attempt, now = running.attempt, time.monotonic()
        model = attempt.route.model
        self._books.committed(attempt)
        attempt.ttfb_ms = round((now - attempt.started) * 1000)
        exchange.route = attempt.route
        self.protection.used(exchange.session, model.platform.id, model.id, now)
        if exchange.resuming is not None:
            exchange.resuming.begun(partial(self.router.has_others, plan, attempt.route))
        if exchange.broken is not None:
            exchange.reask = None  # it refused a prefill, and the other in the race did not
            return
        self._hedging.began(model.id, now - attempt.started, stream=attempt.chat.stream)
        exchange.first_event_ms = round((now - exchange.started) * 1000)
        if exchange.delivery is not None:
            exchange.delivery.tally = attempt.tally

    def refuse(self, exchange: Exchange, error: GatewayError) -> None:
        """Log a request that was refused before any attempt."""
        if not exchange.failures:
            self._journal.refused(exchange, error)
