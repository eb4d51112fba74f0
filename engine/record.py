"""`Exchange`: the one mutable record of a request, from its first byte to its last."""

from __future__ import annotations

import asyncio
from itertools import repeat
from typing import Any

from msgspec import Struct

from engine.delivery import Delivery, header_value
from engine.drill import Drill
from engine.refusals import FailedAttempt
from engine.resuming import Resuming, Resumption
from providers import Attempt
from records.rows import Row
from routing.explain import Moment
from routing.plan import Plan
from routing.route import Route
from routing.standing import Active
from wire.chat import Chat


class Running(Struct, frozen=True):
    """What goes with an attempt until it is settled."""

    attempt: Attempt
    active: Active
    skipped: list[str]  # what had been ruled out when it began
    resumption: Resumption | None = None  # it is to go on with an answer that has broken off
    hedge: bool = False  # it joined another that was late


class Ended(Struct):
    """One attempt that is over, for the request's explanation."""

    row: Row
    rung: int
    hedge: bool


class Exchange(Struct, eq=False):
    """One request."""

    id: str
    started: float  # monotonic seconds
    utc: float  # seconds since 1970, at the same moment
    deadline: float  # no new attempt starts after this
    task: asyncio.Task[Any]  # that serves it
    wait_max_s: float  # for routes that are coming back
    session: str = ""
    chat: Chat | None = None
    plan: Plan | None = None
    delivery: Delivery | None = None
    current: Running | None = None  # the attempt that has not been settled yet
    rescue: bool = True  # the client wants a broken answer to be continued
    resuming: Resuming | None = None  # the answer, where that may be
    broken: FailedAttempt | None = None  # what broke it first
    attempts: int = 0  # begun so far
    failures: list[FailedAttempt] = []
    ended: list[Ended] = []
    moment: Moment | None = None  # what it was routed by
    route: Route | None = None  # of the attempt that is running or has answered
    reask: Route | None = None  # to ask at once, in another way: it takes no prefill
    retry: tuple[Route, float] | None = None  # a pinned route to ask once more, and when
    retried: bool = False
    waited_s: float = 0.0
    waiting_since: float | None = None
    drill: Drill | None = None  # its first attempt is broken on purpose; nothing it meets costs anybody else anything
    attempts_max: int | None = None  # fewer than the setting allows
    client: int | None = None  # whose key it came with; None: the gateway's own
    uncached: bool = False  # its client wants no answer from memory
    cache: str | None = None  # `hit` or `miss`; None: nobody looked
    made_by: str = ""  # the label of the model whose answer from memory it is
    begun: bool = False  # the client has been sent a part of the response
    id_headers: tuple[bytes, ...] = (b"x-request-id",)
    status: str = "error"
    first_event_ms: int | None = None

    def begin_drill(self, drill: Drill) -> None:
        """From now on this is a drill: it belongs to no conversation, and neither gives nor takes from memory."""
        self.drill, self.session, self.uncached = drill, "", True

    def wait_left_s(self, now: float) -> float:
        """How much longer it may wait for a route."""
        return min(self.wait_max_s - self.waited_s, self.deadline - now)

    def may_ask(self, more: int) -> bool:
        """Whether so many more attempts are allowed by this request's own limit."""
        return self.attempts_max is None or self.attempts + more <= self.attempts_max

    def pause_s(self, now: float) -> float | None:
        """Before what has failed twice in this request is asked again: the attempts that are left are spread over the
        wait that is left. None where it may not wait, so nothing is asked again."""
        left_s = self.wait_left_s(now)
        if self.wait_max_s <= 0 or left_s <= 0 or self.plan is None:
            return None
        return left_s / max(1, self.plan.attempts_left)


def trail(exchange: Exchange) -> str:
    """Which attempts failed and how: `platform/model=kind; …`."""
    return "; ".join(f"{attempt.route.model.label}={attempt.error.failure}" for attempt in exchange.failures)


def route_headers(exchange: Exchange) -> list[tuple[bytes, bytes]]:
    """The headers that tell how a request was routed (SPEC 3.8)."""
    headers = list(zip(exchange.id_headers, repeat(exchange.id.encode())))
    if exchange.route is not None:
        headers.append((b"x-routed-via", header_value(exchange.route.model.label)))
    elif exchange.made_by:
        headers.append((b"x-routed-via", header_value(exchange.made_by)))
    if exchange.cache is not None:
        headers.append((b"x-cache", exchange.cache.encode()))
    if exchange.failures:
        headers.append((b"x-fallback-attempts", str(len(exchange.failures)).encode()))
        headers.append((b"x-fallback-trail", header_value(trail(exchange))))
    if exchange.waited_s:
        headers.append((b"x-waited-ms", str(round(exchange.waited_s * 1000)).encode()))
    return headers
