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

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import inf
from random import Random

from protection import KeyStatus
from routing.catalog import Catalog, Key, Model, Pool, is_demo
from routing.cooldowns import Cooldowns, K
from routing.explain import BLOCKED_WORDS, RUNG_WORDS, Candidate, Draws, Moment, blocked_words, left_out, scored
from routing.fit import below_floor, fitting, no_private_route, permitted, reaches_floor, unfit
from routing.gate import RATE_UNSEEN, Gates
from routing.kinds import named, same_vectors
from routing.ledger import Ledger, Penalties
from routing.plan import DEEP_FAILURES, LAST_ATTEMPTS, NOTHING, Blocked, Plan, Step
from routing.reach import Reach, reach
from routing.route import FIRST_TRIAL, Route, Rung
from routing.scores import UNSEEN, Scores
from routing.standing import NO_STANDING, Protection, Standing
from wire.chat import Mode, ModelKind, Need
from wire.errors import GatewayError, NoProviders

PENALTY_WEIGHT = 0.05


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
        self._everything = self._private = Reach()

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
        self._everything = reach(self.catalog, self.key_status, private=False)
        self._private = reach(self.catalog, self.key_status, private=True)

    def _reach(self, need: Need) -> Reach:
        """All that a request with this need may be asked of."""
        return self._private if need.no_train else self._everything

    def has_key(self, model: Model) -> bool:
        return self._everything.has_key(model)

    def count_usable_keys(self, model: Model, now: float) -> int:
        """How many of the platform's keys this model could be asked with now; no key needed counts as one."""
        keys = self._everything.keys.get(model.platform.id, [])
        return sum(not self._protection.keys.left((key.id, model.id), now) for key in keys)

    def plan(self, need: Need, standing: Standing, now: float, rng: Random, *, rehearsal: bool = False) -> Plan:
        """The models able to serve this request, best first. A rehearsal changes nothing.

        Raises ModelNotFound for an unknown name, and a GatewayError saying why when no model could ever serve it.
        """
        plan = Plan(need)
        if standing is not NO_STANDING:
            plan.preferred = standing.preferred_model, standing.preferred_key
            plan.banned = frozenset(standing.banned)
        if need.kind is ModelKind.EMBEDDING:
            self._plan_vectors(plan, now, rng)
        elif need.pinned is None:
            self._plan_auto(plan, standing, now, rng, rehearsal=rehearsal)
        else:
            self._plan_pinned(plan, need.pinned, now, rng)
        if plan.banned or self._protection.transient.rests:
            resting = self._protection.transient
            plan.cooling = [
                m.label for m in plan.complete() if m.platform.id in plan.banned or resting.get(m.id, now) is not None
            ]
        return plan

    def _plan_auto(self, plan: Plan, standing: Standing, now: float, rng: Random, *, rehearsal: bool) -> None:
        need, world = plan.need, self._reach(plan.need)
        plan.order = self._ordered(self._fit(plan, world.candidates[need.mode]), need.mode, standing, plan, now, rng)
        if excluded := world.excluded[need.mode]:
            last = self._fit(plan, excluded)
            plan.excluded = frozenset(m.id for m in last)
            plan.order = plan.order + last
        if not plan.order:
            raise self._unserved(need, lambda world: world.candidates[need.mode] + world.excluded[need.mode])
        if not rehearsal:
            self.gates.arrived()
        if self.gates.any_open() and (tried := self._due_trial(plan, now, rehearsal)) is not None:
            plan.trial = tried.id
            plan.order = [tried, *(m for m in plan.order if m is not tried)]

    def _due_trial(self, plan: Plan, now: float, arriving: int) -> Model | None:
        """The first gated model that this request should try before all others: one that nothing else keeps back."""
        for model in plan.order:
            if self.gates.trial_due(model.id, now, arriving=arriving):
                step = self._step(model, plan, now, gated=False)
                busy = self._protection.trials.busy_s(model.id, now) > 0
                if step.rung is Rung.FREE and step.key is not None and not busy:
                    return model
        return None

    def _plan_pinned(self, plan: Plan, pinned: str, now: float, rng: Random) -> None:
        need, asked = plan.need, self.catalog.resolve(pinned)
        world = self._reach(need)
        plan.order = self._fit(plan, [m for m in asked if world.has_key(m)])
        if plan.order:
            plan.asked_for = frozenset([m.id for m in plan.order])
            plan.more = partial(self._behind_pinned, asked, now, rng)
            return
        if plan.floored:  # the client has named what its own floor forbids
            raise below_floor(need)
        plan.order = self._behind_pinned(asked, now, rng, plan)
        if not plan.order:

            def models_of(world: Reach) -> list[Model]:
                others = [*world.others, *world.excluded[Mode.BALANCED]]
                return [m for m in asked if world.has_key(m)] + others_than(asked, others, need)

            raise self._unserved(need, models_of)

    def _behind_pinned(self, asked: Sequence[Model], now: float, rng: Random, plan: Plan) -> list[Model]:
        """The models that follow the pinned one."""
        need, world = plan.need, self._reach(plan.need)
        last = self._fit(plan, others_than(asked, world.excluded[Mode.BALANCED], need))
        plan.excluded = frozenset(m.id for m in last)
        others = self._fit(plan, others_than(asked, world.others, need))
        return self._ordered(others, need.mode, NO_STANDING, plan, now, rng) + last

    def _fit(self, plan: Plan, models: list[Model]) -> list[Model]:
        """Those of the models that may serve this request."""
        fit = fitting(plan.need, models)
        if plan.need.min_rank is None:
            return fit
        kept = [m for m in fit if reaches_floor(plan.need, m, self.catalog)]
        plan.floored = plan.floored or len(kept) < len(fit)
        return kept

    def _unserved(self, need: Need, models_of: Callable[[Reach], list[Model]]) -> GatewayError:
        """Why nothing can ever serve this request."""
        models = models_of(self._reach(need))
        if need.min_rank is not None and fitting(need, models):
            return below_floor(need)
        if need.no_train and fitting(need, models := models_of(self._everything)):
            return no_private_route()
        return unfit(need, list(permitted(need, models)))

    def _plan_vectors(self, plan: Plan, now: float, rng: Random) -> None:
        """Embeddings: one family, and the model asked for before the others. A window holds for each of the texts, of
        which routing knows only the sum, so none is judged here."""
        world = self._reach(plan.need)
        asked, others = same_vectors(self.catalog, plan.need, world.has_key)
        plan.asked_for = frozenset(m.id for m in asked)
        first, rest = ([m for m in permitted(plan.need, ms) if world.has_key(m)] for ms in (asked, others))
        plan.order = first + self._ordered(rest, Mode.BALANCED, NO_STANDING, plan, now, rng)
        if plan.order:
            return
        if plan.need.no_train and any(map(self.has_key, asked + others or self.catalog.auto_embeddings)):
            raise no_private_route()
        raise NoProviders

    def renew(self, plan: Plan, standing: Standing, now: float, rng: Random) -> None:
        """Bring the plan of a request that has waited up to date with a new snapshot; what it has met with stays."""
        try:
            new = self.plan(plan.need, standing, now, rng, rehearsal=True)
        except GatewayError:  # nothing is left that could serve it
            plan.order, plan.more = [], None
            return
        plan.order, plan.more, plan.asked_for = new.order, new.more, new.asked_for
        plan.held_back, plan.excluded, plan.trial = new.held_back, new.excluded, new.trial
        plan.banned |= new.banned

    def next_route(self, plan: Plan, now: float) -> Route | None:
        """The best (model, key) that is left for this plan, with its capacity reserved; None when nothing is."""
        blocked: dict[int, Blocked] = {}
        step = self._next_step(plan, now, blocked)
        plan.blocked = blocked or NOTHING
        if blocked:
            asked = {model for _, model in plan.times_failed}  # nothing stood in the way of these
            plan.passed = {**{id: why for id, why in blocked.items() if id not in asked}, **plan.passed}
        if step is not None:
            return self._taken(step, plan, now)
        plan.wait_s = min((b.left_s for b in blocked.values() if b.left_s is not None), default=None)
        plan.at_any_moment = any(b.reason == "trial" for b in blocked.values()) or self._in_use(plan, now)
        return None

    def _next_step(self, plan: Plan, now: float, blocked: dict[int, Blocked]) -> Step | None:
        """The best that can be asked now; what cannot goes into `blocked`."""
        world = self._reach(plan.need)
        usual = plan.attempts_left > LAST_ATTEMPTS and not (plan.platform_failures and self._some_deep(plan))
        steps: list[tuple[tuple[float, ...], Step]] = []
        for place, model in enumerate(plan.models()):
            if plan.failed.get(model.id) == inf or not world.has_key(model):
                continue
            step = self._step(model, plan, now)
            if step.key is None:
                assert step.blocked is not None
                blocked[model.id] = step.blocked
            elif usual and step.rung < FIRST_TRIAL and not plan.failures(step):
                return step  # the order is by rung, so nothing behind it is better
            else:
                usual = usual and step.rung >= FIRST_TRIAL  # else one that has failed before might be
                steps.append((self._rank(step, place, plan), step))
        return min(steps, key=lambda ranked: ranked[0])[1] if steps else None

    def _in_use(self, plan: Plan, now: float) -> bool:
        """Whether a model has no capacity only because of what running calls may not need after all."""
        need, keys_of = plan.need, self._reach(plan.need).keys
        return any(
            self.ledger.may_be_given_back(model, key.id, need.tokens, now)
            for model in plan.order
            if model.limited and model.id in plan.blocked and plan.blocked[model.id].reason == "keys"
            for key in keys_of[model.platform.id]
            if self._key_wait(key, model, plan, now, capacity=False)[0] == 0
        )

    def keys_left(self, route: Route, plan: Plan, now: float) -> bool:
        """Whether this request may still ask the model with another key than the route's."""
        failed, patient = plan.failed_keys, plan.patient
        plan.failed_keys, plan.patient = {**failed, (route.key.id, route.model.id): inf}, False
        try:
            return self._available(route.model, plan, now)[0] is not None
        finally:
            plan.failed_keys, plan.patient = failed, patient

    def usable_key(self, model: Model, plan: Plan, now: float) -> Key | None:
        """The key that this request would use for this model now."""
        return self._available(model, plan, now)[0]

    def asked_for_left(self, plan: Plan, now: float) -> bool:
        """Whether the pinned model can still be asked somewhere, without a trial."""
        models, world = [m for m in plan.order if m.id in plan.asked_for], self._reach(plan.need)
        steps = [self._step(m, plan, now) for m in models if plan.failed.get(m.id) != inf and world.has_key(m)]
        return any(step.key is not None and step.rung < FIRST_TRIAL for step in steps)

    def soonest_s(self, plan: Plan, now: float) -> float | None:
        """When the first of the plan's models may be available to a request again, if that is known."""
        world = self._reach(plan.need)
        waits = [wait_s for m in plan.complete() if world.has_key(m) for wait_s in self._waits(m, plan, now)]
        return min(waits, default=None)

    def _waits(self, model: Model, plan: Plan, now: float) -> list[float]:
        """Seconds until each key of this model may be used again, whatever this request has met with."""
        rest = self._protection.transient.get(model.id, now)
        model_wait_s = rest.trial_at() - now if rest is not None else 0.0
        waits = []
        for key in self._reach(plan.need).keys[model.platform.id]:
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

    def second_route(self, plan: Plan, first: Route, now: float, *, day_left: float) -> Route | None:
        """A route on another platform to join one that is late (SPEC 15.1): none that would be a trial, or from a rung
        whose turn has not come, or with a key that has less than this share of its day left."""
        world = self._reach(plan.need)
        for model in plan.models():
            same = model.platform.id == first.model.platform.id
            if same or plan.failed.get(model.id) == inf or not world.has_key(model):
                continue
            step = self._step(model, plan, now)
            if step.key is None or step.rung > min(first.rung, FIRST_TRIAL - 1) or model.id == plan.trial:
                continue
            if self.ledger.day_left(model, step.key.id, now) >= day_left:
                return self._taken(step, plan, now)
        return None

    def has_others(self, plan: Plan, route: Route) -> bool:
        """Whether another route than this one may be left, as far as that is known without working out the order."""
        if self.has_other_keys(plan, route):
            return True
        world, models = self._reach(plan.need), plan.order
        if plan.more is not None and not plan.need.strict:
            models = [*models, *permitted(plan.need, world.others)]
        for model in models:
            if model.id != route.model.id and plan.failed.get(model.id) != inf and world.has_key(model):
                return True
        return False

    def has_fresh_other(self, plan: Plan, route: Route, now: float) -> bool:
        """Whether another model can be asked now that neither has failed in this request nor rests."""
        others = [m for m in plan.complete() if m is not route.model and m.id not in plan.failed and self.has_key(m)]
        resting = self._protection.transient
        return any(resting.get(m.id, now) is None and self.usable_key(m, plan, now) is not None for m in others)

    def has_other_keys(self, plan: Plan, route: Route) -> bool:
        return len(self._reach(plan.need).keys.get(route.model.platform.id, ())) > 1

    def rehearse(self, need: Need, session: str, now: float, rng: Random) -> Plan:
        """The plan that a request would get if it came now. Changes nothing. Raises what `plan` does."""
        standing = self._protection.standing(session, now, auto=need.pinned is None, arrived=False)
        return self.plan(need, standing, now, rng, rehearsal=True)

    def explain(self, plan: Plan, now: float) -> list[Candidate]:
        """Every model of the catalogue: in the order in which this plan would ask them now, then those that it would
        not ask, and why. Changes nothing."""
        world, told = self._reach(plan.need), scored(plan.draws, self.scores.stats)
        asked: list[tuple[tuple[float, ...], Candidate]] = []
        blocked: list[Candidate] = []
        for place, model in enumerate(plan.complete()):
            score, parts = told.get(model.id, (None, None))
            if plan.failed.get(model.id) == inf or not world.has_key(model):
                words = BLOCKED_WORDS["failed"] if model.id in plan.failed else "no key"
                blocked.append(Candidate(model, plan.rung(model), score, parts, words))
                continue
            step = self._step(model, plan, now)
            if (why := step.blocked or plan.passed.get(model.id)) is not None:
                words = blocked_words(why.reason, why.left_s)
                blocked.append(Candidate(model, step.rung, score, parts, words))
            else:
                asked.append((self._rank(step, place, plan), Candidate(model, step.rung, score, parts)))
        asked.sort(key=lambda ranked: ranked[0])
        return [*(candidate for _, candidate in asked), *blocked, *self._left_out(plan)]

    def _left_out(self, plan: Plan) -> Iterator[Candidate]:
        need, ordered = plan.need, {model.id for model in plan.order}
        asked = named(self.catalog, need.pinned, need.kind) if need.pinned is not None else ()
        ids = {model.id for model in asked}
        reaches = self._everything, self._private
        for model in self.catalog.models:
            if model.id not in ordered:
                yield Candidate(model, excluded=left_out(model, need, ids, self.catalog, reaches))

    def moment(self, plan: Plan, now: float) -> Moment:
        """What this plan went by, to explain it later."""
        protection = self._protection
        return Moment(
            now,
            plan.need,
            self.catalog,
            self._everything,
            self._private,
            self.scores.stats,
            protection.transient.snapshot(),
            protection.keys.snapshot(),
            protection.trials.snapshot(),
            self.gates.snapshot(),
            plan.order,
            plan.banned,
            plan.trial,
        )

    @classmethod
    def as_of(cls, moment: Moment) -> Router:
        """A router as it was then, but for its ledger: what had no capacity then is known from the plan alone."""
        protection = Protection(levels={}, sticky_ttl_s=0.0, thread_cooldown_s=0.0)
        protection.transient.restore(moment.transient)
        protection.keys.restore(moment.keys)
        protection.trials.restore(moment.trials)
        router = cls(protection)
        router.catalog, router._everything, router._private = moment.catalog, moment.everything, moment.private
        router.scores.learn(moment.stats)
        router.gates.restore(moment.gates)
        return router

    def again(self, route: Route, tokens: int, now: float) -> Route | None:
        """The same route once more, where its key may still be used and has capacity for it."""
        rest = self._protection.keys.get((route.key.id, route.model.id), now)
        if rest is not None and rest.firm_until > now:
            return None
        if route.key not in self._everything.keys.get(route.model.platform.id, ()):
            return None
        if self.ledger.wait_s(route.model, route.key.id, tokens, now) != 0:
            return None
        return Route(
            route.model, route.key, self.ledger.reserve(route.model, route.key.id, tokens, now), route.rung, trial=False
        )

    def give_back(self, route: Route) -> None:
        """A route whose attempt never began."""
        self.ledger.release(route.reservation)
        if route.trial:
            self._protection.trials.release(route.model.id, route.tried_at)

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
            for models in self._everything.candidates.values()
            if any(m.id == model.id for m in models)
        )

    @staticmethod
    def _some_deep(plan: Plan) -> bool:
        return max(plan.platform_failures.values()) >= DEEP_FAILURES

    @staticmethod
    def _rank(step: Step, place: int, plan: Plan) -> tuple[float, ...]:
        """What is asked first; the smallest wins."""
        model = step.model
        asked = plan.attempts_left <= LAST_ATTEMPTS and model.platform.id in plan.platform_failures
        return (asked, step.rung, plan.is_deep(model), step.until, plan.failures(step), place)

    def _taken(self, step: Step, plan: Plan, now: float) -> Route:
        model, key = step.model, step.key
        assert key is not None
        self._turn[model.id] = self._turn.get(model.id, 0) + 1
        trial, tried_at = step.rung >= FIRST_TRIAL or model.id == plan.trial, 0.0
        if trial:
            tried_at = self._protection.trials.take(model.id, now)
            self.gates.trial_began(model.id, now)
            plan.trial = None if model.id == plan.trial else plan.trial
        self._protection.begun(key.id, model.id, now)
        reservation = self.ledger.reserve(model, key.id, plan.need.tokens, now)
        return Route(model, key, reservation, step.rung, trial, tried_at)

    def _step(self, model: Model, plan: Plan, now: float, *, gated: bool = True) -> Step:
        rung = plan.rung(model)
        if gated and model.id != plan.trial and model.id not in plan.asked_for and self.gates.is_open(model.id):
            rung = Rung.DOUBTED
        wait_s, until, reason = 0.0, 0.0, "transient"
        transient = self._protection.transient
        rest = transient.get(model.id, now) if transient.rests else None
        if rest is not None and model.id not in plan.forgiven:
            rung, until, wait_s = Rung.RESTING, rest.until, rest.trial_at() - now
        if (again_s := self._again_s(model, plan, now)) > wait_s:
            wait_s, reason = again_s, "failed" if rest is None else reason
        if transient.recovering and wait_s <= 0 and plan.patient and (room_s := transient.room_s(model.id, now)):
            wait_s, reason = room_s, "trial"
        if wait_s > 0:
            return Step(model, rung, blocked=Blocked(reason, wait_s))
        key, resting_until, key_wait_s = self._available(model, plan, now)
        if key is None:
            return Step(model, rung, blocked=Blocked("keys", key_wait_s))
        if resting_until:
            rung, until = Rung.KEY_RESTING, max(until, resting_until)
        if (rung >= FIRST_TRIAL or model.id == plan.trial) and (trial_s := self._trial_s(model, rung, now)):
            return Step(model, rung, blocked=Blocked("trial", trial_s))
        return Step(model, rung, key, until)

    def _again_s(self, model: Model, plan: Plan, now: float) -> float:
        """Seconds until this request may ask a model after what it has met with."""
        failed_at = plan.failed.get(model.id)
        if failed_at is None and not plan.spares(model):
            return 0.0
        return self._failed_s(self._protection.transient, model.id, failed_at, plan, now)

    def _failed_s(self, rests: Cooldowns[K], thing: K, failed_at: float | None, plan: Plan, now: float) -> float:
        """The same of a thing that failed then in this request; None: it is only spared."""
        if rests.proved_since(thing, plan.failed_at if failed_at is None else failed_at):
            return 0.0  # it has answered others since
        again_at = 0.0 if failed_at is None else failed_at + self._protection.trial_spacing_s
        return max(0.0, again_at - now, plan.again_at - now)

    def _trial_s(self, model: Model, rung: Rung, now: float) -> float:
        """Seconds after which a trial may be possible; 0: now."""
        trials, spacing_s = self._protection.trials, self._protection.trial_spacing_s
        if busy_s := trials.busy_s(model.id, now):
            return min(busy_s, spacing_s)
        resting = len(self._protection.transient) + len(self._protection.keys)
        return trials.pause_s(resting, now) if rung >= Rung.RESTING else 0.0

    def _available(self, model: Model, plan: Plan, now: float) -> tuple[Key | None, float, float | None]:
        """A key that may be used now, and until when it rests after a 429 that named no time (0: it does not, and such
        a key is preferred). Without one, the shortest known wait in seconds."""
        keys = self._reach(plan.need).keys[model.platform.id]
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

    def _key_wait(
        self, key: Key, model: Model, plan: Plan, now: float, *, capacity: bool = True
    ) -> tuple[float | None, float]:
        """Seconds until this key may be used for this model (None: never by this request), and until when it rests;
        without `capacity` as far as the ledger does not matter."""
        wait_s, until, keys = 0.0, 0.0, self._protection.keys
        if keys.rests and (rest := keys.get((key.id, model.id), now)) is not None:
            wait_s, until = rest.trial_at() - now, rest.until
        if plan.failed_keys and (failed_at := plan.failed_keys.get((key.id, model.id))) is not None:
            if failed_at == inf:
                return None, until
            wait_s = max(wait_s, self._failed_s(self._protection.keys, (key.id, model.id), failed_at, plan, now))
        if keys.recovering and wait_s <= 0 and not until and plan.patient:
            wait_s = keys.room_s((key.id, model.id), now)
        if wait_s > 0 or not capacity:
            return wait_s, until
        return self.ledger.wait_s(model, key.id, plan.need.tokens, now), until

    def _ordered(
        self, models: list[Model], mode: Mode, standing: Standing, plan: Plan, now: float, rng: Random
    ) -> list[Model]:
        """Models of the chain: by the mode's own order, then what it prefers, then those without doubts, then what the
        session prefers first."""
        ranked = models if mode is Mode.PRIORITY else self._sampled(models, mode, plan, now, rng)
        liked = [m for m in ranked if mode in m.prefer_in and self.usable_key(m, plan, now)]
        if liked:
            liked.sort(key=lambda m: self.catalog.position[m.id])
            ranked = liked + [m for m in ranked if m not in liked]
        if doubted := self.gates.doubted(now):
            ranked = sorted(ranked, key=lambda m: m.id in doubted)
        if standing is NO_STANDING:
            return ranked
        ranked = sorted(ranked, key=lambda m: m.id != standing.preferred_model)
        plan.held_back = frozenset(m.id for m in ranked if standing.holds_back(m.id, m.platform.id))
        return sorted(ranked, key=lambda m: m.id in plan.held_back) if plan.held_back else ranked

    def _sampled(self, models: list[Model], mode: Mode, plan: Plan, now: float, rng: Random) -> list[Model]:
        """Best first by Thompson sampling: each score draws anew from what is believed of the model."""
        if not models:
            return models
        drawn = self.scores.drawn(models, mode, rng)
        scores = self._penalised(drawn, models, now)
        plan.draws = Draws(mode, models, drawn, scores)
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


def others_than(asked: Sequence[Model], models: Sequence[Model], need: Need) -> list[Model]:
    """Those of the models that may follow the pinned one."""
    return [] if need.strict else [m for m in models if m not in asked and not is_demo(m.platform)]
