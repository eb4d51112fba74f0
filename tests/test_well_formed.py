"""Messages that are recognised as well formed go out as the text they came as; whatever the text, the request is the
one that reading and mending would have made of it."""

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.openai import OpenAIAdapter
from dialects.chat import ChatDialect, chat_from
from dialects.well_formed import recognised
from protection import UpstreamError
from routing.catalog import KEYLESS, Model, Platform, Prefill
from wire.chat import Chat
from wire.errors import InvalidRequest
from wire.jsontext import load_object

CATALOG = json.loads((Path(__file__).resolve().parent.parent / "catalog.json").read_text())
SINGLE_QUIRKS = (
    {"message_fields": ["role", "content"]}, {"flatten_content": True}, {"null_content_rejected": True},
    {"tool_call_id_pattern": "^[a-z]{9}$"}, {"replay_reasoning_content": True}, {"system_first": True},
    {"strict_turns": True}, {"strip_tool_schema_keys": ["title"]}, {"standard_fields_only": True},
    {"drop_message_fields": ["name"]}, {"drop": ["tools"]}, {"single_tool_call": True},
)  # fmt: skip
QUIRKS = [*(p["quirks"] for p in CATALOG["platforms"] if p["adapter"] == "openai" and p.get("quirks")), *SINGLE_QUIRKS]


def model_with(quirks: dict) -> Model:
    platform = Platform("p", "P", "openai", "http://127.0.0.1/v1", keyless=True)
    return Model(
        1, platform, "m", "M", 1, 1, 10**6, 1000, None, None, None, None, True, True, frozenset(), frozenset(), True, 1,
        True, quirks,
    )  # fmt: skip


MODELS = [model_with({}), *map(model_with, QUIRKS), *(replace(model_with({}), prefill=form) for form in Prefill)]


def sent(chat: Chat, model: Model) -> object:
    try:
        return orjson.loads(OpenAIAdapter().request(model, KEYLESS, chat).body)
    except UpstreamError as error:  # this platform cannot carry it
        return error.message


def verdict(read, raw: bytes) -> object:
    """All that a request amounts to, or the error that it gets."""
    try:
        chat = read(raw)
    except InvalidRequest as error:
        return error.status, error.code, error.param, error.message
    return (
        chat.need, dict(chat.body), chat.model, chat.stream, chat.include_usage, chat.prompt_tokens, chat.max_tokens,
        chat.first_user_text, chat.tool_names, [sent(chat, model) for model in MODELS],
    )  # fmt: skip


def fast(raw: bytes) -> Chat:
    return ChatDialect().parse(raw, 0.0)


def mended(raw: bytes) -> Chat:
    return chat_from(load_object(raw))


TEXTS = st.sampled_from(["", "a", 'hello \n "x"', "日本語", "\U0001f600", "nul \0", "half \ud83d", "\u2028", "\x7f"])
IDS = st.sampled_from(["c1", "c2", "call_1_0", "x" * 40, "x" * 41, "a\nb", "", "é", "\0"])
NAMES = st.sampled_from(["f", "g", "mcp.server/tool", "x" * 70, "", "1st"])
ARGUMENTS = st.sampled_from(
    ["{}", '{"a": 1}', ' {"a": [1, "x"]} ', "", "[1]", "null", '{"a": 1e999}', '{"a": "\\ud83d"}', "{", '"{}"', "{},{}"]
)
PART = st.fixed_dictionaries({"type": st.sampled_from(["text", "input_text", None]), "text": TEXTS}) | st.sampled_from(
    [
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO"}}, {"text": "a"}, "a", None,
    ]
)  # fmt: skip
PLAIN_PART = st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS})
CONTENT = TEXTS | st.lists(PLAIN_PART, min_size=1, max_size=2)
ODD_CONTENT = CONTENT | st.none() | st.lists(PART, max_size=3) | st.just({"a": None}) | st.just(5)
CALL = st.fixed_dictionaries(
    {"id": IDS, "type": st.just("function"), "function": st.fixed_dictionaries({"name": NAMES, "arguments": ARGUMENTS})}
)


@st.composite
def steps(draw) -> list[dict]:
    """An assistant's turn with calls, and their results right behind it."""
    calls = [
        {"id": f"c{n}", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
        for n in range(draw(st.integers(1, 3)))
    ]
    asked = {"role": "assistant", "content": draw(CONTENT | st.none()), "tool_calls": calls}
    return [asked, *({"role": "tool", "tool_call_id": call["id"], "content": draw(TEXTS)} for call in calls)]


PLAIN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": CONTENT})
ANY = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer", "function", "x"])},
        optional={
            "content": ODD_CONTENT, "tool_calls": st.lists(CALL, max_size=2) | st.none(), "tool_call_id": IDS,
            "name": NAMES | st.none(), "reasoning_content": TEXTS, "refusal": st.none(),
        },
    ),
    st.sampled_from([{}, None, [], "x", {"content": "a"}]),
)  # fmt: skip
TURNS = st.lists(steps() | st.lists(PLAIN, min_size=1, max_size=2), min_size=1, max_size=5).map(
    lambda steps: [*chain(*steps)]
)
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "default": None}}, "title": "T"}
TOOL = st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.fixed_dictionaries({"name": NAMES, "parameters": st.just(SCHEMA)})}
)
ODD_TOOL = st.sampled_from(
    [
        {"type": "function", "name": "flat", "parameters": SCHEMA}, {"function": {"name": "f"}}, None, 5,
        {"type": "function", "function": {"name": "f", "description": "nul \0", "parameters": SCHEMA}},
        {"type": "function", "function": {"name": "f", "parameters": {"a": json.loads("[" * 250 + "]" * 250)}}},
        {"type": "web_search"},
    ]
)  # fmt: skip
CHOSEN = {"type": "function", "function": {"name": "mcp.server/tool"}}
OPTIONS: dict[str, list] = {
    "model": ["auto", "m", None, 5, "nul \0", "x" * 301], "stream": [True, False, None, "true", 1],
    "stream_options": [{}, None, {"include_usage": True}, {"include_usage": 1}, {"x": 1}, 5],
    "temperature": [1, 9, 0, 0.5, 2.0, -0.0, None, "1"], "top_p": [1, 0, 0.5, 0.001, 1.0], "n": [1, 2, None, 1.0],
    "max_tokens": [0, 5, None, 1e400, "7"], "max_completion_tokens": [7, 0, None, -1, 2**70],
    "seed": [5, -(2**63), 2**63, 1.5, None], "top_k": [1, 2**64], "presence_penalty": [0, 0.5, None, "1"],
    "logprobs": [True, None, 1], "reasoning_effort": ["low", "max", "none", None], "user": ["u", "nul \0", None, 5],
    "prompt_cache_key": ["k", None, 5], "parallel_tool_calls": [True, False, None], "store": [True, None],
    "tool_choice": ["auto", "required", "any", "", None, CHOSEN],
    "stop": ["a", ["\0"], [], ["a", "b"], "", [""], [None]], "x": [None, [None], "half \ud83d", {"y": {}}],
}  # fmt: skip
WISHES = {name: st.sampled_from(values) for name, values in OPTIONS.items()}
WISHES["tools"] = st.lists(TOOL | ODD_TOOL, max_size=3)
MORE = st.lists(st.sampled_from(sorted(WISHES)), max_size=5, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: WISHES[name] for name in names})
)


@settings(max_examples=500)
@given(TURNS, MORE, st.lists(st.tuples(st.integers(0, 20), ANY), max_size=2))
def test_a_request_is_the_same_whether_it_was_recognised_or_mended(turns, more, odd):
    for place, message in odd:
        turns.insert(place % (len(turns) + 1), message)
    raw = json.dumps({"messages": turns, **more}).replace("Infinity", "1e400").encode()

    assert verdict(fast, raw) == verdict(mended, raw)


GOOD = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "a\ud83d\ude00"}, {"type": "text", "text": "é"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": "\\n"}'}},
            {"id": "c2", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "1"},
    {"role": "tool", "tool_call_id": "c2", "content": ""},
    {"role": "assistant", "content": "done"},
    {"role": "user", "content": "go on"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": False}}]
ORIGINAL = json.dumps({"messages": GOOD, "tools": TOOLS, "max_tokens": 5}, ensure_ascii=False).encode(
    "utf-8", "surrogatepass"
)
ESCAPED = json.dumps({"messages": GOOD, "tools": TOOLS, "max_tokens": 5}).encode()
BYTES = st.sampled_from(
    [b"", b'"', b"\\", b"\\u0000", b"\\ud83d", b"\xff", b"\xed\xa0\x80", b"\n", b"null", b"1e999", b"[", b"{}", b","]
)


@settings(max_examples=1000)
@given(st.lists(st.tuples(st.integers(0, len(ESCAPED)), st.integers(0, 6), BYTES), min_size=1, max_size=2))
def test_a_damaged_text_gets_the_same_verdict_either_way(edits):
    raw = ESCAPED
    for place, length, new in edits:
        raw = raw[:place] + new + raw[place + length :]

    assert verdict(fast, raw) == verdict(mended, raw)


def test_well_formed_messages_and_tools_go_out_as_the_very_text_that_came_in():
    messages = json.dumps(GOOD, indent=1)
    tools = json.dumps(TOOLS, indent=2)
    raw = f'{{"temperature": 1, "messages": {messages}, "model": "m", "tools": {tools}, "stream": true}}'.encode()

    body = OpenAIAdapter().request(MODELS[0], KEYLESS, fast(raw)).body

    assert messages.encode() in body
    assert tools.encode() in body


@pytest.mark.parametrize("quirks", [{}, {"standard_fields_only": True, "drop_message_fields": ["name"]}])
def test_messages_stay_text_where_the_platform_has_nothing_to_change_in_them(quirks):
    messages = json.dumps(GOOD, indent=1)

    body = OpenAIAdapter().request(model_with(quirks), KEYLESS, fast(f'{{"messages": {messages}}}'.encode())).body

    assert messages.encode() in body


@pytest.mark.parametrize("place", range(len(GOOD)))
@pytest.mark.parametrize("name", ["name", "refusal", "tool_calls", "x"])
def test_a_message_with_anything_more_in_it_is_looked_at_closely(place, name):
    odd = [message | ({name: None} if at == place else {}) for at, message in enumerate(GOOD)]

    assert recognised(json.dumps(GOOD).encode()) is not None
    assert recognised(json.dumps(odd).encode()) is None


@pytest.mark.parametrize("gone", [3, 4])
def test_a_call_without_its_result_is_looked_at_closely(gone):
    assert recognised(json.dumps(GOOD[:gone] + GOOD[gone + 1 :]).encode()) is None
