"""SPEC 21.3 and 21.4: a floor under the models that may answer, and prompts that nobody may train on."""

import contextlib
from math import ceil
from random import Random
from statistics import median

import pytest
from conftest import IN_ORDER, Answer, assert_error
from fake_provider import answer, error
from hypothesis import given, settings
from hypothesis import strategies as st
from random_worlds import NAMES, World, a_world

from routing.catalog import Model, Platform, keeps_prompts_private
from routing.fit import reaches_floor
from wire.chat import ModelKind
from wire.errors import GatewayError

SAFE = {"trains_on_prompts": False}
TRAINS = {"trains_on_prompts": True}
PRIVATE = {"X-Privacy": "no-train"}
SEEDS = st.integers(0, 2**32)


async def asked(gateway, headers: dict[str, str], **fields) -> Answer:
    return await gateway.chat(headers=headers, **fields)


# --- Over random catalogues, keys and states --------------------------------------------------------------------------


def requests_of(world: World, **wish: object):
    """Some requests with this wish, each with every route that it takes until it gives up."""
    for _ in range(4):
        need = world.need(**wish)
        with contextlib.suppress(GatewayError):
            plan = world.router.plan(need, world.standing(), world.now, world.rng)
            yield need, world.failing(plan, joined=True)


KINDS = (ModelKind.CHAT, ModelKind.CHAT, ModelKind.EMBEDDING)


@settings(max_examples=1000)
@given(SEEDS)
def test_no_train_never_reaches_a_route_that_is_not_known_to_be_safe(seed):
    world = a_world(seed, kind=KINDS[seed % len(KINDS)])
    safe = {p.id for p in world.catalog.platforms.values() if p.local or p.trains_on_prompts is False}

    for _, routes in requests_of(world, no_train=True):
        for route in routes:
            assert keeps_prompts_private(route.model.platform, route.key)
            assert route.model.platform.id in safe or route.key.trains_on_prompts is False


@settings(max_examples=300)
@given(SEEDS, st.integers(1, 25))
def test_no_model_below_the_floor_is_ever_asked(seed, floor):
    world = a_world(seed)

    for need, routes in requests_of(world, min_rank=floor, no_train=seed % 3 == 0):
        assert all(reaches_floor(need, route.model, world.catalog) for route in routes)


@settings(max_examples=300)
@given(SEEDS)
def test_without_a_wish_every_model_with_a_key_is_asked_before_a_request_gives_up(seed):
    """So that a world in which nothing is private tests something."""
    world = a_world(seed)
    with contextlib.suppress(GatewayError):
        plan = world.router.plan(world.need(pinned=None), world.standing(), world.now, Random(seed))
        routed = {route.model.id for route in world.failing(plan)}
        assert routed <= {model.id for model in plan.complete()}


def test_a_key_may_be_safe_where_its_platform_is_not_and_the_other_way_round():
    world = a_world(1)
    (key, *_) = [key for keys in world.catalog.keys.values() for key in keys]
    for trains, own, local, private in [
        (False, None, False, True), (True, None, False, False), (None, None, False, False), (True, False, False, True),
        (None, False, False, True), (False, True, False, False), (True, True, True, True), (None, None, True, True),
    ]:  # fmt: skip
        platform = Platform("p", "P", "openai", "http://127.0.0.1:1", trains_on_prompts=trains, local=local)
        assert keeps_prompts_private(platform, type(key)(1, "p", "s", trains_on_prompts=own)) is private


def test_some_worlds_have_routes_of_both_kinds():
    kinds = set()
    for seed in range(30):
        world = a_world(seed)
        for model in world.catalog.models:
            kinds |= {keeps_prompts_private(model.platform, key) for key in world.catalog.keys[model.platform.id]}
    assert kinds == {True, False}
    assert isinstance(world.catalog.models[0], Model) and world.catalog.models[0].model_id in NAMES


# --- Privacy over HTTP ------------------------------------------------------------------------------------------------


async def test_only_platforms_that_are_known_not_to_train_are_asked(start_gateway, fake):
    gateway = await start_gateway({"a": TRAINS, "b": {}, "c": SAFE, "d": {"local": True}})
    fake.script("c", error(500))

    private = await asked(gateway, PRIVATE)
    assert private.text == "hello from d"
    assert fake.called == ["c", "d"]
    assert (await gateway.chat()).text == "hello from a"


async def test_a_pinned_model_is_left_for_one_that_does_not_train(start_gateway, fake):
    gateway = await start_gateway({"a": TRAINS, "b": SAFE})

    assert (await asked(gateway, PRIVATE, model="a/a-model")).text == "hello from b"
    strict = await asked(gateway, {**PRIVATE, "X-Fallback": "none"}, model="a/a-model")
    assert_error(strict, 403, "routing_error", "no_private_route")
    assert fake.called == ["b"]


@pytest.mark.parametrize("model", [IN_ORDER, "auto", "auto-smart", "auto-fast", "a-model", "a/a-model"])
async def test_without_a_private_route_nobody_is_asked(start_gateway, fake, model):
    gateway = await start_gateway({"a": TRAINS, "b": {}})

    refused = await asked(gateway, PRIVATE, model=model)

    assert_error(refused, 403, "routing_error", "no_private_route")
    assert fake.called == []
    row = await gateway.row(request_id=refused.headers["X-Request-Id"])
    assert (row["status"], row["http_status"], row["platform"]) == ("error", 403, None)


async def test_only_the_keys_that_are_marked_are_used(start_gateway, fake):
    keys = ["sk-free", {"key": "sk-paid", **SAFE}]
    gateway = await start_gateway({"a": {**TRAINS, "keys": keys}, "b": {**SAFE, "keys": [{"key": "sk-b", **TRAINS}]}})
    fake.script("a", error(429), answer("paid"))

    assert (await asked(gateway, PRIVATE)).status == 429
    assert [request.key for request in fake.requests] == ["sk-paid"]


async def test_a_setting_makes_every_request_private(start_gateway, fake):
    gateway = await start_gateway({"a": TRAINS, "b": SAFE}, {"GATEWAY_PRIVACY": "no-train"})

    assert (await gateway.chat()).text == "hello from b"
    assert (await gateway.chat(model="a-model")).text == "hello from b"


@pytest.mark.parametrize("value", ["train", "", "no-train, train", "1", "off"])
async def test_another_value_of_the_privacy_header_is_refused(start_gateway, fake, value):
    gateway = await start_gateway({"b": SAFE})

    assert_error(await asked(gateway, {"X-Privacy": value}), 400, "invalid_request_error", "invalid_value")
    assert fake.called == []


async def test_the_demo_keeps_prompts_in_the_process(start_gateway):
    gateway = await start_gateway({})

    assert (await asked(gateway, PRIVATE)).status == 200


async def test_what_no_platform_can_do_at_all_is_not_a_question_of_privacy(start_gateway):
    gateway = await start_gateway({"a": SAFE | {"model": {"tools": False}}, "b": {}})
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]}]

    assert_error(await asked(gateway, PRIVATE, tools=tools), 403, "routing_error", "no_private_route")
    assert_error(await asked(gateway, PRIVATE, messages=image), 422, "invalid_request_error", "no_vision_model")


# --- The floor over HTTP ----------------------------------------------------------------------------------------------


async def test_models_below_the_floor_are_no_candidates(start_gateway, fake):
    gateway = await start_gateway({"best": {}, "good": {}, "worse": {"model": {"intelligence_rank": 9}}})
    fake.script("best", answer("hello from best"), error(400))

    assert (await asked(gateway, {"X-Min-Rank": "3"})).text == "hello from best"
    assert (await asked(gateway, {"X-Min-Rank": " 3 "})).text == "hello from good"
    fake.script("good", error(400))
    assert (await asked(gateway, {"X-Min-Rank": "8"})).status == 400
    assert (await asked(gateway, {"X-Min-Rank": "9"})).text == "hello from worse"


async def test_when_all_above_the_floor_have_failed_the_client_is_told_so(start_gateway, fake):
    gateway = await start_gateway({"a": {"model": {"intelligence_rank": 2}}, "b": {"model": {"intelligence_rank": 9}}})
    fake.script("a", error(500))

    refused = await asked(gateway, {"X-Min-Rank": "5"})

    assert_error(refused, 503, "routing_error", "below_floor")
    assert [attempt["platform"] for attempt in refused.error["attempts"]] == ["a"]
    assert fake.called == ["a"]


async def test_it_waits_for_a_model_above_the_floor(start_gateway, fake):
    settings = {"WAIT_FOR_CAPACITY_MS": "5000"}
    gateway = await start_gateway({"a": {"model": {"intelligence_rank": 2}}, "b": {}}, settings)
    fake.script("a", error(429, headers={"retry-after": "1"}), answer("waited for"))

    waited = await asked(gateway, {"X-Min-Rank": "1"})
    assert waited.status == 503  # nothing is ranked so well, so there is nothing to wait for
    waited = await asked(gateway, {"X-Min-Rank": "2", "X-Privacy": "no-train"})
    assert_error(waited, 403, "routing_error", "no_private_route")
    waited = await asked(gateway, {"X-Min-Rank": "2"})
    assert waited.status == 200


@pytest.mark.parametrize("model", [IN_ORDER, "auto", "auto-smart", "auto-fast", "b-model", "b/b-model"])
async def test_a_floor_that_nothing_reaches(start_gateway, fake, model):
    worse = {"model": {"intelligence_rank": 9}}
    gateway = await start_gateway({"a": worse, "b": worse})

    assert_error(await asked(gateway, {"X-Min-Rank": "8"}, model=model), 503, "routing_error", "below_floor")
    assert fake.called == []


async def test_a_pinned_model_below_the_floor_is_refused_though_others_reach_it(start_gateway, fake):
    gateway = await start_gateway({"a": {}, "b": {"model": {"intelligence_rank": 9}}})

    assert_error(await asked(gateway, {"X-Min-Rank": "5"}, model="b-model"), 503, "routing_error", "below_floor")
    fake.script("a", error(500))
    assert_error(await asked(gateway, {"X-Min-Rank": "5"}, model="a-model"), 503, "routing_error", "below_floor")
    assert set(fake.called) == {"a"}


async def test_an_unranked_model_counts_as_the_median(start_gateway, fake):
    gateway = await start_gateway({"a": {"model": {"intelligence_rank": None}}})
    ranks = [m["intelligence_rank"] for m in (await gateway.get("/api/models")).json if m["kind"] == "chat"]
    middle = median([rank for rank in ranks if rank is not None])

    assert_error(await asked(gateway, {"X-Min-Rank": str(ceil(middle) - 1)}), 503, "routing_error", "below_floor")
    assert (await asked(gateway, {"X-Min-Rank": str(ceil(middle))})).text == "hello from a"


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "one", "", "1e3", "9" * 30, "２"])
async def test_a_floor_that_is_no_whole_number_is_refused(start_gateway, fake, value):
    gateway = await start_gateway({"a": {}})

    refused = await asked(gateway, {"X-Min-Rank": value})

    assert_error(refused, 400, "invalid_request_error", "invalid_value")
    assert refused.error["param"] == "X-Min-Rank"
    assert fake.called == []
