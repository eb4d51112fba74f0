"""Requests that wait for a route to come back (SPEC 5.5). `now` is in monotonic seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

WAITING_MAX = 1_000  # SPEC 5.5; each holds its request's body in memory
WOKEN_AT_ONCE = 16  # the others follow: each look costs some 30 µs, and what comes back is spared a stampede
WOKEN_EVERY_S = 0.005
CLOCK_STEP_S = 0.001  # timers are not finer


@dataclass(slots=True)
class Waiter:
    """One request that waits: since when, and when it looks again at the latest."""

    request_id: str
    since: float
    eta: float
    woken: asyncio.Event = field(default_factory=asyncio.Event)


class WaitingRoom:
    """Waiters look again when their own time has come, or when something has changed for all: in order of arrival, a
    few at a time. A round of looks is finished before the next begins, so that those at the front do not keep those
    at the end, who may need something else, from ever looking."""

    def __init__(self, waiters_max: int = WAITING_MAX) -> None:
        self._waiters_max = waiters_max
        self._waiters: dict[str, Waiter] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0  # by the loop's clock; a uvloop handle that has just fired does not know any more
        self._round = False  # some are due that have not been woken yet
        self._again = False  # and something has changed since the round began

    def __len__(self) -> int:
        return len(self._waiters)

    @property
    def is_full(self) -> bool:
        return len(self._waiters) >= self._waiters_max

    async def wait(self, request_id: str, since: float, now: float, seconds: float) -> None:
        """Until `seconds` have passed or `wake` was called. A request that waits again keeps its place by `since`."""
        waiter = self._waiters[request_id] = Waiter(request_id, since, now + seconds)
        self._set_timer(seconds)
        try:
            await waiter.woken.wait()
        finally:
            del self._waiters[request_id]

    def wake(self) -> None:
        """Something has come back: all look again."""
        if self._round:
            self._again = True
        elif self._waiters:
            now = time.monotonic()
            for waiter in self._waiters.values():
                waiter.eta = min(waiter.eta, now)
            self._ring()

    def waiters(self) -> Iterator[Waiter]:
        yield from self._waiters.values()

    def _set_timer(self, seconds: float) -> None:
        """Ring then, or sooner if that was the plan already."""
        loop = asyncio.get_running_loop()
        at = loop.time() + max(CLOCK_STEP_S, seconds)
        if self._timer is None or at < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._timer_at = loop.call_at(at, self._ring), at

    def _ring(self) -> None:
        """Wake the first of those whose time has come."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = time.monotonic()
        asleep = [waiter for waiter in self._waiters.values() if not waiter.woken.is_set()]
        due = sorted((waiter for waiter in asleep if waiter.eta <= now), key=lambda waiter: waiter.since)
        for waiter in due[:WOKEN_AT_ONCE]:
            waiter.woken.set()
        self._round = len(due) > WOKEN_AT_ONCE
        if self._round:
            self._set_timer(WOKEN_EVERY_S)
            return
        if self._again:
            self._again = False
            for waiter in asleep:
                waiter.eta = min(waiter.eta, now)
            self._set_timer(WOKEN_EVERY_S)
        elif later := [waiter.eta for waiter in asleep if waiter.eta > now]:
            self._set_timer(min(later) - now)
