"""Drills: the first attempt of a request is broken on purpose, inside the gateway (SPEC 14.10).

A drilled attempt is an attempt like any other whose provider seems to fail, so everything around it does what it would
do on a bad day: failover, rescue, waiting, the client's stream. What a drill costs ends with its request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from math import inf

from msgspec import field

from adapters.answers import note
from config.settings import spelled
from protection import Failure, UpstreamError
from providers import Attempt, Into
from wire.chat import Event, Tally
from wire.errors import InvalidRequest

WORDS = "This is a drill: the gateway broke this attempt itself."
CALLS_MAX = 2  # of one case of a whole drill (SPEC 21.5)


class Break(StrEnum):
    """How the provider seems to fail."""

    CUT = "cut"  # the connection ends after so many meaningful events
    STALL = "stall"  # nothing more comes after them
    ERROR = "error"  # an error event comes after them
    RATE_LIMITED = "429"  # these three instead of an answer
    UNAVAILABLE = "503"
    EMPTY = "empty"


COUNTED = (Break.CUT, Break.STALL, Break.ERROR)
CASES = ("cut=2", "stall=2", "error=2", "429", "503", "empty")  # a whole drill


@dataclass(frozen=True, slots=True)
class Drill:
    """One way of failing, and after how many meaningful events."""

    how: Break
    events: int = 0

    @property
    def asks(self) -> bool:
        """Whether a broken stream calls its provider first."""
        return self.events > 0

    def __str__(self) -> str:
        return f"{self.how}={self.events}" if self.how in COUNTED else str(self.how)


def parse_drill(text: str) -> Drill:
    """Reads `X-Drill`. Raises InvalidRequest."""
    name, equals, number = (part.strip().lower() for part in text.partition("="))
    events = spelled(number) if equals else 0
    if name in COUNTED and equals and events is not None:
        return Drill(Break(name), events)
    if name in frozenset(Break) and name not in COUNTED and not equals:
        return Drill(Break(name))
    message = "A drill is written cut=N, stall=N, error=N, 429, 503 or empty."
    raise InvalidRequest(message, param="X-Drill", code="invalid_value")


class DrilledAttempt(Attempt, kw_only=True):
    """An attempt that fails as the drill says. It asks its provider only where something is to be said before that."""

    drill: Drill
    _said: Tally = field(default_factory=Tally)  # what was passed on
    _counted: Tally = field(default_factory=Tally)  # what came up to the break
    _over: int = 0  # meaningful events that came

    async def open(self, late_at: float = inf) -> bool:
        if self.drill.events and not self._whole:
            return await super().open(late_at)
        if self.drill.how is not Break.STALL:
            raise failure(self.drill.how)
        limit = self._limit()
        await asyncio.sleep(max(0.0, min(limit, late_at) - self.providers.clock()))
        if late_at < limit:
            return False
        raise UpstreamError(Failure.TIMEOUT if self._whole else Failure.STALL, WORDS, status=504)

    async def pour(self, into: Into, quiet_s: Callable[[], float]) -> None:
        def up_to_the_break(events: list[Event]) -> Awaitable[None] | None:
            passed = self._up_to_the_break(events)
            if self._over < self.drill.events:
                return into(passed)
            self._forget_the_rest()
            return self._break(into(passed), quiet_s)

        await super().pour(up_to_the_break, quiet_s)

    async def _break(self, waiting: Awaitable[None] | None, quiet_s: Callable[[], float]) -> None:
        if waiting is not None:
            await waiting
        if self.drill.how is Break.STALL:
            await asyncio.sleep(min(self.providers.timeouts.stall_s, quiet_s()))
        raise failure(self.drill.how)

    def _up_to_the_break(self, events: list[Event]) -> list[Event]:
        passed = events
        for index, event in enumerate(events):
            self._over += note(event, self._counted)
            if self._over >= self.drill.events:
                passed = events[: self._before_half_a_call(events, index)]
                break
        for event in passed:
            note(event, self._said)
        return passed

    def _before_half_a_call(self, events: list[Event], last: int) -> int:
        """How many of these the client gets where this is the last that came. A call that the break goes through would
        not have come to its end, so nothing of it goes out where calls go out whole (SPEC 14.7)."""
        places = {piece.get("index") for piece in events[last].delta.get("tool_calls") or ()}
        if not (places and self.providers.whole_calls):
            return last + 1
        while last and places & {piece.get("index") for piece in events[last - 1].delta.get("tool_calls") or ()}:
            last -= 1
        return last

    def _forget_the_rest(self) -> None:
        """What was read beyond the break has never come."""
        tally, said = self.tally, self._said
        tally.finish, tally.usage, tally.usage_object, tally.usage_raw = None, None, None, None
        tally.text_chars, tally.has_text, tally.has_tool_calls = said.text_chars, said.has_text, said.has_tool_calls
        self.ended = False


def failure(how: Break) -> UpstreamError:
    """What the engine is told of a broken attempt."""
    match how:
        case Break.RATE_LIMITED:
            return UpstreamError(Failure.RATE_LIMITED, WORDS, status=429)
        case Break.UNAVAILABLE:
            return UpstreamError(Failure.SERVER_ERROR, WORDS, status=503)
        case Break.EMPTY:
            return UpstreamError(Failure.EMPTY, WORDS, status=200)
        case Break.STALL:
            return UpstreamError(Failure.STALL, WORDS, status=504)
        case Break.ERROR:
            return UpstreamError(Failure.SERVER_ERROR, WORDS, status=500)
        case Break.CUT:
            return UpstreamError(Failure.CONNECTION, WORDS)
