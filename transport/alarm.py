"""Limits for waits that come one after another, all by one timer."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

CLOCK_STEP_S = 0.002  # uvloop's clock counts whole milliseconds, and its timers may fire in the one before
FREE_MAX = 256  # alarms that wait for their next owner: as many requests as are often served at once; 200 bytes each


class Alarm:
    """`with alarm.until(when):` raises TimeoutError where the block still waits then, by the loop's clock.

    What asyncio.timeout_at does, for many waits in a row. That one makes a timer for each and takes it back: 8 to 15 us
    a time (measured beside a request that costs 250), and a stream waits before each chunk. Here the timer stays while
    the limit moves on, and is set anew where it goes off too early. One task at a time.
    """

    __slots__ = ("_cancelling", "_due", "_loop", "_rang", "_task", "_timer", "_when")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._due = self._when = 0.0  # when the timer goes off, and when it should
        self._task: asyncio.Task[Any] | None = None  # that waits
        self._rang = False
        self._cancelling = 0  # how often others had asked that task to end before

    def until(self, when: float) -> Self:
        self._when = when
        return self

    def __enter__(self) -> None:
        task = self._task = asyncio.current_task(self._loop)
        assert task is not None
        self._cancelling = task.cancelling()
        if self._timer is not None and self._when < self._due:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:
            self._set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self._rang:
            self._rang = False
            assert task is not None
            if task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
                raise TimeoutError from error

    @property
    def waits(self) -> bool:
        """Whether a task is within its block."""
        return self._task is not None

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self) -> None:
        self._due = self._when
        self._timer = self._loop.call_at(self._when, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._task is None:  # nobody waits: the next who does sets it
            return
        if self._loop.time() < self._when:
            self._set()
        else:
            self._rang = True
            self._task.cancel()


class Alarms:
    """Alarms for those who wait only now and then, with their timers still set: most go to the next one, whose limit is
    later, and are set no more often than they go off."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._free: list[Alarm] = []

    def take(self) -> Alarm:
        return self._free.pop() if self._free else Alarm(self._loop)

    def give_back(self, alarm: Alarm) -> None:
        """One that its owner will not use again; stopped where nobody else may, or too many are free."""
        if alarm.waits or len(self._free) >= FREE_MAX:  # a task that has been cancelled may still be within its block
            alarm.stop()
        else:
            self._free.append(alarm)
