"""SPEC 20.1: what all gateways together use of a key never overshoots its provider's limits, and hardly falls short."""

import asyncio
import random
import signal

from conftest import case
from fake_provider import answer

pytest_plugins = ["servers"]
ONLY = {"X-Fallback": "none"}


async def flood(members, model: str, seconds: float, at_once: int = 6) -> None:
    """Each gateway is asked by so many clients that never rest."""
    end = asyncio.get_running_loop().time() + seconds

    async def ask(member) -> None:
        while asyncio.get_running_loop().time() < end:
            if (await member.chat(model=model, headers=ONLY)).status != 200:
                await asyncio.sleep(0.02)

    await asyncio.gather(*[ask(member) for member in members for _ in range(at_once)], return_exceptions=True)


async def test_limits_are_used_up_by_all_together_and_no_more(start_gateways, redis, fake):
    limits = {"minute": {"rpm": 100}, "day": {"rpd": 21}, "tokens": {"tpm": 20_000}, "killed": {"rpm": 100}}
    platforms = {name: {"model": limit} for name, limit in limits.items()}
    members = await start_gateways(4, redis, platforms)
    fake.script("tokens", answer("hello", usage=(10, 10)))  # of the thousand that each request reserves

    await asyncio.gather(*[flood(members, f"{name}-model", 3, at_once=4) for name in ("minute", "day", "tokens")])

    with case("requests a minute"):
        assert 95 <= fake.called.count("minute") <= 100
    with case("requests a day, to the last one"):
        assert fake.called.count("day") == 21
    with case("tokens, of which what was not needed has been given back"):
        assert 100 < fake.called.count("tokens") <= 1000

    with case("one is killed at a random moment"):
        flooding = asyncio.create_task(flood(members, "killed-model", 2.5))
        async with asyncio.timeout(5):
            goal = random.randrange(10, 90)
            while fake.called.count("killed") < goal:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        members[random.randrange(4)].kill(signal.SIGKILL)
        await flooding
        assert 80 <= fake.called.count("killed") <= 100  # what it was lent, and what it was doing, is lost


async def test_without_redis_each_takes_its_part_of_a_day_and_what_it_used_counts_afterwards(
    start_gateways, own_redis, fake
):
    platforms = {"all": {"model": {"rpd": 41}}, "one": {"model": {"rpd": 20}}}
    members = await start_gateways(2, own_redis, platforms)
    own_redis.stop()

    await flood(members, "all-model", 1, at_once=2)
    await flood(members[:1], "one-model", 0.5, at_once=2)

    assert fake.called.count("all") == 40  # the last one cannot be halved
    assert fake.called.count("one") == 10
    own_redis.start()
    for member in members:
        async with asyncio.timeout(10):
            while not await member.metric("freeway_shared_state_up"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    await flood(members, "one-model", 2)

    assert fake.called.count("one") == 20
