"""SPEC 20.3: every command has a limit, and whoever gives one up spoils no other's."""

import asyncio
import random
import signal
import time

import pytest

from shared.link import LIMIT_S, Away, Link

pytest_plugins = ["servers"]
DOUBLE = "return tonumber(ARGV[1]) * 2"


@pytest.fixture
async def link(own_redis):
    opened = Link(own_redis.url, "news", (DOUBLE,))
    assert await opened.start()
    yield opened
    await opened.close()


async def test_answers_belong_to_their_commands_however_many_others_are_cancelled(link):
    async def given_up(n: int) -> None:
        task = asyncio.create_task(link.send("ECHO", f"given up {n}"))
        await asyncio.sleep(random.random() * 0.002)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def asked(n: int) -> bool:
        try:
            assert await link.send("ECHO", str(n)) == str(n).encode()
            assert await link.run(DOUBLE, "key", n) == 2 * n
        except Away:  # not in time, on a busy machine; a wrong answer is what must not be
            return False
        return True

    right = 0
    for _ in range(20):
        _, *answered = await asyncio.gather(
            asyncio.gather(*[given_up(n) for n in range(20)]), *[asked(n) for n in range(20)]
        )
        right += sum(answered)
    assert right > 0


async def test_a_script_is_known_again_after_redis_has_lost_it(link, own_redis):
    own_redis.command("SCRIPT", "FLUSH")
    assert await link.run(DOUBLE, "key", 4) == 8
    own_redis.command("SCRIPT", "FLUSH")
    assert await link.send_all([link.script(DOUBLE, "key", 5), ("ECHO", "x")]) == [10, b"x"]


async def test_a_redis_that_hangs_is_given_up_in_time_and_soon_not_asked_any_more(link, own_redis):
    own_redis.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(Away):
            await link.send("PING")
        assert time.monotonic() - began < LIMIT_S * 3
        while link.up:
            assert time.monotonic() - began < 2
            await asyncio.sleep(0.01)
        began = time.monotonic()
        with pytest.raises(Away):
            await link.send("PING")
        assert time.monotonic() - began < 0.01
    finally:
        own_redis.signal(signal.SIGCONT)


async def test_an_error_of_redis_counts_as_a_failure(link):
    for _ in range(5):
        with pytest.raises(Away):
            await link.send("NO-SUCH-COMMAND")
    assert link.why
