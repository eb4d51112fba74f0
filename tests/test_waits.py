"""How long a failing provider asks to be left alone, in whichever words (SPEC 7.9)."""

import asyncio

import pytest
from fake_provider import answer, error

from adapters import errors, waits
from routing.day import until_reset_s

NOON = 1_795_521_600.0  # 2026-11-24T12:00:00Z
WAITS = {
    "a bare number": ({"Retry-After": "17"}, {}, "", 17),
    "a date without a zone": ({"Retry-After": "Tue, 24 Nov 2026 12:01:00 -0000"}, {}, "", 60),
    "below zero": ({"Retry-After": "-5"}, {}, "", None),
    "no number": ({"Retry-After": "NaN"}, {}, "", None),
    "a fraction": ({"Retry-After": "1.5"}, {}, "", 1.5),
    "a date": ({"Retry-After": "Tue, 24 Nov 2026 12:01:00 GMT"}, {}, "", 60),
    "too long": ({"Retry-After": "999999"}, {}, "", 86_400),
    "in the body": ({}, {"error": {"details": [{"retryDelay": "17s"}]}}, "", 17),
    "in the body as a number": ({}, {"error": {"metadata": {"retry_after_seconds": 2.5}}}, "", 2.5),
    "a moment in the body": ({}, {"error": {"metadata": {"headers": {"X-RateLimit-Reset": "1795521630000"}}}}, "", 30),
    "seconds": ({}, {}, "try again in 7.66s", 7.66),
    "minutes": ({}, {}, "Please try again in 2m3.4s.", 123.4),
    "hours": ({}, {}, "try again in 1h2m3s", 3723),
    "milliseconds": ({}, {}, "try again in 680ms", 0.68),
    "retry after": ({}, {}, "retry after 30 seconds", 30),
    "please wait": ({}, {}, "Please wait 52220 seconds before retrying.", 52_220),
    "days": ({}, {}, "Resets in 3 days", 86_400),
    "a moment in words": ({}, {}, "limit reached, reset at 2026-11-24 21:00:00", 3600),
    "a day": ({}, {}, "Rate limit of 50 per day exceeded", 4 * 3600),
    "today": ({}, {}, "You have used all requests of today", 4 * 3600),
    "a month": ({}, {}, "limited to 1000 calls per month", 86_400),
    "zero": ({"Retry-After": "0"}, {}, "", 0.5),
    "a date that has passed": ({"Retry-After": "Tue, 24 Nov 2026 11:00:00 GMT"}, {}, "", 0.5),
    "a duration": ({"Retry-After": "1m30s"}, {}, "", 90),
    "an ISO date": ({"Retry-After": "2026-11-24T12:01:00Z"}, {}, "", 60),
    "seconds since 1970": ({"Retry-After": "1795521630"}, {}, "", 30),
    "milliseconds in a header": ({"retry-after-ms": "2500"}, {}, "", 2.5),
    "a moment in a field": ({}, {"error": {"retry_after": "2026-11-24T12:01:00+00:00"}}, "", 60),
    "about": ({}, {}, "Please try again in about 3 hours.", 10_800),
    "with an and": ({}, {}, "Available again in 1 minute and 5 seconds", 65),
    "for": ({}, {}, "wait for 20s", 20),
    "months are no minutes": ({}, {}, "resets in 3 months", None),
    "a duration that is no wait": ({}, {}, "we answer within 24 hours", None),
    "a moment with a zone": ({}, {}, "try again at 2026-11-24T12:01:00Z", 60),
    "a moment with an offset": ({}, {}, "Quota resets at 2026-11-24 13:01:00 +01:00.", 60),
    "a moment in Chinese": ({}, {}, "您的限额将在 2026-11-24 21:00:00 重置。", 3600),
    "a week": ({}, {}, "you have reached your weekly usage limit, upgrade for higher limits", 86_400),
    "a session": ({}, {}, "you have reached your session usage limit", 3600),
    "an hour": ({}, {}, "you've reached your hourly usage limit", 3600),
    "none": ({}, {}, "slow down", None),
    "nonsense": ({"Retry-After": "soon"}, {"retry_after": True}, "wait a moment", None),
}


@pytest.mark.parametrize(("headers", "content", "message", "seconds"), WAITS.values(), ids=WAITS)
def test_a_wait_is_read_wherever_it_stands(headers, content, message, seconds):
    fault = errors.Fault(429, None, message)
    found = waits.retry_after_s(fault, headers, content, NOON, reset="Asia/Shanghai")
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_a_moment_that_a_daily_quota_tells_is_believed():
    words = "Usage limit reached for 5 hour. Your limit will reset at 2026-11-24 21:00:00. Retry in 1s."
    fault = errors.Fault(429, errors.DAILY_QUOTA, words, sure=True, daily=True)
    assert waits.retry_after_s(fault, {"Retry-After": "1"}, {}, NOON, reset="Asia/Shanghai") == 3600


RESETS = {
    "UTC": ("UTC", 12 * 3600),
    "west of it": ("America/Los_Angeles", 20 * 3600),
    "east of it": ("Asia/Shanghai", 4 * 3600),
    "at another hour": ("07:00 Asia/Jakarta", 12 * 3600),
    "nowhere": ("Mars/Olympus", 12 * 3600),
    "no hour at all": ("soon UTC", 12 * 3600),
}


@pytest.mark.parametrize(("reset", "seconds"), RESETS.values(), ids=RESETS)
def test_a_day_ends_by_the_platforms_clock(reset, seconds):
    assert until_reset_s(reset, NOON) == seconds


def test_a_day_of_25_hours_ends_after_25_hours():
    first_of_november = 1_793_516_400.0  # 2026-11-01T07:00:00Z, midnight in California, where the clocks go back
    assert until_reset_s("America/Los_Angeles", first_of_november) == 25 * 3600


CODES = {
    "weekly_limit_exceeded": 86_400,
    "monthly_quota": 86_400,
    "daily_limit_exceeded": 4 * 3600,
    "session_limit": 3600,
    "rate_limit_exceeded": None,
}


@pytest.mark.parametrize(("code", "seconds"), CODES.items())
def test_a_kind_of_limit_may_be_told_by_the_code(code, seconds):
    assert waits.retry_after_s(errors.Fault(429, code, "no"), {}, {}, NOON, reset="Asia/Shanghai") == seconds


COUNTERS = {
    "spent, in the newer form": ({"RateLimit": '"api";r=0;t=55'}, 55),
    "not spent": ({"RateLimit": '"api";r=3;t=55'}, None),
    "the one of two that is spent": ({"RateLimit": '"minute";r=0;t=5, "day";r=9;t=3600'}, 5),
    "the longer of two that are": ({"RateLimit": '"minute";r=0;t=5, "day";r=0;t=3600'}, 3600),
    "without what is left": ({"RateLimit": '"api";t=12'}, 12),
    "spent, in the older form": ({"RateLimit": "limit=100, remaining=0, reset=50"}, 50),
    "not spent, in the older form": ({"RateLimit": "limit=100, remaining=5, reset=50"}, None),
    "nonsense": ({"RateLimit": "much"}, None),
    "a reset alone": ({"RateLimit-Reset": "55"}, 55),
    "a reset and what is left": ({"RateLimit-Reset": "55", "RateLimit-Remaining": "0"}, 55),
    "a reset that is not the reason": ({"RateLimit-Reset": "55", "RateLimit-Remaining": "3"}, None),
    "seconds since 1970": ({"X-RateLimit-Reset": "1795521630", "X-RateLimit-Remaining": "0"}, 30),
    "milliseconds since 1970": ({"X-RateLimit-Reset": "1795521630000"}, 30),
    "a moment": ({"anthropic-ratelimit-requests-reset": "2026-11-24T12:00:30Z"}, 30),
    "the counter last": (
        {"x-ratelimit-requests-remaining": "0", "x-ratelimit-requests-reset": "7s", "x-ratelimit-tokens-reset": "1h"},
        7,
    ),
    "with hyphens": ({"X-Rate-Limit-Remaining": "0", "X-Rate-Limit-Reset": "9"}, 9),
    "after": ({"x-ratelimit-remaining": "0", "x-ratelimit-reset-after": "4.5"}, 4.5),
    "spent and due": ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "0"}, 0.5),
    "the soonest of resets alone": ({"x-ratelimit-reset-requests": "60", "x-ratelimit-reset-tokens": "7"}, 7),
}  # fmt: skip


@pytest.mark.parametrize(("headers", "seconds"), COUNTERS.values(), ids=COUNTERS)
def test_a_wait_is_read_from_the_counters_of_rate_limits(headers, seconds):
    found = waits.retry_after_s(errors.Fault(429, None, "slow down"), headers, {}, NOON)
    assert found == (None if seconds is None else pytest.approx(seconds))


async def test_a_key_rests_until_the_counter_comes_back(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", error(429, headers={"RateLimit": '"api";r=0;t=55'}))

    assert (await gateway.chat()).text == "hello from b"

    assert 50_000 < (await gateway.cooled_keys())["a-model"] <= 55_000


async def test_a_wait_of_nothing_is_a_short_one(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", error(429, headers={"Retry-After": "0"}), answer("back"))

    assert (await gateway.chat()).text == "hello from b"
    assert (await gateway.chat()).text == "hello from b"  # not asked again at once

    async with asyncio.timeout(3):
        while await gateway.cooled_keys():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await gateway.chat()).text == "back"
