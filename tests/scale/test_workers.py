"""SPEC 20.4: several processes on one port that are one gateway to clients and operator."""

import asyncio
import contextlib
import os
import signal

import aiohttp
from conftest import API_KEY, case, logged
from fake_provider import Wait, chunk, error, event, sse, until

pytest_plugins = ["servers"]
FIRST = event(chunk("begun "))


@contextlib.asynccontextmanager
async def anew(member):
    """A client on a connection of its own: the system picks the worker by connection."""
    async with aiohttp.ClientSession() as http:
        yield type(member)(member.base_url, http, API_KEY, member.running, member.folder)


async def asked(member, count: int, **fields) -> list:
    """So many requests, each on its own connection."""

    async def once():
        async with anew(member) as client:
            return await client.chat(**fields)

    return await asyncio.gather(*[once() for _ in range(count)])


def pids(member) -> set[str]:
    """The workers that have been started."""
    children = f"/proc/{member.running.process.pid}/task/{member.running.process.pid}/children"
    with open(children) as file:
        return set(file.read().split())


async def workers(start_gateways, redis, platforms=("a", "b"), **more):
    (one,) = await start_gateways(1, redis, platforms, {"GATEWAY_WORKERS": "2", **more})
    async with asyncio.timeout(15):
        while await one.metric("freeway_gateways") < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return one


async def test_two_workers_are_one_gateway(start_gateways, redis, fake):
    one = await workers(start_gateways, redis)

    with case("both serve, and the metrics and rows of either are those of both"):
        assert {got.status for got in await asked(one, 24)} == {200}
        await one.rows(24)
        for _ in range(4):
            async with anew(one) as client:
                assert await client.metric("freeway_requests_total") == 24
                assert (await client.seen("/api/status"))["workers"] == 2

    with case("an explanation is found whichever worker is asked"):
        for got in await asked(one, 6):
            assert (await one.get(f"/api/requests/{got.headers['X-Request-Id']}/explain")).status == 200
        assert (await one.get("/api/requests/req_unknown/explain")).status == 404

    with case("a change of the operator's holds for both"):
        (model,) = [row for row in await one.seen("/api/models") if row["model_id"] == "a-model"]
        await one.call("PATCH", f"/api/models/{model['id']}", {"enabled": False})
        await asyncio.sleep(0.3)
        fake.clear()
        await asked(one, 12)
        assert set(fake.called) == {"b"}

    with case("a rest that one has met with is shown once"):
        fake.script("b", error(429, headers={"retry-after": "60"}))
        await asked(one, 1)
        await asyncio.sleep(0.2)
        assert [entry["model_id"] for entry in (await one.protection())["key_cooldowns"]] == ["b-model"]

    with case("one that is killed is replaced"):
        before = pids(one)
        os.kill(int(min(before)), signal.SIGKILL)
        await until(lambda: len(pids(one)) == 2 and pids(one) != before, within_s=10)
        assert len(one.lines("worker_ended")) == 1


async def test_a_stop_lets_the_streams_of_all_workers_finish(start_gateways, redis, fake):
    one = await workers(start_gateways, redis, ["a"])
    go_on = asyncio.Event()
    fake.script("a", sse(chunk("begun "), Wait(go_on), chunk("and done"), chunk(finish="stop")))

    async with contextlib.AsyncExitStack() as stack:
        streams = []
        for _ in range(8):
            client = await stack.enter_async_context(anew(one))
            streams.append(await stack.enter_async_context(client.post(client.request(stream=True))))
            assert await streams[-1].content.readexactly(len(FIRST)) == FIRST
        one.running.signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        go_on.set()
        rests = await asyncio.gather(*[stream.read() for stream in streams])

    assert await one.running.ended() == 0
    assert all(rest.endswith(b"data: [DONE]\n\n") for rest in rests)
    assert len(logged(one.folder / "gateway.db")) == 8


async def test_workers_that_cannot_start_say_so_once(start_gateways, redis, tmp_path, start_process):
    alone = await start_process(["a"], {"GATEWAY_API_KEY": API_KEY, "GATEWAY_WORKERS": "2"})
    assert await alone.ended() == 2
    assert "GATEWAY_STATE" in alone.text

    (tmp_path / "gateway.db").write_bytes(b"not a database at all" * 100)
    broken = await start_process(["a"], {"GATEWAY_WORKERS": "2", "GATEWAY_STATE": redis.url})
    assert await broken.ended() == 2
    assert broken.text.count("freeway:") == 1
