"""Routers over random catalogues, in random states: what property tests of routing are about.

A world is made of one seed, so that a failing example is one number. What models and platforms have in common, and
worlds made by hand, are in worlds.py.
"""

import contextlib
from dataclasses import dataclass
from math import inf
from random import Random

import worlds

from protection import KeyStatus, Level, Scope, Skip
from router import Router
from routing.catalog import Catalog, Key, Model, Platform
from routing.plan import Plan
from routing.route import Route
from routing.scores import Stats
from routing.standing import NO_STANDING, Protection, Standing
from routing.trials import NO_TRIALS
from wire.chat import Mode, ModelKind, Need
from wire.errors import ModelNotFound

NOW = 10_000.0
RANKS = (1, 2, 3, 5, 8, 20, None)
ALIASES = {"gpt": "small", "gpt-fast": "auto-fast", "gpt-large": "p0/large"}
NAMES = ("small", "large", "vendor/large")  # of models: several platforms serve the same
PAUSES_S = (0.0, 0.4, 1.5, 20.0)


@dataclass
class World:
    """A router, and what is around it."""

    rng: Random
    router: Router
    protection: Protection
    catalog: Catalog
    now: float = NOW
    kind: ModelKind = ModelKind.CHAT

    def need(self, **own: object) -> Need:
        """What some request may ask for, in the catalogue's own words; its name may be an alias."""
        rng = self.rng
        names = [*NAMES, *ALIASES, *(f"{p}/{name}" for p in self.catalog.platforms for name in NAMES)]
        wishes = {
            "mode": rng.choice(list(Mode)), "pinned": rng.choice([None, None, *filter(self._usable, names)]),
            "tokens": rng.choice((100, 9_000)), "vision": rng.random() < 0.1, "tools": rng.random() < 0.2,
            "strict": rng.random() < 0.2, "kind": self.kind,
        }  # fmt: skip
        return self.catalog.meant(Need(**(wishes | own)))

    def _usable(self, name: str) -> bool:
        pinned = self.catalog.meant(Need(Mode.BALANCED, name, 1)).pinned
        with contextlib.suppress(ModelNotFound):
            return pinned is None or bool(self.catalog.resolve(pinned))
        return False

    def standing(self) -> Standing:
        rng, models = self.rng, [m.id for m in self.catalog.models]
        if not models or rng.random() < 0.4:
            return NO_STANDING
        return Standing(
            preferred_model=rng.choice([None, *models]),
            banned=some(rng, self.catalog.platforms, 0.2),
            avoided_models=some(rng, models, 0.1),
            others_models=some(rng, models, 0.2),
            busy_platforms=some(rng, self.catalog.platforms, 0.1),
        )

    def failing(self, plan: Plan, attempts_max: int = 30, *, joined: bool = False) -> list[Route]:
        """Every route that a request takes with which everything fails, in some way or other, while time goes on.
        `joined`: each is late, so that another joins it where one may."""
        routes: list[Route] = []
        while len(routes) < attempts_max:
            plan.attempts_left = attempts_max - len(routes)
            route = self.router.next_route(plan, self.now)
            if route is None and plan.wait_s is None:
                break
            if route is None:
                self.now += plan.wait_s + 0.01
                if self.now > NOW + 120:
                    break
                continue
            routes.append(route)
            if joined and (second := self.router.second_route(plan, route, self.now, day_left=0.1)) is not None:
                routes.append(second)
            self.fail(plan, route)
        return routes

    def fail(self, plan: Plan, route: Route) -> None:
        rng, model = self.rng, route.model
        if route.trial:
            self.protection.trials.restore(NO_TRIALS)
        if rng.random() < 0.3:
            self.protection.transient.set(model.id, self.now + 15, self.now)
        if rng.random() < 0.2:
            self.protection.keys.set((route.key.id, model.id), self.now + 60, self.now, firm=rng.random() < 0.5)
        skip = Skip(rng.choice((Scope.KEY, Scope.MODEL, Scope.WINDOW)), again=rng.random() < 0.5)
        plan.note_failure(route, skip, self.now, rng.choice((None, 1.0, 5.0)))
        if rng.random() < 0.1:
            plan.ban(model.platform.id)
        self.now += rng.choice(PAUSES_S)


def some(rng: Random, things, share: float) -> set:
    return {thing for thing in things if rng.random() < share}


def a_world(seed: int, kind: ModelKind = ModelKind.CHAT) -> World:
    rng = Random(seed)
    platforms = [random_platform(rng, f"p{n}") for n in range(rng.randint(1, 5))]
    keys = [
        Key(10 * n + i, platform.id, "secret", trains_on_prompts=rng.choice((None, None, True, False)))
        for n, platform in enumerate(platforms, start=1)
        for i in range(rng.choice((0, 1, 1, 2, 3)))
    ]
    models = []
    for platform in platforms:
        for name in rng.sample(NAMES, rng.randint(1, len(NAMES))):
            models.append(random_model(rng, len(models) + 1, platform, name, kind))
    catalog = Catalog(platforms, models, keys, ALIASES)
    protection = Protection(levels={}, sticky_ttl_s=1800, thread_cooldown_s=180)
    router = Router(protection)
    router.load(catalog, {key.id: rng.choice((*KeyStatus, KeyStatus.HEALTHY)) for key in keys})
    world = World(rng, router, protection, catalog, kind=kind)
    disturb(world)
    return world


def random_platform(rng: Random, id: str) -> Platform:
    return worlds.a_platform(
        id,
        keyless=rng.random() < 0.2,
        protection=rng.choice(list(Level)),
        local=rng.random() < 0.15,
        trains_on_prompts=rng.choice((True, False, None)),
    )


def random_model(rng: Random, id: int, platform: Platform, name: str, kind: ModelKind = ModelKind.CHAT) -> Model:
    def limit() -> int | None:
        return rng.choice((None, None, None, 1, 5))

    def marks(share: float) -> frozenset[str]:
        return frozenset(some(rng, map(str, Mode), share))

    return worlds.a_model(
        id, platform, model_id=name, name=name, intelligence_rank=rng.choice(RANKS), speed_rank=rng.choice(RANKS),
        context_window=rng.choice((4_000, 32_000)), rpm=limit(), rpd=limit(), tools=rng.random() < 0.7,
        vision=rng.random() < 0.4, exclude_from=marks(0.1), prefer_in=marks(0.1), enabled=rng.random() < 0.9,
        priority=rng.randrange(100), in_chain=rng.random() < 0.9, kind=kind, family=name,
    )  # fmt: skip


def disturb(world: World) -> None:
    """What traffic may have left behind."""
    rng, router, protection = world.rng, world.router, world.protection
    stats = {}
    for model in world.catalog.models:
        if rng.random() < 0.2:
            protection.transient.set(model.id, NOW + rng.uniform(0.5, 15), NOW - rng.uniform(0, 3))
        for key in world.catalog.keys[model.platform.id]:
            if rng.random() < 0.15:
                protection.keys.set((key.id, model.id), NOW + rng.uniform(1, 60), NOW - 3, firm=rng.random() < 0.5)
            if rng.random() < 0.2:
                router.ledger.reserve(model, key.id, 100, NOW - rng.uniform(0, 60))
        if rng.random() < 0.2:
            router.penalties.add(model.id, NOW)
        if rng.random() < 0.1:
            protection.trials.take(model.id, NOW)
        if rng.random() < 0.15:
            while (
                router.gates.feed(model.id, ok=False, rate=0.9, hold=False, began=NOW - 60, now=NOW - 60, rng=rng)
                != "opened"
            ):
                pass
        if rng.random() < 0.6:
            total = rng.randint(1, 50)
            good = rng.randint(0, total)
            stats[model.id] = Stats(good, total, good, total, rng.uniform(1, 90) if good else 0.0, None)
    router.scores.learn(stats)


def never(plan: Plan) -> set[int]:
    """The models that this request asks no more."""
    return {model for model, again in plan.failed.items() if again == inf}
