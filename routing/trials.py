"""Trials: who is asking, right now, a model that is better left alone (SPEC 4.10). `now` is in monotonic seconds."""

from __future__ import annotations

from collections.abc import Iterator

from routing.cooldowns import TRIAL_SPACING_S

LEASE_S = 10.0  # a provider that has not said a word for so long hangs; it must not keep everybody else waiting
UNPACED_MAX = 6  # resting things that are tried as soon as each is due; of more, so many in each spacing

Snapshot = tuple[tuple[tuple[int, float], ...], float]  # models that are tried and since when; when the next may begin
NO_TRIALS: Snapshot = ((), 0.0)


class Trials:
    """One request at a time for each model. Whoever takes a trial gives it back on every way out.

    In a long outage of many models there would still be one call a second to each. Where more than UNPACED_MAX rest,
    they share that many trials: soon enough to notice within the spacing that all are back, and no more calls than for
    a handful.
    """

    def __init__(self, spacing_s: float = TRIAL_SPACING_S) -> None:
        self._taken: dict[int, float] = {}  # models, and since when; bounded by the catalogue
        self._elsewhere: dict[int, float] = {}  # models that other gateways try, and until when; likewise
        self._spacing_s = spacing_s
        self._next_at = 0.0

    def take(self, model: int, now: float) -> float:
        """Begin one; gives what `release` wants back."""
        self._taken[model] = now
        self._next_at = now + self._spacing_s / UNPACED_MAX
        return now

    def taken_elsewhere(self, model: int, until: float) -> None:
        """Another gateway tries this model, until then at most."""
        self._elsewhere[model] = until

    def released_elsewhere(self, model: int) -> None:
        self._elsewhere.pop(model, None)

    def release(self, model: int, taken: float) -> bool:
        """End it; False where it had lasted too long and another holds the model by now."""
        if self._taken.get(model) != taken:
            return False
        del self._taken[model]
        return True

    def busy_s(self, model: int, now: float) -> float:
        """Seconds until the model may be tried; 0 when it may."""
        taken = self._taken.get(model)
        busy_s = 0.0 if taken is None else max(0.0, taken + LEASE_S - now)
        return max(busy_s, self._elsewhere.get(model, now) - now) if self._elsewhere else busy_s

    def pause_s(self, resting: int, now: float) -> float:
        """Seconds until one of so many resting things may be tried."""
        return max(0.0, self._next_at - now) if resting > UNPACED_MAX else 0.0

    def snapshot(self) -> Snapshot:
        """Copies, for a look at this moment later."""
        return tuple(self._taken.items()), self._next_at

    def restore(self, snapshot: Snapshot) -> None:
        """As it was when that was taken."""
        taken, self._next_at = snapshot
        self._taken = dict(taken)

    def running(self) -> Iterator[tuple[int, float]]:
        yield from self._taken.items()
