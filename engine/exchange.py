"""One request's life: attempts until one succeeds, the answer sent, and everything settled exactly once.

There is one attempt loop for every dialect, streaming or not: `Engine._run`. It knows no platform, no level and no wire
format: router.py says where to go, providers.py how to ask, protection.py what a failure costs, settle.py closes the
books.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from math import inf
from random import Random

from adapters.stream import cut_short
from config.settings import Settings
from engine.delivery import Delivery
from engine.drill import DrilledAttempt
from engine.explain import Explanations
from engine.hedging import Hedging
from engine.recall import Recall
from engine.record import Exchange, Running, route_headers, trail
from engine.refusals import exhausted, refusal, request_is_bad
from engine.rescue import Continuation, continuation, refused_prefill
from engine.seam import HELD_S, Seam
from engine.settle import Books, refused_row
from engine.story import Continuable, Story
from engine.waiting import WaitingRoom
from protection import Answered, Cancelled, Failed, Failure, LostRace, Phase, Scope, UpstreamError, retry_s
from providers import Attempt, Providers
from records.database import Store
from records.eventlog import EventLog
from records.metrics import Metrics
from router import Router
from routing.plan import Plan
from routing.route import Route
from routing.standing import Protection
from transport.client import Client, ClientGone, CutShort, Send, Stopping, unless_gone
from wire.chat import Chat, Dialect, Event
from wire.errors import GatewayError, NoProviders

CONTINUATIONS_MAX = 2  # that have brought something (SPEC 14.3); each costs the whole prompt once more


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
        self._books = Books(settings, protection, router, store, log, self.metrics, rng, self.waiting.wake)
        self._attempts_max = settings.max_fallback_attempts
        self._first_token_s = settings.first_token_timeout_ms / 1000
        self._rescue_after_s = min(settings.rescue_after_ms / 1000, self._first_token_s)
        self._hedging = Hedging(router, settings.hedge_percent)
        self._no_prefill: set[int] = set()  # models that have refused a prefill; bounded by the catalogue

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
            if self.settings.rescue and exchange.rescue:
                exchange.story = Story()
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
            if exchange.broken is not None and exchange.status == "success" and exchange.drill is None:
                self.metrics.rescued("whole")
            self._close(exchange)

    async def _serve(self, exchange: Exchange, chat: Chat, delivery: Delivery) -> bytes | None:
        if chat.answered is None:
            if self.recall is None:
                return await self._run(exchange, chat, delivery)
            return await self.recall.serve(exchange, chat, delivery, lambda: self._run(exchange, chat, delivery))
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
                self._begin(exchange, plan, route, chat)
                try:
                    attempt = await self._open(exchange, plan, chat)
                    last = await self._relay(exchange, attempt, delivery)
                    attempt.outcome = Answered(cut_short(attempt.tally, chat, attempt.route.model))
                    return last
                except UpstreamError as error:
                    failed = self._judged(exchange, error)
                finally:
                    running = self._settled(exchange)
                assert running is not None
                if not self._goes_on(exchange, plan, running, failed):
                    return self._lost(exchange, delivery)
            if exchange.broken is not None:
                return self._lost(exchange, delivery)
            raise self._exhausted(exchange, plan, chat)
        except GatewayError as error:
            if not delivery.streams:
                raise
            return delivery.fail(error.message, error.type, error.status)

    async def _open(self, exchange: Exchange, plan: Plan, chat: Chat) -> Attempt:
        """Wait for the answer to begin; where that takes too long, a second route joins (SPEC 15). Raises
        UpstreamError."""
        running = exchange.current
        assert running is not None
        attempt = running.attempt
        late_at = self._hedging.late_at(attempt, chat.need) if exchange.may_ask(2) else inf
        if not await attempt.open(late_at):
            second = self._hedging.second_route(plan, attempt.route)
            if second is None:
                await attempt.open()
            else:
                exchange.current = None
                exchange.current = running = await self._race(
                    exchange, running, self._start(exchange, plan, second, chat)
                )
                attempt = running.attempt
        self._committed(exchange, attempt)
        return attempt

    async def _relay(self, exchange: Exchange, attempt: Attempt, delivery: Delivery) -> bytes:
        """Send the answer as it arrives; gives its last bytes, with which the events go out that came last."""
        encoder, story = delivery.encoder, exchange.story
        if attempt.completion is not None:
            body = encoder.whole(attempt.completion)
            await delivery.begin_whole(len(body))
            return body
        await delivery.begin_stream()
        body = b""
        while (events := await attempt.next_batch(self._quiet_s(exchange))) is not None:
            if exchange.seam is not None:
                body += self._pass_seam(exchange, attempt, delivery, events)
            else:
                if story is not None:
                    story.feed(events)
                body += encoder.feed(events)
            del events  # a slow client would keep them: parsed, they are several times the size
            if body and not attempt.ended:
                await delivery.write(body)
                body = b""
        if exchange.seam is not None:
            body += self._pass_seam(exchange, attempt, delivery, None)
        tally = (
            attempt.tally
            if story is None or exchange.chat is None
            else story.told(attempt.tally, exchange.chat.prompt_tokens)
        )
        return body + encoder.end(tally)

    def _quiet_s(self, exchange: Exchange) -> float:
        """The longest time without a meaningful event that is waited for now."""
        if exchange.seam is not None and not exchange.seam.joined:
            return HELD_S
        if exchange.story is None or exchange.story.calls or exchange.story.refusal:
            return self._first_token_s
        return self._rescue_after_s

    def _pass_seam(self, exchange: Exchange, attempt: Attempt, delivery: Delivery, events: list[Event] | None) -> bytes:
        """What of a continuation's events goes to the client; None stands for its end. Raises UpstreamError where the
        two texts do not fit together."""
        seam, story, body = exchange.seam, exchange.story, b""
        assert seam is not None and story is not None
        was_joined = exchange.continued
        step = seam.end() if events is None else seam.feed(events, time.monotonic())
        if step.events:
            if not was_joined:
                exchange.continued = True
                body = delivery.encoder.resumed(attempt.route.model.label)
            story.feed(step.events)
            body += delivery.encoder.feed(step.events)
        if step.misfit is not None:
            raise UpstreamError(
                Failure.MALFORMED, f"The answer could not be continued here: {step.misfit}.", status=200, ours=True
            )
        return body

    async def _race(self, exchange: Exchange, first: Running, second: Running) -> Running:
        """Both go on until one has begun to answer; the other is let go of. Raises UpstreamError when both fail."""
        tasks = {asyncio.create_task(running.attempt.open()): running for running in (first, second)}
        won = False
        try:
            while True:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                task = done.pop()
                running, error = tasks.pop(task), task.exception()
                if error is None:
                    won = True
                    self.metrics.hedged("won" if running is second else "lost")
                    return running
                if not tasks or not isinstance(error, UpstreamError):
                    exchange.current = running
                    self.metrics.hedged("failed")
                    raise error
                running.attempt.outcome = Failed(error, Phase.BEFORE_STREAM)
                self._books.settle(exchange, running)
        finally:
            for task, running in tasks.items():
                task.cancel()
                await asyncio.wait([task])
                running.attempt.outcome = LostRace() if won else Cancelled()
                self._books.settle(exchange, running)

    def _judged(self, exchange: Exchange, error: UpstreamError) -> Failed:
        """The outcome of the attempt that has just failed."""
        running = exchange.current
        assert running is not None
        attempt = running.attempt
        phase = Phase.BEFORE_STREAM if attempt.ttfb_ms is None else Phase.MID_STREAM
        if exchange.seam is not None and not exchange.seam.joined and error.failure is Failure.STALL:
            error.ours = True  # too long without a seam: it is given up, not blamed
        refused = running.asked is not None and refused_prefill(error, running.asked)
        attempt.outcome = failed = Failed(error, phase, blameless=refused)
        return failed

    def _settled(self, exchange: Exchange) -> Running | None:
        """Close the books on the attempt that has ended, however it did; None where a race has done so already."""
        running, exchange.current = exchange.current, None
        if running is None:
            return None
        running.attempt.outcome = running.attempt.outcome or Cancelled()
        self._books.settle(exchange, running)
        return running

    def _goes_on(self, exchange: Exchange, plan: Plan, running: Running, failed: Failed) -> bool:
        """Whether another attempt can follow this failure. Raises GatewayError for what no other route would mend."""
        attempt, error = running.attempt, failed.error
        if failed.blameless:
            self._no_prefill.add(attempt.route.model.id)
            exchange.retry = attempt.route, time.monotonic()
            return True
        if failed.phase is Phase.MID_STREAM:
            return self._resumes(exchange, plan, running, error)
        if (
            error.rule.scope is Scope.REQUEST
            and self.settings.content_filter == "propagate"
            and exchange.broken is None
        ):
            raise refusal(exchange.failures)
        self._note_retry(exchange, plan, attempt, error)
        return True

    def _resumes(self, exchange: Exchange, plan: Plan, running: Running, error: UpstreamError) -> bool:
        """Whether another route may go on with the answer that this one broke off (SPEC 14.1, 14.3)."""
        story, chat, route = exchange.story, exchange.chat, running.attempt.route
        if exchange.broken is None:
            exchange.broken, exchange.broken_by = error, route.model.platform.name
        if story is None or chat is None:
            return False
        if running.resumed_at is not None and story.chars > running.resumed_at:
            exchange.continuations += 1
        story.attempt_ended(running.attempt.tally)
        filtered = error.failure is Failure.CONTENT_FILTER
        if filtered or exchange.continuations >= CONTINUATIONS_MAX or story.continuable(chat) is Continuable.NO:
            return False
        pause_s, now = exchange.pause_s(time.monotonic()), time.monotonic()
        if exchange.seam is None or exchange.seam.joined:  # it has been at work on the answer
            again = inf if pause_s is None else now + pause_s
            plan.continue_like(route, again, self.router.has_other_keys(plan, route))
        plan.need = replace(chat.need, tokens=chat.need.tokens + story.tokens)
        return True

    def _lost(self, exchange: Exchange, delivery: Delivery) -> bytes | None:
        """The last bytes of a stream that broke and was not mended: the client is told in the stream (SPEC 8.5)."""
        error = exchange.broken
        assert error is not None
        if exchange.story is not None and exchange.drill is None:
            self.metrics.rescued("lost")
        stalled = error.failure is Failure.STALL
        name = "stream_timeout" if stalled else "stream_error"
        words = "stopped sending" if stalled else "failed in the middle of its answer"
        message = f"{exchange.broken_by} {words}. The answer is incomplete; send the request again."
        status = error.status if error.status is not None and error.status >= 400 else 502
        return delivery.fail(message, name, 504 if stalled else status)

    def _plan(self, exchange: Exchange, chat: Chat) -> Plan:
        now, auto = time.monotonic(), chat.need.pinned is None
        self.router.ledger.utc_offset_s = time.time() - now
        self.protection.sessions.arrived(exchange.session, now)
        standing = self.protection.standing(exchange.session, now, auto=auto)
        try:
            self._hedging.arrived()
            exchange.plan = plan = self.router.plan(
                chat.need, standing, now, self._rng, rehearsal=exchange.drill is not None
            )
        except GatewayError as error:
            exchange.moment = self.router.moment(Plan(chat.need), now)
            if not isinstance(error, NoProviders):
                raise
            raise self._exhausted(exchange, Plan(chat.need), chat) from None
        if exchange.drill is not None:
            plan.trial = None  # of which no gate would hear
        exchange.moment = self.router.moment(plan, now)
        plan.attempts_left = self._attempts_max
        return plan

    async def _next_route(self, exchange: Exchange, plan: Plan) -> Route | None:
        """The next attempt's route, within the limits of attempts and time; waits for one that is coming back."""
        while True:
            now = time.monotonic()
            plan.attempts_left = self._attempts_max - exchange.attempts
            if exchange.failures and (
                plan.attempts_left <= 0
                or not exchange.may_ask(1)
                or now >= exchange.deadline
                or request_is_bad(exchange.failures)
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

    def _begin(self, exchange: Exchange, plan: Plan, route: Route, chat: Chat) -> None:
        exchange.current = self._start(exchange, plan, route, chat)

    def _start(self, exchange: Exchange, plan: Plan, route: Route, chat: Chat, *, hedge: bool = False) -> Running:
        """One more attempt, on its way to its provider once it is opened."""
        exchange.attempts += 1
        exchange.route = route
        asked: Continuation | None = None
        resumed_at: int | None = None
        if exchange.broken is not None and exchange.story is not None:
            prefill = route.model.id not in self._no_prefill
            asked = continuation(chat, exchange.story, route.model, prefill=prefill)
            exchange.seam, exchange.continued = Seam(exchange.story, asked), False
            resumed_at = exchange.story.chars
        asking = chat if asked is None else asked.chat
        if exchange.drill is not None and exchange.attempts == 1:
            attempt: Attempt = DrilledAttempt(self.providers, route, asking, exchange.attempts, exchange.drill)
        else:
            attempt = self.providers.attempt(route, asking, exchange.attempts)
        active = self.protection.begin(exchange.session, route.model.platform.id, route.model.id, attempt.started)
        return Running(attempt, active, self._skipped(plan), resumed_at, asked, hedge)

    def _committed(self, exchange: Exchange, attempt: Attempt) -> None:
        now, model = time.monotonic(), attempt.route.model
        attempt.ttfb_ms = round((now - attempt.started) * 1000)
        exchange.route = attempt.route
        self.protection.used(exchange.session, model.platform.id, model.id, now)
        if exchange.broken is not None:
            return
        self._hedging.began(model.id, now - attempt.started, stream=attempt.chat.stream)
        exchange.first_event_ms = round((now - exchange.started) * 1000)
        if exchange.delivery is not None:
            exchange.delivery.tally = attempt.tally
        if exchange.waited_s:
            self.metrics.waited("served")

    def _exhausted(self, exchange: Exchange, plan: Plan, chat: Chat) -> GatewayError:
        """The client's error when nothing is left; counted, and logged for the operator (SPEC 5.4)."""
        now = time.monotonic()
        soonest_s = self.router.soonest_s(plan, now)
        error = exhausted(plan, exchange.failures, stream=chat.stream, retry_after_s=soonest_s)
        if exchange.drill is None:
            self.metrics.exhausted()
        labels = {model.id: model.label for model in plan.complete()}
        pool = {
            "candidates": len(labels),
            "skipped": plan.skipped_labels(),
            "blocked": [f"{labels[id]}={b.reason}" for id, b in plan.blocked.items()],
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
        if exchange.drill is None:
            self.metrics.request(exchange.status, failed - (exchange.status == "error" and failed > 0))
        self.explanations.keep(exchange)
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
