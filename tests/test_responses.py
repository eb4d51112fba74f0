"""SPEC 9: the Responses API without streaming: what goes out, what comes back, what is kept."""

import json

import pytest
from conftest import IN_ORDER, both_ways
from fake_provider import CUT, answer, body, chunk, completion, error, raw, sse
from pydantic import BaseModel
from strict_models import assert_response
from turns import NOW, PIXEL, call_of, parsed, tokens

from dialects.responses import KEPT_MAX, KEPT_S, ResponsesDialect
from wire.chat import Completion, Event, Tally
from wire.errors import GatewayError, InvalidRequest

TOOL = {"type": "function", "name": "weather", "description": "…", "parameters": {"type": "object", "properties": {}}}
NESTED = {"type": "function", "function": {name: value for name, value in TOOL.items() if name != "type"}}


def create(gateway, input="hi", **fields):
    return gateway.openai.responses.create(**{"model": IN_ORDER, "input": input} | fields)


async def post(gateway, **fields):
    request = {"model": IN_ORDER, "input": "hi"} | fields
    return await gateway.send({k: v for k, v in request.items() if v is not ...}, path="/v1/responses")


# --- The openai client ------------------------------------------------------------------------------------------


async def test_the_openai_client_gets_its_answer(start_gateway, fake):
    gateway = await start_gateway()

    got = await create(gateway, instructions="be brief", max_output_tokens=500, metadata={"k": "v"}, temperature=0.5)

    assert got.output_text == "hello from a"
    assert (got.status, got.error, got.incomplete_details) == ("completed", None, None)
    assert (got.object, got.model, got.created_at > NOW - 1e9) == ("response", "provider-own-name", True)
    assert (got.instructions, got.max_output_tokens, got.metadata) == ("be brief", 500, {"k": "v"})
    assert (got.temperature, got.parallel_tool_calls, got.tool_choice, got.tools) == (0.5, True, "auto", [])
    (message,) = got.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert (message.content[0].type, message.content[0].annotations) == ("output_text", [])
    assert (got.usage.input_tokens, got.usage.output_tokens, got.usage.total_tokens) == (11, 7, 18)
    sent = fake.requests[0].json
    assert sent["messages"] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert (sent["max_tokens"], sent["temperature"]) == (500, 0.5)
    assert not {"input", "instructions", "store", "metadata", "max_output_tokens"} & set(sent)


async def test_the_raw_body_has_the_output_text_and_is_valid_by_the_clients_own_model(start_gateway, fake):
    gateway = await start_gateway()

    got = (await post(gateway)).json

    assert got["output_text"] == "hello from a"
    assert_response(got)


LOOSE = {
    "tools in chat's form and without a type": (
        {"tools": [NESTED, {"name": "f"}, {"type": "custom", "custom": {"name": "patch"}}, {"type": "web_search"}]},
        "tools",
        [TOOL, {"type": "function", "name": "f"}, {"type": "custom", "name": "patch"}, {"type": "web_search"}],
    ),
    "a choice in chat's form": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
        "tool_choice",
        {"type": "function", "name": "weather"},
    ),
    "a choice of another API": ({"tools": [TOOL], "tool_choice": {"type": "any"}}, "tool_choice", "required"),
    "a schema in chat's form": (
        {"text": {"format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}, "verbosity": "low"}},
        "text",
        {"format": {"type": "json_schema", "name": "n", "schema": {}}, "verbosity": "low"},
    ),
    "a number as text": ({"temperature": "0.5"}, "temperature", 0.5),
    "a limit that is none": ({"max_output_tokens": -1}, "max_output_tokens", None),
    "a limit with a point": ({"max_output_tokens": 100.0}, "max_output_tokens", 100),
    "a switch as text": ({"parallel_tool_calls": "false", "tools": [TOOL]}, "parallel_tool_calls", False),
    "an effort under another name": (
        {"reasoning": {"effort": "off"}},
        "reasoning",
        {"summary": None, "effort": "none"},
    ),
}


async def test_what_was_asked_loosely_is_repeated_in_the_apis_own_form(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", completion("{}"))  # which is fine where a schema was asked for, too

    for asked, name, told in LOOSE.values():
        got = (await post(gateway, **asked)).json

        assert got[name] == told
        assert_response(got)


async def test_the_finer_counts_of_usage_arrive(start_gateway, fake):
    gateway = await start_gateway()
    counts = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
    finer = {"prompt_tokens_details": {"cached_tokens": 80.0}, "completion_tokens_details": {"reasoning_tokens": 30}}
    choice = {"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}
    fake.script("a", body({"choices": [choice], "usage": counts | finer}))

    got = (await create(gateway)).usage

    assert (got.input_tokens_details.cached_tokens, got.output_tokens_details.reasoning_tokens) == (80, 30)


async def test_usage_is_estimated_where_the_provider_tells_none(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", completion("x" * 40, usage=None))

    got = (await create(gateway, "y" * 80)).usage

    assert (got.input_tokens, got.output_tokens) == (20, 10)


async def test_several_tool_calls_and_their_results_make_the_round_trip(start_gateway, fake):
    gateway = await start_gateway()
    calls = [call_of("call_köln", arguments='{"city": "Köln"}'), call_of("call_bonn", arguments='{"city": "Bonn"}')]
    asked = completion("I look it up.", finish="tool_calls", message={"tool_calls": calls})
    fake.script("a", asked, answer("both sunny"))

    first = await create(gateway, tools=[TOOL], tool_choice="required")

    said, *made = first.output
    assert said.content[0].text == "I look it up."
    assert [(call.type, call.call_id, call.name) for call in made] == [
        ("function_call", "call_köln", "weather"),
        ("function_call", "call_bonn", "weather"),
    ]
    assert json.loads(made[1].arguments) == {"city": "Bonn"}
    assert fake.requests[0].json["tools"] == [NESTED]
    assert fake.requests[0].json["tool_choice"] == "required"

    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "22 degrees"} for call in made]
    history = [{"role": "user", "content": "hi"}, *(item.to_dict() for item in first.output), *results]
    for follow_up in ({"input": history}, {"input": results, "previous_response_id": first.id}):
        second = await create(gateway, tools=[TOOL], **follow_up)

        assert second.output_text == "both sunny"
        user, turn, *told = fake.requests[-1].json["messages"]
        assert user == {"role": "user", "content": "hi"}
        assert turn == {"role": "assistant", "content": "I look it up.", "tool_calls": calls}
        assert told == [{"role": "tool", "tool_call_id": c["id"], "content": "22 degrees"} for c in calls]


async def test_a_chain_of_responses_carries_the_conversation_but_not_the_instructions(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", *[answer(f"answer {n}") for n in range(3)])

    first = await create(gateway, "one", instructions="be brief")
    second = await create(gateway, "two", previous_response_id=first.id)
    third = await create(gateway, [{"role": "user", "content": "three"}], previous_response_id=second.id)

    assert third.previous_response_id == second.id
    assert [(m["role"], m["content"]) for m in fake.requests[-1].json["messages"]] == [
        ("user", "one"),
        ("assistant", "answer 0"),
        ("user", "two"),
        ("assistant", "answer 1"),
        ("user", "three"),
    ]
    assert len({first.id, second.id, third.id}) == 3


async def test_a_chain_is_one_session(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])

    first = await create(gateway, "one", model="auto-smart")
    await create(gateway, "two", model="auto-smart", previous_response_id=first.id)
    history = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "x"}]
    await create(gateway, [*history, {"role": "user", "content": "two"}], model="auto-smart")

    assert (await gateway.protection())["sessions"]["count"] == 1
    assert len(set(fake.called)) == 1


async def test_items_are_referred_to_by_their_ids(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", completion("I think so.", message={"reasoning_content": "hm"}), answer("yes"))
    first = await create(gateway, "really?")

    references = [{"type": "item_reference", "id": item.id} for item in first.output]
    del references[1]["type"]  # which may be left out
    await create(gateway, [{"role": "user", "content": "really?"}, *references, {"role": "user", "content": "sure?"}])

    assert [(m["role"], m["content"]) for m in fake.requests[-1].json["messages"]] == [
        ("user", "really?"),
        ("assistant", "I think so."),
        ("user", "sure?"),
    ]


async def test_an_image_goes_to_a_model_that_sees(start_gateway, fake):
    gateway = await start_gateway({"a": {}, "b": {"model": {"vision": True}}})
    parts = [
        {"type": "input_text", "text": "what is this?"},
        {"type": "input_image", "image_url": PIXEL, "detail": "low"},
    ]

    got = await create(gateway, [{"role": "user", "content": parts}])

    assert got.output_text == "hello from b"
    assert fake.requests[0].json["messages"][0]["content"] == [
        {"type": "text", "text": "what is this?"},
        {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}},
    ]


class City(BaseModel):
    name: str
    people: int


async def test_a_schema_goes_out_and_the_client_parses_the_answer(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", completion('{"name": "Köln", "people": 1090000}'))

    got = await gateway.openai.responses.parse(model=IN_ORDER, input="which city?", text_format=City)

    assert got.output_parsed == City(name="Köln", people=1_090_000)
    sent = fake.requests[0].json["response_format"]
    assert (sent["type"], sent["json_schema"]["name"], sent["json_schema"]["strict"]) == ("json_schema", "City", True)
    assert set(sent["json_schema"]["schema"]["properties"]) == {"name", "people"}
    assert got.text.format.type == "json_schema"


async def test_reasoning_is_an_item_of_its_own_and_returns_to_platforms_that_want_it(start_gateway, fake):
    gateway = await start_gateway({"a": {"quirks": {"replay_reasoning_content": True}}})
    fake.script("a", completion("42", message={"reasoning_content": "six times seven"}), answer("sure"))

    first = await create(gateway, "why?", reasoning={"effort": "low", "summary": "auto"})
    await create(gateway, "sure?", previous_response_id=first.id)

    thought, said = first.output
    assert (thought.type, thought.summary[0].text) == ("reasoning", "six times seven")
    assert (said.type, first.output_text) == ("message", "42")
    assert (first.reasoning.effort, fake.requests[0].json["reasoning_effort"]) == ("low", "low")
    turn = fake.requests[1].json["messages"][1]
    assert turn == {"role": "assistant", "content": "42", "reasoning_content": "six times seven"}


@pytest.mark.parametrize(("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")])
async def test_an_answer_that_was_cut_is_incomplete(start_gateway, fake, finish, reason):
    gateway = await start_gateway()
    fake.script("a", completion("half an ans", finish=finish))

    got = await create(gateway)

    assert (got.status, got.incomplete_details.reason) == ("incomplete", reason)
    assert (got.output_text, got.output[0].status) == ("half an ans", "incomplete")


async def test_a_refusal_is_a_part_of_the_message(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", completion(None, message={"refusal": "I cannot"}))

    got = await create(gateway)

    assert (got.output[0].content[0].type, got.output[0].content[0].refusal) == ("refusal", "I cannot")


CUSTOM = {"type": "custom", "name": "apply_patch", "description": "Edits files."}


async def test_a_free_form_tool_is_offered_as_a_function_and_comes_back_as_itself(start_gateway, fake):
    gateway = await start_gateway()
    patch = "*** Begin Patch\n+“hi”\n"
    call = call_of("call_patch", "apply_patch", json.dumps({"input": patch}))
    fake.script("a", completion(None, finish="tool_calls", message={"tool_calls": [call]}), answer("done"))
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: hunk+"}

    first = await create(gateway, tools=[CUSTOM | {"format": grammar}])
    result = {"type": "custom_tool_call_output", "call_id": "call_patch", "output": "ok"}
    await create(gateway, [result], tools=[CUSTOM], previous_response_id=first.id)

    (made,) = first.output
    assert (made.type, made.name, made.call_id, made.input) == ("custom_tool_call", "apply_patch", "call_patch", patch)
    function = fake.requests[0].json["tools"][0]["function"]
    assert function["parameters"]["required"] == ["input"]
    assert "start: hunk+" in function["description"]
    _, turn, told = fake.requests[1].json["messages"]
    assert json.loads(turn["tool_calls"][0]["function"]["arguments"]) == {"input": patch}
    assert told == {"role": "tool", "tool_call_id": "call_patch", "content": "ok"}


async def test_tools_of_a_namespace_go_out_under_one_name_and_come_back_under_both(start_gateway, fake):
    gateway = await start_gateway()
    call = call_of("call_files", "files__read")
    fake.script("a", completion(None, finish="tool_calls", message={"tool_calls": [call]}))
    nested = {"type": "function", "name": "read", "parameters": {"type": "object", "properties": {}}}
    space = {"type": "namespace", "name": "files", "description": "…", "tools": [nested]}

    got = await create(gateway, tools=[space])

    assert (got.output[0].name, got.output[0].namespace) == ("read", "files")
    assert fake.requests[0].json["tools"][0]["function"]["name"] == "files__read"


async def test_a_call_in_the_oldest_form_is_a_call_too(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", completion(None, message={"function_call": {"name": "weather", "arguments": '{"x":1}'}}))

    (call,) = (await create(gateway, tools=[TOOL])).output

    assert (call.type, call.name, call.arguments) == ("function_call", "weather", '{"x":1}')


@pytest.mark.parametrize("given", ["", "call_0", "call_of_the_provider"])
async def test_no_two_calls_have_the_same_id(start_gateway, fake, given):
    gateway = await start_gateway()
    calls = [call_of(given), call_of(given)]
    message = {"tool_calls": calls}
    fake.script("a", *(completion(None, finish="tool_calls", message=message, id=f"chatcmpl-{n}") for n in range(2)))

    answers = [await create(gateway, tools=[TOOL]) for _ in range(2)]

    ids = {call.call_id for got in answers for call in got.output}
    assert len(ids) == (3 if given == "call_of_the_provider" else 4)  # which belongs to the first of each answer
    assert all(id.startswith("call_") for id in ids)


def test_a_calls_name_may_come_after_its_first_piece():
    dialect = ResponsesDialect(tokens())
    space = {"type": "namespace", "name": "files", "tools": [{"type": "function", "name": "read"}]}
    encoder = dialect.encoder(parsed(dialect, tools=[space], stream=True), NOW)
    functions = [{"arguments": ""}, {"name": "files__read", "arguments": '{"x":'}, {"arguments": "1}"}]
    calls = [{"index": 0, "id": "call_x", "function": function} for function in functions]

    frames = encoder.feed([Event(b"", chunk(tool_calls=[call])) for call in calls]) + encoder.end(Tally())

    (item,) = json.loads(frames.split(b"data: ")[-1])["response"]["output"]
    assert (item["name"], item["namespace"], item["arguments"]) == ("read", "files", '{"x":1}')


# --- What is refused ----------------------------------------------------------------------------------------


@both_ways
async def test_a_refused_request_reaches_no_provider(start_gateway, fake, streaming, openai):
    gateway = await start_gateway()

    with pytest.raises(openai.BadRequestError) as refused:
        await create(gateway, previous_response_id="resp_gone", stream=streaming)

    assert refused.value.code == "previous_response_not_found"
    assert refused.value.param == "previous_response_id"
    assert refused.value.type == "invalid_request_error"
    assert fake.called == []


# --- What is kept -----------------------------------------------------------------------------------------------


def answered(dialect, now=NOW, **request):
    """The id of a whole response."""
    chat = dialect.parse(json.dumps({"input": "hi"} | request).encode(), now)
    message = {"role": "assistant", "content": "hello"}
    made = {"choices": [{"message": message, "finish_reason": "stop"}]}
    return json.loads(dialect.encoder(chat, now).whole(Completion(b"", made)))["id"]


def known(dialect, id, now=NOW):
    try:
        dialect.parse(json.dumps({"input": "hi", "previous_response_id": id}).encode(), now)
    except InvalidRequest as refused:
        assert refused.code == "previous_response_not_found"
        return False
    return True


def test_a_response_is_kept_for_its_time():
    dialect = ResponsesDialect(tokens())
    id = answered(dialect)

    assert known(dialect, id, NOW + KEPT_S - 1)
    assert not known(dialect, id, NOW + KEPT_S)


def test_the_oldest_responses_give_way():
    dialect = ResponsesDialect(tokens())
    ids = [answered(dialect) for _ in range(KEPT_MAX + 2)]

    assert [known(dialect, id) for id in (*ids[:3], ids[-1])] == [False, False, True, True]


def test_the_responses_kept_are_bounded_in_bytes():
    dialect = ResponsesDialect(tokens(), bytes_max=10_000)
    small = answered(dialect, input="x" * 6_000)
    newer = answered(dialect, input="x" * 4_000)
    larger = answered(dialect, input="x" * 20_000)

    assert [known(dialect, id) for id in (small, newer, larger)] == [False, True, False]


def test_a_chain_counts_all_that_it_holds():
    dialect = ResponsesDialect(tokens(), bytes_max=20_000)
    first = answered(dialect, input="x" * 6_000)
    second = answered(dialect, input="x" * 6_000, previous_response_id=first)

    assert [known(dialect, id) for id in (first, second)] == [False, True]


def test_what_must_not_be_kept_is_not():
    dialect = ResponsesDialect(tokens())

    assert not known(dialect, answered(dialect, store=False))


def test_a_stream_that_broke_is_not_kept():
    dialect = ResponsesDialect(tokens())
    encoder = dialect.encoder(parsed(dialect), NOW)
    frames = encoder.feed([]) + encoder.fail(GatewayError("It broke.", status=502, type="stream_error"), Tally())

    id = json.loads(frames.split(b"data: ")[1].split(b"\n")[0])["response"]["id"]
    assert not known(dialect, id)


async def test_a_kept_response_can_be_fetched_and_deleted(start_gateway, fake, openai):
    gateway = await start_gateway()
    made = await create(gateway)

    fetched = await gateway.openai.responses.retrieve(made.id)
    await gateway.openai.responses.delete(made.id)

    assert fetched == made
    with pytest.raises(openai.NotFoundError) as gone:
        await gateway.openai.responses.retrieve(made.id)
    assert gone.value.code == "response_not_found"
    with pytest.raises(openai.NotFoundError):
        await gateway.openai.responses.delete(made.id)
    with pytest.raises(openai.BadRequestError):
        await create(gateway, previous_response_id=made.id)


@pytest.mark.parametrize("path", ["/v1/responses/resp_x/cancel", "/v1/responses/compacted"])
async def test_what_is_not_there_is_a_404(start_gateway, path):
    gateway = await start_gateway()

    assert (await gateway.send({"input": "hi"}, path=path)).status == 404


# --- The loop is chat's; tests/test_dialect_faults.py compares them fault by fault -------------------------------


@both_ways
async def test_a_provider_that_dies_before_its_first_token_is_never_seen(start_gateway, fake, streaming):
    gateway = await start_gateway()
    fake.script("a", sse(chunk(role="assistant", content=""), CUT) if streaming else raw(CUT))

    got = await post(gateway, stream=streaming)

    assert got.status == 200
    assert got.headers["X-Routed-Via"] == "b/b-model"
    assert got.headers["X-Fallback-Trail"] == "a/a-model=connection"
    assert b"hello from b" in got.body
    assert b"failed" not in got.body


async def test_an_exhausted_pool_is_an_error_in_json(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", error(500))

    got = await post(gateway, stream=True)

    assert (got.status, got.error["code"]) == (502, "all_attempts_failed")


async def test_it_needs_the_key_and_takes_the_path_without_v1(start_gateway, fake):
    gateway = await start_gateway()

    refused = await gateway.send({"input": "hi"}, path="/v1/responses", headers={"authorization": "Bearer wrong"})

    assert refused.status == 401
    assert (await gateway.send({"input": "hi"}, path="/responses")).json["output_text"].startswith("hello")
