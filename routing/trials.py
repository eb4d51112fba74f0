"""Trials: who is asking, right now, a model that is better left alone (SPEC 4.10). `now` is in monotonic seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from routing.cooldowns import TRIAL_SPACING_S

LEASE_S = 10.0  # a provider that has not said a word for so long hangs; it must not keep everybody else waiting
UNPACED_MAX = 6  # resting things that are tried as soon as each is due; of more, so many in each spacing


class Trials:
    """One request at a time for each model. Whoever takes a trial gives it back on every way out.

    In a long outage of many models there would still be one call a second to each. Where more than UNPACED_MAX rest,
    they share that many trials: soon enough to notice within the spacing that all are back, and no more calls than for
    a handful.
    """

    def __init__(self, spacing_s: float = TRIAL_SPACING_S) -> None:
        self._taken: dict[int, float] = {}  # models, and since when; bounded by the catalogue
        self._spacing_s = spacing_s
        self._next_at = 0.0

    def take(self, model: int, now: float) -> float:
        """Begin one; gives what `release` wants back."""
        self._taken[model] = now
        self._next_at = now + self._spacing_s / UNPACED_MAX
        return now

    def release(self, model: int, taken: float) -> bool:
        """End it; False where it had lasted too long and another holds the model by now."""
        if self._taken.get(model) != taken:
            return False
        del self._taken[model]
        return True

    def busy_s(self, model: int, now: float) -> float:
        """Seconds until the model may be tried; 0 when it may."""
        taken = self._taken.get(model)
        return 0.0 if taken is None else max(0.0, taken + LEASE_S - now)

    def pause_s(self, resting: int, now: float) -> float:
        """Seconds until one of so many resting things may be tried."""
        return max(0.0, self._next_at - now) if resting > UNPACED_MAX else 0.0

    def snapshot(self) -> tuple[int, ...]:
        """The models that are being tried."""
        return tuple(self._taken)

    def restore(self, models: Iterable[int], now: float) -> None:
        """These are being tried, since now, and no others."""
        self._taken = dict.fromkeys(models, now)

    def running(self) -> Iterator[tuple[int, float]]:
        yield from self._taken.items()
