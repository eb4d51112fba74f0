"""SPEC 14.2 to 14.5, over real sockets: who goes on with an answer that broke, how they are asked, and when."""

import asyncio
import time

import pytest
from conftest import Stream, case, default_key
from continuing import (
    HALF,
    NO_RESTS,
    ON,
    PROSE,
    STALLS,
    TEXTS,
    assert_lost,
    assert_one_answer,
    broken,
    changes_white_space,
    continues_prefill,
    counted,
    diverged,
    diverges,
    goes_on_without_echo,
    has_preamble,
    later,
    on,
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
    ROLE,
    STOP,
    Every,
    Reply,
    Wait,
    answer,
    chunk,
    error,
    in_time,
    raw,
    sse,
    usage_chunk,
)
from turns import piece


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


async def test_a_model_whose_window_the_answer_so_far_fills_does_not_go_on_with_it(start_gateway, fake):
    windows = {"a": 100_000, "b": 1_200, "c": 100_000}  # 1000 of these are left for the answer
    gateway = await start_gateway({name: {"model": {"context_window": size}} for name, size in windows.items()}, ON)
    for fields, called in (({}, ["a", "c"]), ({"response_format": {"type": "json_object"}}, ["a", "b"])):
        text = LONG if not fields else f'{{"told": "{LONG}"}}'
        fake.clear()
        fake.script("a", broken(text, at=1_000))
        for name in "bc":
            fake.script(name, served(repeats_anchor(text)))

        assert_one_answer(await gateway.stream(**fields), text)
        assert fake.called == called
        await gateway.recovered()


async def test_two_continuations_make_one_answer(start_gateway, fake):
    gateway = await start_gateway(["a", "b", "c"], ON)
    fake.script("a", broken(LONG, at=100))
    fake.script("b", served(repeats_anchor(LONG), break_at=200, how="clean end"))
    fake.script("c", served(repeats_anchor(LONG)))

    got = await gateway.stream(stream_options={"include_usage": True})

    assert_one_answer(got, LONG)
    assert await counted(gateway, "rescues_total") == {"whole": 1}


@pytest.mark.parametrize(
    ("how", "model"), [("fin", starts_over), ("reset", repeats_anchor), ("clean end", repeats_anchor)]
)
async def test_where_five_of_six_cut_every_stream_all_of_120_are_whole(start_gateway, fake, how, model):
    gateway = await start_gateway(list("abcdef"), on(how))
    for name in "abcde":  # what each of them says ends at half of the answer, also where it is to go on
        fake.script(name, broken(how=how))
    fake.script("f", served(model(PROSE)))

    for _ in range(120):
        assert_one_answer(await gateway.stream(), PROSE)

    assert len(fake.requests) <= 2.2 * 120


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


# In the order of the catalogue, in a mode with sessions, and with all that a failure may cost.
WITH_SESSIONS = {
    name: {"model": {"prefer_in": ["smart"]}, "protection": "provider-ban" if name == "b" else "model-skip"}
    for name in "abc"
}
MISFITS = {
    "a preamble": has_preamble,
    "another answer": starts_over_differently,
    "a restart that diverges": diverges,
    "the rest without an echo": goes_on_without_echo,
}


@pytest.mark.parametrize("model", MISFITS.values(), ids=MISFITS)
async def test_a_model_that_does_not_fit_is_given_up_for_this_request_and_pays_nothing_else(start_gateway, fake, model):
    gateway = await start_gateway(WITH_SESSIONS, ON)
    fake.script("a", broken())
    fake.script("b", served(model(PROSE)))
    fake.script("c", served(repeats_anchor(PROSE)))

    got = await gateway.stream(model="auto-smart", headers={"X-Session-Id": "one"})

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
    gateway = await start_gateway(WITH_SESSIONS, ON | STALLS)
    fake.script("a", broken())
    fake.script("b", served(repeats_anchor(PROSE), break_at=15, how="stall"))
    fake.script("c", served(repeats_anchor(PROSE)))

    began = time.monotonic()
    got = await gateway.stream(model="auto-smart", headers={"X-Session-Id": "one"})

    assert_one_answer(got, PROSE)
    assert time.monotonic() - began < 2.0
    assert [row["error_kind"] for row in await gateway.rows_of(got, 3)] == ["connection", "stall", None]
    seen = await gateway.protection()
    assert [rest["model_id"] for rest in seen["transient_cooldowns"]] == ["a-model"]
    assert (seen["bans"], seen["gates"]) == ([], [])


async def test_a_continuation_that_uses_up_what_was_left_of_the_length_is_not_cut_short(start_gateway, fake):
    gateway = await start_gateway(WITH_SESSIONS, ON)
    fake.script("a", broken(LONG, at=320))  # 80 tokens of 100
    fake.script("b", ends_for_length, answer("the same model again"))
    session = {"model": "auto-smart", "headers": {"X-Session-Id": "one"}}

    got = await gateway.stream(max_tokens=100, **session)

    assert (got.text, got.finishes) == (LONG[:400], ["length"])
    assert fake.requests[1].json["max_tokens"] < 40
    assert (await gateway.stream(**session)).text == "the same model again"


def ends_for_length(request) -> Reply:
    said = repeats_anchor(LONG[:400])(request.json)
    return sse(ROLE, chunk(said), chunk(finish="length"), usage_chunk(99, 30))


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


PAUSED_S = 0.4  # longer than RESCUE_AFTER_MS here


async def goes_on_after_a_pause(gateway, fake, *before, **fields) -> Stream:
    """What the client gets where the first provider is silent for a while in mid-stream."""
    go_on = asyncio.Event()
    fake.script("a", sse(ROLE, chunk("It goes "), *before, Wait(go_on), chunk("on."), STOP))
    asyncio.get_running_loop().call_later(PAUSED_S, go_on.set)
    return await gateway.stream(**fields)


async def test_a_stream_that_nobody_else_could_go_on_with_is_waited_for(start_gateway, fake):
    gateway = await start_gateway(["a"], ON | STALLS)
    assert_one_answer(await goes_on_after_a_pause(gateway, fake), "It goes on.")
    assert_one_answer(await goes_on_after_a_pause(gateway, fake, model="a-model"), "It goes on.")


async def test_a_stream_that_could_not_be_continued_is_waited_for(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ON | STALLS | {"TOOL_CALLS": "stream"})
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
    gateway = await start_gateway(["a", "b"], ON | STALLS)
    fake.script("a", sse(ROLE, chunk(PROSE[:HALF]), Every(0.02, b": working\n\n")))
    fake.script("b", served(repeats_anchor(PROSE)))

    assert_one_answer(await gateway.stream(), PROSE)


async def test_who_is_to_go_on_and_does_not_begin_is_given_up_for_another(start_gateway, fake):
    gateway = await start_gateway(["a", "b", "c"], ON | STALLS)
    fake.script("a", sse(ROLE, chunk(PROSE[:HALF]), CUT))
    fake.script("c", served(repeats_anchor(PROSE)))
    for name, reply in {"silent": raw(PAUSE), "comments": sse(ROLE, Every(0.02, b": working\n\n"))}.items():
        with case(name):
            fake.clear()
            fake.script("b", reply)
            async with in_time(2.0):
                got = await gateway.stream()
            assert_one_answer(got, PROSE)
            assert fake.called == ["a", "b", "c"]
            assert [row["error_kind"] for row in await gateway.rows_of(got, 3)] == ["connection", "stall", None]
            await gateway.recovered()


async def test_the_last_who_can_go_on_may_take_its_time_to_begin(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ON | STALLS)
    go_on = asyncio.Event()
    fake.script("a", sse(ROLE, chunk(PROSE[:HALF]), CUT))
    fake.script("b", lambda request: raw(Wait(go_on), *served(repeats_anchor(PROSE))(request).steps))
    asyncio.get_running_loop().call_later(PAUSED_S, go_on.set)

    assert_one_answer(await gateway.stream(), PROSE)
    assert fake.called == ["a", "b"]


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
