"""SPEC 16.2: Messages requests in all their shapes, and the chat that each of them becomes."""

import json

import pytest
from conftest import case
from hypothesis import given
from hypothesis import strategies as st

from dialects.messages import MessagesDialect
from wire.chat import Chat
from wire.errors import GatewayError, InvalidRequest
from wire.jsontext import dump

NOW = 1_800_000_000.0
DIALECT = MessagesDialect(lambda: "t" * 24)
HI = {"role": "user", "content": "hi"}
CACHED = {"cache_control": {"type": "ephemeral"}}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBO"}}
DATA_URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO"}}


def parsed(**fields: object) -> Chat:
    request = {"model": "auto", "max_tokens": 100, "messages": [HI]} | fields
    return DIALECT.parse(json.dumps({k: v for k, v in request.items() if v is not ...}).encode(), NOW)


def text(words: str, **more: object) -> dict:
    return {"type": "text", "text": words, **more}


def user(*blocks: dict) -> dict:
    return {"role": "user", "content": list(blocks)}


def use(id: str, name: str = "f", **input: object) -> dict:
    return {"type": "tool_use", "id": id, "name": name, "input": input, **CACHED}


def result(id: str, content: object = ..., **more: object) -> dict:
    found = {"type": "tool_result", "tool_use_id": id, **more}
    return found if content is ... else found | {"content": content}


def asked(*calls: tuple[str, str, dict], content: str | None = None) -> dict:
    made = [{"id": i, "type": "function", "function": {"name": n, "arguments": dump(a).decode()}} for i, n, a in calls]
    return {"role": "assistant", "content": content, "tool_calls": made}


def told(content: str, id: str = "toolu_1") -> dict:
    return {"role": "tool", "tool_call_id": id, "content": content}


def tool(name: str, **more: object) -> dict:
    return {"name": name, "input_schema": {"type": "object", "properties": {}}, **more}


CALL = {"role": "assistant", "content": [use("toolu_1", city="Köln")]}
CALLED = asked(("toolu_1", "f", {"city": "Köln"}))

# --- Turns ------------------------------------------------------------------------------------------------------------

TURNS: dict[str, tuple[list[dict], list[dict]]] = {
    "text": ([HI], [HI]),
    "blocks of text": ([user(text("a", **CACHED), text("b"))], [{"role": "user", "content": "a\nb"}]),
    "a block that is no list": ([{"role": "user", "content": text("a")}], [{"role": "user", "content": "a"}]),
    "an image, by its data and by its address": (
        [
            user(
                IMAGE | CACHED,
                {"type": "image", "source": {"type": "url", "url": "https://x"}},
            )
        ],
        [{"role": "user", "content": [DATA_URL, {"type": "image_url", "image_url": {"url": "https://x"}}]}],
    ),
    "a document of text": (
        [
            user(
                {
                    "type": "document",
                    "title": "Notes",
                    "context": "of May",
                    "source": {"type": "text", "media_type": "text/plain", "data": "abc"},
                    "citations": {"enabled": True},
                },
                text("?"),
            )
        ],
        [{"role": "user", "content": "Notes\nof May\nabc\n?"}],
    ),
    "a document of blocks": (
        [
            user(
                {
                    "type": "document",
                    "source": {"type": "content", "content": [text("a"), IMAGE]},
                }
            )
        ],
        [{"role": "user", "content": [text("a"), DATA_URL]}],
    ),
    "a PDF": (
        [user({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "JVBE"}})],
        [
            {
                "role": "user",
                "content": [
                    {
                        "type": "file",
                        "file": {"filename": "document.pdf", "file_data": "data:application/pdf;base64,JVBE"},
                    }
                ],
            }
        ],
    ),
    "a search result": (
        [user({"type": "search_result", "source": "https://x", "title": "X", "content": [text("found")]})],
        [{"role": "user", "content": "X\nhttps://x\nfound"}],
    ),
    "a block of a kind unknown here": (
        [user({"type": "hologram", "data": 7})],
        [{"role": "user", "content": '{"type":"hologram","data":7}'}],
    ),
    "a system message within": (
        [HI, {"role": "system", "content": [text("Be brief.", **CACHED)]}, HI],
        [HI, {"role": "system", "content": "Be brief."}, HI],
    ),
    "a system message for the turn that is going on": (
        [HI, {"role": "system", "content": "Now.", "clear_at": "next_user_message"}],
        [HI, {"role": "system", "content": "Now."}],
    ),
    "a system message for a turn that is over": (
        [HI, {"role": "system", "content": "Then.", "clear_at": "next_user_message"}, HI],
        [HI, HI],
    ),
    "a system message without a word": ([HI, {"role": "system", "output_config": {"effort": "low"}}], [HI]),
    "thoughts": (
        [
            HI,
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm.", "signature": "x"},
                    {"type": "redacted_thinking", "data": "x"},
                    text("4"),
                ],
            },
            HI,
        ],
        [HI, {"role": "assistant", "content": "4", "reasoning_content": "Hm."}, HI],
    ),
    "a turn of thoughts alone": (
        [HI, {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": ""}]}, HI],
        [HI, HI],
    ),
    "a call and its result": (
        [HI, CALL, user(result("toolu_1", "sun"))],
        [HI, CALLED, told("sun")],
    ),
    "a result in blocks": (
        [HI, CALL, user(result("toolu_1", [text("sun", **CACHED), text("and rain")]))],
        [HI, CALLED, told("sun\nand rain")],
    ),
    "a result without content": (
        [HI, CALL, user(result("toolu_1"))],
        [HI, CALLED, told("")],
    ),
    "a result that is an object": (
        [HI, CALL, user(result("toolu_1", {"sky": "blue"}))],
        [HI, CALLED, told('{"sky":"blue"}')],
    ),
    "a result of another kind": (
        [HI, CALL, user(result("toolu_1", [{"type": "browser_state", "url": "https://x"}]))],
        [
            HI,
            CALLED,
            told('{"type":"browser_state","url":"https://x"}'),
        ],
    ),
    "a result that is a tool": (
        [HI, CALL, user(result("toolu_1", [{"type": "tool_reference", "tool_name": "g"}]))],
        [HI, CALLED, told("The tool g can be called now.")],
    ),
    "a result that is an error": (
        [HI, CALL, user(result("toolu_1", "no sky", is_error=True))],
        [HI, CALLED, told("[The tool reported an error]\nno sky")],
    ),
    "an error without a word": (
        [HI, CALL, user(result("toolu_1", is_error=True))],
        [HI, CALLED, told("[The tool reported an error]\n")],
    ),
    "a result behind a text": (
        [HI, CALL, user(text("Here."), result("toolu_1", "sun"))],
        [
            HI,
            CALLED,
            told("sun"),
            {"role": "user", "content": "Here."},
        ],
    ),
    "an image in a result": (
        [HI, CALL, user(result("toolu_1", [text("look"), IMAGE]), text("Well?"))],
        [
            HI,
            CALLED,
            told("look"),
            {"role": "user", "content": [text("Images from the tool results above:"), DATA_URL]},
            {"role": "user", "content": "Well?"},
        ],
    ),
    "results in another order than their calls": (
        [
            HI,
            {"role": "assistant", "content": [text("I look."), use("toolu_a"), use("toolu_b", "g")]},
            user(result("toolu_b", "2"), result("toolu_a", "1")),
        ],
        [
            HI,
            asked(("toolu_a", "f", {}), ("toolu_b", "g", {}), content="I look."),
            told("1", "toolu_a"),
            told("2", "toolu_b"),
        ],
    ),
    "what the API's own servers did": (
        [
            HI,
            {
                "role": "assistant",
                "content": [
                    {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "x"}},
                    {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []},
                    text("I have looked."),
                ],
            },
            HI,
        ],
        [HI, {"role": "assistant", "content": "I have looked."}, HI],
    ),
    "a summary of what was before": (
        [HI, {"role": "assistant", "content": [{"type": "compaction", "content": "We met."}]}, HI],
        [HI, {"role": "assistant", "content": "We met."}, HI],
    ),
    "an answer to be continued": (
        [HI, {"role": "assistant", "content": "The best is ("}],
        [HI, {"role": "assistant", "content": "The best is ("}],
    ),
}


def test_every_turn_becomes_chats_messages():
    for name, (turns, messages) in TURNS.items():
        with case(name):
            assert parsed(messages=turns).body["messages"] == messages


SYSTEM = {
    "none": (..., None),
    "text": ("Be brief.", "Be brief."),
    "blocks": ([text("Be brief.", **CACHED), text("Be kind.")], "Be brief.\n\nBe kind."),
    "a block that says who is asking": (
        [text("x-anthropic-billing-header: cc_version=2; cc_entrypoint=cli;"), text("Be brief.")],
        "Be brief.",
    ),
    "nothing": ("", None),
    "an empty list": ([], None),
}


def test_the_system_prompt_is_one_message_at_the_head():
    for name, (system, told) in SYSTEM.items():
        with case(name):
            messages = parsed(system=system).body["messages"]
            assert messages == [*([{"role": "system", "content": told}] if told else []), HI]


# --- Fields -----------------------------------------------------------------------------------------------------------

FIELDS: dict[str, tuple[dict, dict]] = {
    "as usual": ({}, {"max_tokens": 100}),
    "without a limit": ({"max_tokens": ...}, {}),
    "sampling": ({"temperature": 0.5, "top_p": 0.9, "top_k": 40}, {"temperature": 0.5, "top_p": 0.9, "top_k": 40}),
    "stops": ({"stop_sequences": ["a", "b"]}, {"stop": ["a", "b"]}),
    "no stops": ({"stop_sequences": []}, {}),
    "thinking": ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, {"reasoning_effort": "low"}),
    "much thinking": ({"thinking": {"type": "enabled", "budget_tokens": 31_999}}, {"reasoning_effort": "high"}),
    "thinking as it likes": ({"thinking": {"type": "adaptive", "display": "omitted"}}, {}),
    "no thinking": ({"thinking": {"type": "disabled"}}, {"reasoning_effort": "none"}),
    "an effort": ({"output_config": {"effort": "medium"}}, {"reasoning_effort": "medium"}),
    "an effort of this API alone": ({"output_config": {"effort": "max"}}, {"reasoning_effort": "high"}),
    "an effort beside thinking": (
        {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}},
        {"reasoning_effort": "low"},
    ),
    "an effort without thinking": (
        {"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}},
        {"reasoning_effort": "none"},
    ),
    "an effort for this turn": (
        {
            "output_config": {"effort": "low"},
            "messages": [HI, {"role": "system", "output_config": {"effort": "high"}}],
        },
        {"reasoning_effort": "high"},
    ),
    "a schema for the answer": (
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "object"}}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": {"type": "object"}},
            }
        },
    ),
    "what only Anthropic's servers read": (
        {
            "metadata": {"user_id": "u"}, "service_tier": "auto", "container": "c", "context_management": {"edits": []},
            "mcp_servers": [{"type": "url", "url": "https://x", "name": "x"}], "betas": ["x"], "inference_geo": "eu",
            "cache_control": {"type": "ephemeral"}, "speed": "fast", "something_new": {"a": 1},
            "output_config": {"task_budget": {"type": "tokens", "total": 9}},
        },
        {},
    ),
    "nulls": ({"system": None, "tools": None, "tool_choice": None, "thinking": None, "stop_sequences": None}, {}),
}  # fmt: skip


def test_fields_become_chats_or_are_left_out_whole():
    for name, (fields, told) in FIELDS.items():
        with case(name):
            body = parsed(**fields).body
            assert {k: v for k, v in body.items() if k != "messages"} == {"max_tokens": 100} | told or name == (
                "without a limit"
            )
    assert parsed(max_tokens=...).max_tokens is None


def test_the_clients_own_name_of_its_conversation_is_kept():
    assert parsed(metadata={"user_id": "user_1_session_2"}).conversation == "user_1_session_2"
    assert parsed(metadata={"user_id": 7}).conversation == parsed().conversation == ""


# --- Tools ------------------------------------------------------------------------------------------------------------


def addition(tool: dict) -> dict:
    return {"role": "system", "content": [{"type": "tool_addition", "tool": tool}]}


def removal(name: str) -> dict:
    return {"role": "system", "content": [{"type": "tool_removal", "tool": {"type": "tool_reference", "name": name}}]}


DEFERRED = tool("g", defer_loading=True)
OFFERED: dict[str, tuple[dict, list[str]]] = {
    "the client's own": ({"tools": [tool("f"), tool("g", type="custom")]}, ["f", "g"]),
    "none": ({"tools": []}, []),
    "what the API's own servers run": (
        {
            "tools": [
                tool("f"),
                {"type": "web_search_20260209", "name": "web_search", "max_uses": 5},
                {"type": "code_execution_20260521", "name": "code_execution"},
                {"type": "mcp_toolset", "mcp_server_name": "x"},
            ]
        },
        ["f"],
    ),
    "what the client runs for the API": (
        {
            "tools": [
                {"type": "bash_20250124", "name": "bash"},
                {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
            ]
        },
        ["bash", "str_replace_based_edit_tool"],
    ),
    "kept back until it is found": ({"tools": [tool("f"), DEFERRED]}, ["f"]),
    "found": (
        {
            "tools": [tool("f"), DEFERRED],
            "messages": [HI, CALL, user(result("toolu_1", [{"type": "tool_reference", "tool_name": "g"}]))],
        },
        ["f", "g"],
    ),
    "called before": (
        {
            "tools": [tool("f"), DEFERRED],
            "messages": [HI, {"role": "assistant", "content": [use("toolu_1", "g")]}, user(result("toolu_1", "x"))],
        },
        ["f", "g"],
    ),
    "all kept back": ({"tools": [DEFERRED]}, ["g"]),
    "kept back for a search that nobody here carries out": (
        {"tools": [{"type": "tool_search_tool_regex_20251119", "name": "search"}, tool("f"), DEFERRED]},
        ["f", "g"],
    ),
    "added on the way": (
        {"tools": [tool("f"), DEFERRED], "messages": [HI, addition({"type": "tool_reference", "name": "g"})]},
        ["f", "g"],
    ),
    "defined on the way": (
        {"tools": [tool("f")], "messages": [HI, addition({"type": "tool_definition", "definition": tool("h")})]},
        ["f", "h"],
    ),
    "withdrawn": ({"tools": [tool("f"), tool("g")], "messages": [HI, removal("g")]}, ["f"]),
    "withdrawn and added again": (
        {
            "tools": [tool("f"), tool("g")],
            "messages": [HI, removal("g"), HI, addition({"type": "tool_reference", "name": "g"})],
        },
        ["f", "g"],
    ),
    "kept by a summary": (
        {
            "tools": [tool("f"), DEFERRED],
            "messages": [
                {
                    "role": "assistant",
                    "content": [
                        {
                            "type": "compaction",
                            "content": "We met.",
                            "tool_changes": [
                                {"type": "tool_addition", "tool": {"type": "tool_reference", "name": "g"}}
                            ],
                        }
                    ],
                },
                HI,
            ],
        },
        ["f", "g"],
    ),
}


def test_what_the_client_runs_is_offered_when_its_time_has_come():
    for name, (fields, offered) in OFFERED.items():
        with case(name):
            assert [t["function"]["name"] for t in parsed(**fields).body.get("tools", [])] == offered


def test_a_tool_goes_out_without_what_only_this_api_knows():
    asked = tool("f", description="d", strict=True, eager_input_streaming=True, allowed_callers=["direct"], **CACHED)

    assert parsed(tools=[asked]).body["tools"] == [
        {
            "type": "function",
            "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
        }
    ]


CHOICES = {
    "auto": ({"type": "auto"}, "auto", ...),
    "any": ({"type": "any"}, "required", ...),
    "none": ({"type": "none"}, "none", ...),
    "a tool": ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}, ...),
    "a tool that is not there": ({"type": "tool", "name": "web_search"}, "auto", ...),
    "one by one": ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
    "in parallel": ({"type": "auto", "disable_parallel_tool_use": False}, "auto", ...),
}


def test_a_choice_becomes_chats():
    for name, (choice, told, parallel) in CHOICES.items():
        with case(name):
            body = parsed(tools=[tool("f")], tool_choice=choice).body
            assert (body["tool_choice"], body.get("parallel_tool_calls", ...)) == (told, parallel)
    assert "tool_choice" not in parsed(tool_choice={"type": "any"}).body


# --- Whatever comes ---------------------------------------------------------------------------------------------------

FILES = {"type": "image", "source": {"type": "file", "file_id": "file_1"}}
REFUSED = {
    "an image without a source": (user({"type": "image"}), "messages.0.content.0.source: Field required"),
    "an image without data": (
        user({"type": "image", "source": {"type": "base64"}}),
        "messages.0.content.0.source.data: Field required",
    ),
    "an image by a file's id": (user(FILES), "messages.0.content.0.source: Files are not kept here"),
    "a text that is none": (user(text(7)), "messages.0.content.0.text: Input should be a valid string"),
    "a result without its call": (user({"type": "tool_result"}), "messages.0.content.0.tool_result.tool_use_id: Field"),
    "a call without a name": (
        {"role": "assistant", "content": [{"type": "tool_use", "id": "x", "input": {}}]},
        "messages.0.content.0.tool_use.name: Field required",
    ),
    "a block in a result": (
        user(result("x", [text("a"), {"type": "image"}])),
        "messages.0.content.0.content.1.source: Field required",
    ),
}


def test_what_would_be_misread_is_refused_with_its_place():
    for name, (turn, words) in REFUSED.items():
        with case(name), pytest.raises(InvalidRequest) as refused:
            parsed(messages=[turn])
        assert refused.value.message.startswith(words), name
        assert refused.value.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["", "a", "user", "text", "tool", "auto"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)
KINDS = [
    "text",
    "image",
    "document",
    "tool_use",
    "tool_result",
    "thinking",
    "search_result",
    "compaction",
    "tool_addition",
]
BLOCK_FIELDS = [
    "text",
    "source",
    "id",
    "name",
    "input",
    "tool_use_id",
    "content",
    "is_error",
    "thinking",
    "tool",
    "title",
]
BLOCKS = st.builds(
    lambda kind, fields: {"type": kind, **fields},
    st.sampled_from(KINDS),
    st.dictionaries(st.sampled_from(BLOCK_FIELDS), JSON, max_size=4),
)
MESSAGES = st.builds(
    lambda role, content, more: {"role": role, "content": content, **more},
    st.sampled_from(["user", "assistant", "system"]),
    JSON | st.lists(BLOCKS, max_size=3),
    st.dictionaries(st.sampled_from(["clear_at", "output_config"]), JSON, max_size=1),
)
REQUESTS = st.builds(
    lambda messages, fields: {"messages": messages, **fields},
    st.lists(MESSAGES, max_size=4),
    st.dictionaries(
        st.sampled_from(
            ["model", "system", "tools", "tool_choice", "thinking", "output_config", "metadata", "max_tokens", "stream"]
        ),
        JSON | st.lists(BLOCKS, max_size=2),
        max_size=4,
    ),
)


@given(REQUESTS)
def test_any_request_becomes_a_chat_or_is_refused_with_words(request):
    raw = json.dumps(request).encode()
    try:
        chat = DIALECT.parse(raw, NOW)
    except GatewayError as error:
        assert error.message and 400 <= DIALECT.status(error) < 500
        told = json.loads(DIALECT.error(error, "req_1"))
        assert told["error"]["type"] == "invalid_request_error"
        return
    assert chat.body["messages"]
    assert chat.origin.input_tokens >= 1
    json.dumps(chat.body)
