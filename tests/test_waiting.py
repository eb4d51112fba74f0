"""SPEC 5.5: a request waits for a route that is coming back, as long as it may, and is told at once when none is."""

import asyncio
import time
from itertools import pairwise

import pytest
from conftest import assert_error, both_ways
from fake_provider import CUT, ROLE, Wait, answer, assert_in_time, chunk, completion, error, in_time, raw, sse, until

from engine.waiting import WAITING_MAX, WaitingRoom

WAITS = {"WAIT_FOR_CAPACITY_MS": "10000"}
SOONER = {"TRIAL_SPACING_MS": "100"}  # instead of the second between a failure and the trial after it
WAITS_LESS = WAITS | SOONER
STOP = chunk(finish="stop")
SOON = error(429, headers={"retry-after": "0.3"})


# --- The room -----------------------------------------------------------------------------------------------------


async def inside(room: WaitingRoom, count: int) -> None:
    await until(lambda: len(room) == count)


async def test_a_wait_ends_when_its_time_has_come():
    room, began = WaitingRoom(), time.monotonic()

    await room.wait("r", began, began, 0.03)

    took_s = time.monotonic() - began
    assert took_s >= 0.025
    assert_in_time(took_s, 0.5)
    assert len(room) == 0


async def test_those_who_wait_are_woken_in_the_order_in_which_they_arrived():
    room, order = WaitingRoom(), []

    async def waits(name: str, since: float) -> None:
        await room.wait(name, since, 0.0, 60.0)
        order.append(name)

    async with asyncio.TaskGroup() as group:
        for name, since in {"third": 3.0, "first": 1.0, "second": 2.0}.items():  # they came again in another order
            group.create_task(waits(name, since))
        await inside(room, 3)
        room.wake()

    assert order == ["first", "second", "third"]
    assert len(room) == 0


async def test_the_room_shows_who_waits_since_when_and_until_when():
    room = WaitingRoom()
    waiting = asyncio.create_task(room.wait("r", 1.0, 5.0, 60.0))
    await inside(room, 1)

    assert [(w.request_id, w.since, w.eta) for w in room.waiters()] == [("r", 1.0, 65.0)]
    waiting.cancel()
    await asyncio.wait([waiting])
    assert list(room.waiters()) == []


async def test_a_full_room_says_so():
    room = WaitingRoom(2)
    waiting = [asyncio.create_task(room.wait(name, 0.0, 0.0, 60.0)) for name in "ab"]
    await inside(room, 2)
    assert room.is_full

    waiting[0].cancel()
    await asyncio.wait(waiting[:1])

    assert not room.is_full
    room.wake()
    await asyncio.wait(waiting)
    assert WAITING_MAX == 1_000


async def test_waking_an_empty_room_does_nothing():
    WaitingRoom().wake()


# --- Requests -----------------------------------------------------------------------------------------------------


@both_ways
async def test_a_request_waits_for_a_key_that_rests_for_a_named_time(start_gateway, fake, streaming):
    gateway = await start_gateway(["a"], WAITS_LESS)
    fake.script("a", SOON, answer("well again"))
    began = time.monotonic()

    got = await gateway.ask(streaming=streaming)

    assert got.text == "well again"
    took_s, waited_ms = time.monotonic() - began, int(got.headers["X-Waited-Ms"])
    assert took_s >= 0.3 and waited_ms >= 250
    assert_in_time(max(took_s, waited_ms / 1000), 3)
    assert got.headers["X-Fallback-Trail"] == "a/a-model=rate_limited"
    first, second = await gateway.rows(2)
    assert (first["waited_ms"], second["status"]) == (None, "success")
    assert second["waited_ms"] == int(got.headers["X-Waited-Ms"])


@both_ways
async def test_a_request_waits_for_what_others_have_used_up(start_gateway, fake, streaming):
    gateway = await start_gateway({"a": {}, "b": {}}, WAITS)
    fake.script("a", error(429, headers={"retry-after": "0.3"}), answer("a again"))
    fake.script("b", error(429, headers={"retry-after": "60"}))
    assert (await gateway.ask(streaming=streaming, headers={"X-Max-Wait": "0"})).status == 429

    got = await gateway.ask(streaming=streaming)

    assert got.text == "a again"
    assert "X-Fallback-Attempts" not in got.headers
    assert fake.called == ["a", "b", "a"]


@pytest.mark.parametrize("failing", [error(503), error(500), raw(CUT), error(429)], ids=["503", "500", "cut", "429"])
async def test_what_failed_for_a_reason_that_passes_is_asked_again(start_gateway, fake, failing):
    gateway = await start_gateway(["a", "b"], WAITS)
    fake.script("a", failing, answer("a again"))
    fake.script("b", error(404))

    got = await gateway.chat()

    assert got.text == "a again"
    assert fake.called == ["a", "b", "a"]
    later_s = fake.requests[2].arrived_at - fake.requests[0].arrived_at
    assert later_s >= 1.0
    assert_in_time(later_s, 2.5)


@both_ways
async def test_what_will_not_come_back_in_time_is_refused_at_once_with_the_time(start_gateway, fake, streaming):
    gateway = await start_gateway(["a"], WAITS)
    fake.script("a", error(429, headers={"retry-after": "60"}))

    async with in_time(1):
        got = await gateway.ask(streaming=streaming)

    assert_error(got, 429, "rate_limit_error", "rate_limited")
    assert 55 <= int(got.headers["Retry-After"]) <= 60
    assert "X-Waited-Ms" not in got.headers


@pytest.mark.parametrize(
    ("settings", "headers"),
    [(WAITS, {"X-Max-Wait": "0"}), ({"WAIT_FOR_CAPACITY_MS": "0"}, {}), (WAITS, {"X-Max-Wait": "0.1"})],
    ids=["by header", "by setting", "not long enough"],
)
async def test_nobody_waits_who_does_not_want_to(start_gateway, fake, settings, headers):
    gateway = await start_gateway(["a"], settings)
    fake.script("a", SOON)

    for model in ("auto", "a-model"):
        async with in_time(0.25):
            got = await gateway.chat(model=model, headers=headers)
        assert_error(got, 429, "rate_limit_error", "rate_limited")
        assert got.headers["Retry-After"] == "1"

    assert fake.called == ["a"]  # the second request comes while the key rests


async def test_one_request_may_wait_longer_than_the_setting(start_gateway, fake):
    gateway = await start_gateway(["a"], {"WAIT_FOR_CAPACITY_MS": "0"} | SOONER)
    fake.script("a", SOON, answer("well again"))

    assert (await gateway.chat(headers={"X-Max-Wait": "5"})).text == "well again"


@pytest.mark.parametrize("wait", ["", "soon", "-1", "nan", "inf", "1e9", "1_0"])
async def test_a_wait_that_is_no_number_of_seconds_is_refused(start_gateway, fake, wait):
    got = await (await start_gateway(["a"])).chat(headers={"X-Max-Wait": wait})

    assert (got.status, got.error["param"]) == (400, "X-Max-Wait")
    assert fake.called == []


async def test_the_budget_of_a_request_bounds_its_wait(start_gateway, fake):
    gateway = await start_gateway(["a"], {**WAITS, "REQUEST_BUDGET_MS": "200"})
    fake.script("a", SOON)

    async with in_time(0.25):
        assert_error(await gateway.chat(), 429, "rate_limit_error", "rate_limited")


async def test_the_wait_of_a_request_is_counted_over_all_its_waits(start_gateway, fake):
    gateway = await start_gateway(["a"], {"WAIT_FOR_CAPACITY_MS": "700"} | SOONER)
    fake.script("a", error(429, headers={"retry-after": "0.3"}))
    began = time.monotonic()

    got = await gateway.chat()

    assert_error(got, 429, "rate_limit_error", "rate_limited")
    assert_in_time(time.monotonic() - began, 0.8)
    assert 2 <= len(fake.called) <= 3


async def test_the_attempts_of_a_request_that_waits_are_bounded_too(start_gateway, fake):
    gateway = await start_gateway(["a"], {**WAITS_LESS, "MAX_FALLBACK_ATTEMPTS": "2"})
    fake.script("a", error(429, headers={"retry-after": "0.05"}))

    assert (await gateway.chat()).status == 429

    assert fake.called == ["a", "a"]


async def test_who_waits_is_shown_and_goes_on_when_cooldowns_are_cleared(start_gateway, fake):
    gateway = await start_gateway(["a"], WAITS)
    fake.script("a", error(429, headers={"retry-after": "8"}), answer("at last"))
    asking = asyncio.create_task(gateway.chat())
    async with asyncio.timeout(3):
        while not (shown := (await gateway.protection())["waiting"]):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    (waiting,) = shown
    assert waiting.keys() == {"request_id", "since_ms", "eta_ms"}
    assert 0 <= waiting["since_ms"] < 3_000
    assert 5_000 < waiting["eta_ms"] <= 8_000
    assert b"freeway_waiting 1" in (await gateway.get("/metrics")).body

    await gateway.recovered()

    got = await asking
    assert got.text == "at last"
    assert got.headers["X-Request-Id"] == waiting["request_id"]
    assert (await gateway.protection())["waiting"] == []
    metrics = (await gateway.get("/metrics")).body
    assert b"freeway_waiting 0" in metrics
    assert b'freeway_waits_total{result="served"} 1' in metrics


@both_ways
async def test_a_client_that_leaves_while_it_waits_is_gone_at_once(start_gateway, fake, streaming):
    gateway = await start_gateway(["a"], WAITS)
    fake.script("a", error(429, headers={"retry-after": "8"}))
    asking = asyncio.create_task(gateway.ask(streaming=streaming))
    async with asyncio.timeout(3):
        while not (await gateway.protection())["waiting"]:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    asking.cancel()

    async with in_time(0.5):
        while (await gateway.protection())["waiting"]:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert fake.called == ["a"]
    assert b'freeway_waits_total{result="left"} 1' in (await gateway.get("/metrics")).body


async def test_a_stream_that_waits_gets_heartbeats_and_then_its_answer(start_gateway, fake):
    gateway = await start_gateway(["a"], {**WAITS_LESS, "FIRST_HEARTBEAT_MS": "50", "KEEPALIVE_INTERVAL_MS": "50"})
    fake.script("a", error(429, headers={"retry-after": "0.4"}), answer("well again"))

    got = await gateway.stream()

    got.assert_whole("well again")
    assert len(got.comments) >= 3


async def test_what_fails_after_the_heartbeats_have_begun_is_told_in_the_stream(start_gateway, fake):
    gateway = await start_gateway(["a"], {**WAITS_LESS, "FIRST_HEARTBEAT_MS": "50", "KEEPALIVE_INTERVAL_MS": "50"})
    fake.script("a", error(429, headers={"retry-after": "0.2"}), error(429, headers={"retry-after": "60"}))

    got = await gateway.stream()

    assert got.status == 200
    assert got.error["type"] == "rate_limit_error"
    got.assert_done_once()


async def test_a_crowd_that_waits_for_a_sick_model_does_not_stampede_it(start_gateway, fake):
    """One trial at a time; its success lets all the others through."""
    gateway = await start_gateway(["a"], WAITS_LESS)
    trial = asyncio.Event()
    fake.script("a", error(503), raw(Wait(trial), *completion("well again").steps), answer("well again"))
    assert (await gateway.chat(headers={"X-Max-Wait": "0"})).status != 200
    crowd = [asyncio.create_task(gateway.chat(f"number {n}")) for n in range(30)]

    await fake.arrived(2)
    await asyncio.sleep(0.3)
    assert len(fake.requests) == 2
    shown = await gateway.protection()
    assert len(shown["waiting"]) == 29
    assert len(shown["trials"]) == 1
    trial.set()

    assert {got.text for got in await asyncio.gather(*crowd)} == {"well again"}
    assert len(fake.requests) == 31
    assert (await gateway.protection())["trials"] == []


async def test_a_long_answer_to_a_trial_keeps_nobody_waiting(start_gateway, fake):
    gateway = await start_gateway(["a"], WAITS_LESS)
    end = asyncio.Event()
    fake.script("a", error(503), sse(ROLE, chunk("long"), Wait(end), STOP), answer("next"))
    assert (await gateway.chat(headers={"X-Max-Wait": "0"})).status != 200
    first = asyncio.create_task(gateway.stream("first"))
    await fake.arrived(2)

    async with asyncio.timeout(3):
        assert (await gateway.chat("second")).text == "next"

    end.set()
    (await first).assert_whole("long")


async def test_a_crowd_that_waits_for_a_model_that_stays_sick_tries_it_once_a_second(start_gateway, fake):
    gateway = await start_gateway(["a"], {"WAIT_FOR_CAPACITY_MS": "2600"})
    fake.script("a", error(503))

    got = await asyncio.gather(*(gateway.chat(f"number {n}", headers={"X-Max-Wait": "2.6"}) for n in range(10)))

    assert all(answer.status in (502, 503) for answer in got)
    first_wave = [r for r in fake.requests if r.arrived_at < fake.requests[0].arrived_at + 0.5]
    later = [r.arrived_at for r in fake.requests[len(first_wave) :]]
    assert 1 <= len(later) <= 4
    assert all(b - a >= 0.9 for a, b in pairwise(later))


async def test_a_pinned_model_without_fallback_is_waited_for_too(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], WAITS_LESS)
    fake.script("a", error(429), answer("well again"))

    got = await gateway.chat(model="a-model", headers={"X-Fallback": "none"})

    assert got.text == "well again"
    assert fake.called == ["a", "a"]
