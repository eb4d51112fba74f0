"""A small world for the pure modules: models whose names nobody has heard of, and a router over them."""

import json
from random import Random

from dialects.chat import ChatDialect
from router import Router
from routing.catalog import Catalog, Key, KeyStatus, Model, Platform
from routing.standing import NO_STANDING, Protection, Standing
from wire.chat import Chat

NOW = 1000.0
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
        models.append(a_model(id, platform, **{k: v for k, v in facts.items() if k != "platform"}))
    return models


class World:
    """A router over these models, each platform with one key; a key's id is 100 + its platform's number."""

    def __init__(self, *all_facts: dict) -> None:
        self.models = models_of(*all_facts)
        self.protection = Protection(levels={}, sticky_ttl_s=1800.0, thread_cooldown_s=180.0)
        self.router = Router(self.protection)
        platforms = list(dict.fromkeys(model.platform for model in self.models))
        self.keys = {p.id: Key(100 + n, p.id, "secret") for n, p in enumerate(platforms, start=1)}
        self.router.load(
            Catalog(platforms, self.models, self.keys.values()),
            {key.id: KeyStatus.UNKNOWN for key in self.keys.values()},
        )

    def order(self, model: str, seed: int = 0, standing: Standing = NO_STANDING, now: float = NOW) -> list[int]:
        return [m.id for m in self.router.plan(a_chat(model).need, standing, now, Random(seed)).complete()]

    def orders(self, model: str, standing: Standing = NO_STANDING) -> list[list[int]]:
        return [self.order(model, seed, standing) for seed in range(DRAWS)]

    def first(self, model: str, standing: Standing = NO_STANDING) -> set[int]:
        """Every model that came first in one of the draws."""
        return {order[0] for order in self.orders(model, standing)}

    def rest_key(self, id: int, seconds: float = 60.0) -> None:
        """The model's only key rests for it."""
        model = self.models[id - 1]
        self.protection.keys.set((self.keys[model.platform.id].id, id), NOW + seconds, NOW)


def a_chat(model: str = "auto", **fields) -> Chat:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}
    return ChatDialect().parse(json.dumps(body).encode(), 0.0)
