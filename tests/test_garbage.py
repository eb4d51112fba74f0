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
from fake_provider import CUT, PAUSE, RESET, Wait, body, chunk, error, event, head, raw, sse, until

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
        gc.unfreeze()


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
