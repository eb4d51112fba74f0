"""What clients were reported to send (SPEC 3.5, 9.1, 16.2), each of which was refused, lost or misread once."""

import json

import pytest
from conftest import IN_ORDER, both_ways, case
from fake_provider import body, chunk, completion, sse
from turns import WEATHER

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "weather", "parameters": SCHEMA}
USER = {"role": "user", "content": "hi"}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
OFFERED = [{"type": "function", "function": FUNCTION}]


@pytest.fixture
async def gateway(start_gateway):
    return await start_gateway({"a": {"model": {"vision": True}}})


# A schema by its other names, in each API.
SCHEMAS = {
    "an MCP server's tool": ("/v1/chat/completions", {"name": "weather", "inputSchema": SCHEMA}),
    "in a function": (
        "/v1/chat/completions",
        {"type": "function", "function": {"name": "weather", "input_schema": SCHEMA}},
    ),
    "as one SDK has it": ("/v1/chat/completions", {"name": "weather", "parametersJsonSchema": SCHEMA}),
    "Messages, an MCP server's": ("/v1/messages", {"name": "weather", "inputSchema": SCHEMA}),
    "Messages, flat": ("/v1/messages", {"name": "weather", "parameters": SCHEMA}),
    "Messages, as in chat": ("/v1/messages", {"type": "function", "function": FUNCTION}),
}


async def test_a_tools_parameters_are_not_lost_whatever_they_are_called(gateway, fake):
    for name, (path, tool) in SCHEMAS.items():
        with case(name):
            fake.clear()
            got = await gateway.send(
                {"model": IN_ORDER, "max_tokens": 9, "messages": [USER], "tools": [tool]}, path=path
            )
            assert got.status == 200
            assert fake.requests[0].json["tools"] == OFFERED


# How a client spells a field, and what the provider gets of it; ... for nothing.
FIELDS = {
    "a format by its type alone": ({"response_format": "json_object"}, {"response_format": {"type": "json_object"}}),
    "a format in short": ({"response_format": {"type": "json"}}, {"response_format": {"type": "json_object"}}),
    "nulls among stops": ({"stop": [None, "x"]}, {"stop": ["x"]}),
    "an empty choice": ({"tools": OFFERED, "tool_choice": ""}, {"tools": OFFERED, "tool_choice": ...}),
    "fields of a client that should have been merged": ({"extra_body": {"top_k": 5}}, {"top_k": 5, "extra_body": ...}),
    "a field that is there twice": ({"top_k": 3, "extra_body": {"top_k": 5}}, {"top_k": 3}),
}


async def test_fields_arrive_as_they_were_meant(gateway, fake):
    fake.script("a", completion("{}"))
    for name, (given, sent) in FIELDS.items():
        with case(name):
            fake.clear()
            assert (await gateway.chat(**given)).status == 200
            assert {field: fake.requests[0].json.get(field, ...) for field in sent} == sent


async def test_a_stream_may_be_asked_for_by_a_number(gateway):
    assert (await gateway.chat(stream=0)).json["object"] == "chat.completion"
    assert (await gateway.chat(stream=1)).headers["content-type"].startswith("text/event-stream")


async def test_a_mark_before_a_body_is_no_part_of_it(gateway, fake):
    for path, fields in (("/v1/chat/completions", {"messages": [USER]}), ("/v1/responses", {"input": "hi"})):
        content = b"\xef\xbb\xbf" + json.dumps({"model": IN_ORDER, **fields}).encode()
        assert (await gateway.send(content, path=path)).status == 200


CALLS = {
    "flat": {"id": "call_1", "name": "weather", "arguments": '{"city":"Bonn"}'},
    "flat, with its arguments as an object": {
        "id": "call_1",
        "name": "weather",
        "args": {"city": "Bonn"},
        "type": "tool_call",
    },
    "arguments as an object": {"id": "call_1", "function": {"name": "weather", "arguments": {"city": "Bonn"}}},
}


async def test_a_call_in_history_is_understood_in_any_form(gateway, fake):
    for name, call in CALLS.items():
        with case(name):
            fake.clear()
            turns = [USER, {"role": "assistant", "content": "", "tool_calls": [call]}, RESULT]
            assert (await gateway.chat(messages=turns)).status == 200
            (sent,) = fake.requests[0].json["messages"][1]["tool_calls"]
            function = {"name": "weather", "arguments": '{"city":"Bonn"}'}
            assert sent == {"id": "call_1", "type": "function", "function": function}


# --- Functions, as chat had them before tools -------------------------------------------------------------------------

CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Bonn"}'}}
ANSWERS = {"whole": completion(None, finish="tool_calls", message={"tool_calls": [CALL]})}
ANSWERS["streamed"] = sse(
    chunk("I look. ", role="assistant"), chunk(tool_calls=[{"index": 0, **CALL}]), chunk(finish="stop")
)


async def test_who_declares_functions_reads_the_call_in_the_older_form(gateway, fake):
    fake.script("a", ANSWERS["whole"])
    choice = (await gateway.chat(functions=[FUNCTION])).json["choices"][0]
    assert (choice["message"]["function_call"], choice["finish_reason"]) == (CALL["function"], "function_call")
    assert "tool_calls" not in choice["message"]
    assert fake.requests[0].json["tools"] == OFFERED
    fake.script("a", ANSWERS["streamed"])
    got = await gateway.stream(functions=[FUNCTION])
    told = [delta["function_call"] for delta in got.deltas if "function_call" in delta]
    assert got.text == "I look. "
    assert {key: "".join(piece.get(key) or "" for piece in told) for key in ("name", "arguments")} == CALL["function"]
    assert got.finishes == ["function_call"] and not got.calls
    got.assert_done_once()


@both_ways
async def test_who_declares_tools_reads_calls_of_tools_whatever_form_they_came_in(gateway, fake, streaming):
    older = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    fake.script("a", body({"choices": [{"index": 0, "message": older, "finish_reason": "function_call"}]}))
    got = await gateway.ask(streaming=streaming, tools=[WEATHER])
    calls = got.calls if streaming else got.json["choices"][0]["message"]["tool_calls"]
    assert [call["function"] for call in calls] == [CALL["function"]]


# --- Messages and Responses -------------------------------------------------------------------------------------------

IMAGE = {"url": "data:image/png;base64,AAAA"}
USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Bonn"}}
BLOCKS = {
    "a result of a number": (
        [
            USER,
            {"role": "assistant", "content": [USE]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": 42}]},
        ],
        "42",
    ),
    "an image as in chat": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": IMAGE}]}],
        [{"type": "image_url", "image_url": IMAGE}],
    ),
    "an image by its address alone": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": IMAGE["url"]}]}],
        [{"type": "image_url", "image_url": IMAGE}],
    ),
}


async def test_blocks_of_chat_are_understood_in_messages(gateway, fake):
    for name, (messages, sent) in BLOCKS.items():
        with case(name):
            fake.clear()
            got = await gateway.send({"model": IN_ORDER, "max_tokens": 9, "messages": messages}, path="/v1/messages")
            assert got.status == 200, got.body
            assert fake.requests[0].json["messages"][-1]["content"] == sent


ITEMS = {
    "a call with nothing but its id": [
        USER,
        {"type": "function_call", "id": "call_1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "sunny"},
    ],
    "a null among items": [USER, None],
    "one item without its list": USER,
}


async def test_items_are_understood_with_their_mistakes(gateway, fake):
    for name, items in ITEMS.items():
        with case(name):
            fake.clear()
            got = await gateway.send({"model": IN_ORDER, "input": items}, path="/v1/responses")
            assert got.status == 200, got.body
            assert fake.requests[0].json["messages"][0] == USER
