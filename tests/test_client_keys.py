"""SPEC 19 at the door: what a client's own key opens, how far its limits reach, and what stays apart."""

import asyncio
from dataclasses import dataclass

import pytest
from conftest import Client, assert_error, both_ways, case
from fake_provider import Wait, answer, error, raw, until

SMART = "auto-smart"
PAST = "2001-01-01T00:00:00Z"
OPERATORS = ["/api/keys", "/api/clients", "/api/requests", "/metrics", "//api/keys", "/api/protection/"]


@dataclass
class Holder(Client):
    """Who has a key of its own."""

    id: int = 0


async def holder(gateway, **given) -> Holder:
    """A client with a new key of its own."""
    status, made = await gateway.call("POST", "/api/clients", {"name": "c", **given})
    assert status == 201, made
    return Holder(gateway.base_url, gateway.http, made["key"], made["id"])


async def used(gateway, client: Holder) -> dict[str, int]:
    return next(c["used"] for c in await gateway.seen("/api/clients") if c["id"] == client.id)


@pytest.fixture
async def gateway(start_gateway):
    return await start_gateway(["a", "b", "c"])


# --- Who comes in ---------------------------------------------------------------------------------------------------


@both_ways
async def test_a_clients_key_opens_and_its_rows_name_it(gateway, streaming):
    client = await holder(gateway)

    got = await client.ask(streaming=streaming)

    assert got.text == "hello from a"
    assert [row["client"] for row in await gateway.rows_of(got, 1)] == [client.id]
    own = await gateway.ask(streaming=streaming)
    assert [row["client"] for row in await gateway.rows_of(own, 1)] == [None]


async def test_every_dialect_takes_a_clients_key(gateway):
    client = await holder(gateway)
    messages = [{"role": "user", "content": "hi"}]
    bodies = {
        "/v1/responses": {"model": "a-model", "input": "hi"},
        "/v1/messages": {"model": "a-model", "max_tokens": 9, "messages": messages},
        "/v1/completions": {"model": "a-model", "prompt": "hi"},
        "/v1/messages/count_tokens": {"model": "a-model", "messages": messages},
    }
    for path, body in bodies.items():
        with case(path):
            assert (await client.send(body, path=path)).status == 200
    assert (await client.get("/v1/models")).status == 200


async def test_a_key_that_is_off_expired_or_gone_opens_nothing(gateway, fake):
    off, expired, gone = [await holder(gateway) for _ in range(3)]
    await gateway.call("PATCH", f"/api/clients/{off.id}", {"enabled": False})
    await gateway.call("PATCH", f"/api/clients/{expired.id}", {"expires_at": PAST})
    await gateway.call("DELETE", f"/api/clients/{gone.id}")

    for client in (off, expired, gone):
        assert_error(await client.chat(), 401, "authentication_error", "invalid_api_key")

    await gateway.call("PATCH", f"/api/clients/{off.id}", {"enabled": True})
    assert (await off.chat()).text == "hello from a"
    assert fake.called == ["a"]


async def test_a_clients_key_opens_nothing_of_the_operators(gateway):
    client = await holder(gateway)
    for path in OPERATORS:
        with case(path):
            assert (await client.get(path)).status == 401
    assert (await client.call("POST", "/api/clients", {"name": "more"}))[0] == 401


async def test_a_clients_key_breaks_nothing_on_purpose(gateway, fake):
    client = await holder(gateway)

    got = await client.chat(headers={"x-drill": "429", "x-admin-key": client.api_key})

    assert got.status == 403
    assert fake.called == []


# --- What it may ask for --------------------------------------------------------------------------------------------


async def test_a_model_that_is_not_listed_is_refused_with_a_row(gateway, fake):
    client = await holder(gateway, models=["a-model", SMART])

    for model in ("b-model", "b/b-model", "auto", "auto-fast"):
        with case(model):
            got = await client.chat(model=model)
            assert_error(got, 403, "permission_error", "model_not_allowed")
            (row,) = await gateway.rows_of(got, 1)
            assert (row["client"], row["attempt"], row["http_status"]) == (client.id, 0, 403)

    assert fake.called == []
    assert (await client.chat(model="a/a-model")).text == "hello from a"
    assert (await used(gateway, client))["rpd"] == 1


@both_ways
async def test_only_listed_models_take_over(gateway, fake, streaming):
    client = await holder(gateway, models=["a-model", "c/c-model"])
    fake.script("a", *[error(500)] * 3)
    fake.script("c", *[error(500)] * 3)

    got = await client.ask(streaming=streaming, model="a-model")

    assert got.status >= 500 or b"error" in got.body
    assert set(fake.called) == {"a", "c"}
    told = await gateway.seen(f"/api/requests/{got.headers['X-Request-Id']}/explain")
    assert {c["platform"]: c["excluded"] for c in told["candidates"]}["b"] == "not allowed by the client's key"


async def test_a_listed_mode_may_choose_any_model(gateway, fake):
    client = await holder(gateway, models=[SMART])
    fake.script("a", error(500))
    fake.script("b", error(500))
    fake.script("c", error(500))

    await client.chat(model=SMART)

    assert set(fake.called) == {"a", "b", "c"}


EMBEDDERS = {
    "one by its id": (["a-e"], "a-e", 502, ["a"]),
    "two of a family": (["a-e", "c/c-e"], "a-e", 502, ["a", "c"]),
    "a family": (["f"], "f", 502, ["a", "b", "c"]),
    "one of a family that is asked for": (["b-e"], "f", 502, ["b"]),
    "one of a listed family": (["f"], "b-e", 502, ["a", "b", "c"]),
    "another family": (["f"], "d-e", 403, []),
    "what the gateway chooses": (["auto"], "auto", 502, ["a", "b", "c"]),
    "what the gateway would choose": (["a-e"], "auto", 403, []),
}


@pytest.mark.parametrize(("listed", "asked", "status", "called"), EMBEDDERS.values(), ids=EMBEDDERS)
async def test_embeddings_keep_to_the_list_too(start_gateway, fake, listed, asked, status, called):
    models = {n: {"model_id": f"{n}-e", "kind": "embedding", "family": "g" if n == "d" else "f"} for n in "abcd"}
    gateway = await start_gateway({n: {"model": model} for n, model in models.items()})
    client = await holder(gateway, models=listed)
    for name in models:
        fake.script(name, error(500))

    got = await client.send({"model": asked, "input": "hi"}, path="/v1/embeddings")

    assert got.status == status
    assert sorted(set(fake.called)) == called


async def test_the_stricter_of_two_floors_holds(gateway, fake):
    client = await holder(gateway, min_rank=2)
    for rank in (None, "3", "1"):
        with case(rank):
            headers = {} if rank is None else {"x-min-rank": rank}
            assert_error(await client.chat(model="c-model", headers=headers), 503, "routing_error", "below_floor")
    assert (await client.chat(model="b-model")).text == "hello from b"
    assert (await client.chat(model="b-model", headers={"x-min-rank": "1"})).status == 503
    assert (await gateway.chat(model="c-model")).text == "hello from c"


async def test_a_private_client_is_served_where_nobody_trains(start_gateway, fake):
    gateway = await start_gateway({"a": {"trains_on_prompts": True}, "b": {"trains_on_prompts": False}})
    client = await holder(gateway, privacy="no-train")

    assert (await client.chat()).text == "hello from b"
    assert (await gateway.chat()).text == "hello from a"


# --- How much -------------------------------------------------------------------------------------------------------


async def test_over_a_limit_nobody_is_asked(gateway, fake):
    client = await holder(gateway, limits={"rpm": 1})
    await client.chat()

    got = await client.chat()

    assert_error(got, 429, "rate_limit_error", "client_rate_limited")
    assert 1 <= int(got.headers["Retry-After"]) <= 60
    assert fake.called == ["a"]
    (row,) = await gateway.rows_of(got, 1)
    assert (row["client"], row["attempt"], row["http_status"], row["platform"]) == (client.id, 0, 429, None)
    assert (await gateway.chat()).status == 200


@pytest.mark.parametrize("limit", ["rpm", "rpd"])
async def test_a_limit_is_exact_under_parallel_requests_and_over_a_restart(start_gateway, fake, limit):
    gateway = await start_gateway(["a"])
    client = await holder(gateway, limits={limit: 7})

    got = await asyncio.gather(*(client.chat() for _ in range(50)))

    assert sorted(answer.status for answer in got) == [200] * 7 + [429] * 43
    assert len(fake.called) == 7
    await gateway.stop()
    again = await start_gateway(["a"])
    after = Client(again.base_url, again.http, client.api_key)
    assert_error(await after.chat(), 429, "rate_limit_error", "client_rate_limited")
    assert (await used(again, client))[limit] == 7
    assert len(fake.called) == 7


@both_ways
async def test_tokens_of_a_day_are_not_overshot_by_parallel_requests_either(start_gateway, fake, streaming):
    limit = 9_000  # each request is estimated at more than a thousand and uses some 20
    gateway = await start_gateway(["a"])
    client, go_on = await holder(gateway, limits={"tpd": limit}), asyncio.Event()
    fake.script("a", held_back(go_on))
    running = [asyncio.create_task(client.ask(streaming=streaming)) for _ in range(50)]
    await until(lambda: sum(task.done() for task in running) + len(fake.called) == 50)

    assert 0 < len(fake.called) < limit // 1_000  # the others were refused while these had their tokens reserved
    assert (await used(gateway, client))["tpd"] <= limit
    go_on.set()
    got = await asyncio.gather(*running)
    assert sorted(answer.status for answer in got) == [200] * len(fake.called) + [429] * (50 - len(fake.called))
    rows = [row for row in (await gateway.seen("/api/requests?limit=100"))["rows"] if row["status"] == "success"]
    spent = sum(row["input_tokens"] + row["output_tokens"] for row in rows)
    assert (await used(gateway, client))["tpd"] == spent
    await gateway.stop()
    again = await start_gateway(["a"])
    assert (await used(again, client)) == {"rpm": len(rows), "rpd": len(rows), "tpd": spent}


def held_back(go_on: asyncio.Event):
    """An answer that waits to be let go."""

    def reply(request):
        first, *rest = answer()(request).steps
        return raw(Wait(go_on), first, *rest)

    return reply


async def test_tokens_count_as_used_and_not_as_estimated(gateway):
    client = await holder(gateway, limits={"tpd": 5_000})
    for _ in range(5):  # each is estimated at more than a thousand
        got = await client.chat()
        assert got.status == 200
    rows = await gateway.rows(5, client=str(client.id))
    assert (await used(gateway, client))["tpd"] == sum(row["input_tokens"] + row["output_tokens"] for row in rows)


async def test_a_request_that_asked_nobody_is_given_back(start_gateway, fake):
    gateway = await start_gateway({"a": {"model": {"rpm": 1}}})
    await gateway.chat()
    client = await holder(gateway, limits={"rpm": 5})

    for _ in range(7):
        assert (await client.chat()).error["code"] == "rate_limited"

    assert await used(gateway, client) == {"rpm": 0, "rpd": 0, "tpd": 0}


async def test_a_request_is_one_however_many_attempts_it_takes(gateway, fake):
    client = await holder(gateway, limits={"rpm": 5})
    fake.script("a", error(500))

    assert (await client.chat()).text == "hello from b"

    assert (await used(gateway, client))["rpm"] == 1


# --- What stays apart -----------------------------------------------------------------------------------------------


async def test_the_same_words_of_two_clients_are_two_sessions(gateway):
    one, two = await holder(gateway), await holder(gateway)
    for headers in ({}, {"x-session-id": "s"}):
        for client in (one, two, gateway, one):
            await client.chat(model=SMART, headers=headers)

    assert (await gateway.protection())["sessions"]["count"] == 6


async def test_nobody_comes_by_anothers_responses(gateway, fake):
    one, two = await holder(gateway), await holder(gateway)
    item = {"type": "message", "role": "user", "content": "mine", "id": "msg_shared"}
    made = (await one.send({"model": "a-model", "input": [item]}, path="/v1/responses")).json
    path = f"/v1/responses/{made['id']}"

    for other in (two, gateway):
        assert (await other.get(path)).status == 404
        assert (await other.call("DELETE", path))[0] == 404
        got = await other.send(
            {"model": "a-model", "input": "go on", "previous_response_id": made["id"]}, path="/v1/responses"
        )
        assert_error(got, 400, "invalid_request_error", "previous_response_not_found")
        for id in ("msg_shared", made["output"][0]["id"]):
            reference = {"type": "item_reference", "id": id}
            got = await other.send({"model": "a-model", "input": [reference]}, path="/v1/responses")
            assert_error(got, 400, "invalid_request_error", "item_not_found")

    await two.send({"model": "a-model", "input": [item | {"content": "theirs"}]}, path="/v1/responses")
    reference = {"type": "item_reference", "id": "msg_shared"}
    await one.send({"model": "a-model", "input": [reference]}, path="/v1/responses")
    assert fake.requests[-1].prompt == "mine"
    assert (await one.get(path)).json["id"] == made["id"]
    assert (await one.call("DELETE", path))[0] == 200


async def test_nobody_gets_an_answer_from_anothers_memory(start_gateway, fake):
    gateway = await start_gateway(["a"], {"CACHE_MB": "1"})
    one, two = await holder(gateway), await holder(gateway)

    seen = [(await client.chat(temperature=0)).headers["X-Cache"] for client in (one, one, two, gateway, gateway)]

    assert seen == ["miss", "hit", "miss", "miss", "hit"]
    assert len(fake.called) == 3
    counted = await used(gateway, one)
    assert counted["rpd"] == 2  # as after a restart
