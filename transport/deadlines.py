"""Limits on waits, all of them kept by one timer.

asyncio's own timeouts set a timer for each wait and take it back again, which costs more than most waits themselves
(a stream waits once for every chunk). Nearly every wait ends long before its limit, so a limit here is only a number,
and one timer stands at the earliest of them.
"""

from __future__ import annotations

import asyncio
from math import inf
from types import TracebackType
from typing import Any, Self


class Deadlines:
    """All limits of one event loop. Belongs to whoever made it, for as long as the loop runs."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.now = self._loop.time
        self._limits: set[Limit] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.fires_at = inf  # when the timer looks next; never later than the earliest limit

    def limit(self) -> Limit:
        """A limit on what the current task waits for, now and later. Whoever asked for it closes it."""
        limit = Limit(self)
        self._limits.add(limit)
        return limit

    def look_at(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.fires_at = due
        self._timer = self._loop.call_at(due, self._look)

    def forget(self, limit: Limit) -> None:
        self._limits.discard(limit)

    def _look(self) -> None:
        self._timer = None
        now, soonest = self.now(), inf
        for limit in self._limits:
            if limit.due <= now:
                limit.expire()
            elif limit.due < soonest:
                soonest = limit.due
        self.fires_at = inf
        if soonest < inf:
            self.look_at(soonest)


class Limit:
    """One task's limit: cancels it once `due` has passed. Used for one wait after another, never for two at once.

    As in `with limit.within(seconds):`, whose block then ends with TimeoutError; or with `set` and `passed` where even
    that would cost too much.
    """

    __slots__ = ("_cancelling", "_deadlines", "_expired", "due", "task")

    def __init__(self, deadlines: Deadlines) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task: asyncio.Task[Any] = task
        self.due = inf  # nobody waits
        self._deadlines = deadlines
        self._cancelling = task.cancelling()
        self._expired = False

    def within(self, seconds: float) -> Self:
        self.set(self._deadlines.now() + seconds)
        return self

    def set(self, due: float) -> None:
        """The moment, by the loop's clock, from which on the wait has taken too long."""
        self.due = due
        if due < self._deadlines.fires_at:
            self._deadlines.look_at(due)

    def expire(self) -> None:
        self.due = inf
        self._expired = True
        self.task.cancel()

    def passed(self) -> bool:
        """In a handler of CancelledError: whether this limit is the reason, and nobody else has cancelled too."""
        if not self._expired:
            return False
        self._expired = False
        return self.task.uncancel() <= self._cancelling

    def close(self) -> None:
        self._deadlines.forget(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.due = inf
        if self._expired and self.passed() and kind is asyncio.CancelledError:
            raise TimeoutError from error
