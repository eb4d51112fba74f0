"""The books of an attempt, closed exactly once however it ended: outcome, costs, effects, ledger, row, metrics.

`protection.costs` decides; `apply` is the only code that changes state because of an attempt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from random import Random

import orjson

from config.settings import Settings
from engine.record import Ended, Exchange, Running
from engine.refusals import FailedAttempt
from engine.sharing import Shared
from protection import (
    Answered,
    AvoidNext,
    Ban,
    Cancelled,
    ClearKeyPin,
    ClearPin,
    Effect,
    Facts,
    Failed,
    FeedGate,
    KeyStatus,
    LostRace,
    MarkKey,
    Penalise,
    Phase,
    Pin,
    Recover,
    RestKey,
    RestModel,
    Rests,
    Skip,
    SpaceTrials,
    UpstreamError,
    costs,
)
from providers import Attempt
from records.database import Store
from records.eventlog import EventLog
from records.keys import set_key_status
from records.metrics import Metrics
from records.rows import Row
from router import Router
from routing.route import Route, Rung
from routing.standing import Protection
from transport.client import ClientGone
from wire.errors import GatewayError


class Books:
    """Settles attempts. `freed` is called when something has come back that others may be waiting for."""

    def __init__(
        self,
        settings: Settings,
        protection: Protection,
        router: Router,
        store: Store,
        log: EventLog,
        metrics: Metrics,
        rng: Random,
        freed: Callable[[], None],
    ) -> None:
        self._protection = protection
        self._router = router
        self._store = store
        self._log = log
        self._metrics = metrics
        self._rng = rng
        self._freed = freed
        self.shared: Shared | None = None
        self._rests = Rests(settings.transient_cooldown_ms / 1000, settings.rate_limit_cooldown_ms / 1000)

    def settle(self, exchange: Exchange, running: Running) -> None:
        """Let go of the provider and account for one attempt, whose outcome has been set."""
        attempt = running.attempt
        attempt.close()
        self._protection.end(running.active)
        now = time.monotonic()
        route, outcome = attempt.route, attempt.outcome
        assert outcome is not None
        row = self._row(exchange, running, now)
        row.uncounted = self._router.gates.is_open(route.model.id)
        if isinstance(outcome, LostRace):  # its answer is assumed to be billed
            self._router.ledger.keep(route.reservation)
        elif self._router.ledger.settle(route.reservation, (row.input_tokens or 0) + (row.output_tokens or 0)):
            self._freed()
        if isinstance(outcome, Answered):
            row.status, row.http_status = "success", 200
            self._protection.used(exchange.session, route.model.platform.id, route.model.id, now)
        elif isinstance(outcome, Failed):
            error = outcome.error
            error.__traceback__ = error.__context__ = None  # their frames hold this exchange: nothing would be freed
            exchange.failures.append(FailedAttempt(route, error, row.latency_ms or 0))
            row.error_kind, row.http_status, row.error = str(error.failure), error.status, error.message
        elif isinstance(outcome, Cancelled) and outcome.defect is not None:  # `error_kind` names failures of providers
            row.http_status, row.uncounted = 500, True
            row.error = f"The gateway itself failed ({outcome.defect}), not the provider. Its log says where."
        else:
            row.status = "cancelled"
            row.error_kind = "lost_race" if isinstance(outcome, LostRace) else None
        self.charge(exchange, attempt, now)
        if route.trial:
            self._metrics.trial(row.status)
        exchange.status = row.status
        exchange.ended.append(Ended(row, int(route.rung), running.hedge))
        if not row.drill:
            self._metrics.attempt(row)
        self._store.log(row)

    def charge(self, exchange: Exchange, attempt: Attempt, now: float) -> None:
        """Change state by what the attempt's outcome costs, and give its trial back, whatever happens."""
        assert attempt.outcome is not None
        try:
            effects = costs(attempt.outcome, self._facts(exchange, attempt, now), now)
            if exchange.drill is not None:  # it costs its own request alone
                effects = tuple(effect for effect in effects if isinstance(effect, Skip))
            self._apply(effects, exchange, attempt, now)
            if self.shared is not None:
                for effect in effects:
                    self.shared.applied(effect, exchange.session, attempt.route, attempt.started, now)
        finally:
            if attempt.route.trial:
                self._end_trial(attempt.route, failed=isinstance(attempt.outcome, Failed))

    def committed(self, attempt: Attempt) -> None:
        """An attempt has begun to answer: what was tried is back, however long its answer will take."""
        route, now = attempt.route, time.monotonic()
        if self._protection.answered(route.key.id, route.model.id, now):
            self._freed()
        if route.trial:
            self._protection.end_rests(route.key.id, route.model.id, attempt.started, now)
            if self.shared is not None:
                self.shared.applied(Recover(), "", route, attempt.started, now)
            self._end_trial(route, failed=False)

    def _end_trial(self, route: Route, *, failed: bool) -> None:
        """Give a trial back. After one that failed what rests keeps its distance, so nobody needs to look."""
        if self.shared is not None:
            self.shared.trial_ended(route.model.id)
        if self._protection.trials.release(route.model.id, route.tried_at) and (
            not failed or route.rung < Rung.RESTING
        ):
            self._freed()

    def _apply(self, effects: Sequence[Effect], exchange: Exchange, attempt: Attempt, now: float) -> None:
        """Change state by what this attempt costs, and by what a success brings."""
        model, key = attempt.route.model, attempt.route.key
        for effect in effects:
            if isinstance(effect, Recover):
                if self._protection.end_rests(key.id, model.id, attempt.started, now):
                    self._freed()
                self._mark_key(key.id, KeyStatus.HEALTHY)
                self._router.penalties.success(model.id, now)
            elif isinstance(effect, Pin):
                self._protection.sessions.pin(exchange.session, model.id, key.id, now)
            elif isinstance(effect, FeedGate):
                if not effect.ok or self._router.gates.knows(model.id):  # of success nothing else need be remembered
                    self._feed_gate(attempt, effect.ok, now)
            else:
                self._apply_cost(effect, exchange, attempt, now)

    def _apply_cost(self, effect: Effect, exchange: Exchange, attempt: Attempt, now: float) -> None:
        """One thing that a failure costs."""
        model, key, session = attempt.route.model, attempt.route.key, exchange.session
        protection, sessions = self._protection, self._protection.sessions
        match effect:
            case MarkKey(status, error):
                self._mark_key(key.id, status, error)
            case SpaceTrials():
                protection.space_trials(key.id, model.id, now)
            case RestModel(until):
                protection.transient.set(model.id, until, now)
                self._log.write("info", "cooldown", model=model.label)
            case RestKey():
                protection.rest_key(key.id, model.id, effect, now)
            case Skip():
                if exchange.plan is not None:
                    exchange.plan.note_failure(attempt.route, effect, now, exchange.pause_s(now))
            case Ban(reason):
                sessions.ban(session, model.platform.id, reason, now)
                if exchange.plan is not None:
                    exchange.plan.ban(model.platform.id)
                self._log.write("info", "ban", platform=model.platform.id, reason=reason, request_id=exchange.id)
            case ClearPin():
                sessions.clear_model(session, model.id, now)
            case ClearKeyPin():
                sessions.clear_key(session, key.id, now)
            case AvoidNext():
                sessions.avoid_next(session, model.id, now)
            case Penalise():
                self._router.penalties.add(model.id, now)

    def _facts(self, exchange: Exchange, attempt: Attempt, now: float) -> Facts:
        route, plan = attempt.route, exchange.plan
        keys_left = (
            plan is not None and isinstance(attempt.outcome, Failed) and self._router.keys_left(route, plan, now)
        )
        level = self._protection.level(route.model.platform.id)
        strikes = self._protection.strikes.get((route.key.id, route.model.id), 0)
        return Facts(level, keys_left, strikes, self._rests, route.trial)

    def _feed_gate(self, attempt: Attempt, ok: bool, now: float) -> None:
        router, model = self._router, attempt.route.model
        hold = not ok and router.gates_hold(model, now)
        change = router.gates.feed(
            model.id,
            ok=ok,
            rate=router.success_rate(model),
            hold=hold,
            began=attempt.started,
            now=now,
            rng=self._rng,
            trial=attempt.route.trial,
        )
        if change is not None:
            self._log.write("info", f"gate_{change}", model=model.label)
            if change == "closed":
                self._freed()

    def _mark_key(self, key: int, status: KeyStatus, error: str | None = None) -> None:
        """Remember it; tell the database when it is news. A success that began before does not lift invalid."""
        known = self._router.key_status.get(key)
        if not key or known is status or (known is KeyStatus.INVALID and status is KeyStatus.HEALTHY):
            return
        if self._router.set_key_status(key, status):
            self._store.write_later(key, partial(set_key_status, id=key, status=status, last_error=error))

    def _row(self, exchange: Exchange, running: Running, now: float) -> Row:
        attempt = running.attempt
        route, chat, tally = attempt.route, attempt.chat, attempt.tally
        row = Row(
            request_id=exchange.id,
            created_at=exchange.utc + attempt.started - exchange.started,
            platform=route.model.platform.id,
            model_id=route.model.model_id,
            key_id=route.key.id or None,
            requested_model=chat.model or "auto",
            routing_mode=str(chat.need.mode),
            latency_ms=round((now - attempt.started) * 1000),
            ttfb_ms=attempt.ttfb_ms,
            attempt=attempt.number,
            streamed=chat.stream,
            skipped_models=orjson.dumps(running.skipped).decode() if running.skipped else None,
        )
        row.resumed_at = running.resumption.at if running.resumption is not None else None
        row.drill, row.client = exchange.drill is not None, exchange.client
        if exchange.waited_s:
            row.waited_ms = round(exchange.waited_s * 1000)
        if attempt.ttfb_ms is not None:  # it was committed: somebody counted tokens for it
            row.input_tokens = tally.usage.input_tokens if tally.usage else chat.prompt_tokens
            row.output_tokens = tally.output_tokens()
            if tally.malformed:
                self._metrics.malformed(tally.malformed)
        return row


def judged(running: Running | None, error: UpstreamError) -> Failed:
    """The outcome of the attempt that has just failed."""
    assert running is not None
    phase = Phase.BEFORE_STREAM if running.attempt.ttfb_ms is None else Phase.MID_STREAM
    blameless = running.resumption is not None and running.resumption.judge(error)
    running.attempt.outcome = failed = Failed(error, phase, blameless=blameless)
    return failed


def called_off(running: Running | None, error: Exception) -> None:
    """An error that is no provider's has ended this attempt: a defect of ours, unless it is a refusal."""
    if running is not None and not isinstance(error, GatewayError | ClientGone):
        running.attempt.outcome = running.attempt.outcome or Cancelled(type(error).__name__)
