"""SPEC 20 without a server: the breaker, one gateway's part of an account, what workers say together, and settings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from admin.together import metrics_of, protection_of, status_of
from config.settings import SettingsError, load_settings
from routing.cooldowns import Cooldowns, Rest
from routing.trials import Trials
from shared.account import BUCKET_S, IDLE_S, KEPT_S, RECENT_S, WINDOW_S, Account, Limits
from shared.breaker import FAILURES_MAX, PAUSE_S_MAX, Breaker
from shared.clock import Clock

DAY = 20_000


def account(**limits: int) -> Account:
    found = Account("key:model", Limits(*(limits.get(name) for name in ("rpm", "rpd", "tpm", "tpd"))))
    found.roll(DAY)
    return found


def lend(to: Account, requests: int, now: float, tokens: int = 0) -> None:
    to.lent, to.lent_until = [requests, tokens], now + KEPT_S


# --- The breaker ----------------------------------------------------------------------------------------------------


def test_a_breaker_opens_after_five_failures_in_a_row_and_tries_ever_more_rarely():
    breaker = Breaker()
    for _ in range(FAILURES_MAX - 1):
        assert not breaker.failed(0.0, 0.0)
    assert not breaker.succeeded()
    assert [breaker.failed(0.0, 0.0) for _ in range(FAILURES_MAX)] == [False] * (FAILURES_MAX - 1) + [True]

    pauses, now = [], 0.0
    for _ in range(7):
        pauses.append(breaker.trial_at - now)
        now = breaker.trial_at
        breaker.trial_failed(now)

    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    assert max(pauses) == PAUSE_S_MAX
    assert not breaker.closed
    assert breaker.succeeded()
    assert breaker.closed


def test_what_fails_while_it_is_open_does_not_put_its_trial_off():
    breaker = Breaker()
    breaker.open(0.0)
    assert not breaker.failed(5.0, 5.0)
    assert breaker.trial_at == 1.0


def test_what_fails_together_is_one_failure():
    breaker = Breaker()
    assert [breaker.failed(1.0, 1.0 + n / 100) for n in range(50)] == [False] * 50
    assert breaker.closed


# --- One gateway's part of an account ---------------------------------------------------------------------------------


def test_a_loan_is_spent_without_asking_and_is_over_in_time():
    one = account(rpm=100)
    lend(one, 2, now=0.0)

    for _ in range(2):
        assert one.has(50, now=1.0)
        one.take(1.0, 50, 1.0, DAY)

    assert not one.has(50, now=1.0)
    lend(one, 2, now=1.0)
    assert not one.has(50, now=1.0 + KEPT_S)


def test_tokens_of_a_loan_matter_only_where_tokens_are_limited():
    free, bound = account(rpm=10), account(rpm=10, tpm=1000)
    for one in (free, bound):
        lend(one, 1, now=0.0, tokens=100)
    assert free.has(500, 0.0)
    assert not bound.has(500, 0.0)
    assert bound.has(100, 0.0)


def test_a_loan_that_nobody_needs_is_given_back():
    one = account(rpm=100)
    lend(one, 5, now=0.0)
    one.take(0.0, 0, 0.0, DAY)
    assert one.held(IDLE_S / 2) == (4, 0)
    assert one.idle(IDLE_S)
    assert one.held(IDLE_S) == (0, 0)
    assert not one.idle(IDLE_S)


def test_more_is_asked_for_only_by_those_that_use_much():
    one = account(rpm=100)
    one.take(0.0, 10, 0.0, DAY)
    assert one.wanted(0.0) == (0, 0)
    for _ in range(4):
        one.take(0.01, 10, 0.01, DAY)
    assert one.wanted(0.02) == (5, 0)
    assert one.wanted(0.02 + RECENT_S) == (0, 0)


def test_uses_are_told_by_their_age_and_end_with_their_minute():
    one = account(rpm=100)
    one.count(10.1, 1, 7, DAY)
    one.count(10.2, 1, 8, DAY)
    one.count(12.0, 1, 9, DAY)

    assert one.uses(now=13.0) == "2500:2:15;500:1:9"
    assert one.uses(now=12.9 + WINDOW_S) == f"{round((WINDOW_S + 0.4) * 1000)}:1:9"


def test_a_day_begins_with_nothing_used():
    one = account(rpd=10)
    one.restored = (3, 30)
    one.count(0.0, 1, 5, DAY)
    assert one.day_known() == (4, 35)
    one.roll(DAY + 1)
    assert one.day_known() == (0, 0)


# --- Alone ----------------------------------------------------------------------------------------------------------


@given(limit=st.integers(1, 200), gateways=st.integers(1, 8), used=st.integers(0, 200), own=st.integers(0, 50))
def test_all_gateways_alone_together_never_overrun_what_was_left_of_a_day(limit, gateways, used, own):
    used = min(max(used, own), limit)
    taken = 0
    for _ in range(gateways):
        one = account(rpd=limit)
        one.count(0.0, own, 0, DAY)
        one.learn(0.0, (0, 0, used, 0), (own, 0), DAY)
        while one.alone_wait_s(0, gateways, 1.0, 3600.0) == 0:
            one.take(1.0, 0, 1.0, DAY)
            taken += 1

    assert taken <= limit - used
    assert taken > limit - used - gateways


def test_alone_a_minute_begins_with_what_was_left_and_then_is_divided():
    one = account(rpm=100)
    one.learn(0.0, (60, 0, 0, 0), (0, 0), DAY)

    def takes(now: float) -> int:
        count = 0
        while one.alone_wait_s(0, 4, now, 3600.0) == 0:
            one.take(now, 0, now, DAY)
            count += 1
        return count

    assert takes(1.0) == 10
    assert 0 < one.alone_wait_s(0, 4, 2.0, 3600.0) <= WINDOW_S
    assert takes(1.0 + WINDOW_S + 2 * BUCKET_S) == 25


def test_a_small_limit_per_minute_leaves_every_gateway_one():
    one = account(rpm=2)
    assert one.alone_wait_s(0, 4, 0.0, 3600.0) == 0
    one.take(0.0, 0, 0.0, DAY)
    assert one.alone_wait_s(0, 4, 0.0, 3600.0) > 0


def test_a_day_that_is_used_up_is_waited_for():
    one = account(rpd=3)
    one.restored = (3, 0)
    assert one.alone_wait_s(0, 1, 0.0, 1234.0) == 1234.0


# --- Merging ----------------------------------------------------------------------------------------------------------


def test_of_each_time_of_a_rest_the_later_one_holds():
    rests: Cooldowns[int] = Cooldowns()
    rests.set(1, 10.0, now=0.0, firm=True)
    rests.merge(1, Rest(20.0, 0.0, 1.0, 2.0), now=1.0)
    rests.merge(1, Rest(5.0, 0.0, 0.5, 1.5), now=1.0)
    rests.merge(2, Rest(0.5, 0.0, 0.0, 0.0), now=1.0)

    assert rests.get(1, 1.0) == Rest(20.0, 10.0, 1.0, 2.0)
    assert rests.get(2, 1.0) is None


def test_a_trial_elsewhere_keeps_others_away_until_it_has_ended_or_its_lease_has():
    trials = Trials()
    trials.taken_elsewhere(1, 5.0)
    assert trials.busy_s(1, 2.0) == 3.0
    assert trials.busy_s(1, 5.0) == 0.0
    trials.released_elsewhere(1)
    assert trials.busy_s(1, 2.0) == 0.0


def test_times_are_said_by_one_clock():
    here, there = Clock(), Clock()
    here.learn(1_800_000_000_000, now=10.0)
    there.learn(1_800_000_000_000, now=99_999.0)

    said = here.shared_ms(12.5, now=10.0)

    assert there.local(said, now=99_999.0) == pytest.approx(100_001.5)


# --- Workers ----------------------------------------------------------------------------------------------------------


def test_metrics_of_workers_add_up_but_for_what_they_all_see():
    one = (
        b'# HELP n_total N.\n# TYPE n_total counter\nn_total{a="1"} 2.0\n# TYPE freeway_shared_state_up gauge\n'
        b"freeway_shared_state_up 1.0\n# TYPE freeway_gateways gauge\nfreeway_gateways 2.0\n"
    )
    other = one.replace(b'"1"} 2.0', b'"1"} 3.0\nn_total{a="2"} 1.0').replace(b"state_up 1.0", b"state_up 0.0")

    merged = metrics_of([one, other]).decode().splitlines()

    assert 'n_total{a="1"} 5.0' in merged
    assert 'n_total{a="2"} 1.0' in merged
    assert "freeway_shared_state_up 0.0" in merged
    assert "freeway_gateways 2.0" in merged
    assert merged.count("# HELP n_total N.") == 1
    assert metrics_of([one]) == one


def test_workers_show_one_state():
    empty = {
        "sessions": {"count": 0, "by_model": []}, "bans": [], "gates": [], "transient_cooldowns": [],
        "key_cooldowns": [], "waiting": [], "trials": [], "active": [], "rescues": [],
    }  # fmt: skip
    name = {"platform": "p", "model_id": "m"}
    one = empty | {
        "transient_cooldowns": [{"model_db_id": 1, **name, "ms_left": 500}],
        "bans": [{"session": "s", "platforms": [{"platform": "p", "reason": "r", "ms_left": 9}]}],
        "active": [{**name, "ms": 5}], "sessions": {"count": 2, "by_model": [{**name, "count": 2}]},
    }  # fmt: skip
    other = one | {"transient_cooldowns": [{"model_db_id": 1, **name, "ms_left": 700}]}

    merged = protection_of([one, other])

    assert merged["transient_cooldowns"] == [{"model_db_id": 1, **name, "ms_left": 700}]
    assert merged["bans"] == one["bans"]
    assert len(merged["active"]) == 2
    assert merged["sessions"] == {"count": 4, "by_model": [{**name, "count": 4}]}
    status = {"uptime_s": 5, "log_queue": 1, "log_dropped": 0, "keys": 3}
    assert status_of([status, status | {"uptime_s": 9}]) == {
        "uptime_s": 9, "log_queue": 2, "log_dropped": 0, "keys": 3, "workers": 2,
    }  # fmt: skip
    assert status_of([status]) == status


def test_several_workers_need_a_state_and_say_so(tmp_path):
    with pytest.raises(SettingsError, match="GATEWAY_WORKERS=3: several workers need GATEWAY_STATE"):
        load_settings([], {"GATEWAY_WORKERS": "3"}, tmp_path)
    assert load_settings([], {"GATEWAY_WORKERS": "1"}, tmp_path).workers == 1
    both = {"GATEWAY_WORKERS": "3", "GATEWAY_STATE": "redis://localhost"}
    assert load_settings([], both, tmp_path).workers == 3
