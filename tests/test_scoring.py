"""Scores, pools and marks as tables (SPEC 4.2 to 4.8, 10.3), over catalogues whose names nobody has heard of."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import NOW, World, a_chat, models_of

from protection import Scope, Skip
from routing.catalog import Catalog, Key, KeyStatus, Pool, by_rank, pools
from routing.ledger import Penalties
from routing.scores import Stats, Weights, Yardstick, belief, quantiles, speed_score, ttfb_score, value
from routing.standing import NO_STANDING, Standing
from wire.chat import Mode


def seen(successes: float, failures: float, *, tok_s: float = 50.0, ttfb_ms: float | None = 800.0) -> Stats:
    """Statistics of rows that all weigh 1."""
    total = successes + failures
    if not successes:
        tok_s, ttfb_ms = 0.0, None
    return Stats(successes, total, int(successes), int(total), tok_s, ttfb_ms)


# --- The parts of a score (SPEC 4.2) ------------------------------------------------------------------------------

TTFB = [
    (0, 0.25), (499.9, 0.25), (500, 0.25), (750, 0.20), (1000, 0.15), (1500, 0.075), (2000, 0.0), (6000, -0.25),
    (10_000, -0.5), (10_001, -0.5), (1e9, -0.5),
]  # fmt: skip


@pytest.mark.parametrize(("avg_ms", "score"), TTFB)
def test_a_quick_first_token_is_worth(avg_ms, score):
    assert ttfb_score(avg_ms) == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize("corner", [500, 1000, 2000, 10_000])
def test_the_reward_for_a_quick_first_token_has_no_step(corner):
    assert ttfb_score(corner - 1e-6) == pytest.approx(ttfb_score(corner + 1e-6), abs=1e-6)


SPEED = [
    (100.0, 100.0, 0.3), (50.0, 100.0, 0.15), (10.0, 100.0, 0.03), (10.0, 10.0, 0.3), (9.0, 9.0, 0.3 - 0.035),
    (5.0, 100.0, 0.015 - 0.175), (0.0, 100.0, -0.35), (0.0, 0.0, -0.35),
]  # fmt: skip


@pytest.mark.parametrize(("tok_s", "tok_s_max", "score"), SPEED)
def test_speed_counts_relative_to_the_fastest_and_crawling_costs(tok_s, tok_s_max, score):
    assert speed_score(tok_s, tok_s_max) == pytest.approx(score)


BELIEFS = [
    (Stats(), (2.1, 2.1)),
    (Stats(successes=0.05, total=0.08), (2.1, 2.1)),
    (Stats(successes=10.0, total=12.5), (12.0, 4.5)),
    (Stats(successes=10.0, total=10.0), (12.0, 2.1)),
    (Stats(successes=0.0, total=7.0), (2.1, 9.0)),
]


@pytest.mark.parametrize(("stats", "parameters"), BELIEFS)
def test_belief_in_a_model_is_a_beta_distribution(stats, parameters):
    assert belief(stats) == pytest.approx(parameters)


@pytest.mark.parametrize(("rank", "score"), [(3, 1.0), (8, 0.5), (13, 0.0)])
def test_intelligence_is_linear_between_the_best_and_the_worst_candidate(rank, score):
    models = models_of({"intelligence_rank": 3}, {"intelligence_rank": 13})

    assert Yardstick.of(models, {}).intelligence(rank) == pytest.approx(score)


SHAPES = [(2.1, 2.1), (2.1, 30.0), (500.0, 3.0), (5000.0, 2000.0), (2.1, 4000.0), (40.0, 40.0)]


@pytest.mark.parametrize(("alpha", "beta"), SHAPES)
def test_draws_from_a_table_of_quantiles_are_those_of_the_beta_distribution(alpha, beta):
    table, rng = quantiles(alpha, beta), Random(7)
    by_the_book = sorted(rng.betavariate(alpha, beta) for _ in range(20_000))
    deviation = (alpha * beta / ((alpha + beta) ** 2 * (alpha + beta + 1))) ** 0.5

    assert list(table) == sorted(table)
    assert table[0] >= 0
    assert table[-1] <= 1
    for percent in (2, 10, 25, 50, 75, 90, 98):
        place = percent / 100 * (len(table) - 1)
        low, high = table[int(place)], table[min(int(place) + 1, len(table) - 1)]
        drawn = low + (place - int(place)) * (high - low)
        assert drawn == pytest.approx(by_the_book[200 * percent], abs=0.1 * deviation)


def test_a_table_of_quantiles_is_exact_where_the_distribution_is_simple():
    table = quantiles(2.0, 2.0)  # x is exceeded by all but 3x² - 2x³
    for step, x in enumerate(table[1:-1], start=1):
        assert 3 * x**2 - 2 * x**3 == pytest.approx(step / (len(table) - 1), abs=1e-4)


def test_intelligence_is_1_when_all_are_equal():
    assert Yardstick.of(models_of({}, {}), {}).intelligence(10) == 1.0


UNRANKED = {"intelligence_rank": None, "speed_rank": None}


@pytest.mark.parametrize(
    ("ranks", "score"),
    [
        ([1, 2, 11, None], 0.9),
        ([1, 5, 7, 11, None], 0.5),
        ([7, None], 1.0),
        ([None, None], 1.0),
        ([1, 11, None, None], 0.5),
    ],
)
def test_an_unranked_model_counts_as_the_median_of_the_ranked_candidates(ranks, score):
    yardstick = Yardstick.of(models_of(*({"intelligence_rank": rank} for rank in ranks)), {})

    assert yardstick.intelligence(None) == pytest.approx(score)


def test_an_unranked_candidate_changes_no_other_candidates_score():
    ranked = [{"intelligence_rank": 1}, {"intelligence_rank": 4}, {"intelligence_rank": 90}]
    before, after = World(*ranked), World(*ranked, UNRANKED)

    scores = after.router.displayed_scores(NOW)

    assert {id: scores[id] for id in (1, 2, 3)} == before.router.displayed_scores(NOW)
    assert scores[4] == scores[2]


def test_the_order_of_new_models_puts_an_unranked_one_at_the_median():
    models = models_of({"intelligence_rank": 9}, UNRANKED, {"intelligence_rank": 1}, {"intelligence_rank": 5})

    assert [model.id for model in by_rank(models)] == [3, 2, 4, 1]
    assert [model.id for model in by_rank(models_of(UNRANKED, UNRANKED))] == [1, 2]


def test_where_a_limit_is_set_on_ranks_an_unranked_model_counts_as_the_chains_median():
    world = World({"intelligence_rank": 2}, UNRANKED, {"intelligence_rank": 6}, {"enabled": False})

    assert [world.router.catalog.intelligence(model) for model in world.models[:3]] == [2, 4, 6]


VALUES = {
    "never seen": (Stats(), 0.3, 0.25 * 0.75),
    "seen, never successful": (seen(0, 5), 0.0, 0.0),
    "successful": (seen(5, 5, tok_s=50.0, ttfb_ms=1000.0), 0.15, 0.15),
    "the fastest": (seen(5, 0, tok_s=100.0, ttfb_ms=100.0), 0.3, 0.25),
    "slow": (seen(1, 0, tok_s=4.0, ttfb_ms=20_000.0), 0.012 - 0.21, -0.5),
}


@pytest.mark.parametrize(("stats", "speed", "ttfb"), VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("weights", [Weights(1, 0, 0), Weights(0, 1, 0), Weights(0, 0, 1), Weights(0.2, 3, 0.6)])
def test_the_value_of_an_answer_weighs_speed_first_token_and_intelligence(stats, speed, ttfb, weights):
    (model,) = models_of({"intelligence_rank": 8})
    yardstick = Yardstick(tok_s_max=100.0, rank_best=3, rank_worst=13, rank_median=8)

    expected = weights.speed * speed + weights.ttfb * ttfb + weights.intelligence * 0.5
    assert value(model, stats, weights, yardstick) == pytest.approx(expected)


# --- The score of each mode ---------------------------------------------------------------------------------------

# Each case: two models' facts and statistics, and the modes in which the first one wins every draw. The statistics
# are of so many requests that the samples differ by less than 0.01.
MANY = 1_000_000
CLEARLY = {
    "the more reliable": (
        ({}, {}), (seen(0.9 * MANY, 0.1 * MANY), seen(0.6 * MANY, 0.4 * MANY)), "balanced smart fast"
    ),
    "the faster by 0.15": (
        ({}, {}), (seen(MANY, 0, tok_s=100.0), seen(MANY, 0, tok_s=50.0)), "balanced smart fast"
    ),
    "0.1 less reliable, 0.2 quicker to begin": (
        ({}, {}), (seen(0.9 * MANY, 0.1 * MANY, ttfb_ms=100.0), seen(MANY, 0, ttfb_ms=1700.0)), "balanced fast"
    ),
    "0.3 less reliable, 0.2 quicker to begin": (
        ({}, {}), (seen(0.7 * MANY, 0.3 * MANY, ttfb_ms=100.0), seen(MANY, 0, ttfb_ms=1700.0)), "fast"
    ),
    "0.5 less reliable, the more intelligent": (
        ({"intelligence_rank": 1}, {}), (seen(MANY / 2, MANY / 2), seen(MANY, 0)), "smart"
    ),
    "0.05 less reliable, the more intelligent": (
        ({"intelligence_rank": 1}, {}), (seen(0.95 * MANY, 0.05 * MANY), seen(MANY, 0)), "balanced smart"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("facts", "stats", "modes"), CLEARLY.values(), ids=CLEARLY)
@pytest.mark.parametrize("mode", ["balanced", "smart", "fast"])
def test_each_mode_weighs_in_its_own_way(facts, stats, modes, mode):
    world = World(*facts)
    world.router.scores.learn(dict(enumerate(stats, start=1)))

    assert world.first(f"auto-{mode}") == ({1} if mode in modes.split() else {2})


def test_scores_are_sampled_anew_for_each_request():
    world = World({}, {})

    assert world.first("auto-balanced") == {1, 2}


def test_the_same_draws_give_the_same_order():
    world = World({}, {}, {}, {})

    assert world.order("auto-balanced", seed=7) == world.order("auto-balanced", seed=7)


def test_priority_follows_the_chain_whatever_the_statistics_say():
    world = World({"priority": 3}, {"priority": 1}, {"priority": 2})
    world.router.scores.learn({1: seen(1000, 0), 2: seen(0, 1000), 3: seen(10, 10)})

    assert world.order("auto-priority") == [2, 3, 1]


def test_fast_puts_the_fast_pool_before_all_others():
    world = World({"speed_rank": 20}, {"speed_rank": 1}, {"speed_rank": 3}, {"speed_rank": 19})
    world.router.scores.learn({1: seen(1000, 0, tok_s=500.0), 2: seen(1, 99), 3: seen(1, 99), 4: seen(1000, 0)})

    assert {frozenset(order[:2]) for order in world.orders("auto-fast")} == {frozenset({2, 3})}


# --- Pools (SPEC 4.8) ---------------------------------------------------------------------------------------------


def test_a_pool_is_found_by_speed_and_then_by_intelligence():
    ranks = [(1, 11), (5, 11), (6, 1), (11, 5), (11, 6)]  # speed and intelligence of 1 to 11: up to 5 is 0.4
    models = models_of(*({"speed_rank": speed, "intelligence_rank": rank} for speed, rank in ranks))

    assert list(pools(models).values()) == [Pool.FAST, Pool.FAST, Pool.SMART, Pool.SMART, Pool.BALANCED]


def test_a_model_that_is_both_fast_and_clever_is_fast():
    models = models_of({"speed_rank": 1, "intelligence_rank": 1}, {"speed_rank": 2, "intelligence_rank": 2})

    assert pools(models)[1] is Pool.FAST


@pytest.mark.parametrize("count", [1, 3])
def test_models_that_do_not_differ_are_balanced(count):
    assert set(pools(models_of(*[{}] * count)).values()) == {Pool.BALANCED}


def test_what_smart_prefers_is_in_its_pool_whatever_its_ranks():
    models = models_of({"speed_rank": 1, "prefer_in": ["smart"]}, {"speed_rank": 2}, {"speed_rank": 1})

    assert pools(models) == {1: Pool.SMART, 2: Pool.BALANCED, 3: Pool.FAST}


def test_pools_are_relative_to_the_enabled_chain():
    world = World({"speed_rank": 1, "enabled": False}, {"speed_rank": 50}, {"speed_rank": 99, "in_chain": False})

    assert world.router.catalog.pools == {2: Pool.BALANCED}


@given(
    ranks=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=12),
    missing=st.sampled_from(["both", "intelligence_rank", "speed_rank"]),
    other=st.integers(1, 1000),
)
def test_an_unranked_model_is_balanced_and_changes_the_pool_of_no_other(ranks, missing, other):
    ranked = [{"intelligence_rank": intelligence, "speed_rank": speed} for intelligence, speed in ranks]
    unranked = UNRANKED if missing == "both" else {"intelligence_rank": other, "speed_rank": other, missing: None}

    with_it = pools(models_of(*ranked, unranked))

    assert with_it.pop(len(ranked) + 1) is Pool.BALANCED
    assert with_it == pools(models_of(*ranked))


def test_an_empty_chain_has_no_pools():
    assert pools([]) == {}


# --- Marks (SPEC 4.3, 4.4) ----------------------------------------------------------------------------------------

LIKED = {"exclude_from": ["balanced"], "prefer_in": ["smart"]}


def test_balanced_keeps_what_is_marked_for_last_even_with_the_best_statistics():
    world = World({**LIKED, "intelligence_rank": 1}, {}, {})
    world.router.scores.learn({1: seen(1000, 0, tok_s=500.0, ttfb_ms=50.0), 2: seen(0, 1000), 3: seen(0, 1000)})

    assert all(order[2] == 1 for order in world.orders("auto-balanced"))
    assert all(order[0] == 1 for mode in ("smart", "fast", "priority") for order in world.orders(f"auto-{mode}"))


def test_what_is_left_out_takes_no_part_in_the_comparison_of_the_others():
    facts = [{"intelligence_rank": 1}, {"intelligence_rank": 9}]
    alone, with_marked = World(*facts), World(*facts, {"intelligence_rank": 1000, "exclude_from": ["balanced"]})
    stats = {1: seen(0.95 * MANY, 0.05 * MANY), 2: seen(MANY, 0)}
    for world in (alone, with_marked):
        world.router.scores.learn(stats)

    assert alone.first("auto-balanced") == with_marked.first("auto-balanced") == {1}


def test_what_is_left_out_is_reachable_by_name():
    world = World(LIKED, {}, {})

    assert {order[0] for name in ("m1", "p1/m1") for order in world.orders(name)} == {1}


def test_what_is_left_out_follows_a_pinned_model_last_too():
    world = World(LIKED, {}, {})

    assert {tuple(order) for order in world.orders("m2")} == {(2, 3, 1)}


def test_smart_puts_what_is_marked_first_in_the_order_of_the_catalogue():
    world = World({}, {**LIKED, "intelligence_rank": 99, "priority": 9}, {}, {**LIKED, "priority": 1})
    world.router.scores.learn({1: seen(1000, 0), 2: seen(0, 1000), 3: seen(1000, 0), 4: seen(10, 0)})

    assert {tuple(order[:2]) for order in world.orders("auto-smart")} == {(2, 4)}


def test_smart_prefers_only_models_with_a_key_that_does_not_rest():
    world = World(LIKED, LIKED, {})
    world.router.scores.learn({1: seen(0, 1000), 2: seen(0, 1000), 3: seen(1000, 0)})
    assert world.order("auto-smart") == [1, 2, 3]

    world.rest_key(1, 60.0)

    assert world.order("auto-smart") == [2, 3, 1]
    assert world.order("auto-smart", now=NOW + 61) == [1, 2, 3]


@pytest.mark.parametrize("limit", ["rpm", "rpd", "tpm", "tpd"])
def test_smart_prefers_only_models_with_capacity(limit):
    world = World({**LIKED, limit: 1 if limit.startswith("r") else 1500}, {})
    world.router.scores.learn({1: seen(0, 1000), 2: seen(1000, 0)})
    plan = world.router.plan(a_chat("auto-smart").need, NO_STANDING, NOW, Random(0))
    assert world.router.next_route(plan, NOW).model.id == 1

    assert world.order("auto-smart") == [2, 1]


def test_smart_never_prefers_what_has_no_key_at_all():
    world = World(LIKED, {})
    world.router.set_key_status(world.keys["p1"].id, KeyStatus.INVALID)

    assert world.order("auto-smart") == [2]


@pytest.mark.parametrize("mode", list(Mode))
def test_a_mark_acts_in_the_mode_it_names_and_in_no_other(mode):
    facts = [{"priority": 9, "prefer_in": [mode]}, *({"priority": n} for n in (1, 2, 3)), {"exclude_from": [mode]}]
    world = World(*facts)
    world.router.scores.learn({1: seen(0, 1000), **{n: seen(1000, 0) for n in (2, 3, 4, 5)}})

    for other in Mode:
        orders = world.orders(f"auto-{other}")
        assert {order[0] == 1 for order in orders} == {other is mode}
        assert {len(order) for order in orders} == {5}
        assert all(order[4] == 5 for order in orders) is (other is mode)


# --- What a session prefers (SPEC 4.5) ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["smart", "fast"])
def test_a_sessions_model_goes_first_whatever_its_score_and_the_marks(mode):
    world = World({"speed_rank": 1}, {"prefer_in": ["smart", "fast"]}, {"speed_rank": 99})
    world.router.scores.learn({1: seen(1000, 0), 2: seen(1000, 0), 3: seen(0, 1000)})

    assert world.first(f"auto-{mode}", Standing(preferred_model=3)) == {3}


def test_a_sessions_key_is_tried_first_and_the_others_after_it():
    world = World({})
    keys = [Key(id, "p1", f"secret {id}") for id in (101, 102, 103)]
    world.router.load(Catalog([world.models[0].platform], world.models, keys), {})
    standing = Standing(preferred_model=1, preferred_key=102)

    for _ in range(5):
        plan = world.router.plan(a_chat("auto-smart").need, standing, NOW, Random(0))
        routes = []
        while (route := world.router.next_route(plan, NOW)) is not None:
            routes.append(route.key.id)
            plan.note_failure(route, Skip(Scope.KEY, again=False), NOW, None)
        assert routes[0] == 102
        assert sorted(routes) == [101, 102, 103]


def test_a_skipped_model_is_never_tried_again_preferred_or_not():
    world = World({}, {})
    plan = world.router.plan(a_chat("auto-smart").need, Standing(preferred_model=1), NOW, Random(0))
    tried = []
    while (route := world.router.next_route(plan, NOW)) is not None:
        tried.append(route.model.id)
        plan.skip(route.model)

    assert tried == [1, 2]


def test_what_is_held_back_comes_last_and_is_never_left_out():
    world = World({}, {}, {})
    world.router.scores.learn({1: seen(1000, 0), 2: seen(0, 1000), 3: seen(0, 1000)})

    assert {order[2] for order in world.orders("auto-smart", Standing(others_models={1}))} == {1}
    assert {len(order) for order in world.orders("auto-smart", Standing(busy_platforms={"p1", "p2", "p3"}))} == {3}


def test_what_is_held_back_is_tried_when_all_others_are_cooling_or_out_of_capacity():
    world = World({}, {}, {"rpd": 1})
    standing = Standing(others_models={1})
    world.protection.transient.set(2, NOW + 60, NOW)
    tried = []
    for _ in range(2):
        plan = world.router.plan(a_chat("auto-smart").need, standing, NOW, Random(0))
        tried.append(world.router.next_route(plan, NOW).model.id)

    assert tried == [3, 1]


# --- Penalties (SPEC 4.6) -----------------------------------------------------------------------------------------

# What happens at which second, and the points left after it.
PENALTIES = {
    "none": ([], 0.0, 0),
    "keys ran dry": (["0 add"], 0.0, 3),
    "twice": (["0 add", "0 add"], 0.0, 6),
    "never more than ten": (["0 add"] * 5, 0.0, 10),
    "two minutes later": (["0 add"], 120.0, 2),
    "not yet two minutes later": (["0 add"], 119.0, 3),
    "six minutes later": (["0 add"], 360.0, 0),
    "an hour later": (["0 add"], 3600.0, 0),
    "from ten": (["0 add"] * 5, 1200.0, 0),
    "almost from ten": (["0 add"] * 5, 1199.0, 1),
    "a success": (["0 add", "1 success"], 1.0, 2),
    "three successes": (["0 add", "1 success", "1 success", "1 success"], 1.0, 0),
    "never below zero": (["0 success", "0 success", "1 add"], 1.0, 3),
    "more successes than points": (["0 add", *["1 success"] * 9, "2 add"], 2.0, 3),
    "a success does not restart the two minutes": (["0 add", "100 success"], 120.0, 1),
    "successes every minute": (["0 add", "0 add", "60 success", "120 success", "180 success"], 180.0, 2),
}


@pytest.mark.parametrize(("events", "now", "points"), PENALTIES.values(), ids=PENALTIES)
def test_penalties_rise_when_keys_run_dry_and_fall_with_time_and_success(events, now, points):
    penalties = Penalties()
    for at, event in (text.split() for text in events):
        (penalties.add if event == "add" else penalties.success)(1, float(at))

    assert penalties.points(1, now) == pytest.approx(points)
    assert penalties.points(2, now) == 0


@pytest.mark.parametrize("mode", ["balanced", "smart", "fast"])
@pytest.mark.parametrize(("points", "first"), [(0, 1), (4, 1), (6, 2), (10, 2)])
def test_each_point_of_penalty_costs_a_twentieth(mode, points, first):
    world = World({}, {})
    world.router.scores.learn({1: seen(MANY, 0), 2: seen(0.75 * MANY, 0.25 * MANY)})
    world.router.penalties.add(1, NOW, step=points)

    assert world.first(f"auto-{mode}") == {first}


# --- Displayed scores (SPEC 10.3) ---------------------------------------------------------------------------------


def test_displayed_scores_are_the_balanced_formula_with_the_expectation_and_no_bonus():
    world = World({"intelligence_rank": 3}, {"intelligence_rank": 8}, {"intelligence_rank": 13}, LIKED)
    world.router.scores.learn({1: seen(30, 10, tok_s=100.0, ttfb_ms=750.0), 2: seen(0, 6)})
    world.router.penalties.add(2, NOW)

    scores = world.router.displayed_scores(NOW)

    assert scores == pytest.approx(
        {
            1: 32 / 44 + 0.3 + 0.2 + 0.1,
            2: 2.1 / 10.1 + 0.05 - 0.05 * 3,
            3: 0.5,
            4: 0.5 + 0.1 * 0.3,
        }
    )


def test_displayed_scores_do_not_change_from_one_look_to_the_next():
    world = World({}, {})

    assert world.router.displayed_scores(NOW) == world.router.displayed_scores(NOW)


def test_an_empty_chain_displays_no_scores():
    assert World({"enabled": False}).router.displayed_scores(NOW) == {}
