"""What the operator reads of requests: a line for each that has ended, one for each for which nothing was left to try,
and the row of one that was refused before any attempt.

The rows of attempts are written where their books are closed (engine/settle.py).
"""

from __future__ import annotations

import time

import orjson

from engine.record import Exchange, trail
from engine.refusals import exhausted
from records.database import Store
from records.eventlog import EventLog, Line
from records.metrics import Metrics
from records.rows import Row
from router import Router
from routing.plan import Plan
from routing.standing import Protection
from wire.chat import Chat
from wire.errors import GatewayError


class RequestLine(Line, kw_only=True):
    """The line of a request that has ended. `route`: `platform/model`; `failures`: the trail of attempts."""

    request_id: str
    model: str | None
    route: str | None
    attempts: int
    failures: str | None
    status: str
    first_event_ms: int | None
    waited_ms: int | None
    total_ms: int


class Journal:
    """Writes of requests. Prompts and answers are never in it."""

    def __init__(self, protection: Protection, router: Router, store: Store, log: EventLog, metrics: Metrics) -> None:
        self._protection = protection
        self._router = router
        self._store = store
        self._log = log
        self._metrics = metrics
        self._tells_reasons = log.wants("debug")

    def exhausted(self, exchange: Exchange, plan: Plan, chat: Chat) -> GatewayError:
        """The client's error when nothing is left; counted, and logged for the operator (SPEC 5.4)."""
        soonest_s = self._router.soonest_s(plan, time.monotonic())
        error = exhausted(plan, exchange.failures, stream=chat.stream, retry_after_s=soonest_s)
        if exchange.drill is None:
            self._metrics.exhausted()
        models = plan.complete()
        labels = {model.id: model.label for model in models}
        pool = {
            "candidates": len(models),
            "skipped": plan.skipped_labels(),
            "blocked": [f"{labels[id]}={blocked.reason}" for id, blocked in plan.blocked.items()],
            "transient_cooldowns": len(self._protection.transient),
            "key_cooldowns": len(self._protection.keys),
        }
        self._log.write(
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

    def refused(self, exchange: Exchange, error: GatewayError) -> None:
        """A request that was refused before any attempt."""
        if exchange.chat is not None:
            skipped = self.skipped(exchange.plan) if exchange.plan is not None else []
            self._store.log(refused_row(exchange, exchange.chat, error.status, error.message, skipped))

    def skipped(self, plan: Plan) -> list[str]:
        """What a request leaves alone; at level debug with each one's reason."""
        if not self._tells_reasons:
            return plan.skipped_labels()
        reasons = self._router.reasons(plan, time.monotonic())
        return [f"{label}: {reason}" for label, reason in reasons.items()]

    def ended(self, exchange: Exchange) -> None:
        """Any request, however it ended."""
        if exchange.drill is None:
            failed = len(exchange.failures)
            self._metrics.request(exchange.status, failed - (exchange.status == "error" and failed > 0))
            if exchange.broken is not None and exchange.status == "success":
                self._metrics.rescued("whole")
        if exchange.waited_s:
            self._metrics.waited(exchange.status)
        chat, route = exchange.chat, exchange.route
        self._log.write_line(
            RequestLine(
                level="info",
                event="request",
                request_id=exchange.id,
                model=chat.model if chat else None,
                route=route.model.label if route else None,
                attempts=exchange.attempts,
                failures=trail(exchange) if exchange.failures else None,
                status=exchange.status,
                first_event_ms=exchange.first_event_ms,
                waited_ms=round(exchange.waited_s * 1000) or None,
                total_ms=round((time.monotonic() - exchange.started) * 1000),
            )
        )


def refused_row(exchange: Exchange, chat: Chat, status: int, message: str, skipped: list[str]) -> Row:
    """The row of a request that was refused before any attempt."""
    row = Row(request_id=exchange.id, created_at=exchange.utc, requested_model=chat.model or "auto")
    row.routing_mode, row.streamed, row.client = str(chat.need.mode), chat.stream, exchange.client
    row.http_status, row.error, row.drill = status, message, exchange.drill is not None
    row.latency_ms = round((time.monotonic() - exchange.started) * 1000)
    row.skipped_models = orjson.dumps(skipped).decode() if skipped else None
    return row
