"""SPEC 14.7: tool calls of a stream are whole or not at all."""

import asyncio
import json
from dataclasses import replace

import pytest
from conftest import case
from fake_provider import CUT, PAUSE, ROLE, Every, Wait, chunk, completion, event, sse
from hypothesis import given
from hypothesis import strategies as st
from wires import Gemini, Said
from worlds import World

from adapters.tool_calls import StreamedCalls
from adapters.whole_calls import HELD_CHARS_MAX, WholeCalls
from dialects.chat import chat_from
from protection import UpstreamError
from providers import Attempt, Providers, Timeouts
from routing.catalog import KEYLESS, Platform
from routing.route import Route
from transport.upstream import Upstream

SCHEMA = {"type": "object", "properties": {"tags": {"type": "array"}, "text": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("f", "g")]
STREAMED = chat_from({"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS, "stream": True})
CHAT = chat_from({"messages": [{"role": "user", "content": "hi"}], "tools": TOOLS})
STOP = chunk(finish="stop")
CALLS = chunk(finish="tool_calls")


def piece(index: int, arguments: str, name: str | None = None) -> dict:
    function = {"arguments": arguments} | ({"name": name} if name else {})
    return {"index": index, "function": function} | ({"id": f"c{index}", "type": "function"} if name else {})


def said(*pieces: dict) -> dict:
    return chunk(tool_calls=list(pieces))


ONE = [said(piece(0, "", "f")), said(piece(0, '{"text": "')), said(piece(0, 'x"}'))]


# --- The holder -----------------------------------------------------------------------------------------------------


def joined(pieces: list[dict]) -> list[tuple[str, str]]:
    """Names and arguments; every call must come in two pieces, the first without arguments."""
    assert [one["index"] for one in pieces] == [n for n in range(len(pieces) // 2) for _ in range(2)]
    for first, second in zip(pieces[0::2], pieces[1::2], strict=True):
        assert first["function"]["arguments"] == ""
        assert set(second) == {"index", "function"}
        assert set(second["function"]) == {"arguments"}
    return [
        (first["function"]["name"], second["function"]["arguments"])
        for first, second in zip(pieces[0::2], pieces[1::2], strict=True)
    ]


ARGUMENTS = st.dictionaries(st.sampled_from(["text", "tags", "x"]), st.text(max_size=8) | st.integers(), max_size=3)


@given(st.lists(st.tuples(st.sampled_from("fg"), ARGUMENTS), max_size=4), st.data())
def test_calls_in_any_pieces_and_order_come_out_whole_and_once(calls, data):
    texts = [json.dumps(arguments) for _, arguments in calls]
    lines = []  # the pieces of each call
    for index, (name, _) in enumerate(calls):
        cuts = sorted(data.draw(st.lists(st.integers(0, len(texts[index])), max_size=3)))
        parts = [texts[index][a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        lines.append([piece(index, "", name), *(piece(index, part) for part in parts)])
    order = data.draw(st.permutations([index for index, line in enumerate(lines) for _ in line])) if lines else []
    began: list[int] = []
    holder, out = WholeCalls(CHAT), []
    for index in order:
        line = index if index in began or all(n in began for n in range(index)) else min(set(range(index)) - set(began))
        began.append(line)
        if lines[line]:
            out += holder.take([lines[line].pop(0)])
    for line in lines:
        out += holder.take(line)
    out += holder.finish(cut=False)

    assert not holder.holding
    assert [(name, json.loads(arguments)) for name, arguments in joined(out)] == [
        (name, arguments) for name, arguments in calls
    ]


@pytest.mark.parametrize("held", range(len(ONE)))
def test_a_call_is_held_until_the_next_one_begins(held):
    holder = WholeCalls(CHAT)
    for part in ONE[:held]:
        assert holder.take(part["choices"][0]["delta"]["tool_calls"]) == []
    assert holder.holding is (held > 0)
    out = holder.take([piece(1, "", "g")]) if held == len(ONE) else []
    assert joined(out) == ([("f", '{"text": "x"}')] if held == len(ONE) else [])


def test_a_call_is_let_go_when_it_is_complete_and_something_else_follows():
    holder = WholeCalls(CHAT)
    assert holder.take([piece(0, '{"text":', "f")]) == []
    assert holder.release() == []
    assert holder.take([piece(0, ' "x"}')]) == []
    assert joined(holder.release()) == [("f", '{"text": "x"}')]
    assert holder.finish(cut=False) == []


def test_arguments_are_mended_when_they_are_whole():
    holder = WholeCalls(CHAT)
    holder.take([piece(0, '"{\\"tags\\": ', "f"), piece(0, '\\"[1]\\"}"')])
    assert joined(holder.finish(cut=False)) == [("f", '{"tags":[1]}')]
    holder = WholeCalls(CHAT)
    holder.take([piece(0, "", "f")])
    assert joined(holder.finish(cut=False)) == [("f", "{}")]


def test_a_call_that_length_cut_off_is_left_out():
    holder = WholeCalls(CHAT)
    out = holder.take([piece(0, '{"text": "x"}', "f"), piece(1, '{"te', "g")])
    assert joined(out + holder.finish(cut=True)) == [("f", '{"text": "x"}')]


@pytest.mark.parametrize("arguments", ['{"te', "words", "[1]", '{"a": 1}}'])
def test_a_call_that_cannot_be_read_is_a_failure(arguments):
    holder = WholeCalls(CHAT)
    holder.take([piece(0, arguments, "f")])
    with pytest.raises(UpstreamError):
        holder.finish(cut=False)


def test_a_call_of_an_unknown_tool_goes_out_as_it_is():
    holder = WholeCalls(CHAT)
    holder.take([piece(0, "x = 1", "unknown")])
    assert joined(holder.finish(cut=False)) == [("unknown", "x = 1")]


def test_what_is_held_is_bounded():
    holder = WholeCalls(CHAT)
    holder.take([piece(0, '{"text": "', "f")])
    with pytest.raises(UpstreamError, match="8 MiB"):
        for _ in range(HELD_CHARS_MAX // 100_000 + 2):
            holder.take([piece(0, "x" * 100_000)])


def test_a_schema_is_found_by_the_name_that_was_sent():
    tool = {"type": "function", "function": {"name": "my.tool", "parameters": SCHEMA}}
    chat = chat_from({"messages": [{"role": "user", "content": "hi"}], "tools": [tool]})
    (sent,) = chat.tool_names
    calls, holder = StreamedCalls(chat), WholeCalls(chat)
    pieces = [piece(0, '{"tags": "[1]"}', sent)]
    calls.mend(pieces, {})
    holder.take(pieces)
    assert joined(holder.finish(cut=False)) == [("my.tool", '{"tags":[1]}')]


# --- In the gateway -------------------------------------------------------------------------------------------------


async def test_a_client_gets_a_call_in_two_pieces(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(ROLE, *ONE, CALLS))

    got = await gateway.stream(tools=TOOLS)

    pieces = [one for delta in got.deltas for one in delta.get("tool_calls") or []]
    assert joined(pieces) == [("f", '{"text": "x"}')]
    assert pieces[0]["id"] == "c0"
    assert got.finishes == ["tool_calls"]
    got.assert_done_once()


async def test_pieces_go_out_as_they_come_where_the_setting_says_so(start_gateway, fake):
    gateway = await start_gateway(["a"], {"TOOL_CALLS": "stream"})
    fake.script("a", sse(*ONE, CALLS))

    got = await gateway.stream(tools=TOOLS)

    assert got.chunks[: len(ONE)] == ONE


async def test_text_before_and_behind_a_call_keeps_its_place(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(chunk("one"), *ONE, chunk("two"), CALLS))

    got = await gateway.stream(tools=TOOLS)

    told = ["call" if delta.get("tool_calls") else delta.get("content") for delta in got.deltas if delta]
    assert told == ["one", "call", "call", "two"]


BREAKS = {
    "cut": [CUT],
    "silence": [PAUSE],
    "an error": [{"error": {"message": "no luck", "code": 503}}],
    "the end": [],
    "an end marker": [b"data: [DONE]\n\n"],
    "a finish": [CALLS],
}


@pytest.mark.parametrize("ending", BREAKS.values(), ids=BREAKS)
async def test_half_a_call_is_never_seen_and_the_next_route_makes_it_whole(start_gateway, fake, ending):
    gateway = await start_gateway(["a", "b"], {"MAX_STREAM_STALL_MS": "200"})
    fake.script("a", sse(ROLE, *ONE[:2], *ending, done=False))
    fake.script("b", sse(*ONE, CALLS))

    got = await gateway.stream(tools=TOOLS)

    assert [call["function"]["arguments"] for call in got.calls] == ['{"text": "x"}']
    assert got.headers["X-Routed-Via"] == "b/b-model"
    assert got.finishes == ["tool_calls"]


@pytest.mark.parametrize("finish", ["length", "content_filter"])
@pytest.mark.parametrize("begun", [piece(0, "", "f"), piece(0, "", "unknown"), piece(0, '{"a": ', "unknown")])
async def test_a_call_cut_off_at_its_name_is_not_made_up_into_one_without_arguments(start_gateway, fake, begun, finish):
    gateway = await start_gateway()
    fake.script("a", sse(chunk("I look. "), said(begun), chunk(finish=finish)))

    got = await gateway.stream(tools=TOOLS)

    assert (got.text, got.calls, got.finishes) == ("I look. ", [], [finish])


@pytest.mark.parametrize("finish", ["length", "tool_calls"])
async def test_a_whole_answer_that_is_streamed_leaves_out_the_call_that_length_cut_off(start_gateway, fake, finish):
    gateway = await start_gateway()
    whole, half = ({"id": id, "type": "function", "function": {"name": "f", "arguments": told}} for id, told in (
        ("one", '{"text": "x"}'), ("two", '{"te' if finish == "length" else "{}"),
    ))  # fmt: skip
    fake.script("a", completion("I look.", finish=finish, message={"tool_calls": [whole, half]}))

    got = await gateway.stream(tools=TOOLS)

    told = ['{"text": "x"}'] if finish == "length" else ['{"text": "x"}', "{}"]
    assert [call["function"]["arguments"] for call in got.calls] == told
    assert (got.text, got.finishes) == ("I look.", [finish])


async def test_a_whole_answers_call_that_length_cut_off_before_its_arguments_has_none(start_gateway, fake):
    gateway = await start_gateway()
    for finish, arguments in (("length", ""), ("tool_calls", "{}")):
        for told in ("", None):
            call = {"id": "one", "type": "function", "function": {"name": "f", "arguments": told}}
            fake.script("a", completion("I look.", finish=finish, message={"tool_calls": [call]}))
            message = (await gateway.chat(tools=TOOLS)).json["choices"][0]["message"]
            assert [call["function"]["arguments"] for call in message["tool_calls"]] == [arguments]


async def test_a_call_that_length_cut_off_is_left_out_of_the_stream(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(chunk("I look. "), *ONE[:2], chunk(finish="length")))

    got = await gateway.stream(tools=TOOLS, max_tokens=8)

    assert (got.text, got.calls, got.finishes) == ("I look. ", [], ["length"])


async def test_a_call_that_takes_long_is_no_stall_and_no_late_first_token(start_gateway, fake):
    limits = {"MAX_STREAM_STALL_MS": "300", "FIRST_TOKEN_TIMEOUT_MS": "300"}
    gateway = await start_gateway(["a", "b"], limits)
    begun = event(said(piece(0, '{"text": "', "f")))
    more = [Every(0.02, event(said(piece(0, "x"))), times=40)]  # 0.8 s
    fake.script("a", sse(begun, *more, said(piece(0, '"}')), CALLS))

    got = await gateway.stream(tools=TOOLS)

    assert got.headers["X-Routed-Via"] == "a/a-model"
    assert json.loads(got.calls[0]["function"]["arguments"]) == {"text": "x" * 40}


async def test_a_call_that_says_nothing_more_is_given_up_whatever_else_arrives(start_gateway, fake):
    limits = {"MAX_STREAM_STALL_MS": "300", "FIRST_TOKEN_TIMEOUT_MS": "300"}
    gateway = await start_gateway(["a", "b"], limits)
    for name, filler in {"comments": b": wait\n\n", "chunks of nothing": event(chunk())}.items():
        with case(name):
            fake.script("a", sse(*ONE[:2], Every(0.02, filler)))
            got = await gateway.stream(tools=TOOLS)
            assert got.text == "hello from b"
            await gateway.recovered()


async def test_a_large_call_is_no_preamble(start_gateway, fake):
    gateway = await start_gateway(["a"])
    parts = [said(piece(0, "x" * 100_000)) for _ in range(15)]
    fake.script("a", sse(said(piece(0, '{"text": "', "f")), *parts, said(piece(0, '"}')), CALLS))

    (made,) = (await gateway.stream(tools=TOOLS)).calls

    assert len(made["function"]["arguments"]) > 1_500_000


async def test_a_call_that_never_ends_is_refused(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", sse(said(piece(0, '{"text": "', "f")), Every(0, event(said(piece(0, "x" * 200_000))))))

    got = await gateway.stream(tools=TOOLS)

    assert got.text == "hello from b"
    assert got.headers["X-Fallback-Trail"] == "a/a-model=malformed"


async def test_the_first_of_two_calls_goes_out_when_the_second_begins(start_gateway, fake):
    gateway = await start_gateway(["a"])
    later = asyncio.Event()
    fake.script("a", sse(*ONE, said(piece(1, "", "g")), Wait(later), said(piece(1, "{}")), CALLS))

    async with gateway.post(gateway.request(stream=True, tools=TOOLS)) as response:
        seen = b""
        while b'{\\"text\\": \\"x\\"}' not in seen:
            seen += await response.content.readany()
        assert b'"g"' not in seen
        later.set()
        rest = await response.content.read()
    assert b'"g"' in rest


async def test_calls_of_the_other_wire_go_out_in_two_pieces(start_gateway, fake):
    gateway = await start_gateway({"google": Gemini().options(fake)})
    fake.script("google", Gemini().says(Said(calls=[("f", {"text": "x"}), ("g", {})], finish="tool_calls")))

    got = await gateway.stream(tools=TOOLS)

    pieces = [one for delta in got.deltas for one in delta.get("tool_calls") or []]
    assert [(name, json.loads(arguments)) for name, arguments in joined(pieces)] == [("f", {"text": "x"}), ("g", {})]


async def test_a_call_written_as_text_goes_out_in_two_pieces(start_gateway, fake):
    gateway = await start_gateway(["a"])
    text = '<tool_call>{"name": "f", "arguments": {"text": "x"}}</tool_call>'
    fake.script("a", sse(*[chunk(text[at : at + 5]) for at in range(0, len(text), 5)], STOP))

    got = await gateway.stream(tools=TOOLS)

    pieces = [one for delta in got.deltas for one in delta.get("tool_calls") or []]
    assert [name for name, _ in joined(pieces)] == ["f"]


async def test_a_whole_answer_is_streamed_with_its_calls_in_two_pieces(start_gateway, fake):
    gateway = await start_gateway({"a": {"quirks": {"no_stream": True}}})
    call = {"id": "c0", "type": "function", "function": {"name": "f", "arguments": '{"text":"x"}'}}
    fake.script("a", completion(None, message={"tool_calls": [call]}, finish="tool_calls"))

    got = await gateway.stream(tools=TOOLS)

    pieces = [one for delta in got.deltas for one in delta.get("tool_calls") or []]
    assert joined(pieces) == [("f", '{"text":"x"}')]


async def test_an_attempt_that_makes_a_call_is_not_late(fake):
    later = asyncio.Event()
    fake.script("a", sse(*ONE[:2], Wait(later), ONE[2], CALLS))
    platform = Platform("a", "A", "openai", fake.url("a"), keyless=True)
    model = replace(World({}).route(1).model, platform=platform)
    async with Upstream(connect_s=1.0) as upstream:
        attempt = Attempt(Providers(Timeouts(5.0, 5.0, 5.0), upstream), Route(model, KEYLESS, None), STREAMED, 1)
        opening = asyncio.create_task(attempt.open(late_at=asyncio.get_running_loop().time() + 0.2))
        await asyncio.sleep(0.4)
        assert not opening.done()
        later.set()
        assert await opening
        attempt.close()
