"""When to leave a server alone that does not answer, and when to try it again. `now` is in monotonic seconds."""

from __future__ import annotations

FAILURES_MAX = 5  # in a row; fewer is a hiccup
PAUSE_S, PAUSE_S_MAX = 1.0, 30.0  # until the first trial, doubling with each that fails


class Breaker:
    """Closed: commands go through. Open: none does, but for one trial at a time that its owner makes."""

    def __init__(self) -> None:
        self.closed = True
        self.trial_at = 0.0
        self._failures = 0
        self._failed_at = 0.0
        self._trials_failed = 0

    def succeeded(self) -> bool:
        """Whether this has closed it."""
        self._failures = self._trials_failed = 0
        was_open, self.closed = not self.closed, True
        return was_open

    def failed(self, began: float, now: float) -> bool:
        """Whether this has opened it. What was on its way when another failed says nothing new."""
        if not self.closed or began < self._failed_at:
            return False
        self._failures, self._failed_at = self._failures + 1, now
        if self._failures < FAILURES_MAX:
            return False
        self.open(now)
        return True

    def open(self, now: float) -> None:
        self.closed, self._failures, self._trials_failed = False, 0, 0
        self.trial_at = now + PAUSE_S

    def trial_failed(self, now: float) -> None:
        self._trials_failed += 1
        self.trial_at = now + min(PAUSE_S_MAX, PAUSE_S * 2.0**self._trials_failed)
