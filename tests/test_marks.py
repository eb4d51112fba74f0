"""SPEC 4.3, 4.4 and 4.9 end to end: what the catalogue marks, whatever its platforms and models are called."""

import asyncio
import time

import pytest
from conftest import behind
from fake_provider import answer, error

from records.rows import Row, insert_rows

MARKED = {"exclude_from": ["balanced"], "prefer_in": ["smart"]}
# The marks as they are built in, and the same ones under other names. The marked models are told in catalogue order,
# which is neither that of the ranks nor that of the chain.
OTHER = {
    "ordinary": {"model": {"intelligence_rank": 1, "speed_rank": 1}},
    "special": {"models": [{"model_id": "special-slow", "intelligence_rank": 90, "speed_rank": 90, **MARKED}]},
    "mixed": {
        "models": [
            {"model_id": "vendor/mixed-marked", "intelligence_rank": 2, "speed_rank": 2, **MARKED},
            {"model_id": "mixed-plain", "intelligence_rank": 3, "speed_rank": 3},
        ]
    },
}
BUILT_IN = {"groq": {"models": []}, "longcat": {"models": []}, "openrouter": {"models": []}}
CATALOGUES = {
    "built in": (BUILT_IN, ["longcat/LongCat-2.0", "openrouter/openrouter/owl-alpha"]),
    "other names": (OTHER, ["special/special-slow", "mixed/vendor/mixed-marked"]),
}
catalogues = pytest.mark.parametrize(("platforms", "marked"), CATALOGUES.values(), ids=CATALOGUES)
# Each request is a conversation of its own; here they do not keep out of each other's way.
NO_GUARDS = {"THREAD_PROTECTION_PLATFORMS": ",".join(f"{platform}:off" for platform in [*OTHER, *BUILT_IN])}


def remember(gateway, rows: dict[str, tuple[int, int]]) -> None:
    """Write successes and failures of models into the log of a gateway that has stopped."""

    def work(db):
        for label, (successes, failures) in rows.items():
            platform, _, model_id = label.partition("/")
            for n in range(successes + failures):
                row = Row("past", time.time() - n, platform=platform, model_id=model_id, attempt=1)
                if n < successes:
                    row.status, row.output_tokens, row.latency_ms, row.ttfb_ms = "success", 100, 1000, 50
                insert_rows(db, [row])

    behind(gateway.db, work)


async def route(gateway, model: str, n: int) -> str:
    """Where a new conversation's first request is answered."""
    got = await gateway.chat(f"conversation {n}", model=model)
    assert got.status == 200
    return got.headers["X-Routed-Via"]


async def chain(gateway) -> dict[str, dict]:
    """The fallback chain as the operator sees it, by label."""
    return {f"{e['platform']}/{e['model_id']}": e for e in (await gateway.get("/api/fallback")).json}


@catalogues
async def test_balanced_never_uses_what_is_marked_even_with_the_best_statistics(start_gateway, platforms, marked):
    gateway = await start_gateway(platforms)
    others = [label for label, entry in (await chain(gateway)).items() if entry["usable_keys"] and label not in marked]
    assert len(others) >= 2
    await gateway.stop()
    remember(gateway, dict.fromkeys(marked, (300, 0)) | dict.fromkeys(others, (0, 100)))
    gateway = await start_gateway(platforms)
    async with asyncio.timeout(3):
        while (await chain(gateway))[marked[0]]["total"] != 300:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    for model in ("auto", "auto-balanced"):
        assert marked[0] not in {await route(gateway, model, n) for n in range(10)}
        assert marked[1] not in {await route(gateway, model, n) for n in range(10)}


@catalogues
async def test_balanced_uses_what_is_marked_when_all_others_have_failed_and_not_before(
    start_gateway, fake, platforms, marked
):
    gateway = await start_gateway(platforms, {**NO_GUARDS, "MAX_FALLBACK_ATTEMPTS": "100"})
    for platform in platforms:
        fake.script(platform, error(404))

    assert (await gateway.chat(model="auto")).status == 502

    called = [f"{request.platform}/{request.json['model']}" for request in fake.requests]
    assert set(called[-2:]) == set(marked)
    assert set(called[:-2]).isdisjoint(marked)
    assert len(called) >= 4


@catalogues
async def test_smart_puts_what_is_marked_first_in_catalogue_order(start_gateway, fake, platforms, marked):
    gateway = await start_gateway(platforms, NO_GUARDS)
    assert {await route(gateway, "auto-smart", n) for n in range(5)} == {marked[0]}

    fake.script(marked[0].partition("/")[0], error(404))
    fake.clear()

    assert await route(gateway, "auto-smart", 9) == marked[1]
    assert [f"{r.platform}/{r.json['model']}" for r in fake.requests] == marked


@catalogues
async def test_smart_prefers_what_is_marked_exactly_while_it_has_a_usable_key(start_gateway, fake, platforms, marked):
    gateway = await start_gateway(platforms, NO_GUARDS)
    first, second = (label.partition("/")[0] for label in marked)
    fake.script(first, error(429, headers={"retry-after": "0.3"}), answer("fine"))
    assert await route(gateway, "auto-smart", 0) == marked[1]
    cooling_until = fake.requests[0].arrived_at + 0.3  # at the earliest

    async with asyncio.timeout(3):
        for n in range(1, 1_000):
            used = await route(gateway, "auto-smart", n)
            assert used in marked
            if used == marked[0]:
                break
            await asyncio.sleep(0.03)  # the second one has a limit of 20 a minute

    assert time.monotonic() >= cooling_until
    assert fake.called.count(first) == 2
    assert set(fake.called) == {first, second}
    fake.script(first, error(401))
    assert [await route(gateway, "auto-smart", n) for n in (2_000, 2_001)] == [marked[1]] * 2
    assert fake.called.count(first) == 3


@pytest.mark.parametrize("limit", ["rpm", "rpd"])
async def test_smart_prefers_what_is_marked_while_it_has_capacity(start_gateway, limit):
    platforms = {"ordinary": {}, "special": {"model": {**MARKED, limit: 2}}}
    gateway = await start_gateway(platforms, NO_GUARDS)

    used = [await route(gateway, "auto-smart", n) for n in range(4)]

    assert used == ["special/special-model"] * 2 + ["ordinary/ordinary-model"] * 2


async def test_what_is_marked_comes_last_again_when_it_is_out_of_capacity_and_all_others_fail(start_gateway, fake):
    gateway = await start_gateway({"ordinary": {}, "special": {"model": {**MARKED, "rpd": 1}}}, NO_GUARDS)
    await route(gateway, "auto-smart", 0)
    fake.script("ordinary", error(404))

    got = await gateway.chat("another", model="auto-smart")

    assert got.status == 502
    assert fake.called == ["special", "ordinary"]


@catalogues
async def test_what_is_marked_is_reached_by_name(start_gateway, platforms, marked):
    gateway = await start_gateway(platforms, NO_GUARDS)

    for n, label in enumerate(marked):
        assert await route(gateway, label, n) == label
        assert await route(gateway, label.partition("/")[2], n) == label


@catalogues
async def test_other_modes_may_use_what_is_marked(start_gateway, fake, platforms, marked):
    gateway = await start_gateway(platforms, {**NO_GUARDS, "MAX_FALLBACK_ATTEMPTS": "100"})
    for platform in platforms:
        fake.script(platform, error(404))

    for mode in ("fast", "priority"):
        fake.clear()
        await gateway.chat(f"in {mode}", model=f"auto-{mode}")
        called = {f"{r.platform}/{r.json['model']}" for r in fake.requests}
        assert set(marked) <= called


@catalogues
async def test_what_smart_prefers_is_shown_in_its_pool(start_gateway, platforms, marked):
    gateway = await start_gateway(platforms)

    shown = await chain(gateway)

    assert {shown[label]["pool"] for label in marked} == {"smart"}
