"""SPEC 20.1 and 20.3: what one gateway learns of a provider the others know at once, and without Redis each goes on."""

import asyncio
import signal
import time

import aiohttp
from conftest import Client
from fake_provider import Reply, Wait, answer, completion, error, until

pytest_plugins = ["servers"]

LIMITED = error(429, headers={"retry-after": "30"})


async def cooled(member, model: str, within_s: float = 2.0) -> dict[str, int]:
    async with asyncio.timeout(within_s):
        while model not in (found := await member.cooled_keys()):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    return found


async def test_a_429_seen_by_one_gateway_keeps_the_other_from_asking(start_gateways, redis, fake):
    one, other = await start_gateways(2, redis, ["a", "b"])
    fake.script("a", LIMITED)

    assert (await one.chat()).headers["X-Routed-Via"].startswith("b/")
    left = await cooled(other, "a-model")
    fake.clear()

    assert (await other.chat()).headers["X-Routed-Via"].startswith("b/")
    assert fake.called == ["b"]
    assert 25_000 < left["a-model"] <= 30_000


async def test_a_success_ends_a_rest_everywhere(start_gateways, redis, fake):
    settings = {"TRANSIENT_COOLDOWN_MS": "60000", "TRIAL_SPACING_MS": "50", "WAIT_FOR_CAPACITY_MS": "5000"}
    one, other = await start_gateways(2, redis, ["a"], settings)
    fake.script("a", error(500), answer("back"))

    assert (await one.chat()).status == 200  # a trial
    async with asyncio.timeout(2):
        while await one.cooled_models() or await other.cooled_models():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert redis.command("KEYS", "*:rest") == ""


async def test_a_gateway_that_starts_knows_what_rests_and_which_keys_are_invalid(start_gateways, redis, fake):
    (one,) = await start_gateways(1, redis, ["a", "b", "c"])
    fake.script("a", LIMITED)
    fake.script("b", error(401))
    assert (await one.chat()).headers["X-Routed-Via"].startswith("c/")
    await until(lambda: "invalid" in redis.command("MGET", *redis.command("KEYS", "*:status").split()))
    fake.clear()

    (late,) = await start_gateways(1, redis, ["a", "b", "c"], folder="late")

    assert "a-model" in await cooled(late, "a-model")
    assert (await late.chat()).headers["X-Routed-Via"].startswith("c/")
    assert fake.called == ["c"]


async def test_every_key_in_redis_ends_by_itself(start_gateways, redis, fake):
    platforms = {"a": {"model": {"rpm": 100, "rpd": 1000}}, "b": {}}
    one, other = await start_gateways(2, redis, platforms)
    fake.script("a", answer("hello"), LIMITED)
    assert (await one.chat()).status == 200
    assert (await one.chat(model="auto-smart")).status == 200
    fake.script("b", error(500))
    await other.chat(model="auto-smart")
    await asyncio.sleep(0.3)

    keys = redis.command("KEYS", "*").split()

    assert len(keys) >= 4
    assert all(key.startswith("fw:") and int(redis.command("PTTL", key)) > 0 for key in keys), keys


async def test_only_one_gateway_tries_what_rests(start_gateways, redis, fake):
    settings = {"TRANSIENT_COOLDOWN_MS": "60000", "TRIAL_SPACING_MS": "50", "WAIT_FOR_CAPACITY_MS": "8000"}
    one, other = await start_gateways(2, redis, ["a"], settings)
    go_on = asyncio.Event()
    fake.script("a", error(500))
    assert (await one.chat(headers={"X-Max-Wait": "0"})).status != 200
    while not await other.cooled_models():  # noqa: ASYNC110 - until it has been told
        await asyncio.sleep(0.01)
    fake.clear()
    fake.script("a", lambda request: held(go_on))

    asked = [asyncio.create_task(member.chat()) for member in (one, other) * 3]
    await fake.arrived(1)
    await asyncio.sleep(0.3)
    assert len(fake.requests) == 1
    fake.script("a", answer("back"))
    go_on.set()

    assert [got.status for got in await asyncio.gather(*asked)] == [200] * 6


def held(go_on: asyncio.Event):
    return Reply((Wait(go_on), *completion("back").steps))


async def test_the_operator_clears_cooldowns_at_all_gateways(start_gateways, redis, fake):
    one, other = await start_gateways(2, redis, ["a", "b"])
    fake.script("a", LIMITED)
    await one.chat()
    await cooled(other, "a-model")

    await other.call("DELETE", "/api/protection/cooldowns")

    async with asyncio.timeout(2):
        while await one.cooled_keys():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_bans_travel_with_the_session(start_gateways, redis, fake):
    platforms = {"a": {"protection": "provider-ban"}, "b": {}}
    one, other = await start_gateways(2, redis, platforms, {"TRANSIENT_COOLDOWN_MS": "1"})
    fake.script("a", error(500))
    fake.script("b", answer("b"))
    headers = {"X-Session-Id": "conversation"}
    async with asyncio.timeout(5):
        while not (await one.protection())["bans"]:
            assert (await one.chat(model="auto-smart", headers=headers)).status == 200

    assert (await other.chat(model="auto-smart", headers=headers)).status == 200

    (ban,) = (await other.protection())["bans"]
    assert [(entry["platform"]) for entry in ban["platforms"]] == ["a"]


async def test_a_conversation_that_moves_keeps_model_and_key(start_gateways, redis, fake):
    platforms = {name: {"keys": [f"sk-{name}-number-{n}-0123456789" for n in range(4)]} for name in "abcd"}
    one, other = await start_gateways(2, redis, platforms, {"THREAD_COOLDOWN_MS": "1"})

    for n in range(12):
        headers = {"X-Session-Id": f"conversation-{n}"}
        fake.clear()
        assert (await one.chat(model="auto-smart", headers=headers)).status == 200
        await asyncio.sleep(0.05)
        assert (await other.chat(model="auto-smart", headers=headers)).status == 200
        first, second = fake.requests
        assert (first.platform, first.key) == (second.platform, second.key)


async def test_a_clients_limit_is_one_for_all_gateways(start_gateways, redis, fake):
    one = (await start_gateways(1, redis, ["a"], {"GATEWAY_WORKERS": "2"}))[0]
    async with asyncio.timeout(15):
        while await one.metric("freeway_gateways") < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    _, made = await one.call("POST", "/api/clients", {"name": "c", "limits": {"rpm": 9}})
    await asyncio.sleep(0.3)

    async def ask() -> int:
        async with aiohttp.ClientSession() as http:
            return (await Client(one.base_url, http, made["key"]).chat()).status

    answers = await asyncio.gather(*[ask() for _ in range(30)])

    assert (answers.count(200), answers.count(429)) == (9, 21)


async def test_without_redis_at_the_start_a_gateway_serves_and_says_so_once(start_gateways, own_redis, fake):
    own_redis.stop()
    (one,) = await start_gateways(1, own_redis, ["a"], alone=True)
    assert (await one.chat()).text == "hello from a"
    assert await one.metric("freeway_shared_state_up") == 0
    await until(lambda: [line["up"] for line in one.lines("shared_state")] == [False])

    own_redis.start()
    async with asyncio.timeout(10):
        while not await one.metric("freeway_shared_state_up"):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await until(lambda: [line["up"] for line in one.lines("shared_state")] == [False, True])


async def test_what_rested_while_redis_was_away_is_known_to_all_when_it_is_back(start_gateways, own_redis, fake):
    one, other = await start_gateways(2, own_redis, ["a", "b"])
    own_redis.stop()
    for member in (one, other):
        async with asyncio.timeout(10):
            while await member.metric("freeway_shared_state_up"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    fake.script("a", LIMITED)
    assert (await one.chat()).status == 200

    own_redis.start()

    assert "a-model" in await cooled(other, "a-model", within_s=8)


async def test_a_redis_that_hangs_costs_no_request_its_answer(start_gateways, own_redis, fake):
    platforms = {"a": {"model": {"rpm": 10_000}}, "b": {}}
    one, other = await start_gateways(2, own_redis, platforms)
    own_redis.signal(signal.SIGSTOP)
    try:
        for member in (one, other):
            began = time.monotonic()
            for _ in range(30):
                assert (await member.chat(model="auto-smart")).status == 200
            assert time.monotonic() - began < 5
    finally:
        own_redis.signal(signal.SIGCONT)
