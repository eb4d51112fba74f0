"""SPEC 21.1: why a request went where it went, and where one would go now."""

import contextlib
import copy
from random import Random

import pytest
from conftest import IN_ORDER, assert_error, both_ways
from fake_provider import CUT, answer, chunk, completion, error, sse
from hypothesis import given, settings
from hypothesis import strategies as st
from random_worlds import World, a_world

from engine.explain import KEPT_MAX
from protection import Scope, Skip
from router import Router
from routing.explain import Candidate
from routing.plan import Plan
from routing.route import FIRST_TRIAL
from wire.chat import Need
from wire.errors import GatewayError

PARTS = {"success", "speed", "ttfb", "intelligence", "penalty"}
SEEDS = st.integers(0, 2**32)


async def explained(gateway, got) -> dict:
    return (await gateway.get(f"/api/requests/{got.headers['X-Request-Id']}/explain")).json


async def rehearsed(gateway, headers=None, **fields):
    return await gateway.send(gateway.request(**fields), path="/api/explain", headers=headers)


def of(told: dict, platform: str) -> dict:
    """The explanation's candidate on this platform, which has one model."""
    (found,) = [c for c in told["candidates"] if c["platform"] == platform]
    return found


def mine(told: dict) -> list[str]:
    """The candidates that would be asked, in order."""
    return [c["platform"] for c in told["candidates"] if c["excluded"] is None]


# --- Over random states -----------------------------------------------------------------------------------------------


def state_of(world: World) -> object:
    """All that traffic changes."""
    router, protection = world.router, world.protection
    return copy.deepcopy(
        (
            dict(router.gates._gates), router.gates._requests, protection.trials.snapshot(),
            [id(running) for running in protection.active], dict(protection.sessions._by_key), router._turn,
            protection.strikes,
            {id: (len(a.minute), a.day_requests) for id, a in router.ledger._accounts.items() if a.minute},
        )
    )  # fmt: skip


def first_of(candidates: list[Candidate]) -> int | None:
    return next((c.model.id for c in candidates if c.excluded is None), None)


def rehearsal(world: World, need, session: str, seed: int) -> tuple[Plan | None, list[Candidate]]:
    try:
        plan = world.router.rehearse(need, session, world.now, Random(seed))
    except GatewayError:
        return None, world.router.explain(Plan(need), world.now)
    return plan, world.router.explain(plan, world.now)


def real_plan(world: World, need, session: str, seed: int) -> Plan | None:
    """As the engine makes it."""
    world.protection.sessions.arrived(session, world.now)
    standing = world.protection.standing(session, world.now, auto=need.pinned is None)
    with contextlib.suppress(GatewayError):
        return world.router.plan(need, standing, world.now, Random(seed))
    return None


def with_a_past(world: World, session: str) -> None:
    """What the session may remember."""
    rng, sessions = world.rng, world.protection.sessions
    model = rng.choice(world.catalog.models)
    for _ in range(rng.randrange(3)):
        sessions.arrived(session, world.now)
    if rng.random() < 0.5:
        sessions.pin(session, model.id, 10, world.now)
    if rng.random() < 0.3:
        sessions.avoid_next(session, rng.choice(world.catalog.models).id, world.now)
    if rng.random() < 0.3:
        sessions.ban(session, model.platform.id, "why", world.now)


def with_others(world: World) -> None:
    """Conversations of others, which have used models lately and run now; requests after which trials are due; and
    limits of tokens, in part used up."""
    rng, protection = world.rng, world.protection
    for _ in range(rng.randrange(16)):
        world.router.gates.arrived()
    for other in ("x", "y"):
        for _ in range(rng.randrange(3)):
            protection.sessions.arrived(other, world.now - 20)
        model = rng.choice(world.catalog.models)
        protection.used(other, model.platform.id, model.id, world.now - rng.choice((1, 10, 300)))
        if rng.random() < 0.3:
            protection.begin(other, model.platform.id, model.id, world.now)
    for model in world.catalog.models:
        object.__setattr__(model, "tpm", rng.choice((None, None, 500, 20_000)))
        object.__setattr__(model, "tpd", rng.choice((None, None, 10_000)))
        for key in world.catalog.keys[model.platform.id]:
            if rng.random() < 0.2:
                world.router.ledger.reserve(model, key.id, rng.choice((400, 9_000)), world.now - 1)


def wishes(seed: int) -> dict:
    """What the headers and the client's key ask for."""
    allowed = frozenset({"small", "p0/large"}) if seed % 11 == 0 else None
    return {"no_train": seed % 5 == 0, "min_rank": 8 if seed % 7 == 0 else None, "allowed": allowed}


def a_busy_world(seed: int) -> tuple[World, str, Need]:
    """One with a past and with others at work, a session in it, and what a request of it needs."""
    world, session = a_world(seed), "s"
    with_a_past(world, session)
    with_others(world)
    return world, session, world.need(**wishes(seed))


@settings(max_examples=1000)
@given(SEEDS)
def test_a_rehearsal_agrees_with_the_route_then_taken_and_changes_nothing(seed):
    world, session, need = a_busy_world(seed)
    before = state_of(world)

    rehearsed_plan, candidates = rehearsal(world, need, session, seed)

    assert state_of(world) == before
    assert {c.model.id for c in candidates} == {m.id for m in world.catalog.models}
    assert len(candidates) == len(world.catalog.models)
    plan = real_plan(world, need, session, seed)
    assert (plan is None) == (rehearsed_plan is None)
    if plan is None:
        assert all(c.excluded and c.rung is None for c in candidates)
        return
    route = world.router.next_route(plan, world.now)
    assert first_of(candidates) == (route.model.id if route else None)
    if route is not None:
        assert next(c.rung for c in candidates if c.excluded is None) is route.rung


@settings(max_examples=300)
@given(SEEDS)
def test_a_rehearsals_order_is_the_order_in_which_routes_are_taken_when_each_fails(seed):
    """Without trials, whose turns come with time, and before breadth over platforms changes the order (SPEC 5.1)."""
    world, session, need = a_busy_world(seed)

    _, candidates = rehearsal(world, need, session, seed)

    plan, taken = real_plan(world, need, session, seed), []
    while plan is not None and len(taken) < 3 and (route := world.router.next_route(plan, world.now)) is not None:
        plan.note_failure(route, Skip(Scope.MODEL, again=False), world.now, None)
        taken.append((route.model.id, route.rung))
    free = [(c.model.id, c.rung) for c in candidates if c.excluded is None]
    sure = [entry for entry in free if entry[1] < FIRST_TRIAL][:3]
    assert taken[: len(sure)] == sure


@settings(max_examples=300)
@given(SEEDS)
def test_what_is_kept_of_a_request_says_what_a_look_at_that_moment_would_have_said(seed):
    """All but capacity, of which only what stood in a model's way when its turn came is known."""
    world = a_world(seed)
    for model in world.catalog.models:
        object.__setattr__(model, "rpm", None)
        object.__setattr__(model, "rpd", None)
    need = world.need()
    plan = real_plan(world, need, "", seed)
    if plan is None:
        return
    plan.complete()
    moment = world.router.moment(plan, world.now)
    then = world.router.explain(plan, world.now)
    world.failing(plan, attempts_max=5)

    plan.passed = {}
    now = Router.as_of(moment).explain(plan.as_of(moment), moment.at)

    assert now == then


@settings(max_examples=200)
@given(SEEDS)
def test_the_parts_of_a_score_add_up_to_it(seed):
    world = a_world(seed)
    for candidate in rehearsal(world, world.need(pinned=None), "", seed)[1]:
        assert (candidate.score is None) == (candidate.parts is None)
        if candidate.parts is not None:
            parts = [getattr(candidate.parts, name) for name in PARTS]
            assert sum(parts) == pytest.approx(candidate.score)
            assert 0 <= candidate.parts.success <= 1
            assert candidate.parts.penalty <= 0


# --- A request of the past --------------------------------------------------------------------------------------------


@both_ways
async def test_a_request_tells_why_it_went_where_it_went(start_gateway, fake, streaming):
    gateway = await start_gateway(["a", "b", "c"])
    fake.script("a", error(503, "down"))
    got = await gateway.ask(streaming=streaming)

    told = await explained(gateway, got)

    assert told["request_id"] == got.headers["X-Request-Id"]
    assert (told["mode"], told["requested_model"], told["model"]) == ("priority", IN_ORDER, IN_ORDER)
    assert (told["session"], told["waited_ms"], told["status"]) == (None, 0, "success")
    assert mine(told) == ["a", "b", "c"]
    assert [c["rung"] for c in told["candidates"][:3]] == [1, 1, 1]
    failed, served = told["attempts"]
    assert (failed["platform"], failed["model"], failed["status"], failed["kind"]) == (
        "a", "a-model", 503, "server_error",
    )  # fmt: skip
    assert "down" in failed["message"]
    assert (served["platform"], served["status"], served["kind"], served["rung"]) == ("b", 200, None, 1)
    assert failed["ms"] >= 0
    assert {"hedge", "resumed_at"} <= failed.keys()


async def test_a_sampled_request_shows_each_candidates_score_in_parts(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])

    told = await explained(gateway, await gateway.chat(model="auto"))

    for platform in "ab":
        candidate = of(told, platform)
        assert candidate["parts"].keys() == PARTS
        assert sum(candidate["parts"].values()) == pytest.approx(candidate["score"], abs=0.001)
    assert told["candidates"][0]["score"] >= told["candidates"][1]["score"]
    assert told["candidates"][0]["platform"] == fake.called[0]


async def test_what_rested_when_it_was_routed_is_told_though_it_no_longer_does(start_gateway, fake):
    gateway = await start_gateway({"a": {}, "b": {}, "c": {}, "d": {"keys": []}})
    fake.script("a", error(503), answer("again"))
    fake.script("b", error(429, headers={"retry-after": "60"}), answer("again"))
    await gateway.chat()
    later = await gateway.chat()
    await gateway.recovered()

    told = await explained(gateway, later)

    assert of(told, "a")["rung"] == 5
    assert "no key with capacity" in of(told, "b")["excluded"]
    assert of(told, "c") | {"score": None, "parts": None} == {
        "platform": "c", "model_id": "c-model", "rung": 1, "score": None, "parts": None, "excluded": None,
    }  # fmt: skip
    assert (of(told, "d")["rung"], of(told, "d")["excluded"]) == (None, "no key")
    assert mine(told)[0] == "c"


async def test_what_was_asked_and_failed_is_not_called_excluded(start_gateway, fake):
    """Nothing stood in its way when its turn came; how it failed is told by the attempts."""
    gateway = await start_gateway({"a": {"keys": ["k1", "k2"]}, "b": {}, "c": {}, "d": {}})
    fake.script("a", error(429), error(500))
    fake.script("b", error(429))
    fake.script("c", error(400))

    told = await explained(gateway, await gateway.chat())

    assert [attempt["platform"] for attempt in told["attempts"]] == ["a", "a", "b", "c", "d"]
    assert [(c["platform"], c["rung"]) for c in told["candidates"] if c["excluded"] is None] == [
        ("a", 1), ("b", 1), ("c", 1), ("d", 1),
    ]  # fmt: skip


async def test_a_refused_request_tells_what_stood_in_each_models_way(start_gateway, fake):
    gateway = await start_gateway({"a": {"trains_on_prompts": True}, "b": {"model": {"context_window": 20}}})
    got = await gateway.chat("x" * 400, headers={"X-Privacy": "no-train"})
    assert got.status == 403

    told = await explained(gateway, got)

    assert (told["status"], told["attempts"], mine(told), told["privacy"]) == ("error", [], [], "no-train")
    assert "training" in of(told, "a")["excluded"]


async def test_a_request_that_used_all_up_and_one_that_waited_say_so(start_gateway, fake):
    gateway = await start_gateway({"a": {"model": {"rpm": 1}}}, {"WAIT_FOR_CAPACITY_MS": "0"})
    await gateway.chat()
    told = await explained(gateway, await gateway.chat())

    assert "no key with capacity" in of(told, "a")["excluded"]
    assert told["attempts"] == []


async def test_a_broken_stream_and_a_pinned_model_are_told_too(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], {"RESCUE": "off"})
    fake.script("a", sse(chunk("begun"), CUT))

    told = await explained(gateway, await gateway.stream(model="a-model"))

    assert told["attempts"][0]["platform"] == "a"
    assert told["attempts"][0]["kind"] in ("connection", "truncated")
    assert told["candidates"][0]["platform"] == "a"
    assert told["mode"] == "balanced"


async def test_a_request_that_is_not_kept_is_a_404(start_gateway):
    gateway = await start_gateway(["a"])

    assert_error(await gateway.get("/api/requests/req_none/explain"), 404, "invalid_request_error", "not_found")


async def test_the_latest_thousand_are_kept(start_gateway, fake):
    gateway = await start_gateway(["a"])
    first = await gateway.chat()
    for _ in range(KEPT_MAX - 1):
        await gateway.chat()
    assert (await explained(gateway, first))["request_id"]
    last = await gateway.chat()

    path = f"/api/requests/{first.headers['X-Request-Id']}/explain"
    assert (await gateway.get(path)).status == 404
    assert (await explained(gateway, last))["request_id"]


async def test_no_prompt_and_no_key_is_in_an_explanation(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", error(401, "wrong key sk-a-secret-0001"))
    got = await gateway.chat("my secret prompt")

    told = await gateway.get(f"/api/requests/{got.headers['X-Request-Id']}/explain")

    assert b"secret prompt" not in told.body
    assert b"sk-a-secret" not in told.body


# --- A dry run --------------------------------------------------------------------------------------------------------


async def test_a_dry_run_asks_nobody_and_leaves_nothing_behind(start_gateway, fake):
    gateway = await start_gateway({"a": {"model": {"rpm": 1}}, "b": {}})

    for _ in range(3):
        told = await rehearsed(gateway, {"X-Session-Id": "s1"}, model="auto-smart")
        assert told.status == 200
        assert "request_id" not in told.json
        assert told.json["session"]

    assert fake.called == []
    assert (await gateway.get("/api/requests")).json["rows"] == []
    assert (await gateway.protection())["sessions"]["count"] == 0
    assert (await gateway.chat()).text == "hello from a"  # its only request of the minute is still there


async def test_a_dry_run_orders_models_as_a_request_would_ask_them(start_gateway, fake):
    gateway = await start_gateway(["a", "b", "c"])
    assert mine((await rehearsed(gateway)).json) == ["a", "b", "c"]
    fake.script("a", error(500), answer("again"))
    await gateway.chat()

    told = (await rehearsed(gateway)).json

    assert mine(told)[0] == "b"
    assert of(told, "a")["rung"] == 5


async def test_a_dry_run_knows_the_headers_and_the_reasons(start_gateway, fake):
    gateway = await start_gateway(
        {
            "a": {"trains_on_prompts": False},
            "b": {"trains_on_prompts": True},
            "c": {"trains_on_prompts": False, "model": {"intelligence_rank": 9}},
            "d": {"trains_on_prompts": False, "model": {"tools": False}},
            "e": {"trains_on_prompts": False, "keys": []},
            "f": {"local": True, "model": {"context_window": 10}},
        }
    )
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]

    told = (await rehearsed(gateway, {"X-Privacy": "no-train", "X-Min-Rank": "8"}, tools=tools)).json

    assert mine(told) == ["a"]
    words = {"b": "training", "c": "floor", "d": "tools", "e": "no key", "f": "too small"}
    for platform, word in words.items():
        assert word in of(told, platform)["excluded"]
        assert of(told, platform)["rung"] is None
    (demo,) = [c for c in told["candidates"] if c["model_id"] == "demo"]
    assert demo["excluded"]


async def test_a_dry_run_of_what_nothing_can_serve_says_so_and_why(start_gateway, fake):
    gateway = await start_gateway({"a": {}, "b": {}})
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}]

    told = (await rehearsed(gateway, messages=image)).json

    assert told["error"]["code"] == "no_vision_model"
    assert mine(told) == []
    assert of(told, "a")["excluded"] == "cannot see images"


async def test_a_dry_run_takes_what_a_request_takes(start_gateway):
    gateway = await start_gateway(["a"])

    assert_error(await rehearsed(gateway, model="nobody"), 400, "invalid_request_error", "model_not_found")
    assert (await rehearsed(gateway, messages=...)).status == 400
    assert (await gateway.send(b"{", path="/api/explain")).status == 400
    assert (await rehearsed(gateway, {"X-Min-Rank": "0"})).status == 400
    pinned = (await rehearsed(gateway, {"X-Fallback": "none"}, model="a-model")).json
    assert mine(pinned) == ["a"]


async def test_a_client_may_not_ask(start_gateway):
    gateway = await start_gateway(["a"], {"GATEWAY_ADMIN_KEY": "admin-0123456789abcdef"})
    got = await gateway.chat()

    assert (await rehearsed(gateway)).status == 401
    assert (await gateway.get(f"/api/requests/{got.headers['X-Request-Id']}/explain")).status == 401


async def test_a_model_that_is_switched_off_says_so(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", completion("x"))
    ids = {entry["platform"]: entry["model_db_id"] for entry in (await gateway.get("/api/fallback")).json}
    headers = {"authorization": f"Bearer {gateway.api_key}"}
    change = [{"model_db_id": ids["a"], "enabled": False}]
    async with gateway.http.put(f"{gateway.base_url}/api/fallback", json=change, headers=headers) as response:
        assert response.status == 200

    told = (await rehearsed(gateway)).json

    assert of(told, "a")["excluded"] == "switched off in the fallback chain"
    assert mine((await rehearsed(gateway, model="a-model")).json)[0] == "a"
