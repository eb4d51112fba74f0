"""SPEC 3.2 to 3.8 and 13.2: models, pinning, what is passed on and what comes back, told by real clients."""

import json
import re

import pytest
from conftest import IN_ORDER, both_ways, case, default_key
from fake_provider import answer, chunk, completion, error, sse

MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "…", "parameters": {"type": "object", "properties": {}}},
}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}}


# --- The openai client ------------------------------------------------------------------------------------------


async def test_the_openai_client_gets_its_answer(start_gateway, fake):
    gateway = await start_gateway()

    got = await gateway.openai.chat.completions.create(model=IN_ORDER, messages=MESSAGES)

    assert got.choices[0].message.content == "hello from a"
    assert got.choices[0].finish_reason == "stop"
    assert (got.id, got.model) == ("chatcmpl-fake", "provider-own-name")
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (11, 7)


async def test_the_openai_client_streams_after_a_failover(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", error(500))
    options = {"stream": True, "stream_options": {"include_usage": True}}

    parts = [
        p async for p in await gateway.openai.chat.completions.create(model=IN_ORDER, messages=MESSAGES, **options)
    ]

    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == "hello from b"
    assert parts[-1].usage.completion_tokens == 7


CALL = {"id": "call_abc", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}


async def test_tool_calls_make_the_round_trip(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", completion(None, finish="tool_calls", message={"tool_calls": [CALL]}), answer("sunny"))
    create = gateway.openai.chat.completions.create

    asked = await create(model=IN_ORDER, messages=MESSAGES, tools=[TOOL], tool_choice="auto")

    assert asked.choices[0].finish_reason == "tool_calls"
    call = asked.choices[0].message.tool_calls[0]
    assert (call.id, call.function.name, json.loads(call.function.arguments)) == (
        "call_abc",
        "weather",
        {"city": "Köln"},
    )
    assert (fake.requests[0].json["tools"], fake.requests[0].json["tool_choice"]) == ([TOOL], "auto")

    result = {"role": "tool", "tool_call_id": "call_abc", "content": "22 degrees"}
    history = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [CALL]}, result]
    told = await create(model=IN_ORDER, messages=history, tools=[TOOL])

    assert told.choices[0].message.content == "sunny"
    assert fake.requests[1].json["messages"][1]["tool_calls"] == [CALL]
    assert fake.requests[1].json["messages"][2] == result


async def test_tool_calls_are_streamed(start_gateway, fake):
    gateway = await start_gateway()
    first = CALL | {"index": 0, "function": {"name": "weather", "arguments": ""}}
    rest = [{"index": 0, "function": {"arguments": piece}} for piece in ('{"city"', ': "Köln"}')]
    calls = [chunk(tool_calls=[call]) for call in (first, *rest)]
    fake.script("a", sse(chunk(role="assistant", content=None), *calls, chunk(finish="tool_calls")))
    create = gateway.openai.chat.completions.create

    parts = [p async for p in await create(model=IN_ORDER, messages=MESSAGES, tools=[TOOL], stream=True)]

    deltas = [call for p in parts if p.choices for call in p.choices[0].delta.tool_calls or []]
    assert deltas[0].function.name == "weather"
    assert json.loads("".join(d.function.arguments for d in deltas)) == {"city": "Köln"}
    assert parts[-1].choices[0].finish_reason == "tool_calls"


# --- Passing on -------------------------------------------------------------------------------------------------

PASSED_ON = {
    "temperature": 0.25,
    "top_p": 0.9,
    "n": 1,
    "stop": ["END"],
    "seed": 7,
    "max_tokens": 50,
    "presence_penalty": 0.5,
    "logit_bias": {"50256": -100},
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
    "reasoning_effort": "low",
    "parallel_tool_calls": False,
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "weather"}},
    "user": "someone",
    "metadata": {"k": "v"},
    "an_unknown_field": {"deep": [1, 2.5, None, "ü"]},
}


@both_ways
async def test_fields_are_passed_on_untouched(start_gateway, fake, streaming):
    gateway = await start_gateway({"a": {"model": {"vision": True}}})
    parts = [{"type": "text", "text": "what is this?"}, IMAGE]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": parts, "name": "someone"}]

    assert (await gateway.ask(streaming=streaming, messages=messages, **PASSED_ON)).text == "hello from a"

    sent = fake.requests[0].json
    assert {name: sent.get(name) for name in PASSED_ON} == PASSED_ON
    assert sent["messages"] == messages
    assert sent["model"] == "a-model"
    assert sent.get("stream", False) is streaming


async def test_what_a_platform_is_known_to_reject_is_left_out(start_gateway, fake):
    gateway = await start_gateway({"a": {"quirks": {"drop": ["logprobs", "seed"]}}, "b": {}})
    fake.script("a", error(500))

    await gateway.chat(logprobs=True, seed=7, user="someone")

    first, second = (request.json for request in fake.requests)
    assert "logprobs" not in first
    assert "seed" not in first
    assert first["user"] == "someone"
    assert (second["logprobs"], second["seed"]) == (True, 7)


async def test_an_answer_keeps_its_unknown_fields(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", completion("hello", message={"annotations": [{"x": 1}]}, system_fingerprint="fp", x_extra=[1.5]))

    got = (await gateway.chat()).json

    assert got["x_extra"] == [1.5]
    assert got["system_fingerprint"] == "fp"
    assert got["choices"][0]["message"]["annotations"] == [{"x": 1}]


async def test_client_headers_are_not_forwarded_and_the_providers_key_is_its_own(start_gateway, fake):
    gateway = await start_gateway()

    await gateway.chat(headers={"x-custom": "mine", "cookie": "a=b", "x-session-id": "s", "user-agent": "me/1"})

    (request,) = fake.requests
    assert request.headers["authorization"] == f"Bearer {default_key('a')}"
    assert not {"x-custom", "cookie", "x-session-id"} & set(request.headers)
    assert request.headers.get("user-agent") != "me/1"
    assert gateway.api_key not in str(request.headers)
    assert request.path == "/a/v1/chat/completions"


TOLERATED = {
    "content of parts": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    "parts without type": [{"role": "user", "content": [{"text": "hi"}]}],
    "content null": [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    "developer": [{"role": "developer", "content": "be brief"}, *MESSAGES],
    "tool_calls null": [*MESSAGES, {"role": "assistant", "content": "well", "tool_calls": None}, *MESSAGES],
    "tool call without id": [
        *MESSAGES,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL["function"]}]},
        {"role": "tool", "content": "22 degrees"},
    ],
    "an empty assistant turn": [*MESSAGES, {"role": "assistant", "content": ""}, *MESSAGES],
}


async def test_what_real_clients_send_is_tolerated(start_gateway, fake):
    gateway = await start_gateway()
    for name, messages in TOLERATED.items():
        with case(name):
            assert (await gateway.chat(messages=messages)).text == "hello from a"
            assert_well_formed(fake.requests[-1].json["messages"])
    assert fake.called == ["a"] * len(TOLERATED)


def assert_well_formed(sent: list[dict]) -> None:
    assert all(message.get("role") for message in sent)
    assert not any("tool_calls" in message and not message["tool_calls"] for message in sent)
    assert not any(m["role"] == "assistant" and not m.get("content") and "tool_calls" not in m for m in sent)
    calls = [call for message in sent for call in message.get("tool_calls", [])]
    assert all(call["id"] for call in calls)
    results = [message["tool_call_id"] for message in sent if message["role"] == "tool"]
    assert set(results) <= {call["id"] for call in calls}


@pytest.mark.parametrize("limit", [0, -1])
async def test_a_limit_of_no_tokens_is_no_limit(start_gateway, fake, limit):
    gateway = await start_gateway()

    await gateway.chat(max_tokens=limit)

    assert "max_tokens" not in fake.requests[0].json


async def test_the_newer_name_of_the_token_limit_counts_too(start_gateway, fake):
    gateway = await start_gateway()

    await gateway.chat(max_completion_tokens=33)

    sent = fake.requests[0].json
    assert sent.get("max_completion_tokens", sent.get("max_tokens")) == 33


@both_ways
async def test_a_field_of_null_is_as_good_as_none(start_gateway, fake, streaming):
    gateway = await start_gateway()
    for field in ("temperature", "tools", "stop", "max_tokens", "stream_options", "response_format"):
        with case(field):
            assert (await gateway.ask(streaming=streaming, **{field: None})).text == "hello from a"

            assert fake.requests[-1].json.get(field, "absent") is not None


# --- Response headers -------------------------------------------------------------------------------------------


@both_ways
async def test_an_answer_says_where_it_came_from(start_gateway, fake, streaming):
    gateway = await start_gateway({"a": {"model": {"model_id": "vendor/größe \u2028x:free"}}, "b": {}})

    first = await gateway.ask(streaming=streaming)
    fake.script("a", error(503))
    second = await gateway.ask(streaming=streaming)

    encoded = "vendor/gr%C3%B6%C3%9Fe"
    assert first.headers["X-Routed-Via"].startswith(f"a/{encoded}")
    assert "X-Fallback-Attempts" not in first.headers
    assert "X-Fallback-Trail" not in first.headers
    assert first.headers["X-Request-Id"] != second.headers["X-Request-Id"]
    assert second.headers["X-Routed-Via"] == "b/b-model"
    assert second.headers["X-Fallback-Attempts"] == "1"
    assert re.fullmatch(f"a/{encoded}.*=server_error", second.headers["X-Fallback-Trail"])
    assert all(32 <= ord(c) < 127 for got in (first, second) for value in got.headers.values() for c in value)


# --- Models -----------------------------------------------------------------------------------------------------

VIRTUAL = ["auto", "auto-balanced", "auto-smart", "auto-fast", "auto-priority"]
SHARED = {"a": {"model": {"model_id": "org/shared"}}, "b": {"model": {"model_id": "org/shared"}}, "c": {}}


async def test_models_lists_the_virtual_ones_and_then_each_model_once(start_gateway, fake):
    gateway = await start_gateway(SHARED)

    listed = [model.id async for model in gateway.openai.models.list()]

    assert set(VIRTUAL) == set(listed[: len(VIRTUAL)])
    assert listed.count("org/shared") == 1
    assert listed.count("c-model") == 1
    assert len(listed) == len(set(listed))
    assert (await gateway.get("/v1/models")).json["object"] == "list"


@pytest.mark.parametrize("name", ["org/shared", "c-model", "auto-smart", "auto"])
async def test_one_model_can_be_asked_for(start_gateway, fake, name):
    gateway = await start_gateway(SHARED)

    got = await gateway.openai.models.retrieve(name)

    assert (got.id, got.object) == (name, "model")
    assert (await gateway.get(f"/v1/models/{name}")).json["id"] == name


async def test_the_window_that_is_promised_is_one_that_a_key_reaches(start_gateway, fake):
    def holds(tokens: int, **given) -> dict:
        return {"model": {"model_id": "org/same", "context_window": tokens}, **given}

    gateway = await start_gateway({"a": holds(50_000), "b": holds(9_000_000, keys=[]), "c": {"keys": []}})
    _, found = await gateway.call("POST", "/api/keys", {"platform": "b", "key": "sk-b-0000000001"})

    async def windows() -> dict[str, int]:
        listed = (await gateway.get("/v1/models")).json["data"]
        return {entry["id"]: entry["context_window"] for entry in listed}

    assert {(await windows())[name] for name in (*VIRTUAL, "org/same")} == {9_000_000}
    await gateway.call("PATCH", f"/api/keys/{found['id']}", {"enabled": False})
    assert {(await windows())[name] for name in (*VIRTUAL, "org/same")} == {50_000}
    assert (await windows())["c-model"] == 300_000  # what it would hold
    entry = (await gateway.get("/v1/models/auto", headers={"anthropic-version": "2023-06-01"})).json
    assert 9_000_000 not in entry.values()


async def test_an_unknown_model_is_404_in_the_list(start_gateway, fake):
    gateway = await start_gateway()

    got = await gateway.get("/v1/models/org/unknown")

    assert got.status == 404
    assert got.error["code"] == "model_not_found"


SPELLINGS = [*VIRTUAL, "auto:smart", "auto:priority", "freellmapi/auto", "freellmapi/auto-fast", "freellmapi/auto:fast"]


async def test_every_spelling_of_a_mode_is_served_by_some_platform(start_gateway, fake):
    gateway = await start_gateway(["a"])
    for name in (..., "", *SPELLINGS):
        with case(name):
            got = await gateway.chat(model=name)

            assert got.text == "hello from a"
            (row,) = await gateway.rows_of(got, 1)
            mode = re.sub("freellmapi/|auto|[-:]", "", "" if name is ... else name) or "balanced"
            assert row["routing_mode"] == mode


# --- Pinning ----------------------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("name", ["c-model", "c/c-model"])
async def test_a_pinned_model_is_tried_first(start_gateway, fake, name, streaming):
    gateway = await start_gateway()

    assert (await gateway.ask(streaming=streaming, model=name)).text == "hello from c"

    assert fake.called == ["c"]
    assert (await gateway.row())["requested_model"] == name


async def test_a_pinned_model_is_tried_on_every_platform_with_every_key_before_others(start_gateway, fake):
    platforms = {name: dict(option) for name, option in SHARED.items()}
    platforms["b"]["keys"] = ["sk-b-1", "sk-b-2"]
    gateway = await start_gateway(platforms)
    for name in "ab":
        fake.script(name, error(429))

    assert (await gateway.chat(model="org/shared")).text == "hello from c"

    assert sorted(fake.called[:3]) == ["a", "b", "b"]
    assert fake.called[3:] == ["c"]


async def test_the_named_platform_comes_first_and_then_the_others_with_that_model(start_gateway, fake):
    gateway = await start_gateway({"c": {}, **SHARED})
    fake.script("b", error(500))

    assert (await gateway.chat(model="b/org/shared")).text == "hello from a"

    assert fake.called == ["b", "a"]


async def test_an_exact_model_id_wins_over_a_platform(start_gateway, fake):
    gateway = await start_gateway({"a": {}, "b": {"model": {"model_id": "a/a-model"}}})

    assert (await gateway.chat(model="a/a-model")).text == "hello from b"


async def test_without_fallback_every_platform_of_the_pinned_model_and_no_other_is_tried(start_gateway, fake):
    gateway = await start_gateway(SHARED)
    for name in "ab":
        fake.script(name, error(500))

    got = await gateway.chat(model="org/shared", headers={"X-Fallback": "none"})

    assert got.status == 502
    assert set(fake.called) == {"a", "b"}
    assert len(fake.called) == 3  # the last route is asked once more (SPEC 5.1)


# --- What a request needs (3.7) ---------------------------------------------------------------------------------


@both_ways
async def test_an_image_goes_only_to_models_that_see(start_gateway, fake, streaming):
    gateway = await start_gateway({"a": {}, "b": {"model": {"vision": True}}})

    got = await gateway.ask(streaming=streaming, messages=[{"role": "user", "content": [IMAGE]}])

    assert got.text == "hello from b"
    assert fake.called == ["b"]


@both_ways
async def test_tools_go_only_to_models_that_know_them(start_gateway, fake, streaming):
    gateway = await start_gateway({"a": {"model": {"tools": False}}, "b": {}})

    assert (await gateway.ask(streaming=streaming, tools=[TOOL])).text == "hello from b"

    assert fake.called == ["b"]


@both_ways
async def test_a_long_request_skips_models_with_a_short_window(start_gateway, fake, streaming):
    windows = {"a": 2_000, "b": 4_000, "c": 100_000}
    gateway = await start_gateway({name: {"model": {"context_window": size}} for name, size in windows.items()})

    assert (await gateway.ask("x" * 2_000, streaming=streaming)).text == "hello from a"  # 500 and 1000 tokens
    assert (await gateway.ask("x" * 6_000, streaming=streaming)).text == "hello from b"


@both_ways
async def test_a_large_wish_locks_nobody_out_and_is_cut_to_what_fits(start_gateway, fake, streaming):
    models = {"a": {"context_window": 2_000}, "b": {"context_window": 50_000, "max_output": 8_000}, "c": {}}
    gateway = await start_gateway({name: {"model": model} for name, model in models.items()})

    for platform, words, most in (("a", 2_000, 1_500), ("b", 6_000, 8_000), ("c", 240_000, 128_000)):
        got = await gateway.ask("x" * words, streaming=streaming, max_tokens=128_000)
        assert got.text == f"hello from {platform}"
        assert most * 0.9 <= fake.requests[-1].json["max_tokens"] <= most


# --- The log ----------------------------------------------------------------------------------------------------


@both_ways
async def test_a_success_is_logged_with_all_its_figures(start_gateway, fake, streaming):
    gateway = await start_gateway(["a"])

    got = await gateway.ask("a secret question", streaming=streaming)

    row = await gateway.row()
    assert (row["platform"], row["model_id"], row["status"], row["attempt"]) == ("a", "a-model", "success", 1)
    assert (row["requested_model"], row["routing_mode"]) == (IN_ORDER, "priority")
    assert (row["error_kind"], row["error"], row["http_status"]) == (None, None, 200)
    assert (row["input_tokens"], row["output_tokens"], row["streamed"]) == (11, 7, int(streaming))
    assert row["latency_ms"] >= row["ttfb_ms"] >= 0
    assert row["request_id"] == got.headers["X-Request-Id"]
    assert isinstance(row["key_id"], int)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", row["created_at"])
    assert "secret question" not in str(row)
