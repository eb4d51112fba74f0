"""SPEC 18: equal requests get the answer that is kept, and those that run at the same time share one call."""

import asyncio
import contextlib
import json
import tracemalloc

import pytest
from conftest import Answer, Stream, both_ways, case
from fake_provider import (
    CUT,
    PAUSE,
    RESET,
    STOP,
    Wait,
    answer,
    chunk,
    completion,
    error,
    event,
    sse,
    until,
    usage_chunk,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st

from dialects.chat import ChatDialect
from dialects.responses import ResponsesDialect
from engine.cache import ENTRY_BYTES, Cache, key_of, repeatable
from engine.cache import Answer as Kept

ON = {"CACHE_MB": "1"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def kept(size: int) -> Kept:
    return Kept(b"x" * (size - ENTRY_BYTES), "p", "m")


# --- The cache by itself ----------------------------------------------------------------------------------------------


def test_an_answer_is_kept_for_its_time():
    cache = Cache(10_000, ttl_s=60.0)
    cache.put(b"k", kept(1000), now=0.0)

    assert cache.get(b"k", 59.9) == kept(1000)
    assert cache.get(b"other", 0.0) is None
    assert cache.get(b"k", 60.0) is None
    assert (len(cache), cache.size) == (0, 0)


def test_the_least_recently_used_goes_first():
    cache = Cache(3000, ttl_s=60.0)
    for name in (b"a", b"b", b"c"):
        cache.put(name, kept(1000), now=0.0)
    cache.get(b"a", 1.0)
    cache.put(b"d", kept(1000), now=1.0)

    assert [cache.get(name, 1.0) is not None for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]


def test_an_answer_larger_than_the_cache_pushes_nothing_out():
    cache = Cache(3000, ttl_s=60.0)
    cache.put(b"a", kept(1000), now=0.0)

    assert not cache.put(b"b", kept(3001), now=0.0)
    assert cache.get(b"a", 0.0) is not None


def test_a_new_answer_takes_the_place_of_the_old_one():
    cache = Cache(3000, ttl_s=60.0)
    cache.put(b"a", kept(1000), now=0.0)
    cache.put(b"a", kept(2000), now=50.0)

    assert cache.get(b"a", 100.0) == kept(2000)
    assert (len(cache), cache.size) == (1, 2000)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(ENTRY_BYTES, 2000), st.integers(0, 30), st.booleans())))
def test_it_never_holds_more_than_its_bytes(steps):
    cache, now = Cache(5000, ttl_s=60.0), 0.0
    for name, size, pause, put in steps:
        now += pause
        key = bytes([name])
        if put:
            cache.put(key, kept(size), now)
        else:
            cache.get(key, now)
        assert cache.size <= 5000
        assert cache.size == sum(entry.answer.size for entry in cache._entries.values())


@pytest.mark.parametrize("answer_bytes", [1, 300, 20_000])
def test_what_it_takes_of_memory_is_what_it_counts(answer_bytes):
    cache = Cache(400_000, ttl_s=60.0)
    tracemalloc.start()
    try:
        for n in range(2 * 400_000 // (ENTRY_BYTES + answer_bytes)):
            name = str(n)  # names are read from each request anew
            cache.put(
                b"%024d" % n, Kept(b"x" * answer_bytes, f"platform {name}", f"vendor/a-model-{name}"), now=float(n)
            )
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert 0.5 * 400_000 < taken <= 400_000


def chat_of(dialect=None, **fields):
    body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], **fields}
    return (dialect or ChatDialect()).parse(json.dumps(body).encode(), 0.0)


def test_equal_requests_have_one_key_however_they_are_written():
    key = key_of(chat_of(), None)

    assert key_of(chat_of(stream=True, stream_options={"include_usage": True}), None) == key
    assert key_of(chat_of(model="auto-balanced"), None) == key
    assert key_of(chat_of(metadata=None), None) == key
    assert key_of(chat_of(top_p=1, seed=2), None) == key_of(chat_of(seed=2, top_p=1), None)
    asked = ResponsesDialect(lambda: "token" * 10).parse(b'{"model": "auto", "input": "hi"}', 0.0)
    assert key_of(asked, None) == key
    for other in ({"model": "auto-smart"}, {"model": "m"}, {"max_tokens": 5}, {"tools": [TOOL]}, {"seed": 1}):
        assert key_of(chat_of(**other), None) != key
    assert key_of(chat_of(), 1) != key_of(chat_of(), 2) != key


def test_what_is_left_to_chance_is_not_repeated():
    assert repeatable(chat_of())
    assert repeatable(chat_of(temperature=0))
    for fields in ({"temperature": 0.7}, {"temperature": 1}, {"logprobs": True}):
        assert not repeatable(chat_of(**fields))


# --- Over HTTP --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [False, True], ids=["whole first", "stream first"])
@pytest.mark.parametrize("then", [False, True], ids=["whole then", "stream then"])
async def test_an_equal_request_gets_the_same_text_in_the_form_it_asks_for(start_gateway, fake, first, then):
    text = 'Grüße 👋 “quoted” \n\n```py\nprint("x")\n```'
    gateway = await start_gateway(["a"], ON)
    fake.script("a", answer(text), answer("another"))

    missed = await gateway.ask(streaming=first)
    hit = await gateway.ask(streaming=then)

    assert missed.text == hit.text == text
    assert (missed.headers["X-Cache"], hit.headers["X-Cache"]) == ("miss", "hit")
    assert hit.headers["X-Routed-Via"] == "a/a-model"
    assert fake.called == ["a"]
    if then:
        hit.assert_whole(text)
    else:
        assert hit.json["choices"][0]["finish_reason"] == "stop"
        assert hit.json["usage"]["total_tokens"] > 0
    row = (await gateway.rows_of(hit, 1))[0]
    assert (row["status"], row["cached"], row["platform"], row["model_id"]) == ("success", 1, "a", "a-model")
    assert (row["key_id"], row["input_tokens"], row["output_tokens"], row["attempt"]) == (None, None, None, 0)
    assert row["streamed"] == then


ODD_TEXTS = {
    "white space": " \n\t begins and ends with it \r\n ",
    "controls": "\x00 \x1b[0m \x7f \u2028 \u2029 \ufeff",
    "like the stream's own lines": "data: [DONE]\n\nevent: error\ndata: {}\r\n: comment",
    "JSON": '{"a": "\\\\ \\" / \\u00e9"}',
    "letters of many bytes": "👩‍👩‍👧‍👦 𝔊 ﷽ é e\u0301 中文",
    "halves of an emoji": "\ud83d\ude00 apart \ud83d",
}


@pytest.mark.parametrize("size", [1, 7, 1000], ids="in pieces of {}".format)
async def test_text_comes_back_byte_for_byte_from_streamed_to_whole_and_back(start_gateway, fake, size):
    gateway = await start_gateway(["a"], ON)
    for name, text in ODD_TEXTS.items():
        pieces = [text[at : at + size] for at in range(0, len(text), size)]
        events = [*(chunk(reasoning_content=piece) for piece in pieces), *map(chunk, pieces)]
        stream = sse(*(event(json.dumps(each)) for each in events), STOP)  # escaped, as half an emoji must be
        whole = completion(text, message={"reasoning_content": text})
        for first, reply in ((True, stream), (False, whole)):
            with case(f"{name}, {'streamed' if first else 'whole'} first"):
                fake.script("a", reply)
                got = [await gateway.ask(f"{name} {first}", streaming=s) for s in (first, False, True)]
                assert [answer.headers["X-Cache"] for answer in got] == ["miss", "hit", "hit"]
                for answer in got:
                    assert said(answer) == (utf16(text), utf16(text))


def utf16(text: str) -> bytes:
    """Also of half an emoji; two halves that meet are one."""
    return text.encode("utf-16-le", errors="surrogatepass")


def said(got: Answer) -> tuple[bytes, bytes]:
    """What was thought and what was answered."""
    parts = got.deltas if isinstance(got, Stream) else [got.json["choices"][0]["message"]]
    thought, text = ("".join(part.get(name) or "" for part in parts) for name in ("reasoning_content", "content"))
    return utf16(thought), utf16(text)


async def test_a_streamed_hit_tells_usage_to_those_who_ask(start_gateway, fake):
    gateway = await start_gateway(["a"], ON)
    await gateway.chat()

    hit = await gateway.stream(stream_options={"include_usage": True})

    assert [chunk["usage"]["total_tokens"] for chunk in hit.chunks if chunk.get("usage")] == [18]
    assert fake.called == ["a"]


async def test_every_dialect_is_served_from_the_same_memory(start_gateway, fake):
    gateway = await start_gateway(["a"], ON)
    fake.script("a", answer("kept"))
    await gateway.chat("hello", model="auto-smart")

    asked = await gateway.openai.responses.create(model="auto-smart", input="hello")
    said = await gateway.anthropic.messages.create(
        model="claude-freeway-smart", max_tokens=50, messages=[{"role": "user", "content": "hello"}]
    )
    async with gateway.openai.responses.stream(model="auto-smart", input="hello") as stream:
        streamed = await stream.get_final_response()

    assert (asked.output_text, streamed.output_text, said.content[0].text) == ("kept", "kept", "kept")
    assert fake.called == ["a", "a"]  # Messages always names a limit, which is another request
    assert asked.id != streamed.id


OFF = [{"X-Cache": "off"}, {"Cache-Control": "no-store"}, {"Cache-Control": "no-cache, No-Store"}]


@pytest.mark.parametrize("headers", OFF, ids=str)
async def test_a_client_can_do_without(start_gateway, fake, headers):
    gateway = await start_gateway(["a"], ON)
    fake.script("a", answer("first"), answer("second"), answer("third"))

    assert (await gateway.chat(headers=headers)).text == "first"
    assert (await gateway.chat()).text == "second"
    asked = await gateway.chat(headers=headers)
    assert (asked.text, "X-Cache" in asked.headers) == ("third", False)
    assert (await gateway.chat()).text == "second"


async def test_it_is_off_by_default(start_gateway, fake):
    gateway = await start_gateway(["a"])

    assert "X-Cache" not in (await gateway.chat()).headers
    await gateway.chat()
    assert fake.called == ["a", "a"]


DIFFERENT = {
    "another text": {"content": "other"}, "another limit": {"max_tokens": 5}, "another mode": {"model": "auto-fast"},
    "temperature": {"temperature": 0.7}, "a pinned model": {"model": "a-model"},
}  # fmt: skip


@pytest.mark.parametrize("fields", DIFFERENT.values(), ids=DIFFERENT)
async def test_another_request_is_another_answer(start_gateway, fake, fields):
    gateway = await start_gateway(["a"], ON)
    await gateway.chat()

    asked = await gateway.chat(**fields)

    assert asked.headers.get("X-Cache") != "hit"
    assert fake.called == ["a", "a"]


async def test_wishes_about_who_may_answer_are_part_of_a_request(start_gateway, fake):
    gateway = await start_gateway({"a": {"trains_on_prompts": True}, "b": {"trains_on_prompts": False}}, ON)

    assert (await gateway.chat()).text == "hello from a"
    assert (await gateway.chat(headers={"X-Privacy": "no-train"})).text == "hello from b"
    assert (await gateway.chat(headers={"X-Min-Rank": "1"})).text == "hello from a"
    assert fake.called == ["a", "b", "a"]


NOT_KEPT = {
    "cut by length": completion("half a", finish="length"),
    "filtered": completion("half a", finish="content_filter"),
    "a tool call": completion(None, finish="tool_calls", message={"tool_calls": [CALL]}),
    "refused": error(400),
}


@pytest.mark.parametrize("reply", NOT_KEPT.values(), ids=NOT_KEPT)
async def test_what_is_not_a_whole_answer_is_not_kept(start_gateway, fake, reply):
    gateway = await start_gateway(["a"], ON)
    fake.script("a", reply, answer("whole"))
    await gateway.chat(tools=[TOOL])

    asked = await gateway.chat(tools=[TOOL])

    assert (asked.text, asked.headers["X-Cache"]) == ("whole", "miss")


NOT_KEPT_STREAMS = {
    "cut by length": sse(chunk("half a"), chunk(finish="length")),
    "filtered": sse(chunk("half a"), chunk(finish="content_filter")),
    "a tool call": sse(chunk(tool_calls=[{"index": 0, **CALL}]), chunk(finish="tool_calls")),
    "an error amid it": sse(chunk("half a"), event({"error": {"message": "overloaded", "code": 503}})),
    "no end": sse(chunk("half a"), done=False),
    "reset": sse(chunk("half a"), RESET),
}


@pytest.mark.parametrize("reply", NOT_KEPT_STREAMS.values(), ids=NOT_KEPT_STREAMS)
async def test_a_stream_that_is_not_a_whole_answer_is_not_kept(start_gateway, fake, reply):
    gateway = await start_gateway(["a"], ON | {"TRANSIENT_COOLDOWN_MS": "1", "WAIT_FOR_CAPACITY_MS": "5000"})
    fake.script("a", reply, answer("whole"))
    await gateway.stream(tools=[TOOL])

    for streaming in (True, False):
        asked = await gateway.ask(streaming=streaming, tools=[TOOL])
        assert (asked.text, asked.headers["X-Cache"]) == ("whole", "miss" if streaming else "hit")


@pytest.mark.parametrize("rescue", ["on", "off"])
async def test_a_broken_stream_is_not_kept_mended_or_not(start_gateway, fake, rescue):
    gateway = await start_gateway(["a", "b"], ON | {"RESCUE": rescue})
    begun = "This is the beginning of a long answer that "
    fake.script("a", sse(chunk(begun), CUT), answer("whole"))
    fake.script("b", answer(begun + "goes on here."))
    await gateway.stream()

    assert (await gateway.chat()).headers["X-Cache"] == "miss"


async def test_an_answer_expires(start_gateway, fake):
    gateway = await start_gateway(["a"], ON | {"CACHE_TTL_MS": "30"})
    fake.script("a", answer("first"), answer("second"))
    await gateway.chat()
    await asyncio.sleep(0.05)

    assert (await gateway.chat()).text == "second"


async def test_the_metrics_count_it(start_gateway, fake):
    gateway = await start_gateway(["a"], ON)
    for _ in range(3):
        await gateway.chat()

    text = (await gateway.get("/metrics")).body.decode()

    assert 'freeway_cache_total{result="miss"} 1.0' in text
    assert 'freeway_cache_total{result="hit"} 2.0' in text
    assert "freeway_cache_bytes 0.0" not in text


async def test_an_answer_from_memory_says_so_when_it_is_explained(start_gateway, fake):
    gateway = await start_gateway(["a"], ON)
    await gateway.chat()
    hit = await gateway.chat()

    told = (await gateway.get(f"/api/requests/{hit.headers['X-Request-Id']}/explain")).json

    assert (told["cached"], told["attempts"], told["candidates"]) == (True, [], [])


# --- Equal requests at the same time ----------------------------------------------------------------------------------


@both_ways
async def test_equal_requests_that_run_at_the_same_time_share_one_call(start_gateway, fake, streaming):
    gateway = await start_gateway(["a"], ON)
    go_on = asyncio.Event()
    fake.script("a", sse(chunk("one "), Wait(go_on), chunk("answer"), STOP, usage_chunk()))
    first = asyncio.create_task(gateway.stream())
    await fake.arrived()
    others = [asyncio.create_task(gateway.ask(streaming=streaming)) for _ in range(5)]
    await until(lambda: in_line(gateway) == 5)
    go_on.set()

    got = await asyncio.gather(first, *others)

    assert [answer.text for answer in got] == ["one answer"] * 6
    assert fake.called == ["a"]
    rows = await gateway.rows(6)
    assert sorted(row["cached"] for row in rows) == [0, 1, 1, 1, 1, 1]


def in_line(gateway) -> int:
    """How many requests wait for an equal one's answer."""
    recall = gateway._server.config.app.engine.recall
    return sum(len(flight.waiting) for flight in recall._flights.values())


async def test_when_the_first_fails_the_next_is_served_and_the_others_get_its_answer(start_gateway, fake):
    gateway = await start_gateway(["a"], ON)
    go_on = asyncio.Event()
    fake.script("a", sse(Wait(go_on), event({"error": {"message": "broken", "code": 400}})), answer("good"))
    first = asyncio.create_task(gateway.stream())
    await fake.arrived()
    others = [asyncio.create_task(gateway.chat()) for _ in range(3)]
    await until(lambda: in_line(gateway) == 3)
    go_on.set()

    assert (await first).status == 400
    assert [answer.text for answer in await asyncio.gather(*others)] == ["good"] * 3
    assert fake.called == ["a", "a"]


async def test_when_the_first_ones_client_leaves_the_next_is_served(start_gateway, fake):
    gateway = await start_gateway(["a"], ON)
    fake.script("a", sse(chunk("begun"), PAUSE), answer("good"))
    async with gateway.post(gateway.request(stream=True)) as leaving:
        assert leaving.status == 200
        others = [asyncio.create_task(gateway.chat()) for _ in range(3)]
        await until(lambda: in_line(gateway) == 3)
        leaving.close()

    assert [answer.text for answer in await asyncio.gather(*others)] == ["good"] * 3
    assert fake.called == ["a", "a"]


async def test_a_waiting_client_that_leaves_holds_nobody_up(start_gateway, fake):
    gateway = await start_gateway(["a"], ON)
    go_on = asyncio.Event()
    fake.script("a", sse(Wait(go_on), event({"error": {"message": "broken", "code": 400}})), answer("good"))
    first = asyncio.create_task(gateway.stream())
    await fake.arrived()
    leaving = asyncio.create_task(gateway.chat())
    await until(lambda: in_line(gateway) == 1)
    staying = asyncio.create_task(gateway.chat())
    await until(lambda: in_line(gateway) == 2)
    leaving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await leaving
    await until(lambda: in_line(gateway) == 1)
    go_on.set()

    await first
    assert (await staying).text == "good"
    assert in_line(gateway) == 0


async def test_a_tool_call_is_shared_with_those_who_wait_and_kept_for_nobody(start_gateway, fake):
    gateway = await start_gateway(["a"], ON)
    go_on = asyncio.Event()
    piece = {"index": 0, **CALL}
    fake.script("a", sse(Wait(go_on), chunk(tool_calls=[piece]), chunk(finish="tool_calls")), answer("text"))
    first = asyncio.create_task(gateway.stream(tools=[TOOL]))
    await fake.arrived()
    second = asyncio.create_task(gateway.chat(tools=[TOOL]))
    await until(lambda: in_line(gateway) == 1)
    go_on.set()
    await first

    (call,) = (await second).json["choices"][0]["message"]["tool_calls"]
    assert (call["id"], call["function"]) == ("c1", {"name": "f", "arguments": "{}"})
    assert fake.called == ["a"]
    assert (await gateway.chat(tools=[TOOL])).text == "text"


async def test_what_cannot_be_told_to_others_is_asked_for_by_each(start_gateway, fake):
    gateway = await start_gateway(["a"], ON)
    go_on = asyncio.Event()
    odd = chunk("with sources", annotations=[{"type": "url"}])
    fake.script("a", sse(Wait(go_on), odd, STOP), answer("mine"))
    first = asyncio.create_task(gateway.stream())
    await fake.arrived()
    others = [asyncio.create_task(gateway.chat()) for _ in range(2)]
    await until(lambda: in_line(gateway) == 2)
    go_on.set()

    assert (await first).text == "with sources"
    assert [answer.text for answer in await asyncio.gather(*others)] == ["mine"] * 2


async def test_many_equal_requests_in_waves_lose_nobody(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ON)
    fake.script("a", error(500), error(400), error(500), answer("at last"))

    got = await asyncio.gather(*(gateway.ask(streaming=n % 2 == 0) for n in range(40)))

    assert all(isinstance(answer, Answer) and answer.status == 200 for answer in got)
    assert len({answer.text for answer in got}) <= 2
    assert len(fake.called) <= 4
    assert in_line(gateway) == 0
