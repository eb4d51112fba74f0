"""What rests after failures, and until when (SPEC 7.4, 7.9). `now` is in seconds of one monotonic clock."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from math import inf, log2
from typing import Generic, TypeVar

TRIAL_SPACING_S = 1.0  # between a failure and the next trial of what rests after it (SPEC 4.10)
FOLLOWERS = 8  # after a failure a provider either works again or does not
FOLLOWERS_LIMITED = 2  # after a rate limit it may have room for a few
RAMP_STEP_S = 0.2  # after a rest twice as many may ask in each …
RAMP_S = 1.2  # … until after this long all 64 of any crowd worth the name may
COOLDOWNS_MAX = 10_000  # far above models x keys of any laptop's catalogue; a bound, not a budget

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Rest:
    """Something that is better left alone `until` then. A trial is allowed `firm_until` at the earliest, and not before
    `spaced_until`, which keeps it apart from the last failure."""

    until: float
    firm_until: float
    failed_at: float
    spaced_until: float

    def trial_at(self) -> float:
        return min(self.until, max(self.firm_until, self.spaced_until))


@dataclass(slots=True)
class Recovery:
    """The first second after a rest: one asks, and `followers` more for each that is answered. A provider that has come
    back with room for a few is not run over by all who have waited for it; one that is slow still gets them all."""

    since: float
    followers: int
    begun: int = 0
    answered: int = 0

    def room_s(self, now: float) -> float:
        """Seconds until one more may ask; 0: now."""
        over = self.begun - self.followers * self.answered
        if over < 2.0 ** ((now - self.since) / RAMP_STEP_S):
            return 0.0
        return max(0.0, self.since + min(RAMP_S, RAMP_STEP_S * log2(over + 1)) - now)


class Cooldowns(Generic[K]):
    """What rests, by key. Entries expire by themselves and are pruned when read; the maps are bounded."""

    def __init__(
        self,
        entries_max: int = COOLDOWNS_MAX,
        spacing_s: float = TRIAL_SPACING_S,
        followers: int = FOLLOWERS,
    ) -> None:
        # Looked at to see whether there are any, which is rare; changed by the methods alone.
        self.rests: dict[K, Rest] = {}
        self._proved: dict[K, float] = {}  # when it last answered right after a rest; bounded like the rests
        self.recovering: dict[K, Recovery] = {}  # as long as RAMP_S
        self._cleared_at = -inf
        self._entries_max = entries_max
        self._spacing_s = spacing_s
        self._followers = followers
        self._snapshot: Mapping[K, Rest] | None = None

    def set(self, key: K, until: float, now: float, *, firm: bool = False) -> None:
        """Rest until then after a failure now. A later time already set knew more, so it stays."""
        if until <= now:
            return
        rest = self.get(key, now)
        if rest is None:
            if len(self.rests) >= self._entries_max:
                self._make_room(now)
            rest = Rest(until, 0.0, now, now)
            self.recovering.pop(key, None)
        firm_until = max(rest.firm_until, until) if firm else rest.firm_until
        self.rests[key] = Rest(max(rest.until, until), firm_until, now, now + self._spacing_s)
        self._snapshot = None

    def merge(self, key: K, told: Rest, now: float) -> None:
        """Rest as another gateway says, too: of each time the later one holds."""
        if told.until <= now:
            return
        if (rest := self.get(key, now)) is None:
            if len(self.rests) >= self._entries_max:
                self._make_room(now)
            self.recovering.pop(key, None)
            rest = told
        self.rests[key] = Rest(
            max(rest.until, told.until),
            max(rest.firm_until, told.firm_until),
            max(rest.failed_at, told.failed_at),
            max(rest.spaced_until, told.spaced_until),
        )
        self._snapshot = None

    def failed(self, key: K, now: float) -> None:
        """A failure now keeps the next trial of what rests at a distance, even one that by itself rests nothing."""
        if (rest := self.get(key, now)) is not None:
            self.set(key, rest.until, now)

    def get(self, key: K, now: float) -> Rest | None:
        if not self.rests or (rest := self.rests.get(key)) is None:
            return None
        if rest.until <= now:
            del self.rests[key]
            self._recover(key, Recovery(rest.until, self._followers))
            self._snapshot = None
            return None
        return rest

    def snapshot(self) -> Mapping[K, Rest]:
        """What rests at this moment; the same object until something changes."""
        if self._snapshot is None:
            self._snapshot = dict(self.rests)
        return self._snapshot

    def restore(self, rests: Mapping[K, Rest]) -> None:
        """Rest what rested when a snapshot was taken, and nothing else."""
        self.rests, self._snapshot = dict(rests), None

    def left(self, key: K, now: float) -> float:
        """Seconds of rest left; 0 when it may be used."""
        rest = self.get(key, now)
        return 0.0 if rest is None else rest.until - now

    def lift(self, key: K, began: float, now: float) -> bool:
        """End a rest because of a success that began then; one that was set since knows more."""
        rest = self.rests.get(key)
        if rest is None or rest.failed_at > began:
            return False
        del self.rests[key]
        self._snapshot = None
        self._recover(key, Recovery(now, self._followers, begun=1, answered=1))
        self._prove(key, now)
        return True

    def proved_since(self, key: K, then: float) -> bool:
        """Whether what had rested has answered since then, or the operator says so: what failed before has passed."""
        return max(self._cleared_at, self._proved.get(key, -inf)) > then

    def room_s(self, key: K, now: float) -> float:
        """Seconds until what has just rested may be asked once more; 0: now."""
        recovery = self._recovery(key, now)
        return 0.0 if recovery is None else recovery.room_s(now)

    def begun(self, key: K, now: float) -> None:
        """One more asks."""
        if (recovery := self._recovery(key, now)) is not None:
            recovery.begun += 1

    def answered(self, key: K, now: float) -> bool:
        """One was answered; whether that has made room for others."""
        if (recovery := self._recovery(key, now)) is None:
            return False
        recovery.answered += 1
        self._prove(key, now)
        return True

    def active(self, now: float) -> Iterator[tuple[K, float]]:
        for key in list(self.rests):
            if left := self.left(key, now):
                yield key, left

    def clear(self, now: float) -> None:
        self.rests.clear()
        self.recovering.clear()
        self._cleared_at = now
        self._snapshot = None

    def __len__(self) -> int:
        return len(self.rests)

    def _recovery(self, key: K, now: float) -> Recovery | None:
        if not self.recovering or (recovery := self.recovering.get(key)) is None:
            return None
        if recovery.since + RAMP_S <= now:
            del self.recovering[key]
            return None
        return recovery

    def _recover(self, key: K, recovery: Recovery) -> None:
        if len(self.recovering) >= self._entries_max:
            del self.recovering[next(iter(self.recovering))]
        self.recovering[key] = recovery

    def _prove(self, key: K, now: float) -> None:
        self._proved.pop(key, None)  # so that the oldest comes first
        self._proved[key] = now
        if len(self._proved) > self._entries_max:
            del self._proved[next(iter(self._proved))]

    def _make_room(self, now: float) -> None:
        for key in [key for key, rest in self.rests.items() if rest.until <= now]:
            del self.rests[key]
        if len(self.rests) >= self._entries_max:  # full of live ones: the soonest to end is the least loss
            del self.rests[min(self.rests, key=lambda key: self.rests[key].until)]
