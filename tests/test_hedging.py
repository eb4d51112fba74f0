"""SPEC 15, over real sockets: a second route joins one that is late, within a budget; whoever answers first wins."""

import asyncio
import time
from collections.abc import Callable, Iterator

import aiohttp
import pytest
from conftest import Stream, both_ways, default_key
from continuing import (
    PROSE,
    assert_one_answer,
    broken,
    continues_prefill,
    counted,
    later,
    reasked,
    repeats_anchor,
    served,
)
from fake_provider import (
    CUT,
    PAUSE,
    RESET,
    ROLE,
    Every,
    Reply,
    Request,
    TooLate,
    answer,
    assert_in_time,
    chunk,
    chunked,
    error,
    raw,
    sse,
    until,
)

from adapters.openai import OpenAIAdapter
from adapters.registry import ADAPTERS

ALL = {"HEDGE_PERCENT": "100"}
SOON = {"late_first_token_ms": (40, 80), "late_answer_ms": (40, 80)}
# What is no answer yet: whoever sends only this is as late as one that sends nothing.
SILENCES = {
    "no head": raw(PAUSE),
    "a head": chunked(PAUSE),
    "a role": sse(ROLE, PAUSE),
    "white space": sse(ROLE, chunk("  "), PAUSE),
    "comments": sse(Every(0.005, b": working\n\n")),
}


async def hedges(gateway) -> dict[str, float]:
    return await counted(gateway, "hedges_total")


async def assert_no_trace_but(gateway, *, rests: tuple[str, ...] = ()) -> None:
    """Nothing rests, is banned, gated, or held as running, but these models."""
    seen = await gateway.protection()
    assert tuple(rest["model_id"] for rest in seen["transient_cooldowns"]) == rests
    assert (seen["key_cooldowns"], seen["bans"], seen["gates"], seen["active"]) == ([], [], [], [])


# --- Who wins ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("silence", SILENCES.values(), ids=SILENCES)
async def test_a_stream_whose_first_token_is_late_is_joined_by_another_platform(start_gateway, fake, silence):
    gateway = await start_gateway(["a", "b"], ALL, **SOON)
    fake.script("a", silence)

    got = await gateway.stream()

    got.assert_whole("hello from b")
    assert got.headers["X-Routed-Via"] == "b/b-model"
    assert "X-Fallback-Attempts" not in got.headers
    assert fake.called == ["a", "b"]
    joined_after_s = fake.requests[1].arrived_at - fake.requests[0].arrived_at
    assert joined_after_s < 1.0
    if joined_after_s <= 0.06:
        raise TooLate("it was joined too early, or the machine took long to read the first request")
    assert_in_time(await fake.closed(0) - fake.requests[1].arrived_at)
    rows = await gateway.rows_of(got, 2)
    lost, won = sorted(rows, key=lambda row: row["attempt"])
    assert (lost["platform"], lost["status"], lost["error_kind"]) == ("a", "cancelled", "lost_race")
    assert (won["platform"], won["status"], won["error_kind"]) == ("b", "success", None)
    assert (lost["attempt"], won["attempt"]) == (1, 2)
    await assert_no_trace_but(gateway)
    assert await hedges(gateway) == {"won": 1}


async def test_a_whole_answer_that_is_late_is_joined_too(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ALL, **SOON)
    fake.script("a", raw(PAUSE))

    got = await gateway.chat()

    assert (got.text, got.headers["X-Routed-Via"]) == ("hello from b", "b/b-model")
    assert_in_time(await fake.closed(0) - fake.requests[1].arrived_at)
    assert {row["error_kind"] for row in await gateway.rows_of(got, 2)} == {"lost_race", None}
    assert await hedges(gateway) == {"won": 1}


async def test_times_are_those_of_the_kind_of_answer(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ALL, late_first_token_ms=(40, 80), late_answer_ms=(60_000, 60_000))
    go_on = asyncio.Event()
    fake.script("a", later(answer("patience"), go_on))

    asking = asyncio.create_task(gateway.chat())
    (await gateway.stream()).assert_whole("hello from b")
    go_on.set()

    assert (await asking).text == "patience"
    assert fake.called == ["a", "a", "b"]


@both_ways
async def test_the_first_goes_on_while_another_tries_and_may_still_win(start_gateway, fake, streaming):
    gateway = await start_gateway(["a", "b"], ALL, **SOON)
    go_on = asyncio.Event()
    fake.script("a", later(answer("here I am"), go_on))
    fake.script("b", sse(ROLE, chunk(" "), PAUSE) if streaming else raw(PAUSE))

    asking = asyncio.create_task(gateway.ask(streaming=streaming))
    await until(lambda: len(fake.requests) == 2 and fake.requests[1].paused)
    went_on_at = time.monotonic()
    go_on.set()
    got = await asking

    assert (got.text, got.headers["X-Routed-Via"]) == ("here I am", "a/a-model")
    assert_in_time(await fake.closed(1) - went_on_at)
    assert fake.requests[0].closed_at is None
    assert {row["platform"]: row["error_kind"] for row in await gateway.rows_of(got, 2)} == {
        "a": None,
        "b": "lost_race",
    }
    await assert_no_trace_but(gateway)
    assert await hedges(gateway) == {"lost": 1}


FAILURES = {"503": error(503), "cut": raw(CUT), "reset": raw(RESET), "role and cut": sse(ROLE, CUT)}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
async def test_a_failure_wins_no_race_and_costs_what_it_always_costs(start_gateway, fake, failure):
    gateway = await start_gateway(["a", "b"], ALL, **SOON)
    go_on = asyncio.Event()
    fake.script("a", later(answer("here I am"), go_on))
    fake.script("b", failure)

    asking = asyncio.create_task(gateway.stream())
    await gateway.row(platform="b")
    go_on.set()
    got = await asking

    got.assert_whole("here I am")
    rows = {row["platform"]: row["status"] for row in await gateway.rows_of(got, 2)}
    assert rows == {"a": "success", "b": "error"}
    await assert_no_trace_but(gateway, rests=("b-model",))
    assert await hedges(gateway) == {"lost": 1}


async def test_where_both_fail_failover_goes_on(start_gateway, fake):
    gateway = await start_gateway(["a", "b", "c"], ALL, late_first_token_ms=(40, 80))
    go_on = asyncio.Event()
    fake.script("a", later(lambda request: sse(ROLE, CUT), go_on))
    fake.script("b", error(503))

    asking = asyncio.create_task(gateway.stream())
    await gateway.row(platform="b")
    go_on.set()
    got = await asking

    got.assert_whole("hello from c")
    assert got.headers["X-Fallback-Trail"] == "b/b-model=server_error; a/a-model=connection"
    await assert_no_trace_but(gateway, rests=("b-model", "a-model"))
    assert await hedges(gateway) == {"failed": 1}


async def test_a_pinned_model_that_fails_in_a_race_is_asked_once_more_when_the_other_has_failed_too(
    start_gateway, fake
):
    gateway = await start_gateway(["a", "b"], ALL, **SOON)
    a_fails, b_fails = asyncio.Event(), asyncio.Event()
    fake.script("a", later(lambda request: error(500), a_fails), answer("at last"))
    fake.script("b", later(lambda request: error(400), b_fails))

    asking = asyncio.create_task(gateway.stream(model="a-model"))
    await until(lambda: len(fake.requests) == 2)
    a_fails.set()
    await gateway.row(platform="a")
    b_fails.set()

    (await asking).assert_whole("at last")
    assert fake.called == ["a", "b", "a"]


async def test_a_content_filter_is_the_answer_for_both(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ALL, **SOON)
    fake.script("a", raw(PAUSE))
    fake.script("b", error(400, "blocked", code="content_filter"))

    got = await gateway.stream()

    assert (got.status, got.error["code"]) == (400, "content_filter")
    assert_in_time(await fake.closed(0) - fake.requests[1].arrived_at)
    assert {row["platform"]: row["status"] for row in await gateway.rows(2)} == {"a": "cancelled", "b": "error"}
    await assert_no_trace_but(gateway)


# --- What a lost race costs -------------------------------------------------------------------------------------------
async def test_the_loser_keeps_what_was_reserved_for_it(start_gateway, fake):
    """Its answer may be billed: an estimate of 1,001 tokens stays taken of 1,500 a minute."""
    gateway = await start_gateway({"a": {"model": {"tpm": 1500}}, "b": {}}, ALL, **SOON)
    fake.script("a", raw(PAUSE), answer("hello from a"))

    (await gateway.stream()).assert_whole("hello from b")
    (await gateway.stream()).assert_whole("hello from b")

    assert fake.called == ["a", "b", "b"]


async def test_races_lost_open_no_gate(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ALL, **SOON)
    fake.script("a", raw(PAUSE))

    for _ in range(12):
        (await gateway.stream()).assert_whole("hello from b")

    assert fake.called == ["a", "b"] * 12
    await assert_no_trace_but(gateway)
    assert await hedges(gateway) == {"won": 12}


@both_ways
async def test_a_client_that_leaves_during_a_race_ends_both(start_gateway, fake, streaming):
    gateway = await start_gateway(["a", "b"], ALL, **SOON)
    for name in "ab":
        fake.script(name, raw(PAUSE))

    asking = asyncio.create_task(gateway.ask(streaming=streaming))
    await until(lambda: len(fake.requests) == 2 and fake.requests[1].paused)
    left_at = time.monotonic()
    asking.cancel()

    assert_in_time(await fake.closed(0) - left_at)
    assert_in_time(await fake.closed(1) - left_at)
    rows = await gateway.rows(2)
    assert {(row["platform"], row["status"], row["error_kind"]) for row in rows} == {
        ("a", "cancelled", None),
        ("b", "cancelled", None),
    }
    await assert_no_trace_but(gateway)
    assert await hedges(gateway) == {}


async def test_races_leave_no_task_and_no_connection_behind(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ALL, **SOON)
    fake.script("a", raw(PAUSE))
    (await gateway.stream()).assert_whole("hello from b")

    await asyncio.gather(*[gateway.stream() for _ in range(10)])  # as many as are saved at most

    await until(lambda: all(request.closed_at for request in fake.requests if request.platform == "a"))
    assert fake.called.count("a") == 11
    assert not [task for task in asyncio.all_tasks() if task.get_coro().__qualname__ == "Attempt.open"]


# --- Who may join, and how often --------------------------------------------------------------------------------------
LATE_S = 0.2


def slow(text: str) -> Callable[[Request], Reply]:
    """Answers, but late."""

    def reply(request: Request) -> Reply:
        go_on = asyncio.Event()
        asyncio.get_running_loop().call_later(LATE_S, go_on.set)
        return later(answer(text), go_on)(request)

    return reply


async def test_the_budget_holds_in_a_slow_hour(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], {"HEDGE_PERCENT": "5"}, **SOON)
    for name in "ab":
        fake.script(name, slow(f"hello from {name}"))

    for _ in range(4):
        await asyncio.gather(*[gateway.stream() for _ in range(25)])

    assert 3 <= fake.called.count("b") <= 5
    assert fake.called.count("a") == 100
    assert sum((await hedges(gateway)).values()) == fake.called.count("b")


NEVER = {
    "no percent": (["a", "b"], {"HEDGE_PERCENT": "0"}, {}),
    "the pinned model alone": (["a", "b"], ALL, {"model": "a-model", "headers": {"X-Fallback": "none"}}),
    "the same platform": ({"a": {"models": [{"model_id": "a-model"}, {"model_id": "a-other"}]}}, ALL, {}),
    "another key": ({"a": {"keys": [default_key("a1"), default_key("a2")]}}, ALL, {}),
    "excluded from the mode": ({"a": {}, "b": {"model": {"exclude_from": ["balanced"]}}}, ALL, {"model": "auto"}),
    "out of its limits": ({"a": {}, "b": {"model": {"tpm": 10}}}, ALL, {}),
    "no attempt left": (["a", "b"], ALL | {"MAX_FALLBACK_ATTEMPTS": "1"}, {}),
    "no time left": (["a", "b"], ALL | {"REQUEST_BUDGET_MS": "10"}, {}),
}


@pytest.mark.parametrize(("platforms", "settings", "fields"), NEVER.values(), ids=NEVER)
async def test_who_may_not_join_does_not(start_gateway, fake, platforms, settings, fields):
    gateway = await start_gateway(platforms, settings, **SOON)
    fake.script("a", slow("patience"))

    (await gateway.stream(**fields)).assert_whole("patience")

    assert fake.called == ["a"]
    assert await hedges(gateway) == {}


async def test_nobody_joins_as_a_trial(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ALL, **SOON)
    fake.script("a", error(400), slow("patience"))
    fake.script("b", error(503))
    assert (await gateway.stream()).status != 200
    assert set(await gateway.cooled_models()) == {"b-model"}
    fake.clear()

    (await gateway.stream()).assert_whole("patience")

    assert fake.called == ["a"]


async def test_a_key_near_the_end_of_its_day_is_spared_and_the_next_platform_joins(start_gateway, fake):
    gateway = await start_gateway({"a": {}, "b": {"model": {"rpd": 11}}, "c": {}}, ALL, **SOON)
    for _ in range(10):
        assert (await gateway.stream(model="b-model")).text == "hello from b"
    fake.clear()
    fake.script("a", raw(PAUSE))

    (await gateway.stream()).assert_whole("hello from c")

    assert fake.called == ["a", "c"]


async def test_a_models_own_pace_says_what_is_late(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ALL, late_first_token_ms=(40, 60_000))
    fake.script("a", *[answer("hello from a")] * 19, slow("patience"), raw(PAUSE))
    for _ in range(19):
        (await gateway.stream()).assert_whole("hello from a")
    (await gateway.stream()).assert_whole("patience")  # too little is known as yet
    assert "b" not in fake.called

    (await gateway.stream()).assert_whole("hello from b")


# --- Together with rescue ---------------------------------------------------------------------------------------------
UNHURRIED = {"late_first_token_ms": (300, 300)}  # what answers at once is in time, also on a busy machine


async def test_an_answer_that_won_a_race_and_breaks_is_continued_also_by_the_loser(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], ALL | {"RESCUE": "on"}, **UNHURRIED)
    fake.script("a", raw(PAUSE), served(repeats_anchor(PROSE)))
    fake.script("b", broken())

    got = await gateway.stream()

    assert_one_answer(got, PROSE)
    assert fake.called == ["a", "b", "a"]


async def test_a_continuation_that_is_late_is_joined_by_one_that_asks_in_its_own_words(start_gateway, fake):
    gateway = await start_gateway({"a": {}, "b": {"prefill": "plain"}, "c": {}}, ALL | {"RESCUE": "on"}, **UNHURRIED)
    go_on = asyncio.Event()
    fake.script("a", broken())
    fake.script("b", later(served(continues_prefill(PROSE)), go_on))
    fake.script("c", raw(PAUSE))

    asking = asyncio.create_task(gateway.stream())
    await until(lambda: len(fake.requests) == 3 and fake.requests[2].paused)
    go_on.set()
    got = await asking

    assert_one_answer(got, PROSE)
    assert got.comments == [": resumed on b/b-model"]
    assert reasked(fake.requests[2].json) is not None
    kinds = {row["platform"]: (row["error_kind"], row["resumed_at"]) for row in await gateway.rows_of(got, 3)}
    half = len(PROSE) // 2
    assert kinds == {"a": ("connection", None), "b": (None, half), "c": ("lost_race", half)}


async def test_a_prefill_refused_in_a_race_costs_nothing(start_gateway, fake):
    gateway = await start_gateway({"a": {}, "b": {}, "c": {"prefill": "plain"}}, ALL | {"RESCUE": "on"}, **UNHURRIED)
    go_on = asyncio.Event()
    fake.script("a", broken())
    fake.script("b", later(served(repeats_anchor(PROSE)), go_on))
    fake.script("c", error(400))

    asking = asyncio.create_task(gateway.stream())
    await until(lambda: "c" in fake.called)
    await gateway.rows(1, platform="c")
    go_on.set()

    assert_one_answer(await asking, PROSE)
    assert fake.called == ["a", "b", "c"]
    await assert_no_trace_but(gateway, rests=("a-model",))


# --- Defects of ours --------------------------------------------------------------------------------------------------
class Defective(OpenAIAdapter):
    """Its parser does not survive a word."""

    def translator(self, *args, **more):
        class Translator:
            def recognised(self, raw: bytes, payload: bytes) -> None:
                return None

            def feed(self, raw: bytes, chunk: dict) -> list:
                if chunk["choices"][0]["delta"].get("content"):
                    return self.feed(raw, chunk)
                return []

            def end(self) -> list:
                return []

        return Translator()


@pytest.fixture
def defective() -> Iterator[str]:
    ADAPTERS["defective"] = lambda clock: Defective()
    yield "defective"
    del ADAPTERS["defective"]


async def test_a_defect_of_ours_in_a_race_ends_both_attempts_and_the_request(start_gateway, fake, defective):
    gateway = await start_gateway({"a": {}, "b": {"adapter": defective}}, ALL, **SOON)
    fake.script("a", raw(PAUSE))

    got = await gateway.stream()

    assert (got.status, got.error["code"]) == (500, "internal_error")
    assert_in_time(await fake.closed(0) - fake.requests[1].arrived_at)
    called_off, ours = await gateway.rows(2)
    assert (called_off["status"], called_off["error_kind"]) == ("cancelled", None)
    assert_ours(ours)
    await assert_no_trace_but(gateway)


def assert_ours(row: dict) -> None:
    """The row of an attempt that our own defect has ended: it blames no provider, and routing learns nothing of it."""
    assert (row["status"], row["error_kind"], row["http_status"], row["uncounted"]) == ("error", None, 500, 1)


async def test_a_defect_of_ours_in_the_middle_of_an_answer_cuts_the_connection(start_gateway, fake, defective):
    gateway = await start_gateway({"a": {}, "b": {"adapter": defective}}, {"RESCUE": "on"})
    fake.script("a", broken())
    fake.script("b", served(repeats_anchor(PROSE)))

    received = b""
    with pytest.raises(aiohttp.ClientPayloadError):
        async with gateway.post(gateway.request(stream=True)) as response:
            async for data in response.content.iter_any():
                received += data

    assert Stream(200, {}, received).text == PROSE[: len(PROSE) // 2]
    assert b"[DONE]" not in received
    broke, ours = await gateway.rows(2)
    assert (broke["status"], broke["error_kind"]) == ("error", "connection")
    assert_ours(ours)
    await assert_no_trace_but(gateway, rests=("a-model",))
