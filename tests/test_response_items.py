"""SPEC 9.1: what a Responses request becomes in chat's form, and what is refused. Pure tables."""

import pytest
from turns import PIXEL, call_of, parsed

from wire.chat import Mode
from wire.errors import InvalidRequest

USER = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
OTHER = {"type": "function_call", "call_id": "c2", "name": "g", "arguments": '{"x":1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "one"}
CHAT_CALL = call_of("c1", "f")
CHAT_OTHER = call_of("c2", "g", '{"x":1}')
SAID = {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed"}
SAID["content"] = [{"type": "output_text", "text": "well", "annotations": []}]
THOUGHT = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "hm"}]}
CHAT_RESULTS = [{"role": "tool", "tool_call_id": id, "content": "one"} for id in ("c1", "c2")]
TURNS = {
    "text": ("hi", [USER]),
    "a message without type": ([USER], [USER]),
    "a message with type": ([{"type": "message", **USER}], [USER]),
    "text parts": (
        [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    ),
    "developer and system items": (
        [
            USER,
            {"role": "developer", "content": "a"},
            {"role": "system", "content": [{"type": "input_text", "text": "b"}]},
        ],
        [{"role": "system", "content": "a\n\nb"}, USER],
    ),
    "an answer": ([USER, SAID, USER], [USER, {"role": "assistant", "content": "well"}, USER]),
    "a refusal": (
        [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, USER],
        [USER, {"role": "assistant", "content": "no"}, USER],
    ),
    "two answers in a row": ([USER, SAID, SAID], [USER, {"role": "assistant", "content": "well\nwell"}]),
    "an empty answer": ([USER, {"role": "assistant", "content": []}, USER], [USER, USER]),
    "calls alone": (
        [USER, CALL, OTHER, RESULT, RESULT | {"call_id": "c2"}],
        [USER, {"role": "assistant", "content": None, "tool_calls": [CHAT_CALL, CHAT_OTHER]}, *CHAT_RESULTS],
    ),
    "an answer and calls": (
        [USER, SAID, CALL, OTHER, RESULT, RESULT | {"call_id": "c2"}],
        [USER, {"role": "assistant", "content": "well", "tool_calls": [CHAT_CALL, CHAT_OTHER]}, *CHAT_RESULTS],
    ),
    "a call and then an answer": (
        [USER, CALL, SAID, RESULT],
        [
            USER,
            {"role": "assistant", "content": "well", "tool_calls": [CHAT_CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "one"},
        ],
    ),
    "reasoning before a call": (
        [USER, THOUGHT, CALL, RESULT],
        [
            USER,
            {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [CHAT_CALL]},
            CHAT_RESULTS[0],
        ],
    ),
    "reasoning between calls": (
        [USER, THOUGHT, CALL, THOUGHT, OTHER, RESULT, RESULT | {"call_id": "c2"}],
        [
            USER,
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "hm\nhm",
                "tool_calls": [CHAT_CALL, CHAT_OTHER],
            },
            *CHAT_RESULTS,
        ],
    ),
    "reasoning that led to nothing": (
        [USER, THOUGHT, USER, SAID],
        [USER, USER, {"role": "assistant", "content": "well"}],
    ),
    "results that come late": (
        [USER, CALL, OTHER, RESULT, USER, RESULT | {"call_id": "c2"}],
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CHAT_CALL, CHAT_OTHER]},
            *CHAT_RESULTS,
            USER,
        ],
    ),
    "a result of parts": (
        [USER, CALL, RESULT | {"output": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}],
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CHAT_CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "a\nb"},
        ],
    ),
    "a result that is an object": (
        [USER, CALL, RESULT | {"output": {"degrees": 22}}],
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CHAT_CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": '{"degrees":22}'},
        ],
    ),
    "a result that is any list": (
        [USER, CALL, RESULT | {"output": [1, {"type": [2]}]}],
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CHAT_CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": '[1,{"type":[2]}]'},
        ],
    ),
    "images in results": (
        [
            USER,
            CALL,
            OTHER,
            RESULT | {"output": [{"type": "input_image", "image_url": PIXEL}]},
            RESULT | {"call_id": "c2"},
        ],
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CHAT_CALL, CHAT_OTHER]},
            {"role": "tool", "tool_call_id": "c1", "content": "[image]"},
            {"role": "tool", "tool_call_id": "c2", "content": "one"},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Images from the tool results above:"},
                    {"type": "image_url", "image_url": {"url": PIXEL}},
                ],
            },
        ],
    ),
    "items of built-in tools and unknown ones": (
        [
            {"type": "web_search_call", "id": "ws_1", "status": "completed"},
            {"type": "computer_call", "call_id": "c9", "action": {}},
            {"type": "computer_call_output", "call_id": "c9", "output": {"type": "computer_screenshot"}},
            {"type": "of_tomorrow", "x": [1]},
            USER,
        ],
        [USER],
    ),
    "a file": (
        [{"role": "user", "content": [{"type": "input_file", "filename": "a.pdf", "file_data": "data:x"}]}],
        [{"role": "user", "content": [{"type": "file", "file": {"filename": "a.pdf", "file_data": "data:x"}}]}],
    ),
}


@pytest.mark.parametrize(("input", "messages"), TURNS.values(), ids=TURNS)
def test_items_become_turns(input, messages):
    assert parsed(input=input).body["messages"] == messages


FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
F = {"type": "function", "function": FUNCTION}
G = {"type": "function", "function": FUNCTION | {"name": "g"}}
FIELDS = {
    "a flat tool": ({"tools": [{"type": "function", **FUNCTION, "strict": None}]}, {"tools": [F]}),
    "a nested tool": ({"tools": [F]}, {"tools": [F]}),
    "a tool without type or parameters": ({"tools": [{"name": "f"}]}, {"tools": [F]}),
    "built-in tools": ({"tools": [{"type": "web_search"}, F, {"type": "file_search"}]}, {"tools": [F]}),
    "nothing but built-in tools": ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, {}),
    "a choice by name": (
        {"tools": [F], "tool_choice": {"type": "function", "name": "f"}},
        {"tools": [F], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    ),
    "a choice of a built-in tool": ({"tools": [F], "tool_choice": {"type": "web_search"}}, {"tools": [F]}),
    "a choice without sense": ({"tools": [F], "tool_choice": {"type": [1]}}, {"tools": [F]}),
    "a choice by mode": ({"tools": [F], "tool_choice": "none"}, {"tools": [F], "tool_choice": "none"}),
    "allowed tools": (
        {
            "tools": [F, G],
            "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]},
        },
        {"tools": [G], "tool_choice": "required"},
    ),
    "text": ({"text": {"format": {"type": "text"}, "verbosity": "low"}}, {}),
    "a form left empty": ({"text": {"format": {}, "verbosity": "medium"}}, {}),
    "any object": ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
    "a schema": (
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": None}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}},
    ),
    "effort": ({"reasoning": {"effort": "xhigh"}}, {"reasoning_effort": "high"}),
    "a limit": ({"max_output_tokens": 9, "top_p": 0.5, "seed": 1}, {"max_tokens": 9, "top_p": 0.5, "seed": 1}),
    "what concerns providers not": (
        {"include": ["x"], "store": True, "metadata": {}, "truncation": "auto", "client_metadata": {"a": 1}},
        {},
    ),
    "nulls": ({"tools": None, "text": None, "reasoning": None, "previous_response_id": None, "background": None}, {}),
}


@pytest.mark.parametrize(("request_fields", "sent"), FIELDS.values(), ids=FIELDS)
def test_fields_become_chats_fields(request_fields, sent):
    assert parsed(**request_fields).body == {"messages": [USER], **sent}


def test_mode_stream_and_estimates_are_those_of_chat():
    chat = parsed(model="auto-smart", stream=True, instructions="x" * 400, tools=[F], max_output_tokens=50)

    assert (chat.need.mode, chat.need.pinned, chat.stream, chat.need.tools) == (Mode.SMART, None, True, True)
    assert chat.first_user_text == "hi"
    assert 150 < chat.need.tokens < 250


# --- What is refused --------------------------------------------------------------------------------------------

IMAGE_PART = {"type": "input_image"}


def in_content(*parts):
    return [{"role": "user", "content": [{"type": "input_text", "text": "hi"}, *parts]}]


REFUSED = {
    "no input": ({"input": None}, "input"),
    "an empty input": ({"input": []}, "input"),
    "nothing but unknown items": ({"input": [{"type": "x"}]}, "input"),
    "an input of a number": ({"input": 5}, "input"),
    "an item that is none": ({"input": [USER, "hi"]}, "input[1]"),
    "an item without role": ({"input": [{"content": "hi"}]}, "input[0].role"),
    "a role of chat": ({"input": [{"role": "tool", "content": "hi"}]}, "input[0].role"),
    "content of a number": (
        {"input": [{"role": "developer", "content": "x"}, USER | {"content": 5}]},
        "input[1].content",
    ),
    "a part of a number": ({"input": in_content(5)}, "input[0].content[1]"),
    "text of a number": ({"input": in_content({"type": "input_text", "text": 5})}, "input[0].content[1].text"),
    "an answer of numbers": ({"input": [{"role": "assistant", "content": [5]}]}, "input[0].content[0].text"),
    "an image without url": ({"input": in_content(IMAGE_PART)}, "input[0].content[1].image_url"),
    "an image by file id": ({"input": in_content(IMAGE_PART | {"file_id": "f"})}, "input[0].content[1].file_id"),
    "a file by id": ({"input": in_content({"type": "input_file", "file_id": "f"})}, "input[0].content[1]"),
    "audio": ({"input": in_content({"type": "input_audio", "input_audio": {}})}, "input[0].content[1]"),
    "a call without id": ({"input": [USER, CALL | {"call_id": None}]}, "input[1].call_id"),
    "a call without name": ({"input": [USER, SAID, CALL, OTHER | {"name": None}]}, "input[3]"),
    "a result without call": ({"input": [USER, RESULT]}, "input[1].call_id"),
    "a late result of a number": ({"input": [USER, CALL, USER, RESULT | {"output": 5}]}, "input[3].output"),
    "a result of a number": ({"input": [USER, CALL, RESULT | {"output": 5}]}, "input[2].output"),
    "an unknown reference": ({"input": [USER, {"type": "item_reference", "id": "msg_0"}]}, "input[1].id"),
    "an unknown response": ({"previous_response_id": "resp_0"}, "previous_response_id"),
    "a response of a number": ({"previous_response_id": 5}, "previous_response_id"),
    "in the background": ({"background": True}, "background"),
    "a conversation": ({"conversation": "conv_1"}, "conversation"),
    "a template": ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    "instructions of items": ({"instructions": [USER]}, "instructions"),
    "a limit of text": ({"max_output_tokens": "many"}, "max_output_tokens"),
    "a temperature of text": ({"temperature": "hot"}, "temperature"),
    "reasoning of text": ({"reasoning": "high"}, "reasoning"),
    "effort of a number": ({"reasoning": {"effort": 5}}, "reasoning.effort"),
    "text that is text": ({"text": "json"}, "text"),
    "a format of text": ({"text": {"format": "json"}}, "text.format"),
    "a schema that is missing": ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    "metadata of text": ({"metadata": "x"}, "metadata"),
    "store of a number": ({"store": 5}, "store"),
    "stream of text": ({"stream": "maybe"}, "stream"),
    "tools that are none": ({"tools": {"f": 1}}, "tools"),
    "a tool of a number": ({"tools": [F, 5]}, "tools[1]"),
    "a tool whose type is a list": ({"tools": [{"type": ["function"], "name": "f"}]}, "tools[0].type"),
    "a tool without name": ({"tools": [{"type": "web_search"}, {"type": "function"}]}, "tools[1]"),
    "a name of a number": ({"tools": [{"type": "function", "name": 5}]}, "tools[0].name"),
    "parameters of text": ({"tools": [{"type": "function", "name": "f", "parameters": "x"}]}, "tools[0].parameters"),
    "a choice of a number": ({"tools": [F], "tool_choice": 5}, "tool_choice"),
    "a choice without name": ({"tools": [F], "tool_choice": {"type": "function"}}, "tool_choice.name"),
    "allowed tools that are none": ({"tool_choice": {"type": "allowed_tools", "tools": 5}}, "tool_choice.tools"),
}


@pytest.mark.parametrize(("fields", "param"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_misread_is_refused_in_the_clients_own_terms(fields, param):
    with pytest.raises(InvalidRequest) as refused:
        parsed(**fields)

    assert (refused.value.param, refused.value.status) == (param, 400)
    assert "messages" not in refused.value.message
    assert "function" not in refused.value.message or "tools" not in param


@pytest.mark.parametrize("type", ["computer", "computer_use_preview"])
def test_the_use_of_a_computer_is_refused_and_not_left_out(type):
    with pytest.raises(InvalidRequest) as refused:
        parsed(tools=[F, {"type": type, "display_width": 1024, "display_height": 768}])

    assert (refused.value.status, refused.value.param, refused.value.code) == (422, "tools[1]", "unsupported_tool")
