"""Does the health gate leave a broken model, win it back, and leave the healthy ones alone? On simulated time.

Six models over the gateway's own plan and gates, with a slow belief that knows their usual rates and does not change:
that is what makes the gate necessary. The best one breaks in a way that rests nothing (empty, malformed, wrapped, 404)
and heals half an hour later. What an outcome changes is decided by protection.costs, as in the gateway.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from protection import Answered, Facts, Failed, Failure, FeedGate, Level, Phase, Rests, Skip, UpstreamError
from protection import costs as costs_of
from router import Router
from routing.catalog import Catalog, Key, KeyStatus, Model, Platform
from routing.route import Route
from routing.scores import Stats
from routing.standing import NO_STANDING, Protection
from wire.chat import Mode, Need

RATES = {"best": 0.97, "b": 0.95, "c": 0.95, "d": 0.93, "e": 0.90, "f": 0.90}
WEIGHT = 7_000.0  # requests that the slow belief knows of each: a week of 1,000 a day
GAP_S = 2.0  # between two requests
BROKEN_S = 1_800.0
REQUESTS_LATER = 20  # that show where the traffic is
PATIENCE_S = 600.0  # to wait for a model's return
NEED = Need(mode=Mode.BALANCED, pinned=None, tokens=100)
EMPTY = UpstreamError(Failure.EMPTY, "No text.", status=200)


@dataclass(frozen=True)
class Replay:
    """What one outage did: first attempts on the broken model, and when half of its traffic was back."""

    first_20: int
    wasted: int
    back_s: float


@dataclass
class World:
    """A router over models that fail by chance."""

    rates: dict[str, float]
    rng: Random
    now: float = 1_000.0
    alarms: int = 0
    router: Router = field(init=False)
    protection: Protection = field(init=False)
    rests: Rests = field(default_factory=lambda: Rests(15.0, 120.0))

    def __post_init__(self) -> None:
        self.protection = Protection(levels={}, sticky_ttl_s=1800.0, thread_cooldown_s=180.0)
        self.router = Router(self.protection)
        platforms = [
            Platform(id=name, name=name, adapter="openai", base_url="http://127.0.0.1:1") for name in self.rates
        ]
        models = [model_of(id, platform) for id, platform in enumerate(platforms, start=1)]
        keys = [Key(id, platform.id, "secret") for id, platform in enumerate(platforms, start=1)]
        self.router.load(Catalog(platforms, models, keys), {key.id: KeyStatus.HEALTHY for key in keys})
        self.router.scores.learn(
            {
                model.id: Stats(
                    total=WEIGHT, successes=WEIGHT * self.rates[model.model_id], raw_total=int(WEIGHT),
                    raw_successes=int(WEIGHT), tok_per_sec=100.0, avg_ttfb_ms=400.0 if model.id == 1 else 1_200.0,
                )
                for model in models
            }
        )  # fmt: skip

    def request(self) -> str:
        """One request, with failover; gives the model that was asked first."""
        plan = self.router.plan(NEED, NO_STANDING, self.now, self.rng)
        first = ""
        while (route := self.router.next_route(plan, self.now)) is not None:
            name = route.model.model_id
            first = first or name
            ok = self.rng.random() < self.rates[name]
            outcome = Answered() if ok else Failed(EMPTY, Phase.BEFORE_STREAM)
            for effect in costs_of(outcome, Facts(Level.MODEL_SKIP, False, 0, self.rests), self.now):
                if isinstance(effect, Skip):
                    plan.note_failure(route, effect, self.now, None)
                elif isinstance(effect, FeedGate):
                    self.feed(route, ok)
            if route.trial:
                self.protection.trials.release(route.model.id, route.tried_at)
            if ok:
                break
        return first

    def feed(self, route: Route, ok: bool) -> None:
        router, model = self.router, route.model
        hold = not ok and router.gates_hold(model, self.now)
        change = router.gates.feed(
            model.id, ok=ok, trial=route.trial, began=self.now, rate=router.success_rate(model), hold=hold,
            now=self.now, rng=self.rng,
        )  # fmt: skip
        self.alarms += change == "opened"

    def run(self, requests: int) -> list[str]:
        """That many requests; the model that each asked first."""
        asked = []
        for _ in range(requests):
            asked.append(self.request())
            self.now += GAP_S
        return asked


def model_of(id: int, platform: Platform) -> Model:
    return Model(
        id=id, platform=platform, model_id=platform.id, name=platform.id, intelligence_rank=1, speed_rank=1,
        context_window=100_000, max_output=None, rpm=None, rpd=None, tpm=None, tpd=None, tools=True, vision=False,
        exclude_from=frozenset(), prefer_in=frozenset(), enabled=True, priority=id, in_chain=True,
    )  # fmt: skip


def replay(seed: int, *, broken_rate: float = 0.0) -> Replay:
    """The best model breaks for half an hour and heals."""
    world = World(dict(RATES), Random(seed))
    usual = world.run(200).count("best") / 200
    world.rates["best"] = broken_rate
    asked = world.run(round(BROKEN_S / GAP_S))
    world.rates["best"] = RATES["best"]
    healed, lately = world.now, asked[-REQUESTS_LATER:]
    while world.now - healed < PATIENCE_S:
        lately = [*lately[1:], *world.run(1)]
        if lately.count("best") / REQUESTS_LATER >= usual / 2:
            break
    return Replay(asked[:20].count("best"), asked.count("best"), world.now - healed)


def false_alarms(seed: int, requests: int) -> int:
    """How often a gate opens before a model that answers 95 % as it always has."""
    world = World(dict.fromkeys(RATES, 0.95), Random(seed))
    world.run(requests)
    return world.alarms
