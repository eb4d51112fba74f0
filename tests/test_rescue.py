"""Facts 3: tool calls written as text, thoughts in tags, broken arguments; and what only looks like them."""

import json
import time

import pytest
from conftest import both_ways, case
from fake_provider import body, chunk, completion, sse

from adapters import text_rescue as rescue
from adapters.text_gate import TextGate
from adapters.thoughts import split_thoughts


def tool(name: str, **properties: dict) -> dict:
    function = {"name": name, "description": "d", "parameters": {"type": "object", "properties": properties}}
    return {"type": "function", "function": function}


CITY, DAYS, TAGS = {"type": "string"}, {"type": "integer"}, {"type": "array", "items": {"type": "string"}}
TOOLS = [tool("weather", city=CITY, days=DAYS, tags=TAGS), tool("noop")]
DECLARED = rescue.declared_tools({"tools": TOOLS})
ROME = [("weather", {"city": "Rom"})]
JSON_CALL = '{"name": "weather", "arguments": {"city": "Rom"}}'

DIALECTS = {
    "sections": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "Rom"}<|tool_call_end|><|tool_calls_section_end|>',
        ROME,
    ),
    "two in a section": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
        '{"city": "Rom"}<|tool_call_end|><|tool_call_begin|>functions.noop:1<|tool_call_argument_begin|>'
        "{}<|tool_call_end|><|tool_calls_section_end|>",
        [*ROME, ("noop", {})],
    ),
    "fullwidth with a fence": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
        '```json\n{"city": "Rom"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
        ROME,
    ),
    "fullwidth": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{"city": "Rom"}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>",
        ROME,
    ),
    "a function tag": ('<function=weather>{"city": "Rom"}</function>', ROME),
    "a function tag left open": ('<function=weather{"city": "Rom"}</function>', ROME),
    "a tagged object": (f"<tool_call>\n{JSON_CALL}\n</tool_call>", ROME),
    "a tagged object with parameters": (f"<tool_call>{JSON_CALL.replace('arguments', 'parameters')}</tool_call>", ROME),
    "two tagged objects": (f"<tool_call>{JSON_CALL}</tool_call>\n<tool_call>{JSON_CALL}</tool_call>", ROME * 2),
    "a tagged object without its end": (f"<tool_call>{JSON_CALL}", ROME),
    "keys and values": (
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rom</arg_value>\n"
        "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>",
        [("weather", {"city": "Rom", "days": 3})],
    ),
    "a number that the schema calls text": (
        "<tool_call>weather<arg_key>city</arg_key><arg_value>007</arg_value></tool_call>",
        [("weather", {"city": "007"})],
    ),
    "no argument at all": ("<tool_call>noop</tool_call>", [("noop", {})]),
    "parameters one by one": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nRom\n</parameter>\n"
        '<parameter=tags>\n["a"]\n</parameter>\n</function>\n</tool_call>',
        [("weather", {"city": "Rom", "tags": ["a"]})],
    ),
    "bare JSON": (JSON_CALL, ROME),
    "fenced JSON": (f"```json\n{JSON_CALL}\n```", ROME),
    "a list in brackets": (f"[TOOL_CALLS][{JSON_CALL}]", ROME),
    "arguments encoded twice": ('{"name": "weather", "arguments": "{\\"city\\": \\"Rom\\"}"}', ROME),
}


def read(calls: list[dict]) -> list[tuple[str, dict]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


async def test_a_call_written_as_text_is_a_call(start_gateway, fake):
    gateway = await start_gateway()
    for name, (text, calls) in DIALECTS.items():
        with case(name):
            fake.script("a", completion(text))

            got = (await gateway.chat(tools=TOOLS)).json["choices"][0]

            assert read(got["message"]["tool_calls"]) == calls
            assert not got["message"]["content"]
            assert got["finish_reason"] == "tool_calls"
            assert len({call["id"] for call in got["message"]["tool_calls"]}) == len(calls)


@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_a_call_streamed_as_text_is_a_call_in_any_pieces(start_gateway, fake, size):
    gateway = await start_gateway()
    for name, (text, calls) in DIALECTS.items():
        with case(name):
            pieces = [text[at : at + size] for at in range(0, len(text), size)]
            fake.script("a", sse(chunk(role="assistant", content=""), *map(chunk, pieces), chunk(finish="stop")))

            got = await gateway.stream(tools=TOOLS)

            assert read(got.calls) == calls
            assert got.text == ""
            assert got.finishes == ["tool_calls"]
            got.assert_done_once()


async def test_text_before_a_call_stays(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", completion(f"I look it up.\n<tool_call>{JSON_CALL}</tool_call>"))

    message = (await gateway.chat(tools=TOOLS)).json["choices"][0]["message"]

    assert message["content"] == "I look it up."
    assert read(message["tool_calls"]) == ROME


NO_CALLS = {
    "an answer about tags": "Use `<tool_call>` like this: <tool_call>{}</tool_call>",
    "a tag in a code block": f"So:\n```\n<tool_call>{JSON_CALL}</tool_call>\n```",
    "an undeclared tool": '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    "JSON of another kind": '{"name": "Ada", "age": 36}',
    "JSON that names a tool but calls nothing": '{"name": "weather", "unit": "C"}',
    "a list": '["weather"]',
    "a code block": "```json\n[1, 2]\n```",
    "a letter in brackets": "[T] stands for tool",
    "a smaller-than sign": "<3 you",
    "an unknown tag": "<b>bold</b>",
    "a function tag of nothing": "<function=unknown>{}</function>",
    "white space first": "\n\n  plain",
}


@both_ways
async def test_what_only_looks_like_a_call_stays_text(start_gateway, fake, streaming):
    gateway = await start_gateway()
    for name, text in NO_CALLS.items():
        with case(name):
            pieces = [text[at : at + 3] for at in range(0, len(text), 3)]
            fake.script("a", sse(*map(chunk, pieces), chunk(finish="stop")) if streaming else completion(text))

            got = await gateway.ask(streaming=streaming, tools=TOOLS)

            assert got.text == text
            if streaming:
                assert got.chunks[: len(pieces)] == [chunk(piece) for piece in pieces]


@both_ways
async def test_without_tools_text_is_text(start_gateway, fake, streaming):
    gateway = await start_gateway()
    for name, (text, _) in DIALECTS.items():
        with case(name):
            fake.script("a", sse(chunk(text), chunk(finish="stop")) if streaming else completion(text))

            assert (await gateway.ask(streaming=streaming)).text == text


UNREADABLE = {
    "a lost name": "<|tool_calls_section_begin|><|tool_call_begin|>x_1<|tool_call_argument_begin|>{}<|tool_call_end|>",
    "broken JSON": '<tool_call>{"name": "weather", "arguments": {"city"</tool_call>',
    "a broken list": '[TOOL_CALLS][{"name"',
}


@both_ways
@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
async def test_a_call_that_cannot_be_read_is_a_lost_turn(start_gateway, fake, text, streaming):
    gateway = await start_gateway()
    fake.script("a", sse(chunk(text), chunk(finish="stop")) if streaming else completion(text))

    got = await gateway.ask(streaming=streaming, tools=TOOLS)

    assert got.text == "hello from b"
    assert got.headers["X-Fallback-Trail"] == "a/a-model=malformed"
    assert await gateway.cooled_models() == {}


@both_ways
async def test_a_call_that_the_server_could_not_read_is_read_here(start_gateway, fake, streaming):
    gateway = await start_gateway()
    failed = {"message": "Failed to call a function", "code": "tool_use_failed"}
    failed["failed_generation"] = '<function=weather>{"city": "Rom"}</function>'
    fake.script("a", body({"error": failed}, status=400))

    got = await gateway.ask(streaming=streaming, tools=TOOLS)

    assert read(got.calls if streaming else got.json["choices"][0]["message"]["tool_calls"]) == ROME
    assert fake.called == ["a"]


async def test_a_generation_that_is_no_call_fails_over(start_gateway, fake):
    gateway = await start_gateway()
    failed = {"message": "Failed", "code": "tool_use_failed", "failed_generation": "I cannot"}
    fake.script("a", body({"error": failed}, status=400))

    assert (await gateway.chat(tools=TOOLS)).text == "hello from b"


# --- Thoughts -----------------------------------------------------------------------------------------------------

THOUGHTS = {
    "think": ("<think>hm\nso</think>\n\nYes.", "hm\nso", "Yes."),
    "thinking": ("<thinking>hm</thinking>Yes.", "hm", "Yes."),
    "thought": ("\n<thought>hm</thought> Yes.", "hm", "Yes."),
    "none after all": ("<think></think>Yes.", "", "Yes."),
    "a tag in the answer": ("Write <think> first.", "", "Write <think> first."),
    "something like a tag": ("<thin>air</thin>", "", "<thin>air</thin>"),
}


@pytest.mark.parametrize("size", [0, 1, 4, 10_000])
async def test_thoughts_in_tags_are_reasoning(start_gateway, fake, size):
    gateway = await start_gateway()
    for name, (text, thoughts, rest) in THOUGHTS.items():
        with case(name):
            pieces = [chunk(text[at : at + size]) for at in range(0, len(text), size or 1)]
            fake.script("a", sse(*pieces, chunk(finish="stop")) if size else completion(text))

            got = await gateway.ask(streaming=bool(size))

            assert got.text == rest
            told = got.deltas if size else [got.json["choices"][0]["message"]]
            assert "".join(delta.get("reasoning_content", "") for delta in told) == thoughts
            assert not size or got.finishes == ["stop"]


async def test_an_answer_that_begins_in_mid_thought_is_parted(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", completion("hm, so\n</think>\n\nYes."))

    message = (await gateway.chat()).json["choices"][0]["message"]

    assert (message["reasoning_content"], message["content"]) == ("hm, so", "Yes.")


async def test_thoughts_that_never_end_are_the_answer_of_a_whole_body(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", completion("<think>the answer is 42"))

    assert (await gateway.chat()).text == "the answer is 42"


async def test_a_call_behind_thoughts_is_a_call(start_gateway, fake):
    gateway = await start_gateway()
    text = f"<think>I need it</think>\n<tool_call>{JSON_CALL}</tool_call>"
    fake.script("a", sse(*map(chunk, text), chunk(finish="stop")), completion(text))

    streamed = await gateway.stream(tools=TOOLS)
    whole = (await gateway.chat(tools=TOOLS)).json["choices"][0]["message"]

    assert read(streamed.calls) == read(whole["tool_calls"]) == ROME
    assert streamed.text == ""
    assert whole["reasoning_content"] == "I need it"


async def test_what_is_held_back_goes_out_when_only_the_end_marker_comes(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", sse(chunk("<th")))

    (await gateway.stream()).assert_whole("<th")


# --- JSON mode ----------------------------------------------------------------------------------------------------

JSON_MODE = {"response_format": {"type": "json_object"}}
IN_WORDS = {
    "as it is": (' {"a":  [1]}\n', ' {"a":  [1]}\n'),
    "a list": ("[1]", "[1]"),
    "a scalar": ("null", "null"),
    "in a fence": ('Here:\n```json\n{"a": 1}\n```\nDone.', '{"a": 1}'),
    "between words": ('Sure! {"a": {"b": [1]}} Anything else?', '{"a": {"b": [1]}}'),
    "a list of objects": ('It is [{"a": 1}, {"a": 2}].', '[{"a": 1}, {"a": 2}]'),
    "a fence of something else": ('```\nfoo\n``` and {"a": 1}', '{"a": 1}'),
    "an object with a fence in it": ('{"a": "```x```"}', '{"a": "```x```"}'),
    "words": ("I cannot do that.", None),
    "cut off": ('{"a": [1', None),
    "braces": ("{not json}", None),
    "nothing but a brace": ("{", None),
}


async def test_where_json_was_asked_for_there_is_nothing_else_or_another_model(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("b", completion('{"b": 1}'))
    for name, (text, expected) in IN_WORDS.items():
        fake.script("a", completion(text))
        got = await gateway.chat(**JSON_MODE)
        assert got.text == (expected or '{"b": 1}'), name
        assert expected or got.headers["X-Fallback-Trail"] == "a/a-model=malformed", name
        assert (await gateway.chat()).text == text

    assert await gateway.cooled_models() == {}


async def test_an_answer_that_cannot_be_json_is_not_judged_as_json(start_gateway, fake):
    gateway = await start_gateway()
    for answer, fields in (
        (completion('{"a": ', finish="length", usage=(5, 90)), {}),
        (completion("I cannot look it up."), {"tools": TOOLS}),
        (completion(None, message={"refusal": "No."}), {}),
    ):
        fake.script("a", answer)
        got = await gateway.chat(**JSON_MODE, **fields, max_tokens=100)
        assert got.headers["X-Routed-Via"] == "a/a-model"


# --- Arguments ----------------------------------------------------------------------------------------------------

NESTED = {
    "type": "object",
    "properties": {
        "tags": TAGS,
        "city": CITY,
        "either": {"type": ["string", "array"]},
        "deep": {"type": "object", "properties": {"tags": TAGS}},
    },
}
ARGUMENTS = {
    "as they are": ('{"a":  1}', '{"a":  1}'),
    "empty": ("", "{}"),
    "blank": (" \n", "{}"),
    "encoded twice": ('"{\\"a\\": 1}"', '{"a":1}'),
    "a list encoded twice": ('{"tags": "[\\"x\\"]"}', '{"tags":["x"]}'),
    "deep inside": ('{"deep": {"tags": "[]"}}', '{"deep":{"tags":[]}}'),
    "an object encoded twice with a list in it": ('{"deep": "{\\"tags\\": \\"[]\\"}"}', '{"deep":{"tags":[]}}'),
    "text that looks like a list": ('{"city": "[1]"}', '{"city": "[1]"}'),
    "where text is allowed too": ('{"either": "[1]"}', '{"either": "[1]"}'),
    "unknown to the schema": ('{"other": "[1]"}', '{"other": "[1]"}'),
    "text that is no list": ('{"tags": "[x"}', '{"tags": "[x"}'),
    "in a fence": ('```json\n{"a": 1}\n```', '{"a":1}'),
    "a comma too many": ('{"a": [1, 2,],}', '{"a":[1,2]}'),
    "a line end in a string": ('{"a": "x\ny"}', '{"a":"x\\ny"}'),
    "cut off": ('{"a": ', None),
    "a number": ("7", None),
    "words": ("Rome, please", None),
}


@pytest.mark.parametrize(("text", "mended"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_are_mended_as_far_as_they_can_be(text, mended):
    assert rescue.mended_arguments(text, NESTED) == mended


async def test_broken_arguments_lead_to_the_next_model(start_gateway, fake):
    gateway = await start_gateway()
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": '}}
    fake.script("a", completion(None, finish="tool_calls", message={"tool_calls": [call]}))

    assert (await gateway.chat(tools=TOOLS)).text == "hello from b"
    assert await gateway.cooled_models() == {}


async def test_arguments_cut_off_by_length_are_the_clients_to_see(start_gateway, fake):
    gateway = await start_gateway()
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": '}}
    fake.script("a", completion(None, finish="length", message={"tool_calls": [call]}, usage=(5, 90)))

    got = await gateway.chat(tools=TOOLS, max_tokens=100)

    assert got.json["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": '


# --- Cost -----------------------------------------------------------------------------------------------------------


def test_the_gate_opens_at_the_first_ordinary_word():
    gate = TextGate(DECLARED)
    assert gate.feed("Hello") == [("content", "Hello")]
    assert (gate.open, gate.untouched) == (True, True)


def test_a_hostile_text_is_read_in_no_time():
    began = time.process_time()
    for opening in (
        "<tool_call>",
        "<function=weather>",
        "[TOOL_CALLS][",
        "{",
        "```json\n{",
        "<think>",
        "<｜tool▁calls▁begin｜>",
    ):
        for filler in ("<tool_call>", "{", "<arg_key>", "<|tool_call_begin|>", " ", "</think", "<parameter=a>", "`"):
            text = opening + filler * (100_000 // len(filler))
            split_thoughts(text)
            try:
                rescue.text_and_calls(text, DECLARED)
            except rescue.Unreadable:
                continue
    assert time.process_time() - began < 3
