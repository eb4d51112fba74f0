"""The forecast (SPEC 21.2): what is left of a platform's own day, and when it runs dry at the last hour's rate."""

import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from random import Random
from zoneinfo import ZoneInfo

import pytest
from conftest import behind
from hypothesis import given
from hypothesis import strategies as st
from worlds import a_model, a_platform

from records.rows import Row, insert_rows
from routing.day import day_began, until_reset_s
from routing.forecast import HOUR_S, Use, Used, earliest, forecast, latest

CALIFORNIA = "America/Los_Angeles"


def at(text: str, zone: str = "UTC") -> float:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


NOON = at("2026-11-24T12:00")


def outlook(use: Use, utc: float = NOON, reset: str = "UTC", **limits: int):
    return forecast(a_model(1, a_platform("p", daily_reset=reset), **limits), use, utc)


# --- When it runs dry -----------------------------------------------------------------------------------------------

# limits, (attempts, tokens) of the hour and of the day → hours from noon until it is dry; the day has twelve left
DRY = {
    "attempts": ({"rpd": 100}, (10, 0), (50, 0), 5.0),
    "tokens": ({"tpd": 1000}, (10, 100), (50, 600), 4.0),
    "whichever is first": ({"rpd": 100, "tpd": 1000}, (10, 100), (50, 950), 0.5),
    "used up already": ({"rpd": 50}, (10, 0), (50, 0), 0.0),
    "used up, and nothing is asked any more": ({"rpd": 50}, (0, 0), (80, 0), 0.0),
    "nothing was used in the last hour": ({"rpd": 100}, (0, 0), (50, 0), None),
    "the day ends before": ({"rpd": 1000}, (10, 0), (50, 0), None),
    "just as the day ends": ({"rpd": 170}, (10, 0), (50, 0), None),
    "only limits by the minute": ({"rpm": 1, "tpm": 1}, (100, 100), (100, 100), None),
    "no limits": ({}, (10, 10), (50, 50), None),
}


@pytest.mark.parametrize(("limits", "hour", "day", "hours"), DRY.values(), ids=DRY)
def test_it_runs_dry_at_the_rate_of_the_last_hour_if_that_is_before_the_reset(limits, hour, day, hours):
    found = outlook(Use(hour=Used(*hour), day=Used(*day)), **limits)

    assert found.dry_at == (None if hours is None else pytest.approx(NOON + hours * HOUR_S))
    assert (found.resets_at is None) == (not {"rpd", "tpd"} & limits.keys())


def test_left_is_the_limit_less_what_was_used_and_a_limit_that_is_none_has_none_left():
    use = Use(minute=Used(3, 70), hour=Used(9, 900), day=Used(50, 5000))
    found = outlook(use, rpm=5, tpm=50, rpd=40)

    assert found.used == {"rpm": 3, "rpd": 50, "tpm": 70, "tpd": 5000}
    assert found.left == {"rpm": 2, "rpd": 0, "tpm": 0, "tpd": None}


@pytest.mark.parametrize("seed", range(5))
def test_the_hour_it_runs_dry_is_foretold_within_a_tenth_over_a_simulated_day(seed):
    """An attempt a minute, each up to a quarter of an hour early or late; the forecast is asked four times an hour."""
    rng, midnight, limit = Random(seed), at("2026-11-24T00:00"), 1000
    attempts = sorted(midnight + minute * 60 + rng.uniform(0, 900) for minute in range(24 * 60))
    dry = attempts[limit - 1]
    asked = 0
    for now in (midnight + quarter * 900 for quarter in range(8, int((dry - midnight) // 900))):
        hour = sum(now - HOUR_S < moment <= now for moment in attempts)
        day = sum(moment <= now for moment in attempts)
        found = outlook(Use(hour=Used(hour), day=Used(day)), now, rpd=limit)
        if now > midnight + 6 * HOUR_S:
            asked += 1
            assert found.dry_at == pytest.approx(dry, abs=0.10 * (dry - midnight))
    assert asked > 30


TIMES = st.lists(st.none() | st.floats(0, 1e6), max_size=6)


@given(TIMES)
def test_a_mode_is_dry_when_its_last_model_is_and_begins_to_run_dry_with_its_first(times):
    known = [moment for moment in times if moment is not None]

    assert earliest(times) == (min(known) if known else None)
    assert latest(times) == (max(known) if known and len(known) == len(times) else None)


# --- The platform's own day -----------------------------------------------------------------------------------------

RESETS = {
    "UTC": ("UTC", "2026-11-24T12:00", "2026-11-25T00:00", "2026-11-24T00:00"),
    "California": (CALIFORNIA, "2026-11-24T12:00", "2026-11-25T08:00", "2026-11-24T08:00"),
    "California before its midnight": (CALIFORNIA, "2026-11-24T07:59", "2026-11-24T08:00", "2026-11-23T08:00"),
    "at the very moment": ("UTC", "2026-11-24T00:00", "2026-11-25T00:00", "2026-11-24T00:00"),
    "at another hour": ("07:00 Asia/Jakarta", "2026-11-24T12:00", "2026-11-25T00:00", "2026-11-24T00:00"),
    "clocks go back": (CALIFORNIA, "2026-11-01T12:00", "2026-11-02T08:00", "2026-11-01T07:00"),  # 25 hours
    "clocks go forward": (CALIFORNIA, "2027-03-14T20:00", "2027-03-15T07:00", "2027-03-14T08:00"),  # 23 hours
    "a zone that nobody knows": ("Mars/Olympus", "2026-11-24T12:00", "2026-11-25T00:00", "2026-11-24T00:00"),
}


@pytest.mark.parametrize(("reset", "now", "ends", "began"), RESETS.values(), ids=RESETS)
def test_a_day_begins_and_ends_by_the_platforms_clock_also_when_clocks_change(reset, now, ends, began):
    assert at(now) + until_reset_s(reset, at(now)) == at(ends)
    assert day_began(reset, at(now)) == at(began)


@given(
    st.sampled_from(
        ["UTC", CALIFORNIA, "Asia/Shanghai", "07:00 Asia/Jakarta", "Australia/Lord_Howe", "02:30 Europe/Berlin"]
    ),
    st.integers(1_700_000_000, 1_900_000_000),
)
def test_now_is_in_the_day_that_began_last_and_ends_next(reset, utc):
    began, ends = day_began(reset, utc), utc + until_reset_s(reset, utc)

    assert began <= utc < ends
    assert 22 * HOUR_S < ends - began < 26 * HOUR_S


def test_what_runs_dry_before_the_clocks_change_is_foretold_by_the_longer_day():
    now = at("2026-11-01T10:00", CALIFORNIA)  # its day has 25 hours, of which 14 are left
    use = Use(hour=Used(10), day=Used(60))

    assert outlook(use, now, CALIFORNIA, rpd=200).dry_at is None  # 14 hours: just as the day ends
    assert outlook(use, now, CALIFORNIA, rpd=199).dry_at == pytest.approx(now + 13.9 * HOUR_S)


# --- Over HTTP ------------------------------------------------------------------------------------------------------


async def entries(gateway) -> dict[tuple[str, str], dict]:
    found = (await gateway.seen("/api/quota"))["keys"]
    return {(entry["platform"], entry["model_id"]): entry for entry in found}


async def test_the_quota_counts_attempts_and_says_what_is_left(start_gateway):
    limited = {"rpm": 30, "rpd": 100, "tpd": 100_000}
    gateway = await start_gateway({"a": {"model": limited}, "b": {}, "free": {"keyless": True}})
    for _ in range(3):
        await gateway.chat()
    found = await entries(gateway)
    first, second = found["a", "a-model"], found["b", "b-model"]
    (key, _) = await gateway.seen("/api/keys")
    assert first.keys() == {
        "key_id", "platform", "model_id", "limits", "used", "left", "resets_at", "per_hour", "dry_at",
    }  # fmt: skip
    assert first["key_id"] == key["id"]
    assert first["limits"] == {"rpm": 30, "rpd": 100, "tpm": None, "tpd": 100_000}
    assert (first["used"]["rpm"], first["used"]["rpd"]) == (3, 3)
    assert first["left"] == {"rpm": 27, "rpd": 97, "tpm": None, "tpd": 100_000 - first["used"]["tpd"]}
    assert first["per_hour"] == {"requests": 3, "tokens": first["used"]["tpd"]}
    assert first["resets_at"].endswith("T00:00:00.000Z")
    assert (second["left"]["rpd"], second["resets_at"], second["dry_at"]) == (None, None, None)
    assert found["free", "free-model"]["key_id"] is None
    assert not any(platform == "demo" for platform, _ in found)


async def test_the_day_is_the_platforms_and_modes_say_when_they_begin_and_end_to_run_dry(start_gateway):
    reset = f"{(datetime.now(UTC) + timedelta(hours=2)):%H:%M} UTC"  # the day has begun 22 hours ago
    day = {"daily_reset": reset}
    gateway = await start_gateway(
        {"a": day | {"model": {"rpd": 100}}, "b": day | {"model": {"rpd": 60, "exclude_from": ["balanced"]}}}
    )
    await gateway.stop()
    now = time.time()
    ages_h = {"a": [0.5] * 40 + [20] * 20 + [23] * 999, "b": [0.5] * 50}
    rows = [
        Row("r", now - age * HOUR_S, platform=name, model_id=f"{name}-model", key_id=1 + "ab".index(name), attempt=1)
        for name, ages in ages_h.items()
        for age in ages
    ]
    behind(gateway.db, lambda db: insert_rows(db, rows))
    gateway = await start_gateway(
        {"a": day | {"model": {"rpd": 100}}, "b": day | {"model": {"rpd": 60, "exclude_from": ["balanced"]}}}
    )
    found = await entries(gateway)
    report = await gateway.seen("/api/quota")

    used = Counter({entry["platform"]: entry["used"]["rpd"] for entry in found.values()})
    assert (used["a"], used["b"]) == (60, 50)
    dry = {name: datetime.fromisoformat(found[name, f"{name}-model"]["dry_at"]).timestamp() for name in "ab"}
    assert dry["a"] == pytest.approx(now + HOUR_S, abs=30)
    assert dry["b"] == pytest.approx(now + 0.2 * HOUR_S, abs=30)
    modes = {mode["mode"]: mode for mode in report["modes"]}
    assert set(modes) == {"balanced", "smart", "fast", "priority"}
    a, b = (found[name, f"{name}-model"]["dry_at"][:15] for name in "ab")
    for mode, first, last in (("balanced", a, a), ("smart", b, a), ("priority", b, a)):
        shown = modes[mode]
        assert (shown["first_dry_at"][:15], shown["last_dry_at"][:15]) == (first, last)
