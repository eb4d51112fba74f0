"""Who is asked, and in which order.

Owns the plan and the ladder (SPEC 4), over the snapshot in routing/catalog.py, what scores.py thinks of its models,
what ledger.py counts and what standing.py and gate.py remember. No I/O; `now` (monotonic seconds) and `rng` are
arguments.

A request gets a `Plan` from `Router.plan`: its models in order, and what failed so far. `Router.next_route` takes the
best step that the plan has left: it picks a key, reserves capacity, and takes the trial's lease where the model is one
to be careful with. When nothing is left, `plan.wait_s` says when something comes back and `plan.blocked` what stands in
the way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from random import Random

from protection import KeyStatus, Scope, Skip
from routing.catalog import KEYLESS, Catalog, Key, Model, Pool, is_demo
from routing.cooldowns import TRIAL_SPACING_S
from routing.gate import RATE_UNSEEN, Gates
from routing.ledger import Ledger, Penalties
from routing.route import FIRST_TRIAL, Route, Rung
from routing.scores import UNSEEN, Scores
from routing.standing import NO_STANDING, Protection, Standing
from wire.chat import Mode, Need
from wire.errors import GatewayError, InvalidRequest, NoProviders, PromptTooLong

PENALTY_WEIGHT = 0.05
DEEP_FAILURES = 3  # of one platform, or of one model's keys: then others come first (SPEC 5.1)
LAST_ATTEMPTS = 3  # these go to platforms that have not been asked (SPEC 5.1)


BLOCKED_WORDS = {
    "transient": "rests after a failure",
    "keys": "no key with capacity",
    "trial": "another request is trying it",
    "failed": "failed in this request",
}
RUNG_WORDS = {
    Rung.HELD_BACK: "held back: other conversations use it",
    Rung.EXCLUDED: "excluded from this mode",
    Rung.DOUBTED: "banned for this session, or its health gate is open",
    Rung.RESTING: "rests after a failure",
    Rung.KEY_RESTING: "its keys rest after rate limits",
}


@dataclass(frozen=True, slots=True)
class Blocked:
    """Why a model could not be asked when its turn came."""

    reason: str  # `transient`, `keys`, `trial` or `failed`
    left_s: float | None  # until it may be available again, where known


@dataclass(frozen=True, slots=True)
class Step:
    """What asking one model now would mean. Without a key it cannot be asked, for the reason in `blocked`."""

    model: Model
    rung: Rung
    key: Key | None = None
    until: float = 0.0  # when its rest ends: the soonest is tried first
    blocked: Blocked | None = None


@dataclass(slots=True)
class Plan:
    """One request's way through the models: the order, and what has failed so far."""

    need: Need
    order: list[Model] = field(default_factory=list)  # as far as it has been worked out
    more: Callable[[Plan], list[Model]] | None = None  # works out the rest, which most requests never need
    preferred: tuple[int | None, int | None] = (None, None)  # the session's model and key
    asked_for: frozenset[int] = frozenset()  # the pinned model's rows: no gate keeps them back
    held_back: set[int] = field(default_factory=set)
    excluded: set[int] = field(default_factory=set)
    banned: set[str] = field(default_factory=set)  # platforms
    trial: int | None = None  # a model whose open gate this request tries first
    forgiven: set[int] = field(default_factory=set)  # models that may go on with their own answer, with another key
    attempts_left: int = 20
    failed: dict[int, float] = field(default_factory=dict)  # models, and when each may be asked again; inf: never
    failed_keys: dict[tuple[int, int], float] = field(default_factory=dict)  # the same of (key, model)
    again_at: float = 0.0  # nothing that has failed is asked again before
    skipped: dict[int, Model] = field(default_factory=dict)
    platform_failures: dict[str, int] = field(default_factory=dict)
    key_failures: dict[int, int] = field(default_factory=dict)  # by model
    blocked: dict[int, Blocked] = field(default_factory=dict)
    wait_s: float | None = None  # until the soonest of what is blocked comes back
    cooling: list[str] = field(default_factory=list)  # labels of models that rest or are banned at the outset

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
        """Leave alone what failed. `pause_s` is how long before it may be tried again; None: never."""
        model, again = route.model, inf
        if skip.again and pause_s is not None:
            again = now + TRIAL_SPACING_S
            if model.id in self.failed or (route.key.id, model.id) in self.failed_keys:  # tried again, in vain
                self.again_at = max(self.again_at, now + pause_s)
        self.platform_failures[model.platform.id] = self.platform_failures.get(model.platform.id, 0) + 1
        if skip.scope is Scope.KEY:
            self.key_failures[model.id] = self.key_failures.get(model.id, 0) + 1
            self.failed_keys[route.key.id, model.id] = again
        elif skip.scope is Scope.WINDOW:
            self.skip_window(model)
        else:
            self.skip(model, again)

    def skip(self, model: Model, again: float = inf) -> None:
        self.skipped[model.id] = model
        self.failed[model.id] = again

    def skip_window(self, model: Model) -> None:
        """The request is too long for this model, so for every model that holds no more."""
        for other in self.complete():
            if other.context_window <= model.context_window:
                self.skip(other)
        self.skip(model)

    def continue_like(self, route: Route, again: float, other_keys: bool) -> None:
        """An answer of this route broke: the same model goes on with it if it can, then its family (SPEC 14.3)."""
        model = route.model
        if other_keys:
            self.failed.pop(model.id, None)
            self.failed_keys[route.key.id, model.id] = again
            self.forgiven.add(model.id)

        def distance(other: Model) -> int:
            same_family = model.family is not None and other.family == model.family
            return 0 if other.model_id == model.model_id else 1 if same_family else 2

        self.order = sorted(self.complete(), key=distance)

    def ban(self, platform: str) -> None:
        self.banned.add(platform)

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

    def skipped_labels(self) -> list[str]:
        return sorted({*self.cooling, *(m.label for m in self.skipped.values())})


class Router:
    """The catalogue in force, and what traffic has taught about its keys and models."""

    def __init__(self, protection: Protection) -> None:
        self.ledger = Ledger()
        self.penalties = Penalties()
        self.scores = Scores()
        self.gates = Gates()
        self.key_status: dict[int, KeyStatus] = {}
        self._protection = protection
        self._turn: dict[int, int] = {}  # model: where its round-robin goes on
        self.catalog = Catalog((), (), ())
        self._usable_keys: dict[str, list[Key]] = {}
        self._candidates: dict[Mode, list[Model]] = {}
        self._excluded: dict[Mode, list[Model]] = {}
        self._others: list[Model] = []  # that follow a pinned model

    def load(self, catalog: Catalog, key_status: Mapping[int, KeyStatus]) -> None:
        """Route by this snapshot from now on."""
        self.catalog = catalog
        self.key_status = dict(key_status)
        self.scores.learn(self.scores.stats)
        self.gates.keep(set(catalog.by_id))
        self._index()

    def set_key_status(self, key: int, status: KeyStatus) -> bool:
        """Whether this was news."""
        if self.key_status.get(key) == status:
            return False
        was_invalid = self.key_status.get(key) is KeyStatus.INVALID
        self.key_status[key] = status
        if was_invalid or status is KeyStatus.INVALID:
            self._index()
        return True

    def _index(self) -> None:
        """What depends on the snapshot only is worked out once, not per request."""
        self._usable_keys = {}
        for platform in self.catalog.platforms.values():
            keys = self.catalog.keys.get(platform.id, [])
            valid = [key for key in keys if self.key_status.get(key.id) is not KeyStatus.INVALID]
            self._usable_keys[platform.id] = valid or ([KEYLESS] if platform.keyless else [])
        routable = [m for m in self.catalog.auto_chain if self.has_key(m)]
        self._candidates = {mode: [m for m in routable if mode not in m.exclude_from] for mode in Mode}
        self._excluded = {mode: [m for m in routable if mode in m.exclude_from] for mode in Mode}
        self._others = [m for m in self._candidates[Mode.BALANCED] if not is_demo(m.platform)]

    def has_key(self, model: Model) -> bool:
        return bool(self._usable_keys.get(model.platform.id))

    def count_usable_keys(self, model: Model, now: float) -> int:
        """How many of the platform's keys this model could be asked with now; no key needed counts as one."""
        keys = self._usable_keys.get(model.platform.id, [])
        return sum(not self._protection.keys.left((key.id, model.id), now) for key in keys)

    def plan(self, need: Need, standing: Standing, now: float, rng: Random) -> Plan:
        """The models able to serve this request, best first.

        Raises ModelNotFound for an unknown name, and a GatewayError saying why when no model could ever serve it.
        """
        plan = Plan(need, preferred=(standing.preferred_model, standing.preferred_key), banned=set(standing.banned))
        if need.pinned is None:
            self._plan_auto(plan, standing, now, rng)
        else:
            self._plan_pinned(plan, need.pinned, now, rng)
        if plan.banned or len(self._protection.transient):
            resting = self._protection.transient
            plan.cooling = [
                m.label for m in plan.complete() if m.platform.id in plan.banned or resting.get(m.id, now) is not None
            ]
        return plan

    def _plan_auto(self, plan: Plan, standing: Standing, now: float, rng: Random) -> None:
        need = plan.need
        excluded = self._excluded[need.mode]
        plan.order = self._ordered(fitting(need, self._candidates[need.mode]), need.mode, standing, plan, now, rng)
        if excluded:
            last = fitting(need, excluded)
            plan.excluded = {m.id for m in last}
            plan.order = plan.order + last
        if not plan.order:
            raise unfit(need, self._candidates[need.mode] + excluded)
        self.gates.arrived()
        if self.gates.any_open() and (tried := self._due_trial(plan, now)) is not None:
            plan.trial = tried.id
            plan.order = [tried, *(m for m in plan.order if m is not tried)]

    def _due_trial(self, plan: Plan, now: float) -> Model | None:
        """The first gated model that this request should try before all others: one that nothing else keeps back."""
        for model in plan.order:
            if self.gates.trial_due(model.id, now) and model.id not in self._protection.trials:
                step = self._step(model, plan, now, gated=False)
                if step.rung is Rung.FREE and step.key is not None:
                    return model
        return None

    def _plan_pinned(self, plan: Plan, pinned: str, now: float, rng: Random) -> None:
        need = plan.need
        asked = [m for m in self.catalog.resolve(pinned) if self.has_key(m)]
        others = [] if need.strict else [m for m in self._others if m not in asked]
        excluded = [] if need.strict else [m for m in self._excluded[Mode.BALANCED] if m not in asked]
        plan.asked_for = frozenset(m.id for m in asked)
        first = fitting(need, asked)

        def rest(plan: Plan) -> list[Model]:  # given: one that held it would be a cycle
            last = [m for m in fitting(need, excluded) if not is_demo(m.platform)]
            plan.excluded = {m.id for m in last}
            return self._ordered(fitting(need, others), need.mode, NO_STANDING, plan, now, rng) + last

        if first:
            plan.order, plan.more = first, rest
            return
        plan.order = rest(plan)
        if not plan.order:
            raise unfit(need, asked + others + excluded)

    def next_route(self, plan: Plan, now: float) -> Route | None:
        """The best (model, key) that is left for this plan, with its capacity reserved; None when nothing is."""
        plan.blocked.clear()
        usual = plan.attempts_left > LAST_ATTEMPTS and not (plan.platform_failures and self._some_deep(plan))
        steps: list[tuple[tuple[float, ...], Step]] = []
        for place, model in enumerate(plan.models()):
            if plan.failed.get(model.id) == inf or not self.has_key(model):
                continue
            step = self._step(model, plan, now)
            if step.key is None:
                assert step.blocked is not None
                plan.blocked[model.id] = step.blocked
            elif usual and step.rung < FIRST_TRIAL:  # the order is by rung, so nothing behind it is better
                return self._taken(step, plan, now)
            else:
                steps.append((self._rank(step, place, plan, usual=usual), step))
        if steps:
            return self._taken(min(steps, key=lambda ranked: ranked[0])[1], plan, now)
        plan.wait_s = min((b.left_s for b in plan.blocked.values() if b.left_s is not None), default=None)
        return None

    def keys_left(self, route: Route, plan: Plan, now: float) -> bool:
        """Whether this request may still ask the model with another key than the route's."""
        failed = plan.failed_keys
        before = failed.get((route.key.id, route.model.id))
        failed[route.key.id, route.model.id] = inf
        try:
            return self._available(route.model, plan, now)[0] is not None
        finally:
            if before is None:
                del failed[route.key.id, route.model.id]
            else:
                failed[route.key.id, route.model.id] = before

    def usable_key(self, model: Model, plan: Plan, now: float) -> Key | None:
        """The key that this request would use for this model now."""
        return self._available(model, plan, now)[0]

    def asked_for_left(self, plan: Plan, now: float) -> bool:
        """Whether the pinned model can still be asked somewhere, without a trial."""
        models = [self.catalog.by_id[id] for id in plan.asked_for]
        steps = [self._step(m, plan, now) for m in models if plan.failed.get(m.id) != inf and self.has_key(m)]
        return any(step.key is not None and step.rung < FIRST_TRIAL for step in steps)

    def soonest_s(self, plan: Plan, now: float) -> float | None:
        """When the first of the plan's models may be available to a request again, if that is known."""
        waits = [wait_s for m in plan.complete() if self.has_key(m) for wait_s in self._waits(m, plan, now)]
        return min(waits, default=None)

    def _waits(self, model: Model, plan: Plan, now: float) -> list[float]:
        """Seconds until each key of this model may be used again, whatever this request has met with."""
        rest = self._protection.transient.get(model.id, now)
        model_wait_s = rest.trial_at() - now if rest is not None else 0.0
        waits = []
        for key in self._usable_keys[model.platform.id]:
            resting = self._protection.keys.get((key.id, model.id), now)
            wait_s = self.ledger.wait_s(model, key.id, plan.need.tokens, now)
            if wait_s is not None:
                waits.append(max(wait_s, model_wait_s, resting.trial_at() - now if resting is not None else 0.0))
        return [wait_s for wait_s in waits if wait_s > 0]

    def reasons(self, plan: Plan, now: float) -> dict[str, str]:
        """Why each model that would not be asked at once is left alone, by its label."""
        reasons = {}
        for model in plan.complete():
            if plan.failed.get(model.id) == inf:
                reasons[model.label] = "failed in this request"
                continue
            step = self._step(model, plan, now)
            if step.blocked is not None:
                reasons[model.label] = BLOCKED_WORDS[step.blocked.reason]
            elif step.rung is not Rung.FREE:
                reasons[model.label] = RUNG_WORDS[step.rung]
        return reasons

    def second_route(self, plan: Plan, first: Route, now: float) -> Route | None:
        """A route on another platform to join one that is late (SPEC 15.1): none that would be a trial, or from a rung
        whose turn has not come."""
        for model in plan.models():
            if model.platform is first.model.platform or plan.failed.get(model.id) == inf or not self.has_key(model):
                continue
            step = self._step(model, plan, now)
            if step.key is not None and step.rung <= min(first.rung, FIRST_TRIAL - 1) and model.id != plan.trial:
                return self._taken(step, plan, now)
        return None

    def has_others(self, plan: Plan, route: Route) -> bool:
        """Whether another route than this one may be left, as far as that is known without working out the order."""
        if self.has_other_keys(route):
            return True
        others = self._others if plan.more is not None and not plan.need.strict else ()
        return any(
            model is not route.model and plan.failed.get(model.id) != inf and self.has_key(model)
            for model in itertools.chain(plan.order, others)
        )

    def has_other_keys(self, route: Route) -> bool:
        return len(self._usable_keys.get(route.model.platform.id, ())) > 1

    def again(self, route: Route, tokens: int, now: float) -> Route | None:
        """The same route once more, where its key has capacity for it."""
        if self.ledger.wait_s(route.model, route.key.id, tokens, now) != 0:
            return None
        return Route(
            route.model, route.key, self.ledger.reserve(route.model, route.key.id, tokens, now), route.rung, trial=False
        )

    def success_rate(self, model: Model) -> float:
        """By the slow statistics, for the health gate."""
        stats = self.scores.stats.get(model.id, UNSEEN)
        return stats.successes / stats.total if stats.total else RATE_UNSEEN

    def gates_hold(self, model: Model, now: float) -> bool:
        """Whether one more open gate would mean that more than half of a mode's models broke within a minute: then the
        fault is ours (SPEC 10.4)."""
        lately = self.gates.opened_within(now) | {model.id}
        return any(
            sum(m.id in lately for m in models) * 2 > len(models)
            for models in self._candidates.values()
            if any(m.id == model.id for m in models)
        )

    @staticmethod
    def _some_deep(plan: Plan) -> bool:
        return max(plan.platform_failures.values()) >= DEEP_FAILURES

    @staticmethod
    def _rank(step: Step, place: int, plan: Plan, *, usual: bool) -> tuple[float, ...]:
        """What is asked first; the smallest wins."""
        asked = not usual and plan.attempts_left <= LAST_ATTEMPTS and step.model.platform.id in plan.platform_failures
        return (asked, step.rung, plan.is_deep(step.model), step.until, place)

    def _taken(self, step: Step, plan: Plan, now: float) -> Route:
        model, key = step.model, step.key
        assert key is not None
        self._turn[model.id] = self._turn.get(model.id, 0) + 1
        trial = step.rung >= FIRST_TRIAL or model.id == plan.trial
        if trial:
            self._protection.trials[model.id] = now
            self.gates.trial_began(model.id, now)
            plan.trial = None if model.id == plan.trial else plan.trial
        reservation = self.ledger.reserve(model, key.id, plan.need.tokens, now)
        return Route(model, key, reservation, step.rung, trial)

    def _step(self, model: Model, plan: Plan, now: float, *, gated: bool = True) -> Step:
        rung = plan.rung(model)
        if gated and model.id != plan.trial and model.id not in plan.asked_for and self.gates.is_open(model.id):
            rung = Rung.DOUBTED
        wait_s, until, reason = 0.0, 0.0, "transient"
        rest = self._protection.transient.get(model.id, now)
        if rest is not None and model.id not in plan.forgiven:
            rung, until, wait_s = Rung.RESTING, rest.until, rest.trial_at() - now
        if (again := plan.failed.get(model.id)) is not None:
            wait_s, reason = max(wait_s, again - now, plan.again_at - now), "failed" if rest is None else reason
        if wait_s > 0:
            return Step(model, rung, blocked=Blocked(reason, wait_s))
        key, resting_until, key_wait_s = self._available(model, plan, now)
        if key is None:
            return Step(model, rung, blocked=Blocked("keys", key_wait_s))
        if resting_until:
            rung, until = Rung.KEY_RESTING, max(until, resting_until)
        if (rung >= FIRST_TRIAL or model.id == plan.trial) and model.id in self._protection.trials:
            return Step(model, rung, blocked=Blocked("trial", TRIAL_SPACING_S))
        return Step(model, rung, key, until)

    def _available(self, model: Model, plan: Plan, now: float) -> tuple[Key | None, float, float | None]:
        """A key that may be used now, and until when it rests after a 429 that named no time (0: it does not, and such
        a key is preferred). Without one, the shortest known wait in seconds."""
        keys = self._usable_keys[model.platform.id]
        start = self._turn.get(model.id, 0) % len(keys) if keys else 0
        if plan.preferred[0] == model.id:
            keys = sorted(keys[start:] + keys[:start], key=lambda key: key.id != plan.preferred[1])
            start = 0
        soonest: float | None = None
        trial: Key | None = None
        trial_until = inf
        for place in range(start - len(keys), start):  # from `start` on and around
            key = keys[place]
            wait_s, until = self._key_wait(key, model, plan, now)
            if wait_s is None:
                continue
            if wait_s > 0:
                soonest = wait_s if soonest is None else min(soonest, wait_s)
            elif not until:
                return key, 0.0, None
            elif until < trial_until:
                trial, trial_until = key, until
        return (trial, trial_until, None) if trial is not None else (None, 0.0, soonest)

    def _key_wait(self, key: Key, model: Model, plan: Plan, now: float) -> tuple[float | None, float]:
        """Seconds until this key may be used for this model (None: never by this request), and until when it rests."""
        wait_s, until = 0.0, 0.0
        if (rest := self._protection.keys.get((key.id, model.id), now)) is not None:
            wait_s, until = rest.trial_at() - now, rest.until
        if plan.failed_keys and (again := plan.failed_keys.get((key.id, model.id))) is not None:
            if again == inf:
                return None, until
            wait_s = max(wait_s, again - now, plan.again_at - now)
        if wait_s > 0:
            return wait_s, until
        return self.ledger.wait_s(model, key.id, plan.need.tokens, now), until

    def _ordered(
        self, models: list[Model], mode: Mode, standing: Standing, plan: Plan, now: float, rng: Random
    ) -> list[Model]:
        """Models of the chain: by the mode's own order, then what it prefers, then what the session prefers first."""
        ranked = models if mode is Mode.PRIORITY else self._sampled(models, mode, now, rng)
        liked = [m for m in ranked if mode in m.prefer_in and self.usable_key(m, plan, now)]
        if liked:
            liked.sort(key=lambda m: self.catalog.position[m.id])
            ranked = liked + [m for m in ranked if m not in liked]
        if standing is NO_STANDING:
            return ranked
        ranked = sorted(ranked, key=lambda m: m.id != standing.preferred_model)
        plan.held_back = {m.id for m in ranked if standing.holds_back(m.id, m.platform.id)}
        return sorted(ranked, key=lambda m: m.id in plan.held_back) if plan.held_back else ranked

    def _sampled(self, models: list[Model], mode: Mode, now: float, rng: Random) -> list[Model]:
        """Best first by Thompson sampling: each score draws anew from what is believed of the model."""
        if len(models) < 2:
            return models
        scores = self._penalised(self.scores.drawn(models, mode, rng), models, now)
        pool_of = self.catalog.pools
        if mode is Mode.FAST:
            ranks = [
                (pool_of.get(m.id) is not Pool.FAST, -s, n) for n, (m, s) in enumerate(zip(models, scores, strict=True))
            ]
        else:
            ranks = [(False, -score, n) for n, score in enumerate(scores)]
        return [models[n] for _, _, n in sorted(ranks)]

    def _penalised(self, scores: list[float], models: Sequence[Model], now: float) -> list[float]:
        if not len(self.penalties):
            return scores
        return [
            score - PENALTY_WEIGHT * self.penalties.points(model.id, now)
            for model, score in zip(models, scores, strict=True)
        ]

    def displayed_scores(self, now: float) -> dict[int, float]:
        """What the operator sees of each model of the chain (SPEC 10.3)."""
        models = self.catalog.chain
        scores = self._penalised(self.scores.expected(models), models, now)
        return {model.id: score for model, score in zip(models, scores, strict=True)}


def fitting(need: Need, models: list[Model]) -> list[Model]:
    """The models this request fits (SPEC 3.7)."""
    return [
        m
        for m in models
        if need.tokens <= m.context_window and (m.vision or not need.vision) and (m.tools or not need.tools)
    ]


def unfit(need: Need, models: list[Model]) -> GatewayError:
    """What is missing when this request fits none of the models."""
    if not models:
        return NoProviders()
    if need.vision and not (models := [m for m in models if m.vision]):
        return InvalidRequest("No enabled model with a key can see images.", status=422, code="no_vision_model")
    if need.tools and not (models := [m for m in models if m.tools]):
        return InvalidRequest("No enabled model with a key can call tools.", status=422, code="no_tool_model")
    return PromptTooLong(need.tokens, max(m.context_window for m in models))
