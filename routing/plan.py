"""One request's way through the models: the order in which they are asked, and what has failed so far.

Made and read by router.py, and marked by the effects of failures. No I/O; `now` is in monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from types import MappingProxyType
from typing import Any, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from protection import Scope, Skip
from routing.catalog import Key, Model
from routing.explain import Draws, Moment
from routing.route import Route, Rung
from wire.chat import Need

DEEP_FAILURES = 3  # of one platform, or of one model's keys: then others come first (SPEC 5.1)
# What most requests meet with. A thousand plans are kept to explain them, and eight empty dicts in each would cost more
# in caches that they push out than all the rest of the keeping.
NOTHING: Mapping[Any, Any] = MappingProxyType({})
LAST_ATTEMPTS = 3  # these go to platforms that have not been asked (SPEC 5.1)


K = TypeVar("K")


class Blocked(Struct, frozen=True):
    """Why a model could not be asked when its turn came."""

    reason: str  # `transient`, `keys`, `trial` or `failed`
    left_s: float | None  # until it may be available again, where known


class Step(Struct, frozen=True):
    """What asking one model now would mean. Without a key it cannot be asked, for the reason in `blocked`."""

    model: Model
    rung: Rung
    key: Key | None = None
    until: float = 0.0  # when its rest ends: the soonest is tried first
    blocked: Blocked | None = None


class Plan(Struct):
    """One request's way through the models: the order, and what has failed so far."""

    need: Need
    order: list[Model] = []  # as far as it has been worked out
    more: Callable[[Plan], list[Model]] | None = None  # works out the rest, which most requests never need
    preferred: tuple[int | None, int | None] = (None, None)  # the session's model and key
    asked_for: frozenset[int] = frozenset()  # the pinned model's rows: no gate keeps them back
    held_back: frozenset[int] = frozenset()
    excluded: frozenset[int] = frozenset()
    banned: frozenset[str] = frozenset()  # platforms
    trial: int | None = None  # a model whose open gate this request tries first
    forgiven: frozenset[int] = frozenset()  # models that may go on with their own answer, with another key
    floored: bool = False  # the client's floor has kept models out that would fit
    patient: bool = False  # it waits rather than join a crowd at what has just come back
    attempts_left: int = 20
    reserve: int = LAST_ATTEMPTS  # of these attempts: they are spread over the wait where every platform was asked
    failed: Mapping[int, float] = NOTHING  # models, and when each failed; inf: never to be asked again
    failed_keys: Mapping[tuple[int, int], float] = NOTHING  # the same of (key, model)
    failed_at: float = 0.0  # the last time
    again_at: float = 0.0  # nothing that has failed is asked again before, unless it has answered others since
    draws: Draws | None = None  # the scores that made the order
    passed: Mapping[int, Blocked] = NOTHING  # what stood in a model's way when its turn first came
    skipped: Mapping[int, Model] = NOTHING
    platform_failures: Mapping[str, int] = NOTHING
    key_failures: Mapping[int, int] = NOTHING  # by model
    times_failed: Mapping[tuple[int, int], int] = NOTHING  # by key (0: all of them) and model
    blocked: Mapping[int, Blocked] = NOTHING
    wait_s: float | None = None  # until the soonest of what is blocked comes back
    at_any_moment: bool = False  # or sooner: another request tries one of them, or may give tokens back
    cooling: Sequence[str] = ()  # labels of models that rest or are banned at the outset

    def complete(self) -> list[Model]:
        """The whole order."""
        if self.more is not None:
            more, self.more = self.more, None
            self.order = self.order + more(self)
        return self.order

    def models(self) -> Iterator[Model]:
        """The order, its rest only when that is reached."""
        known = self.order
        yield from known
        if self.more is not None:
            yield from self.complete()[len(known) :]

    def note_failure(self, route: Route, skip: Skip, now: float, pause_s: float | None) -> None:
        """Leave alone what failed. `pause_s` is how long a request that waits spares its attempts once something has
        failed twice, or few are left; None: it does not wait, so nothing is asked again."""
        model, failed_at = route.model, inf
        self.failed_at = now
        if pause_s is not None:
            again = model.id in self.failed or (route.key.id, model.id) in self.failed_keys
            if skip.again:
                failed_at = now
            if (skip.again and again) or self.attempts_left <= self.reserve:
                self.again_at = max(self.again_at, now + pause_s)
        self.platform_failures = one_more(self.platform_failures, model.platform.id)
        self.times_failed = one_more(self.times_failed, (route.key.id if skip.scope is Scope.KEY else 0, model.id))
        if skip.scope is Scope.KEY:
            self.key_failures = one_more(self.key_failures, model.id)
            self.failed_keys = {**self.failed_keys, (route.key.id, model.id): failed_at}
        elif skip.scope is Scope.WINDOW:
            self.skip_window(model)
        else:
            self.skip(model, failed_at)

    def skip(self, model: Model, failed_at: float = inf) -> None:
        self.skipped = {**self.skipped, model.id: model}
        self.failed = {**self.failed, model.id: failed_at}

    def spares(self, model: Model) -> bool:
        """Whether the few attempts that are left are too good for more of the same platform just now."""
        return self.attempts_left <= self.reserve and model.platform.id in self.platform_failures

    def skip_window(self, model: Model) -> None:
        """The request is too long for this model, so for every model that holds no more."""
        for other in self.complete():
            if other.context_window <= model.context_window:
                self.skip(other)
        self.skip(model)

    def continue_like(self, route: Route, failed_at: float, other_keys: bool) -> None:
        """An answer of this route broke then (inf: the route is not asked again): the same model goes on with it if it
        can, then its family (SPEC 14.3)."""
        model = route.model
        if other_keys:
            self.failed = {id: at for id, at in self.failed.items() if id != model.id}
            self.failed_keys = {**self.failed_keys, (route.key.id, model.id): failed_at}
            self.forgiven |= {model.id}
            times = dict(self.times_failed)
            times[route.key.id, model.id] = times.pop((0, model.id), 1)  # blame the key alone
            self.times_failed = times

        def distance(other: Model) -> int:
            same_family = bool(model.family) and other.family == model.family
            return 0 if other.model_id == model.model_id else 1 if same_family else 2

        self.order = sorted(self.complete(), key=distance)

    def grow(self, need: Need, tokens: int) -> None:
        """The request needs more room from now on. Models that do not hold so many tokens are left out (SPEC 3.7)."""
        self.need = need
        self.order = [model for model in self.order if model.holds(tokens)]

    def ban(self, platform: str) -> None:
        self.banned |= {platform}

    def rung(self, model: Model) -> Rung:
        """Where it stands apart from what rests."""
        if model.platform.id in self.banned:
            return Rung.DOUBTED
        if model.id in self.excluded:
            return Rung.EXCLUDED
        return Rung.HELD_BACK if model.id in self.held_back else Rung.FREE

    def is_deep(self, model: Model) -> bool:
        """Whether so much has failed around this model that others come first."""
        if self.platform_failures.get(model.platform.id, 0) >= DEEP_FAILURES:
            return True
        return self.key_failures.get(model.id, 0) >= DEEP_FAILURES

    def failures(self, step: Step) -> int:
        """How often what this step would ask has failed already."""
        if not self.times_failed or step.key is None:
            return 0
        of_all_keys = self.times_failed.get((0, step.model.id), 0)
        return of_all_keys + (self.times_failed.get((step.key.id, step.model.id), 0) if step.key.id else 0)

    def as_of(self, moment: Moment) -> Plan:
        """The plan as it was then, before anything had failed. What was worked out later is behind what was known."""
        known = list(moment.order)
        later = [model for model in self.order if model not in known]
        return replace(
            self, need=moment.need, order=known + later, more=None, banned=frozenset(moment.banned), trial=moment.trial,
            forgiven=frozenset(), failed=NOTHING, failed_keys=NOTHING, again_at=0.0,
            platform_failures=NOTHING, key_failures=NOTHING, times_failed=NOTHING, patient=False,
        )  # fmt: skip

    def skipped_labels(self) -> list[str]:
        if not (self.cooling or self.skipped):
            return []
        return sorted({*self.cooling, *(m.label for m in self.skipped.values())})


def one_more(counts: Mapping[K, int], key: K) -> Mapping[K, int]:
    return {**counts, key: counts.get(key, 0) + 1}
