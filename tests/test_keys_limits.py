"""SPEC 4.6 and 4.7: which key serves, and that no limit is ever overshot."""

import asyncio
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from conftest import assert_error, both_ways
from fake_provider import Wait, answer, completion, error, raw, until

KEYS = ["sk-a-secret-0001", "sk-a-secret-0002", "sk-a-secret-0003"]


@pytest.fixture(autouse=True)
async def not_around_midnight():
    """The day of a daily limit must not end in the middle of a test."""
    now = datetime.now(UTC)
    midnight = (now + timedelta(days=1)).replace(hour=0, minute=0, second=0, microsecond=0)
    if (left_s := (midnight - now).total_seconds()) < 20:
        await asyncio.sleep(left_s + 1)


def keys_used(fake) -> list[str]:
    return [request.key for request in fake.requests]


# --- Round robin ------------------------------------------------------------------------------------------------


@both_ways
async def test_keys_take_turns(start_gateway, fake, streaming):
    gateway = await start_gateway({"a": {"keys": KEYS}})

    for _ in range(6):
        assert (await gateway.ask(streaming=streaming)).status == 200

    assert Counter(keys_used(fake)) == dict.fromkeys(KEYS, 2)
    assert keys_used(fake)[:3] == keys_used(fake)[3:]


async def test_keys_take_turns_for_each_model_on_its_own(start_gateway, fake):
    models = [{"model_id": "first"}, {"model_id": "second"}]
    gateway = await start_gateway({"a": {"keys": KEYS[:2], "models": models}})

    for _ in range(2):
        for name in ("first", "second"):
            await gateway.chat(model=name)

    used = {(request.json["model"], request.key) for request in fake.requests}
    assert len(used) == 4


async def test_a_cooling_key_is_passed_over(start_gateway, fake):
    gateway = await start_gateway({"a": {"keys": KEYS}})
    fake.script("a", lambda request: error(429) if request.key == KEYS[1] else answer()(request))

    for _ in range(9):
        assert (await gateway.chat()).text == "hello"

    used = Counter(keys_used(fake))
    assert used[KEYS[1]] == 1
    assert abs(used[KEYS[0]] - used[KEYS[2]]) <= 1
    (cooldown,) = (await gateway.protection())["key_cooldowns"]
    assert (cooldown["platform"], cooldown["model_id"]) == ("a", "a-model")


async def test_each_key_is_tried_once_before_the_next_model(start_gateway, fake):
    gateway = await start_gateway({"a": {"keys": KEYS}, "b": {}})
    fake.script("a", error(429))

    got = await gateway.chat()

    assert got.text == "hello from b"
    assert sorted(keys_used(fake)[:3]) == KEYS
    assert got.headers["X-Fallback-Attempts"] == "3"


async def test_a_key_that_cools_for_one_model_is_tried_for_another(start_gateway, fake):
    models = [{"model_id": "first", "intelligence_rank": 1}, {"model_id": "second", "intelligence_rank": 2}]
    gateway = await start_gateway({"a": {"keys": KEYS[:2], "models": models}})
    fake.script("a", lambda request: error(429) if request.json["model"] == "first" else answer()(request))

    assert (await gateway.chat()).text == "hello"
    assert (await gateway.chat()).text == "hello"

    assert [request.json["model"] for request in fake.requests] == ["first", "first", "second", "second"]


async def test_a_key_on_the_same_platform_twice_is_one_key(start_gateway, fake):
    gateway = await start_gateway({"a": {"keys": [KEYS[0], KEYS[0]]}, "b": {}})
    fake.script("a", error(429))

    await gateway.chat()

    assert fake.called == ["a", "b"]


async def test_a_keyless_platform_needs_no_key_and_sends_none(start_gateway, fake):
    gateway = await start_gateway({"a": {"keyless": True}})

    assert (await gateway.chat()).text == "hello from a"

    assert "authorization" not in fake.requests[0].headers


# --- Limits -----------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("limit", ["rpm", "rpd"])
async def test_parallel_requests_never_overshoot_a_request_limit(start_gateway, fake, limit, streaming):
    gateway = await start_gateway({"a": {"model": {limit: 7}}, "b": {}})
    go_on = asyncio.Event()
    fake.script("a", lambda request: raw(Wait(go_on), *answer("from a")(request).steps))
    waiting = [asyncio.create_task(gateway.ask(streaming=streaming)) for _ in range(50)]
    await until(lambda: len(fake.requests) == 50)

    assert Counter(fake.called) == {"a": 7, "b": 43}
    go_on.set()

    assert Counter([(await task).text for task in waiting]) == {"from a": 7, "hello from b": 43}
    assert (await gateway.chat()).text == "hello from b"


@pytest.mark.parametrize("limit", ["rpm", "rpd"])
async def test_each_key_has_limits_of_its_own(start_gateway, fake, limit):
    gateway = await start_gateway({"a": {"keys": KEYS, "model": {limit: 2}}, "b": {}})

    texts = [(await gateway.chat()).text for _ in range(8)]

    assert texts == ["hello from a"] * 6 + ["hello from b"] * 2
    assert Counter(keys_used(fake)[:6]) == dict.fromkeys(KEYS, 2)


@pytest.mark.parametrize("limit", ["tpm", "tpd"])
async def test_parallel_requests_never_overshoot_a_token_limit(start_gateway, fake, limit):
    gateway = await start_gateway({"a": {"model": {limit: 5_000}}, "b": {}})
    go_on = asyncio.Event()
    fake.script("a", raw(Wait(go_on), *completion("from a", usage=(10, 10)).steps))
    waiting = [asyncio.create_task(gateway.chat("x" * 400, max_tokens=900)) for _ in range(50)]  # 1000 tokens each
    await until(lambda: len(fake.requests) == 50)

    taken = Counter(fake.called)["a"]

    assert 4 <= taken <= 5
    go_on.set()
    await asyncio.gather(*waiting)


@both_ways
async def test_an_estimate_is_settled_with_the_real_usage(start_gateway, fake, streaming):
    gateway = await start_gateway({"a": {"model": {"tpm": 2_500}}, "b": {}})
    fake.script("a", answer("little", usage=(10, 10)))
    for _ in range(10):  # each is estimated at more than 1000 tokens and costs 20
        assert (await gateway.ask(streaming=streaming)).text == "little"

    fake.script("a", answer("much", usage=(1_500, 500)))
    assert (await gateway.ask(streaming=streaming)).text == "much"

    assert (await gateway.ask(streaming=streaming)).text == "hello from b"


async def test_a_request_too_large_for_what_is_left_of_the_limit_goes_elsewhere(start_gateway, fake):
    gateway = await start_gateway({"a": {"model": {"tpm": 500}}, "b": {}})

    assert (await gateway.chat(max_tokens=600)).text == "hello from b"
    assert (await gateway.chat(max_tokens=100)).text == "hello from a"


@pytest.mark.parametrize("limit", ["tpm", "tpd"])
@pytest.mark.parametrize("model", ["auto-priority", "auto", "a-model"])
async def test_a_request_that_alone_exceeds_a_limit_is_too_long_at_once(start_gateway, fake, limit, model):
    gateway = await start_gateway({"a": {"model": {limit: 2_000}}})

    async with asyncio.timeout(3):  # no waiting: there will never be room
        got = await gateway.chat("x" * 8_000, model=model)

    assert_error(got, 400, "invalid_request_error", "context_length_exceeded")
    assert "maximum context length is 2000 tokens. However, your messages resulted in 3000" in got.error["message"]
    assert fake.called == []


async def test_failed_attempts_count_as_requests(start_gateway, fake):
    gateway = await start_gateway({"a": {"model": {"rpd": 2}}, "b": {}})
    fake.script("a", error(404), error(404), answer())

    texts = [(await gateway.chat()).text for _ in range(3)]

    assert texts == ["hello from b"] * 3
    assert fake.called == ["a", "b", "a", "b", "b"]


async def test_limits_are_counted_for_each_model(start_gateway, fake):
    models = [{"model_id": name, "intelligence_rank": rank, "rpd": 1} for rank, name in enumerate(["x", "y"])]
    gateway = await start_gateway({"a": {"models": models}})

    for _ in range(2):
        assert (await gateway.chat()).status == 200
    got = await gateway.chat()

    assert [request.json["model"] for request in fake.requests] == ["x", "y"]
    assert (got.status, got.error["code"]) == (429, "rate_limited")
    assert int(got.headers["Retry-After"]) >= 1


@pytest.mark.parametrize("limit", ["rpm", "rpd", "tpm", "tpd"])
async def test_a_restart_forgets_no_use(start_gateway, fake, limit):
    platforms = {"a": {"model": {limit: 3 if limit.startswith("r") else 3_000}}, "b": {}}
    gateway = await start_gateway(platforms)
    fake.script("a", answer("from a", usage=(600, 300)))
    for _ in range(2):
        assert (await gateway.chat(max_tokens=100)).text == "from a"
    await gateway.stop()

    restarted = await start_gateway(platforms)

    texts = [(await restarted.chat(max_tokens=100)).text for _ in range(6)]
    assert texts.count("from a") in ((1,) if limit.startswith("r") else (1, 2))
    assert texts[-1] == "hello from b"


async def test_a_cancelled_request_gives_back_nothing_it_may_have_used(start_gateway, fake):
    gateway = await start_gateway({"a": {"model": {"rpd": 2}}, "b": {}})
    never = asyncio.Event()
    fake.script("a", raw(Wait(never)), answer("from a"))
    leaving = asyncio.create_task(gateway.chat())
    await fake.arrived(1)
    leaving.cancel()
    await fake.closed(0)

    texts = [(await gateway.chat()).text for _ in range(2)]

    assert texts == ["from a", "hello from b"]
