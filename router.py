"""Who could serve a request, and in which order.

Owns the plan and the choice of a key (SPEC 4), over the snapshot in catalog.py, what scores.py thinks of its models and
what ledger.py counts. No I/O; `now` (monotonic seconds) and `rng` are arguments.

A request gets a `Plan` from `Router.plan`: its models in order, and what failed so far. `Router.next_route` walks that
plan: it skips what has been ruled out since, picks a key and reserves capacity. When nothing is left, `plan.blocked`
says what stood in the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from protection import NO_STANDING, RULES, Cooldowns, Cooling, Failure, Standing, UpstreamError
from routing.catalog import KEYLESS, Catalog, Key, KeyStatus, Model, Pool, is_demo
from routing.ledger import Ledger, Penalties
from routing.route import Route
from routing.scores import Scores
from wire.chat import Mode, Need
from wire.errors import GatewayError, InvalidRequest, NoProviders, PromptTooLong

WAITING = {f for f, rule in RULES.items() if rule.cooling in (Cooling.KEY, Cooling.INVALID)}
REFUSAL_STATUSES = {400, 422}  # with these a provider calls the request itself bad
TOO_LONG_OR_FILTERED = {Failure.CONTEXT_LENGTH, Failure.CONTENT_FILTER}
PENALTY_WEIGHT = 0.05
REFUSALS_MAX = 3  # platforms in a row that call a request bad are believed (SPEC 5.3)


@dataclass(slots=True)
class Blocked:
    """Why a model was passed over when its turn came."""

    transient: bool  # else its keys rest or are out of capacity
    left_s: float | None  # until it may be available again, where known

    @property
    def reason(self) -> str:
        return "transient" if self.transient else "keys"


@dataclass(slots=True)
class Plan:
    """One request's way through the models: the order, and what has been ruled out so far."""

    order: list[Model]  # as far as it has been worked out
    tokens: int
    more: Callable[[Plan], list[Model]] | None = None  # works out the rest, which most requests never need
    preferred: tuple[int | None, int | None] = (None, None)  # the session's model and key
    banned: set[str] = field(default_factory=set)
    skipped: dict[int, Model] = field(default_factory=dict)
    failed_keys: set[tuple[int, int]] = field(default_factory=set)  # (key, model)
    blocked: dict[int, Blocked] = field(default_factory=dict)
    cooling: list[str] = field(default_factory=list)  # labels of models left out by transient cooldowns and bans

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

    def skip(self, model: Model) -> None:
        self.skipped[model.id] = model

    def skip_window(self, model: Model) -> None:
        """The request is too long for this model, so for every model that holds no more."""
        for other in self.complete():
            if other.context_window <= model.context_window:
                self.skip(other)
        self.skip(model)

    def ban(self, platform: str) -> None:
        self.banned.add(platform)

    def allows(self, model: Model) -> bool:
        return model.id not in self.skipped and model.platform.id not in self.banned

    def skipped_labels(self) -> list[str]:
        return sorted({*self.cooling, *(m.label for m in self.skipped.values())})


@dataclass(frozen=True, slots=True)
class Attempt:
    """One call to a provider that failed."""

    route: Route
    error: UpstreamError
    ms: int

    @property
    def calls_request_bad(self) -> bool:
        return self.error.failure is Failure.BAD_REQUEST and self.error.status in REFUSAL_STATUSES

    def as_json(self) -> dict[str, Any]:
        model, error = self.route.model, self.error
        return {
            "platform": model.platform.id,
            "model": model.model_id,
            "status": error.status,
            "kind": str(error.failure),
            "ms": self.ms,
            "message": error.message,
        }


class Router:
    """The catalogue in force, and what traffic has taught about its keys and models."""

    def __init__(self, transient: Cooldowns[int], key_cooldowns: Cooldowns[tuple[int, int]]) -> None:
        self.ledger = Ledger()
        self.penalties = Penalties()
        self.scores = Scores()
        self.key_status: dict[int, KeyStatus] = {}
        self._transient = transient
        self._key_cooldowns = key_cooldowns
        self._turn: dict[int, int] = {}  # model: where its round-robin goes on
        self.catalog = Catalog((), (), ())
        self._usable_keys: dict[str, list[Key]] = {}
        self._candidates: dict[Mode, list[Model]] = {}
        self._others: list[Model] = []  # that follow a pinned model

    def load(self, catalog: Catalog, key_status: Mapping[int, KeyStatus]) -> None:
        """Route by this snapshot from now on."""
        self.catalog = catalog
        self.key_status = dict(key_status)
        self.scores.learn(self.scores.stats)
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
        self._candidates = {
            mode: [m for m in self.catalog.auto_chain if mode not in m.exclude_from and self.has_key(m)]
            for mode in Mode
        }
        self._others = [m for m in self._candidates[Mode.BALANCED] if not is_demo(m.platform)]

    def has_key(self, model: Model) -> bool:
        return bool(self._usable_keys.get(model.platform.id))

    def count_usable_keys(self, model: Model, now: float) -> int:
        """How many of the platform's keys this model could be asked with now; no key needed counts as one."""
        keys = self._usable_keys.get(model.platform.id, [])
        return sum(not self._key_cooldowns.left((key.id, model.id), now) for key in keys)

    def plan(self, need: Need, standing: Standing, now: float, rng: Random) -> Plan:
        """The models able to serve this request, best first.

        Raises ModelNotFound for an unknown name, and a GatewayError saying why when no model could ever serve it.
        """
        preferred = (standing.preferred_model, standing.preferred_key)
        plan = Plan([], need.tokens, preferred=preferred, banned=set(standing.banned))
        chain = self._candidates[need.mode]

        def ordered(models: list[Model], plan: Plan) -> list[Model]:  # given: one that held it would be a cycle
            return self._ordered(models, need.mode, standing, plan, now, rng)

        if need.pinned is None:
            plan.order = ordered(fit(need, chain), plan)
        else:
            asked = [m for m in self.catalog.resolve(need.pinned) if self.has_key(m)]
            others = [] if need.strict else self._others
            if first := fitting(need, asked):
                plan.order = first
                plan.more = lambda plan: ordered(fitting(need, [m for m in others if m not in asked]), plan)
            else:
                plan.order = ordered(fit(need, asked + others), plan)
        if plan.banned or len(self._transient):
            plan.cooling = [m.label for m in plan.complete() if not plan.allows(m) or self._transient.left(m.id, now)]
        return plan

    def next_route(self, plan: Plan, now: float) -> Route | None:
        """The next (model, key) of this plan with its capacity reserved; None when nothing is left."""
        plan.blocked.clear()
        for model in plan.models():
            if not (plan.allows(model) and self.has_key(model)):
                continue
            if left_s := self._transient.left(model.id, now):
                plan.blocked[model.id] = Blocked(transient=True, left_s=left_s)
                continue
            key, wait_s = self._available(model, plan, now)
            if key is None:
                plan.blocked[model.id] = Blocked(transient=False, left_s=wait_s)
                continue
            self._turn[model.id] = self._turn.get(model.id, 0) + 1
            return Route(model, key, self.ledger.reserve(model, key.id, plan.tokens, now))
        return None

    def usable_key(self, model: Model, plan: Plan, now: float) -> Key | None:
        """The key that this request would use for this model now."""
        return self._available(model, plan, now)[0]

    def soonest_s(self, plan: Plan, now: float) -> float | None:
        """When the first of the plan's models may be available again, if that is known."""
        waits = [self._transient.left(m.id, now) or self._available(m, plan, now)[1] for m in plan.complete()]
        return min((wait_s for wait_s in waits if wait_s), default=None)

    def _available(self, model: Model, plan: Plan, now: float) -> tuple[Key | None, float | None]:
        """A key with capacity whose turn it is, else the shortest known wait in seconds for one."""
        keys = self._usable_keys[model.platform.id]
        start = self._turn.get(model.id, 0) % len(keys) if keys else 0
        if plan.preferred[0] == model.id:
            keys = sorted(keys[start:] + keys[:start], key=lambda key: key.id != plan.preferred[1])
            start = 0
        soonest: float | None = None
        for place in range(start - len(keys), start):  # from `start` on and around
            key = keys[place]
            wait_s: float | None = self._key_cooldowns.left((key.id, model.id), now)
            if not wait_s:
                wait_s = self.ledger.wait_s(model, key.id, plan.tokens, now)
            if wait_s == 0 and (key.id, model.id) not in plan.failed_keys:
                return key, None
            if wait_s and (soonest is None or wait_s < soonest):
                soonest = wait_s
        return None, soonest

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
        return sorted(ranked, key=lambda m: standing.holds_back(m.id, m.platform.id))

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


def fit(need: Need, models: list[Model]) -> list[Model]:
    """The same; raises a GatewayError that says what is missing when there is none."""
    if found := fitting(need, models):
        return found
    if not models:
        raise NoProviders
    if need.vision and not (models := [m for m in models if m.vision]):
        raise InvalidRequest("No enabled model with a key can see images.", status=422, code="no_vision_model")
    if need.tools and not (models := [m for m in models if m.tools]):
        raise InvalidRequest("No enabled model with a key can call tools.", status=422, code="no_tool_model")
    raise PromptTooLong(need.tokens, max(m.context_window for m in models))


def request_is_bad(attempts: Sequence[Attempt]) -> bool:
    """Whether so many platforms in a row have called the request itself bad that they are believed."""
    platforms = set()
    for attempt in reversed(attempts):
        if not attempt.calls_request_bad:
            break
        platforms.add(attempt.route.model.platform.id)
    return len(platforms) >= REFUSALS_MAX


def refusal(attempts: Sequence[Attempt]) -> GatewayError:
    """The provider's own verdict on the request, as the client's 400."""
    error = attempts[-1].error
    codes = {Failure.CONTEXT_LENGTH: "context_length_exceeded", Failure.CONTENT_FILTER: "content_filter"}
    return GatewayError(
        error.message,
        status=error.status if error.status and 400 <= error.status < 500 else 400,
        type="invalid_request_error",
        code=error.code or codes.get(error.failure, "bad_request"),
        attempts=[attempt.as_json() for attempt in attempts],
    )


def exhausted(
    plan: Plan, attempts: Sequence[Attempt], *, stream: bool, retry_after_s: float | None = None
) -> GatewayError:
    """What the client is told when nothing is left to try (SPEC 5.3)."""
    failures = [attempt.error.failure for attempt in attempts]
    waiting = all(f in WAITING for f in failures)  # a later request may find these keys usable again
    blocked = plan.blocked.values()
    details: dict[str, Any] = {"retry_after_s": retry_after_s, "attempts": [attempt.as_json() for attempt in attempts]}
    refused = [a for a in attempts if a.calls_request_bad or a.error.failure in TOO_LONG_OR_FILTERED]
    if request_is_bad(attempts) or (attempts and len(refused) == len(attempts)):
        if attempts[-1].error.failure is Failure.CONTEXT_LENGTH:
            window = max(attempt.route.model.context_window for attempt in attempts)
            return PromptTooLong(max(plan.tokens, window + 1), window, attempts=details["attempts"])
        return refusal(attempts)
    if waiting and (plan.banned or any(b.transient for b in blocked)):
        message = "Every model that could serve this is resting after failures. Try again shortly."
        return GatewayError(message, status=503, type="routing_error", code="all_models_exhausted", **details)
    if waiting and (blocked or any(f is not Failure.AUTH for f in failures)):
        message = "Every key that could serve this is rate-limited. Wait, or add another key or platform."
        return GatewayError(message, status=429, type="rate_limit_error", code="rate_limited", **details)
    if not failures:
        return NoProviders()
    if failures[-1] in (Failure.STALL, Failure.TIMEOUT):
        name = "stream_timeout" if stream else "timeout"
        message = "The last provider tried did not answer in time. Try again, or add another platform."
        return GatewayError(message, status=504, type=name, code=name, **details)
    message = "Every provider that could serve this failed. Try again; error.attempts says what each one answered."
    return GatewayError(message, status=502, type="provider_error", code="all_attempts_failed", **details)
