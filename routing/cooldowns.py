"""What rests after failures, and until when (SPEC 7.4, 7.9). `now` is in seconds of one monotonic clock."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

TRIAL_SPACING_S = 1.0  # between a failure and the next trial of what rests after it (SPEC 4.10)
COOLDOWNS_MAX = 10_000  # far above models x keys of any laptop's catalogue; a bound, not a budget

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Rest:
    """Something that is better left alone `until` then. A trial is allowed `firm_until` at the earliest, and not before
    TRIAL_SPACING_S after the last failure."""

    until: float
    firm_until: float
    failed_at: float

    def trial_at(self) -> float:
        return min(self.until, max(self.firm_until, self.failed_at + TRIAL_SPACING_S))


class Cooldowns(Generic[K]):
    """What rests, by key. Entries expire by themselves and are pruned when read; the map is bounded."""

    def __init__(self, entries_max: int = COOLDOWNS_MAX) -> None:
        self._rests: dict[K, Rest] = {}
        self._entries_max = entries_max
        self._snapshot: Mapping[K, Rest] | None = None

    def set(self, key: K, until: float, now: float, *, firm: bool = False) -> None:
        """Rest until then after a failure now. A later time already set knew more, so it stays."""
        if until <= now:
            return
        rest = self.get(key, now)
        if rest is None:
            if len(self._rests) >= self._entries_max:
                self._make_room(now)
            rest = Rest(until, 0.0, now)
        firm_until = max(rest.firm_until, until) if firm else rest.firm_until
        self._rests[key] = Rest(max(rest.until, until), firm_until, now)
        self._snapshot = None

    def get(self, key: K, now: float) -> Rest | None:
        if not self._rests or (rest := self._rests.get(key)) is None:
            return None
        if rest.until <= now:
            del self._rests[key]
            self._snapshot = None
            return None
        return rest

    def snapshot(self) -> Mapping[K, Rest]:
        """What rests at this moment; the same object until something changes."""
        if self._snapshot is None:
            self._snapshot = dict(self._rests)
        return self._snapshot

    def restore(self, rests: Mapping[K, Rest]) -> None:
        """Rest what rested when a snapshot was taken, and nothing else."""
        self._rests, self._snapshot = dict(rests), None

    def left(self, key: K, now: float) -> float:
        """Seconds of rest left; 0 when it may be used."""
        rest = self.get(key, now)
        return 0.0 if rest is None else rest.until - now

    def lift(self, key: K, began: float) -> bool:
        """End a rest because of a success that began then; one that was set since knows more."""
        rest = self._rests.get(key)
        if rest is None or rest.failed_at > began:
            return False
        del self._rests[key]
        self._snapshot = None
        return True

    def active(self, now: float) -> Iterator[tuple[K, float]]:
        for key in list(self._rests):
            if left := self.left(key, now):
                yield key, left

    def clear(self) -> None:
        self._rests.clear()
        self._snapshot = None

    def __len__(self) -> int:
        return len(self._rests)

    def _make_room(self, now: float) -> None:
        for key in [key for key, rest in self._rests.items() if rest.until <= now]:
            del self._rests[key]
        if len(self._rests) >= self._entries_max:  # full of live ones: the soonest to end is the least loss
            del self._rests[min(self._rests, key=lambda key: self._rests[key].until)]
