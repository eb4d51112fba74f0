"""SPEC 8.1, 8.2 and 8.5: when a stream starts, what is in it, and how it ends."""

import asyncio
import json

import pytest
from conftest import Stream
from fake_provider import (
    CUT,
    DONE,
    NO_HTTP,
    PAUSE,
    RESET,
    ROLE,
    STOP,
    Wait,
    answer,
    chunk,
    chunked,
    error,
    event,
    sse,
    usage_chunk,
    usage_of,
)

USAGE_WANTED = {"stream_options": {"include_usage": True}}


# --- Before the first meaningful event --------------------------------------------------------------------------

TOOL_CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
MEANINGFUL = {
    "text": chunk("hello"),
    "reasoning": chunk(reasoning_content="let me think"),
    "a tool call": chunk(tool_calls=[TOOL_CALL]),
    "a refusal": chunk(refusal="I cannot"),
    "stopped by length": chunk(finish="length"),
    "stopped by a filter": chunk(finish="content_filter"),
}


@pytest.mark.parametrize("meaningful", MEANINGFUL.values(), ids=MEANINGFUL)
async def test_headers_go_out_with_the_first_meaningful_event(start_gateway, fake, meaningful):
    # Behind a finish reason a stream may be silent for as long as elsewhere, or for some seconds if that is less.
    patience = {"MAX_STREAM_STALL_MS": "500"} if meaningful["choices"][0]["finish_reason"] else {}
    gateway = await start_gateway(["a", "b"], {"TOOL_CALLS": "stream", **patience})
    go_on = asyncio.Event()
    fake.script("a", sse(ROLE, Wait(go_on), meaningful, PAUSE))
    opening = asyncio.create_task(gateway.post(gateway.request(stream=True)).__aenter__())
    await fake.arrived(1)
    await gateway.get("/healthz")  # time enough for headers to arrive, had they been sent
    assert not opening.done()

    go_on.set()

    async with await opening as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["x-routed-via"] == "a/a-model"
        assert response.headers["x-request-id"]
        expected = event(ROLE) + event(meaningful)
        assert await response.content.readexactly(len(expected)) == expected


PREAMBLES = {
    "a role": [ROLE],
    "a role of null content": [chunk(role="assistant", content=None)],
    "white space": [ROLE, chunk("\n"), chunk("  \t")],
    "comments": [b": OPENROUTER PROCESSING\n\n"] * 3,
    "empty choices": [{"id": "x", "choices": []}],
    "usage": [usage_chunk()],
    "null tool calls": [chunk("", tool_calls=None, reasoning_content=None, refusal=None)],
}
BREAKS = {"a cut": [CUT], "a reset": [RESET], "an error": [{"error": {"message": "no luck"}}], "an end": []}


@pytest.mark.parametrize("breaking", BREAKS.values(), ids=BREAKS)
@pytest.mark.parametrize("preamble", PREAMBLES.values(), ids=PREAMBLES)
async def test_a_stream_that_breaks_before_its_first_token_moves_on_unseen(start_gateway, fake, preamble, breaking):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", sse(*preamble, *breaking, done=False))

    got = await gateway.stream()

    got.assert_whole("hello from b")
    assert got.headers["X-Fallback-Attempts"] == "1"
    assert fake.called == ["a", "b"]


@pytest.mark.parametrize("preamble", PREAMBLES.values(), ids=PREAMBLES)
async def test_what_was_held_back_arrives_when_the_stream_begins(start_gateway, fake, preamble):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", sse(*preamble, chunk("hello"), STOP))

    got = await gateway.stream()

    held = "".join(json.loads(event(part)[6:])["choices"][0]["delta"].get("content") or "" for part in texts(preamble))
    got.assert_whole(held + "hello")
    assert fake.called == ["a"]


def texts(parts: list) -> list[dict]:
    return [part for part in parts if isinstance(part, dict) and part["choices"]]


# --- Forwarding -------------------------------------------------------------------------------------------------

ODD_EVENTS = [
    b'data: {"choices":[{"delta":{"role":"assistant","content":""},"index":0,"finish_reason":null}],  "id" : "x"}\n\n',
    b'data:{"id":"x","choices":[{"index":0,"delta":{"content":"no space"}}],"x_extra":{"deep":[1,2.50,null]}}\n\n',
    'data: {"id":"x","choices":[{"index":0,"delta":{"content":"Grüße 🦊 \u2028 漢字"}}]}\n\n'.encode(),
    b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"\\ud83e\\udd8a \\u00fc\\/"}}],"n":1e2}\n\n',
    b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"line\\nbreak data: [DONE]"},"logprobs":null}]}\n\n',
    b'data: {"id":"x","model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n',
]
WIRE = b"".join(ODD_EVENTS) + DONE


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 100_000])
async def test_events_are_forwarded_byte_for_byte_however_they_are_split(start_gateway, fake, size):
    gateway = await start_gateway(["a"])
    fake.script("a", chunked(*[WIRE[i : i + size] for i in range(0, len(WIRE), size)]))

    got = await gateway.stream()

    assert got.body == WIRE


@pytest.mark.parametrize("size", [1, 2, 5, 100_000])
async def test_events_with_crlf_arrive_intact_however_they_are_split(start_gateway, fake, size):
    gateway = await start_gateway(["a"])
    wire = WIRE.replace(b"\n\n", b"\r\n\r\n")
    fake.script("a", chunked(*[wire[i : i + size] for i in range(0, len(wire), size)]))

    got = await gateway.stream()

    assert got.data == Stream(200, {}, WIRE).data


async def test_a_letter_split_at_each_byte_arrives_intact(start_gateway, fake):
    gateway = await start_gateway(["a"])
    wire = event(chunk("ü🦊漢")) + event(STOP) + DONE
    for place in range(1, len(wire)):
        fake.script("a", chunked(wire[:place], wire[place:]))
        assert (await gateway.stream()).body == wire


async def test_events_arrive_as_they_are_sent(start_gateway, fake):
    gateway = await start_gateway(["a"])
    words = [chunk(f"word{n}") for n in range(5)]
    gates = [asyncio.Event() for _ in words]
    fake.script("a", sse(*[part for gate, word in zip(gates, words, strict=True) for part in (Wait(gate), word)], STOP))
    gates[0].set()

    async with gateway.post(gateway.request(stream=True)) as response, asyncio.timeout(5):
        for gate, word in zip(gates, words, strict=True):
            gate.set()
            expected = event(word)
            assert await response.content.readexactly(len(expected)) == expected
        assert await response.read() == event(STOP) + DONE


async def test_identity_and_model_stay_the_providers(start_gateway, fake):
    gateway = await start_gateway(["a"])

    got = await gateway.stream()

    assert {(part["id"], part["model"]) for part in got.chunks} == {("chatcmpl-fake", "provider-own-name")}


async def test_event_and_id_lines_and_events_of_several_data_lines_are_understood(start_gateway, fake):
    gateway = await start_gateway(["a"])
    one = b'event: message\nid: 7\ndata: {"id":"x","choices":[{"index":0,\ndata: "delta":{"content":"all well"}}]}\n\n'
    fake.script("a", chunked(b"\xef\xbb\xbfretry: 5\n\n", one, event(STOP), DONE))

    got = await gateway.stream()

    assert b"all well" in got.body
    got.assert_done_once()
    assert (await gateway.row())["status"] == "success"


# --- What must change -------------------------------------------------------------------------------------------

USAGES = {
    "on its own": [chunk("hello"), STOP, usage_chunk(11, 7)],
    "on the last choice": [chunk("hello"), chunk(finish="stop", root={"usage": usage_of(11, 7)})],
    "on every event": [chunk(t, root={"usage": usage_of(11, n)}) for n, t in enumerate(["he", "llo"], start=6)]
    + [chunk(finish="stop", root={"usage": usage_of(11, 7)})],
    "in x_groq": [chunk("hello"), chunk(finish="stop", root={"x_groq": {"usage": usage_of(11, 7)}})],
}


@pytest.mark.parametrize("chunks", USAGES.values(), ids=USAGES)
async def test_usage_reaches_only_clients_that_asked_for_it(start_gateway, fake, chunks):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(*chunks))

    silent = await gateway.stream()
    asked = await gateway.stream(**USAGE_WANTED)

    silent.assert_whole("hello")
    assert not any(part.get("usage") for part in silent.chunks)
    asked.assert_whole("hello")
    assert asked.chunks[-1]["usage"]["completion_tokens"] == 7
    assert asked.chunks[-1]["usage"]["prompt_tokens"] == 11
    for row in await gateway.rows(2):
        assert (row["input_tokens"], row["output_tokens"]) == (11, 7)


async def test_the_usage_event_comes_once_and_last(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(chunk("hello"), STOP, usage_chunk(1, 1), usage_chunk(11, 7)))

    got = await gateway.stream(**USAGE_WANTED)

    assert [part["usage"]["completion_tokens"] for part in got.chunks if not part["choices"]] == [7]
    assert got.chunks[-1]["choices"] == []


async def test_every_chunk_has_one_identity_where_a_whole_answer_is_streamed(start_gateway, fake):
    gateway = await start_gateway({"a": {"quirks": {"no_stream": True}}})

    got = await gateway.stream(**USAGE_WANTED)

    got.assert_whole("hello from a")
    assert got.chunks[-1]["usage"]["completion_tokens"] == 7
    assert len({(part["id"], part["created"], part["model"]) for part in got.chunks}) == 1


async def test_usage_is_asked_of_the_provider_so_that_it_can_be_logged(start_gateway, fake):
    gateway = await start_gateway(["a"])

    got = await gateway.stream()

    got.assert_whole("hello from a")
    assert not any("usage" in part for part in got.chunks)
    row = await gateway.row()
    assert (row["input_tokens"], row["output_tokens"]) == (11, 7)


async def test_tool_calls_without_an_index_get_one(start_gateway, fake):
    gateway = await start_gateway(["a"])
    first = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"x"'}}
    rest = {"function": {"arguments": ": 1}"}}
    second = {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}}
    parts = [chunk(tool_calls=[first]), chunk(tool_calls=[rest]), chunk(tool_calls=[second])]
    fake.script("a", sse(*parts, chunk(finish="tool_calls")))

    got = await gateway.stream(tools=[{"type": "function", "function": {"name": "f"}}])

    calls = [call for delta in got.deltas for call in delta.get("tool_calls") or []]
    assert [call["index"] for call in calls] == [0, 0, 1, 1]
    assert got.finishes == ["tool_calls"]
    got.assert_done_once()


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
async def test_reasoning_has_one_name(start_gateway, fake, name):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(chunk(**{name: "let me think"}), chunk("hello"), STOP))

    got = await gateway.stream()

    assert [delta["reasoning_content"] for delta in got.deltas if "reasoning_content" in delta] == ["let me think"]
    got.assert_whole("hello")


# --- Ends -------------------------------------------------------------------------------------------------------

GOOD_ENDS = {
    "finish and [DONE]": [STOP, DONE],
    "[DONE] twice": [STOP, DONE, DONE],
    "finish without [DONE]": [STOP],
    "finish and a cut": [STOP, DONE, CUT],
    "[DONE] without finish": [DONE],
    "[DONE] and then nothing more": [STOP, DONE, PAUSE],
    "no line end after the finish": [event(STOP).rstrip()],
    "no line end after [DONE]": [STOP, DONE.rstrip()],
}


@pytest.mark.parametrize("end", GOOD_ENDS.values(), ids=GOOD_ENDS)
async def test_a_finished_stream_ends_with_one_done(start_gateway, fake, end):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", sse(chunk("all well"), *end, done=False))

    got = await gateway.stream()

    assert got.text == "all well"
    assert not any(part.get("error") for part in got.chunks)
    got.assert_done_once()
    assert (await gateway.row())["status"] == "success"
    assert await gateway.cooled_models() == {}


BAD_ENDS = {
    "a cut": ([CUT], "connection", True),
    "a cut inside an event": ([event(chunk("more"))[:-20], CUT], "connection", True),
    "a reset": ([RESET], "connection", True),
    "what is no HTTP": ([NO_HTTP, PAUSE], "connection", True),
    "an end without finish": ([], "truncated", False),
    "an end inside an event": ([event(chunk("more"))[:-20]], "truncated", False),
    "an error": ([{"error": {"message": "secret-backend-7 fell over", "code": 500}}], "server_error", True),
    "an event larger than 1 MiB": ([chunk("x" * (1 << 20))], "malformed", False),
    "an error without code": ([{"error": "secret-backend-7 fell over"}], "wrapped", False),
}


@pytest.mark.parametrize(("end", "kind", "cools"), BAD_ENDS.values(), ids=BAD_ENDS)
async def test_a_stream_that_fails_after_its_first_token_says_so(start_gateway, fake, end, kind, cools):
    gateway = await start_gateway(["a", "b"])
    received = asyncio.Event()
    fake.script("a", sse(ROLE, chunk("half an ans"), Wait(received), *end, done=False))

    async with gateway.post(gateway.request(stream=True)) as response:
        first = await response.content.readexactly(len(event(ROLE) + event(chunk("half an ans"))))
        received.set()
        got = Stream(response.status, response.headers, first + await response.read())

    assert got.text == "half an ans"
    assert got.error["type"] == "stream_error"
    assert "a" in got.error["message"].replace("/", " ").replace("'", " ").replace(":", " ").split()
    assert "secret-backend" not in got.error["message"]
    failing, ended = got.chunks[-2:]  # in two: some clients see only the one, and some only the other
    assert failing.keys() == {"error"}
    assert ended == {
        "id": "chatcmpl-fake", "object": "chat.completion.chunk", "created": 1_700_000_000,
        "model": "provider-own-name", "choices": [{"index": 0, "delta": {}, "finish_reason": "error"}],
    }  # fmt: skip
    assert got.finishes == ["error"]
    got.assert_done_once()
    assert fake.called == ["a"]
    row = await gateway.row()
    assert (row["status"], row["error_kind"], row["streamed"]) == ("error", kind, 1)
    assert set(await gateway.cooled_models()) == ({"a-model"} if cools else set())


async def test_a_broken_stream_leaves_the_next_request_unharmed(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], {"TRANSIENT_COOLDOWN_MS": "1"})
    fake.script("a", sse(chunk("half"), CUT), answer("whole again"))
    assert (await gateway.stream()).finishes == ["error"]
    await gateway.uncooled()

    (await gateway.stream()).assert_whole("whole again")


async def test_a_whole_answer_stopped_by_length_stands(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", sse(chunk("cut off"), chunk(finish="length"), usage_chunk(11, 3)))

    got = await gateway.stream(max_tokens=100)

    assert got.text == "cut off"
    assert got.finishes == ["length"]
    got.assert_done_once()
    assert fake.called == ["a"]


async def test_an_event_too_large_for_a_line_is_a_failure(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", chunked(b'data: {"choices": "', *[b"x" * (1 << 18)] * 8, PAUSE))

    (await gateway.stream()).assert_whole("hello from b")

    await fake.closed(0)
    assert fake.requests[0].written < 3 << 20


async def test_a_stream_after_failures_carries_the_trail(start_gateway, fake):
    gateway = await start_gateway(["a", "b", "c"])
    fake.script("a", error(503))
    fake.script("b", sse(ROLE, CUT))

    got = await gateway.stream()

    got.assert_whole("hello from c")
    assert got.headers["X-Fallback-Trail"] == "a/a-model=server_error; b/b-model=connection"
    assert got.headers["X-Fallback-Attempts"] == "2"


async def test_streams_of_many_clients_do_not_mix(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", lambda request: answer(f"echo {request.prompt} " * 20)(request))

    streams = await asyncio.gather(*[gateway.stream(f"client {n}") for n in range(50)])

    for number, stream in enumerate(streams):
        stream.assert_whole(f"echo client {number} " * 20)


async def test_the_openai_client_reads_streams(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", sse(ROLE, RESET))
    messages = [{"role": "user", "content": "hi"}]

    stream = await gateway.openai.chat.completions.create(model="auto-priority", messages=messages, stream=True)

    assert "".join([part.choices[0].delta.content or "" async for part in stream if part.choices]) == "hello from b"


async def test_the_openai_client_raises_when_a_stream_breaks(start_gateway, fake, openai):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", sse(ROLE, chunk("half"), {"error": {"message": "broke", "code": 503}}))
    messages = [{"role": "user", "content": "hi"}]
    stream = await gateway.openai.chat.completions.create(model="auto-priority", messages=messages, stream=True)

    with pytest.raises(openai.APIError):
        async for _ in stream:
            pass
