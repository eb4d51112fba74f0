"""SPEC 7.5 to 7.7 end to end: sessions leave alone what others use, as long as there is something else.

In smart mode what the catalogue prefers comes first, so a new conversation goes to `a/one`, if nothing holds it back.
"""

import asyncio
import contextlib
from dataclasses import dataclass

import pytest
from conftest import both_ways
from fake_provider import CUT, PAUSE, RESET, ROLE, Reply, Wait, answer, chunk, completion, error, raw, sse, until

A1, A2, B = "a/one", "a/two", "b/b-model"
SMART = {"prefer_in": ["smart"]}
HALF = chunk("half an ans")
NO_THREAD_COOLDOWN = {"THREAD_COOLDOWN_MS": "1", "TRANSIENT_COOLDOWN_MS": "1"}


def two_models(level: str, **b) -> dict:
    return {"a": {"protection": level, "models": [{"model_id": "one", **SMART}, {"model_id": "two", **SMART}]}, "b": b}


def one_model(level: str) -> dict:
    return {"a": {"protection": level, "models": [{"model_id": "one", **SMART}]}}


async def ask(gateway, fake, session: str, model: str = "auto-smart") -> list[str]:
    """The models that a conversation's next request calls."""
    before = len(fake.requests)
    assert (await gateway.chat(session, model=model)).status == 200
    return [f"{request.platform}/{request.json['model']}" for request in fake.requests[before:]]


async def converse(gateway, fake, session: str) -> list[str]:
    """The models that a session's second request calls: with it, it is a conversation (SPEC 7.10)."""
    await ask(gateway, fake, session)
    return await ask(gateway, fake, session)


async def active(gateway) -> list[tuple[str, str]]:
    return [(entry["platform"], entry["model_id"]) for entry in (await gateway.protection())["active"]]


# --- Thread cooldown (SPEC 7.5) -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "second"), [("provider-ban", B), ("model-skip", A2), ("off", A1)])
@both_ways
async def test_two_conversations_share_only_what_the_level_lets_them(start_gateway, fake, level, second, streaming):
    gateway = await start_gateway(two_models(level))
    for _ in range(2):
        await gateway.ask("first", streaming=streaming, model="auto-smart")

    assert await ask(gateway, fake, "second") == [second]

    assert await ask(gateway, fake, "first") == [A1]
    assert await ask(gateway, fake, "second") == [second]


@pytest.mark.parametrize("level", ["provider-ban", "model-skip"])
@both_ways
async def test_one_shot_prompts_do_not_push_each_other_down_the_list(start_gateway, fake, level, streaming):
    gateway = await start_gateway(two_models(level))
    held = await hold(gateway, fake, streaming=streaming, session="one-shot", earlier=0)

    assert [await ask(gateway, fake, f"prompt {n}") for n in range(4)] == [[A1]] * 4

    await held.done()
    assert await ask(gateway, fake, "another") == [A1]


@pytest.mark.parametrize("level", ["provider-ban", "model-skip", "off"])
async def test_with_one_model_only_every_conversation_is_served_by_it(start_gateway, fake, level):
    gateway = await start_gateway(one_model(level))

    assert [await ask(gateway, fake, session) for session in ("first", "second", "third", "first")] == [[A1]] * 4


async def test_three_conversations_spread_over_three_models_and_a_fourth_finds_one_too(start_gateway, fake):
    gateway = await start_gateway(two_models("model-skip"))

    used = [await converse(gateway, fake, session) for session in ("first", "second", "third", "fourth")]

    assert used[:3] == [[A1], [A2], [B]]
    assert used[3] in ([A1], [A2], [B])


@pytest.mark.parametrize("level", ["provider-ban", "model-skip"])
@pytest.mark.parametrize("standing", ["failed", "cooling", "out of capacity", "without a key"])
async def test_what_others_use_is_taken_when_nothing_else_is_left(start_gateway, fake, level, standing):
    rest = {"model": {"rpd": 1}} if standing == "out of capacity" else {}
    platforms = one_model(level) | {"b": rest}
    gateway = await start_gateway(platforms, {"TRANSIENT_COOLDOWN_MS": "60000"})
    if standing == "out of capacity":
        await gateway.chat(model="b-model")
    elif standing == "without a key":
        fake.script("b", error(401))
        await gateway.chat(model="b-model")
    elif standing == "cooling":
        fake.script("b", error(503))
        await gateway.chat(model="b-model")
    else:
        fake.script("b", error(404))
    await converse(gateway, fake, "first")

    assert await ask(gateway, fake, "second") == ([B, A1] if standing == "failed" else [A1])


@pytest.mark.parametrize("level", ["provider-ban", "model-skip"])
async def test_a_conversations_own_model_is_not_held_back_when_others_had_to_use_it(start_gateway, fake, level):
    gateway = await start_gateway(one_model(level) | {"b": {}})
    fake.script("b", error(404), answer("fine"))
    await converse(gateway, fake, "first")
    assert await ask(gateway, fake, "second") == [B, A1]

    for session in ("first", "second", "first", "second"):
        assert await ask(gateway, fake, session) == [A1]


@pytest.mark.parametrize("level", ["provider-ban", "model-skip"])
async def test_others_come_back_when_it_has_not_been_used_for_a_while(start_gateway, fake, level):
    gateway = await start_gateway(two_models(level), {"THREAD_COOLDOWN_MS": "60"})
    await converse(gateway, fake, "first")

    async with asyncio.timeout(3):
        for n in range(1_000):
            if await ask(gateway, fake, f"number {n}") == [A1]:
                return
    raise AssertionError("nobody came back")


@pytest.mark.parametrize("model", ["auto-priority", "a/one"])
async def test_requests_without_a_session_neither_hold_back_nor_are_held_back(start_gateway, fake, model):
    gateway = await start_gateway(two_models("provider-ban"))
    assert await ask(gateway, fake, "nobody", model=model) == [A1]
    assert await ask(gateway, fake, "first") == [A1]

    assert await ask(gateway, fake, "nobody", model=model) == [A1]


# --- The guard over running requests (SPEC 7.6) -------------------------------------------------------------------


@dataclass
class Held:
    """A conversation's request that is running, in the middle of its answer."""

    task: asyncio.Task
    finish: asyncio.Event

    async def done(self):
        self.finish.set()
        return await self.task


async def hold(
    gateway, fake, *, streaming: bool = True, model: str = "auto-smart", session: str = "held", earlier: int = 1
) -> Held:
    """A request of a session that has had some `earlier`."""
    for _ in range(earlier):
        await gateway.ask(session, streaming=streaming, model=model)
    finish, n = asyncio.Event(), len(fake.requests)
    steps = sse(ROLE, HALF, Wait(finish), chunk("wer", finish="stop")) if streaming else completion("whole")
    held = steps if streaming else raw(Wait(finish), *steps.steps)
    fake.script("a", held, answer("fine"))
    task = asyncio.create_task(gateway.ask(session, streaming=streaming, model=model))
    await fake.arrived(n + 1)
    return Held(task, finish)


@both_ways
async def test_a_platform_that_serves_a_conversation_is_left_alone_by_all_others(start_gateway, fake, streaming):
    gateway = await start_gateway(two_models("provider-ban"), NO_THREAD_COOLDOWN)
    held = await hold(gateway, fake, streaming=streaming)
    assert await active(gateway) == [("a", "one")]

    for model in ("auto-smart", "auto-fast", "auto-balanced", "auto-priority"):
        assert await ask(gateway, fake, "another", model=model) == [B]
    assert await ask(gateway, fake, "by name", model="a/one") == [A1]

    assert (await held.done()).status == 200
    assert await active(gateway) == []
    assert await ask(gateway, fake, "another", model="auto-priority") == [A1]


async def test_a_conversation_is_not_held_back_by_itself(start_gateway, fake):
    gateway = await start_gateway(two_models("provider-ban"), NO_THREAD_COOLDOWN)
    held = await hold(gateway, fake)

    assert await ask(gateway, fake, "held") == [A1]

    await held.done()
    assert await active(gateway) == []


@pytest.mark.parametrize("level", ["model-skip", "off"])
async def test_other_levels_serve_many_at_a_time(start_gateway, fake, level):
    gateway = await start_gateway(two_models(level), NO_THREAD_COOLDOWN)
    held = await hold(gateway, fake)

    assert await ask(gateway, fake, "another", model="auto-priority") == [A1]
    if level == "off":  # with model-skip the thread cooldown of 7.5 applies
        assert await ask(gateway, fake, "another") == [A1]

    await held.done()


@pytest.mark.parametrize("model", ["auto-priority", "a/one"])
async def test_a_request_without_a_session_guards_nothing(start_gateway, fake, model):
    gateway = await start_gateway(two_models("provider-ban"), NO_THREAD_COOLDOWN)
    held = await hold(gateway, fake, model=model)

    assert await ask(gateway, fake, "another") == [A1]

    await held.done()


async def test_a_busy_platform_serves_others_when_there_is_no_other(start_gateway, fake):
    gateway = await start_gateway(one_model("provider-ban") | {"b": {}}, NO_THREAD_COOLDOWN)
    fake.script("b", error(404))
    held = await hold(gateway, fake)

    assert await ask(gateway, fake, "another") == [B, A1]
    assert await ask(gateway, fake, "another", model="auto-priority") == [B, A1]

    await held.done()


LOST = {"error": {"message": "gone", "code": 503}}
# How the held request ends: its reply, and whether its client leaves.
WAYS_OUT: dict[str, tuple[bool, Reply, bool]] = {
    "success": (False, completion("whole"), False),
    "success of a stream": (True, sse(ROLE, HALF, chunk("wer", finish="stop")), False),
    "error": (False, error(404), False),
    "no answer": (False, raw(CUT), False),
    "timeout": (False, raw(PAUSE), False),
    "an error in mid-stream": (True, sse(ROLE, HALF, LOST), False),
    "a reset in mid-stream": (True, sse(ROLE, HALF, RESET), False),
    "an end in mid-stream": (True, sse(ROLE, HALF, done=False), False),
    "stall before the first token": (True, sse(ROLE, PAUSE), False),
    "stall in mid-stream": (True, sse(ROLE, HALF, PAUSE), False),
    "disconnect": (False, raw(PAUSE), True),
    "disconnect before the first token": (True, sse(ROLE, PAUSE), True),
    "disconnect in mid-stream": (True, sse(ROLE, HALF, PAUSE), True),
}


@pytest.mark.parametrize(("streaming", "reply", "leaves"), WAYS_OUT.values(), ids=WAYS_OUT)
async def test_the_guard_ends_on_every_way_out(start_gateway, fake, streaming, reply, leaves):
    times_out = PAUSE in reply.steps and not leaves
    short = {"REQUEST_TIMEOUT_MS": "300", "MAX_STREAM_STALL_MS": "300"} if times_out else {}
    gateway = await start_gateway(one_model("provider-ban"), {**NO_THREAD_COOLDOWN, **short})
    begin, first = asyncio.Event(), len(fake.requests)
    fake.script("a", raw(Wait(begin), *reply.steps), answer("fine"))
    task = asyncio.create_task(gateway.ask("held", streaming=streaming, model="auto-smart"))
    await fake.arrived(first + 1)
    assert await active(gateway) == [("a", "one")]

    begin.set()
    if leaves:
        await until(lambda: fake.requests[first].paused)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await fake.closed(first)
        await gateway.row()  # it is written when the attempt's books are closed
    else:
        await task

    assert await active(gateway) == []
    await gateway.uncooled()
    assert await ask(gateway, fake, "another") == [A1]
