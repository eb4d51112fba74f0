"""SPEC 7.1 to 7.4 end to end: what a conversation keeps, what a failure costs it, and what a failure costs everybody.

In smart mode what the catalogue prefers comes first, so these tests know where a new conversation begins: at the first
model of the platform `a`. Its second model and the platform `b` stand behind it.
"""

import asyncio
import time
from dataclasses import dataclass

import pytest
from conftest import both_ways
from fake_provider import (
    CUT,
    PAUSE,
    RESET,
    ROLE,
    Reply,
    answer,
    assert_in_time,
    chunk,
    completion,
    error,
    sse,
    usage_chunk,
)

from config.settings import BUILT_IN_CATALOG

A1, A2, B = "a/one", "a/two", "b/b-model"
SMART = {"prefer_in": ["smart"]}
# Guards between sessions are not at stake here: they and all cooldowns end before the next request (see `ask`).
AT_ONCE = {"THREAD_COOLDOWN_MS": "1", "TRANSIENT_COOLDOWN_MS": "1", "RATE_LIMIT_COOLDOWN_MS": "1"}


def two_models(level: str) -> dict:
    return {"a": {"protection": level, "models": [{"model_id": "one", **SMART}, {"model_id": "two", **SMART}]}, "b": {}}


def served(fake) -> list[str]:
    """Which models were called since the last look."""
    called = [f"{request.platform}/{request.json['model']}" for request in fake.requests]
    fake.clear()
    return called


def failing_once(model: str, reply: Reply):
    """A platform whose model fails its first request, and is well before and after."""
    left = [reply]

    def reply_to(request):
        return left.pop() if left and request.json["model"] == model else answer("fine")(request)

    return reply_to


def settings_for(reply: Reply) -> dict[str, str]:
    return AT_ONCE | ({"MAX_STREAM_STALL_MS": "200"} if PAUSE in reply.steps else {})


async def rested(gateway) -> None:
    """Wait until nothing but sessions remembers what has happened."""
    await gateway.uncooled()
    async with asyncio.timeout(3):
        while await gateway.cooled_keys():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def bans(gateway) -> list[list[str]]:
    """The platforms that each session avoids."""
    shown = (await gateway.protection())["bans"]
    return [[ban["platform"] for ban in entry["platforms"]] for entry in shown]


async def pinned(gateway) -> list[str]:
    """The models that sessions prefer."""
    by_model = (await gateway.protection())["sessions"]["by_model"]
    return [f"{entry['platform']}/{entry['model_id']}" for entry in by_model]


async def session_count(gateway) -> int:
    return (await gateway.protection())["sessions"]["count"]


# --- What a failure costs the session (SPEC 7.2, 7.3) -------------------------------------------------------------


@dataclass(frozen=True)
class Failing:
    """A failure: the reply, whether its client wanted a stream, and whether that client got part of an answer."""

    reply: Reply
    streaming: bool
    mid: bool = False


HALF = chunk("half an ans")
NOTHING = completion("")  # retryable, and nothing rests for it
TEXT = "the output was truncated"
FAILINGS = {
    "5xx": Failing(error(503), False),
    "5xx, stream": Failing(error(500), True),
    "5xx after a role": Failing(sse(ROLE, {"error": {"message": "overloaded", "code": 502}}), True),
    "5xx in mid-stream": Failing(sse(ROLE, HALF, {"error": {"message": "overloaded", "code": 503}}), True, mid=True),
    "stall in mid-stream": Failing(sse(ROLE, HALF, PAUSE), True, mid=True),
    "truncation": Failing(error(400, TEXT), False),
    "truncation, stream": Failing(error(400, TEXT), True),
    "truncation after a role": Failing(sse(ROLE, done=False), True),
    "truncation in mid-stream": Failing(sse(ROLE, HALF, done=False), True, mid=True),
    "retryable": Failing(NOTHING, False),
    "retryable, stream": Failing(NOTHING, True),
    "retryable: cut after a role": Failing(sse(ROLE, RESET), True),
    "retryable: no key left": Failing(error(429, headers={"retry-after": "0.01"}), False),
    "retryable in mid-stream": Failing(sse(ROLE, HALF, RESET), True, mid=True),
    "retryable in mid-stream: an error without a code": Failing(sse(ROLE, HALF, {"error": "odd"}), True, mid=True),
}
failings = pytest.mark.parametrize("failing", FAILINGS.values(), ids=FAILINGS)


async def meet(gateway, fake, failing: Failing, session: str = "first") -> None:
    """The session has an answer of a/one, and then meets a failure of it; afterwards everything is well."""
    assert (await gateway.ask(session, streaming=failing.streaming, model="auto-smart")).status == 200
    assert served(fake) == [A1]
    fake.script("a", failing_once("one", failing.reply))
    got = await gateway.ask(session, streaming=failing.streaming, model="auto-smart")
    assert got.status == 200
    if failing.mid:
        assert got.error
        assert served(fake) == [A1]
    await rested(gateway)


async def ask(gateway, fake, session: str, model: str = "auto-smart", **fields) -> list[str]:
    """The models that a conversation's next request calls."""
    await asyncio.sleep(0.002)  # the thread cooldown of 1 ms is over
    fake.clear()
    assert (await gateway.chat(session, model=model, **fields)).status == 200
    return served(fake)


@failings
async def test_a_provider_ban_keeps_the_session_away_and_nobody_else(start_gateway, fake, failing):
    gateway = await start_gateway(two_models("provider-ban"), settings_for(failing.reply))
    await meet(gateway, fake, failing)
    if failing.mid:
        assert await pinned(gateway) == []
    else:
        assert served(fake) == [A1, B]
        assert await pinned(gateway) == [B]

    for _ in range(3):
        assert await ask(gateway, fake, "first") == [B]

    assert await bans(gateway) == [["a"]]
    assert await ask(gateway, fake, "second") == [A1]
    assert await ask(gateway, fake, "first") == [B]


@failings
async def test_model_skip_skips_the_model_and_bans_nothing(start_gateway, fake, failing):
    gateway = await start_gateway(two_models("model-skip"), settings_for(failing.reply))
    await meet(gateway, fake, failing)
    if not failing.mid:
        assert served(fake) == [A1, A2]

    assert await ask(gateway, fake, "first") == [A2]

    assert await bans(gateway) == []
    assert await ask(gateway, fake, "second") == [A1]


@failings
async def test_off_retries_nothing_in_the_request_and_costs_the_session_nothing(start_gateway, fake, failing):
    gateway = await start_gateway(two_models("off"), settings_for(failing.reply))
    await meet(gateway, fake, failing)
    if not failing.mid:
        assert served(fake) == [A1, A2]

    # What answered last is the session's model; after a broken stream that is still the one before.
    assert await ask(gateway, fake, "first") == [A1 if failing.mid else A2]

    assert await bans(gateway) == []
    assert await ask(gateway, fake, "second") == [A1]


def short(request) -> Reply:
    """An answer that ended for length after 3 tokens."""
    if not request.streaming:
        return completion("too short", finish="length", usage=(11, 3))
    return sse(ROLE, chunk("too short"), chunk(finish="length"), usage_chunk(11, 3))


@both_ways
@pytest.mark.parametrize(("level", "then"), [("provider-ban", B), ("model-skip", A2), ("off", A1)])
async def test_an_answer_cut_short_stands_and_acts_on_the_next_request(start_gateway, fake, level, then, streaming):
    gateway = await start_gateway(two_models(level), AT_ONCE)
    fake.script("a", short, answer("fine"))

    got = await gateway.ask("first", streaming=streaming, model="auto-smart", max_tokens=100)

    assert got.text == "too short"
    assert served(fake) == [A1]
    assert await ask(gateway, fake, "first") == [then]
    assert await ask(gateway, fake, "second") == [A1]
    assert await bans(gateway) == ([["a"]] if level == "provider-ban" else [])


# What the client and the model allow, what was used, and whether that is less than half of both (SPEC 7.8).
LENGTHS = [
    (100, None, 49, True), (100, None, 50, False), (None, 100, 49, True), (None, 100, 50, False),
    (None, None, 1, False), (100, 1000, 60, False), (1000, 100, 60, False), (1000, 100, 40, True),
]  # fmt: skip


@pytest.mark.parametrize(("max_tokens", "max_output", "used", "cut"), LENGTHS)
async def test_an_answer_is_cut_short_below_half_of_every_known_limit(
    start_gateway, fake, max_tokens, max_output, used, cut
):
    platforms = {"a": {"protection": "provider-ban", "model": {**SMART, "max_output": max_output}}, "b": {}}
    gateway = await start_gateway(platforms, AT_ONCE)
    fake.script("a", completion("short", finish="length", usage=(11, used)))

    await gateway.chat("first", model="auto-smart", **({"max_tokens": max_tokens} if max_tokens else {}))

    assert await bans(gateway) == ([["a"]] if cut else [])


@both_ways
async def test_an_answer_that_talks_of_truncation_is_none(start_gateway, fake, streaming):
    gateway = await start_gateway(two_models("provider-ban"), AT_ONCE)
    fake.script("a", answer("The file was truncated: cut off at the maximum length, context_length_exceeded."))

    assert (await gateway.ask("first", streaming=streaming, model="auto-smart")).status == 200

    assert await bans(gateway) == []
    assert await ask(gateway, fake, "first") == [A1]


async def test_a_ban_ends_after_its_time_however_much_the_session_is_used(start_gateway, fake):
    gateway = await start_gateway(two_models("provider-ban"), {**AT_ONCE, "STICKY_TTL_MS": "300"})
    fake.script("a", failing_once("one", NOTHING))
    banned_at = time.monotonic()
    assert await ask(gateway, fake, "first") == [A1, B]

    async with asyncio.timeout(3):
        while await bans(gateway):
            await ask(gateway, fake, "first")

    banned_s = time.monotonic() - banned_at
    assert banned_s >= 0.3
    assert_in_time(banned_s, 1)
    fake.script("b", error(404))
    assert await ask(gateway, fake, "first") == [B, A1]


async def test_a_ban_is_shown_with_its_reason_and_what_is_left_of_it_and_can_be_lifted(start_gateway, fake):
    gateway = await start_gateway(two_models("provider-ban"), AT_ONCE)
    for session in ("first", "second"):
        fake.script("a", failing_once("one", error(503)))
        assert await ask(gateway, fake, session) == [A1, B]
        await rested(gateway)
    shown = (await gateway.protection())["bans"]
    assert len({entry["session"] for entry in shown}) == 2
    for entry in shown:
        (ban,) = entry["platforms"]
        assert 1_790_000 < ban.pop("ms_left") <= 1_800_000
        assert ban == {"platform": "a", "reason": "provider-ban:5xx:before-stream"}

    headers = {"authorization": f"Bearer {gateway.api_key}"}
    async with gateway.http.delete(f"{gateway.base_url}/api/protection/bans", headers=headers) as response:
        assert (response.status, await response.json()) == (200, {"lifted": 2})

    assert await bans(gateway) == []
    fake.script("b", error(404))
    assert await ask(gateway, fake, "first") == [B, A1]  # the session has moved to b, and a is free again


@both_ways
async def test_a_banned_platform_comes_last_and_not_never(start_gateway, fake, streaming):
    gateway = await start_gateway(two_models("provider-ban"), AT_ONCE)
    fake.script("a", failing_once("one", NOTHING))
    fake.script("b", error(404))

    got = await gateway.ask("first", streaming=streaming, model="auto-smart")

    assert got.text == "fine"
    assert served(fake) == [A1, B, A2]
    assert await bans(gateway) == [["a"]]
    assert await ask(gateway, fake, "first") == [B, A2]


async def test_the_setting_decides_and_not_only_the_catalogue(start_gateway, fake):
    settings = {**AT_ONCE, "THREAD_PROTECTION_PLATFORMS": " A : Provider-Ban ,b:off,nonsense"}
    gateway = await start_gateway(two_models("off"), settings, built_in_catalog=BUILT_IN_CATALOG)
    fake.script("a", failing_once("one", NOTHING))

    assert await ask(gateway, fake, "first") == [A1, B]

    levels = (await gateway.protection())["levels"]
    assert (levels["a"], levels["b"], levels["longcat"]) == ("provider-ban", "off", "provider-ban")


@both_ways
@pytest.mark.parametrize("status", [400, 404, 405, 409, 413, 422, 301])
async def test_a_request_that_is_refused_bans_nobody_and_costs_the_model_nothing(
    start_gateway, fake, status, streaming
):
    gateway = await start_gateway(two_models("provider-ban"), AT_ONCE)
    fake.script("a", failing_once("one", error(status)))

    assert (await gateway.ask("first", streaming=streaming, model="auto-smart")).status == 200
    assert served(fake) == [A1, A2]

    assert await bans(gateway) == []
    assert await gateway.cooled_models() == {}


@both_ways
@pytest.mark.parametrize("status", [408, 425, 498, 499])
async def test_a_status_that_says_not_now_rests_the_model_and_counts_as_retryable(
    start_gateway, fake, status, streaming
):
    gateway = await start_gateway(two_models("provider-ban"), {"THREAD_COOLDOWN_MS": "1"})
    fake.script("a", failing_once("one", error(status)))

    assert (await gateway.ask("first", streaming=streaming, model="auto-smart")).status == 200
    assert served(fake) == [A1, B]

    assert await bans(gateway) == [["a"]]
    assert set(await gateway.cooled_models()) == {"one"}


async def test_an_unauthorized_key_bans_nothing(start_gateway, fake):
    platforms = two_models("provider-ban")
    platforms["a"]["keys"] = ["sk-a-secret-0001", "sk-a-secret-0002"]
    gateway = await start_gateway(platforms, AT_ONCE)
    fake.script("a", error(401), answer("fine"))

    assert await ask(gateway, fake, "first") == [A1, A1]

    assert await bans(gateway) == []


async def test_a_rate_limit_bans_only_once_no_key_is_left(start_gateway, fake):
    platforms = two_models("provider-ban")
    platforms["a"]["keys"] = ["sk-a-secret-0001", "sk-a-secret-0002"]
    gateway = await start_gateway(platforms, {**AT_ONCE, "RATE_LIMIT_COOLDOWN_MS": "60000"})
    fake.script("a", error(429), answer("fine"))
    assert await ask(gateway, fake, "first") == [A1, A1]
    assert await bans(gateway) == []

    fake.script("a", error(429))

    assert await ask(gateway, fake, "first") == [A1, B]
    assert await bans(gateway) == [["a"]]


# --- What a session keeps (SPEC 7.1) ------------------------------------------------------------------------------

MANY = {name: {"keys": [f"sk-{name}-secret-{n:04}" for n in range(3)]} for name in "abcdefgh"}
PARTS = [{"type": "text", "text": "What is"}, {"type": "text", "text": "a monad?"}]
CONTENTS = {"text": "What is a monad?", "parts": PARTS}


def turns(content: object, count: int) -> list[list[dict]]:
    """The messages of a conversation's turns, each with the history before it."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
    conversation = []
    for n in range(count):
        conversation.append(list(messages))
        messages.append({"role": "assistant", "content": f"Answer {n}."})
        messages.append({"role": "user", "content": f"And then, {n}?"})
    return conversation


def routes(fake) -> set[tuple[str, str]]:
    return {(request.platform, request.key) for request in fake.requests}


@both_ways
@pytest.mark.parametrize("mode", ["smart", "fast"])
@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS)
async def test_a_conversation_stays_with_its_model_and_key(start_gateway, fake, mode, content, streaming):
    gateway = await start_gateway(MANY)

    for messages in turns(content, 8):
        assert (await gateway.ask(streaming=streaming, model=f"auto-{mode}", messages=messages)).status == 200

    assert len(fake.requests) == 8
    assert len(routes(fake)) == 1
    assert await session_count(gateway) == 1


@pytest.mark.parametrize("mode", ["smart", "fast"])
async def test_a_session_id_makes_one_conversation_of_different_messages(start_gateway, fake, mode):
    gateway = await start_gateway(MANY)

    for n in range(8):
        await gateway.chat(f"question {n}", model=f"auto-{mode}", headers={"X-Session-Id": "mine"})

    assert len(routes(fake)) == 1
    assert await session_count(gateway) == 1


async def test_different_session_ids_are_different_conversations(start_gateway, fake):
    gateway = await start_gateway(MANY)
    for id in ("mine", "yours", "What is a monad?"):
        await gateway.chat("What is a monad?", model="auto-smart", headers={"X-Session-Id": id})
    await gateway.chat("What is a monad?", model="auto-smart")

    assert await session_count(gateway) == 4


async def test_each_mode_has_its_own_conversation(start_gateway, fake):
    gateway = await start_gateway(MANY)
    for mode in ("smart", "fast"):
        await gateway.chat("What is a monad?", model=f"auto-{mode}", headers={"X-Session-Id": "mine"})

    assert await session_count(gateway) == 2


@pytest.mark.parametrize("as_parts", [False, True])
async def test_conversations_that_begin_alike_but_differ_later_are_two(start_gateway, fake, as_parts):
    gateway = await start_gateway(MANY)
    for end in ("one", "two"):
        text = "x" * 5_000 + end
        content = [{"type": "text", "text": text}] if as_parts else text
        await gateway.chat(model="auto-smart", messages=[{"role": "user", "content": content}])

    assert await session_count(gateway) == 2


@both_ways
@pytest.mark.parametrize("mode", ["balanced", "priority"])
@pytest.mark.parametrize("headers", [None, {"X-Session-Id": "mine"}], ids=["by text", "by id"])
async def test_balanced_and_priority_know_no_sessions(start_gateway, fake, mode, headers, streaming):
    keys = ["sk-a-secret-0001", "sk-a-secret-0002"]
    gateway = await start_gateway({"a": {"protection": "provider-ban", "keys": keys}}, AT_ONCE)
    await gateway.ask("hi", streaming=streaming, model="auto-smart", headers=headers)
    fake.clear()

    for _ in range(4):
        await gateway.ask("hi", streaming=streaming, model=f"auto-{mode}", headers=headers)

    assert sorted(request.key for request in fake.requests) == sorted(keys * 2)  # its turn, not the session's key

    fake.script("a", error(404), answer("fine"))
    assert (await gateway.ask("hi", streaming=streaming, model=f"auto-{mode}", headers=headers)).status == 502
    assert await bans(gateway) == []
    assert await session_count(gateway) == 1
    assert (await gateway.ask("hi", streaming=streaming, model=f"auto-{mode}", headers=headers)).status == 200


async def test_a_request_for_a_model_by_name_has_no_session(start_gateway, fake):
    gateway = await start_gateway(two_models("provider-ban"), AT_ONCE)
    fake.script("a", failing_once("one", NOTHING))

    assert await ask(gateway, fake, "first", model="a/one") == [A1, B]
    assert await session_count(gateway) == 0
    assert await bans(gateway) == []


async def test_an_unauthorized_key_leaves_the_session_its_model(start_gateway, fake):
    keys = ["sk-a-secret-0001", "sk-a-secret-0002"]
    gateway = await start_gateway({"a": {"keys": keys, "model": SMART}, "b": {"model": SMART}}, AT_ONCE)
    await gateway.chat("first", model="auto-smart")
    first_key = fake.requests[0].key
    (other_key,) = set(keys) - {first_key}
    fake.script("a", lambda request: error(401 if request.key == first_key else 404))
    fake.script("b", error(404))
    assert (await gateway.chat("first", model="auto-smart")).status == 502

    assert await pinned(gateway) == ["a/a-model"]

    fake.script("a", answer("fine"))
    fake.clear()
    assert (await gateway.chat("first", model="auto-smart")).text == "fine"
    assert [(request.platform, request.key) for request in fake.requests] == [("a", other_key)]


async def test_a_session_moves_to_the_model_that_answered_last(start_gateway, fake):
    gateway = await start_gateway(two_models("model-skip"), AT_ONCE)
    await ask(gateway, fake, "first")
    fake.script("a", failing_once("one", error(503)))
    assert await ask(gateway, fake, "first") == [A1, A2]
    await gateway.uncooled()

    assert [await ask(gateway, fake, "first") for _ in range(3)] == [[A2]] * 3


async def test_a_session_ends_when_it_has_not_been_used_for_its_time(start_gateway, fake):
    gateway = await start_gateway(two_models("model-skip"), {**AT_ONCE, "STICKY_TTL_MS": "120"})
    fake.script("a", failing_once("one", error(404)))
    assert await ask(gateway, fake, "first") == [A1, A2]

    async with asyncio.timeout(3):
        while await session_count(gateway):  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    assert await ask(gateway, fake, "first") == [A1]


# --- What a failure costs everybody (SPEC 7.4) --------------------------------------------------------------------

TRANSIENT = {
    "503": (error(503), False),
    "503, stream": (error(503), True),
    "cut": (sse(ROLE, CUT), True),
    "503 in mid-stream": (sse(ROLE, HALF, {"error": {"message": "overloaded", "code": 503}}), True),
    "reset in mid-stream": (sse(ROLE, HALF, RESET), True),
    "stall in mid-stream": (sse(ROLE, HALF, PAUSE), True),
}


@pytest.mark.parametrize(("reply", "streaming"), TRANSIENT.values(), ids=TRANSIENT)
async def test_after_a_transient_failure_everybody_is_sent_elsewhere_for_a_while(start_gateway, fake, reply, streaming):
    settings = {**settings_for(reply), "TRANSIENT_COOLDOWN_MS": "60000"}
    gateway = await start_gateway({"a": {"model": SMART}, "b": {}}, settings)
    fake.script("a", reply)
    await gateway.ask("first", streaming=streaming, model="auto-smart")
    assert list(await gateway.cooled_models()) == ["a-model"]
    fake.clear()

    by_name = await gateway.chat("second", model="a-model")
    in_session = await gateway.chat("third", model="auto-smart")

    assert by_name.headers["X-Routed-Via"] == in_session.headers["X-Routed-Via"] == B
    assert fake.called == ["b", "b"]
    rows = [await gateway.row(request_id=got.headers["X-Request-Id"]) for got in (by_name, in_session)]
    assert all("a/a-model" in row["skipped_models"] for row in rows)


async def test_a_model_is_used_again_when_its_cooldown_is_over_and_not_before(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], {**AT_ONCE, "TRANSIENT_COOLDOWN_MS": "300"})
    fake.script("a", error(503), answer("well again"))
    await gateway.chat(model="a-model")
    cooling_until = fake.requests[0].arrived_at + 0.3  # at the earliest

    async with asyncio.timeout(3):
        while True:
            began = time.monotonic()
            if (await gateway.chat(model="a-model")).text == "well again":
                break
            await asyncio.sleep(0.01)

    assert time.monotonic() >= cooling_until
    assert fake.called[:2] == ["a", "b"] or began >= cooling_until


@pytest.mark.parametrize(
    ("model", "streaming"), [("auto-smart", False), ("auto-fast", True), ("auto-priority", True), ("a-model", False)]
)
async def test_none_of_fifty_requests_that_start_after_the_failure_reaches_the_model(
    start_gateway, fake, model, streaming
):
    gateway = await start_gateway({"a": {"model": SMART}, "b": {}, "c": {}})
    fake.script("a", error(503))
    await gateway.chat("first", model="a-model")
    fake.clear()

    got = await asyncio.gather(*[gateway.ask(f"number {n}", streaming=streaming, model=model) for n in range(50)])

    assert [answer.status for answer in got] == [200] * 50
    assert len(fake.requests) == 50
    assert "a" not in fake.called


async def test_a_cooldown_overrides_what_the_session_prefers(start_gateway, fake):
    gateway = await start_gateway(two_models("model-skip"), {**AT_ONCE, "TRANSIENT_COOLDOWN_MS": "60000"})
    await ask(gateway, fake, "first")
    fake.script("a", failing_once("one", error(503)))
    assert await ask(gateway, fake, "second", model="auto-priority") == [A1, A2]

    assert await ask(gateway, fake, "first") == [A2]


@both_ways
@pytest.mark.parametrize("level", ["provider-ban", "model-skip", "off"])
async def test_a_failure_without_a_session_acts_on_this_request_only(start_gateway, fake, level, streaming):
    gateway = await start_gateway(two_models(level), AT_ONCE)
    fake.script("a", failing_once("one", NOTHING))

    got = await gateway.ask(streaming=streaming, model="auto-priority")

    assert got.status == 200
    assert served(fake) == ([A1, B] if level == "provider-ban" else [A1, A2])
    assert await ask(gateway, fake, "again", model="auto-priority") == [A1]
