"""SPEC 8.9: a finish reason is believed when the stream ends, and some of them are failures."""

import asyncio
import json

import pytest
from conftest import both_ways, case
from fake_provider import (
    CUT,
    PAUSE,
    RESET,
    ROLE,
    Every,
    Wait,
    body,
    chunk,
    chunked,
    completion,
    event,
    sse,
    usage_chunk,
)
from wires import Gemini, gemini_frame

from adapters.openai import OpenAIAdapter
from adapters.stream import Incoming
from dialects.chat import chat_from
from routing.catalog import KEYLESS, Model, Platform
from routing.route import Route
from wire.chat import Tally

PLATFORM = Platform("p", "P", "openai", "http://127.0.0.1/v1", keyless=True)
MODEL = Model(
    1, PLATFORM, "m", "M", 1, 1, 10**6, 1000, None, None, None, None, True, True, frozenset(), frozenset(), True, 1,
    True,
)  # fmt: skip
ROUTE = Route(MODEL, KEYLESS, None)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
OPEN_CALL = CALL | {"function": {"name": "f", "arguments": '{"n": '}}
STOP = chunk(finish="stop")
HALF = chunk("half an ans")
SHORT = {"MAX_STREAM_STALL_MS": "200", "RESCUE": "off"}

# What a provider says, and what its client reads: the text and the finish.
ENDINGS = {
    "in its own chunk": ([chunk("hi"), STOP], "hi", "stop"),
    "beside the last word": ([chunk("h"), chunk("i", finish="stop")], "hi", "stop"),
    "with every chunk": ([chunk("h", finish="stop"), chunk("i", finish="stop"), STOP], "hi", "stop"),
    "with every chunk, but cut at last": ([chunk("h", finish="stop"), chunk("i", finish="length")], "hi", "length"),
    "before the last word": ([chunk("h"), STOP, chunk("i")], "hi", "stop"),
    "before everything": ([ROLE, STOP, chunk("hi")], "hi", "stop"),
    "the word null": ([chunk("h", finish="null"), chunk("i", finish="null"), STOP], "hi", "stop"),
    "the word null alone": ([chunk("h", finish="null"), chunk("i", finish="null")], "hi", "stop"),
    "empty": ([chunk("h", finish=""), chunk("i", finish="")], "hi", "stop"),
    "none": ([chunk("h", finish="None"), chunk("i")], "hi", "stop"),
    "in capitals": ([chunk("hi"), chunk(finish="STOP")], "hi", "stop"),
    "calls without a call": ([chunk("hi"), chunk(finish="tool_calls")], "hi", "stop"),
    "length before a stop": ([chunk("hi"), chunk(finish="length"), STOP], "hi", "length"),
    "a filter before a stop": ([chunk("hi"), chunk(finish="content_filter"), STOP], "hi", "content_filter"),
    "the window's end": ([chunk("hi"), chunk(finish="model_context_window_exceeded")], "hi", "length"),
    "of its own kind": ([chunk("hi"), chunk(finish="recitation_x")], "hi", "recitation_x"),
}


async def test_an_answer_ends_once_and_as_its_provider_meant(start_gateway, fake):
    gateway = await start_gateway(["a"])
    for name, (parts, text, finish) in ENDINGS.items():
        with case(name):
            fake.script("a", sse(*parts))
            got = await gateway.stream()
            assert (got.text, got.finishes) == (text, [finish])
            got.assert_done_once()
            assert (await gateway.rows_of(got, 1))[0]["status"] == "success"


@pytest.mark.parametrize("mode", ["whole", "stream"])
async def test_a_call_behind_a_stop_is_a_call(start_gateway, fake, mode):
    gateway = await start_gateway(["a"], {"TOOL_CALLS": mode})
    called = chunk(tool_calls=[CALL])
    forms = {
        "a stop before it": [STOP, called],
        "a stop beside it": [chunk(finish="stop", tool_calls=[CALL])],
        "a stop between its pieces": [
            chunk(tool_calls=[CALL | {"function": {"name": "f", "arguments": "{"}}]),
            STOP,
            chunk(tool_calls=[{"index": 0, "function": {"arguments": "}"}}]),
        ],
        "a stop behind it": [called, STOP],
        "and a text before the stop": [chunk("I look."), STOP, called],
    }
    for name, parts in forms.items():
        for done in (True, False):
            with case((name, done)):
                fake.script("a", sse(*parts, done=done))
                got = await gateway.stream(tools=[TOOL])
                (made,) = got.calls
                assert json.loads(made["function"]["arguments"]) == {}
                assert got.finishes == ["tool_calls"]


async def test_a_finish_that_says_calls_where_there_are_none_is_a_stop(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", completion("hi", finish="tool_calls"))
    assert (await gateway.chat()).json["choices"][0]["finish_reason"] == "stop"


async def test_a_call_that_comes_long_behind_a_stop_is_not_lost(start_gateway, fake):
    gateway = await start_gateway(["a"], {"MAX_STREAM_STALL_MS": "1000"})
    later = asyncio.Event()
    fake.script("a", sse(STOP, Wait(later), chunk(tool_calls=[CALL])))
    asyncio.get_running_loop().call_later(0.3, later.set)

    got = await gateway.stream(tools=[TOOL])

    assert (len(got.calls), got.finishes) == (1, ["tool_calls"])


# Which chunks have come, whether tools were declared, and how long silence is then waited out.
SILENCES = {
    "a stop without tools": ([chunk("hi"), STOP], False, 5.0),
    "a stop where a call may come": ([chunk("hi"), STOP], True, 15.0),
    "a stop behind a call": ([chunk(tool_calls=[CALL]), STOP], True, 5.0),
    "a stop within a call": ([chunk(tool_calls=[OPEN_CALL]), STOP], True, 15.0),
    "calls are announced and none has come": ([chunk("hi"), chunk(finish="tool_calls")], False, 15.0),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "tools", "seconds"), SILENCES.values(), ids=SILENCES)
def test_silence_is_waited_out_longer_where_a_call_may_still_come(parts, tools, seconds):
    asked = {"messages": [{"role": "user", "content": "hi"}]} | ({"tools": [TOOL]} if tools else {})
    tally = Tally()
    translator = OpenAIAdapter().translator(tally, chat_from(asked))
    incoming = Incoming(translator, tally, ROUTE, 0.0, is_sse=True)

    incoming.feed(b"".join(map(event, parts)))

    assert (incoming.finishing, incoming.silence_s) == (True, seconds)


@pytest.mark.parametrize("ending", [[], [PAUSE], [CUT], [RESET]], ids=["the end", "silence", "a cut", "a reset"])
async def test_behind_a_finish_an_answer_is_complete_however_it_ends(start_gateway, fake, ending):
    gateway = await start_gateway(["a"], SHORT)
    fake.script("a", sse(chunk("hi"), STOP, *ending, done=False))

    (await gateway.stream()).assert_whole("hi")

    assert (await gateway.row())["status"] == "success"


async def test_a_finish_is_not_waited_behind_for_ever(start_gateway, fake):
    gateway = await start_gateway(["a"], SHORT)
    fake.script("a", sse(chunk("hi"), STOP, Every(0.01, b": still here\n\n")))

    async with asyncio.timeout(3):
        (await gateway.stream()).assert_whole("hi")


async def test_an_answer_that_ends_without_a_word_is_empty_also_after_silence(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], SHORT)
    fake.script("a", sse(ROLE, STOP, PAUSE))

    got = await gateway.stream()

    assert got.text == "hello from b"
    assert got.headers["X-Fallback-Trail"] == "a/a-model=empty"


async def test_the_providers_own_last_chunk_goes_out_as_it_came(start_gateway, fake):
    gateway = await start_gateway(["a"])
    last = b'data: {"id":"x", "choices":[{"index":0,"delta":{},"finish_reason":"stop"}],   "odd":1}\n\n'
    fake.script("a", sse(chunk("hi"), last, usage_chunk(3, 4)))

    got = await gateway.stream(stream_options={"include_usage": True})

    assert last in got.body
    assert got.chunks[-1]["usage"]["completion_tokens"] == 4


# --- Endings that are failures --------------------------------------------------------------------------------------

FAILED = {
    "abort": (chunk(finish="abort"), "wrapped"),
    "error": (chunk(finish="error"), "wrapped"),
    "network_error": (chunk(finish="network_error"), "wrapped"),
    "insufficient_system_resource": (chunk(finish="insufficient_system_resource"), "server_error"),
    "in capitals": (chunk(finish="ERROR"), "wrapped"),
    "beside a word": (chunk("x", finish="abort"), "wrapped"),
    "an error beside stop": (STOP | {"error": {"message": "no luck", "code": 503}}, "server_error"),
    "an error behind stop": (STOP, "server_error"),
    "an error in the choice": (
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "error": {"message": "no", "code": 502}}]},
        "server_error",
    ),
    "a vendor's error": (STOP | {"x_groq": {"id": "r", "error": "over capacity"}}, "wrapped"),
    "a vendor's error alone": (chunk() | {"x_groq": {"error": {"message": "x", "code": 503}}}, "server_error"),
    "a list of errors": (STOP | {"error": [{"message": "no", "code": 429}]}, "rate_limited"),
}  # fmt: skip
ERROR = {"error": {"message": "no luck", "code": 503}}


def behind(name: str) -> list:
    return [ERROR] if name == "an error behind stop" else []


async def test_a_failed_ending_before_the_first_word_moves_on(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    for name, (ending, kind) in FAILED.items():
        with case(name):
            silent = json.loads(json.dumps(ending).replace('"content": "x"', '"content": ""'))
            fake.script("a", sse(ROLE, silent, *behind(name)))
            got = await gateway.stream()
            assert got.text == "hello from b"
            assert got.headers["X-Fallback-Trail"] == f"a/a-model={kind}"
            await gateway.recovered()


async def test_a_failed_ending_after_the_first_word_breaks_the_stream(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], {"RESCUE": "off"})
    for name, (ending, kind) in FAILED.items():
        with case(name):
            fake.script("a", sse(HALF, ending, *behind(name)))
            got = await gateway.stream()
            assert got.text.startswith("half an ans")
            assert got.finishes == ["error"]
            assert (await gateway.rows_of(got, 1))[0]["error_kind"] == kind
            await gateway.recovered()


async def test_a_whole_answer_with_a_failed_ending_moves_on(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    for name, (ending, kind) in FAILED.items():
        if name == "an error behind stop":
            continue
        with case(name):
            choice = {**ending["choices"][0], "message": {"content": "half"}}
            fake.script("a", body({**ending, "choices": [choice]}))
            got = await gateway.chat()
            assert got.text == "hello from b"
            assert got.headers["X-Fallback-Trail"] == f"a/a-model={kind}"
            await gateway.recovered()


# --- The other wire -------------------------------------------------------------------------------------------------


@both_ways
async def test_on_the_other_wire_the_end_of_the_body_is_the_end(start_gateway, fake, streaming):
    gateway = await start_gateway({"google": Gemini().options(fake)})
    parts = [{"text": "hi"}]
    early = [
        gemini_frame(*parts, said=None) | {"candidates": [{"content": {"parts": parts}, "finishReason": "STOP"}]}
    ] * 2
    whole = early[0]
    fake.script("google", chunked(*map(event, early)) if streaming else body(whole))

    got = await gateway.ask(streaming=streaming)

    assert got.text == ("hihi" if streaming else "hi")
    assert (got.finishes if streaming else [got.json["choices"][0]["finish_reason"]]) == ["stop"]
