"""SPEC 3.5, further: shapes of other APIs in chat bodies, what tools really answer, custom tools; what a provider then
gets, and what the client is told."""

import json

import pytest
from conftest import IN_ORDER, assert_error, both_ways, case
from fake_provider import chunk, completion, sse

PNG = "iVBORw0KGgo="
HI = {"role": "user", "content": "hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALL_2 = CALL | {"id": "c2"}
ASKED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
ASKED_TWICE = ASKED | {"tool_calls": [CALL, CALL_2]}
TOLD = {"role": "tool", "tool_call_id": "c1", "content": "done"}
IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
CAPTION = {"type": "text", "text": "Images from the tool results above:"}
SCHEMA = {"type": "object", "properties": {"a": {"type": ["string", "null"], "default": None}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "g", "parameters": SCHEMA}}
GONE = object()  # the provider must not get this field


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def said(*parts: object) -> dict:
    return {"role": "user", "content": list(parts)}


def told(content: object) -> list[dict]:
    return [HI, ASKED, TOLD | {"content": content}]


def as_json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


RESOURCE = {"type": "resource", "resource": {"uri": "file:///a.txt", "mimeType": "text/plain", "text": "whole file"}}
FOUND = {"type": "search_result", "title": "T", "url": "https://x", "content": None}
RESULTS = {
    "an object": ({"a": None, "b": [1]}, '{"a":null,"b":[1]}'),
    "an object of one text": ({"type": "text", "text": "done"}, "done"),
    "a part of type json": ([{"type": "json", "json": {"a": 1}}], as_json([{"type": "json", "json": {"a": 1}}])),
    "a resource": ([RESOURCE], as_json([RESOURCE])),
    "a resource beside text": ([text("here:"), RESOURCE], "here:\n" + as_json(RESOURCE)),
    "a file": ([{"type": "file", "file": {"file_id": "f1"}}], as_json([{"type": "file", "file": {"file_id": "f1"}}])),
    "search results": ([FOUND, FOUND], as_json([FOUND, FOUND])),
    "plain objects": ([{"id": 1}, {"id": None}], '[{"id":1},{"id":null}]'),
    "numbers": ([1, 2.5, True], "[1,2.5,true]"),
    "a list of lists": ([["a", 1]], '[["a",1]]'),
    "bare texts": (["a", "b"], "a\nb"),
    "texts and a number": (["a", 5], "a\n5"),
    "nothing": ([], ""),
    "nulls": ([None], ""),
    "a text that is none": ([{"type": "text", "text": 5}], as_json([{"type": "text", "text": 5}])),
    "an image that is none": (
        [text("a"), {"type": "image", "x": 1}],
        "a\n" + as_json({"type": "image", "x": 1}),
    ),
}


@pytest.fixture
async def gateway(start_gateway):
    return await start_gateway({"a": {"model": {"vision": True}}})


async def received(gateway, fake, messages: list, **fields: object) -> dict:
    assert (await gateway.chat(messages=messages, **fields)).status == 200
    return fake.requests[-1].json


async def test_what_a_tool_has_said_is_never_lost(gateway, fake):
    for name, (content, arrived) in RESULTS.items():
        with case(name):
            assert (await received(gateway, fake, told(content)))["messages"] == told(arrived)
        with case(f"{name}, in a block"):
            block = {"type": "tool_result", "tool_use_id": "c1", "content": content}
            assert (await received(gateway, fake, [HI, ASKED, said(block)]))["messages"] == told(arrived)


IMAGES = {
    "chat's": IMAGE,
    "with its address alone": {"type": "image_url", "image_url": IMAGE["image_url"]["url"]},
    "of an MCP server": {"type": "image", "data": PNG, "mimeType": "image/png"},
    "of the Messages API": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}},
    "of the Responses API": {"type": "input_image", "image_url": IMAGE["image_url"]["url"]},
}


async def test_images_among_results_are_shown_by_the_user(gateway, fake):
    for name, image in IMAGES.items():
        with case(name):
            messages = (await received(gateway, fake, told([text("one"), image, {"n": 1}])))["messages"]
            assert messages == [*told('one\n{"n":1}'), said(CAPTION, IMAGE)]
        with case(f"{name}, alone"):
            assert (await received(gateway, fake, told([image])))["messages"] == [
                *told("[image]"),
                said(CAPTION, IMAGE),
            ]


USED = {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": None}}
CALLED = ASKED | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": '{"a":null}'}}]}
DONE = {"type": "tool_result", "tool_use_id": "c1", "content": "done"}
BLOCKS = {
    "a call": ([HI, {"role": "assistant", "content": [USED]}, said(DONE)], [HI, CALLED, TOLD]),
    "a call beside text": (
        [HI, {"role": "assistant", "content": [text("a"), USED]}, said(DONE)],
        [HI, CALLED | {"content": [text("a")]}, TOLD],
    ),
    "a result beside text": (
        [HI, {"role": "assistant", "content": [USED]}, said(text("and now?"), DONE)],
        [HI, CALLED, TOLD, said(text("and now?"))],
    ),
    "two calls, answered the other way round": (
        [HI, {"role": "assistant", "content": [USED, USED | {"id": "c2"}]}, said(DONE | {"tool_use_id": "c2"}, DONE)],
        [
            HI, CALLED | {"tool_calls": [CALLED["tool_calls"][0], CALLED["tool_calls"][0] | {"id": "c2"}]},
            TOLD, TOLD | {"tool_call_id": "c2"},
        ],
    ),
    "a failed result": (
        [HI, {"role": "assistant", "content": [USED]}, said(DONE | {"is_error": True})],
        [HI, CALLED, TOLD | {"content": "[The tool reported an error]\ndone"}],
    ),
    "a result in blocks": (
        [HI, {"role": "assistant", "content": [USED]}, said(DONE | {"content": [text("a"), text("b")]})],
        [HI, CALLED, TOLD | {"content": "a\nb"}],
    ),
    "a result without content": (
        [HI, {"role": "assistant", "content": [USED]}, said({"type": "tool_result", "tool_use_id": "c1"})],
        [HI, CALLED, TOLD | {"content": ""}],
    ),
    "chat's call and a block's result": ([HI, ASKED, said(DONE)], [HI, ASKED, TOLD]),
    "a document": (
        [said({"type": "document", "title": "T", "source": {"type": "text", "data": "words"}})],
        [said(text("T\nwords"))],
    ),
    "thoughts": (
        [HI, {"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}, text("a")]}, HI],
        [HI, {"role": "assistant", "content": [text("a")]}, HI],
    ),
}  # fmt: skip


async def test_blocks_of_the_messages_api_are_understood_in_chat(gateway, fake):
    for name, (sent, arrived) in BLOCKS.items():
        with case(name):
            assert (await received(gateway, fake, sent))["messages"] == arrived


PDF = "data:application/pdf;base64,JVBERi0="
FILE = {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF}}
FILES = {
    "nested": (FILE, FILE),
    "nested with more": (
        FILE | {"file": FILE["file"] | {"format": "x"}},
        FILE | {"file": FILE["file"] | {"format": "x"}},
    ),
    "flat": ({"type": "file", "filename": "a.pdf", "file_data": PDF}, FILE),
    "of the Responses API": ({"type": "input_file", "filename": "a.pdf", "file_data": PDF}, FILE),
    "of the Responses API, nested": ({"type": "input_file", "file": {"filename": "a.pdf", "file_data": PDF}}, FILE),
    "as bare base64": ({"type": "file", "filename": "a.pdf", "data": "JVBERi0=", "mediaType": "application/pdf"}, FILE),
    "as bare base64 of no kind": ({"type": "file", "file": {"filename": "a.pdf", "file_data": "JVBERi0="}}, FILE),
    "by its address": (
        {"type": "input_file", "file_url": "https://x/a.pdf"},
        {"type": "file", "file": {"file_data": "https://x/a.pdf"}},
    ),
    "of the Messages API": (
        {"type": "document", "title": "a.pdf", "source": {"media_type": "application/pdf", "data": "JVBERi0="}},
        FILE,
    ),
}


async def test_files_arrive_in_one_form(gateway, fake):
    for name, (part, arrived) in FILES.items():
        with case(name):
            assert (await received(gateway, fake, [said(part)]))["messages"] == [said(arrived)]
    got = await gateway.chat(messages=[said({"type": "file", "file": {"file_id": "f1"}})])
    assert_error(got, 400, "invalid_request_error", None)
    assert got.error["param"] == "messages[0].content[0]"


NULLS = {
    "in a part": ([said(text("a") | {"cache_control": None})], [said(text("a"))]),
    "a part": ([said(None, text("a"), None)], [said(text("a"))]),
    "in an image": (
        [said(IMAGE | {"image_url": IMAGE["image_url"] | {"detail": None}})],
        [said(IMAGE)],
    ),
    "in a call": (
        [
            HI,
            ASKED | {"refusal": None, "tool_calls": [CALL | {"index": None, "extra": {"a": None}}]},
            TOLD | {"name": None},
        ],
        [HI, ASKED, TOLD],
    ),
    "in arguments": (
        [HI, ASKED | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": {"a": None}}}]}, TOLD],
        [HI, ASKED | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": '{"a":null}'}}]}, TOLD],
    ),
}


async def test_nulls_are_left_out_at_any_depth_but_in_arguments(gateway, fake):
    for name, (sent, arrived) in NULLS.items():
        with case(name):
            assert (await received(gateway, fake, sent))["messages"] == arrived


async def test_nulls_are_left_out_of_every_field_but_of_schemas(gateway, fake):
    fake.script("a", completion("{}"))
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": None, "schema": SCHEMA}}
    sent = await received(
        gateway, fake, [HI], response_format=wanted, metadata={"a": None, "b": {"c": None}}, x={"y": [{"z": None}]},
        tools=[TOOL | {"function": TOOL["function"] | {"strict": None}, "cache_control": None}],
        stream_options={"include_usage": None}, reasoning={"effort": None}, logit_bias={"1": None},
    )  # fmt: skip

    assert sent["response_format"] == {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    assert sent["metadata"] == {"b": {}}
    assert sent["x"] == {"y": [{}]}
    assert sent["tools"] == [TOOL]
    assert sent["logit_bias"] == {}
    assert "null" not in json.dumps(sent).replace(json.dumps(SCHEMA), "")


TOOLS = {
    "input_schema": ([{"name": "f", "description": "d", "input_schema": SCHEMA}], [TOOL]),
    "input_schema, called custom": (
        [{"type": "custom", "name": "f", "description": "d", "input_schema": SCHEMA, "cache_control": {}}],
        [TOOL],
    ),
    "the same twice": ([TOOL, TOOL, OTHER, TOOL], [TOOL, OTHER]),
    "the same in two forms": ([TOOL, {"name": "f", "input_schema": SCHEMA}], [TOOL]),
    "one of a server": ([{"type": "web_search"}, TOOL, {"type": "mcp", "server_url": "x"}], [TOOL]),
    "one of a server with its name": ([{"type": "web_search_20250305", "name": "web_search"}, TOOL], [TOOL]),
    "one of a server in a function's form": (
        [{"type": "builtin_function", "function": {"name": "$web_search"}}, TOOL],
        [TOOL],
    ),
    "one of a server without a type": ([{"googleSearch": {}}, TOOL], [TOOL]),
    "a null": ([None, TOOL], [TOOL]),
    "nothing but a server's": ([{"type": "web_search"}], GONE),
}
CHOICES = {
    "one of a server": ([{"type": "web_search"}, TOOL], {"type": "web_search"}, GONE),
    "one of a server by name": ([{"type": "file_search"}, TOOL], {"type": "file_search"}, GONE),
    "some of them": (
        [TOOL, OTHER],
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [OTHER | {"function": {"name": "g"}}]},
        },
        "required",
    ),
    "a tool in words": ([TOOL], {"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
}


async def test_tools_of_any_api_are_offered_as_functions_each_once(gateway, fake):
    for name, (tools, arrived) in TOOLS.items():
        with case(name):
            sent = await received(gateway, fake, [HI], tools=tools, tool_choice="auto")
            assert sent.get("tools", GONE) == arrived
            assert ("tool_choice" in sent) == (arrived is not GONE)


async def test_a_choice_of_tools_is_kept_where_there_is_such_a_tool(gateway, fake):
    for name, (tools, choice, arrived) in CHOICES.items():
        with case(name):
            sent = await received(gateway, fake, [HI], tools=tools, tool_choice=choice)
            assert sent.get("tool_choice", GONE) == arrived
            if name == "some of them":
                assert sent["tools"] == [OTHER]


# --- Custom tools ---------------------------------------------------------------------------------------------------

GRAMMAR = {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: /.+/"}}
CUSTOM = {"type": "custom", "custom": {"name": "patch", "description": "Patches.", "format": GRAMMAR}}
FLAT = {"type": "custom", "name": "patch", "description": "Patches."}
PATCH = '*** Begin\n+"x"\n'


def calls_patch(*more: dict) -> list[dict]:
    function = {"name": "patch", "arguments": json.dumps({"input": PATCH})}
    return [{"id": "c1", "type": "function", "function": function}, *more]


@pytest.mark.parametrize("tool", [CUSTOM, FLAT], ids=["nested", "flat"])
@pytest.mark.parametrize(
    "choice", [{"type": "custom", "custom": {"name": "patch"}}, {"type": "custom", "name": "patch"}]
)
async def test_a_custom_tool_is_offered_as_a_function_and_answered_as_the_client_knows_it(gateway, fake, tool, choice):
    fake.script("a", completion(None, finish="tool_calls", message={"tool_calls": calls_patch(CALL_2)}))

    got = await gateway.chat(tools=[tool, TOOL], tool_choice=choice)

    offered = fake.requests[0].json["tools"][0]
    assert (offered["type"], offered["function"]["name"]) == ("function", "patch")
    assert offered["function"]["parameters"]["required"] == ["input"]
    assert "Patches." in offered["function"]["description"]
    assert ("start: /.+/" in offered["function"]["description"]) == (tool is CUSTOM)
    assert fake.requests[0].json["tool_choice"] == {"type": "function", "function": {"name": "patch"}}
    assert got.json["choices"][0]["message"]["tool_calls"] == [
        {"id": "c1", "type": "custom", "custom": {"name": "patch", "input": PATCH}},
        CALL_2,
    ]


async def test_a_custom_tools_calls_are_streamed_as_the_client_knows_them(gateway, fake):
    arguments = json.dumps({"input": PATCH})
    pieces = [
        {"index": 0, "id": "c1", "type": "function", "function": {"name": "patch", "arguments": ""}},
        {"index": 0, "function": {"arguments": arguments[:5]}},
        {"index": 0, "function": {"arguments": arguments[5:]}},
        {"index": 1, "id": "c2", "type": "function", "function": {"name": "f", "arguments": "{}"}},
    ]
    fake.script("a", sse(*(chunk(tool_calls=[piece]) for piece in pieces), chunk(finish="tool_calls")))

    got = await gateway.stream(tools=[CUSTOM, TOOL])

    told = [call for delta in got.deltas for call in delta.get("tool_calls", ())]
    custom = [call for call in told if call["index"] == 0]
    assert custom[0]["id"] == "c1" and custom[0]["type"] == "custom" and custom[0]["custom"]["name"] == "patch"
    assert "".join(call["custom"].get("input", "") for call in custom) == PATCH
    assert not any("function" in call for call in custom)
    functions = [call for call in told if call["index"] == 1]
    assert functions[0]["function"]["name"] == "f"
    assert "".join(call["function"].get("arguments", "") for call in functions) == "{}"
    assert got.finishes == ["tool_calls"]
    got.assert_done_once()


async def test_openais_client_reads_a_streamed_custom_call(gateway, fake):
    fake.script("a", lambda request: completion(None, finish="tool_calls", message={"tool_calls": calls_patch()}))

    whole = await gateway.openai.chat.completions.create(model=IN_ORDER, messages=[HI], tools=[CUSTOM])

    (call,) = whole.choices[0].message.tool_calls
    assert (call.type, call.custom.name, call.custom.input) == ("custom", "patch", PATCH)


@both_ways
async def test_a_custom_tool_with_an_unsafe_name_keeps_it_towards_the_client(gateway, fake, streaming):
    def answer(request):
        name = request.json["tools"][0]["function"]["name"]
        call = {"index": 0, "id": "c1", "type": "function", "function": {"name": name, "arguments": '{"input": "x"}'}}
        if request.streaming:
            return sse(chunk(tool_calls=[call]), chunk(finish="tool_calls"))
        return completion(None, finish="tool_calls", message={"tool_calls": [call]})

    fake.script("a", answer)

    got = await gateway.ask(streaming=streaming, tools=[FLAT | {"name": "server.patch"}])

    assert fake.requests[0].json["tools"][0]["function"]["name"] != "server.patch"
    told = got.deltas if streaming else [got.json["choices"][0]["message"]]
    calls = [call for part in told for call in part.get("tool_calls", ())]
    assert calls[0]["custom"]["name"] == "server.patch"
    assert "".join(call["custom"].get("input", "") for call in calls) == "x"


async def test_custom_calls_of_earlier_turns_are_functions_to_the_provider(gateway, fake):
    called = {"id": "c1", "type": "custom", "custom": {"name": "patch", "input": PATCH}}
    sent = await received(gateway, fake, [HI, ASKED | {"tool_calls": [called]}, TOLD], tools=[CUSTOM])

    (call,) = sent["messages"][1]["tool_calls"]
    assert call["type"] == "function" and call["function"]["name"] == "patch"
    assert json.loads(call["function"]["arguments"]) == {"input": PATCH}
    assert sent["messages"][2] == TOLD


# --- A Responses body at chat's address -----------------------------------------------------------------------------

INPUT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": "done"},
]


@both_ways
async def test_a_body_with_input_in_place_of_messages_is_answered_as_chat(gateway, fake, streaming):
    request = {
        "model": IN_ORDER, "input": INPUT, "stream": streaming, "max_output_tokens": 7, "store": False, "include": [],
        "tools": [{"type": "function", "name": "f", "description": "d", "parameters": SCHEMA}, {"type": "web_search"}],
        "text": {"format": {"type": "text"}}, "reasoning": {"effort": "low", "summary": "auto"},
        "stream_options": {"include_usage": True}, "prompt_cache_key": "k",
    }  # fmt: skip
    async with gateway.post(request) as response:
        body = await response.read()

    sent = fake.requests[0].json
    assert sent["messages"] == [{"role": "system", "content": "s"}, said(text("hi")), ASKED, TOLD]
    assert sent["tools"] == [TOOL]
    assert (sent["max_tokens"], sent["reasoning_effort"]) == (7, "low")
    assert sent.keys().isdisjoint({"input", "store", "include", "text", "reasoning", "max_output_tokens"})
    if streaming:
        assert b'"chat.completion.chunk"' in body and body.endswith(b"data: [DONE]\n\n")
    else:
        assert json.loads(body)["choices"][0]["message"]["content"] == "hello from a"


async def test_input_as_text_is_answered_as_chat_too(gateway):
    assert (await gateway.send({"model": IN_ORDER, "input": "hi"})).text == "hello from a"


ODD_INPUT = {
    "input": {"input": 5},
    "input[0]": {"input": ["x"]},
    "input[0].role": {"input": [{"role": "x", "content": "y"}]},
    "previous_response_id": {"input": "hi", "previous_response_id": "resp_1"},
    "temperature": {"input": "hi", "temperature": "warm"},
    "messages": {"input": "hi", "messages": []},
}


async def test_what_is_wrong_with_such_a_body_is_said_in_its_own_terms(gateway, fake):
    for param, request in ODD_INPUT.items():
        with case(param):
            got = await gateway.send(request)
            assert (got.status, got.error["param"]) == (400, param)
    assert fake.called == []
