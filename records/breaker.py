"""A breaker in front of a server: while it does not answer, callers are told so at once instead of waiting.

closed --failure--> open --pause is over, one trial--> closed, or open again with twice the pause. `now` is handed in.
A result that began under an earlier state is dropped: what failed late must not shut what has just come back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

PAUSE_S = 0.5  # before the first trial
PAUSE_S_MAX = 5.0  # rows are waiting meanwhile, and a trial costs one connection


@dataclass(frozen=True, slots=True)
class Pass:
    """Leave to call the server. Hand it back with the result."""

    state: int


class Breaker:
    """Used by several threads; what it says is said once for each change of state."""

    def __init__(self, trial_s: float) -> None:
        """`trial_s`: for how long, at most, a trial runs, during which nobody else gets through."""
        self._trial_s = trial_s
        self._lock = threading.Lock()
        self._state = 0  # odd: open
        self._pause_s = PAUSE_S
        self._next_trial = 0.0
        self.why = ""  # it is open, or was last
        self._listeners: list[Callable[[bool, str], None]] = []

    @property
    def is_closed(self) -> bool:
        return self._state % 2 == 0

    def on_turn(self, say: Callable[[bool, str], None]) -> None:
        """`say(True, "")` when it closes, `say(False, why)` when it opens; on the thread whose result it was."""
        self._listeners.append(say)

    def enter(self, now: float) -> Pass | None:
        """None while the server is taken to be away."""
        with self._lock:
            if not self.is_closed:
                if now < self._next_trial:
                    return None
                self._next_trial = now + self._trial_s
            return Pass(self._state)

    def worked(self, given: Pass) -> None:
        with self._lock:
            if given.state != self._state or self.is_closed:
                return
            self._state += 1
            self._pause_s = PAUSE_S
        self._say(True, "")

    def failed(self, given: Pass, why: str, now: float) -> None:
        with self._lock:
            if given.state != self._state:
                return
            news = self.is_closed
            self.why = why
            if news:
                self._state += 1
            else:
                self._pause_s = min(2 * self._pause_s, PAUSE_S_MAX)
            self._next_trial = now + self._pause_s
        if news:
            self._say(False, why)

    def _say(self, up: bool, why: str) -> None:
        for say in self._listeners:
            say(up, why)
