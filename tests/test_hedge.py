"""SPEC 15, the arithmetic: when an answer is late, and how many second routes there may be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.settings import Settings
from engine.hedge import MODELS_MAX, SAMPLES_MAX, Bounds, HedgeBudget, Latencies

FIRST_TOKEN = Bounds.of_ms(Settings().late_first_token_ms)
WHOLE_ANSWER = Bounds.of_ms(Settings().late_answer_ms)
SPREAD = [number / 10 for number in range(1, 101)]  # 0.1 to 10 seconds


@pytest.mark.parametrize(
    ("bounds", "samples", "late_after_s"),
    [
        (FIRST_TOKEN, [], 8.0),
        (FIRST_TOKEN, [0.3] * 19, 8.0),  # too few to know
        (FIRST_TOKEN, [0.3] * 20, 2.0),
        (FIRST_TOKEN, [3.0] * 20, 3.0),
        (FIRST_TOKEN, [3.0] * 19 + [60.0], 8.0),  # one of twenty is the slowest twentieth
        (FIRST_TOKEN, [3.0] * 39 + [60.0], 3.0),
        (FIRST_TOKEN, [60.0] * 20, 8.0),
        (FIRST_TOKEN, SPREAD[:50], 4.8),
        (WHOLE_ANSWER, [], 30.0),
        (WHOLE_ANSWER, [0.3] * 20, 5.0),
        (WHOLE_ANSWER, SPREAD, 9.6),
        (WHOLE_ANSWER, [90.0] * 20, 30.0),
    ],
)
def test_an_answer_is_late_when_95_of_100_have_begun(bounds, samples, late_after_s):
    latencies = Latencies(bounds)
    for seconds in samples:
        latencies.add(1, seconds)

    assert latencies.late_after_s(1) == late_after_s
    assert latencies.late_after_s(2) == bounds.high_s


@given(st.lists(st.floats(0, 100), min_size=20, max_size=3 * SAMPLES_MAX))
def test_only_the_latest_answers_of_a_model_count(samples):
    latencies = Latencies(FIRST_TOKEN)
    for seconds in samples:
        latencies.add(1, seconds)

    counted = sorted(samples[-SAMPLES_MAX:])
    expected = min(max(counted[min(int(len(counted) * 0.95), len(counted) - 1)], 2.0), 8.0)
    assert latencies.late_after_s(1) == expected


def test_the_models_remembered_are_bounded_and_the_one_unused_longest_is_forgotten():
    latencies = Latencies(FIRST_TOKEN)
    for model in range(MODELS_MAX + 1):
        for _ in range(20):
            latencies.add(model, 3.0)

    assert latencies.late_after_s(0) == 8.0
    assert latencies.late_after_s(1) == latencies.late_after_s(MODELS_MAX) == 3.0


@pytest.mark.parametrize("percent", [1, 5, 7, 33, 100])
def test_in_an_hour_in_which_everything_is_late_the_share_is_kept(percent):
    budget = HedgeBudget(percent)
    hedges = 0
    for requests in range(1, 1001):
        budget.earn()
        hedges += budget.spend()
        assert hedges <= requests * percent / 100 + 1
    assert hedges == 10 * percent


def test_the_first_late_request_of_all_is_hedged():
    budget = HedgeBudget(5)
    budget.earn()
    assert budget.spend()
    assert not budget.spend()


def test_a_share_of_nothing_never_hedges():
    budget = HedgeBudget(0)
    for _ in range(1000):
        budget.earn()
    assert not budget.spend()


def test_a_quiet_hour_saves_ten_hedges_and_no_more():
    budget = HedgeBudget(5)
    for _ in range(10_000):
        budget.earn()
    assert [budget.spend() for _ in range(11)] == [True] * 10 + [False]
