"""Does routing learn? A simulation over the gateway's own plan and its own statistics query, on simulated time.

Four models that differ in nothing but their success rate serve a steady stream of requests. First routing knows
nothing of them; then the best one breaks; then it recovers. Time is simulated: rows of the log carry the second at
which they were made, and before each look at the statistics all of them are dated anew, back from the present, because
the query compares with the real clock.

    python bench/learning.py [--seed 1] [--requests 400]

Regret is what routing lost against an oracle that knows every rate at every moment and always asks the best model
first: the sum, over requests, of the best rate minus the rate of the model asked first (0 when all of them rest, which
the oracle does not know). It counts requests whose first attempt failed needlessly; the client sees none of them.
"""

from __future__ import annotations

import argparse
import asyncio
import sqlite3
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config.settings import Settings
from dialects.chat import ChatDialect
from engine.record import Exchange
from engine.settle import Books
from protection import Answered, Failed, Failure, Outcome, Phase, UpstreamError
from records.database import Store
from records.eventlog import EventLog
from records.metrics import Metrics
from records.request_log import model_stats
from records.rows import Row, insert_rows
from router import Router
from routing.catalog import Catalog, Key, KeyStatus, Model, Platform
from routing.route import Route
from routing.scores import Stats
from routing.standing import NO_STANDING, Protection
from wire.chat import Chat

RATES = {"best": 0.95, "good": 0.8, "poor": 0.5, "bad": 0.1}
BROKEN = {**RATES, "best": 0.0}
WINDOW_DAYS, REFRESH_S = 7, 60.0  # the defaults of SPEC 1.3
GAP_S = 6.0  # between two requests: a busy agent
RECENT = 20  # requests whose routes show where the traffic is now
HALF = 0.5  # of the recent requests: with less, the traffic has left; with more, it is back
GONE = 0.25  # a model that breaks is still tried now and then
DAY_S = 86_400.0
REDATE = """
UPDATE requests
SET created_at = strftime('%Y-%m-%dT%H:%M:%fZ', julianday('now') - (:now - CAST(request_id AS REAL)) / 86400.0)
"""


@dataclass(frozen=True)
class Served:
    """One request: when, which models were asked in which order, and whether the last of them answered."""

    at: float
    asked: tuple[str, ...]
    ok: bool
    best_rate: float  # of all models at that moment
    first_rate: float  # of the one asked first

    @property
    def regret(self) -> float:
        return self.best_rate - self.first_rate


@dataclass(frozen=True)
class Tried:
    """What the books have to know of an attempt."""

    route: Route
    outcome: Outcome
    started: float


@dataclass
class World:
    """A gateway's state over these models, and the simulated second it is. Every failure is of one kind."""

    store: Store
    router: Router
    books: Books
    rng: Random
    failure: Failure
    window_days: int = WINDOW_DAYS
    now: float = 0.0
    refreshed: float = float("-inf")
    pending: list[Row] = field(default_factory=list)

    def log(self, model: str, ok: bool, at: float) -> None:
        """A row of the log; its id is the simulated second, from which it is dated anew."""
        row = Row(repr(at), 0.0, platform=model, model_id=model, status="success" if ok else "error", attempt=1)
        if ok:
            row.output_tokens, row.latency_ms, row.ttfb_ms = 50, 1000, 400
        self.pending.append(row)

    def refresh(self) -> None:
        """What the gateway does every STATS_REFRESH_MS."""
        rows, self.pending, self.refreshed = self.pending, [], self.now

        def work(db: sqlite3.Connection) -> dict[tuple[str, str], Stats]:
            insert_rows(db, rows)
            db.execute(REDATE, {"now": self.now})
            return model_stats(db, self.window_days)

        by_name = self.store.write_now(work)
        models = self.router.catalog.models
        self.router.scores.learn(
            {m.id: by_name[m.platform.id, m.model_id] for m in models if (m.platform.id, m.model_id) in by_name}
        )

    def request(self, rates: Mapping[str, float], chat: Chat) -> Served:
        """One request through the plan, as the attempt loop takes it: a failure has its costs, the next is asked."""
        if self.now - self.refreshed >= REFRESH_S:
            self.refresh()
        plan = self.router.plan(chat.need, NO_STANDING, self.now, self.rng)
        exchange = Exchange("", self.now, self.now, deadline=inf, task=None, wait_max_s=0.0, plan=plan)
        asked: list[str] = []
        ok = False
        while not ok and (route := self.router.next_route(plan, self.now)) is not None:
            name = route.model.model_id
            asked.append(name)
            ok = self.rng.random() < rates[name]
            self.log(name, ok, self.now)
            failed = Failed(UpstreamError(self.failure, "simulated"), Phase.BEFORE_STREAM)
            self.books.charge(exchange, Tried(route, Answered() if ok else failed, self.now), self.now)
        first_rate = rates[asked[0]] if asked else 0.0
        return Served(self.now, tuple(asked), ok, max(rates.values()), first_rate)

    def run(
        self, rates: Mapping[str, float], requests: int, *, mode: str = "balanced", gap_s: float = GAP_S
    ) -> list[Served]:
        """That many requests, one every `gap_s`."""
        body = f'{{"model": "auto-{mode}", "messages": [{{"role": "user", "content": "hi"}}]}}'
        chat = ChatDialect().parse(body.encode(), 0.0)
        served = []
        for _ in range(requests):
            served.append(self.request(rates, chat))
            self.now += gap_s
        return served


@contextmanager
def world(
    seed: int, *, failure: Failure = Failure.SERVER_ERROR, names: Sequence[str] = tuple(RATES)
) -> Iterator[World]:
    """A fresh world in a directory that goes away with it."""
    settings, rng = Settings(), Random(seed)
    protection = Protection(levels={}, sticky_ttl_s=settings.sticky_ttl_ms / 1000, thread_cooldown_s=0.0)
    router = Router(protection)
    platforms = [Platform(id=name, name=name, adapter="openai", base_url="http://127.0.0.1:1") for name in names]
    keys = [Key(id, platform.id, "secret") for id, platform in enumerate(platforms, start=1)]
    models = [equal_model(id, platform) for id, platform in enumerate(platforms, start=1)]
    router.load(Catalog(platforms, models, keys), {key.id: KeyStatus.HEALTHY for key in keys})
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory) / "learning.db", bytes(32))
        try:
            books = Books(settings, protection, router, store, EventLog("error"), Metrics(), rng, lambda: None)
            yield World(store, router, books, rng, failure)
        finally:
            asyncio.run(store.close())


def equal_model(id: int, platform: Platform) -> Model:
    return Model(
        id=id, platform=platform, model_id=platform.id, name=platform.id, intelligence_rank=1, speed_rank=1,
        context_window=100_000, max_output=None, rpm=None, rpd=None, tpm=None, tpd=None, tools=True, vision=False,
        exclude_from=frozenset(), prefer_in=frozenset(), enabled=True, priority=id, in_chain=True,
    )  # fmt: skip


# What came of it.


def shares(served: Sequence[Served], names: Sequence[str] = tuple(RATES)) -> dict[str, float]:
    """Each model's share of the requests, by which model was asked first."""
    first = [s.asked[0] for s in served if s.asked]
    return {name: first.count(name) / len(served) for name in names}


def minutes_until(served: Sequence[Served], name: str, reached: Callable[[float], bool]) -> float | None:
    """Minutes until the model's share of the recent requests is as wanted; None when it never is."""
    for end in range(RECENT, len(served) + 1):
        if reached(shares(served[end - RECENT : end])[name]):
            return (served[end - 1].at - served[0].at) / 60
    return None


def minutes_until_below(served: Sequence[Served], share: float, name: str = "best") -> float | None:
    return minutes_until(served, name, lambda now: now < share)


def minutes_until_above(served: Sequence[Served], share: float, name: str = "best") -> float | None:
    return minutes_until(served, name, lambda now: now > share)


def attempts(served: Sequence[Served], names: Sequence[str] = tuple(RATES)) -> dict[str, int]:
    """How often each model was asked at all, first or after another had failed."""
    return {name: sum(name in s.asked for s in served) for name in names}


def regret(served: Sequence[Served]) -> float:
    return sum(s.regret for s in served)


def regret_of_chance(rates: Mapping[str, float], requests: int) -> float:
    """The regret to be expected of asking any model first."""
    return requests * (max(rates.values()) - sum(rates.values()) / len(rates))


# The three phases.

PHASES = {"learns": RATES, "best breaks": BROKEN, "recovers": RATES}


def three_phases(world: World, requests: int) -> dict[str, list[Served]]:
    return {name: world.run(rates, requests) for name, rates in PHASES.items()}


def remember(world: World, rates: Mapping[str, float], count: int, days: float) -> None:
    """A past: the best one has served `count` requests, evenly over the last days, and the next best a tenth of it."""
    for name, rows in (("best", count), ("good", count // 10)):
        for n in range(rows):
            world.log(name, world.rng.random() < rates[name], world.now - days * DAY_S * (n + 0.5) / rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--requests", type=int, default=400, help="in each phase")
    options = parser.parse_args()
    print(f"{options.requests} requests in each phase, one every {GAP_S:g} s; success rates {RATES}\n")
    pasts = {"nothing known": 0, "1000 requests in 5 days": 1000}
    kinds = {"failures that cool (5xx, no connection)": Failure.SERVER_ERROR, "failures that do not": Failure.EMPTY}
    for past, count in pasts.items():
        for failures, failure in kinds.items():
            print(f"{past}; {failures}")
            with world(options.seed, failure=failure) as simulated:
                remember(simulated, RATES, count, 5.0)
                print_phases(three_phases(simulated, options.requests))


def print_phases(phases: Mapping[str, Sequence[Served]]) -> None:
    names = "".join(f"{name:>7}" for name in RATES)
    print(f"  {'asked first':<12}{names}  answered   regret  by chance  the best one's share of {RECENT} requests")
    for phase, served in phases.items():
        rates = PHASES[phase]
        when = "-"
        if phase == "best breaks":
            left = [minutes(minutes_until_below(served, share)) for share in (HALF, GONE)]
            when = f"below {HALF:.0%} after {left[0]}, below {GONE:.0%} after {left[1]}"
        elif phase == "recovers":
            when = f"above {HALF:.0%} after {minutes(minutes_until_above(served, HALF))}"
        answered = sum(s.ok for s in served) / len(served)
        columns = "".join(f"{share:>7.1%}" for share in shares(served).values())
        by_chance = regret_of_chance(rates, len(served))
        print(f"  {phase:<12}{columns}{answered:>10.1%}{regret(served):>9.1f}{by_chance:>11.1f}  {when}")
    print()


def minutes(value: float | None) -> str:
    return "(not in this time)" if value is None else f"{value:.0f} min"


if __name__ == "__main__":
    main()
