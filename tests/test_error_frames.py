"""SPEC 6.5: an error is one in whatever frame it comes; and a stream is one whoever asked for it."""

import json

import pytest
from conftest import both_ways, case
from fake_provider import (
    CUT,
    ROLE,
    Every,
    answer,
    body,
    chunk,
    chunked,
    completion,
    event,
    head,
    raw,
    sse,
    usage_chunk,
    usage_of,
)
from wires import Gemini, gemini_frame

from adapters import errors
from wire.sse import SSEDecoder

BOM = b"\xef\xbb\xbf"
BROKEN = {"error": {"message": "no luck", "code": 503}}
LIMITED = {"error": {"message": "no luck", "code": 429}}
TEXT = json.dumps(BROKEN).encode()
PRETTY = json.dumps(BROKEN, indent=2).encode()
STOP = chunk(finish="stop")

# What a stream says in place of an answer, how it fails and what cools.
FRAMES = {
    "an event named error": (b"event: error\ndata: " + TEXT + b"\n\n", "server_error"),
    "named without a space": (b"event:error\ndata:" + TEXT + b"\n\n", "server_error"),
    "named behind its data": (b"data: " + TEXT + b"\nevent: error\n\n", "server_error"),
    "named, with plain words": (b"event: error\ndata: the model crashed\n\n", "wrapped"),
    "named, with words and an end marker": (b"event: error\ndata: crashed\n\ndata: [DONE]\n\n", "wrapped"),
    "named, with a list": (b'event: error\ndata: [{"message": "no", "code": 429}]\n\n', "rate_limited"),
    "named, with a flat object": (b'event: error\ndata: {"message": "no", "code": 503}\n\n', "server_error"),
    "named, with a text in quotes": (b'event: error\ndata: "no luck"\n\n', "wrapped"),
    "named, without data": (b"event: error\n\n", "wrapped"),
    "named, over bare JSON": (b"event: error\n" + TEXT + b"\n\n", "server_error"),
    "bare, as the last thing": (TEXT, "server_error"),
    "bare, with a line end": (TEXT + b"\n", "server_error"),
    "bare, with an end marker behind it": (TEXT + b"\n\ndata: [DONE]\n\n", "server_error"),
    "bare, in the lines of an event": (TEXT + b"\ndata: [DONE]\n\n", "server_error"),
    "bare, over many lines": (PRETTY + b"\n\n", "server_error"),
    "bare, in a list": (b"[" + TEXT + b"]", "server_error"),
    "in a list": (b"data: [" + TEXT + b"]\n\n", "server_error"),
    "as text that is JSON": (event({"error": json.dumps(BROKEN["error"])}), "server_error"),
    "as text that is a whole body": (event({"error": json.dumps(BROKEN)}), "server_error"),
    "as a message that is JSON": (event({"error": {"message": json.dumps(LIMITED)}}), "rate_limited"),
    "as a list": (event({"error": [LIMITED["error"]]}), "rate_limited"),
}
BEFORE = {
    "at once": [],
    "behind a comment": [b": processing\n\n"],
    "behind a role": [ROLE],
    "behind a mark": [BOM + event(ROLE)],
    "behind an event of another name": [b"event: ping\ndata: {}\n\n"],
}


@pytest.mark.parametrize("place", BEFORE)
async def test_an_error_in_any_frame_moves_on_before_the_first_word(start_gateway, fake, place):
    gateway = await start_gateway(["a", "b"])
    for name, (frame, kind) in FRAMES.items():
        with case(name):
            fake.script("a", sse(*BEFORE[place], frame, done=False))
            got = await gateway.stream()
            assert got.text == "hello from b"
            assert got.headers["X-Fallback-Trail"] == f"a/a-model={kind}"
            await gateway.recovered()


@pytest.mark.parametrize("words", [1, 9])
async def test_an_error_in_any_frame_breaks_the_stream_after_it(start_gateway, fake, words):
    gateway = await start_gateway(["a", "b"], {"RESCUE": "off"})
    said = [chunk(f"word{n} ") for n in range(words)]
    for name, (frame, kind) in FRAMES.items():
        with case(name):
            fake.script("a", sse(*said, frame, done=False))
            got = await gateway.stream()
            assert got.text == "".join(f"word{n} " for n in range(words))
            assert got.finishes == ["error"]
            assert (await gateway.rows_of(got, 1))[0]["error_kind"] == kind
            await gateway.recovered()


async def test_a_bare_error_between_events_is_not_passed_over(start_gateway, fake):
    gateway = await start_gateway(["a"], {"RESCUE": "off"})
    fake.script("a", sse(chunk("half"), TEXT + b"\n\n", chunk(" more"), STOP))

    got = await gateway.stream()

    assert (got.text, got.finishes) == ("half", ["error"])


BODIES = {
    "behind a mark": (BOM + TEXT, "server_error"),
    "in a list": (b"[" + TEXT + b"]", "server_error"),
    "as text that is JSON": (json.dumps({"error": json.dumps(LIMITED)}).encode(), "rate_limited"),
    "as an event": (b"data: " + TEXT + b"\n\n", "server_error"),
    "as an event of that name": (b"event: error\ndata: no luck\n\n", "wrapped"),
    "as an event behind comments": (b": one\n\n: two\n\ndata: " + TEXT + b"\n\n", "server_error"),
}


@both_ways
async def test_an_error_in_any_body_moves_on(start_gateway, fake, streaming):
    gateway = await start_gateway(["a", "b"])
    for name, (content, kind) in BODIES.items():
        with case(name):
            fake.script("a", body(content))
            got = await gateway.ask(streaming=streaming)
            assert got.text == "hello from b"
            assert got.headers["X-Fallback-Trail"] == f"a/a-model={kind}"
            await gateway.recovered()


REFUSED = {
    "behind a mark": BOM + b'{"error": {"message": "slow down, please"}}',
    "in a list": b'[{"error": {"message": "slow down, please"}}]',
    "as text that is JSON": json.dumps({"error": json.dumps({"message": "slow down, please"})}).encode(),
    "as an event": b'event: error\ndata: {"error": {"message": "slow down, please"}}\n\n',
    "as words": b"slow down, please",
    "as words of an event": b"event: error\ndata: slow down, please\n\n",
}


async def test_a_refusal_in_any_body_keeps_its_words(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    for name, content in REFUSED.items():
        with case(name):
            fake.script("a", body(content, status=429, headers={"retry-after": "1"}))
            got = await gateway.chat()
            failed, _ = await gateway.rows_of(got, 2)
            assert (failed["error_kind"], failed["http_status"]) == ("rate_limited", 429)
            assert "slow down, please" in failed["error"]
            await gateway.recovered()


CUT_BODIES = {
    "cut": raw(head(429, {"retry-after": "7", "content-length": "999"}), b'{"error": {"mess', CUT),
    "endless": raw(head(429, {"retry-after": "7"}), Every(0.01, b" ")),
    "never begun": raw(head(429, {"retry-after": "7", "content-length": "9"}), Every(60, b"")),
}


@pytest.mark.parametrize(
    ("name", "streaming"), [("cut", False), ("cut", True), ("endless", False), ("never begun", True)]
)
async def test_a_rate_limit_keeps_its_status_and_time_though_its_body_never_ends(start_gateway, fake, name, streaming):
    gateway = await start_gateway(["a", "b"], error_body_ms=200)
    fake.script("a", CUT_BODIES[name])

    got = await gateway.ask(streaming=streaming)

    assert got.text == "hello from b"
    assert got.headers["X-Fallback-Trail"] == "a/a-model=rate_limited"
    assert 4_000 < (await gateway.cooled_keys())["a-model"] <= 7_000


# --- Streams where none was asked for, and the other way round ------------------------------------------------------

CALLS = [
    chunk(tool_calls=[{"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":'}}]),
    chunk(tool_calls=[{"index": 0, "function": {"arguments": "1}"}}]),
    chunk(tool_calls=[{"index": 1, "id": "c2", "type": "function", "function": {"name": "f", "arguments": "{}"}}]),
    chunk(finish="tool_calls"),
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


async def test_a_stream_that_nobody_asked_for_is_joined(start_gateway, fake):
    gateway = await start_gateway(["a"])
    parts = [ROLE, chunk("hel"), chunk(reasoning_content="hm "), chunk("lo", reasoning_content="so"), STOP]
    forms = {
        "as a stream": sse(*parts, usage_chunk(3, 4)),
        "as JSON by its own words": sse(*parts, usage_chunk(3, 4), headers={"content-type": "application/json"}),
        "without an end marker": sse(*parts, usage_chunk(3, 4), done=False),
        "behind a mark and a comment": sse(BOM + b": hi\n\n", *parts, usage_chunk(3, 4)),
        "JSON on each line": body("".join(json.dumps(part) + "\n" for part in [*parts, usage_chunk(3, 4)])),
    }
    for name, reply in forms.items():
        with case(name):
            fake.script("a", reply)
            got = await gateway.chat()
            assert got.text == "hello"
            whole = got.json
            assert (whole["object"], whole["id"]) == ("chat.completion", "chatcmpl-fake")
            assert whole["choices"][0]["finish_reason"] == "stop"
            assert whole["choices"][0]["message"]["reasoning_content"] == "hm so"
            assert whole["choices"][0]["message"]["role"] == "assistant"
            assert whole["usage"]["completion_tokens"] == 4


async def test_calls_in_a_stream_that_nobody_asked_for_are_joined(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(*CALLS))

    choice = (await gateway.chat(tools=[TOOL])).json["choices"][0]

    made = [(call["id"], call["function"]["arguments"]) for call in choice["message"]["tool_calls"]]
    assert made == [("c1", '{"a":1}'), ("c2", "{}")]
    assert choice["finish_reason"] == "tool_calls"


async def test_a_joined_stream_that_is_cut_or_empty_moves_on(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    forms = {
        "truncated": sse(ROLE, chunk("half"), done=False),
        "empty": sse(ROLE, STOP),
        "malformed": body("hello there"),
        "server_error": sse(chunk("half"), BROKEN),
    }
    for kind, reply in forms.items():
        with case(kind):
            fake.script("a", reply)
            got = await gateway.chat()
            assert got.text == "hello from b"
            assert got.headers["X-Fallback-Trail"] == f"a/a-model={kind}"
            await gateway.recovered()


async def test_json_is_asked_for_of_a_joined_stream_too(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(chunk("Here: "), chunk('{"a": 1}'), STOP))

    assert (await gateway.chat(response_format={"type": "json_object"})).text == '{"a": 1}'


async def test_a_stream_of_the_other_wire_that_nobody_asked_for_is_joined(start_gateway, fake):
    gateway = await start_gateway({"google": Gemini().options(fake)})
    frames = [gemini_frame({"text": "hel"}, said=None), gemini_frame({"text": "lo"}, said=None)]
    ended = {"candidates": [{"finishReason": "STOP"}]}
    fake.script("google", chunked(*map(event, [*frames, ended])))

    assert (await gateway.chat()).text == "hello"


@both_ways
async def test_a_mark_before_an_answer_is_no_part_of_it(start_gateway, fake, streaming):
    gateway = await start_gateway(["a"])
    stream = [BOM + event(ROLE), chunk("he"), chunk("llo"), STOP]
    whole = body(BOM + json.dumps({"choices": [{"message": {"content": "hello"}, "finish_reason": "stop"}]}).encode())
    for reply in (sse(*stream), sse(BOM, event(ROLE), *stream[1:])) if streaming else (whole,):
        fake.script("a", reply)
        got = await gateway.ask(streaming=streaming)
        assert got.text == "hello"
        assert BOM not in got.body


@pytest.mark.parametrize("size", [1, 2, 5, 10_000])
def test_frames_are_read_in_any_pieces(size):
    stream = (
        BOM + b': c\n\ndata: 1\n\nevent: error\ndata: no\n\n{"a":\n1}\n\nevent: ping\ndata: 2\n{"b": 2}\ndata: 3\n\n[4]'
    )
    decoder = SSEDecoder()
    pieces = [stream[at : at + size] for at in range(0, len(stream), size)]

    frames = [frame for piece in pieces for frame in decoder.feed(piece)] + decoder.flush()

    assert [(data, is_error) for _, data, is_error in frames] == [
        (b"1", False), (b"no", True), (b'{"a": 1}', False), (b"2", False), (b'{"b": 2}', False), (b"3", False),
        (b"[4]", False),
    ]  # fmt: skip
    assert frames[2][0] == b'data: {"a": 1}\n\n'


WRAPPINGS = [
    ({"error": "no luck"}, None, "no luck"),
    ([{"error": {"message": "no luck", "code": 429}}], 429, "no luck"),
    ({"error": [{"message": "no luck", "code": 429}]}, 429, "no luck"),
    ({"error": '{"message": "no luck", "code": 429}'}, 429, "no luck"),
    ({"error": '{"error": {"message": "no luck", "code": 429}}'}, 429, "no luck"),
    ({"error": '[{"error": {"message": "no luck", "code": 429}}]'}, 429, "no luck"),
    ('{"error": {"message": "no luck", "code": 429}}', 429, "no luck"),
    ({"error": {"message": '{"error": {"message": "no luck", "code": 429}}'}}, 429, "no luck"),
    ({"error": {"message": '{"error": {"message": "no luck", "code": 429}}', "code": 500}}, 500, "no luck"),
    ({"error": "{not json"}, None, "{not json"),
]


def test_an_error_is_unwrapped_to_its_status_and_words():
    for wrapping, status, words in WRAPPINGS:
        with case(wrapping):
            fault = errors.read(wrapping)
            assert (fault.status, fault.message) == (status, words)


# --- Whole answers are complete (SPEC 3.11) -------------------------------------------------------------------------

WHOLE = json.loads(completion("hello").steps[-1])
LACKING = {
    "nothing": {},
    "an id": {"id": ...},
    "an id of null": {"id": None},
    "an id of a number": {"id": 7},
    "object": {"object": ...},
    "another object": {"object": "chat.completion.chunk"},
    "created": {"created": ...},
    "created with a fraction": {"created": 1_700_000_000.5},
    "created as text": {"created": "now"},
    "a model": {"model": ...},
    "an empty model": {"model": ""},
    "everything": dict.fromkeys(("id", "object", "created", "model", "usage"), ...),
}


@both_ways
async def test_what_a_provider_left_out_of_a_whole_answer_is_filled_in(start_gateway, fake, streaming):
    gateway = await start_gateway(["a"])
    for name, changes in LACKING.items():
        for choice in ({}, {"index": None, "finish_reason": None, "message": {"content": "hello"}}):
            with case((name, choice)):
                choices = [{**WHOLE["choices"][0], **choice}]
                whole = {
                    key: value for key, value in {**WHOLE, "choices": choices, **changes}.items() if value is not ...
                }
                fake.script("a", body(whole))
                got = await gateway.ask(streaming=streaming)
                assert got.text == "hello"
                if streaming:
                    assert got.finishes == ["stop"]
                    continue
                told = got.json
                assert isinstance(told["id"], str)
                assert told["id"]
                assert told["object"] == "chat.completion"
                assert type(told["created"]) is int
                assert told["created"] > 1_600_000_000
                assert told["model"]
                (one,) = told["choices"]
                assert (one["index"], one["finish_reason"], one["message"]["role"]) == (0, "stop", "assistant")


async def test_a_complete_answer_goes_out_as_the_bytes_it_came_in(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", completion("hello"))
    assert (await gateway.chat()).body == completion("hello").steps[-1]


USAGE = usage_of(11, 7)
TOLD = {
    "in the choice": lambda choice: {"choices": [choice | {"usage": USAGE}]},
    "by the vendor": lambda choice: {"choices": [choice], "x_groq": {"id": "r", "usage": USAGE}},
    "at the root": lambda choice: {"choices": [choice], "usage": USAGE},
    "in the message": lambda choice: {
        "choices": [choice | {name: choice[name] | {"usage": USAGE} for name in ("delta", "message") if name in choice}]
    },
}  # fmt: skip


async def test_usage_is_taken_from_wherever_a_platform_puts_it(start_gateway, fake):
    gateway = await start_gateway(["a"])
    for name, form in TOLD.items():
        with case(name):
            whole = {**WHOLE, **form(WHOLE["choices"][0])}
            if name != "at the root":
                del whole["usage"]
            fake.script("a", body(whole))
            got = await gateway.chat()
            assert got.json["usage"]["completion_tokens"] == 7
            assert (await gateway.rows_of(got, 1))[0]["output_tokens"] == 7

            for last in (chunk("o"), STOP):  # with the last word, or with the end
                choice = last["choices"][0]
                fake.script("a", sse(chunk("hell"), *([last] if last is STOP else []), last | form(choice), STOP))
                got = await gateway.stream(stream_options={"include_usage": True})
                assert got.chunks[-1]["usage"]["completion_tokens"] == 7
                unasked = await gateway.stream()
                assert not any(part.get("usage") for part in unasked.chunks)
                assert not any(one.get("usage") for part in unasked.chunks for one in part["choices"])


async def test_after_an_odd_answer_the_next_is_read_as_ever(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(BOM, TEXT), answer("well"))
    await gateway.stream()
    await gateway.recovered()
    (await gateway.stream()).assert_whole("well")
