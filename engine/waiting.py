"""Requests that wait for a route to come back (SPEC 5.5). `now` is in monotonic seconds."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

WAITING_MAX = 1_000  # SPEC 5.5; each holds its request's body in memory


@dataclass(slots=True)
class Waiter:
    """One request that waits: since when, and when it expects to go on."""

    request_id: str
    since: float
    eta: float
    woken: asyncio.Event


class WaitingRoom:
    """Waiters in order of arrival. Each goes on when its own time has come, or when something has changed for all."""

    def __init__(self, waiters_max: int = WAITING_MAX) -> None:
        self._waiters_max = waiters_max
        self._waiters: OrderedDict[str, Waiter] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiters)

    @property
    def is_full(self) -> bool:
        return len(self._waiters) >= self._waiters_max

    async def wait(self, request_id: str, since: float, now: float, seconds: float) -> None:
        """Until `seconds` have passed or `wake` was called. A request that waits again keeps its place by `since`."""
        waiter = Waiter(request_id, since, now + seconds, asyncio.Event())
        self._waiters[request_id] = waiter
        try:
            async with asyncio.timeout(seconds):
                await waiter.woken.wait()
        except TimeoutError:
            pass
        finally:
            del self._waiters[request_id]

    def wake(self) -> None:
        """Something has come back: all look again, those that arrived first before the others."""
        for waiter in sorted(self._waiters.values(), key=lambda waiter: waiter.since):
            waiter.woken.set()

    def waiters(self) -> Iterator[Waiter]:
        yield from self._waiters.values()
