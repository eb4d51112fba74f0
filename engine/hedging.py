"""Hedging as the engine uses it: how late is late for one attempt, and who joins it (SPEC 15)."""

from __future__ import annotations

import asyncio
import time
from math import inf

from config.settings import Settings
from engine.hedge import DAY_LEFT_MIN, Bounds, HedgeBudget, Latencies
from providers import Attempt
from router import Router
from routing.plan import Plan
from routing.route import Route
from wire.chat import Need


class Hedging:
    """The budget of one gateway, and what it knows of its models' pace."""

    def __init__(self, router: Router, settings: Settings) -> None:
        self._router = router
        self._percent = settings.hedge_percent
        self._budget = HedgeBudget(settings.hedge_percent)
        self._first_tokens = Latencies(Bounds.of_ms(settings.late_first_token_ms))
        self._whole_answers = Latencies(Bounds.of_ms(settings.late_answer_ms))

    def arrived(self) -> None:
        """A request has come."""
        self._budget.earn()

    def began(self, model: int, seconds: float, *, stream: bool) -> None:
        """An answer began after so long; a whole one is all there then."""
        (self._first_tokens if stream else self._whole_answers).add(model, seconds)

    def late_at(self, attempt: Attempt, need: Need) -> float:
        """When this attempt has waited long enough for another to join it, by the event loop's clock."""
        if not self._percent or (need.strict and need.pinned is not None):
            return inf
        latencies = self._first_tokens if attempt.chat.stream else self._whole_answers
        return attempt.began + latencies.late_after_s(attempt.route.model.id)

    def second_route(self, plan: Plan, first: Route) -> Route | None:
        """The route that joins, paid for; None where there is none or no budget."""
        if not self._budget.any_left:
            return None
        route = self._router.second_route(plan, first, time.monotonic(), day_left=DAY_LEFT_MIN)
        if route is not None:
            self._budget.spend()
        return route


def let_go(task: asyncio.Task[bool], attempt: Attempt) -> None:
    """Stop waiting for an attempt that is being settled."""

    def ended(task: asyncio.Task[bool]) -> None:
        attempt.close()  # once more: its connection may have been made in the moment in which it was settled
        if not task.cancelled():
            task.exception()  # it failed in the same moment, which is nobody's affair any more

    task.cancel()
    task.add_done_callback(ended)
