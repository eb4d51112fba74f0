"""The admin API: what it shows, what it refuses, and that a change holds from the next request on."""

import asyncio
import sqlite3
from itertools import product

import pytest
from conftest import IN_ORDER, case
from fake_provider import PAUSE, answer, body, chunk, error, sse

NEW_KEY = "sk-brand-new-key-0042"


async def add_key(gateway, platform: str = "a", key: str = NEW_KEY, **more):
    status, added = await gateway.call("POST", "/api/keys", {"platform": platform, "key": key, **more})
    assert status == 201, added
    return added


async def chain(gateway) -> dict[str, dict]:
    return {entry["model_id"]: entry for entry in await gateway.seen("/api/fallback")}


def order(entries) -> list[str]:
    """The test's own models in the order of the chain."""
    return [entry["model_id"] for entry in entries if entry["model_id"] in ("a-model", "b-model", "c-model")]


# --- What is shown --------------------------------------------------------------------------------------------------


async def test_status_counts_what_there_is(start_gateway):
    gateway = await start_gateway(["a", "b"])
    status = await gateway.seen("/api/status")
    assert status.keys() == {
        "version", "uptime_s", "platforms", "models", "keys", "routable_models", "log_queue", "log_dropped",
    }  # fmt: skip
    assert (status["keys"], status["routable_models"], status["log_dropped"]) == (2, 2, 0)


async def test_platforms_are_listed_with_their_level_in_force_and_their_keys(start_gateway):
    gateway = await start_gateway({"a": {"keys": ["sk-one-0000001", "sk-two-0000002"]}, "b": {"keys": []}},
                                  {"THREAD_PROTECTION_PLATFORMS": "b:off"})  # fmt: skip
    listed = {platform["id"]: platform for platform in await gateway.seen("/api/platforms")}
    assert listed["a"].keys() == {
        "id", "name", "adapter", "base_url", "keyless", "protection", "keys", "signup_url", "local",
        "trains_on_prompts", "terms_url", "terms_checked",
    }  # fmt: skip
    assert (listed["a"]["keys"], listed["a"]["protection"]) == (2, "model-skip")
    assert (listed["b"]["keys"], listed["b"]["protection"]) == (0, "off")


async def test_keys_are_shown_masked_and_never_whole(start_gateway):
    gateway = await start_gateway(["a"])
    added = await add_key(gateway, label="mine")
    listed = (await gateway.get("/api/keys")).json
    assert [key["label"] for key in listed] == ["a-0", "mine"]
    assert listed[1] == added
    assert added.keys() == {
        "id", "platform", "label", "masked", "status", "enabled", "last_error", "created_at", "trains_on_prompts",
    }  # fmt: skip
    assert added["masked"] == "sk-…0042"
    assert (added["status"], added["enabled"], added["last_error"]) == ("unknown", True, None)
    for path in ("/api/keys", "/api/platforms", "/api/status", "/api/protection", "/metrics", "/api/requests"):
        assert NEW_KEY.encode() not in (await gateway.get(path)).body


async def test_the_chain_shows_what_routing_knows_of_each_model(start_gateway, fake):
    gateway = await start_gateway({"a": {"keys": ["sk-one-0000001", "sk-two-0000002"]}, "b": {"keys": []}},
                                  {"STATS_REFRESH_MS": "20"})  # fmt: skip
    await gateway.chat()
    async with asyncio.timeout(3):
        while (first := (await chain(gateway))["a-model"])["total"] == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert first.keys() == {
        "model_db_id", "platform", "model_id", "display_name", "priority", "enabled", "pool", "intelligence_rank",
        "speed_rank", "score", "success_rate", "total", "tok_per_sec", "avg_ttfb_ms", "penalty", "usable_keys",
        "cooldown_ms",
    }  # fmt: skip
    assert (first["success_rate"], first["total"], first["usable_keys"], first["cooldown_ms"]) == (1.0, 1, 2, 0)
    assert first["tok_per_sec"] > 0
    second = (await chain(gateway))["b-model"]
    assert (second["success_rate"], second["total"], second["usable_keys"]) == (None, 0, 0)
    assert first["score"] > second["score"]


async def test_the_chain_shows_cooldowns_and_penalties(start_gateway, fake):
    gateway = await start_gateway(["a", "b", "c"])
    fake.script("a", error(503))
    fake.script("b", error(429, headers={"retry-after": "60"}))
    await gateway.chat()
    shown = await chain(gateway)
    assert 0 < shown["a-model"]["cooldown_ms"] <= 15_000
    assert shown["b-model"]["usable_keys"] == 0
    assert shown["b-model"]["penalty"] > 0
    assert shown["c-model"]["cooldown_ms"] == 0


async def test_protection_shows_sessions_by_model(start_gateway):
    gateway = await start_gateway(["a"])
    await gateway.chat("one", model="auto-smart")
    await gateway.chat("two", model="auto-smart")
    sessions = (await gateway.protection())["sessions"]
    assert sessions == {"count": 2, "by_model": [{"platform": "a", "model_id": "a-model", "count": 2}]}


async def test_protection_shows_every_restriction_and_what_runs(start_gateway, fake):
    first = {"model": {"prefer_in": ["smart"]}}
    gateway = await start_gateway({"a": {"protection": "provider-ban", **first}, "b": first, "c": {}})
    fake.script("a", error(503))
    fake.script("b", error(429))
    fake.script("c", sse(chunk("one"), PAUSE))
    async with gateway.post(gateway.request("hi", model="auto-smart", stream=True)) as running:
        await running.content.readany()
        shown = await gateway.protection()
    assert shown.keys() == {
        "levels", "default_level", "sessions", "bans", "gates", "waiting", "trials", "active", "rescues",
        "transient_cooldowns", "key_cooldowns",
    }  # fmt: skip
    assert (shown["default_level"], shown["levels"]["a"]) == ("model-skip", "provider-ban")
    ids = {entry["model_id"]: entry["model_db_id"] for entry in await gateway.seen("/api/fallback")}
    (_, key, _) = await gateway.seen("/api/keys")
    (ban,), (active,) = shown["bans"], shown["active"]
    (cooling,), (resting,) = shown["transient_cooldowns"], shown["key_cooldowns"]
    ((banned,), session) = ban.pop("platforms"), ban.pop("session")
    assert (ban, bool(session)) == ({}, True)
    assert (banned["platform"], banned["reason"]) == ("a", "provider-ban:5xx:before-stream")
    assert 0 < banned["ms_left"] <= 1_800_000
    assert active == {"platform": "c", "model_id": "c-model", "ms": active["ms"]}
    assert 0 < cooling.pop("ms_left") <= 15_000
    assert cooling == {"model_db_id": ids["a-model"], "platform": "a", "model_id": "a-model"}
    assert 0 < resting.pop("ms_left") <= 120_000
    assert resting == {"key_id": key["id"], "platform": "b", "model_id": "b-model"}


async def test_models_are_the_rows_of_their_table(start_gateway):
    gateway = await start_gateway({"a": {"model": {"rpm": 7, "vision": True}}})
    (shown,) = [model for model in await gateway.seen("/api/models") if model["platform"] == "a"]
    assert shown.keys() == {
        "id", "platform", "model_id", "display_name", "intelligence_rank", "speed_rank", "context_window", "rpm_limit",
        "rpd_limit", "tpm_limit", "tpd_limit", "supports_tools", "supports_vision", "enabled", "kind",
    }  # fmt: skip
    assert (shown["rpm_limit"], shown["rpd_limit"], shown["supports_vision"], shown["enabled"]) == (7, None, True, True)


async def test_bans_are_lifted_at_once(start_gateway, fake):
    gateway = await start_gateway({"a": {"protection": "provider-ban", "model": {"prefer_in": ["smart"]}}, "b": {}})
    fake.script("a", error(503), answer("a again"))
    assert (await gateway.chat("hi", model="auto-smart")).text == "hello from b"
    assert await gateway.call("DELETE", "/api/protection/bans") == (200, {"lifted": 1})
    assert (await gateway.protection())["bans"] == []
    assert await gateway.call("DELETE", "/api/protection/bans") == (200, {"lifted": 0})


async def test_what_was_noted_of_a_model_that_its_server_no_longer_lists_is_not_shown(start_gateway, fake):
    def lists(*names):
        listed = body({"data": [{"id": name} for name in names]})
        return lambda request: listed if request.method == "GET" else error(503)

    fake.script("mine", lists("m:1b"))  # before the start, which asks for the list too
    gateway = await start_gateway({"mine": {"keyless": True, "discover": True, "models": []}, "b": {}})
    await gateway.call("POST", "/api/models/discover", {})
    await gateway.chat(model="m:1b")
    assert [c["model_id"] for c in (await gateway.protection())["transient_cooldowns"]] == ["m:1b"]
    fake.script("mine", lists("m:2b"))
    await gateway.call("POST", "/api/models/discover", {})
    assert (await gateway.protection())["transient_cooldowns"] == []


async def test_clearing_the_cooldowns_makes_everything_routable_at_once(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", error(503), answer("a again"))
    fake.script("b", error(429), answer("b again"))
    assert (await gateway.chat()).status == 502
    assert await gateway.cooled_models() and await gateway.cooled_keys()
    assert await gateway.call("DELETE", "/api/protection/cooldowns") == (200, {"cleared": 2})
    assert not await gateway.cooled_models() and not await gateway.cooled_keys()
    assert (await gateway.chat()).text == "a again"


# --- Models and the chain -------------------------------------------------------------------------------------------


async def test_a_model_switched_off_is_gone_from_the_next_request_on(start_gateway):
    gateway = await start_gateway(["a", "b"])
    model = next(m for m in await gateway.seen("/api/models") if m["model_id"] == "a-model")
    status, changed = await gateway.call("PATCH", f"/api/models/{model['id']}", {"enabled": False})
    assert (status, changed) == (200, model | {"enabled": False})
    assert (await gateway.chat()).text == "hello from b"
    assert (await gateway.chat(model="a-model")).error["code"] == "model_not_found"
    assert "a-model" not in [m["id"] for m in (await gateway.seen("/v1/models"))["data"]]
    await gateway.call("PATCH", f"/api/models/{model['id']}", {"enabled": True})
    assert (await gateway.chat()).text == "hello from a"


@pytest.mark.parametrize("content", [{}, {"enabled": 0}, {"enabled": True, "platform": "b"}, [], b"\xff"])
async def test_a_bad_change_to_a_model_is_refused(start_gateway, content):
    gateway = await start_gateway(["a"])
    model = next(m for m in await gateway.seen("/api/models") if m["model_id"] == "a-model")
    status, answered = await gateway.call("PATCH", f"/api/models/{model['id']}", content)
    assert (status, answered["error"]["type"]) == (400, "invalid_request_error")


async def test_the_chain_can_be_put_into_another_order(start_gateway):
    gateway = await start_gateway(["a", "b", "c"])
    before = await gateway.seen("/api/fallback")
    assert order(before) == ["a-model", "b-model", "c-model"]
    last = next(entry for entry in before if entry["model_id"] == "c-model")
    reordered = [last, *(entry for entry in before if entry is not last)]
    wanted = [{"model_db_id": e["model_db_id"], "priority": n} for n, e in enumerate(reordered, 1)]
    status, after = await gateway.call("PUT", "/api/fallback", wanted)
    assert (status, order(after)) == (200, ["c-model", "a-model", "b-model"])
    assert [entry["priority"] for entry in after] == list(range(1, len(after) + 1))
    assert (await gateway.chat()).text == "hello from c"


async def test_a_model_taken_out_of_the_chain_still_serves_those_who_name_it(start_gateway):
    gateway = await start_gateway(["a", "b"])
    first = (await chain(gateway))["a-model"]
    status, after = await gateway.call(
        "PUT", "/api/fallback", [{"model_db_id": first["model_db_id"], "enabled": False}]
    )
    shown = {entry["model_id"]: entry for entry in after}["a-model"]
    assert (status, shown["enabled"], shown["priority"], shown["score"]) == (200, False, first["priority"], None)
    assert shown["pool"] in ("fast", "balanced", "smart")
    assert (await gateway.chat()).text == "hello from b"
    assert (await gateway.chat(model="a-model")).text == "hello from a"


async def test_a_priority_that_is_taken_moves_the_others_on(start_gateway):
    gateway = await start_gateway(["a", "b", "c"])
    shown = await chain(gateway)
    status, after = await gateway.call(
        "PUT", "/api/fallback", [{"model_db_id": shown["c-model"]["model_db_id"], "priority": 1}]
    )
    assert status == 200
    assert order(after) == ["c-model", "a-model", "b-model"]
    assert len({entry["priority"] for entry in after}) == len(after)
    assert (await gateway.chat()).text == "hello from c"


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        ({"model_db_id": 999_999, "enabled": False}, "[1].model_db_id"),
        ({"model_db_id": 2**70}, "[1].model_db_id"),
        ({"enabled": False}, "[1].model_db_id"),
        ({"model_db_id": "2"}, "[1].model_db_id"),
        ({"model_db_id": True}, "[1].model_db_id"),
        ({"model_db_id": ..., "priority": -1}, "[1].priority"),
        ({"model_db_id": ..., "priority": 1.5}, "[1].priority"),
        ({"model_db_id": ..., "priority": 10**10}, "[1].priority"),
        ({"model_db_id": ..., "enabled": "no"}, "[1].enabled"),
        ({"model_db_id": ..., "score": 1}, "[1].score"),
        ("b-model", "[1]"),
        ("the first again", "model_db_id"),
    ],
)
async def test_one_bad_entry_and_the_chain_stays_as_it_was(start_gateway, bad, param):
    gateway = await start_gateway(["a", "b"])
    before = await gateway.seen("/api/fallback")
    good = {"model_db_id": before[0]["model_db_id"], "enabled": False, "priority": 99}
    if isinstance(bad, dict):
        bad = {name: before[1]["model_db_id"] if value is ... else value for name, value in bad.items()}
    status, answered = await gateway.call("PUT", "/api/fallback", [good, good if bad == "the first again" else bad])
    assert (status, answered["error"]["type"], answered["error"]["param"]) == (400, "invalid_request_error", param)
    assert await gateway.seen("/api/fallback") == before


@pytest.mark.parametrize("content", [{}, {"model_db_id": 1}, "x", 5, None])
async def test_a_chain_that_is_no_list_is_refused(start_gateway, content):
    gateway = await start_gateway(["a"])
    status, answered = await gateway.call("PUT", "/api/fallback", content)
    assert (status, answered["error"]["type"]) == (400, "invalid_request_error")


async def test_an_empty_list_changes_nothing(start_gateway):
    gateway = await start_gateway(["a", "b"])
    before = await gateway.seen("/api/fallback")
    assert await gateway.call("PUT", "/api/fallback", []) == (200, before)


async def test_changes_survive_a_restart(start_gateway):
    gateway = await start_gateway(["a", "b"])
    shown = await chain(gateway)
    await gateway.call("PUT", "/api/fallback", [{"model_db_id": shown["b-model"]["model_db_id"], "priority": 0}])
    await add_key(gateway)
    await gateway.stop()
    gateway = await start_gateway(["a", "b"])
    assert (await gateway.chat()).text == "hello from b"
    assert len(await gateway.seen("/api/keys")) == 3


async def test_changes_in_the_midst_of_traffic_fail_no_request(start_gateway):
    gateway = await start_gateway(["a", "b", "c"])
    shown = await chain(gateway)
    ids = [shown[f"{name}-model"]["model_db_id"] for name in "abc"]

    async def meddle():
        for turn in range(10):
            await gateway.call("PUT", "/api/fallback", [{"model_db_id": ids[turn % 3], "priority": 0}])
            await gateway.call("PATCH", f"/api/models/{ids[turn % 2]}", {"enabled": bool(turn % 4 < 2)})
            added = await add_key(gateway, key=f"sk-passing-{turn:06}")
            await gateway.call("DELETE", f"/api/keys/{added['id']}")

    answers = await asyncio.gather(meddle(), *(gateway.ask(model=IN_ORDER, streaming=n % 2 == 0) for n in range(60)))
    assert {answered.status for answered in answers[1:]} == {200}


# --- What every route refuses ---------------------------------------------------------------------------------------


WITH_IDS = [
    ("PATCH", "/api/keys/{id}"),
    ("DELETE", "/api/keys/{id}"),
    ("POST", "/api/keys/{id}/check"),
    ("PATCH", "/api/models/{id}"),
]
NO_IDS = ["999999", "0", "-1", "x", "1.0", "9" * 30, "9" * 5000, "%00", "²"]


async def test_an_unknown_id_is_a_404(start_gateway):
    gateway = await start_gateway(["a"])
    for (method, path), id in product(WITH_IDS, NO_IDS):
        with case((method, path, id[:40])):
            content = {"enabled": True} if method == "PATCH" else None
            status, answered = await gateway.call(method, path.replace("{id}", id), content)
            assert (status, answered["error"]["code"]) == (404, "not_found")


WRONG_METHODS = [
    ("POST", "/api/status", {"GET", "HEAD"}),
    ("DELETE", "/api/keys", {"GET", "HEAD", "POST"}),
    ("GET", "/api/keys/1", {"PATCH", "DELETE"}),
    ("GET", "/api/keys/1/check", {"POST"}),
    ("POST", "/api/models/1", {"PATCH"}),
    ("POST", "/api/fallback", {"GET", "HEAD", "PUT"}),
    ("GET", "/api/protection/cooldowns", {"DELETE"}),
    ("POST", "/metrics", {"GET", "HEAD"}),
    ("POST", "/", {"GET", "HEAD"}),
]


async def test_a_method_that_is_not_there_is_a_405_that_says_which_are(start_gateway):
    gateway = await start_gateway(["a"])
    headers = {"authorization": f"Bearer {gateway.api_key}"}
    for method, path, allowed in WRONG_METHODS:
        with case((method, path)):
            async with gateway.http.request(method, gateway.base_url + path, headers=headers) as response:
                assert response.status == 405
                assert (await response.json())["error"]["code"] == "method_not_allowed"
                assert set(response.headers["allow"].split(", ")) == allowed


SENSELESS = [
    ("/api/requests?limit=0", "limit"),
    ("/api/requests?limit=-5", "limit"),
    ("/api/requests?limit=many", "limit"),
    ("/api/requests?before_id=" + "9" * 5000, "before_id"),
    ("/api/analytics?window=1h", "window"),
]


async def test_a_query_that_makes_no_sense_is_refused(start_gateway):
    gateway = await start_gateway(["a"])
    for path, param in SENSELESS:
        with case(path[:60]):
            refused = await gateway.get(path)
            assert (refused.status, refused.error["param"]) == (400, param)


async def test_a_locked_database_refuses_a_change_and_says_so(start_gateway):
    gateway = await start_gateway(["a"])
    lock = sqlite3.connect(gateway.db, isolation_level=None)
    lock.execute("BEGIN IMMEDIATE")
    status, answered = await gateway.call("POST", "/api/keys", {"platform": "a", "key": NEW_KEY})
    lock.execute("ROLLBACK")
    lock.close()
    assert (status, answered["error"]["code"]) == (503, "database_unavailable")
    assert len(await gateway.seen("/api/keys")) == 1
