"""The ladder (SPEC 4.10, 5.1): in which order a request asks what could answer it, and that it leaves out nothing."""

import itertools
from dataclasses import dataclass
from math import inf

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from worlds import NOW, World, a_failure

from protection import Answered, Cancelled, Failed, Failure, KeyStatus, Phase, Scope, Skip
from router import LAST_ATTEMPTS, Plan
from routing.catalog import KEYLESS, Key, Model
from routing.cooldowns import TRIAL_SPACING_S
from routing.route import Route, Rung
from routing.standing import Standing
from routing.trials import LEASE_S

LATER = NOW + 2.0  # when what has rested since NOW may be tried
GONE, PASSING = Skip(Scope.MODEL, again=False), Skip(Scope.MODEL, again=True)
KEY_GONE = Skip(Scope.KEY, again=False)


def open_gate(world: World, id: int) -> None:
    for _ in range(10):
        world.router.gates.feed(id, ok=False, rate=0.9, hold=False, began=NOW, now=NOW, rng=world.rng)


def asked(world: World, plan: Plan, now: float = LATER, skip: Skip = GONE) -> list[Route]:
    """Every route that a request takes when each of them fails and its trial ends with it."""
    routes = []
    while (route := world.router.next_route(plan, now)) is not None:
        routes.append(route)
        plan.attempts_left = max(LAST_ATTEMPTS + 1, plan.attempts_left - 1)
        plan.note_failure(route, skip, now, None)
        world.protection.trials.restore(((), 0.0))
    return routes


def models(routes: list[Route]) -> list[int]:
    return [route.model.id for route in routes]


# --- Rungs --------------------------------------------------------------------------------------------------------


def test_rungs_are_taken_from_the_first_to_the_last_and_within_one_what_rests_shortest_first():
    marked = {"exclude_from": ["priority"]}
    world = World({"priority": 9}, {}, marked, {}, {}, {}, {}, {}, {}, {"rpd": 0}, {}, {"enabled": False})
    open_gate(world, 5)
    world.rest_model(6, 60.0)
    world.rest_model(7, 30.0)
    world.rest_key(8)
    world.rest_key(9, firm=True)
    world.router.set_key_status(111, KeyStatus.INVALID)
    plan = world.plan(standing=Standing(others_models={2}, banned=("p4",)), now=LATER)

    routes = asked(world, plan)

    assert models(routes) == [1, 2, 3, 4, 5, 7, 6, 8]
    assert [route.rung for route in routes] == [
        Rung.FREE, Rung.HELD_BACK, Rung.EXCLUDED, Rung.DOUBTED, Rung.DOUBTED, Rung.RESTING, Rung.RESTING,
        Rung.KEY_RESTING,
    ]  # fmt: skip
    assert [route.trial for route in routes] == [False] * 3 + [True] * 5


def test_a_model_that_is_doubted_twice_stands_on_its_worst_rung():
    world = World({"exclude_from": ["priority"]}, {"exclude_from": ["priority"]}, {}, {})
    world.rest_model(3)
    plan = world.plan(standing=Standing(others_models={1}, banned=("p2", "p3")), now=LATER)

    assert [(r.model.id, r.rung) for r in asked(world, plan)] == [(4, 1), (1, 3), (2, 4), (3, 5)]


def test_a_pinned_model_that_rests_is_tried_after_all_that_is_free():
    world = World({}, {}, {"exclude_from": ["balanced"]})
    world.rest_model(1)

    assert models(asked(world, world.plan("m1", now=LATER))) == [2, 3, 1]


def test_a_pinned_model_comes_first_whatever_its_mark_and_its_gate():
    world = World({}, {}, {"exclude_from": ["balanced"]})
    open_gate(world, 3)

    routes = asked(world, world.plan("m3", now=LATER))

    assert models(routes)[0] == 3
    assert (routes[0].rung, routes[0].trial) == (Rung.FREE, False)


def test_only_the_pinned_model_is_ever_asked_without_fallback():
    world = World({"model_id": "same"}, {"model_id": "same"}, {})
    plan = world.plan("p2/same", strict=True, now=LATER)

    assert models(asked(world, plan)) == [2, 1]


def test_a_key_that_does_not_rest_goes_before_one_that_does():
    world = World({"keys": 3}, {})
    for key in (101, 102):
        world.protection.keys.set((key, 1), NOW + 60 - key / 100, NOW)

    routes = asked(world, world.plan(now=LATER), skip=KEY_GONE)

    assert [(r.model.id, r.key.id) for r in routes] == [(1, 103), (2, 104), (1, 102), (1, 101)]


# --- Trials -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failed_before_s", [0.0, 0.5, TRIAL_SPACING_S])
def test_what_rests_is_tried_a_second_after_its_last_failure_at_the_earliest(failed_before_s):
    world = World({})
    world.rest_model(1, now=NOW)

    now = NOW + failed_before_s
    route = world.router.next_route(plan := world.plan(now=now), now)

    if failed_before_s < TRIAL_SPACING_S:
        assert route is None
        assert plan.blocked[1].reason == "transient"
        assert plan.wait_s == pytest.approx(TRIAL_SPACING_S - failed_before_s)
    else:
        assert route.trial


def test_a_trial_is_one_requests_at_a_time(world_store):
    world = World({})
    world.keep_books(world_store)
    world.rest_model(1)
    plans = [world.plan(now=LATER) for _ in range(3)]
    trial = world.router.next_route(plans[0], LATER)

    assert trial.trial
    assert [world.router.next_route(plan, LATER) for plan in plans[1:]] == [None, None]
    assert plans[1].blocked[1].reason == "trial"
    assert plans[1].wait_s == TRIAL_SPACING_S
    world.fail(trial, Failure.SERVER_ERROR, LATER, plan=plans[0])

    assert world.router.next_route(plans[1], LATER) is None  # at least a second after its last failure
    assert world.router.next_route(plans[1], LATER + TRIAL_SPACING_S).trial


@pytest.mark.parametrize("outcome", [Answered(), Cancelled(), Failed(a_failure(Failure.BAD_REQUEST), Phase.MID_STREAM)])
def test_a_trial_is_given_back_however_it_ends(world_store, outcome):
    world = World({}, {})
    world.keep_books(world_store)
    for model in (1, 2):
        world.rest_model(model)
    trial = world.router.next_route(world.plan(now=LATER), LATER)
    assert dict(world.protection.trials.running()) == {1: LATER}

    world.settle(trial, outcome, LATER)

    assert not dict(world.protection.trials.running())
    again = LATER + TRIAL_SPACING_S if isinstance(outcome, Failed) else LATER  # one in vain keeps a distance
    assert world.router.next_route(world.plan(now=again), again).model.id == 1


def test_a_good_trial_ends_the_rest_for_everybody(world_store):
    world = World({})
    world.keep_books(world_store)
    world.rest_model(1)
    world.rest_key(1)
    world.settle(world.router.next_route(world.plan(now=LATER), LATER), Answered(), LATER)

    plan = world.plan(now=LATER)

    assert [world.router.next_route(plan, LATER).rung for _ in range(3)] == [Rung.FREE] * 3


# --- Breadth (SPEC 5.1) -------------------------------------------------------------------------------------------


def test_after_three_failures_of_a_platform_its_other_models_follow_those_of_others():
    big = [{"platform": "big"}] * 6
    world = World(*big, {"platform": "small"}, {"platform": "small"})

    assert models(asked(world, world.plan())) == [1, 2, 3, 7, 8, 4, 5, 6]


def test_a_deep_platform_still_goes_before_a_lower_rung():
    world = World(*[{"platform": "big"}] * 5, {"exclude_from": ["priority"]}, {})
    plan = world.plan(standing=Standing(others_models={7}))

    assert models(asked(world, plan)) == [1, 2, 3, 4, 5, 7, 6]


def test_after_three_failed_keys_of_a_model_its_other_keys_follow_other_models():
    world = World({"keys": 5}, {}, {})

    routes = asked(world, world.plan(), skip=KEY_GONE)

    assert models(routes) == [1, 1, 1, 2, 3, 1, 1]
    assert len({(route.model.id, route.key.id) for route in routes}) == 7


def test_the_last_three_attempts_go_to_platforms_that_have_not_been_asked():
    world = World(*[{"platform": "big"}] * 3, {}, {}, {"exclude_from": ["priority"]})
    plan = world.plan(standing=Standing(others_models={5}))
    plan.attempts_left = 5
    order = []
    while plan.attempts_left:
        order.append(route := world.router.next_route(plan, NOW))
        plan.note_failure(route, GONE, NOW, None)
        plan.attempts_left -= 1

    assert models(order) == [1, 2, 4, 5, 6]


def test_the_last_attempts_go_on_where_they_were_when_every_platform_has_been_asked():
    world = World(*[{"platform": "big"}] * 5, {})
    plan = world.plan()
    plan.attempts_left = 4
    order = []
    while plan.attempts_left:
        order.append(route := world.router.next_route(plan, NOW))
        plan.note_failure(route, GONE, NOW, None)
        plan.attempts_left -= 1

    assert models(order) == [1, 6, 2, 3]


# --- Asking again (SPEC 5.5) --------------------------------------------------------------------------------------

PAUSE_S = 4.0


def test_what_failed_for_a_reason_that_passes_is_asked_again_after_a_second_and_then_more_seldom():
    world, now, at = World({}, {}), NOW, []
    plan = world.plan()
    for _ in range(6):
        while (route := world.router.next_route(plan, now)) is None:
            assert plan.wait_s is not None and plan.wait_s > 0
            now += plan.wait_s
        at.append((round(now - NOW, 3), route.model.id))
        plan.note_failure(route, PASSING, now, PAUSE_S)

    assert at == [(0.0, 1), (0.0, 2), (1.0, 1), (5.0, 2), (9.0, 1), (13.0, 2)]


@pytest.mark.parametrize(("skip", "pause_s"), [(GONE, PAUSE_S), (PASSING, None), (KEY_GONE, PAUSE_S)])
def test_nothing_is_asked_again_that_will_not_pass_or_when_there_is_no_time_to_wait(skip, pause_s):
    world = World({})
    plan = world.plan()
    plan.note_failure(world.router.next_route(plan, NOW), skip, NOW, pause_s)

    assert world.router.next_route(plan, NOW + 3600) is None
    assert plan.wait_s is None


def test_a_request_that_is_too_long_skips_every_window_that_is_not_larger():
    windows = [8_000, 8_000, 4_000, 32_000]
    world = World(*({"context_window": size} for size in windows))
    plan = world.plan()
    plan.note_failure(world.router.next_route(plan, NOW), Skip(Scope.WINDOW, again=False), NOW, PAUSE_S)

    assert models(asked(world, plan)) == [4]


# What stands in the way, and the seconds until it passes.
WAITS = {
    "a rest": (lambda world: world.rest_model(1), "transient", 1.0),
    "a key's named time": (lambda world: world.rest_key(1, 7.0, firm=True), "keys", 7.0),
    "a key's guessed time": (lambda world: world.rest_key(1, 7.0), "keys", 1.0),
    "a minute's requests": (lambda world: world.reserve(1, NOW - 50.0), "keys", 10.0),
    "another's trial": (lambda world: world.lease(1), "trial", 1.0),
}


@pytest.mark.parametrize(("happens", "reason", "seconds"), WAITS.values(), ids=WAITS)
def test_it_is_known_when_what_stands_in_the_way_will_pass(happens, reason, seconds):
    world = World({"rpm": 1})
    happens(world)
    plan = world.plan(standing=Standing(banned=("p1",)))

    assert world.router.next_route(plan, NOW) is None

    assert plan.blocked[1].reason == reason
    assert plan.wait_s == pytest.approx(seconds)


def test_the_soonest_of_several_is_waited_for():
    world = World({}, {}, {"rpd": 0})
    world.rest_key(1, 30.0, firm=True)
    world.rest_key(2, 20.0, firm=True)

    assert world.router.next_route(plan := world.plan(), NOW) is None

    assert plan.wait_s == 20.0


@pytest.mark.parametrize("gone", [1, 2])
def test_a_model_that_leaves_the_catalogue_in_mid_request_disturbs_nobody(gone):
    world = World({"model_id": "same"}, {"model_id": "same"})
    plan = world.plan("same")
    first = world.router.next_route(plan, NOW)
    world.forget(gone)
    plan.note_failure(first, PASSING, NOW, PAUSE_S)

    assert world.router.asked_for_left(plan, NOW) in (True, False)
    assert world.router.reasons(plan, NOW) is not None
    assert world.router.soonest_s(plan, NOW) is None
    assert world.router.next_route(plan, NOW).model.id == 2


# --- Nothing that could answer is left unasked --------------------------------------------------------------------


@dataclass(eq=False)
class Flight:
    """An attempt that is running."""

    plan: Plan
    route: Route
    began: float


FACTS = st.fixed_dictionaries(
    {"platform": st.sampled_from(["a", "b", "c"]), "keys": st.integers(1, 3)},
    optional={
        "rpd": st.integers(0, 12),
        "rpm": st.integers(1, 4),
        "context_window": st.sampled_from([900, 4_000]),
        "exclude_from": st.just(["balanced", "smart"]),
        "enabled": st.just(False),
        "model_id": st.just("shared"),
    },
)
ANY_FAILURE = [failure for failure in Failure if failure is not Failure.CONTENT_FILTER]
KINDS = st.sampled_from([Failure.SERVER_ERROR, Failure.RATE_LIMITED]) | st.sampled_from(ANY_FAILURE)
NAMES = st.sampled_from(["auto", "auto-smart", "auto-fast", "auto-priority", "m1", "shared"])


class Life(RuleBasedStateMachine):
    """Requests come, ask, fail, wait and succeed over one router. Each answer of `next_route` is compared with the rule
    of 4.10, written down here once more in its plainest form, over the facts of each pair of model and key."""

    plans, flights = Bundle("plans"), Bundle("flights")
    store = None

    @initialize(facts=st.lists(FACTS, min_size=1, max_size=6))
    def begin(self, facts):
        self.world = World(*facts)
        self.world.keep_books(self.store)
        self.now = NOW
        self.used: list[tuple[int, int, float]] = []  # every reservation: model, key and when
        self.running: list[Flight] = []

    @rule(target=plans, name=NAMES, data=st.data(), waits=st.booleans())
    def arrive(self, name, data, waits):
        ids = [model.id for model in self.world.models]
        standing = Standing(
            preferred_model=data.draw(st.sampled_from([None, *ids])),
            banned=tuple(data.draw(st.sets(st.sampled_from("abc"), max_size=2))),
            others_models=data.draw(st.sets(st.sampled_from(ids), max_size=2)),
        )
        if name in ("m1", "shared"):
            standing = Standing()
        try:
            plan = self.world.plan(name, standing, self.now)
        except Exception as error:  # nothing could ever serve it
            assert type(error).__name__ in ("NoProviders", "ModelNotFound", "PromptTooLong", "InvalidRequest")
            return multiple()
        plan.attempts_left, plan.patient = data.draw(st.integers(1, 30)), waits
        self.pauses = getattr(self, "pauses", {}) | {id(plan): PAUSE_S if waits else None}
        return plan

    @rule(target=flights, plan=plans)
    def ask(self, plan):
        usable = self.usable(plan)
        route = self.world.router.next_route(plan, self.now)
        if route is None:
            assert usable == {}, "something that could answer was left unasked"
            return multiple()
        assert route.model.id in usable
        rung, keys = usable[route.model.id]
        assert route.rung is rung
        assert route.key.id in keys
        if plan.attempts_left > LAST_ATTEMPTS and not route.trial:
            assert rung is min(rung for rung, _ in usable.values())
        self.used.append((route.model.id, route.key.id, self.now))
        flight = Flight(plan, route, self.now)
        self.running.append(flight)
        return flight

    @rule(flight=consumes(flights), failure=KINDS, after_s=st.sampled_from([None, 0.5, 40.0]), status=st.booleans())
    def fail(self, flight, failure, after_s, status):
        error = a_failure(failure, status=503 if status else None, retry_after_s=after_s)
        self.end(flight, Failed(error, Phase.BEFORE_STREAM))

    @rule(flight=consumes(flights), outcome=st.sampled_from([Answered(), Cancelled()]))
    def succeed_or_leave(self, flight, outcome):
        self.end(flight, outcome)

    @rule(plan=plans, failure=KINDS, after_s=st.sampled_from([None, 0.5]), times=st.integers(1, 4))
    def ask_in_vain(self, plan, failure, after_s, times):
        """What a request does that meets nothing but one kind of failure, a second or more apart."""
        for _ in range(times):
            if isinstance(flight := self.ask(plan), Flight):
                self.fail(flight, failure, after_s, False)
            self.now += 1.25

    @rule(seconds=st.sampled_from([0.3, 1.0, 4.0, 16.0, 61.0, 125.0]))
    def pass_time(self, seconds):
        self.now += seconds

    @rule(data=st.data())
    def repair_a_key(self, data):
        key = data.draw(st.sampled_from(self.world.all_keys))
        self.world.router.set_key_status(key.id, KeyStatus.HEALTHY)

    @precondition(lambda self: self.world.protection.transient)
    @rule()
    def clear(self):
        self.world.protection.clear_cooldowns(self.now)
        self.world.router.gates.close_all()

    @invariant()
    def every_model_is_on_trial_once(self):
        held = dict(self.world.protection.trials.running()) if hasattr(self, "world") else {}
        on_trial = [flight for flight in getattr(self, "running", ()) if flight.route.trial]
        lasting = [flight.route.model.id for flight in on_trial if flight.began + LEASE_S > self.now]
        assert sorted(lasting) == sorted(set(lasting))
        assert set(lasting) <= set(held) <= {flight.route.model.id for flight in on_trial}

    def end(self, flight: Flight, outcome) -> None:
        self.running.remove(flight)
        pause_s = self.pauses[id(flight.plan)]
        self.world.settle(flight.route, outcome, self.now, plan=flight.plan, began=flight.began, pause_s=pause_s)

    def usable(self, plan: Plan) -> dict[int, tuple[Rung, set[int]]]:
        """Each model that could be asked now: its rung, and with which keys."""
        protection = self.world.protection
        resting = sum(1 for things in (protection.transient, protection.keys) for _ in things.active(self.now))
        found = {}
        for model in plan.complete():
            keys = [(self.key_rests(key, model), key.id) for key in self.keys(model) if self.key_fits(key, model, plan)]
            if not keys or not self.model_fits(model, plan):
                continue
            rests = min(keys)[0]
            rung = self.rung(model, plan, rests=rests)
            on_trial = protection.trials.busy_s(model.id, self.now) > 0
            too_many = rung >= Rung.RESTING and protection.trials.pause_s(resting, self.now) > 0
            if not ((rung >= Rung.DOUBTED or model.id == plan.trial) and (on_trial or too_many)):
                found[model.id] = rung, {id for key_rests, id in keys if key_rests == rests}
        return found

    def keys(self, model: Model) -> list[Key]:
        status = self.world.router.key_status
        return [
            key
            for key in self.world.all_keys
            if key.platform == model.platform.id and status[key.id] is not KeyStatus.INVALID
        ] or ([KEYLESS] if model.platform.keyless else [])

    def rung(self, model: Model, plan: Plan, *, rests: bool) -> Rung:
        world, platform = self.world, model.platform.id
        if rests:
            return Rung.KEY_RESTING
        if world.protection.transient.left(model.id, self.now):
            return Rung.RESTING
        gated = world.router.gates.is_open(model.id) and model.id not in plan.asked_for and model.id != plan.trial
        if platform in plan.banned or gated:
            return Rung.DOUBTED
        if model.id in plan.excluded:
            return Rung.EXCLUDED
        return Rung.HELD_BACK if model.id in plan.held_back else Rung.FREE

    def model_fits(self, model: Model, plan: Plan) -> bool:
        rests = self.world.protection.transient
        failed_at = plan.failed.get(model.id)
        met = failed_at is not None or plan.spares(model)
        return (not met or self.is_due(rests, model.id, failed_at, plan)) and self.has_rested(rests, model.id, plan)

    def key_fits(self, key: Key, model: Model, plan: Plan) -> bool:
        rests, pair = self.world.protection.keys, (key.id, model.id)
        failed_at = plan.failed_keys.get(pair)
        if failed_at is not None and (failed_at == inf or not self.is_due(rests, pair, failed_at, plan)):
            return False
        used = [at for used_model, used_key, at in self.used if (used_key, used_model) == pair]
        minute = [at for at in used if at > self.now - 60]
        fits = (model.rpd is None or len(used) < model.rpd) and (model.rpm is None or len(minute) < model.rpm)
        return fits and self.has_rested(rests, pair, plan)

    def is_due(self, rests, thing, failed_at: float | None, plan: Plan) -> bool:
        """Whether what has failed in this request may be asked again: after a second and the request's own pause, or
        when it has answered others since."""
        if rests.proved_since(thing, plan.failed_at if failed_at is None else failed_at):
            return True
        return plan.again_at <= self.now and (failed_at is None or failed_at + TRIAL_SPACING_S <= self.now)

    def has_rested(self, rests, thing, plan: Plan) -> bool:
        """Whether it is not resting, or may be tried although it is; after a rest not all may come at once."""
        rest = rests.get(thing, self.now)
        if rest is None:
            return not plan.patient or rests.room_s(thing, self.now) == 0
        return self.now >= max(rest.firm_until, min(rest.until, rest.failed_at + TRIAL_SPACING_S))

    def key_rests(self, key: Key, model: Model) -> bool:
        return self.world.protection.keys.left((key.id, model.id), self.now) > 0


def test_a_request_is_refused_only_when_nothing_could_answer_it(world_store):
    """Random lives of a router: `next_route` gives None only when every model is failed for good, resting for a time
    that was named or for less than a second, out of capacity, on trial with another request, not due yet, or so lately
    back that a request which may wait lets others go first; and what it gives is of the best rung there is."""

    class Lived(Life):
        store = world_store

    run_state_machine_as_test(
        Lived, settings=settings(max_examples=80, stateful_step_count=40, deadline=None, database=None)
    )


@pytest.mark.parametrize("count", [1, 2, 7])
def test_keys_take_turns(count):
    world = World({"keys": count})
    plan = world.plan()

    used = [world.router.next_route(plan, NOW).key.id for _ in range(3 * count)]

    assert used == list(itertools.islice(itertools.cycle(range(101, 101 + count)), 3 * count))
