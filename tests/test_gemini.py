"""Gemini's wire, field by field: what is asked, what comes back, and the signatures in between (facts, section 6)."""

import json

import pytest
from conftest import IN_ORDER, both_ways, case, default_key
from fake_provider import body, chunked, event
from wires import SIGNATURE, Gemini, Said, call_parts, gemini_frame

from adapters.gemini import SIGNATURE_TTL_S, SIGNATURES_MAX, UNSIGNED, Signatures
from adapters.json_schema import gemini_schema

WIRE = Gemini()
PNG = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


def tool(name: str = "weather", parameters: dict | None = None) -> dict:
    properties = {"city": {"type": "string"}}
    parameters = parameters if parameters is not None else {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": "d", "parameters": parameters}}


@pytest.fixture
async def google(start_gateway, fake):
    """A gateway whose first platform speaks this wire, with another behind it."""

    async def start(*replies, **quirks):
        options = WIRE.options(fake)
        options["quirks"] = options["quirks"] | quirks
        gateway = await start_gateway({"google": options, "b": {"model": {"vision": True}}})
        fake.script("google", *(replies or [WIRE.says(Said("fine"))]))
        return gateway

    return start


# --- The request --------------------------------------------------------------------------------------------------


async def test_the_address_and_the_key_are_as_the_wire_wants_them(google, fake):
    gateway = await google()

    await gateway.chat()
    await gateway.stream()

    assert fake.requests[0].path == "/google/v1/models/google-model:generateContent"
    assert fake.requests[1].path == "/google/v1/models/google-model:streamGenerateContent?alt=sse"
    for request in fake.requests:
        assert request.headers["x-goog-api-key"] == default_key("google")
        assert "authorization" not in request.headers


SENT = {
    "system texts are joined": (
        {
            "messages": [
                {"role": "system", "content": "one"},
                {"role": "user", "content": "hi"},
                {"role": "developer", "content": [{"type": "text", "text": "two"}]},
            ]
        },
        {
            "systemInstruction": {"parts": [{"text": "one\n\ntwo"}]},
            "contents": [{"role": "user", "parts": [{"text": "hi"}]}],
        },
    ),
    "neighbouring turns of one role become one": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]},
        {"contents": [{"role": "user", "parts": [{"text": "a"}, {"text": "b"}]}]},
    ),
    "a history never begins with the model": (
        {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]},
        {
            "contents": [
                {"role": "user", "parts": [{"text": "(the conversation goes on)"}]},
                {"role": "model", "parts": [{"text": "a"}]},
                {"role": "user", "parts": [{"text": "b"}]},
            ]
        },
    ),
    "a data image is inlined": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "see"}, PNG]}]},
        {
            "contents": [
                {
                    "role": "user",
                    "parts": [{"text": "see"}, {"inlineData": {"mimeType": "image/png", "data": "iVBORw0KGgo="}}],
                }
            ]
        },
    ),
    "sampling has other names": (
        {
            "temperature": 0.5, "top_p": 0.9, "top_k": 4, "seed": 7, "presence_penalty": 1, "frequency_penalty": 0.5,
            "max_tokens": 10, "stop": "END", "min_p": 0.1, "logit_bias": {"1": 2}, "user": "me",
        },
        {
            "generationConfig": {
                "temperature": 0.5, "topP": 0.9, "topK": 4, "seed": 7, "presencePenalty": 1, "frequencyPenalty": 0.5,
                "maxOutputTokens": 10, "stopSequences": ["END"],
            }
        },
    ),
    "max_tokens ends at the model's own": ({"max_tokens": 200_000}, {"generationConfig": {"maxOutputTokens": 65_536}}),
    "five stops at most": (
        {"stop": list("abcdefg")},
        {"generationConfig": {"stopSequences": list("abcde")}},
    ),
    "JSON mode": (
        {"response_format": {"type": "json_object"}},
        {"generationConfig": {"responseMimeType": "application/json"}},
    ),
    "a JSON schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "object", "properties": {"a": {"const": "b"}}}},
            }
        },
        {
            "generationConfig": {
                "responseMimeType": "application/json",
                "responseJsonSchema": {"type": "object", "properties": {"a": {"const": "b"}}},
            }
        },
    ),
    "no JSON mode beside tools": ({"response_format": {"type": "json_object"}, "tools": [tool()]}, {...: 0}),
    "an effort becomes a level": (
        {"reasoning_effort": "low"},
        {"generationConfig": {"thinkingConfig": {"thinkingLevel": "LOW", "includeThoughts": True}}},
    ),
    "no effort is the least level": (
        {"reasoning_effort": "none"},
        {"generationConfig": {"thinkingConfig": {"thinkingLevel": "MINIMAL", "includeThoughts": False}}},
    ),
    "a choice by name": (
        {"tools": [tool()], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
        {"toolConfig": {"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["weather"]}}},
    ),
    "a choice must be made": (
        {"tools": [tool()], "tool_choice": "required"},
        {"toolConfig": {"functionCallingConfig": {"mode": "ANY"}}},
    ),
    "a tool without parameters has none": (
        {"tools": [tool(parameters={})]},
        {"tools": [{"functionDeclarations": [{"name": "weather", "description": "d"}]}]},
    ),
}  # fmt: skip


@both_ways
async def test_a_request_is_translated_field_by_field(google, fake, streaming):
    gateway = await google(WIRE.says(Said("[]")))
    for name, (asked, sent) in SENT.items():
        with case(name):
            assert (await gateway.ask(streaming=streaming, **asked)).text == "[]"

            got = fake.requests[-1].json
            if ... in sent:
                assert "generationConfig" not in got
            else:
                assert {field: got.get(field) for field in sent} == sent
                assert set(got) <= set(sent) | {"contents", "tools"}


async def test_where_only_a_subset_of_schemas_is_known_they_are_translated(google, fake):
    gateway = await google(WIRE.says(Said("[]")), schema_subset=True)
    schema = {"type": "object", "properties": {"a": {"const": "b"}}, "additionalProperties": False}
    known = {"type": "object", "properties": {"a": {"type": "string", "enum": ["b"]}}}

    await gateway.chat(tools=[tool(parameters=schema)])
    await gateway.chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})

    declared = fake.requests[0].json["tools"][0]["functionDeclarations"][0]
    assert (declared["parameters"], "parametersJsonSchema" in declared) == (known, False)
    config = fake.requests[1].json["generationConfig"]
    assert (config["responseSchema"], "responseJsonSchema" in config) == (known, False)


async def test_a_schema_goes_out_as_the_client_wrote_it(google, fake):
    gateway = await google(WIRE.says(Said("[]")))
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#", "type": "object", "required": ["a"],
        "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"type": ["string", "null"], "pattern": "^x"}},
    }  # fmt: skip

    await gateway.chat(tools=[tool(parameters=schema)])

    declared = fake.requests[0].json["tools"][0]["functionDeclarations"][0]
    assert (declared["parametersJsonSchema"], "parameters" in declared) == (schema, False)


async def test_models_without_a_system_role_hear_it_from_the_user(google, fake):
    gateway = await google(system_as_user=True, thinking="none")

    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    await gateway.chat(messages=messages, reasoning_effort="high")

    assert fake.requests[0].json == {"contents": [{"role": "user", "parts": [{"text": "be brief"}, {"text": "hi"}]}]}


async def test_an_effort_may_be_told_as_a_budget(google, fake):
    gateway = await google(thinking="budget")

    await gateway.chat(reasoning_effort="medium")

    assert fake.requests[0].json["generationConfig"]["thinkingConfig"] == {
        "thinkingBudget": 8192,
        "includeThoughts": True,
    }


async def test_calls_and_results_become_one_turn_each(google, fake):
    gateway = await google()
    calls = [
        {"id": f"c{n}", "type": "function", "function": {"name": name, "arguments": '{"n": 1}'}}
        for n, name in enumerate(["first", "second"])
    ]
    results = [
        {"role": "tool", "tool_call_id": "c0", "content": "plain"},
        {"role": "tool", "tool_call_id": "c1", "content": '{"degrees": 3}'},
    ]
    history = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "ok", "tool_calls": calls}, *results]

    await gateway.chat(messages=history)

    assert fake.requests[0].json["contents"][1:] == [
        {
            "role": "model",
            "parts": [
                {"text": "ok"},
                {
                    "functionCall": {"id": "c0", "name": "first", "args": {"n": 1}},
                    "thoughtSignature": UNSIGNED,
                },
                {"functionCall": {"id": "c1", "name": "second", "args": {"n": 1}}},
            ],
        },
        {
            "role": "user",
            "parts": [
                {"functionResponse": {"id": "c0", "name": "first", "response": {"output": "plain"}}},
                {"functionResponse": {"id": "c1", "name": "second", "response": {"degrees": 3}}},
            ],
        },
    ]


@both_ways
@pytest.mark.parametrize("url", ["https://example.com/a.png", "http://127.0.0.1/secret", "file:///etc/passwd"])
async def test_an_image_by_address_is_neither_fetched_nor_sent(google, fake, url, streaming):
    gateway = await google()
    image = {"type": "image_url", "image_url": {"url": url}}

    got = await gateway.ask(streaming=streaming, messages=[{"role": "user", "content": [image]}])

    assert got.text == "hello from b"
    assert fake.called == ["b"]
    assert got.headers["X-Fallback-Trail"] == "google/google-model=bad_request"
    assert "data: URL" in (await gateway.rows(2))[0]["error"]


async def test_a_custom_tool_is_declared_as_a_function(google, fake):
    gateway = await google()

    got = await gateway.chat(tools=[tool(), {"type": "custom", "custom": {"name": "x"}}])

    declared = [d["name"] for t in fake.requests[0].json["tools"] for d in t["functionDeclarations"]]
    assert (got.text, fake.called) == ("fine", ["google"])
    assert "x" in declared


# --- Schemas ------------------------------------------------------------------------------------------------------

TREE = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}}
SCHEMAS = {
    "unknown keywords": ({"type": "string", "$comment": "x", "x-order": 1, "examples": ["a"]}, {"type": "string"}),
    "a property named like a keyword": (
        {"type": "object", "properties": {"const": {"type": "string"}, "$ref": {"type": "integer"}}},
        {"type": "object", "properties": {"const": {"type": "string"}, "$ref": {"type": "integer"}}},
    ),
    "a list of types": ({"type": ["null", "integer"]}, {"type": "integer", "nullable": True}),
    "const": ({"const": "a"}, {"type": "string", "enum": ["a"]}),
    "an enum of numbers": ({"type": "integer", "enum": [1, 2]}, {"type": "integer"}),
    "an enum with null": ({"enum": ["a", None]}, {"type": "string", "enum": ["a"], "nullable": True}),
    "an array without items": ({"type": "array"}, {"type": "array", "items": {"type": "string"}}),
    "required of nothing": (
        {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a", "b"]},
        {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
    ),
    "one of": (
        {"oneOf": [{"type": "string"}, {"type": "integer"}]},
        {"anyOf": [{"type": "string"}, {"type": "integer"}]},
    ),
    "something or null": ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"type": "string", "nullable": True}),
    "all of": (
        {"allOf": [{"type": "object", "properties": {"a": {"type": "string"}}}, {"required": ["a"]}]},
        {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
    ),
    "a reference": (
        {"$defs": {"c": {"type": "string"}}, "properties": {"a": {"$ref": "#/$defs/c"}}},
        {"type": "object", "properties": {"a": {"type": "string"}}},
    ),
    "a reference to nothing": (
        {"properties": {"a": {"$ref": "#/nowhere"}}},
        {"type": "object", "properties": {"a": {}}},
    ),
    "a reference into itself": (
        {"$defs": {"tree": TREE}, "$ref": "#/$defs/tree"},
        {"type": "object", "properties": {"kids": {"type": "array", "items": {"type": "string"}}}},
    ),
    "a format it does not know": ({"type": "string", "format": "uri"}, {"type": "string"}),
}


@pytest.mark.parametrize(("schema", "cleaned"), SCHEMAS.values(), ids=SCHEMAS)
def test_a_schema_is_made_to_fit(schema, cleaned):
    assert gemini_schema(schema) == cleaned


# --- The answer ---------------------------------------------------------------------------------------------------


def frames(*given: dict, streaming: bool):
    """The frames as a stream, or all their parts as one body with the last one's ending."""
    if streaming:
        return chunked(*map(event, given))
    parts = [part for frame in given for part in frame.get("candidates", [{}])[0].get("content", {}).get("parts", [])]
    whole = json.loads(json.dumps(given[-1]))
    if whole.get("candidates"):
        whole["candidates"][0]["content"] = {"role": "model", "parts": parts}
    return body(whole)


def ended(reason: str, *parts: dict, **more: object) -> dict:
    frame = gemini_frame(*parts, said=None, **more)
    frame["candidates"][0]["finishReason"] = reason
    return frame


@both_ways
async def test_thoughts_are_reasoning_and_count_as_output(google, streaming):
    thought = gemini_frame({"text": "hm", "thought": True}, said=None)
    gateway = await google(frames(thought, gemini_frame({"text": "yes"}, said=Said()), streaming=streaming))

    got = await gateway.ask(streaming=streaming, stream_options={"include_usage": True})

    if streaming:
        assert "".join(delta.get("reasoning_content", "") for delta in got.deltas) == "hm"
        assert got.deltas[0]["role"] == "assistant"
        usage = got.chunks[-1]["usage"]
        got.assert_whole("yes")
    else:
        assert got.json["choices"][0]["message"]["reasoning_content"] == "hm"
        usage = got.json["usage"]
    assert got.text == "yes"
    assert usage == {
        "prompt_tokens": 11,
        "completion_tokens": 7,
        "total_tokens": 18,
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    row = await gateway.row()
    assert (row["input_tokens"], row["output_tokens"]) == (11, 7)


@both_ways
async def test_thoughts_and_calls_written_as_text_are_what_they_are(google, streaming):
    text = '<thought>hm</thought>\n<tool_call>{"name": "weather", "arguments": {"city": "Rom"}}</tool_call>'
    pieces = [gemini_frame({"text": text[at : at + 9]}, said=None) for at in range(0, len(text), 9)]
    gateway = await google(frames(*pieces, ended("STOP"), streaming=streaming))

    got = await gateway.ask(streaming=streaming, tools=[tool()])

    told = got.deltas if streaming else [got.json["choices"][0]["message"]]
    assert "".join(delta.get("reasoning_content", "") for delta in told) == "hm"
    (call,) = got.calls if streaming else told[0]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"city": "Rom"}
    assert not any(delta.get("content") for delta in told)
    assert (got.finishes if streaming else [got.json["choices"][0]["finish_reason"]]) == ["tool_calls"]


async def test_usage_after_the_last_word_is_still_read(google):
    late = {"usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 9, "cachedContentTokenCount": 3}}
    gateway = await google(chunked(event(ended("STOP", {"text": "yes"})), event(late)))

    got = await gateway.stream(stream_options={"include_usage": True})

    got.assert_whole("yes")
    usage = got.chunks[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 9)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 3}


async def test_text_behind_an_ending_is_not_lost(google):
    gateway = await google(chunked(event(ended("STOP", {"text": "yes"})), event(ended("STOP", {"text": " and no"}))))

    (await gateway.stream()).assert_whole("yes and no")


async def test_thoughts_that_end_in_a_broken_call_are_no_finished_answer(google):
    thought = gemini_frame({"text": "hm", "thought": True}, said=None)
    gateway = await google(chunked(event(thought), event(ended("MALFORMED_FUNCTION_CALL"))))

    got = await gateway.stream()

    assert got.finishes == ["error"]
    assert (await gateway.row())["error_kind"] == "empty"


FINISHES = {
    "STOP": "stop", "MAX_TOKENS": "length", "SAFETY": "content_filter", "RECITATION": "content_filter",
    "IMAGE_SAFETY": "content_filter", "SPII": "content_filter", "OTHER": "stop", "LANGUAGE": "stop",
    "MALFORMED_FUNCTION_CALL": "stop", "SOMETHING_NEW": "stop",
}  # fmt: skip


@both_ways
async def test_every_ending_of_an_answer_has_its_name(google, fake, streaming):
    gateway = await google()
    for reason, finish in FINISHES.items():
        with case(reason):
            fake.script("google", frames(ended(reason, {"text": "words"}), streaming=streaming))

            got = await gateway.ask(streaming=streaming)

            assert got.text == "words"
            assert (got.finishes[0] if streaming else got.json["choices"][0]["finish_reason"]) == finish


WORDLESS = {
    "MALFORMED_FUNCTION_CALL": ("empty", "hello from b"),
    "OTHER": ("empty", "hello from b"),
    "STOP": ("empty", "hello from b"),
    "MAX_TOKENS": ("truncated", "hello from b"),
    "PUP_LIMITED_DISABLED": ("forbidden", "hello from b"),
}


@both_ways
@pytest.mark.parametrize(("reason", "means"), WORDLESS.items(), ids=WORDLESS)
async def test_an_answer_that_ends_before_its_first_word_is_a_failure(google, reason, means, streaming):
    gateway = await google(frames(ended(reason), streaming=streaming))

    got = await gateway.ask(streaming=streaming)

    assert got.text == means[1]
    assert got.headers["X-Fallback-Trail"] == f"google/google-model={means[0]}"


BLOCKED = {
    "the prompt": {"promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}, "usageMetadata": {"promptTokenCount": 4}},
    "the answer": ended("SAFETY"),
}


@both_ways
@pytest.mark.parametrize("frame", BLOCKED.values(), ids=BLOCKED)
async def test_a_blocked_request_is_the_clients_to_hear_of(google, fake, frame, streaming):
    gateway = await google(frames(frame, streaming=streaming))

    got = await gateway.ask(streaming=streaming)

    assert got.status == 400
    assert got.error["code"] == "content_filter"
    assert fake.called == ["google"]


async def test_two_equal_calls_in_one_turn_are_two_calls(google):
    twice = [("weather", {"city": "Rom"})] * 2
    gateway = await google(WIRE.says(Said(calls=twice, finish="tool_calls")))

    got = await gateway.chat(tools=[tool()])

    calls = got.json["choices"][0]["message"]["tool_calls"]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"city": "Rom"}] * 2
    assert calls[0]["id"] != calls[1]["id"]
    assert got.json["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_stream_that_ends_without_an_ending_is_cut(google, fake):
    gateway = await google(chunked(event(gemini_frame({"text": "half"}, said=None))))

    got = await gateway.stream()

    assert got.text == "half"
    assert got.finishes == ["error"]
    assert (await gateway.row())["error_kind"] == "truncated"


# --- Thought signatures -------------------------------------------------------------------------------------------


async def signed_call(gateway, streaming: bool) -> dict:
    got = await gateway.ask(streaming=streaming, tools=[tool()])
    (call,) = got.calls if streaming else got.json["choices"][0]["message"]["tool_calls"]
    return call


def signature_sent(request) -> str | None:
    (part,) = [part for turn in request.json["contents"] for part in turn["parts"] if "functionCall" in part]
    return part.get("thoughtSignature")


CHANGES = {
    "kept by the client": (lambda call: call, SIGNATURE),
    "lost by the client": (lambda call: {name: call[name] for name in ("id", "type", "function")}, SIGNATURE),
    "and the id made anew": (lambda call: {"id": "mine", "type": "function", "function": call["function"]}, SIGNATURE),
    "and the arguments written otherwise": (
        lambda call: {"id": "x", "type": "function", "function": {"name": "weather", "arguments": '{ "city":"Rom" }'}},
        SIGNATURE,
    ),
    "of another model's call": (
        lambda call: {"id": "x", "type": "function", "function": {"name": "weather", "arguments": "{}"}},
        UNSIGNED,
    ),
    "under its short name": (
        lambda call: (
            {"id": "x", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            | {"thought_signature": "bXk="}
        ),
        "bXk=",
    ),
}


@both_ways
@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
async def test_a_signature_comes_back_with_its_call(google, fake, change, expected, streaming):
    called = WIRE.says(Said(calls=[("weather", {"city": "Rom"})], finish="tool_calls"))
    gateway = await google(called, WIRE.says(Said("sun")))
    call = await signed_call(gateway, streaming)
    assert call["extra_content"] == {"google": {"thought_signature": SIGNATURE}}

    changed = {name: value for name, value in change(call).items() if name != "index"}
    result = {"role": "tool", "tool_call_id": changed["id"], "content": "sun"}
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [changed]}, result]
    got = await gateway.ask(streaming=streaming, messages=history, tools=[tool()])

    assert got.text == "sun"
    assert signature_sent(fake.requests[1]) == expected


def test_signatures_are_forgotten_in_time_and_never_too_many():
    held = Signatures()
    for number in range(SIGNATURES_MAX):
        held.put(f"call{number}", "f", {"n": number}, f"s{number}", now=float(number))

    assert len(held) == SIGNATURES_MAX
    last = SIGNATURES_MAX - 1
    assert held.get("call0", now=last) is None
    assert held.like("f", {"n": 0}, now=last) is None
    assert held.get(f"call{last}", now=last) == f"s{last}"
    assert held.like("f", {"n": last}, now=last) == f"s{last}"
    assert held.get(f"call{last}", now=last + SIGNATURE_TTL_S) is None


async def test_the_real_client_sees_the_signature_as_an_extra_field(google):
    gateway = await google(body(gemini_frame(*call_parts([("weather", {})]), said=Said(finish="tool_calls"))))

    got = await gateway.openai.chat.completions.create(
        model=IN_ORDER, messages=[{"role": "user", "content": "hi"}], tools=[tool()]
    )

    (call,) = got.choices[0].message.tool_calls
    assert call.model_extra["extra_content"]["google"]["thought_signature"] == SIGNATURE
