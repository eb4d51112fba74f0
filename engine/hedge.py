"""When a second route joins an attempt whose first token is late (SPEC 15).

Late is what the model itself makes of it: the time within which 95 of 100 of its recent answers had begun. A budget
keeps an hour in which everything is late from doubling everybody's requests. No I/O, no clock.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from dataclasses import dataclass

SAMPLES_MIN = 20  # SPEC 15.1: below them nothing is known
SAMPLES_MAX = 200  # of one model: a change in its pace has its effect within some ten answers
MODELS_MAX = 2_000  # far more than any catalogue has; of 3 KB each
LATE_SHARE = 0.95
DAY_LEFT_MIN = 0.1  # of a key's requests or tokens of the day: the rest is for those that have no other route
SAVED_MAX = 10  # hedges that a quiet hour may save for a bad one
WHOLE = 100  # a hedge, in percent of a request


@dataclass(frozen=True, slots=True)
class Bounds:
    """Between which times, in seconds, an answer begins to be late."""

    low_s: float
    high_s: float

    @classmethod
    def of_ms(cls, low_high: tuple[int, int]) -> Bounds:
        low_ms, high_ms = low_high
        return cls(low_ms / 1000, high_ms / 1000)


class Latencies:
    """How long each model took lately, of its successes: to a first token, or to a whole answer."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._recent: OrderedDict[int, tuple[deque[float], list[float]]] = OrderedDict()  # by age, and by size

    def add(self, model: int, seconds: float) -> None:
        if (held := self._recent.get(model)) is None:
            held = self._recent[model] = deque(), []
            if len(self._recent) > MODELS_MAX:
                self._recent.popitem(last=False)
        by_age, by_size = held
        if len(by_age) == SAMPLES_MAX:
            del by_size[bisect_left(by_size, by_age.popleft())]
        by_age.append(seconds)
        insort(by_size, seconds)
        self._recent.move_to_end(model)

    def late_after_s(self, model: int) -> float:
        """When an attempt on this model has waited long enough for a second to join it; as long as may be where little
        is known of it."""
        held, bounds = self._recent.get(model), self._bounds
        if held is None or len(held[1]) < SAMPLES_MIN:
            return bounds.high_s
        by_size = held[1]
        late_s = by_size[int(len(by_size) * LATE_SHARE)]
        return min(max(late_s, bounds.low_s), bounds.high_s)


class HedgeBudget:
    """How many requests may have a second route: a share of them all, of which a few can be saved.

    Counted in whole percents, so that the share is kept exactly. The first hedge is granted on credit: a gateway that
    has just started need not wait for twenty requests.
    """

    def __init__(self, percent: int) -> None:
        self._percent = percent
        self._balance = 0

    def earn(self) -> None:
        """A request has come."""
        self._balance = min(self._balance + self._percent, SAVED_MAX * WHOLE)

    @property
    def any_left(self) -> bool:
        """Whether a second route may join now."""
        return self._balance > 0

    def spend(self) -> bool:
        """Pay for a second route, where one may join."""
        if not self.any_left:
            return False
        self._balance -= WHOLE
        return True
