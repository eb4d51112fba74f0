"""SPEC 4.2 and 10 at work: routing learns who answers, leaves who breaks and returns to who recovers.

The simulation of bench/learning.py, with small numbers: the real plan, the real statistics query, simulated time.
"""

from statistics import mean, median

import pytest

from bench.learning import (
    BROKEN,
    DAY_S,
    GONE,
    HALF,
    RATES,
    attempts,
    minutes_until_above,
    minutes_until_below,
    regret,
    regret_of_chance,
    remember,
    shares,
    three_phases,
    world,
)
from protection import Failure

REQUESTS = 400
HOUR = 60.0  # minutes


@pytest.mark.parametrize("seed", [2, 3, 5])
def test_traffic_goes_to_the_best_leaves_it_when_it_breaks_and_returns_when_it_recovers(seed):
    with world(seed) as simulated:
        learns, breaks, recovers = three_phases(simulated, REQUESTS).values()

    assert shares(learns)["best"] > 0.7
    assert min(attempts(learns).values()) > 0
    assert regret(learns) < regret_of_chance(RATES, REQUESTS) / 4

    assert minutes_until_below(breaks, HALF) < 5
    assert minutes_until_below(breaks, GONE) < HOUR
    assert regret(breaks) < regret_of_chance(BROKEN, REQUESTS)

    assert minutes_until_above(recovers, HALF) < HOUR
    assert regret(recovers) < regret_of_chance(RATES, REQUESTS) / 2


@pytest.mark.parametrize("mode", ["balanced", "smart", "fast"])
def test_every_mode_that_samples_learns(mode):
    with world(seed=4) as simulated:
        served = simulated.run(RATES, 200, mode=mode)

    assert shares(served)["best"] > 0.6
    assert min(attempts(served).values()) > 0


@pytest.mark.parametrize(("rate", "at_first_max", "wasted_max"), [(0.0, 5, 15), (0.25, 7, 40), (0.5, 10, 80)])
def test_a_past_of_days_does_not_hold_traffic_at_a_model_that_breaks(rate, at_first_max, wasted_max):
    at_first, wasted, back_min = [], [], []
    for seed in range(5):
        with world(seed, failure=Failure.EMPTY) as simulated:  # nothing rests after it: only the gate is quick
            remember(simulated, RATES, 1000, days=5.0)
            breaks = simulated.run({**RATES, "best": rate}, REQUESTS)
            recovers = simulated.run(RATES, 100)
        at_first.append(20 * shares(breaks[:20])["best"])
        wasted.append(REQUESTS * shares(breaks)["best"] * (1 - rate))
        back_min.append(minutes_until_above(recovers, HALF))

    assert mean(at_first) <= at_first_max
    assert mean(wasted) <= wasted_max
    assert median(back_min) <= 4  # half of it is the time that 20 requests take


def test_the_longer_ago_a_failure_is_the_less_it_counts():
    rates = []
    for days in (0.01, 2.0, 4.0, 6.0):
        with world(seed=6) as simulated:
            for n in range(100):
                simulated.log("best", ok=n < 50, at=-days * DAY_S if n >= 50 else -60.0)
            simulated.refresh()
            stats = simulated.router.scores.stats[1]
            rates.append(stats.successes / stats.total)

    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(0.5, abs=0.01)
    assert rates[-1] == pytest.approx(7 / 8, abs=0.01)


def test_what_is_simulated_later_makes_the_past_older():
    with world(seed=7) as simulated:
        simulated.log("best", ok=True, at=0.0)
        weights = []
        for days in (0.0, 3.5, 6.3, 7.5):
            simulated.now = days * DAY_S
            simulated.refresh()
            weights.append(simulated.router.scores.stats[1].total if 1 in simulated.router.scores.stats else None)

    assert weights[:3] == pytest.approx([1.0, 0.5, 0.1], abs=1e-4)
    assert weights[3] is None
