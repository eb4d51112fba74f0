"""Small worlds for pure rules: a router, protection and books over models that nobody has heard of, at simulated times.

`World({}, {"rpd": 1})` has two models on platforms of their own, each with one key.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from random import Random

from msgspec.structs import replace

from config.settings import Settings
from dialects.chat import ChatDialect
from engine.record import Exchange
from engine.settle import Books
from protection import Failed, Failure, KeyStatus, Level, Outcome, Phase, UpstreamError
from records.database import Store
from records.eventlog import EventLog
from records.metrics import Metrics
from router import Router
from routing.catalog import Catalog, Key, Model, Platform
from routing.plan import Plan
from routing.route import Route, Rung
from routing.standing import NO_STANDING, Protection, Standing
from wire.chat import Chat

NOW = 1000.0
TTL_S = 1800.0
NO_LIMITS = {"rpm": None, "rpd": None, "tpm": None, "tpd": None}
DRAWS = 200  # of a random choice that must hold each time


def a_model(id: int, platform: Platform, **own) -> Model:
    """A model like any other but for what is given."""
    facts = {
        "model_id": f"m{id}", "name": f"m{id}", "intelligence_rank": 10, "speed_rank": 10, "context_window": 100_000,
        "max_output": None, "tools": True, "vision": False, "exclude_from": frozenset(), "prefer_in": frozenset(),
        "enabled": True, "priority": id, "in_chain": True, **NO_LIMITS,
    }  # fmt: skip
    marks = {name: frozenset(own[name]) for name in ("exclude_from", "prefer_in") if name in own}
    return Model(id=id, platform=platform, **{**facts, **own, **marks})


def a_platform(id: str, **own) -> Platform:
    return Platform(id=id, name=id, adapter="openai", base_url="http://127.0.0.1:1/v1", **own)


def models_of(*all_facts: dict) -> list[Model]:
    """One model for each dict, numbered from 1, each on a platform of its own unless one is named."""
    platforms: dict[str, Platform] = {}
    models = []
    for id, facts in enumerate(all_facts, start=1):
        name = facts.get("platform", f"p{id}")
        platform = platforms.setdefault(name, a_platform(name))
        models.append(a_model(id, platform, **{k: v for k, v in facts.items() if k not in ("platform", "keys")}))
    return models


def a_chat(model: str = "auto", **fields) -> Chat:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}
    return ChatDialect().parse(json.dumps(body).encode(), 0.0)


def a_failure(failure: Failure, status: int | None = None, retry_after_s: float | None = None) -> UpstreamError:
    return UpstreamError(failure, "simulated", status=status, retry_after_s=retry_after_s)


@dataclass(frozen=True)
class Tried:
    """What the books have to know of an attempt."""

    route: Route
    outcome: Outcome
    started: float


class World:
    """A router over these models. A platform has one key, or as many as `keys` of its first model says; their ids are
    101 and on, in the order of the platforms."""

    def __init__(self, *all_facts: dict, levels: Mapping[str, Level] | None = None) -> None:
        self.models = models_of(*all_facts)
        self.protection = Protection(levels=levels or {}, sticky_ttl_s=TTL_S, thread_cooldown_s=180.0)
        self.router = Router(self.protection)
        self.rng = Random(0)
        platforms = list(dict.fromkeys(model.platform for model in self.models))
        counts = {m.platform.id: f.get("keys", 1) for m, f in reversed(list(zip(self.models, all_facts, strict=True)))}
        names = [platform.id for platform in platforms for _ in range(counts[platform.id])]
        self.all_keys = [Key(101 + n, name, f"secret {n}") for n, name in enumerate(names)]
        self.keys = {key.platform: key for key in reversed(self.all_keys)}
        self.router.load(
            Catalog(platforms, self.models, self.all_keys), {key.id: KeyStatus.UNKNOWN for key in self.all_keys}
        )

    def keep_books(self, store: Store) -> None:
        """From now on attempts can be settled."""
        self.books = Books(
            Settings(), self.protection, self.router, store, EventLog("error"), Metrics(), self.rng, lambda: None
        )

    def settle(
        self,
        route: Route,
        outcome: Outcome,
        now: float = NOW,
        *,
        began: float | None = None,
        plan: Plan | None = None,
        session: str = "",
        pause_s: float | None = None,
    ) -> None:
        """What the engine does at the end of an attempt, which began just before if nothing else is said."""
        # With one attempt left, all the time there is to wait is the pause between two of the request's own trials.
        wait_s = 0.0 if pause_s is None else pause_s
        exchange = Exchange("", now, now, deadline=inf, task=None, wait_max_s=wait_s, session=session, plan=plan)
        self.books.charge(exchange, Tried(route, outcome, now if began is None else began), now)

    def fail(self, route: Route, failure: Failure, now: float = NOW, *, plan: Plan | None = None, **more) -> None:
        self.settle(route, Failed(a_failure(failure, **more), Phase.BEFORE_STREAM), now, plan=plan)

    def route(self, id: int, rung: Rung = Rung.FREE) -> Route:
        """One that nothing was reserved for."""
        model = self.models[id - 1]
        return Route(model, self.keys[model.platform.id], None, rung)

    def plan(
        self,
        model: str = "auto-priority",
        standing: Standing = NO_STANDING,
        now: float = NOW,
        *,
        strict: bool = False,
        **fields,
    ) -> Plan:
        need = replace(a_chat(model, **fields).need, strict=strict)
        return self.router.plan(need, standing, now, self.rng)

    def order(self, model: str, seed: int = 0, standing: Standing = NO_STANDING, now: float = NOW) -> list[int]:
        return [m.id for m in self.router.plan(a_chat(model).need, standing, now, Random(seed)).complete()]

    def orders(self, model: str, standing: Standing = NO_STANDING) -> list[list[int]]:
        return [self.order(model, seed, standing) for seed in range(DRAWS)]

    def first(self, model: str, standing: Standing = NO_STANDING) -> set[int]:
        """Every model that came first in one of the draws."""
        return {order[0] for order in self.orders(model, standing)}

    def rest_key(self, id: int, seconds: float = 60.0, *, firm: bool = False) -> None:
        """The first key of the model's platform rests for it."""
        model = self.models[id - 1]
        self.protection.keys.set((self.keys[model.platform.id].id, id), NOW + seconds, NOW, firm=firm)

    def rest_model(self, id: int, seconds: float = 60.0, now: float = NOW) -> None:
        self.protection.transient.set(id, now + seconds, now)

    def reserve(self, id: int, now: float = NOW) -> None:
        """The model's key has been used."""
        model = self.models[id - 1]
        self.router.ledger.reserve(model, self.keys[model.platform.id].id, 1, now)

    def lease(self, id: int, now: float = NOW) -> None:
        """Another request is trying this model."""
        self.protection.trials.take(id, now)

    def forget(self, id: int) -> None:
        """The model leaves the catalogue."""
        old = self.router.catalog
        models = [model for model in old.models if model.id != id]
        self.router.load(Catalog(old.platforms.values(), models, self.all_keys), self.router.key_status)
