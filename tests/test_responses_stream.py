"""SPEC 9.3: the events of a streamed response, as the openai client puts them together and as they are on the wire."""

import json

import pytest
from conftest import IN_ORDER
from fake_provider import CUT, PAUSE, RESET, ROLE, STOP, Every, answer, chunk, event, sse, usage_chunk
from faults import BREAKS
from pydantic import BaseModel
from strict_models import models
from strict_models import streamed_response as streamed
from turns import CALLS, piece

TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": True}
PATCH = {"type": "custom", "name": "patch"}
SHORT_STALL = {"MAX_STREAM_STALL_MS": "60"}


def names(events: list[dict]) -> list[str]:
    """The events between the first two and the last, deltas of a kind in a row once."""
    types = [e["type"].removeprefix("response.") for e in events[2:-1]]
    return [name for n, name in enumerate(types) if not name.endswith(".delta") or types[n - 1] != name or n == 0]


async def final_of(gateway, **fields):
    """What the client's own accumulator ends with, and all its events."""
    async with gateway.openai.responses.stream(**{"model": IN_ORDER, "input": "hi"} | fields) as stream:
        events = [e async for e in stream]
        if events[-1].type == "response.completed":
            assert await stream.get_final_response() == events[-1].response
    return events[-1].response, events


TEXT_EVENTS = [
    "output_item.added",
    "content_part.added",
    "output_text.delta",
    "output_text.done",
    "content_part.done",
    "output_item.done",
]
CALL_EVENTS = [
    "output_item.added",
    "function_call_arguments.delta",
    "function_call_arguments.done",
    "output_item.done",
]
THOUGHT_EVENTS = [
    "output_item.added",
    "reasoning_summary_part.added",
    "reasoning_summary_text.delta",
    "reasoning_summary_text.done",
    "reasoning_summary_part.done",
    "output_item.done",
]


# --- Finished answers -------------------------------------------------------------------------------------------


async def test_text_is_streamed(start_gateway, fake):
    gateway = await start_gateway()

    events, got = await streamed(gateway, metadata={"k": "v"})

    assert names(events) == TEXT_EVENTS
    response = events[-1]["response"]
    assert (response["status"], response["output_text"], response["metadata"]) == (
        "completed",
        "hello from a",
        {"k": "v"},
    )
    assert (response["model"], response["usage"]["total_tokens"]) == ("provider-own-name", 18)
    assert (events[0]["response"]["status"], events[0]["response"]["output"]) == ("in_progress", [])
    assert got.headers["X-Routed-Via"] == "a/a-model"
    assert fake.requests[0].json["stream"] is True
    row = await gateway.row()
    assert (row["status"], row["input_tokens"], row["output_tokens"], row["streamed"]) == ("success", 11, 7, 1)


async def test_the_openai_client_puts_the_text_together(start_gateway, fake):
    gateway = await start_gateway()

    final, events = await final_of(gateway)

    assert final.output_text == "hello from a"
    assert (final.status, final.usage.output_tokens) == ("completed", 7)
    snapshots = [e.snapshot for e in events if e.type == "response.output_text.delta"]
    assert snapshots[-1] == "hello from a"


async def test_streamed_and_whole_answers_have_the_same_output(start_gateway, fake):
    gateway = await start_gateway()

    whole = (await gateway.send({"model": IN_ORDER, "input": "hi"}, path="/v1/responses")).json
    last = (await streamed(gateway))[0][-1]["response"]

    for response in (whole, last):
        for name in ("id", "created_at"):
            response.pop(name)
        for item in response["output"]:
            item.pop("id")
    assert whole == last


async def test_parallel_calls_are_items_of_their_own_even_when_their_pieces_alternate(start_gateway, fake):
    gateway = await start_gateway()
    begun = [piece(0, "", id="call_one", name="weather"), piece(0, '{"city"')]
    mixed = [piece(1, "", id="call_two", name="weather"), piece(0, ': "Köln"}'), piece(1, '{"city": "Bonn"}')]
    fake.script("a", sse(ROLE, chunk("I look "), chunk("it up."), *begun, *mixed, CALLS), answer("sunny"))

    events, _ = await streamed(gateway, tools=[TOOL])
    final, _ = await final_of(gateway, tools=[TOOL])

    assert names(events)[:6] == TEXT_EVENTS
    assert names(events)[6:8] == CALL_EVENTS[:2]
    assert names(events)[-4:] == CALL_EVENTS[2:] * 2
    said, *calls = events[-1]["response"]["output"]
    assert said["content"][0]["text"] == "I look it up."
    assert [call["call_id"] for call in calls] == ["call_one", "call_two"]
    assert [json.loads(call["arguments"]) for call in calls] == [{"city": "Köln"}, {"city": "Bonn"}]
    assert final.output_text == "sunny"


async def test_the_openai_client_sends_the_results_of_several_calls_back(start_gateway, fake):
    gateway = await start_gateway()
    pieces = [piece(0, '{"city": "Köln"}', id="call_one", name="weather"), piece(1, id="call_two", name="weather")]
    fake.script("a", sse(ROLE, *pieces, CALLS), answer("both sunny"))

    asked, _ = await final_of(gateway, tools=[TOOL])
    results = [{"type": "function_call_output", "call_id": call.call_id, "output": "22"} for call in asked.output]
    told, _ = await final_of(gateway, tools=[TOOL], input=results, previous_response_id=asked.id)

    assert [call.parsed_arguments for call in asked.output] == [{"city": "Köln"}, {}]
    assert told.output_text == "both sunny"
    _, turn, *sent = fake.requests[1].json["messages"]
    assert [call["function"]["arguments"] for call in turn["tool_calls"]] == ['{"city": "Köln"}', "{}"]
    assert [m["tool_call_id"] for m in sent] == ["call_one", "call_two"]


async def test_a_chain_of_streams_carries_the_conversation(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", answer("one"), answer("two"), answer("three"))

    id = None
    for text in ("1", "2", "3"):
        final, _ = await final_of(gateway, input=text, previous_response_id=id)
        id = final.id

    assert [m["content"] for m in fake.requests[-1].json["messages"]] == ["1", "one", "2", "two", "3"]
    assert await gateway.openai.responses.retrieve(id) == models().responses.Response.model_validate(
        (await gateway.get(f"/v1/responses/{id}")).json
    )


async def test_reasoning_comes_first_and_ends_where_the_text_begins(start_gateway, fake):
    gateway = await start_gateway()
    thoughts = [chunk(reasoning_content=text) for text in ("six times ", "seven")]
    fake.script("a", sse(ROLE, *thoughts, chunk("\n\n"), chunk("42"), STOP))

    events, _ = await streamed(gateway)
    final, _ = await final_of(gateway)

    assert names(events) == THOUGHT_EVENTS + TEXT_EVENTS
    assert final.output[0].summary[0].text == "six times seven"
    assert final.output_text == "\n\n42"


async def test_white_space_before_a_call_is_no_message(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", sse(chunk(reasoning_content="hm"), chunk("\n\n"), piece(0, "{}", id="call_x", name="f"), CALLS))

    events, _ = await streamed(gateway, tools=[TOOL])

    assert names(events) == THOUGHT_EVENTS + CALL_EVENTS


async def test_text_after_a_call_is_an_item_of_its_own(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", sse(chunk("one"), piece(0, "{}", id="call_x", name="f"), chunk("two"), CALLS))

    events, _ = await streamed(gateway, tools=[TOOL])
    final, _ = await final_of(gateway, tools=[TOOL])

    assert [item["type"] for item in events[-1]["response"]["output"]] == ["message", "function_call", "message"]
    assert final.output_text == "onetwo"


async def test_a_refusal_has_events_of_its_own(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", sse(chunk("Well. "), chunk(refusal="I can"), chunk(refusal="not"), STOP))

    events, _ = await streamed(gateway)

    parts = events[-1]["response"]["output"][0]["content"]
    assert [part["type"] for part in parts] == ["output_text", "refusal"]
    assert parts[1]["refusal"] == "I cannot"
    assert [e["content_index"] for e in events if e["type"] == "response.refusal.delta"] == [1, 1]


async def test_a_free_form_tools_text_arrives_without_its_wrapping(start_gateway, fake):
    gateway = await start_gateway()
    pieces = [piece(0, '{"inp', id="call_p", name="patch"), piece(0, 'ut": "a\\n'), piece(0, 'b"}')]
    fake.script("a", sse(*pieces, CALLS))

    events, _ = await streamed(gateway, tools=[PATCH])
    final, _ = await final_of(gateway, tools=[PATCH])

    assert names(events)[1:3] == ["custom_tool_call_input.delta", "custom_tool_call_input.done"]
    assert (final.output[0].type, final.output[0].input) == ("custom_tool_call", "a\nb")


class City(BaseModel):
    name: str


async def test_the_openai_client_parses_a_streamed_schema(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", answer('{"name": "Köln"}'))

    final, _ = await final_of(gateway, text_format=City)

    assert final.output_parsed == City(name="Köln")
    assert fake.requests[0].json["response_format"]["json_schema"]["name"] == "City"


@pytest.mark.parametrize(("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")])
async def test_an_answer_that_was_cut_ends_as_incomplete(start_gateway, fake, finish, reason):
    gateway = await start_gateway()
    fake.script("a", sse(chunk("half an ans"), chunk(finish=finish), usage_chunk(11, 3)))

    events, _ = await streamed(gateway)
    final, _ = await final_of(gateway)

    assert names(events) == TEXT_EVENTS
    assert events[-1]["type"] == "response.incomplete"
    assert (final.status, final.incomplete_details.reason) == ("incomplete", reason)
    assert (final.output_text, final.output[0].status, final.usage.output_tokens) == ("half an ans", "incomplete", 3)
    assert (
        await gateway.send({"input": "go on", "previous_response_id": final.id}, path="/v1/responses")
    ).status == 200


async def test_a_call_that_was_cut_is_incomplete_and_what_came_before_it_is_not(start_gateway, fake):
    gateway = await start_gateway(["a"], {"TOOL_CALLS": "stream"})  # else nothing of it goes out (SPEC 14.7)
    fake.script("a", sse(chunk("one"), piece(0, '{"ci', id="call_x", name="f"), chunk(finish="length")))

    response = (await streamed(gateway, tools=[TOOL]))[0][-1]["response"]

    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
    assert response["output"][1]["arguments"] == '{"ci'


async def test_half_a_letter_in_each_of_two_events_arrives_whole(start_gateway, fake):
    gateway = await start_gateway()
    halves = [b'data: {"choices":[{"index":0,"delta":{"content":"\\ud83e"}}]}\n\n']
    halves += [b'data: {"choices":[{"index":0,"delta":{"content":"\\udd8a"}}]}\n\n']
    fake.script("a", sse(*halves, STOP))

    final, _ = await final_of(gateway)

    assert final.output_text == "🦊"
    assert (await gateway.get(f"/v1/responses/{final.id}")).json["output_text"] == "🦊"
    again, _ = await final_of(gateway, previous_response_id=final.id)
    assert again.output_text == "🦊"


# --- Answers that break -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "breaking", [CUT, RESET, event({"error": {"message": "no luck"}})], ids=["cut", "reset", "error"]
)
async def test_a_provider_that_dies_before_its_first_token_is_never_seen(start_gateway, fake, breaking):
    gateway = await start_gateway()
    fake.script("a", sse(ROLE, breaking, done=False))

    final, events = await final_of(gateway)

    assert final.output_text == "hello from b"
    assert [e.type for e in events].count("response.created") == 1
    assert [row["status"] for row in await gateway.rows(2)] == ["error", "success"]


@pytest.mark.parametrize(("breaking", "type", "kind"), BREAKS.values(), ids=BREAKS)
async def test_a_break_in_mid_stream_ends_as_failed(start_gateway, fake, breaking, type, kind):
    gateway = await start_gateway(["a", "b"], SHORT_STALL)
    fake.script("a", sse(ROLE, chunk("half an "), chunk("ans"), breaking, done=False))

    events, _ = await streamed(gateway)

    assert names(events) == TEXT_EVENTS[:3]
    assert events[-1]["type"] == "response.failed"
    response = events[-1]["response"]
    failed = response["error"]
    assert (response["status"], failed["code"], failed["type"]) == ("failed", "server_error", type)
    assert failed["message"]
    assert (response["output"][0]["status"], response["output_text"]) == ("incomplete", "half an ans")
    assert fake.called == ["a"]
    row = await gateway.row()
    assert (row["status"], row["error_kind"]) == ("error", kind)
    gone = await gateway.send({"input": "go on", "previous_response_id": response["id"]}, path="/v1/responses")
    assert gone.json["error"]["code"] == "previous_response_not_found"


@pytest.mark.parametrize("breaking", [CUT, PAUSE], ids=["cut", "stall"])
async def test_the_openai_client_ends_with_a_failed_response(start_gateway, fake, breaking):
    gateway = await start_gateway(["a"], SHORT_STALL | {"TOOL_CALLS": "stream"})
    fake.script("a", sse(ROLE, chunk("half"), piece(0, '{"x"', id="call_x", name="f"), breaking, done=False))

    final, events = await final_of(gateway, tools=[TOOL])

    assert events[-1].type == "response.failed"
    assert (final.status, final.output_text) == ("failed", "half")
    assert [item.status for item in final.output] == ["completed", "incomplete"]
    assert final.error.message


async def test_a_stall_before_the_first_token_moves_on(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], SHORT_STALL)
    fake.script("a", sse(ROLE, PAUSE))

    events, got = await streamed(gateway)

    assert events[-1]["response"]["output_text"] == "hello from b"
    assert got.headers["X-Fallback-Trail"] == "a/a-model=stall"


async def test_a_silent_response_is_kept_alive_with_events(start_gateway, fake):
    gateway = await start_gateway(["a"], {"KEEPALIVE_INTERVAL_MS": "10"})
    fake.script("a", sse(chunk("be"), Every(0.01, b": working\n\n", times=8), chunk("gin"), STOP))

    events, got = await streamed(gateway)

    assert events[-1]["response"]["output_text"] == "begin"
    beats = [event for event in events[2:] if event["type"] == "response.in_progress"]
    assert beats and {event["response"]["id"] for event in beats} == {events[0]["response"]["id"]}
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    assert names([event for event in events if event not in beats]) == TEXT_EVENTS
    assert got.comments == []


async def test_a_response_that_has_not_begun_is_kept_alive_with_its_first_events(start_gateway, fake):
    gateway = await start_gateway(["a"], {"FIRST_HEARTBEAT_MS": "10", "KEEPALIVE_INTERVAL_MS": "10"})
    fake.script("a", sse(Every(0.01, b": working\n\n", times=8), chunk("late"), STOP))

    events, got = await streamed(gateway)

    types = [event["type"] for event in events]
    assert types[:3] == ["response.created", "response.in_progress", "response.in_progress"]
    assert types.count("response.created") == 1
    assert events[-1]["response"]["output_text"] == "late"
    assert events[-1]["response"]["model"] == "provider-own-name"
    assert got.comments == []


async def test_a_platform_that_does_not_stream_answers_in_the_same_events(start_gateway, fake):
    gateway = await start_gateway({"a": {"quirks": {"no_stream": True}}})

    events, _ = await streamed(gateway)

    assert names(events) == TEXT_EVENTS
    assert "stream" not in fake.requests[0].json


async def test_the_demo_answers_in_the_same_events(start_gateway, fake):
    gateway = await start_gateway([])

    events, _ = await streamed(gateway, model="auto")

    assert names(events) == TEXT_EVENTS
    assert "demo" in events[-1]["response"]["output_text"]
