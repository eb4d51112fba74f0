"""SPEC 16.3: the events of a streamed message, as they are on the wire and as the anthropic client joins them."""

import pytest
from conftest import IN_ORDER
from fake_provider import CUT, PAUSE, RESET, ROLE, STOP, Every, answer, chunk, error, event, sse, usage_chunk
from faults import BREAKS
from strict_messages import assert_in_order, events_of
from strict_messages import raw_message as raw_stream
from strict_messages import streamed_message as streamed
from turns import CALLS, WEATHER, piece

SHORT_STALL = {"MAX_STREAM_STALL_MS": "60"}


def names(events: list[dict]) -> list[str]:
    """The events between the first and the last two, deltas in a row once, without their common beginning."""
    types = [e["type"].removeprefix("content_block_") for e in events[1:-2]]
    return [name for n, name in enumerate(types) if name != "delta" or types[n - 1] != name]


BLOCK = ["start", "delta", "stop"]


async def final_of(gateway, **fields):
    """What the client's own accumulator ends with."""
    asked = {"model": IN_ORDER, "max_tokens": 4000, "messages": [{"role": "user", "content": "hi"}]} | fields
    async with gateway.anthropic.messages.stream(**asked) as stream:
        return await stream.get_final_message()


# --- Finished answers -------------------------------------------------------------------------------------------------


async def test_text_is_streamed(start_gateway, fake):
    gateway = await start_gateway()

    events, blocks = await streamed(gateway, messages=[{"role": "user", "content": "x" * 400}])

    assert names(events) == BLOCK
    assert blocks == [{"type": "text", "text": "hello from a"}]
    start, delta = events[0]["message"], events[-2]
    assert start["usage"] | {"input_tokens": 0} == {
        "input_tokens": 0,
        "output_tokens": 0,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
    }
    assert 100 <= start["usage"]["input_tokens"] <= 110
    assert delta["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert (delta["usage"]["input_tokens"], delta["usage"]["output_tokens"]) == (11, 7)
    assert fake.requests[0].json["stream"] is True
    row = await gateway.row()
    assert (row["status"], row["input_tokens"], row["output_tokens"], row["streamed"]) == ("success", 11, 7, 1)


async def test_the_anthropic_client_puts_the_text_together(start_gateway, fake):
    gateway = await start_gateway()
    asked = {"model": IN_ORDER, "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}]}

    async with gateway.anthropic.messages.stream(**asked) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()

    assert text == "hello from a"
    assert [(block.type, block.text) for block in final.content] == [("text", "hello from a")]
    assert (final.stop_reason, final.usage.input_tokens, final.usage.output_tokens) == ("end_turn", 11, 7)
    assert final.model == IN_ORDER
    raw = await gateway.anthropic.messages.create(**asked, stream=True)
    assert [e.type async for e in raw][-1] == "message_stop"


async def test_thoughts_come_in_a_block_of_their_own_before_the_text(start_gateway, fake):
    gateway = await start_gateway()
    thought = [chunk(reasoning_content="Let me "), chunk(reasoning="think.")]
    fake.script("a", sse(ROLE, *thought, chunk("It is "), chunk("4."), STOP))

    events, blocks = await streamed(gateway)

    assert names(events) == BLOCK * 2
    assert blocks == [
        {"type": "thinking", "thinking": "Let me think.", "signature": ""},
        {"type": "text", "text": "It is 4."},
    ]
    final = await final_of(gateway, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [(b.type, getattr(b, b.type)) for b in final.content] == [
        ("thinking", "Let me think."),
        ("text", "It is 4."),
    ]


async def test_who_wants_no_thoughts_gets_none(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", sse(ROLE, chunk(reasoning_content="Hm."), chunk("4."), STOP))

    _, blocks = await streamed(gateway, thinking={"type": "disabled"})

    assert blocks == [{"type": "text", "text": "4."}]


PARALLEL = {
    "one after the other": [
        piece(0, id="call_one_xyz", name="weather"),
        piece(0, '{"city": '),
        piece(0, '"Köln"}'),
        piece(1, '{"city": "Bonn"}', id="call_two_xyz", name="weather"),
    ],
    "in turns": [
        piece(0, '{"city"', id="call_one_xyz", name="weather"),
        piece(1, '{"ci', id="call_two_xyz", name="weather"),
        piece(0, ': "Köln"}'),
        piece(1, 'ty": "Bonn"}'),
    ],
    "the first one ends last": [
        piece(0, '{"city": ', id="call_one_xyz", name="weather"),
        piece(1, '{"city": "Bonn"}', id="call_two_xyz", name="weather"),
        piece(0, '"Köln"}'),
    ],
    "with a word in between": [
        piece(0, '{"city": "Köln"}', id="call_one_xyz", name="weather"),
        chunk(" \n"),
        piece(1, '{"city": "Bonn"}', id="call_two_xyz", name="weather"),
    ],
}


@pytest.mark.parametrize("pieces", PARALLEL.values(), ids=PARALLEL)
async def test_parallel_calls_are_one_block_after_the_other(start_gateway, fake, pieces):
    gateway = await start_gateway()
    fake.script("a", sse(ROLE, chunk("I look."), *pieces, CALLS, usage_chunk()))

    events, blocks = await streamed(gateway, tools=[WEATHER])

    assert names(events) == BLOCK * 3
    assert blocks == [
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "call_one_xyz", "name": "weather", "input": {"city": "Köln"}},
        {"type": "tool_use", "id": "call_two_xyz", "name": "weather", "input": {"city": "Bonn"}},
    ]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    final = await final_of(gateway, tools=[WEATHER])
    assert [(b.type, getattr(b, "input", None)) for b in final.content] == [
        ("text", None),
        ("tool_use", {"city": "Köln"}),
        ("tool_use", {"city": "Bonn"}),
    ]


async def test_white_space_before_a_call_is_no_text(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", sse(ROLE, chunk("\n\n"), piece(0, id="call_one_xyz", name="weather"), CALLS))

    _, blocks = await streamed(gateway, tools=[WEATHER])

    assert blocks == [{"type": "tool_use", "id": "call_one_xyz", "name": "weather", "input": {}}]


async def test_ids_that_every_answer_would_repeat_are_made_unlike_all_others(start_gateway, fake):
    gateway = await start_gateway()
    calls = [piece(n, "{}", id=id, name="weather") for n, id in enumerate(["call_0", "functions.weather:1", "call_1"])]
    fake.script("a", sse(ROLE, *calls, CALLS))

    _, first = await streamed(gateway, tools=[WEATHER])
    _, second = await streamed(gateway, tools=[WEATHER])

    ids = [block["id"] for block in first + second]
    assert len(set(ids)) == 6
    assert all(id.startswith("toolu_") and id.replace("_", "").isalnum() and len(id) <= 40 for id in ids)


ENDS = {
    "stop": ("stop", "end_turn"),
    "length": ("length", "max_tokens"),
    "a filter": ("content_filter", "refusal"),
}


@pytest.mark.parametrize(("finish", "reason"), ENDS.values(), ids=ENDS)
async def test_every_end_has_its_reason(start_gateway, fake, finish, reason):
    gateway = await start_gateway()
    fake.script("a", sse(ROLE, chunk("x" * 40_000), chunk(finish=finish), usage_chunk(11, 4000)))

    events, _ = await streamed(gateway)

    assert events[-2]["delta"]["stop_reason"] == reason


async def test_what_a_cache_gave_is_no_part_of_the_input(start_gateway, fake):
    gateway = await start_gateway()
    usage = usage_chunk(100, 7)
    usage["usage"]["prompt_tokens_details"] = {"cached_tokens": 80}
    fake.script("a", sse(ROLE, chunk("hello"), STOP, usage))

    events, _ = await streamed(gateway)

    told = events[-2]["usage"]
    assert (told["input_tokens"], told["cache_read_input_tokens"], told["output_tokens"]) == (20, 80, 7)


async def test_a_stream_that_is_whole_is_streamed_all_the_same(start_gateway, fake):
    gateway = await start_gateway({"a": {"quirks": {"no_stream": True}}})

    _, blocks = await streamed(gateway)

    assert blocks == [{"type": "text", "text": "hello from a"}]


async def test_pings_stand_between_events_while_nothing_is_said(start_gateway, fake):
    gateway = await start_gateway(settings={"KEEPALIVE_INTERVAL_MS": "10"})
    comment = Every(0.005, b": thinking\n\n", times=20)
    fake.script("a", sse(ROLE, chunk("hel"), comment, chunk("lo"), STOP))

    got = await raw_stream(gateway)

    assert b'event: ping\ndata: {"type": "ping"}\n\n' in got.body
    assert assert_in_order(events_of(got), IN_ORDER) == [{"type": "text", "text": "hello"}]
    assert (await final_of(gateway)).content[0].text == "hello"


async def test_a_failure_before_the_first_word_is_invisible(start_gateway, fake):
    gateway = await start_gateway()
    fake.script("a", error(503))
    fake.script("b", sse(ROLE, CUT))
    fake.script("c", answer("fine"))

    _, blocks = await streamed(gateway)

    assert blocks == [{"type": "text", "text": "fine"}]
    assert fake.called == ["a", "b", "c"]


# --- Answers that break (SPEC 14.9) -----------------------------------------------------------------------------------


@pytest.mark.parametrize("breaking", [entry[0] for entry in BREAKS.values()], ids=BREAKS)
async def test_an_answer_that_breaks_before_a_block_is_complete_ends_with_the_connection(start_gateway, fake, breaking):
    gateway = await start_gateway(["a"], SHORT_STALL)
    fake.script("a", sse(ROLE, chunk("half an ans"), breaking, done=False))

    got = await raw_stream(gateway)

    assert got.headers["cut"]
    events = events_of(got)
    assert_in_order(events, IN_ORDER)
    assert {e["type"] for e in events} <= {"message_start", "content_block_start", "content_block_delta"}
    row = await gateway.row()
    assert row["status"] == "error"


@pytest.mark.parametrize("breaking", [entry[0] for entry in BREAKS.values()], ids=BREAKS)
async def test_an_answer_that_breaks_behind_a_complete_block_ends_with_an_error(start_gateway, fake, breaking):
    gateway = await start_gateway(["a"], SHORT_STALL)
    fake.script("a", sse(ROLE, chunk(reasoning_content="Hm."), chunk("half an ans"), breaking, done=False))

    got = await raw_stream(gateway)

    assert not got.headers["cut"]
    events = events_of(got)
    assert [block["type"] for block in assert_in_order(events, IN_ORDER)] == ["thinking"]
    assert events[-1]["type"] == "error"
    assert "The answer is incomplete" in events[-1]["error"]["message"]


async def test_the_anthropic_client_raises_for_an_answer_that_breaks(start_gateway, fake, anthropic):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(ROLE, chunk("half an ans"), RESET))
    with pytest.raises(Exception, match=r"(?i)incomplete|closed|peer"):
        await final_of(gateway)
    await gateway.recovered()
    fake.script("a", sse(ROLE, chunk(reasoning_content="Hm."), chunk("half an ans"), RESET))
    with pytest.raises(anthropic.APIStatusError, match="incomplete"):
        await final_of(gateway)


async def test_an_answer_that_breaks_goes_on_in_the_open_block(start_gateway, fake):
    gateway = await start_gateway({"a": {}, "b": {"prefill": "plain"}}, {"RESCUE": "on"})
    words = "The quick brown fox jumps over the lazy dog and runs into the forest."
    fake.script("a", sse(ROLE, chunk(reasoning_content="Hm."), chunk(words[:40]), CUT))
    fake.script("b", lambda asked: sse(ROLE, chunk(words[len(asked.prompt) :]), STOP, usage_chunk()))

    got = await raw_stream(gateway)

    assert assert_in_order(events_of(got), IN_ORDER) == [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "text", "text": words},
    ]
    assert b": resumed on b/b-model\n\n" in got.body
    assert fake.called == ["a", "b"]


async def test_a_connection_that_was_cut_costs_the_next_request_nothing(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", sse(ROLE, chunk("half"), event({"error": {"message": "down", "code": 503}}), done=False))
    assert (await raw_stream(gateway)).headers["cut"]

    _, blocks = await streamed(gateway)

    assert blocks == [{"type": "text", "text": "hello from b"}]


async def test_a_client_that_leaves_closes_the_providers_connection(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(ROLE, chunk("hello"), PAUSE))
    request = {"model": IN_ORDER, "max_tokens": 9, "stream": True, "messages": [{"role": "user", "content": "hi"}]}

    async with gateway.post(request, path="/v1/messages") as response:
        await response.content.readany()

    await fake.closed()
    assert (await gateway.row())["status"] == "cancelled"
