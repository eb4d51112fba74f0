"""SPEC 16: the Messages API as the anthropic client uses it: whole answers, errors by class, what is answered here."""

import json

import pytest
from conftest import IN_ORDER, Answer, Stream, both_ways, case
from fake_provider import PAUSE, answer, body, completion, error, raw
from strict_messages import assert_count, assert_error, assert_in_order, assert_message, events_of
from turns import PIXEL, WEATHER, call_of

HI = [{"role": "user", "content": "hi"}]


def create(gateway, **fields):
    return gateway.anthropic.messages.create(**{"model": IN_ORDER, "max_tokens": 4000, "messages": HI} | fields)


async def post(gateway, path: str = "/v1/messages", headers=None, **fields) -> Answer:
    request = {"model": IN_ORDER, "max_tokens": 4000, "messages": HI} | fields
    return await gateway.send({k: v for k, v in request.items() if v is not ...}, path=path, headers=headers)


# --- The anthropic client ---------------------------------------------------------------------------------------------


async def test_the_anthropic_client_gets_its_answer(start_gateway, fake):
    gateway = await start_gateway()

    got = await create(
        gateway,
        system=[
            {"type": "text", "text": "be brief", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "!"},
        ],
        extra_body={"temperature": 0.5, "top_k": 40},
        stop_sequences=["END"],
        metadata={"user_id": "u"},
        service_tier="auto",
    )

    assert [(block.type, block.text) for block in got.content] == [("text", "hello from a")]
    assert (got.type, got.role, got.model, got.stop_reason) == ("message", "assistant", IN_ORDER, "end_turn")
    assert (got.usage.input_tokens, got.usage.output_tokens) == (11, 7)
    assert got._request_id.startswith("req_")
    sent = fake.requests[0].json
    assert sent == {
        "model": "a-model",
        "messages": [{"role": "system", "content": "be brief\n\n!"}, {"role": "user", "content": "hi"}],
        "max_tokens": 4000,
        "temperature": 0.5,
        "top_k": 40,
        "stop": ["END"],
    }
    row = await gateway.row()
    assert (row["status"], row["requested_model"], row["input_tokens"]) == ("success", IN_ORDER, 11)


async def test_a_whole_answer_is_right_by_the_clients_own_model(start_gateway, fake):
    gateway = await start_gateway()

    got = await post(gateway, "/v1/messages?beta=true")

    assert_message(got.json, IN_ORDER)
    assert got.headers["X-Routed-Via"] == "a/a-model"
    assert got.headers["request-id"] == got.headers["X-Request-Id"]


async def test_parallel_tool_calls_and_their_results_make_the_round_trip(start_gateway, fake):
    gateway = await start_gateway()
    calls = [call_of("call_koeln", arguments='{"city": "Köln"}'), call_of("call_bonn", arguments='{"city": "Bonn"}')]
    asked = completion("I look it up.", finish="tool_calls", message={"tool_calls": calls})
    fake.script("a", asked, answer("both sunny"))

    first = await create(gateway, tools=[WEATHER], tool_choice={"type": "any", "disable_parallel_tool_use": True})

    said, *made = first.content
    assert (first.stop_reason, said.text) == ("tool_use", "I look it up.")
    assert [(c.type, c.id, c.name, c.input) for c in made] == [
        ("tool_use", "call_koeln", "weather", {"city": "Köln"}),
        ("tool_use", "call_bonn", "weather", {"city": "Bonn"}),
    ]
    sent = fake.requests[0].json
    function = {"name": "weather", "description": "The weather in a city.", "parameters": WEATHER["input_schema"]}
    assert sent["tools"] == [{"type": "function", "function": function}]
    assert (sent["tool_choice"], sent["parallel_tool_calls"]) == ("required", False)
    results = [
        {"type": "text", "text": "Here it is."},
        {"type": "tool_result", "tool_use_id": "call_bonn", "content": "rain", "is_error": True},
        {"type": "tool_result", "tool_use_id": "call_koeln", "content": [{"type": "text", "text": "sun"}]},
    ]
    second = await create(
        gateway, tools=[WEATHER], messages=[*HI, first.to_param(), {"role": "user", "content": results}]
    )
    assert second.content[0].text == "both sunny"
    _, asked, *told = fake.requests[1].json["messages"]
    assert asked["content"] == "I look it up."
    assert [json.loads(call["function"]["arguments"]) for call in asked["tool_calls"]] == [
        {"city": "Köln"},
        {"city": "Bonn"},
    ]
    assert told == [
        {"role": "tool", "tool_call_id": "call_koeln", "content": "sun"},
        {"role": "tool", "tool_call_id": "call_bonn", "content": "[The tool reported an error]\nrain"},
        {"role": "user", "content": "Here it is."},
    ]


async def test_images_reach_a_model_that_sees(start_gateway, fake):
    gateway = await start_gateway({"blind": {}, "a": {"model": {"vision": True}}})
    data = PIXEL.partition(",")[2]
    content = [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
        {"type": "image", "source": {"type": "url", "url": "https://example.org/x.png"}},
        {"type": "text", "text": "What is it?"},
    ]

    await create(gateway, messages=[{"role": "user", "content": content}])

    assert fake.called == ["a"]
    assert fake.requests[0].json["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "image_url", "image_url": {"url": "https://example.org/x.png"}},
        {"type": "text", "text": "What is it?"},
    ]


async def test_thoughts_of_a_whole_answer_are_a_block_and_are_not_sent_back(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", completion("4", message={"reasoning_content": "2 + 2"}), answer("5"))

    first = await create(gateway, thinking={"type": "enabled", "budget_tokens": 20_000})

    assert [(b.type, getattr(b, b.type)) for b in first.content] == [("thinking", "2 + 2"), ("text", "4")]
    assert fake.requests[0].json["reasoning_effort"] == "high"
    await create(gateway, messages=[*HI, first.to_param(), {"role": "user", "content": "and one more?"}])
    assert "2 + 2" not in json.dumps(fake.requests[1].json)


async def test_thoughts_go_back_to_a_platform_that_wants_them(start_gateway, fake):
    gateway = await start_gateway({"a": {"quirks": {"replay_reasoning_content": True}}})
    said = [{"type": "thinking", "thinking": "2 + 2", "signature": ""}, {"type": "text", "text": "4"}]

    await create(gateway, messages=[*HI, {"role": "assistant", "content": said}, *HI])

    assert fake.requests[0].json["messages"][1] == {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}


ENDS = {
    "stop": (completion("x"), "end_turn"),
    "length": (completion("x", finish="length", usage=(11, 4000)), "max_tokens"),
    "a filter": (completion("x", finish="content_filter"), "refusal"),
    "calls without saying so": (completion(None, message={"tool_calls": [call_of("call_xyz")]}), "tool_use"),
    "calls that are none": (completion("x", finish="tool_calls"), "end_turn"),
    "an end of its own making": (completion("x", finish="eos"), "end_turn"),
}


async def test_every_end_has_its_reason(start_gateway, fake):
    gateway = await start_gateway()
    for name, (reply, reason) in ENDS.items():
        fake.script("a", reply)
        with case(name):
            got = await post(gateway, tools=[WEATHER | {"name": "f"}])
            assert_message(got.json, IN_ORDER)
            assert got.json["stop_reason"] == reason


async def test_usage_is_estimated_where_the_provider_tells_none(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", completion("x" * 40, usage=None))

    got = (await create(gateway, messages=[{"role": "user", "content": "y" * 80}])).usage

    assert (got.input_tokens, got.output_tokens) == (20, 10)


async def test_what_a_cache_gave_is_no_part_of_the_input(start_gateway, fake):
    gateway = await start_gateway()
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 80}}
    choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}
    fake.script("a", body({"choices": [choice], "usage": usage}))

    got = (await create(gateway)).usage

    assert (got.input_tokens, got.cache_read_input_tokens, got.cache_creation_input_tokens) == (20, 80, 0)


AGENTS_REQUEST = {  # as Claude Code 2.1.332 sends it to a gateway, but for its words
    "model": "claude-opus-5-5",
    "max_tokens": 128_000,
    "stream": True,
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.332.bd3; cc_entrypoint=cli;"},
        {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be careful."},
    ],
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<system-reminder>…</system-reminder>"},
                {"type": "text", "text": "hi"},
            ],
        },
        {
            "role": "system",
            "content": [{"type": "text", "text": "# Environment", "cache_control": {"type": "ephemeral"}}],
            "output_config": {"effort": "medium"},
        },
    ],
    "tools": [
        WEATHER,
        {"name": "ToolSearch", "input_schema": {"type": "object", "properties": {}}},
        {
            "name": "DeferredToolPlaceholder",
            "input_schema": {"type": "object", "properties": {}},
            "defer_loading": True,
        },
    ],
    "thinking": {"type": "adaptive", "display": "updates"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "safeguards": [{"type": "dangerous_tool_use", "classifier_context": {"v": 1, "user_identity": None}}],
    "output_config": {"effort": "medium"},
    "metadata": {"user_id": '{"device_id":"3f4e","account_uuid":"","session_id":"25d2"}'},
}
AGENTS_HEADERS = {
    "anthropic-version": "2023-06-01",
    "anthropic-beta": "claude-code-20250219,mid-conversation-tool-changes-2026-07-01,per-turn-control-2026-07-01",
    "x-claude-code-session-id": "25d2ec00-f17f-4b39-892c-fe5a2ef69618",
    "x-app": "cli",
}


async def test_an_agents_request_goes_out_without_what_only_anthropics_servers_read(start_gateway, fake):
    gateway = await start_gateway({"a": {"model": {"context_window": 40_000}}})

    got = await gateway.send(AGENTS_REQUEST, path="/v1/messages?beta=true", headers=AGENTS_HEADERS)

    events = events_of(Stream(got.status, got.headers, got.body))
    assert assert_in_order(events, "claude-opus-5-5") == [{"type": "text", "text": "hello from a"}]
    sent = fake.requests[0].json
    assert sent.keys() == {
        "model", "messages", "tools", "max_tokens", "reasoning_effort", "stream", "stream_options"
    }  # fmt: skip
    assert sent["messages"] == [
        {"role": "system", "content": "You are an agent.\n\nBe careful."},
        {"role": "user", "content": "<system-reminder>…</system-reminder>\nhi"},
        {"role": "system", "content": "# Environment"},
    ]
    assert [tool["function"]["name"] for tool in sent["tools"]] == ["weather", "ToolSearch"]
    assert 30_000 < sent["max_tokens"] < 40_000
    assert not {"anthropic-beta", "anthropic-version", "x-app"} & fake.requests[0].headers.keys()


# --- Names (16.1) -----------------------------------------------------------------------------------------------------

NAMES = {
    "claude-freeway": ("balanced", None),
    "claude-freeway-smart": ("smart", None),
    "claude-freeway-fast": ("fast", None),
    "claude-opus-4-8": ("smart", None),
    "claude-sonnet-5-20260801": ("balanced", None),
    "claude-haiku-4-5": ("fast", None),
    "claude-3-5-sonnet-latest": ("balanced", None),
    "claude-opus-4-8[1m]": ("smart", None),
    "anthropic/claude-haiku-9": ("fast", None),
    "us.anthropic.claude-opus-4-8-v1:0": ("smart", None),
    "claude-fable-5-2": ("smart", None),
    "claude-something-new": ("balanced", None),
    "auto-smart": ("smart", None),
    "auto": ("balanced", None),
    "b-model": ("balanced", "b"),
    "b/b-model": ("balanced", "b"),
    "claude-of-our-own": ("balanced", "c"),
}


async def test_a_name_means_a_model_or_else_a_mode(start_gateway, fake):
    gateway = await start_gateway({"a": {}, "b": {}, "c": {"model": {"model_id": "claude-of-our-own"}}})
    for name, (mode, platform) in NAMES.items():
        with case(name):
            got = await post(gateway, model=name)
            assert_message(got.json, name)
            (row,) = await gateway.rows_of(got, 1)
            assert (row["requested_model"], row["routing_mode"]) == (name, mode)
            assert platform in (None, row["platform"])


async def test_a_name_that_stands_for_a_mode_has_sessions(start_gateway, fake):
    gateway = await start_gateway()

    for _ in range(4):
        await post(gateway, model="claude-opus-4-8")

    assert len(set(fake.called)) == 1
    assert (await gateway.protection())["sessions"]["count"] == 1


async def test_a_name_that_means_nothing_is_refused(start_gateway, fake):
    gateway = await start_gateway()
    for name in ("gpt-unknown", "opus-of-somebody", "a/unknown", "claudette"):
        with case(name):
            words = assert_error(await post(gateway, model=name), 404, "not_found_error")
            assert name in words
    assert fake.called == []


# --- Errors by class (16.4) -------------------------------------------------------------------------------------------

ROUTED = {
    "a 429": (error(429, headers={"retry-after": "7"}), 429, "rate_limit_error", "RateLimitError"),
    "a 500": (error(500), 529, "overloaded_error", "OverloadedError"),
    "a 503": (error(503), 529, "overloaded_error", "OverloadedError"),
    "a 401": (error(401), 529, "overloaded_error", "OverloadedError"),
    "a 404": (error(404), 529, "overloaded_error", "OverloadedError"),
    "no JSON": (
        raw(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx"),
        529,
        "overloaded_error",
        "OverloadedError",
    ),
    "silence": (raw(PAUSE), 529, "overloaded_error", "OverloadedError"),
    "a bad request": (error(400, "no such field"), 400, "invalid_request_error", "BadRequestError"),
    "a bad request of another number": (error(422, "no"), 400, "invalid_request_error", "BadRequestError"),
    "a filter": (error(400, code="content_filter"), 400, "invalid_request_error", "BadRequestError"),
}
SHORT_TIMES = {"REQUEST_TIMEOUT_MS": "300", "MAX_STREAM_STALL_MS": "300", "FIRST_TOKEN_TIMEOUT_MS": "300"}


@both_ways
@pytest.mark.parametrize(("reply", "status", "kind", "raised"), ROUTED.values(), ids=ROUTED)
async def test_what_every_provider_says_becomes_an_error_of_its_class(
    start_gateway, fake, reply, status, kind, raised, streaming, anthropic
):
    gateway = await start_gateway(["a"], SHORT_TIMES | {"WAIT_FOR_CAPACITY_MS": "0"})
    fake.script("a", reply)

    got = await post(gateway, stream=streaming)

    words = assert_error(got, status, kind)
    assert "error.attempts" not in words
    assert "X-Fallback-Trail" in got.headers
    if status == 429:
        assert 1 <= int(got.headers["retry-after"]) <= 7
    await gateway.recovered()
    with pytest.raises(getattr(anthropic, raised)) as caught:
        await create(gateway, stream=streaming)
    assert caught.value.type == kind
    assert caught.value.request_id.startswith("req_")


async def test_what_is_resting_is_overloaded(start_gateway, fake):
    gateway = await start_gateway(["a"], {"WAIT_FOR_CAPACITY_MS": "0"})
    fake.script("a", error(500))
    await post(gateway)

    got = await post(gateway)

    assert_error(got, 529, "overloaded_error")


async def test_nobody_to_ask_is_overloaded(start_gateway, fake):
    gateway = await start_gateway({"a": {"keys": []}, "b": {"keys": ["k"], "model": {"enabled": True}}})
    fake.script("b", error(401))
    await post(gateway)

    assert_error(await post(gateway), 529, "overloaded_error")


TOO_LONG = r"prompt is too long: \d+ tokens > \d+ maximum"


async def test_a_prompt_too_long_for_all_is_told_in_the_words_that_clients_look_for(start_gateway, fake):
    gateway = await start_gateway({"a": {"model": {"context_window": 20_000}}})

    got = await post(gateway, max_tokens=1000, messages=[{"role": "user", "content": "x" * 100_000}])
    words = assert_error(got, 400, "invalid_request_error")

    assert words == "prompt is too long: 26000 tokens > 20000 maximum"
    assert fake.called == []


@both_ways
async def test_a_prompt_too_long_by_the_providers_word_is_told_in_the_same_words(
    start_gateway, fake, streaming, anthropic
):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", error(400, "maximum context length is 8000 tokens", code="context_length_exceeded"))
    fake.script("b", error(413, "This model's maximum context length is 8192 tokens"))

    words = assert_error(await post(gateway, stream=streaming), 400, "invalid_request_error")

    assert words == "prompt is too long: 200001 tokens > 200000 maximum"
    with pytest.raises(anthropic.BadRequestError, match=TOO_LONG):
        await create(gateway, stream=streaming)


REFUSED = {
    "no JSON": (b"{", "not valid JSON"),
    "no object": (b"[]", "must be a JSON object"),
    "no messages": ({"messages": ...}, "messages: Field required"),
    "messages that are no list": ({"messages": "hi"}, "messages: Input should be a valid list"),
    "an empty list": ({"messages": []}, "messages: at least one message is required"),
    "no role": ({"messages": [{"content": "hi"}]}, "messages.0.role: Field required"),
    "a role of another API": (
        {"messages": [*HI, {"role": "tool", "content": "hi"}]},
        "messages.1.role: Input should be",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
    "content of another type": ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content: Input should be"),
    "a block without type": ({"messages": [{"role": "user", "content": [{}]}]}, "messages.0.content.0.type: Field"),
    "a temperature that is none": ({"temperature": "warm"}, "temperature: must be a number"),
    "a limit that is none": ({"max_tokens": "many"}, "max_tokens: must be a whole number"),
    "stops of another type": ({"stop_sequences": [1]}, "stop_sequences: must be"),
    "a tool without a name": ({"tools": [{"input_schema": {}}]}, "tools.0.name: Field required"),
    "tools that are no list": ({"tools": {}}, "tools: Input should be a valid list"),
    "a model of another type": ({"model": 7}, "model: Input should be a valid string"),
    "a switch that is none": ({"stream": "maybe"}, "stream: must be true or false"),
    "a choice that is none": (
        {"tools": [WEATHER], "tool_choice": {"type": "some"}},
        "tool_choice.type: Input should be",
    ),
}


async def test_what_cannot_be_understood_is_refused_in_the_apis_own_terms(start_gateway, fake):
    gateway = await start_gateway()
    for name, (fields, words) in REFUSED.items():
        with case(name):
            if isinstance(fields, bytes):
                got = await gateway.send(fields, path="/v1/messages")
            else:
                got = await post(gateway, **fields)
            assert words in assert_error(got, 400, "invalid_request_error")
    assert fake.called == []


async def test_the_door_speaks_the_dialect_too(start_gateway, fake, anthropic):
    gateway = await start_gateway(settings={"MAX_BODY_BYTES": "20000"})
    version = {"anthropic-version": "2023-06-01"}
    for path, more in (("/v1/messages", {}), ("/v1/messages/count_tokens", {}), ("/v1/models", version)):
        wrong = {"authorization": "Bearer wrong", **more}
        with case(path):
            got = await (gateway.get(path, headers=wrong) if more else post(gateway, path, headers=wrong))
            assert_error(got, 401, "authentication_error")
    assert_error(await post(gateway, messages=[{"role": "user", "content": "x" * 30_000}]), 413, "request_too_large")
    count = await post(gateway, "/v1/messages/count_tokens", messages=[{"role": "user", "content": "x" * 30_000}])
    assert_error(count, 413, "request_too_large")
    assert_error(await gateway.get("/v1/messages"), 405, "invalid_request_error")
    assert_error(await post(gateway, "/v1/messages/batches"), 404, "not_found_error")
    assert_error(await gateway.get("/v1/models/unknown", headers=version), 404, "not_found_error")
    with pytest.raises(anthropic.AuthenticationError):
        await gateway.anthropic.with_options(api_key="wrong").messages.create(model="auto", max_tokens=1, messages=HI)


async def test_the_key_is_taken_in_the_clients_own_header(start_gateway, fake):
    gateway = await start_gateway()
    request = json.dumps({"model": IN_ORDER, "max_tokens": 9, "messages": HI})

    async with gateway.http.post(
        f"{gateway.base_url}/v1/messages", data=request, headers={"x-api-key": gateway.api_key}
    ) as got:
        assert got.status == 200


# --- What is answered here (16.5) -------------------------------------------------------------------------------------

PROBES = {
    "one token": ({"max_tokens": 1, "messages": [{"role": "user", "content": "quota"}]}, "max_tokens"),
    "one token, in a block": (
        {"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 32}]}]},
        "max_tokens",
    ),
    "a warm-up": (
        {
            "max_tokens": 32_000,
            "system": "You are an agent.",
            "tools": [WEATHER],
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Warmup", "cache_control": {"type": "ephemeral"}}],
                }
            ],
        },
        "end_turn",
    ),
    "no token at all": ({"max_tokens": 0}, "max_tokens"),
}


@both_ways
async def test_probes_reach_no_provider(start_gateway, fake, streaming):
    gateway = await start_gateway()
    for name, (fields, reason) in PROBES.items():
        with case(name):
            got = await post(gateway, stream=streaming, **fields)
            if streaming:
                events = events_of(Stream(got.status, got.headers, got.body))
                assert_in_order(events, IN_ORDER)
                assert events[-2]["delta"]["stop_reason"] == reason
            else:
                assert_message(got.json, IN_ORDER)
                assert got.json["stop_reason"] == reason
                assert got.json["usage"]["input_tokens"] >= 1
    assert fake.called == []
    assert (await gateway.get("/api/requests")).json["rows"] == []
    assert "freeway_requests_total" in (await gateway.get("/metrics")).body.decode()


NO_PROBES = {
    "a long one-token request": {"max_tokens": 1, "messages": [{"role": "user", "content": "x" * 33}]},
    "a conversation": {"max_tokens": 1, "messages": [*HI, {"role": "assistant", "content": "ho"}, *HI]},
    "two tokens": {"max_tokens": 2},
    "more than a warm-up": {"messages": [{"role": "user", "content": "Warmup exercises, please"}]},
    "two blocks": {
        "max_tokens": 1,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
    },
    "an image": {
        "max_tokens": 1,
        "messages": [
            {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "https://x.org/x"}}]}
        ],
    },
}


async def test_what_wants_an_answer_is_no_probe(start_gateway, fake):
    gateway = await start_gateway({"a": {"model": {"vision": True}}})
    for name, fields in NO_PROBES.items():
        with case(name):
            assert_message((await post(gateway, **fields)).json, IN_ORDER)
    assert len(fake.called) == len(NO_PROBES)


async def test_tokens_are_counted_here(start_gateway, fake):
    gateway = await start_gateway(["a"])
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBO"}}

    async def count(**fields) -> int:
        got = await post(gateway, "/v1/messages/count_tokens?beta=true", max_tokens=..., **fields)
        assert got.status == 200, got.body
        return assert_count(got.json)

    short = await count()
    assert short >= 1
    assert short < await count(system="Be brief, be friendly.")
    assert short < await count(tools=[WEATHER])
    assert short + 500 < await count(messages=[{"role": "user", "content": [image]}])
    assert await count(messages=[{"role": "user", "content": "x" * 4000}]) in range(1000, 1020)
    assert await count(messages=[{"role": "user", "content": ""}]) == 1
    counted = await gateway.anthropic.messages.count_tokens(model="claude-opus-4-8", messages=HI)
    assert counted.input_tokens == short
    assert fake.called == []
    assert_error(await post(gateway, "/v1/messages/count_tokens", messages=...), 400, "invalid_request_error")


async def test_anyone_may_say_hello(start_gateway, fake):
    gateway = await start_gateway()
    for method in ("GET", "HEAD"):
        async with gateway.http.request(method, f"{gateway.base_url}/api/hello") as got:
            assert got.status == 200


async def test_the_models_are_listed_in_the_apis_own_form(start_gateway, fake):
    gateway = await start_gateway({"a": {"model": {"name": "A Model", "max_output": 9000}}, "b": {}})

    page = await gateway.anthropic.models.list(limit=1000)

    ids = [model.id for model in page.data]
    assert set(ids[:3]) == {"claude-freeway", "claude-freeway-smart", "claude-freeway-fast"}
    assert {"a-model", "b-model", "auto", "auto-smart"} <= set(ids)
    assert len(set(ids)) == len(ids)
    assert (page.has_more, page.first_id, page.last_id) == (False, ids[0], ids[-1])
    assert [model.id async for model in page] == ids
    one = await gateway.anthropic.models.retrieve("a-model")
    assert (one.id, one.type, one.display_name, one.max_input_tokens, one.max_tokens) == (
        "a-model",
        "model",
        "A Model",
        100_000,
        9000,
    )
    assert (await gateway.anthropic.models.retrieve("claude-freeway-smart")).display_name == "Freeway smart"
    assert (await gateway.get("/v1/models")).json["object"] == "list"
