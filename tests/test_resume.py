"""SPEC 14, over real sockets: a stream that breaks goes on from another provider, in the same response.

Platform `a` breaks off; those behind it are models of tests/continuing.py, each with its own way to take up an answer.
"""

import asyncio
import time

import pytest
from conftest import Stream, case, default_key
from continuing import (
    BREAKS,
    TEXTS,
    changes_white_space,
    continues_prefill,
    diverged,
    diverges,
    goes_on_without_echo,
    has_preamble,
    prefilled,
    reasked,
    refuses_prefill,
    repeats_anchor,
    served,
    starts_over,
    starts_over_differently,
    straightens_quotes,
    trims_its_answer,
)
from fake_provider import (
    CUT,
    PAUSE,
    PROMISED,
    ROLE,
    STOP,
    Every,
    Wait,
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
from strict_messages import assert_in_order, events_of
from test_disconnect import CLOSE_WITHIN_S
from test_messages_stream import raw_stream as raw_message
from test_messages_stream import streamed as streamed_message
from test_responses_stream import piece
from test_responses_stream import streamed as streamed_response

PROSE = TEXTS["prose"]
HALF = len(PROSE) // 2
ON = {"RESCUE": "on", "RESCUE_AFTER_MS": "100"}
NO_RESTS = {"TRANSIENT_COOLDOWN_MS": "1"}
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


def broken(text: str = PROSE, at: int = HALF, how: str = "fin"):
    """A provider whose answer breaks behind so many characters."""
    return served(starts_over(text), break_at=at, how=how)


def later(reply_to, go_on: asyncio.Event):
    """The same answer, after a while."""

    def reply(request):
        steps = reply_to(request).steps
        return raw(steps[0], Wait(go_on), *steps[1:])

    return reply


def assert_one_answer(got: Stream, text: str) -> None:
    """Nobody who reads it can tell that it came from several providers."""
    got.assert_whole(text)
    assert len({(part["id"], part["created"], part["model"]) for part in got.chunks}) == 1
    assert [delta["role"] for delta in got.deltas if "role" in delta] == ["assistant"]


def assert_lost(got: Stream, text: str, kind: str = "stream_error") -> None:
    """The client has been told so much, and that it is not all."""
    assert got.text == text
    assert got.error["type"] == kind
    assert got.finishes == ["error"]
    got.assert_done_once()


async def counted(gateway, name: str) -> dict[str, float]:
    """One of the metrics that are counted by result."""
    lines = (await gateway.get("/metrics")).body.decode().splitlines()
    found = [line.removeprefix(f'freeway_{name}{{result="').split('"} ') for line in lines if name + "{result=" in line]
    return {result: float(count) for result, count in found}


# --- One answer, whichever way it breaks ------------------------------------------------------------------------------
@every_break
async def test_a_stream_that_breaks_is_continued_in_the_same_response(start_gateway, fake, how):
    gateway = await start_gateway(["a", "b"], ON)
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
    gateway = await start_gateway(["a", "b"], ON)
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
    gateway = await start_gateway(["a", "b"], ON)
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
    stall = {"MAX_STREAM_STALL_MS": "100"}
    fake.script("a", broken(how=how))
    off = await start_gateway(["a", "b"], stall | {"RESCUE": "off"})
    before = await off.stream()
    await off.stop()
    on = await start_gateway(["a", "b"], stall | ON | {"RESCUE_AFTER_MS": "20"})

    got = await on.stream(headers={"X-Rescue": "Off"})

    told = b"".join(event(part) for part in (ROLE, *(chunk(PROSE[at : at + 5]) for at in range(0, HALF, 5))))
    assert told.endswith(event(chunk(PROSE[HALF - HALF % 5 : HALF // 5 * 5 + 5])))
    assert got.body == before.body
    assert_lost(got, PROSE[:HALF], "stream_timeout" if how == "stall" else "stream_error")
    assert fake.called == ["a", "a"]
    assert await counted(on, "rescues_total") == {}


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

    assert await fake.closed(1) - left_at < CLOSE_WITHIN_S
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


# --- Who goes on ------------------------------------------------------------------------------------------------------
async def test_the_same_model_goes_on_first_then_its_family_then_the_rest(start_gateway, fake):
    names = {"a": ("m", "f"), "b": ("b-model", "b"), "c": ("cousin", "f"), "d": ("m", "f")}
    platforms = {name: {"model": {"model_id": id, "family": family}} for name, (id, family) in names.items()}
    gateway = await start_gateway(platforms, ON)
    fake.script("a", broken())
    fake.script("b", served(repeats_anchor(PROSE)))
    for name in ("c", "d"):
        fake.script(name, error(500))

    assert_one_answer(await gateway.stream(), PROSE)
    assert fake.called == ["a", "d", "c", "b"]


async def test_the_model_itself_goes_on_with_another_key_though_it_rests_for_everybody_else(start_gateway, fake):
    gateway = await start_gateway({"a": {"keys": ["k-one-0001", "k-two-0002"]}, "b": {}}, ON)
    fake.script("a", broken(), served(repeats_anchor(PROSE)))

    assert_one_answer(await gateway.stream(), PROSE)
    assert fake.called == ["a", "a"]
    assert fake.requests[0].key != fake.requests[1].key


async def test_without_fallback_only_the_pinned_models_other_keys_and_routes_go_on(start_gateway, fake):
    shared = {"model": {"model_id": "shared"}}
    platforms = {"a": {"keys": ["k-one-0001", "k-two-0002"], **shared}, "b": shared, "c": {}}
    gateway = await start_gateway(platforms, ON)
    fake.script("a", broken(), raw(CUT))
    fake.script("b", served(repeats_anchor(PROSE)))
    none = {"X-Fallback": "none"}

    assert_one_answer(await gateway.stream(model="shared", headers=none), PROSE)
    assert fake.called == ["a", "a", "b"]
    assert len({request.key for request in fake.requests}) == 3

    await gateway.recovered()
    fake.clear()
    fake.script("a", broken(), raw(CUT))
    fake.script("b", raw(CUT))
    assert_lost(await gateway.stream(model="shared", headers=none), PROSE[:HALF])
    assert fake.called == ["a", "a", "b", "b"]  # what is pinned is asked once more where its connection broke


LONG = " ".join(f"word{number}" for number in range(200))


async def test_at_most_two_continuations_that_brought_something(start_gateway, fake):
    gateway = await start_gateway(["a", "b", "c", "d", "e", "f"], ON)
    fake.script("a", broken(LONG, at=100))
    fake.script("b", served(repeats_anchor(LONG), break_at=20))  # within the anchor: it has brought nothing
    fake.script("c", served(repeats_anchor(LONG), break_at=200))
    fake.script("d", served(has_preamble(LONG)))
    fake.script("e", served(repeats_anchor(LONG), break_at=300))

    got = await gateway.stream()

    assert fake.called == ["a", "b", "c", "d", "e"]
    assert got.comments == [": resumed on c/c-model", ": resumed on e/e-model"]
    assert_lost(got, LONG[: len(got.text)])
    at = [row["resumed_at"] for row in await gateway.rows_of(got, 5)]
    assert at == [None, 100, 100, at[3], at[3]]
    assert 100 < at[3] < len(got.text)


async def test_two_continuations_make_one_answer(start_gateway, fake):
    gateway = await start_gateway(["a", "b", "c"], ON)
    fake.script("a", broken(LONG, at=100))
    fake.script("b", served(repeats_anchor(LONG), break_at=200, how="clean end"))
    fake.script("c", served(repeats_anchor(LONG)))

    got = await gateway.stream(stream_options={"include_usage": True})

    assert_one_answer(got, LONG)
    assert await counted(gateway, "rescues_total") == {"whole": 1}


@pytest.mark.parametrize(
    ("how", "model", "calls"),
    [
        ("fin", starts_over, 2.2),
        ("reset", repeats_anchor, 2.2),
        ("clean end", repeats_anchor, 3.2),  # which rests nobody; gates do not open for most models at once
    ],
)
async def test_where_five_of_six_cut_every_stream_all_of_120_are_whole(start_gateway, fake, how, model, calls):
    gateway = await start_gateway(list("abcdef"), ON)
    for name in "abcde":  # what each of them says ends at half of the answer, also where it is to go on
        fake.script(name, broken(how=how))
    fake.script("f", served(model(PROSE)))

    for _ in range(120):
        assert_one_answer(await gateway.stream(), PROSE)

    assert len(fake.requests) <= calls * 120


# --- How they are asked -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("asked_for", ["auto-priority", "a-model"])
async def test_a_refused_prefill_is_reasked_on_the_same_route_and_costs_nothing(start_gateway, fake, asked_for):
    keys = [default_key("b1"), default_key("b2")]
    gateway = await start_gateway({"a": {}, "b": {"prefill": "plain", "keys": keys}, "c": {}}, ON | NO_RESTS)
    fake.script("a", broken())
    fake.script("b", served(refuses_prefill(repeats_anchor(PROSE))))
    fake.script("c", error(503))

    got = await gateway.stream(model=asked_for)

    assert_one_answer(got, PROSE)
    assert [name for name in fake.called if name != "c"] == ["a", "b", "b"]
    *_, refused, served_by = fake.requests
    assert (prefilled(refused.json) is not None, reasked(served_by.json) is not None) == (True, True)
    assert refused.key == served_by.key
    rows = [row for row in await gateway.rows_of(got, len(fake.requests)) if row["platform"] == "b"]
    assert [(row["status"], row["error_kind"]) for row in rows] == [("error", "bad_request"), ("success", None)]

    fake.clear()  # it is not asked in that way again
    assert_one_answer(await gateway.stream(model="a-model"), PROSE)
    assert [name for name in fake.called if name != "c"] == ["a", "b"]


async def test_a_prefill_refused_for_good_reason_is_a_failure_of_the_request_there(start_gateway, fake):
    gateway = await start_gateway({"a": {}, "b": {"prefill": "plain"}, "c": {}}, ON)
    fake.script("a", broken())
    fake.script("b", error(400))
    fake.script("c", served(repeats_anchor(PROSE)))

    assert_one_answer(await gateway.stream(), PROSE)
    assert fake.called == ["a", "b", "b", "c"]


async def test_prefills_that_are_refused_do_not_make_the_request_a_bad_one(start_gateway, fake):
    takers = {name: {"prefill": "plain"} for name in "bcd"}
    gateway = await start_gateway({"a": {}, **takers, "e": {}}, ON)
    fake.script("a", broken())
    for name in takers:
        fake.script(name, error(400), error(503))
    fake.script("e", served(repeats_anchor(PROSE)))

    assert_one_answer(await gateway.stream(), PROSE)


MISFITS = {
    "a preamble": has_preamble,
    "another answer": starts_over_differently,
    "a restart that diverges": diverges,
    "the rest without an echo": goes_on_without_echo,
}


@pytest.mark.parametrize("model", MISFITS.values(), ids=MISFITS)
async def test_a_model_that_does_not_fit_is_given_up_for_this_request_and_pays_nothing_else(start_gateway, fake, model):
    gateway = await start_gateway({"a": {}, "b": {"protection": "provider-ban"}, "c": {}}, ON)
    fake.script("a", broken())
    fake.script("b", served(model(PROSE)))
    fake.script("c", served(repeats_anchor(PROSE)))

    got = await gateway.stream(headers={"X-Session-Id": "one"})

    assert_one_answer(got, PROSE)
    assert got.comments == [": resumed on c/c-model"]
    assert fake.called == ["a", "b", "c"]
    seen = await gateway.protection()
    assert [rest["model_id"] for rest in seen["transient_cooldowns"]] == ["a-model"]
    assert (seen["bans"], seen["key_cooldowns"], seen["gates"]) == ([], [], [])
    row = (await gateway.rows_of(got, 3))[1]
    assert (row["status"], row["error_kind"], row["resumed_at"]) == ("error", "malformed", HALF)


async def test_a_model_that_stops_before_its_words_have_found_their_place_is_given_up_and_not_blamed(
    start_gateway, fake
):
    gateway = await start_gateway({"a": {}, "b": {"protection": "provider-ban"}, "c": {}}, ON)
    fake.script("a", broken())
    fake.script("b", served(repeats_anchor(PROSE), break_at=15, how="stall"))
    fake.script("c", served(repeats_anchor(PROSE)))

    began = time.monotonic()
    got = await gateway.stream(model="auto-smart", headers={"X-Session-Id": "one"})

    assert_one_answer(got, PROSE)
    assert 2.9 < time.monotonic() - began < 4.5
    seen = await gateway.protection()
    assert [rest["model_id"] for rest in seen["transient_cooldowns"]] == ["a-model"]
    assert (seen["bans"], seen["gates"]) == ([], [])


# --- Silence ----------------------------------------------------------------------------------------------------------
async def test_heartbeats_run_on_while_an_answer_is_being_mended(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ON | {"KEEPALIVE_INTERVAL_MS": "20"})
    go_on = asyncio.Event()
    fake.script("a", broken())
    fake.script("b", later(served(repeats_anchor(PROSE)), go_on))

    async with gateway.post(gateway.request(stream=True)) as response, asyncio.timeout(5):
        received = b""
        while received.count(b": keep-alive") < 3:
            received += await response.content.readany()
        go_on.set()
        got = Stream(200, response.headers, received + await response.read())

    assert_one_answer(got, PROSE)
    assert fake.called == ["a", "b"]
    assert got.comments[-1] == ": resumed on b/b-model"


PAUSED_S = 0.25  # longer than RESCUE_AFTER_MS here


async def goes_on_after_a_pause(gateway, fake, *before, **fields) -> Stream:
    """What the client gets where the first provider is silent for a while in mid-stream."""
    go_on = asyncio.Event()
    fake.script("a", sse(ROLE, chunk("It goes "), *before, Wait(go_on), chunk("on."), STOP))
    asyncio.get_running_loop().call_later(PAUSED_S, go_on.set)
    return await gateway.stream(**fields)


async def test_a_stream_that_nobody_else_could_go_on_with_is_waited_for(start_gateway, fake):
    gateway = await start_gateway(["a"], ON)
    assert_one_answer(await goes_on_after_a_pause(gateway, fake), "It goes on.")
    assert_one_answer(await goes_on_after_a_pause(gateway, fake, model="a-model"), "It goes on.")


async def test_a_stream_that_could_not_be_continued_is_waited_for(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ON | {"TOOL_CALLS": "stream"})
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    call = piece(0, "{}", id="call_one", name="f")
    cases = {
        "logprobs": ((), {"logprobs": True}),
        "a call": ((call,), {"tools": tools}),
        "no rescue": ((), {"headers": {"X-Rescue": "off"}}),
        "strict": ((), {"headers": {"X-Fallback": "none"}, "model": "a-model"}),
    }
    for name, (before, fields) in cases.items():
        with case(name):
            got = await goes_on_after_a_pause(gateway, fake, *before, **fields)
            assert got.text == "It goes on."
            assert "error" not in got.finishes
    assert fake.called == ["a"] * len(cases)


async def test_comments_do_not_hide_that_an_answer_has_stopped(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ON)
    fake.script("a", sse(ROLE, chunk(PROSE[:HALF]), Every(0.02, b": working\n\n")))
    fake.script("b", served(repeats_anchor(PROSE)))

    assert_one_answer(await gateway.stream(), PROSE)


# --- Ten texts --------------------------------------------------------------------------------------------------------
CUTS = 20  # of each text
JOINS = {
    "none": {
        "repeats the anchor": repeats_anchor,
        "starts over": starts_over,
        "changes white space": changes_white_space,
        "straightens quotes": straightens_quotes,
    },
    "plain": {
        "continues a prefill": continues_prefill,
        "refuses a prefill": lambda text: refuses_prefill(repeats_anchor(text)),
    },
}
MAY_FAIL = {"none": MISFITS, "plain": {"trims its answer": trims_its_answer, **MISFITS}}


@pytest.mark.parametrize("prefill", JOINS)
async def test_the_client_has_the_whole_text_or_an_error_wherever_the_first_provider_cuts(start_gateway, fake, prefill):
    gateway = await start_gateway({"a": {}, "b": {"prefill": prefill}}, ON | NO_RESTS)
    models = JOINS[prefill] | MAY_FAIL[prefill]

    def named(request) -> tuple[str, int, str]:
        text, cut, model = request.json["messages"][0]["content"].split("; ")
        return TEXTS[text], int(cut), model

    def cuts(request):
        text, cut, _ = named(request)
        return served(starts_over(text), break_at=cut)(request)

    def goes_on(request):
        text, _, model = named(request)
        return served(models[model](text))(request)

    fake.script("a", cuts)
    fake.script("b", goes_on)
    for number, (name, text) in enumerate(TEXTS.items()):
        for cut in range(1 + number % 5, len(text) + 1, len(text) // CUTS):
            model = list(models)[(cut + number) % len(models)]
            with case((name, cut, model)):
                got = await gateway.stream(f"{name}; {cut}; {model}", model="a-model")
                if model in JOINS[prefill]:
                    assert_one_answer(got, text)
                elif got.finishes == ["stop"]:  # a restart may diverge behind all that the client has
                    assert_one_answer(got, got.text)
                    assert got.text in (text, diverged(text))
                else:
                    assert_lost(got, text[:cut])
    assert set(fake.called) == {"a", "b"}


# --- The real client --------------------------------------------------------------------------------------------------
@every_break
async def test_the_openai_client_does_not_notice(start_gateway, fake, how):
    gateway = await start_gateway(["a", "b"], ON | NO_RESTS)
    fake.script("a", broken(how=how))
    fake.script("b", served(repeats_anchor(PROSE)))
    messages = [{"role": "user", "content": "hi"}]

    said, roles, finishes, ids = "", [], [], set()
    async for part in await gateway.openai.chat.completions.create(model="a-model", messages=messages, stream=True):
        ids.add((part.id, part.created, part.model))
        for choice in part.choices:
            said += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            finishes += [choice.finish_reason] if choice.finish_reason else []
    assert (said, roles, finishes, len(ids)) == (PROSE, ["assistant"], ["stop"], 1)

    async with gateway.openai.chat.completions.stream(model="a-model", messages=messages) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == PROSE

    async with gateway.openai.responses.stream(model="a-model", input="hi") as stream:
        assert (await stream.get_final_response()).output_text == PROSE
    assert fake.called == ["a", "b"] * 3


@every_break
async def test_the_anthropic_client_does_not_notice(start_gateway, fake, how):
    gateway = await start_gateway(["a", "b"], ON | NO_RESTS)
    fake.script("a", broken(how=how))
    fake.script("b", served(repeats_anchor(PROSE)))

    asked = {"model": "a-model", "max_tokens": 4000, "messages": [{"role": "user", "content": "hi"}]}
    async with gateway.anthropic.messages.stream(**asked) as stream:
        final = await stream.get_final_message()

    assert (final.content[0].text, final.stop_reason) == (PROSE, "end_turn")
