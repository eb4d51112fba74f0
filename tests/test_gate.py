"""The health gate (SPEC 10.4): how soon it opens, how seldom without reason, and how a model comes back."""

from math import log
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import NOW, World

from protection import Answered, Failure, KeyStatus
from routing.gate import (
    JITTER,
    MASS_S,
    QUIET_S,
    REQUESTS_BETWEEN,
    THRESHOLD,
    TRIAL_S,
    TRIAL_S_MAX,
    Gates,
)
from wire.chat import Mode

HEALTHY = 0.95
M = 1


def feed(gates: Gates, *outcomes: bool, rate: float = HEALTHY, hold: bool = False, now: float = NOW, seed: int = 0):
    """What each outcome brought."""
    rng = Random(seed)
    return [gates.feed(M, ok=ok, rate=rate, hold=hold, began=now, now=now, rng=rng) for ok in outcomes]


def opened(rate: float = HEALTHY, now: float = NOW) -> Gates:
    gates = Gates()
    while not gates.is_open(M):
        feed(gates, False, rate=rate, now=now)
    return gates


# --- When it opens ------------------------------------------------------------------------------------------------

# The slow success rate, and how many failures in a row open the gate.
IN_A_ROW = [(1.0, 3), (0.97, 3), (0.95, 3), (0.9, 4), (0.8, 6), (0.7, 8), (0.3, 8), (0.0, 8)]


@pytest.mark.parametrize(("rate", "failures"), IN_A_ROW)
def test_failures_in_a_row_open_it_the_sooner_the_better_the_model_was(rate, failures):
    gates = Gates()

    assert feed(gates, *[False] * failures, rate=rate) == [None] * (failures - 1) + ["opened"]
    assert gates.is_open(M)
    assert not gates.is_open(2)


def test_a_success_takes_back_a_part_of_what_failures_have_added():
    gates = Gates()

    assert feed(gates, False, False, True, False) == [None, None, None, "opened"]
    assert feed(Gates(), False, False, True, True, False) == [None] * 5


def test_successes_before_count_nothing():
    gates = Gates()

    assert feed(gates, *[True] * 1000, False, False, False)[-3:] == [None, None, "opened"]


@given(outcomes=st.lists(st.booleans(), max_size=60), rate=st.floats(0, 1))
def test_the_sum_is_pages_and_the_gate_opens_exactly_at_its_threshold(outcomes, rate):
    """Page's CUSUM, written down a second time in its plainest form."""
    gates, p, total = Gates(), min(max(rate, 0.7), 0.97), 0.0
    for n, ok in enumerate(outcomes):
        total = max(0.0, total - log(2)) if ok else total + log((1 - 0.5 * p) / (1 - p))
        assert feed(gates, ok, rate=rate, seed=n) == ["opened" if total >= THRESHOLD else None]
        if gates.is_open(M):
            return


@pytest.mark.parametrize(("rate", "alarms_max"), [(0.97, 50), (0.95, 60), (0.9, 70)])
def test_a_healthy_model_is_gated_less_than_once_in_1500_requests(rate, alarms_max):
    rng, gates, alarms = Random(5), Gates(), 0
    for _ in range(100_000):
        if gates.feed(M, ok=rng.random() < rate, rate=rate, hold=False, began=NOW, now=NOW, rng=rng) == "opened":
            alarms += 1
            gates.close_all()

    assert alarms <= alarms_max


@pytest.mark.parametrize(("left", "mean_max", "p95_max"), [(0.0, 3.1, 4), (0.25, 4.6, 9), (0.5, 8.5, 18)])
def test_a_model_that_breaks_is_found_within_a_few_requests(left, mean_max, p95_max):
    rng, needed = Random(3), []
    for _ in range(2_000):
        gates, n = Gates(), 0
        while not gates.is_open(M):
            n += 1
            gates.feed(M, ok=rng.random() < left, rate=HEALTHY, hold=False, began=NOW, now=NOW, rng=rng)
        needed.append(n)

    assert sum(needed) / len(needed) <= mean_max
    assert sorted(needed)[1_900] <= p95_max


# --- Trials -------------------------------------------------------------------------------------------------------


def pass_requests(gates: Gates, count: int = REQUESTS_BETWEEN) -> None:
    for _ in range(count):
        gates.arrived()


def test_a_trial_is_due_some_15_s_after_it_opened_and_eight_requests_later():
    gates = opened()
    pass_requests(gates)

    assert not gates.trial_due(M, NOW + TRIAL_S * (1 - JITTER) - 0.001)
    assert gates.trial_due(M, NOW + TRIAL_S * (1 + JITTER))


def test_a_trial_waits_for_eight_requests_but_no_longer_than_five_minutes():
    gates = opened()
    pass_requests(gates, REQUESTS_BETWEEN - 1)
    assert not gates.trial_due(M, NOW + QUIET_S - 1)
    assert gates.trial_due(M, NOW + QUIET_S)

    pass_requests(gates, 1)

    assert gates.trial_due(M, NOW + 20.0)


def test_no_trial_is_due_while_the_gate_is_closed():
    gates = Gates()
    pass_requests(gates)
    feed(gates, False, False)

    assert not gates.trial_due(M, NOW + 1000.0)


def test_a_trial_that_began_is_not_due_again_before_eight_more_requests():
    gates, now = opened(), NOW + 20.0
    pass_requests(gates)
    assert gates.trial_due(M, now)

    gates.trial_began(M, now)

    assert not gates.trial_due(M, now)
    pass_requests(gates)
    assert gates.trial_due(M, now)


def test_each_failed_trial_makes_the_next_one_later_up_to_two_minutes():
    gates, now = opened(), NOW
    for seconds in (30.0, 60.0, 120.0, 120.0, 120.0):
        assert feed(gates, False, now=now) == ["failed"]
        pass_requests(gates)
        assert seconds <= TRIAL_S_MAX
        assert not gates.trial_due(M, now + seconds * (1 - JITTER) - 0.001)
        assert gates.trial_due(M, now + seconds * (1 + JITTER))
        now += seconds


def test_gates_that_opened_together_are_not_tried_together():
    gates, rng = Gates(), Random(1)
    for model in range(20):
        for _ in range(3):
            gates.feed(model, ok=False, rate=HEALTHY, hold=False, began=NOW, now=NOW, rng=rng)

    due = {gate.trial_at for _, gate in gates.open_gates()}

    assert len(due) == 20
    assert max(due) - min(due) > TRIAL_S * JITTER


def test_two_good_trials_close_it_the_second_following_at_once():
    gates, now = opened(), NOW + 20.0
    pass_requests(gates)
    gates.trial_began(M, now)
    assert feed(gates, True, now=now) == [None]
    assert gates.is_open(M)
    assert gates.trial_due(M, now)

    gates.trial_began(M, now)
    assert feed(gates, True, now=now) == ["closed"]

    assert not gates.is_open(M)
    assert not gates.any_open()


@pytest.mark.parametrize("ok", [False, True])
def test_what_was_on_its_way_when_the_gate_opened_is_no_trial(ok):
    gates = opened()

    told = [gates.feed(M, ok=ok, rate=HEALTHY, hold=False, began=NOW - 1, now=NOW + 5, rng=Random(0)) for _ in range(9)]

    assert told == [None] * 9
    assert [gate.trials_failed for _, gate in gates.open_gates()] == [0]


def test_a_good_trial_and_a_bad_one_are_a_bad_one():
    gates = opened()
    assert feed(gates, True, False, True) == [None, "failed", None]

    assert gates.is_open(M)
    assert feed(gates, True) == ["closed"]


def test_a_relapse_is_caught_by_two_failures():
    gates = opened()
    feed(gates, True, True)

    assert feed(gates, False, False) == [None, "opened"]


def test_what_is_known_of_a_relapse_is_forgotten_with_time_well_spent():
    gates = opened()
    feed(gates, True, True)

    assert feed(gates, *[True] * 10, False, False, False)[-3:] == [None, None, "opened"]


# --- When the fault is ours ---------------------------------------------------------------------------------------


def test_a_held_gate_stays_closed_and_opens_with_the_first_failure_when_it_is_not_held():
    gates = Gates()
    assert feed(gates, *[False] * 50, hold=True) == [None] * 50
    assert not gates.is_open(M)

    assert feed(gates, False) == ["opened"]


def test_a_held_gate_forgets_by_successes_like_any_other():
    gates = Gates()
    feed(gates, *[False] * 50, hold=True)

    assert feed(gates, *[True] * 9, False, False) == [None] * 11


def fail_often(world: World, id: int, now: float, times: int = 4) -> None:
    for _ in range(times):
        world.fail(world.route(id), Failure.EMPTY, now)


def open_models(world: World) -> set[int]:
    return {model for model, _ in world.router.gates.open_gates()}


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_no_more_than_half_of_a_modes_models_are_gated_within_a_minute(world_store, count):
    world = World(*[{}] * count)
    world.keep_books(world_store)
    for n, model in enumerate(world.models):
        fail_often(world, model.id, NOW + n)

    assert len(open_models(world)) == count // 2


def test_models_that_break_one_after_the_other_are_gated_each(world_store):
    world = World({}, {}, {})
    world.keep_books(world_store)
    for n, model in enumerate(world.models):
        fail_often(world, model.id, NOW + n * (MASS_S + 1))

    assert open_models(world) == {1, 2, 3}


def test_a_small_mode_counts_its_own_models(world_store):
    """Five models, but smart has only two of them: with one gate open the other one's holds."""
    only = [{"exclude_from": ["smart"]}] * 3
    world = World({}, {}, *only)
    world.keep_books(world_store)
    for model in (1, 2, 3):
        fail_often(world, model, NOW)

    assert open_models(world) == {1, 3}


# --- What feeds it ------------------------------------------------------------------------------------------------

FED = {
    Failure.SERVER_ERROR, Failure.CONNECTION, Failure.TIMEOUT, Failure.STALL, Failure.NOT_FOUND, Failure.TRUNCATED,
    Failure.EMPTY, Failure.MALFORMED, Failure.WRAPPED,
}  # fmt: skip


@pytest.mark.parametrize("failure", Failure)
def test_only_what_speaks_of_the_models_health_feeds_it(world_store, failure):
    world = World({}, {}, {})
    world.keep_books(world_store)

    for _ in range(10):
        world.fail(world.route(1), failure)

    assert open_models(world) == ({1} if failure in FED else set())


def test_a_model_without_a_history_counts_as_nine_in_ten(world_store):
    world = World({}, {}, {})
    world.keep_books(world_store)

    fail_often(world, 1, NOW, times=3)
    assert open_models(world) == set()
    fail_often(world, 1, NOW, times=1)
    assert open_models(world) == {1}


# --- What routing makes of it -------------------------------------------------------------------------------------


def gated(world_store, *all_facts: dict) -> World:
    """Model 1's gate is open, and its first trial is due at NOW + 18."""
    world = World(*all_facts)
    world.keep_books(world_store)
    fail_often(world, 1, NOW)
    assert open_models(world) == {1}
    return world


def asked(world: World, now: float, model: str = "auto-priority") -> list[int]:
    """The models that a request asks when all of them fail."""
    plan, order = world.plan(model, now=now), []
    while (route := world.router.next_route(plan, now)) is not None:
        order.append(route.model.id)
        world.fail(route, Failure.EMPTY, now, plan=plan)
    return order


def test_a_gated_model_is_asked_after_all_others_and_never_left_out(world_store):
    world = gated(world_store, {}, {}, {"exclude_from": ["priority"]})

    assert asked(world, NOW) == [2, 3, 1]


def test_a_request_for_a_model_by_name_ignores_its_gate(world_store):
    world = gated(world_store, {}, {}, {})

    assert asked(world, NOW, "m1")[0] == 1


def test_a_trial_goes_first_with_failover_behind_it_and_one_request_has_it(world_store):
    world, now = gated(world_store, {}, {}, {}), NOW + 20.0
    for _ in range(REQUESTS_BETWEEN):
        world.plan(now=now)

    plan = world.plan(now=now)
    trial = world.router.next_route(plan, now)

    assert (trial.model.id, trial.trial) == (1, True)
    assert dict(world.protection.trials.running()) == {1: now}
    assert world.router.next_route(world.plan(now=now), now).model.id == 2
    world.fail(trial, Failure.EMPTY, now, plan=plan)
    assert not dict(world.protection.trials.running())
    assert world.router.next_route(plan, now).model.id == 2


@pytest.mark.parametrize("mode", [*Mode])
def test_models_whose_gates_are_held_come_last_among_their_like(mode):
    """More than half of the models cannot be gated at once, but those that work are asked before them: in every mode,
    as an open gate puts its model last in every mode."""
    world = World({}, {}, {"prefer_in": ["smart"]}, {})
    for id in (1, 2, 3):
        for _ in range(4):
            hold = world.router.gates_hold(world.models[id - 1], NOW)
            world.router.gates.feed(id, ok=False, rate=0.9, hold=hold, began=NOW, now=NOW, rng=world.rng)

    assert [world.router.gates.is_open(id) for id in (1, 2, 3)] == [True, True, False]
    for _ in range(50):
        assert world.router.next_route(world.plan(f"auto-{mode}"), NOW).model.id == 4


def test_where_all_gates_are_held_the_order_is_what_it_was():
    """Then the fault is ours, and no model is any better than the others."""
    world = World({}, {}, {}, {})
    for id in (1, 2, 3, 4):
        for _ in range(4):
            world.router.gates.feed(id, ok=False, rate=0.9, hold=True, began=NOW, now=NOW, rng=world.rng)

    assert [model.id for model in world.plan("auto-priority").order] == [1, 2, 3, 4]


def test_two_good_trials_bring_a_model_back(world_store):
    world, now = gated(world_store, {}, {}, {}), NOW + 20.0
    for _ in range(REQUESTS_BETWEEN):
        world.plan(now=now)
    for _ in range(2):
        route = world.router.next_route(world.plan(now=now), now)
        assert route.trial
        world.settle(route, Answered(), now)

    route = world.router.next_route(world.plan(now=now), now)

    assert (route.model.id, route.trial) == (1, False)
    assert open_models(world) == set()


# What stands before a trial: rules that outrank the gate put the model where it belongs, trial or not.
OUTRANKED = {"exclude_from": ["priority"]}


@pytest.mark.parametrize("why", ["excluded from the mode", "resting", "out of capacity", "without a key"])
def test_a_trial_is_no_way_round_what_else_keeps_a_model_back(world_store, why):
    now = NOW + 20.0
    first = {"excluded from the mode": OUTRANKED, "out of capacity": {"rpm": 1}}.get(why, {})
    world = gated(world_store, first, {}, {})
    for _ in range(REQUESTS_BETWEEN):
        world.plan(now=now)
    if why == "resting":
        world.rest_model(1, now=now)
    elif why == "without a key":
        world.router.set_key_status(101, KeyStatus.INVALID)
    elif why == "out of capacity":
        world.router.ledger.reserve(world.models[0], 101, 1, now)

    assert world.router.next_route(world.plan(now=now), now).model.id == 2


def test_the_trial_that_is_due_does_not_wait_for_one_that_cannot_be(world_store):
    """Both gates are open and both trials due, but the first model's key is used up."""
    world, now = World({"rpm": 1}, {}, {}, {}, {}), NOW + 20.0
    world.keep_books(world_store)
    for model in (1, 2):
        fail_often(world, model, NOW)
    for _ in range(REQUESTS_BETWEEN):
        world.plan(now=now)
    world.router.ledger.reserve(world.models[0], 101, 1, now)

    route = world.router.next_route(world.plan(now=now), now)

    assert (route.model.id, route.trial) == (2, True)
