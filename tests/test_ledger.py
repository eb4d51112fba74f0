"""The rate ledger as tables (SPEC 4.7): sliding minutes, UTC days, reservations. End to end: test_keys_limits.py.

And the penalty for keys that run dry (SPEC 4.6), end to end; its arithmetic is in test_scoring.py.
"""

import asyncio

import pytest
from fake_provider import answer, error
from worlds import a_model, a_platform

from routing.catalog import Model
from routing.ledger import DAY_S, Ledger

KEY, OTHER_KEY = 1, 2
NOON = 12 * 3600.0  # with an offset of 0 the scale of `now` is UTC


def limited(id: int = 1, **limits: int) -> Model:
    return a_model(id, a_platform("p"), **limits)


# Limits, what was reserved when (seconds, tokens), and the wait that a request for 100 tokens has at NOON + 30.
WAITS = {
    "no limits": ({}, [(0, 10**9)] * 100, 0.0),
    "nothing used": ({"rpm": 1, "rpd": 1, "tpm": 100, "tpd": 100}, [], 0.0),
    "below rpm": ({"rpm": 3}, [(0, 1), (1, 1)], 0.0),
    "rpm reached: until the oldest is a minute old": ({"rpm": 2}, [(10, 1), (20, 1)], 40.0),
    "rpm reached a minute ago": ({"rpm": 2}, [(-30, 1), (20, 1)], 0.0),
    "rpd reached: until midnight": ({"rpd": 2}, [(-7200, 1), (-3600, 1)], DAY_S / 2 - 30),
    "rpd reached yesterday": ({"rpd": 2}, [(-NOON - 2, 1), (-NOON - 1, 1)], 0.0),
    "tpm just reached": ({"tpm": 1000}, [(10, 900)], 0.0),
    "tpm passed": ({"tpm": 1000}, [(10, 901)], 40.0),
    "tpm passed by two: the first is enough": ({"tpm": 1000}, [(10, 600), (20, 350)], 40.0),
    "tpm passed by two: the first is not enough": ({"tpm": 1000}, [(10, 29), (20, 901)], 50.0),
    "tpd just reached": ({"tpd": 1000}, [(-3600, 900)], 0.0),
    "tpd passed": ({"tpd": 1000}, [(-3600, 901)], DAY_S / 2 - 30),
    "more tokens than a minute has": ({"tpm": 99}, [], None),
    "more tokens than a day has": ({"tpd": 99}, [], None),
    "the day outlasts the minute": ({"rpm": 1, "rpd": 1}, [(10, 1)], DAY_S / 2 - 30),
    "requests and tokens: the longer wait counts": ({"rpm": 2, "tpm": 1000}, [(5, 1), (20, 999)], 50.0),
}


@pytest.mark.parametrize(("limits", "reserved", "wait_s"), WAITS.values(), ids=WAITS)
def test_a_key_waits_until_there_is_room(limits, reserved, wait_s):
    ledger, model = Ledger(), limited(**limits)
    for at, tokens in reserved:
        ledger.reserve(model, KEY, tokens, NOON + at)

    got = ledger.wait_s(model, KEY, 100, NOON + 30)

    assert got == (None if wait_s is None else pytest.approx(wait_s))


@pytest.mark.parametrize(("limits", "reserved", "wait_s"), WAITS.values(), ids=WAITS)
def test_after_the_wait_there_is_room(limits, reserved, wait_s):
    ledger, model = Ledger(), limited(**limits)
    for at, tokens in reserved:
        ledger.reserve(model, KEY, tokens, NOON + at)

    if wait_s:
        assert ledger.wait_s(model, KEY, 100, NOON + 30 + wait_s) == 0.0


def test_keys_and_models_are_counted_apart():
    ledger, model, other = Ledger(), limited(1, rpm=1), limited(2, rpm=1)
    ledger.reserve(model, KEY, 1, NOON)

    assert ledger.wait_s(model, KEY, 1, NOON) > 0
    assert ledger.wait_s(model, OTHER_KEY, 1, NOON) == 0
    assert ledger.wait_s(other, KEY, 1, NOON) == 0


@pytest.mark.parametrize("limit", ["tpm", "tpd"])
def test_an_estimate_holds_its_place_until_the_real_usage_takes_it(limit):
    ledger, model = Ledger(), limited(**{limit: 1000})
    reservation = ledger.reserve(model, KEY, 900, NOON)
    assert ledger.wait_s(model, KEY, 200, NOON) > 0

    ledger.settle(reservation, 100)
    assert ledger.wait_s(model, KEY, 900, NOON) == 0

    ledger.settle(reservation, 5000)
    assert ledger.wait_s(model, KEY, 1, NOON) > 0


@pytest.mark.parametrize("limit", ["rpm", "rpd"])
def test_a_failed_attempt_counts_as_a_request(limit):
    ledger, model = Ledger(), limited(**{limit: 1})
    ledger.settle(ledger.reserve(model, KEY, 900, NOON), 0)

    assert ledger.wait_s(model, KEY, 1, NOON) > 0


def test_what_is_settled_after_midnight_burdens_no_new_day():
    ledger, model = Ledger(), limited(tpd=1000)
    before = ledger.reserve(model, KEY, 900, DAY_S - 1)
    ledger.reserve(model, KEY, 400, DAY_S + 1)

    ledger.settle(before, 0)

    assert ledger.wait_s(model, KEY, 600, DAY_S + 2) == 0
    assert ledger.wait_s(model, KEY, 601, DAY_S + 2) > 0


def test_the_day_is_that_of_utc_whatever_the_clock_counts_from():
    ledger, model = Ledger(), limited(rpd=1)
    ledger.utc_offset_s = 1_700_000_000.0
    now = DAY_S - ledger.utc_offset_s % DAY_S - 10  # ten seconds before midnight
    ledger.reserve(model, KEY, 1, now)

    assert ledger.wait_s(model, KEY, 1, now) == pytest.approx(10)
    assert ledger.wait_s(model, KEY, 1, now + 10) == 0


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S, 400 * DAY_S, -400 * DAY_S, 3600.0, -3600.0])
def test_a_clock_that_jumps_and_comes_back_neither_blocks_beyond_a_day_nor_gives_more_than_a_day(jump_s):
    ledger, model = Ledger(), limited(rpm=3, rpd=10, tpd=1000)
    running = ledger.reserve(model, KEY, 900, NOON)

    ledger.utc_offset_s = jump_s
    assert 0 <= ledger.wait_s(model, KEY, 1000, NOON + 1) <= DAY_S
    ledger.reserve(model, KEY, 1, NOON + 2)
    ledger.utc_offset_s = 0.0
    ledger.reserve(model, KEY, 1, NOON + 3)
    ledger.settle(running, 0)

    assert ledger.wait_s(model, KEY, 1, NOON + 4) == pytest.approx(56)  # minutes know no clock but their own
    ledger.reserve(model, KEY, 990, NOON + 64)
    assert 0 < ledger.wait_s(model, KEY, 100, NOON + 65) <= DAY_S


@pytest.mark.parametrize(
    ("limit", "ago_s", "counts"),
    [("rpm", 30, True), ("rpm", 70, False), ("rpd", 3600, True), ("rpd", NOON + 1, False), ("tpd", 3600, True)],
)
def test_what_the_log_tells_is_counted_as_far_as_it_is_recent(limit, ago_s, counts):
    ledger, model = Ledger(), limited(**{limit: 1 if limit.startswith("r") else 1000})
    ledger.restore(model.id, KEY, at=NOON - ago_s, requests=1, tokens=950, now=NOON)

    assert (ledger.wait_s(model, KEY, 100, NOON) > 0) is counts


def test_a_minutes_memory_is_all_that_is_kept():
    ledger, model = Ledger(), limited(rpm=10_000)
    for n in range(5000):
        ledger.reserve(model, KEY, 1, NOON + n)

    (account,) = ledger._accounts.values()
    assert len(account.minute) == 60


# --- Penalties end to end (SPEC 4.6) ------------------------------------------------------------------------------

TWO_KEYS = {"keys": ["sk-a-secret-0001", "sk-a-secret-0002"]}
LIMITED = error(429, headers={"retry-after": "0.01"})


async def penalty(gateway, platform: str = "a") -> float:
    chain = (await gateway.get("/api/fallback")).json
    return next(entry["penalty"] for entry in chain if entry["platform"] == platform)


async def test_a_model_whose_keys_are_all_used_up_is_penalised_once_and_recovers_with_each_success(start_gateway, fake):
    gateway = await start_gateway({"a": TWO_KEYS, "b": {}})
    fake.script("a", LIMITED, LIMITED, answer("fine"))

    assert (await gateway.chat()).text == "hello from b"
    assert (await penalty(gateway), await penalty(gateway, "b")) == (3, 0)

    async with asyncio.timeout(3):
        while await penalty(gateway) == 3:
            assert (await gateway.chat()).status == 200  # of b, until the keys of a have rested
    assert await penalty(gateway) == 2
    for left in (1, 0, 0):
        assert (await gateway.chat()).text == "fine"
        assert await penalty(gateway) == left


async def test_a_model_with_a_key_left_is_not_penalised(start_gateway, fake):
    gateway = await start_gateway({"a": TWO_KEYS, "b": {}})
    fake.script("a", LIMITED, answer("fine"))

    assert (await gateway.chat()).text == "fine"

    assert await penalty(gateway) == 0


@pytest.mark.parametrize("status", [401, 402, 403, 404, 503])
async def test_keys_lost_for_other_reasons_are_no_penalty(start_gateway, fake, status):
    gateway = await start_gateway({"a": TWO_KEYS, "b": {}})
    fake.script("a", error(status))

    assert (await gateway.chat()).text == "hello from b"

    assert await penalty(gateway) == 0


async def test_requests_that_find_no_key_usable_add_no_penalty(start_gateway, fake):
    gateway = await start_gateway({"a": TWO_KEYS, "b": {}})
    fake.script("a", error(429))
    for _ in range(5):
        await gateway.chat()

    assert await penalty(gateway) == 3
    assert fake.called.count("a") == 2
