"""SPEC 14, over real sockets: a stream that breaks goes on from another provider, in the same response.

Platform `a` breaks off; those behind it are models of tests/continuing.py, each with its own way to take up an answer.
"""

import asyncio
import json
import sys
import time

import pytest
from conftest import Stream
from continuing import (
    BREAKS,
    HALF,
    NO_RESTS,
    ON,
    PROSE,
    assert_lost,
    assert_one_answer,
    broken,
    continues_prefill,
    counted,
    on,
    pieces,
    reasked,
    refuses_prefill,
    repeats_anchor,
    served,
    starts_over,
    starts_over_differently,
)
from fake_provider import (
    CUT,
    PAUSE,
    PROMISED,
    ROLE,
    STOP,
    Reply,
    assert_in_time,
    chunk,
    chunked,
    error,
    event,
    raw,
    sse,
    until,
    usage_chunk,
    usage_of,
)
from strict_messages import assert_in_order, events_of, raw_message, streamed_message
from strict_models import streamed_response
from turns import CALLS, piece

# What the log says of an attempt that broke in each way.
KINDS = {
    "fin": "connection",
    "reset": "connection",
    "clean end": "truncated",
    "stall": "stall",
    "error event": "server_error",
    "wrapped error": "server_error",
}
every_break = pytest.mark.parametrize("how", BREAKS)
JSON_MODE = {"response_format": {"type": "json_object"}}


# --- One answer, whichever way it breaks ------------------------------------------------------------------------------
@every_break
async def test_a_stream_that_breaks_is_continued_in_the_same_response(start_gateway, fake, how):
    gateway = await start_gateway(["a", "b"], on(how))
    fake.script("a", broken(how=how))
    fake.script("b", served(repeats_anchor(PROSE)))

    got = await gateway.stream()

    assert_one_answer(got, PROSE)
    assert got.comments == [": resumed on b/b-model"]
    told, _, rest = got.body.decode().partition(": resumed on b/b-model\n\n")
    assert Stream(200, {}, told.encode()).text == PROSE[:HALF]
    assert Stream(200, {}, rest.encode()).text == PROSE[HALF:]
    assert got.headers["X-Routed-Via"] == "a/a-model"
    assert fake.called == ["a", "b"]
    if how != "clean end":  # whose connection is as good as new
        assert await fake.closed(0) <= fake.requests[1].arrived_at + 0.02
    first, second = await gateway.rows_of(got, 2)
    assert (first["platform"], first["status"], first["error_kind"]) == ("a", "error", KINDS[how])
    assert (second["platform"], second["status"], second["error_kind"]) == ("b", "success", None)
    assert (first["resumed_at"], second["resumed_at"]) == (None, HALF)
    assert (first["attempt"], second["attempt"]) == (1, 2)
    assert await counted(gateway, "rescues_total") == {"whole": 1}


@every_break
async def test_a_response_that_breaks_goes_on_in_its_open_item(start_gateway, fake, how):
    gateway = await start_gateway(["a", "b"], on(how))
    fake.script("a", broken(how=how))
    fake.script("b", served(repeats_anchor(PROSE)))

    events, got = await streamed_response(gateway)

    (item,) = events[-1]["response"]["output"]
    assert events[-1]["type"] == "response.completed"
    assert item["content"][0]["text"] == events[-1]["response"]["output_text"] == PROSE
    assert len({e["response"]["model"] for e in events if "response" in e}) == 1
    assert [row["resumed_at"] for row in await gateway.rows_of(got, 2)] == [None, HALF]


@every_break
async def test_a_message_that_breaks_goes_on_in_its_open_block(start_gateway, fake, how):
    gateway = await start_gateway(["a", "b"], on(how))
    fake.script("a", broken(how=how))
    fake.script("b", served(repeats_anchor(PROSE)))

    got = await raw_message(gateway)

    assert not got.headers["cut"]
    assert assert_in_order(events_of(got), "auto-priority") == [{"type": "text", "text": PROSE}]
    assert got.comments == [": resumed on b/b-model"]
    assert [row["resumed_at"] for row in await gateway.rows_of(got, 2)] == [None, HALF]


@pytest.mark.parametrize("ending", [b"", BREAKS["wrapped error"][0], BREAKS["error event"][0]])
async def test_words_that_come_with_the_break_in_one_packet_are_delivered_once(start_gateway, fake, ending):
    gateway = await start_gateway(["a", "b"], ON)
    packet = b"".join(event(part) for part in (ROLE, chunk(PROSE[:40]), chunk(PROSE[40:HALF])))
    fake.script("a", chunked(packet + ending))
    fake.script("b", served(repeats_anchor(PROSE)))

    assert_one_answer(await gateway.stream(), PROSE)


async def test_all_has_come_but_how_it_ended(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ON)
    fake.script("a", broken(at=len(PROSE)))
    fake.script("b", served(repeats_anchor(PROSE)))

    assert_one_answer(await gateway.stream(), PROSE)


async def test_a_break_behind_the_finish_is_none(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ON)
    fake.script("a", sse(ROLE, chunk("all there"), STOP, CUT))

    assert_one_answer(await gateway.stream(), "all there")
    assert fake.called == ["a"]


# --- Tokens -----------------------------------------------------------------------------------------------------------
TELLS_EARLY = sse(ROLE, chunk(PROSE[:HALF]), usage_chunk(11, 30), CUT)


@pytest.mark.parametrize("asked", [True, False])
async def test_usage_is_the_first_prompt_and_every_completion_for_those_who_ask(start_gateway, fake, asked):
    gateway = await start_gateway(["a", "b"], ON)
    fake.script("a", TELLS_EARLY)
    fake.script("b", served(repeats_anchor(PROSE), usage=(99, 25)))

    got = await gateway.stream(stream_options={"include_usage": True} if asked else ...)

    assert_one_answer(got, PROSE)
    told = [part["usage"] for part in got.chunks if part.get("usage")]
    assert told == ([usage_of(11, 55)] if asked else [])
    rows = await gateway.rows_of(got, 2)
    assert [(row["input_tokens"], row["output_tokens"]) for row in rows] == [(11, 30), (99, 25)]


async def test_a_provider_that_broke_before_it_counted_is_estimated(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ON)
    fake.script("a", broken())
    fake.script("b", served(repeats_anchor(PROSE), usage=(99, 25)))

    got = await gateway.stream("x" * 400, stream_options={"include_usage": True})

    (told,) = [part["usage"] for part in got.chunks if part.get("usage")]
    assert 100 <= told["prompt_tokens"] < 120
    assert told["completion_tokens"] == -(-HALF // 4) + 25


async def test_usage_is_the_same_in_every_dialect(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ON | NO_RESTS)
    fake.script("a", TELLS_EARLY)
    fake.script("b", served(repeats_anchor(PROSE), usage=(99, 25)))

    events, _ = await streamed_response(gateway, model="a-model")
    usage = events[-1]["response"]["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (11, 55)
    events, _ = await streamed_message(gateway, model="a-model")
    usage = events[-2]["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (11, 55)


# --- Off switches -----------------------------------------------------------------------------------------------------
@every_break
async def test_switched_off_everything_is_as_it_was_to_the_byte(start_gateway, fake, how):
    stall = {"MAX_STREAM_STALL_MS": "150"} if how == "stall" else {}
    fake.script("a", broken(how=how))
    off = await start_gateway(["a", "b"], stall | {"RESCUE": "off"})
    before = await off.stream()
    await off.stop()
    gateway = await start_gateway(["a", "b"], stall | on(how))

    got = await gateway.stream(headers={"X-Rescue": "Off"})

    told = b"".join(event(part) for part in (ROLE, *(chunk(PROSE[at : at + 5]) for at in range(0, HALF, 5))))
    assert told.endswith(event(chunk(PROSE[HALF - HALF % 5 : HALF // 5 * 5 + 5])))
    assert got.body == before.body
    assert_lost(got, PROSE[:HALF], "stream_timeout" if how == "stall" else "stream_error")
    assert fake.called == ["a", "a"]
    assert await counted(gateway, "rescues_total") == {}


async def test_whole_answers_fail_over_as_ever(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ON)
    fake.script("a", raw(PROMISED, b'{"id": "half', CUT))

    got = await gateway.chat()

    assert got.text == "hello from b"
    assert [row["resumed_at"] for row in await gateway.rows_of(got, 2)] == [None, None]
    assert fake.requests[1].json["messages"] == [{"role": "user", "content": "hi"}]


# --- What is no broken stream, or cannot be continued -----------------------------------------------------------------
FILTERED = event({"error": {"message": "blocked", "code": "content_filter", "status": 400}})


@pytest.mark.parametrize(
    ("ending", "finish"),
    [((chunk(finish="length"),), "length"), ((chunk(finish="content_filter"),), "content_filter")],
)
async def test_what_says_how_it_ended_has_ended(start_gateway, fake, ending, finish):
    gateway = await start_gateway(["a", "b"], ON)
    fake.script("a", sse(ROLE, chunk("half an ans"), *ending))

    got = await gateway.stream()

    assert (got.text, got.finishes, fake.called) == ("half an ans", [finish], ["a"])


async def test_what_a_filter_stops_nobody_continues(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ON)
    fake.script("a", sse(ROLE, chunk("half an ans"), FILTERED, done=False))

    assert_lost(await gateway.stream(), "half an ans")
    assert fake.called == ["a"]
    assert await counted(gateway, "rescues_total") == {"lost": 1}


async def test_a_call_that_has_been_begun_towards_the_client_is_never_spliced(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ON | {"TOOL_CALLS": "stream"})
    fake.script("a", sse(ROLE, chunk("I look."), piece(0, '{"ci', id="call_one", name="f"), CUT))

    got = await gateway.stream(tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])

    assert_lost(got, "I look.")
    assert fake.called == ["a"]


@pytest.mark.parametrize("fields", [{"logprobs": True}, {"top_logprobs": 2}])
async def test_an_answer_with_numbers_for_every_token_is_not_continued(start_gateway, fake, fields):
    gateway = await start_gateway(["a", "b"], ON)
    fake.script("a", broken())

    assert_lost(await gateway.stream(**fields), PROSE[:HALF])
    assert fake.called == ["a"]


async def test_a_client_that_leaves_while_its_answer_is_being_mended_ends_all_work(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ON)
    fake.script("a", broken())
    fake.script("b", sse(ROLE, PAUSE))

    async with gateway.post(gateway.request(stream=True)):
        await until(lambda: len(fake.requests) == 2 and fake.requests[1].paused)
        left_at = time.monotonic()

    assert_in_time(await fake.closed(1) - left_at)
    first, second = await gateway.rows(2)
    assert [first["status"], second["status"]] == ["error", "cancelled"]
    assert set(await gateway.cooled_models()) == {"a-model"}
    assert await counted(gateway, "rescues_total") == {}


async def test_where_nobody_can_go_on_the_client_has_what_there_was_and_an_error(start_gateway, fake):
    gateway = await start_gateway(["a", "b", "c"], ON)
    fake.script("a", broken())
    fake.script("b", error(503))
    fake.script("c", served(starts_over_differently(PROSE)))

    got = await gateway.stream()

    assert_lost(got, PROSE[:HALF])
    assert "a failed" in got.error["message"].lower()
    assert not got.comments
    assert [row["error_kind"] for row in await gateway.rows_of(got, 3)] == ["connection", "server_error", "malformed"]
    assert await counted(gateway, "rescues_total") == {"lost": 1}


async def test_a_message_that_nobody_can_continue_breaks_off_unless_a_block_is_complete(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ON | NO_RESTS)
    fake.script("a", broken(), sse(ROLE, chunk(reasoning_content="Hm."), chunk(PROSE[:HALF]), CUT))
    fake.script("b", served(starts_over_differently(PROSE)))

    got = await raw_message(gateway, model="a-model")
    assert got.headers["cut"]
    assert assert_in_order(events_of(got), "a-model") == []
    assert "error" not in [e["type"] for e in events_of(got)]

    got = await raw_message(gateway, model="a-model")
    assert not got.headers["cut"]
    assert assert_in_order(events_of(got), "a-model") == [{"type": "thinking", "thinking": "Hm.", "signature": ""}]
    assert events_of(got)[-1]["type"] == "error"


# --- Thoughts ---------------------------------------------------------------------------------------------------------
async def test_an_answer_that_has_only_thought_starts_again_without_second_thoughts(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ON | NO_RESTS)
    fake.script("a", sse(ROLE, chunk(reasoning_content="six "), chunk(reasoning_content="times "), CUT))
    fake.script("b", sse(ROLE, chunk(reasoning_content="I start over"), chunk("\n\n"), chunk("42"), STOP))

    got = await gateway.stream(model="a-model")
    assert_one_answer(got, "\n\n42")
    assert "".join(delta.get("reasoning_content", "") for delta in got.deltas) == "six times "
    assert got.comments == [": resumed on b/b-model"]
    assert fake.requests[1].json["messages"] == [{"role": "user", "content": "hi"}]
    assert [row["resumed_at"] for row in await gateway.rows_of(got, 2)] == [None, 0]

    events, _ = await streamed_response(gateway, model="a-model")
    thoughts, said = events[-1]["response"]["output"]
    assert (thoughts["summary"][0]["text"], said["content"][0]["text"]) == ("six times ", "\n\n42")

    _, blocks = await streamed_message(gateway, model="a-model")
    assert [block.get("thinking", block.get("text")) for block in blocks] == ["six times ", "\n\n42"]


async def test_a_text_is_continued_without_the_thoughts_of_whoever_goes_on(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ON)
    fake.script("a", sse(ROLE, chunk(reasoning_content="Hm."), chunk(PROSE[:HALF]), CUT))

    def thinks_first(request):
        said = repeats_anchor(PROSE)(request.json)
        return sse(ROLE, chunk(reasoning_content="They want "), chunk(reasoning_content="the rest."), chunk(said), STOP)

    fake.script("b", thinks_first)

    got = await gateway.stream()

    assert_one_answer(got, PROSE)
    assert "".join(delta.get("reasoning_content", "") for delta in got.deltas) == "Hm."


# --- Tool calls -------------------------------------------------------------------------------------------------------
ARGUMENTS = '{"city": "Köln", "days": 3}'
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
LOOKS = "I look up the weather of the next three days for you."
BEFORE = {
    "alone": (),
    "behind text": (chunk(LOOKS[:30]), chunk(LOOKS[30:])),
    "behind another call": (piece(0, "{}", id="call_zero", name="weather"),),
}


def calls_after(request) -> Reply:
    """The rest of what is said before, if it is asked for that, and the whole call."""
    asked = reasked(request.json)
    said = LOOKS if asked is None else asked[1] + LOOKS[len(asked[0]) :]
    return sse(ROLE, chunk(said), piece(0, ARGUMENTS, id="call_b", name="weather"), CALLS)


@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("cut", [0, 1, len(ARGUMENTS) // 2, len(ARGUMENTS) - 1, len(ARGUMENTS)])
async def test_a_call_that_is_cut_comes_once_and_whole_or_there_is_an_error(start_gateway, fake, before, cut):
    gateway = await start_gateway(["a", "b"], ON)
    index = sum("tool_calls" in part["choices"][0]["delta"] for part in before)
    fake.script("a", sse(ROLE, *before, piece(index, ARGUMENTS[:cut], id="call_a", name="weather"), CUT))
    fake.script("b", calls_after)

    got = await gateway.stream(tools=TOOLS)

    told: dict[int, str] = {}
    for call in [call for delta in got.deltas for call in delta.get("tool_calls", [])]:
        told[call["index"]] = told.get(call["index"], "") + call["function"].get("arguments", "")
    got.assert_done_once()
    if index:  # the client has a call, and what would follow it cannot be known
        assert (got.finishes, fake.called) == (["error"], ["a"])
        assert told in ({0: "{}"}, {0: "{}", 1: ARGUMENTS})
    else:
        assert (got.text, got.finishes, told) == (LOOKS, ["tool_calls"], {0: ARGUMENTS})
        assert fake.called == ["a", "b"]


# --- JSON -------------------------------------------------------------------------------------------------------------
RECORD = '{"name": "Ada", "born": 1815, "died": 1852, "known for": "the first program"}'


@pytest.mark.parametrize(
    ("prefill", "model", "whole"),
    [
        ("none", starts_over(RECORD), True),
        ("none", starts_over('{"name": "Eve"}'), False),
        ("plain", continues_prefill(RECORD), True),
        ("plain", lambda body: ' 1815, "died": 1852', False),  # is no JSON as a whole
        ("plain", refuses_prefill(starts_over(RECORD)), True),
    ],
)
async def test_a_json_answer_goes_on_by_prefill_or_by_an_equal_restart(start_gateway, fake, prefill, model, whole):
    gateway = await start_gateway({"a": {}, "b": {"prefill": prefill}}, ON)
    cut = RECORD.index(" 1815") + 3
    fake.script("a", broken(RECORD, at=cut))
    fake.script("b", served(model))

    got = await gateway.stream(**JSON_MODE)

    if whole:
        assert_one_answer(got, RECORD)
    else:
        assert got.error["type"] == "stream_error"
        assert got.text == RECORD[: len(got.text)]
        got.assert_done_once()
    assert all(reasked(request.json) is None for request in fake.requests)


# --- Real clients -----------------------------------------------------------------------------------------------------
HI = [{"role": "user", "content": "hi"}]
# A provider in a process of its own: it says the first half of its answer, and then works on for ever.
DOOMED = """
import asyncio, json, sys

async def serve(reader, writer):
    head = await reader.readuntil(b"\\r\\n\\r\\n")
    writer.write(b"HTTP/1.1 200 OK\\r\\ncontent-type: text/event-stream\\r\\n\\r\\n")
    for part in json.loads(sys.argv[1]):
        writer.write(b"data: " + json.dumps(part).encode() + b"\\n\\n")
    await asyncio.Event().wait()

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


async def test_a_provider_whose_process_is_killed_in_mid_answer_is_not_noticed(start_gateway, fake):
    said = [ROLE, *(chunk(text) for text in pieces(PROSE[:HALF]))]
    doomed = await asyncio.create_subprocess_exec(
        sys.executable, "-c", DOOMED, json.dumps(said), stdout=asyncio.subprocess.PIPE
    )
    port = int(await doomed.stdout.readline())
    gateway = await start_gateway({"a": {"base_url": f"http://127.0.0.1:{port}/v1"}, "b": {}}, {"RESCUE": "on"})
    fake.script("b", served(repeats_anchor(PROSE)))

    got = ""
    async for part in await gateway.openai.chat.completions.create(model="a-model", messages=HI, stream=True):
        got += part.choices[0].delta.content or ""
        if got == PROSE[:HALF]:
            doomed.kill()
            await doomed.wait()

    assert got == PROSE
    assert [(row["platform"], row["status"]) for row in await gateway.rows(2)] == [("a", "error"), ("b", "success")]


@every_break
async def test_the_openai_client_notices_nothing(start_gateway, fake, how):
    gateway = await start_gateway(["a", "b"], on(how) | NO_RESTS)
    fake.script("a", broken(how=how))
    fake.script("b", served(repeats_anchor(PROSE)))

    async with gateway.openai.chat.completions.stream(model="a-model", messages=HI) as stream:
        parts = [event.chunk async for event in stream if event.type == "chunk"]
        final = await stream.get_final_completion()
    choices = [choice for part in parts for choice in part.choices]
    assert (final.choices[0].message.content, final.choices[0].finish_reason) == (PROSE, "stop")
    assert len({(part.id, part.created, part.model) for part in parts}) == 1
    assert [choice.delta.role for choice in choices if choice.delta.role] == ["assistant"]

    async with gateway.openai.responses.stream(model="a-model", input="hi") as stream:
        assert (await stream.get_final_response()).output_text == PROSE
    assert fake.called == ["a", "b"] * 2


@every_break
async def test_the_anthropic_client_notices_nothing(start_gateway, fake, how):
    gateway = await start_gateway(["a", "b"], on(how))
    fake.script("a", broken(how=how))
    fake.script("b", served(repeats_anchor(PROSE)))

    async with gateway.anthropic.messages.stream(model="a-model", max_tokens=4000, messages=HI) as stream:
        final = await stream.get_final_message()

    assert (final.content[0].text, final.stop_reason) == (PROSE, "end_turn")
