"""One time for all gateways: Redis' own, in ms since 1970. Each host's clock may be wrong by as much as it likes."""

from __future__ import annotations

AHEAD_S_MAX = 366 * 86_400.0  # no rest is longer: a time further off is a mistake of whoever says it


class Clock:
    """Between this process' monotonic seconds and Redis' time."""

    def __init__(self) -> None:
        self._offset_ms = 0.0

    def learn(self, shared_ms: float, now: float) -> None:
        """It was that time there at this moment here."""
        self._offset_ms = shared_ms - now * 1000

    def shared_ms(self, at: float, now: float) -> int:
        return int(min(at, now + AHEAD_S_MAX) * 1000 + self._offset_ms)

    def local(self, shared_ms: float, now: float) -> float:
        return min((shared_ms - self._offset_ms) / 1000, now + AHEAD_S_MAX)
