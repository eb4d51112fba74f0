"""SPEC 6.6: one odd part of an answer never loses the rest: on both wires, whole and streamed, anywhere in a stream."""

import json

import pytest
from conftest import IN_ORDER, both_ways, case
from fake_provider import answer, body, chunk, chunked, completion, event, sse
from wires import Gemini, gemini_frame

STOP = chunk(finish="stop")
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}},
}
WORDS = [chunk(f"word{n} ") for n in range(9)]


def spelled(text: str, content: str) -> bytes:
    """An event or a body in which this content stands as it is spelled, without quotation marks."""
    return text.replace('"@"', content).encode()


def delta_of(content: str) -> bytes:
    return b"data: " + spelled(json.dumps(chunk("@")), content) + b"\n\n"


def message_of(content: str):
    whole = {"id": "x", "object": "chat.completion", "created": 1, "model": "m"}
    whole["choices"] = [
        {"index": 0, "message": {"role": "assistant", "content": "@"}, "finish_reason": "stop", "logprobs": None}
    ]
    return body(spelled(json.dumps(whole), content))


# How a content may be spelled, and the text that it is.
CONTENTS = {
    "a whole number": ("6", "6"),
    "a fraction": ("6.50", "6.50"),
    "a number with an exponent": ("1E5", "1E5"),
    "a number beyond 64 bits": ("12345678901234567890123", "12345678901234567890123"),
    "a number below zero": ("-0", "-0"),
    "true": ("true", "true"),
    "false": ("false", "false"),
    "a list of numbers": ("[1,2]", "[1,2]"),
    "an object of no known form": ('{"city":"Rome"}', '{"city":"Rome"}'),
    "a part": ('{"type":"text","text":"hi"}', "hi"),
    "parts": ('[{"type":"text","text":"h"},{"type":"text","text":"i"}]', "hi"),
    "bare texts in a list": ('["h","i"]', "hi"),
    "a part of null": ('[{"type":"text","text":null},{"type":"text","text":"hi"}]', "hi"),
    "a null among parts": ('[null,{"type":"text","text":"hi"}]', "hi"),
    "a part whose text is a number": ('[{"type":"text","text":6.50},{"text":" hi"}]', "6.50 hi"),
    "a part without a type": ('[{"text":"hi"}]', "hi"),
    "a part of unknown type": ('[{"type":"citation","url":"x"},{"type":"text","text":"hi"}]', "hi"),
}


async def test_a_content_of_any_form_arrives_as_the_text_it_is(start_gateway, fake):
    gateway = await start_gateway(["a"])
    for name, (content, text) in CONTENTS.items():
        with case(name):
            fake.script("a", message_of(content))
            assert (await gateway.chat()).text == text

            fake.script("a", sse(delta_of(content), STOP))
            (await gateway.stream()).assert_whole(text)

            fake.script("a", sse(*WORDS, delta_of(content), chunk(" end"), STOP))
            got = await gateway.stream()
            assert got.text == "".join(f"word{n} " for n in range(9)) + text + " end"
            assert got.finishes == ["stop"]


async def test_text_that_is_streamed_as_numbers_is_put_together_as_it_was(start_gateway, fake):
    gateway = await start_gateway(["a"])
    parts = [
        chunk("It costs $"),
        delta_of("6"),
        chunk("."),
        delta_of("5"),
        chunk(" ["),
        delta_of("1"),
        chunk("]"),
        STOP,
    ]
    fake.script("a", sse(*parts))

    (await gateway.stream()).assert_whole("It costs $6.5 [1]")


# Odd chunks and what each says all the same, before `STOP`; a choice is completed with an index.
CHUNKS = {
    "a choice that is no list": ({"choices": {"index": 0, "delta": {"content": "hi"}}}, "hi"),
    "a null before the choice": ({"choices": [None, {"index": 0, "delta": {"content": "hi"}}]}, "hi"),
    "text for a delta": ({"choices": [{"index": 0, "delta": "hi"}]}, "hi"),
    "a whole message for a delta": ({"choices": [{"index": 0, "message": {"content": "hi"}}]}, "hi"),
    "the older API's text": ({"choices": [{"index": 0, "text": "hi"}]}, "hi"),
    "a role that is none": ({"choices": [{"index": 0, "delta": {"role": 7, "content": "hi"}}]}, "hi"),
    "a refusal that is none": ({"choices": [{"index": 0, "delta": {"refusal": {}, "content": "hi"}}]}, "hi"),
    "calls that are none": ({"choices": [{"index": 0, "delta": {"tool_calls": "", "content": "hi"}}]}, "hi"),
    "a null among calls": ({"choices": [{"index": 0, "delta": {"tool_calls": [None], "content": "hi"}}]}, "hi"),
    "a finish that is none": ({"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": 0}]}, "hi"),
    "a list of one": ([chunk("hi")], "hi"),
    "a choice of null": ({"choices": [None]}, ""),
}


@pytest.mark.parametrize("place", ["first", "tenth"])
async def test_a_chunk_with_an_odd_part_keeps_everything_else_it_says(start_gateway, fake, place):
    gateway = await start_gateway(["a"])
    before = [] if place == "first" else WORDS
    text_before = "".join(f"word{n} " for n in range(9)) if before else ""
    for name, (odd, text) in CHUNKS.items():
        with case(name):
            fake.script("a", sse(*before, event(json.dumps(odd)), chunk(" there"), STOP))
            (await gateway.stream()).assert_whole(f"{text_before}{text} there")


MESSAGES = {
    "a choice that is no list": {"choices": {"message": {"content": "hi"}, "finish_reason": "stop"}},
    "a delta for a message": {"choices": [{"delta": {"content": "hi"}, "finish_reason": "stop"}]},
    "the older API's text": {"choices": [{"text": "hi", "finish_reason": "stop"}]},
    "a role that is none": {"choices": [{"message": {"role": 7, "content": "hi"}}]},
    "a finish that is none": {"choices": [{"message": {"content": "hi"}, "finish_reason": 3}]},
    "a list of one": [{"choices": [{"message": {"content": "hi"}}]}],
}


async def test_a_whole_answer_with_an_odd_part_keeps_everything_else_it_says(start_gateway, fake):
    gateway = await start_gateway(["a"])
    for name, odd in MESSAGES.items():
        for streaming in (False, True):
            with case((name, streaming)):
                fake.script("a", body(odd))
                assert (await gateway.ask(streaming=streaming)).text == "hi"


def call(**fields: object) -> dict:
    return {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"n":1}'}} | fields


# Odd forms of one call, f({"n": 1}).
CALLS = {
    "a whole number for an id": call(id=7),
    "no id": call(id=None),
    "an id of no form": call(id={"x": 1}),
    "an index spelled as text": call(index="0"),
    "an index with a fraction": call(index=0.0),
    "no index": {name: value for name, value in call().items() if name != "index"},
    "a type that is none": call(type=3),
    "arguments as an object": call(function={"name": "f", "arguments": {"n": 1}}),
    "the function's fields in the call": {"id": "call_1", "name": "f", "arguments": '{"n":1}'},
    "and as an object": {"name": "f", "arguments": {"n": 1}},
}


@both_ways
async def test_a_call_of_any_form_is_the_call_it_means(start_gateway, fake, streaming):
    gateway = await start_gateway(["a"])
    for name, odd in CALLS.items():
        for calls in ([odd], odd):  # some write one call without the list around it
            with case((name, type(calls))):
                whole = completion(None, message={"tool_calls": calls}, finish="tool_calls")
                fake.script("a", sse(chunk(tool_calls=calls), chunk(finish="tool_calls")) if streaming else whole)

                got = await gateway.ask(streaming=streaming, tools=[TOOL])

                (made,) = got.calls if streaming else got.json["choices"][0]["message"]["tool_calls"]
                assert isinstance(made["id"], str)
                assert made["id"]
                assert made["type"] == "function"
                assert made["function"]["name"] == "f"
                assert json.loads(made["function"]["arguments"]) == {"n": 1}


async def test_arguments_that_are_streamed_as_numbers_are_put_together(start_gateway, fake):
    gateway = await start_gateway(["a"])
    texts = ['{"n": ', 7, "}"]
    pieces = [call(function={"name": "f", "arguments": ""})]
    pieces += [{"index": 0, "function": {"arguments": text}} for text in texts]
    fake.script("a", sse(*[chunk(tool_calls=[piece]) for piece in pieces], chunk(finish="tool_calls")))

    (made,) = (await gateway.stream(tools=[TOOL])).calls

    assert json.loads(made["function"]["arguments"]) == {"n": 7}


async def test_two_calls_with_one_id_and_different_indexes_are_two(start_gateway, fake):
    gateway = await start_gateway(["a"])
    rome, paris = ({"name": "f", "arguments": json.dumps({"n": n})} for n in (1, 2))
    first, second = call(function=rome), call(function=paris)
    forms = {
        "streamed": sse(chunk(tool_calls=[first, second | {"index": 1}]), chunk(finish="tool_calls")),
        "one after the other": sse(
            chunk(tool_calls=[first]), chunk(tool_calls=[second | {"index": 1}]), chunk(finish="tool_calls")
        ),
        "in pieces": sse(
            chunk(tool_calls=[first | {"function": {"name": "f", "arguments": ""}}]),
            chunk(tool_calls=[{"index": 0, "id": "call_1", "function": {"arguments": '{"n": 1}'}}]),
            chunk(tool_calls=[second | {"index": 1, "function": {"name": "f", "arguments": '{"n"'}}]),
            chunk(tool_calls=[{"index": 1, "id": "call_1", "function": {"arguments": ": 2}"}}]),
            chunk(finish="tool_calls"),
        ),
        "at one index": sse(chunk(tool_calls=[first]), chunk(tool_calls=[second]), chunk(finish="tool_calls")),
        "whole": completion(None, message={"tool_calls": [first, second]}, finish="tool_calls"),
    }
    for name, reply in forms.items():
        with case(name):
            fake.script("a", reply)
            got = await gateway.ask(streaming=name != "whole", tools=[TOOL])
            made = got.calls if name != "whole" else got.json["choices"][0]["message"]["tool_calls"]
            assert [json.loads(one["function"]["arguments"]) for one in made] == [{"n": 1}, {"n": 2}]
            assert len({one["id"] for one in made}) == 2


async def test_a_call_that_is_told_twice_is_one(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(chunk(tool_calls=[call()]), chunk(tool_calls=[call()]), chunk(finish="tool_calls")))

    (made,) = (await gateway.stream(tools=[TOOL])).calls

    assert made["function"]["arguments"] == '{"n":1}'


UNREADABLE = {
    "choices of text": {"choices": "x"},
    "a choice of text": {"choices": ["x"]},
    "a choice of a number": {"choices": [7]},
    "a truth value for a delta": {"choices": [{"index": 0, "delta": True}]},
    "calls of text": {"choices": [{"index": 0, "delta": {"tool_calls": "x"}}]},
    "a call of text": {"choices": [{"index": 0, "delta": {"tool_calls": ["x"]}}]},
    "a function of text": {"choices": [{"index": 0, "delta": {"tool_calls": [{"function": "f"}]}}]},
    "a name that is none": {"choices": [{"index": 0, "delta": {"tool_calls": [{"function": {"name": {}}}]}}]},
}


async def test_a_chunk_that_stays_unreadable_is_a_failure_before_the_first_token(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    for name, odd in UNREADABLE.items():
        with case(name):
            fake.script("a", sse(event(odd), chunk("lost"), STOP))
            got = await gateway.stream()
            assert got.text == "hello from b"
            assert got.headers["X-Fallback-Trail"] == "a/a-model=malformed"
            await gateway.recovered()


async def test_a_chunk_that_stays_unreadable_breaks_the_stream_after_it(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], {"RESCUE": "off"})
    for name, odd in UNREADABLE.items():
        with case(name):
            fake.script("a", sse(*WORDS, event(odd), chunk("lost"), STOP))
            got = await gateway.stream()
            assert "lost" not in got.text
            assert got.finishes == ["error"]
            assert (await gateway.rows_of(got, 1))[0]["error_kind"] == "malformed"
            await gateway.recovered()


async def test_a_whole_answer_that_stays_unreadable_is_a_failure(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    for name, odd in UNREADABLE.items():
        with case(name):
            fake.script("a", body(json.loads(json.dumps(odd).replace('"delta"', '"message"'))))
            got = await gateway.chat()
            assert got.text == "hello from b"
            assert got.headers["X-Fallback-Trail"] == "a/a-model=malformed"
            await gateway.recovered()


# --- The other wire -------------------------------------------------------------------------------------------------


def frame_of(parts: object, **candidate: object) -> dict:
    return {"candidates": [{"content": {"role": "model", "parts": parts}, "index": 0} | candidate], "responseId": "r"}


FRAMES = {
    "a number for a text": (frame_of([{"text": 6}]), "6"),
    "a null for a text": (frame_of([{"text": None}, {"text": "hi"}]), "hi"),
    "a null among parts": (frame_of([None, {"text": "hi"}]), "hi"),
    "a text among parts": (frame_of(["hi"]), "hi"),
    "a number among parts": (frame_of([7, {"text": " hi"}]), "7 hi"),
    "an unknown part": (frame_of([{"executableCode": {"code": "x"}}, {"text": "hi"}]), "hi"),
    "a part that is no list": (frame_of({"text": "hi"}), "hi"),
    "parts in place of the content": ({"candidates": [{"content": [{"text": "hi"}]}]}, "hi"),
    "a text in place of the content": ({"candidates": [{"content": "hi"}]}, "hi"),
    "a candidate that is no list": ({"candidates": {"content": {"parts": [{"text": "hi"}]}}}, "hi"),
    "a list of one": ([frame_of([{"text": "hi"}])], "hi"),
}
ENDED = gemini_frame(said=None) | {"candidates": [{"finishReason": "STOP"}]}


@pytest.fixture
async def google(start_gateway, fake):
    return await start_gateway({"google": Gemini().options(fake), "b": {"model": {"vision": True}}})


async def test_a_frame_with_an_odd_part_keeps_everything_else_it_says(google, fake):
    for name, (odd, text) in FRAMES.items():
        with case(name):
            fake.script("google", chunked(event(json.dumps(odd)), event(ENDED)))
            (await google.stream()).assert_whole(text)

            before = [event(frame_of([{"text": f"word{n} "}])) for n in range(9)]
            fake.script("google", chunked(*before, event(json.dumps(odd)), event(ENDED)))
            assert (await google.stream()).text == "".join(f"word{n} " for n in range(9)) + text

            fake.script("google", body(odd))
            assert (await google.chat()).text == text


async def test_a_number_on_the_other_wire_is_spelled_as_it_came(google, fake):
    raw = json.dumps(frame_of([{"text": "@"}])).replace('"@"', "6.50")
    fake.script("google", chunked(b"data: " + raw.encode() + b"\n\n", event(ENDED)))
    (await google.stream()).assert_whole("6.50")


@both_ways
async def test_a_call_of_any_form_on_the_other_wire_is_the_call_it_means(google, fake, streaming):
    forms = {
        "a whole number for an id": {"id": 7, "name": "f", "args": {"n": 1}},
        "arguments as text": {"name": "f", "args": '{"n": 1}'},
        "no id": {"name": "f", "args": {"n": 1}},
    }
    for name, form in forms.items():
        with case(name):
            frame = frame_of([{"functionCall": form}], finishReason="STOP")
            fake.script("google", chunked(event(frame)) if streaming else body(frame))
            got = await google.ask(streaming=streaming, tools=[TOOL])
            (made,) = got.calls if streaming else got.json["choices"][0]["message"]["tool_calls"]
            assert isinstance(made["id"], str)
            assert json.loads(made["function"]["arguments"]) == {"n": 1}


@pytest.mark.parametrize("odd", ["x", 7, [7], ["x"], True], ids=repr)
async def test_a_frame_that_stays_unreadable_is_a_failure(google, fake, odd):
    fake.script("google", chunked(event({"candidates": odd}), event(frame_of([{"text": "lost"}]))))
    got = await google.stream()
    assert got.text == "hello from b"
    assert got.headers["X-Fallback-Trail"] == "google/google-model=malformed"


async def test_the_real_client_reads_numbers_as_text(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(chunk("$"), delta_of("6"), STOP), answer())
    stream = await gateway.openai.chat.completions.create(
        model=IN_ORDER, messages=[{"role": "user", "content": "hi"}], stream=True
    )
    assert "".join([part.choices[0].delta.content or "" async for part in stream]) == "$6"
