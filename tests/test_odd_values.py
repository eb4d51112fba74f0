"""Something odd in every field of what clients and providers send: a clear verdict, and nothing that breaks later.

A template holds every field that is read anywhere; each of its places in turn holds each of the odd values. All of it
is judged by the very functions on a request's path, and whatever they let out must be JSON that anybody can read.
"""

import json
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from adapters import errors as faults
from adapters import waits
from adapters.chunks import as_chunks
from adapters.gemini import GeminiAdapter
from adapters.openai import OpenAIAdapter
from adapters.stream import Incoming, named_failure, whole_reply
from dialects.chat import ChatDialect
from dialects.responses import ResponsesDialect
from engine.refusals import FailedAttempt, exhausted
from protection import UpstreamError
from routing.catalog import KEYLESS, Model, Platform
from routing.plan import Plan
from routing.route import Route
from wire.chat import Tally, frame
from wire.errors import GatewayError
from wire.jsontext import load_lenient

HALF_EMOJI = b'"\\ud83d"'
ODD = [
    b"null", b"true", b"0", b"-1", b"1.5", b"1e308", b"1e400", b"9" * 31, b"9" * 5000, b"NaN", b'""', b'"\\u0000"',
    b'"word"', HALF_EMOJI, b'["\\ud83d", 1e400]', b"[]", b"[[]]", b"[null]", b"[{}]", b"{}", b'{"a": {"b": 1}}',
    b"[" * 190 + b"]" * 190, b"[" * 300 + b"]" * 300, b'{"a":' * 1000 + b"1" + b"}" * 1000,
]  # fmt: skip
HERE = "@@here@@"
NOW = 1_790_000_000.0

Path = tuple[str | int, ...]


def places(value: object, path: Path = ()) -> Iterator[Path]:
    """Every place in this JSON, the root included."""
    yield path
    for name, item in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from places(item, (*path, name))


def odd_at(value: object, path: Path) -> Iterator[bytes]:
    """Its bytes with each of the odd values at one place."""

    def marked(value: object, path: Path) -> object:
        if not path:
            return HERE
        copy = dict(value) if isinstance(value, dict) else list(value)
        copy[path[0]] = marked(copy[path[0]], path[1:])
        return copy

    before, after = json.dumps(marked(value, path)).encode().split(json.dumps(HERE).encode())
    return (before + odd + after for odd in ODD)


def each_place(*templates: dict) -> pytest.MarkDecorator:
    """The odd variants of the templates, gathered by the field at the root."""
    found: dict[str, list[bytes]] = {}
    for template in templates:
        for path in places(template):
            found.setdefault(str(path[0]) if path else "the root", []).extend(odd_at(template, path))
    return pytest.mark.parametrize("variants", found.values(), ids=found)


def readable(text: bytes) -> object:
    """Strict JSON in UTF-8."""
    return json.loads(text.decode(), parse_constant=lambda constant: pytest.fail(f"{constant} went out: {text!r}"))


def model_of(adapter: str) -> Model:
    platform = Platform("p", "P", adapter, "http://127.0.0.1/v1", keyless=True)
    return Model(
        1, platform, "m", "M", 1, 1, 10**6, 1000, None, None, None, None, True, True, frozenset(), frozenset(), True, 1,
        True, {"call_signatures": True} if adapter == "google" else {},
    )  # fmt: skip


ADAPTERS = {"openai": OpenAIAdapter(), "google": GeminiAdapter(lambda: NOW)}
DIALECTS = {"chat": ChatDialect(), "responses": ResponsesDialect(lambda: "t" * 32)}

# --- From clients ---------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": ["array"], "items": {"properties": {"b": {"type": "string"}}}}},
}
FUNCTION = {"name": "f.x", "description": "d", "parameters": SCHEMA, "strict": True}
CALLED = {"name": "f.x", "arguments": "{}"}
CHAT = {
    "model": "m", "stream": True, "stream_options": {"include_usage": True}, "temperature": 1, "top_p": 0.5, "seed": 3,
    "n": 1, "max_tokens": 5, "max_completion_tokens": 5, "stop": ["a"], "logit_bias": {"1": 2}, "modalities": ["text"],
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, "user": "u",
    "tools": [{"type": "function", "function": FUNCTION}, {"type": "function", **FUNCTION}],
    "tool_choice": {"type": "function", "function": {"name": "f.x"}}, "functions": [FUNCTION],
    "function_call": {"name": "f.x"}, "parallel_tool_calls": True, "metadata": {"a": "b"}, "reasoning_effort": "high",
    "reasoning": {"effort": "low"}, "thinking": {"type": "enabled", "budget_tokens": 3}, "enable_thinking": True,
    "chat_template_kwargs": {"enable_thinking": True, "x": 1},
    "messages": [
        {"role": "system", "content": "s", "name": "n"},
        {"role": "user", "content": [{"type": "text", "text": "t", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": CALLED}], "reasoning": "r"},
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "r"}], "name": "f.x"},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}], "function_call": CALLED},
        {"role": "function", "name": "f.x", "content": {"a": 1}},
    ],
}  # fmt: skip
PARTS = [
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBO", "detail": "low"}},
    {"type": "input_image", "image_url": "data:image/png;base64,iVBO", "detail": "low"},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBO"}},
    {"type": "file", "file": {"file_data": "data:application/pdf;base64,aaaa", "filename": "f"}},
]
IMAGES = {"messages": [{"role": "user", "content": PARTS}]}
RESPONSES = {
    "model": "m", "stream": True, "instructions": "i", "max_output_tokens": 5, "metadata": {"a": "b"}, "store": True,
    "reasoning": {"effort": "low", "summary": "auto"}, "include": ["x"], "truncation": "auto", "user": "u",
    "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}, "verbosity": "low"},
    "tools": [
        {"type": "function", **FUNCTION}, {"type": "function", "function": FUNCTION},
        {"type": "custom", "name": "c", "format": {"type": "grammar", "syntax": "lark", "definition": "x"}},
        {"type": "namespace", "name": "ns", "description": "d", "tools": [{"type": "function", **FUNCTION}]},
    ],
    "tool_choice": {"type": "function", "name": "f.x"}, "parallel_tool_calls": True,
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "s"}]},
        {"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,iVBO"}]},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "x"}], "encrypted_content": "e"},
        {"type": "function_call", "call_id": "c1", "name": "f.x", "arguments": "{}", "id": "fc", "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "o"}]},
        {"type": "custom_tool_call", "call_id": "c2", "name": "c", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "x"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a", "annotations": []}]},
    ],
}  # fmt: skip
CALL_IN_TEXT = json.dumps(
    {"choices": [{"message": {"content": '<function=f.x><parameter=a>["{}"]</parameter></function>'}}]}
)


def asked(dialect: str, raw: bytes) -> bool:
    """Take one request to every wire and answer it with a tool call; False when it was refused."""
    try:
        chat = DIALECTS[dialect].parse(raw, NOW)
    except GatewayError as error:
        assert error.status == 400
        readable(error.body())
        return False
    for name, adapter in ADAPTERS.items():
        try:
            readable(adapter.request(model_of(name), KEYLESS, chat).body)
        except UpstreamError as error:  # what a wire cannot carry
            assert error.status == 400
    encoder = DIALECTS[dialect].encoder(chat, NOW)
    answer = load_lenient(CALL_IN_TEXT.encode())
    completion = ADAPTERS["openai"].completion(CALL_IN_TEXT.encode(), answer, chat)
    assert completion is not None
    readable(encoder.whole(completion))
    return True


@pytest.mark.parametrize(("dialect", "template"), [("chat", CHAT), ("chat", IMAGES), ("responses", RESPONSES)])
def test_without_anything_odd_the_request_is_served(dialect, template):
    assert asked(dialect, json.dumps(template).encode())


@each_place(CHAT, IMAGES)
def test_a_chat_request_with_something_odd_is_served_or_refused_by_name(variants):
    for raw in variants:
        asked("chat", raw)


@each_place(RESPONSES)
def test_a_responses_request_with_something_odd_is_served_or_refused_by_name(variants):
    for raw in variants:
        asked("responses", raw)


# --- From providers -------------------------------------------------------------------------------------------------

USAGE = {
    "prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "prompt_tokens_details": {"cached_tokens": 1},
    "completion_tokens_details": {"reasoning_tokens": 2},
}  # fmt: skip
CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f.x", "arguments": '{"a": [1]}'}}
HEAD = {
    "id": "x",
    "object": "chat.completion.chunk",
    "created": 1,
    "model": "m",
    "usage": USAGE,
    "x_v": {"usage": USAGE},
}
TEXT = {**HEAD, "choices": [{"index": 0, "delta": {"role": "assistant", "content": "hello"}, "finish_reason": None}]}
RICH_DELTA = {
    "role": "assistant", "content": [{"type": "text", "text": "hi"}, {"thinking": [{"type": "text", "text": "hm"}]}],
    "reasoning": "hm", "reasoning_content": "hm", "refusal": "no", "tool_calls": [CALL], "function_call": CALLED,
}  # fmt: skip
RICH = {**HEAD, "choices": [{"index": 0, "delta": RICH_DELTA, "finish_reason": "stop", "logprobs": {"content": []}}]}
WHOLE = {**HEAD, "choices": [{"index": 0, "message": RICH_DELTA, "finish_reason": "stop"}]}
GOOGLE_PARTS = [
    {"text": "hm", "thought": True, "thoughtSignature": "s"}, {"text": "hi"},
    {"functionCall": {"id": "i", "name": "f", "args": {"a": 1}}, "thoughtSignature": "z"},
    {"inlineData": {"mimeType": "image/png", "data": "aaaa"}},
]  # fmt: skip
GOOGLE = {
    "candidates": [{"content": {"role": "model", "parts": GOOGLE_PARTS}, "finishReason": "STOP", "finishMessage": "m"}],
    "promptFeedback": {"blockReason": None}, "modelVersion": "v", "responseId": "r",
    "usageMetadata": {"promptTokenCount": 1, "candidatesTokenCount": 2, "thoughtsTokenCount": 3, "totalTokenCount": 6},
}  # fmt: skip
REASONS = [{"reason": "r", "retryDelay": "3s", "violations": [{"quotaValue": "0", "quotaId": "PerDay"}]}]
ERROR = {
    "error": {
        "message": "no", "type": "t", "code": 429, "status": "S", "param": None, "details": REASONS,
        "metadata": {"raw": "r", "error_type": "e", "reasons": ["a"], "flagged_input": "x"},
        "errors": [{"message": "m", "code": 3}], "failed_generation": "<function=f.x>{}</function>",
    },
    "errors": [{"message": "m", "code": "c"}], "success": False, "message": "m", "detail": "d", "code": 5,
    "retry_after": 3,
}  # fmt: skip
PATIENT = (
    b'{"stream": true, "messages": [{"role": "user", "content": "hi"}], "tools": %b}'
    % json.dumps(CHAT["tools"][:1]).encode()
)
RESPONDING = b'{"stream": true, "input": "hi", "tools": %b}' % json.dumps(RESPONSES["tools"][:1]).encode()
ROUTES = {adapter: Route(model_of(adapter), KEYLESS, None) for adapter in ADAPTERS}
ASKED = {"chat": DIALECTS["chat"].parse(PATIENT, NOW), "responses": DIALECTS["responses"].parse(RESPONDING, NOW)}


def frames(stream: bytes) -> None:
    """Every event of a stream that goes out can be read."""
    for block in stream.split(b"\n\n"):
        for line in block.split(b"\n"):
            if line.startswith(b"data: ") and line != b"data: [DONE]":
                readable(line[6:])


def told(error: UpstreamError) -> None:
    """What the client and the log get to see of a failure."""
    attempt = FailedAttempt(ROUTES["openai"], error, 1)
    readable(exhausted(Plan([], 1), [attempt], stream=True, retry_after_s=error.retry_after_s).body())
    assert error.message.encode()
    assert error.status is None or 100 <= error.status <= 599


def countable(tally: Tally) -> None:
    """What the log's columns can hold."""
    assert 0 <= tally.output_tokens() < 2**62
    assert tally.usage is None or 0 <= tally.usage.input_tokens < 2**62


def streamed(adapter: str, dialect: str, raw: bytes, last: dict) -> None:
    """Take one event through a stream, with a good one behind it."""
    chat, tally = ASKED[dialect], Tally()
    incoming = Incoming(ADAPTERS[adapter].translator(tally, chat), tally, ROUTES[adapter], 0.0, is_sse=True)
    encoder = DIALECTS[dialect].encoder(chat, NOW)
    events, _ = incoming.feed(b"data: %b\n\ndata: %b\n\n" % (raw, json.dumps(last).encode()))
    out = encoder.feed(events) if events else b""
    if error := incoming.error or incoming.ending():
        told(error)
        out += encoder.fail(GatewayError(error.message, status=502, type="stream_error"), tally)
    else:
        out += encoder.end(tally)
    frames(out)
    countable(tally)


def whole(adapter: str, dialect: str, raw: bytes) -> None:
    chat = replace(ASKED[dialect], stream=False)
    try:
        reply = whole_reply(raw, ADAPTERS[adapter], chat, ROUTES[adapter], 0.0)
    except UpstreamError as error:
        told(error)
        return
    readable(DIALECTS[dialect].encoder(chat, NOW).whole(reply.completion))
    countable(reply.tally)
    frames(b"".join(frame(chunk) for chunk in as_chunks(reply.completion.body)))


both_dialects = pytest.mark.parametrize("dialect", DIALECTS)


@both_dialects
@each_place(TEXT, RICH, ERROR)
def test_an_event_with_something_odd_is_passed_on_or_a_named_failure(dialect, variants):
    for raw in variants:
        streamed("openai", dialect, raw, TEXT)


@both_dialects
@each_place(WHOLE, ERROR)
def test_a_whole_answer_with_something_odd_is_passed_on_or_a_named_failure(dialect, variants):
    for raw in variants:
        whole("openai", dialect, raw)


@both_dialects
@each_place(GOOGLE)
def test_the_other_wires_answers_with_something_odd_are_passed_on_or_named_failures(dialect, variants):
    for raw in variants:
        streamed("google", dialect, raw, GOOGLE)
        whole("google", dialect, raw)


@each_place(ERROR)
def test_a_refusal_with_something_odd_is_a_named_failure(variants):
    for raw in variants:
        try:
            body = load_lenient(raw)
        except ValueError:
            continue
        told(named_failure(429, faults.read(body), {}, body, ROUTES["openai"], 0.0))


@pytest.mark.parametrize(
    "words",
    ["reset at 0001-01-01 00:00:00", "reset at 9999-12-31 23:59:59", "reset at 2026-99-99 00:00", "retry in 1e9s",
     f"try again in {'9' * 400}s", f"wait {'1h ' * 50_000}", "resets in 99999999999999999999 days"],
)  # fmt: skip
def test_words_about_time_are_never_more_than_a_day_or_less_than_none(words):
    for headers in ({}, {"Retry-After": words}, {"x-ratelimit-remaining": "0", "x-ratelimit-reset": words}):
        rest_s = waits.retry_after_s(faults.read({"error": {"message": words}}), headers, {}, NOW)
        assert rest_s is None or 0 <= rest_s <= waits.RETRY_AFTER_MAX_S
