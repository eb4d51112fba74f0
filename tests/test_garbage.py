"""What a request leaves behind: nothing that waits for Python's collector of cycles.

Whatever is part of a cycle stays until that collector runs, prompts of 100 KB and more among it, and walking it all
holds up every stream.
"""

import asyncio
import gc
from collections import Counter
from collections.abc import Iterator

import pytest
from conftest import ROOT
from continuing import (
    BREAKS,
    ON,
    PROSE,
    assert_one_answer,
    broken,
    has_preamble,
    later,
    on,
    refuses_prefill,
    repeats_anchor,
    served,
    starts_over_differently,
)
from fake_provider import CUT, PAUSE, RESET, Wait, answer, body, chunk, error, event, head, raw, sse, until

# Ours, by their dotted names.
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts[0] not in ("tests", "bench", ".venv")
}


@pytest.fixture
def garbage() -> Iterator[Counter]:
    """Filled at the end of the test: how many objects of our own types were parts of cycles."""
    found: Counter = Counter()
    gc.collect()
    gc.freeze()  # what is there already need not be walked through again
    gc.disable()
    try:
        yield found
    finally:
        gc.enable()


def collect(found: Counter) -> None:
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        found.update(type(item).__name__ for item in gc.garbage if type(item).__module__ in MODULES)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


async def at_rest(gateway) -> None:
    """Every request's task has ended."""
    await until(lambda: not gateway._server.server_state.tasks)
    await asyncio.sleep(0)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
async def test_an_answer_leaves_no_cycle(fake, start_gateway, garbage, streaming):
    gateway = await start_gateway(["a"])
    for _ in range(3):
        assert (await gateway.ask("hi", streaming=streaming)).status == 200
    await at_rest(gateway)
    collect(garbage)
    assert not garbage


async def test_a_long_stream_whose_client_is_watched_leaves_no_cycle(fake, start_gateway, garbage):
    later = asyncio.Event()
    fake.script("a", sse(chunk(role="assistant"), chunk("Hel"), Wait(later), chunk("lo"), chunk(finish="stop")))
    gateway = await start_gateway(["a"])
    asyncio.get_running_loop().call_later(0.05, later.set)
    assert (await gateway.stream("hi")).text == "Hello"
    await at_rest(gateway)
    collect(garbage)
    assert not garbage


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
async def test_failures_and_the_next_route_leave_no_cycle(fake, start_gateway, garbage, streaming):
    failures = {
        "error": error(500),
        "limit": error(429, headers={"retry-after": "1"}),
        "cut": raw(CUT),
        "reset": raw(RESET),
        "half": raw(head(200, {"Content-Length": "100", "Content-Type": "application/json"}), b"{", RESET),
        "odd": body("no JSON"),
        "silent": raw(PAUSE),
    }
    for name, reply in failures.items():
        fake.script(name, reply)
    limits = {"REQUEST_TIMEOUT_MS": "100", "FIRST_TOKEN_TIMEOUT_MS": "100", "MAX_FALLBACK_ATTEMPTS": "10"}
    gateway = await start_gateway([*failures, "good"], limits)
    got = await gateway.ask("hi", streaming=streaming)
    assert (got.status, got.headers["X-Fallback-Attempts"]) == (200, str(len(failures)))
    await at_rest(gateway)
    collect(garbage)
    assert not garbage


async def test_a_refusal_and_running_out_of_routes_leave_no_cycle(fake, start_gateway, garbage):
    fake.script("a", error(500))
    gateway = await start_gateway(["a"])
    assert (await gateway.chat("hi")).status == 502
    assert (await gateway.chat("hi", messages=[])).status == 400
    await at_rest(gateway)
    collect(garbage)
    assert not garbage


@pytest.mark.parametrize("ending", [CUT, RESET, event({"error": {"message": "overloaded"}}), PAUSE])
async def test_a_stream_that_breaks_leaves_no_cycle(fake, start_gateway, garbage, ending):
    fake.script("a", sse(chunk(role="assistant"), chunk("Hel"), ending))
    gateway = await start_gateway(["a"], {"MAX_STREAM_STALL_MS": "100"})
    assert (await gateway.stream("hi")).error
    await at_rest(gateway)
    collect(garbage)
    assert not garbage


async def test_a_client_that_leaves_leaves_no_cycle(fake, start_gateway, garbage):
    never = asyncio.Event()
    fake.script("a", sse(chunk(role="assistant"), chunk("Hel"), Wait(never)))
    gateway = await start_gateway(["a"])
    async with gateway.post(gateway.request("hi", stream=True)) as response:
        await response.content.readany()
    await fake.closed()
    await at_rest(gateway)
    collect(garbage)
    assert not garbage


@pytest.mark.parametrize("how", BREAKS)
async def test_an_answer_that_is_made_whole_leaves_no_cycle(fake, start_gateway, garbage, how):
    gateway = await start_gateway({"a": {}, "b": {"prefill": "plain"}, "c": {}}, on(how))
    fake.script("a", broken(how=how))
    fake.script("b", served(refuses_prefill(has_preamble(PROSE))))
    fake.script("c", served(repeats_anchor(PROSE)))
    assert_one_answer(await gateway.stream(), PROSE)
    assert fake.called == ["a", "b", "b", "c"]
    await at_rest(gateway)
    collect(garbage)
    assert not garbage


async def test_an_answer_that_nobody_could_make_whole_leaves_no_cycle(fake, start_gateway, garbage):
    gateway = await start_gateway(["a", "b"], ON)
    fake.script("a", broken())
    fake.script("b", served(starts_over_differently(PROSE)))
    assert (await gateway.stream()).error
    await at_rest(gateway)
    collect(garbage)
    assert not garbage


LATE = {"late_first_token_ms": (20, 20), "late_answer_ms": (20, 20)}
LOSERS = {"silent": raw(PAUSE), "an error": error(500), "cut": raw(CUT), "reset": raw(RESET), "odd": body("no JSON")}


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("loser", LOSERS.values(), ids=LOSERS)
async def test_a_race_leaves_no_cycle(fake, start_gateway, garbage, streaming, loser):
    gateway = await start_gateway(["a", "b", "c"], {"HEDGE_PERCENT": "100"}, **LATE)
    go_on = asyncio.Event()
    fake.script("a", later(answer("hello from a"), go_on))
    fake.script("b", loser)
    asyncio.get_running_loop().call_later(0.1, go_on.set)
    assert (await gateway.ask("hi", streaming=streaming)).text == "hello from a"
    assert fake.called == ["a", "b"]
    await at_rest(gateway)
    collect(garbage)
    assert not garbage


async def test_a_race_that_both_lose_and_one_that_the_client_leaves_leave_no_cycle(fake, start_gateway, garbage):
    gateway = await start_gateway(["a", "b", "c"], {"HEDGE_PERCENT": "100"}, **LATE)
    go_on = asyncio.Event()
    fake.script("a", later(lambda request: error(500), go_on), raw(PAUSE))
    fake.script("b", error(503), raw(PAUSE))
    asyncio.get_running_loop().call_later(0.1, go_on.set)
    assert (await gateway.stream()).text == "hello from c"
    await gateway.recovered()
    fake.clear()
    asking = asyncio.create_task(gateway.stream())
    await until(lambda: len(fake.requests) == 2)
    asking.cancel()
    await fake.closed(0)
    await fake.closed(1)
    await at_rest(gateway)
    collect(garbage)
    assert not garbage


async def test_a_request_that_waits_leaves_no_cycle(fake, start_gateway, garbage):
    gateway = await start_gateway(["a"], {"WAIT_FOR_CAPACITY_MS": "5000", "TRIAL_SPACING_MS": "100"})
    fake.script("a", error(429, headers={"retry-after": "0.1"}), answer("at last"))
    assert (await gateway.stream()).text == "at last"
    asking = asyncio.create_task(gateway.stream("I will not wait"))
    fake.script("a", error(429, headers={"retry-after": "3"}))
    await until(lambda: len(fake.requests) == 3)
    await asyncio.sleep(0)
    asking.cancel()
    await at_rest(gateway)
    collect(garbage)
    assert not garbage
