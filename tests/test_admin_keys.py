"""Providers' keys over the admin API: added, changed, checked, and shown to nobody."""

import asyncio
import json

import pytest
from conftest import case, default_key
from fake_provider import PAUSE, Wait, answer, body, completion, error, raw

from admin.rechecks import Rechecks
from protection import KeyStatus

NEW_KEY = "sk-brand-new-key-0042"


async def add_key(gateway, platform: str = "a", key: str = NEW_KEY, **more):
    status, added = await gateway.call("POST", "/api/keys", {"platform": platform, "key": key, **more})
    assert status == 201, added
    return added


# --- Keys -----------------------------------------------------------------------------------------------------------


async def test_a_key_added_serves_the_next_request_and_a_deleted_one_does_not(start_gateway, fake):
    gateway = await start_gateway({"a": {"keys": []}, "b": {}})
    assert (await gateway.chat()).text == "hello from b"
    added = await add_key(gateway)
    assert (await gateway.chat()).text == "hello from a"
    assert fake.requests[-1].key == NEW_KEY
    assert await gateway.call("DELETE", f"/api/keys/{added['id']}") == (200, {"id": added["id"], "deleted": True})
    assert (await gateway.chat()).text == "hello from b"
    assert [key["platform"] for key in await gateway.seen("/api/keys")] == ["b"]


async def test_a_key_switched_off_rests_until_it_is_switched_on(start_gateway):
    gateway = await start_gateway(["a", "b"])
    (key, _) = await gateway.seen("/api/keys")
    status, changed = await gateway.call("PATCH", f"/api/keys/{key['id']}", {"enabled": False, "label": "spare"})
    assert (status, changed["enabled"], changed["label"]) == (200, False, "spare")
    assert (await gateway.chat()).text == "hello from b"
    await gateway.call("PATCH", f"/api/keys/{key['id']}", {"enabled": True})
    assert (await gateway.chat()).text == "hello from a"


async def test_an_invalid_key_is_tried_again_when_its_status_is_made_unknown(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", error(401, "no such key"), answer("well again"))
    assert (await gateway.chat()).text == "hello from b"
    async with asyncio.timeout(3):
        while not (key := (await gateway.seen("/api/keys"))[0])["last_error"]:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    assert (key["status"], key["last_error"]) == ("invalid", "no such key")
    assert (await gateway.chat()).text == "hello from b"
    status, key = await gateway.call("PATCH", f"/api/keys/{key['id']}", {"status": "unknown"})
    assert (status, key["status"], key["last_error"]) == (200, "unknown", None)
    assert (await gateway.chat()).text == "well again"


async def test_a_key_given_twice_is_one_row_that_is_switched_on_again(start_gateway):
    gateway = await start_gateway({"a": {"keys": []}, "b": {}})
    added = await add_key(gateway, label="first")
    await gateway.call("PATCH", f"/api/keys/{added['id']}", {"enabled": False})
    status, again = await gateway.call("POST", "/api/keys", {"platform": "a", "key": f"Bearer {NEW_KEY}"})
    assert (status, again) == (200, added)
    assert len(await gateway.seen("/api/keys")) == 2
    assert (await gateway.chat()).text == "hello from a"


async def test_a_new_key_inherits_nothing_from_a_deleted_one(start_gateway, fake):
    gateway = await start_gateway({"b": {}, "a": {"keys": [], "model": {"rpm": 1}}})
    fake.script("b", error(400))
    fake.script("a", error(429, headers={"retry-after": "600"}), answer("fresh"))
    old = await add_key(gateway)
    assert (await gateway.chat()).status != 200
    assert [c["key_id"] for c in (await gateway.protection())["key_cooldowns"]] == [old["id"]]
    await gateway.call("DELETE", f"/api/keys/{old['id']}")
    assert (await gateway.protection())["key_cooldowns"] == []
    new = await add_key(gateway, key="sk-another-key-0043")
    assert new["id"] != old["id"]
    assert (await gateway.chat()).text == "fresh"


async def test_a_request_that_runs_on_a_deleted_key_ends_well(start_gateway, fake):
    gateway = await start_gateway({"a": {"keys": []}, "b": {}})
    added = await add_key(gateway)
    go = asyncio.Event()
    fake.script("a", raw(Wait(go), *completion("late").steps))
    asking = asyncio.create_task(gateway.chat())
    await fake.arrived()
    await gateway.call("DELETE", f"/api/keys/{added['id']}")
    go.set()
    assert (await asking).text == "late"
    assert (await gateway.chat()).text == "hello from b"


async def test_keys_that_are_all_invalid_are_no_reason_for_the_demo_but_keys_switched_off_are(start_gateway, fake):
    gateway = await start_gateway({"a": {"keys": []}})
    fake.script("a", error(401), answer("well again"))
    added = await add_key(gateway)
    await gateway.chat(model="auto")
    assert (await gateway.chat(model="auto")).error["code"] == "no_providers"
    await gateway.call("PATCH", f"/api/keys/{added['id']}", {"enabled": False})
    assert (await gateway.chat(model="auto")).headers["x-routed-via"] == "demo/demo"
    await gateway.call("PATCH", f"/api/keys/{added['id']}", {"enabled": True})
    assert (await gateway.chat(model="auto")).error["code"] == "no_providers"
    await gateway.call("PATCH", f"/api/keys/{added['id']}", {"status": "unknown"})
    assert (await gateway.chat(model="auto")).text == "well again"


async def test_the_first_key_ends_the_demo_and_the_last_one_gone_brings_it_back(start_gateway):
    gateway = await start_gateway({"a": {"keys": []}})
    assert (await gateway.chat(model="auto")).headers["x-routed-via"] == "demo/demo"
    added = await add_key(gateway)
    assert (await gateway.chat(model="auto")).text == "hello from a"
    await gateway.call("DELETE", f"/api/keys/{added['id']}")
    assert (await gateway.chat(model="auto")).headers["x-routed-via"] == "demo/demo"


WRONG_KEYS = [
    ({"platform": "a"}, "key", "missing_field"),
    ({"key": NEW_KEY}, "platform", "missing_field"),
    ({"platform": "nowhere", "key": NEW_KEY}, "platform", "unknown_platform"),
    ({"platform": "a", "key": "sk-two\nlines"}, "key", "invalid_key"),
    ({"platform": "a", "key": "sk-line-end\n"}, "key", "invalid_key"),
    ({"platform": "a", "key": "sk with blanks"}, "key", "invalid_key"),
    ({"platform": "a", "key": " sk-blank-before"}, "key", "invalid_key"),
    ({"platform": "a", "key": "sk-blank-behind "}, "key", "invalid_key"),
    ({"platform": "a", "key": "   "}, "key", "invalid_key"),
    ({"platform": "a", "key": ""}, "key", "invalid_key"),
    ({"platform": "a", "key": "sk-ümläut"}, "key", "invalid_key"),
    ({"platform": "a", "key": "x" * 5000}, "key", "invalid_key"),
    ({"platform": "a", "key": 5}, "key", "invalid_type"),
    ({"platform": "a", "key": None}, "key", "invalid_type"),
    ({"platform": ["a"], "key": NEW_KEY}, "platform", "invalid_type"),
    ({"platform": "a", "key": NEW_KEY, "label": 1}, "label", "invalid_type"),
    ({"platform": "a", "key": NEW_KEY, "label": "x" * 101}, "label", "invalid_value"),
    ({"platform": "a", "key": NEW_KEY, "label": "env:FAKE"}, "label", None),
    ({"platform": "a", "key": NEW_KEY, "colour": "red"}, "colour", "unknown_field"),
    ([{"platform": "a", "key": NEW_KEY}], None, "invalid_type"),
    (b"{not json", None, "invalid_json"),
    (b"", None, "invalid_json"),
    (b'{"platform": "a", "key": NaN}', None, "invalid_json"),
]


async def test_a_key_that_cannot_be_right_is_refused_and_never_quoted(start_gateway):
    gateway = await start_gateway(["a"])
    for content, param, code in WRONG_KEYS:
        with case(content):
            status, answered = await gateway.call("POST", "/api/keys", content)
            found = answered["error"]
            assert (status, found["type"], found["param"], found["code"]) == (400, "invalid_request_error", param, code)
            if isinstance(content, dict) and isinstance(content.get("key"), str) and len(content["key"].strip()) > 3:
                assert content["key"].strip() not in json.dumps(answered, ensure_ascii=False)
            assert len(await gateway.seen("/api/keys")) == 1


BAD_CHANGES = [
    ({"enabled": 1}, "enabled"),
    ({"enabled": "yes"}, "enabled"),
    ({"enabled": None}, "enabled"),
    ({"status": "healthy"}, "status"),
    ({"status": True}, "status"),
    ({"label": []}, "label"),
    ({"key": "sk-other-key-0001"}, "key"),
    ("enabled", None),
]


async def test_a_bad_change_to_a_key_changes_nothing(start_gateway):
    gateway = await start_gateway(["a"])
    before = await gateway.seen("/api/keys")
    for content, param in BAD_CHANGES:
        with case(content):
            status, answered = await gateway.call("PATCH", f"/api/keys/{before[0]['id']}", content)
            error = answered["error"]
            assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)
            assert await gateway.seen("/api/keys") == before


async def test_a_body_beyond_all_reason_is_refused(start_gateway):
    gateway = await start_gateway(["a"])
    status, answered = await gateway.call("POST", "/api/keys", b" " * 1_100_000)
    assert (status, answered["error"]["code"]) == (413, "request_too_large")


# --- Checking a key -------------------------------------------------------------------------------------------------

MODELS = body({"object": "list", "data": [{"id": "a-model"}]})


@pytest.mark.parametrize(
    ("reply", "status", "last_error"),
    [
        (MODELS, "healthy", None),
        (body([{"id": "a-model"}]), "healthy", None),
        (error(401, "no such key"), "invalid", "no such key"),
        (error(429, "slow down"), "rate_limited", "slow down"),
        (error(503, "we are sorry"), "unknown", "we are sorry"),
        (body({"error": {"message": "wrapped", "code": 401}}), "invalid", "wrapped"),
        (body("<html>"), "unknown", "The provider's answer is not JSON."),
        (body("", status=302, headers={"location": "http://127.0.0.1:1/"}), "unknown", ...),
        (error(401, f"key {default_key('a')} is wrong"), "invalid", ...),
    ],
)
async def test_a_check_asks_for_models_only_and_notes_what_it_learns(start_gateway, fake, reply, status, last_error):
    gateway = await start_gateway(["a"])
    fake.script("a", reply)
    (before,) = await gateway.seen("/api/keys")
    code, checked = await gateway.call("POST", f"/api/keys/{before['id']}/check")
    assert (code, checked["status"]) == (200, status)
    assert last_error is ... or checked["last_error"] == last_error
    assert default_key("a") not in json.dumps(checked)
    (asked,) = fake.requests
    assert (asked.method, asked.path, asked.key) == ("GET", "/a/v1/models", default_key("a"))
    assert await gateway.seen("/api/keys") == [checked]
    assert (await gateway.seen("/api/requests"))["rows"] == []


async def test_a_check_of_a_key_ends_in_time(start_gateway, fake):
    gateway = await start_gateway(["a"], {"REQUEST_TIMEOUT_MS": "50"})
    fake.script("a", raw(PAUSE))
    (key,) = await gateway.seen("/api/keys")
    _, checked = await gateway.call("POST", f"/api/keys/{key['id']}/check")
    assert (checked["status"], checked["last_error"]) == ("unknown", "The provider did not answer in time.")


async def test_a_list_of_models_that_everyone_gets_proves_no_key(start_gateway, fake):
    gateway = await start_gateway({"a": {"check_path": ""}, "b": {"check_path": "/../key"}})
    fake.script("a", MODELS, error(401, "not even a list"))
    fake.script("b", MODELS)
    first, second = await gateway.seen("/api/keys")
    _, checked = await gateway.call("POST", f"/api/keys/{first['id']}/check")
    assert (checked["status"], checked["last_error"]) == ("unknown", None)
    _, checked = await gateway.call("POST", f"/api/keys/{first['id']}/check")
    assert checked["status"] == "invalid"
    _, checked = await gateway.call("POST", f"/api/keys/{second['id']}/check")
    assert (checked["status"], fake.requests[-1].path) == ("healthy", "/b/key")


async def test_a_check_that_succeeds_brings_an_invalid_key_back(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", error(401), MODELS, answer("back"))
    await gateway.chat()
    key, _ = await gateway.seen("/api/keys")
    assert (await gateway.call("POST", f"/api/keys/{key['id']}/check"))[1]["status"] == "healthy"
    assert (await gateway.chat()).text == "back"


async def test_whether_a_keys_prompts_train_can_be_said_and_unsaid(start_gateway):
    gateway = await start_gateway(["a"])
    added = await add_key(gateway, trains_on_prompts=False)
    assert added["trains_on_prompts"] is False
    for value in (True, None, False):
        status, changed = await gateway.call("PATCH", f"/api/keys/{added['id']}", {"trains_on_prompts": value})
        assert (status, changed["trains_on_prompts"]) == (200, value)
    status, same = await gateway.call("PATCH", f"/api/keys/{added['id']}", {"label": "paid"})
    assert (same["trains_on_prompts"], same["label"]) == (False, "paid")
    status, refused = await gateway.call("PATCH", f"/api/keys/{added['id']}", {"trains_on_prompts": "no"})
    assert (status, refused["error"]["param"]) == (400, "trains_on_prompts")


# --- Invalid keys heal by themselves (SPEC 2.3) ---------------------------------------------------------------------

QUICKLY = {"KEY_RECHECK_MS": "20"}


async def status_becomes(gateway, wanted: str, platform: str = "a") -> dict:
    async with asyncio.timeout(3):
        while True:
            (key,) = [key for key in await gateway.seen("/api/keys") if key["platform"] == platform]
            if key["status"] == wanted:
                return key
            await asyncio.sleep(0.005)


async def test_an_invalid_key_is_checked_again_by_itself_where_its_platform_has_a_free_check(start_gateway, fake):
    gateway = await start_gateway({"a": {"check_path": "/key"}, "b": {}}, QUICKLY)
    fake.script("a", error(401, "a hiccup"), error(401, "still"), error(503), body({"data": {}}), answer("well again"))
    assert (await gateway.chat()).text == "hello from b"
    await status_becomes(gateway, "healthy")
    assert (await gateway.chat()).text == "well again"
    asked = [(request.method, request.path) for request in fake.requests if request.platform == "a"]
    assert asked == [
        ("POST", "/a/v1/chat/completions"),
        *[("GET", "/a/v1/key")] * 3,
        ("POST", "/a/v1/chat/completions"),
    ]


@pytest.mark.parametrize("platform", [{}, {"check_path": ""}, {"check_path": None}])
async def test_without_a_free_check_an_invalid_key_is_tried_again_by_the_next_request(start_gateway, fake, platform):
    gateway = await start_gateway({"a": platform, "b": {}}, QUICKLY)
    fake.script("a", error(401, "a hiccup"), answer("well again"))
    assert (await gateway.chat()).text == "hello from b"
    key = await status_becomes(gateway, "unknown")
    assert (key["last_error"], fake.called) == ("a hiccup", ["a", "b"])
    assert (await gateway.chat()).text == "well again"
    await status_becomes(gateway, "healthy")


async def test_a_key_that_was_invalid_at_the_start_heals_too_and_others_keep_their_status(start_gateway, fake):
    platforms = {"a": {"check_path": "/key"}, "b": {}, "c": {}}
    fake.script("a", error(401, "no such key"))
    fake.script("b", error(429))
    gateway = await start_gateway(platforms)
    assert (await gateway.chat()).text == "hello from c"
    await gateway.stop()
    again = await start_gateway(platforms)
    statuses = {key["platform"]: key["status"] for key in await again.seen("/api/keys")}
    assert statuses == {"a": "invalid", "b": "rate_limited", "c": "healthy"}
    await again.stop()
    fake.script("a", body({"data": {}}))
    healing = await start_gateway(platforms, QUICKLY)
    await status_becomes(healing, "healthy")
    assert (await status_becomes(healing, "rate_limited", "b"))["status"] == "rate_limited"


# (what happens at which second) → when the key is due, within two hours
DUE = {
    "once found": ("0 invalid", [60, 180, 420, 900, 1860, 3780]),
    "healed after the second check": ("0 invalid, 200 healthy", [60, 180]),
    "tried again without a check": ("0 invalid, 61 unknown, 70 invalid", [60, 190, 430, 910, 1870, 3790]),
    "invalid anew after it had worked": ("0 invalid, 61 healthy, 100 invalid", [60, 160, 280, 520, 1000, 1960, 3880]),
    "deleted": ("0 invalid, 61 gone", [60]),
    "never": ("0 healthy, 10 rate_limited, 20 unknown", []),
}


@pytest.mark.parametrize(("events", "due"), DUE.values(), ids=DUE)
def test_the_pause_before_the_next_check_doubles_up_to_an_hour(events, due):
    happens = {int(at): status for at, status in (event.split() for event in events.split(", "))}
    rechecks, statuses, found = Rechecks(60), {}, []
    for now in range(2 * 3600 + 1):
        if (status := happens.get(now)) == "gone":
            statuses.pop(1)
        elif status:
            statuses[1] = KeyStatus(status)
        found += [now for _ in rechecks.due(statuses, now)]

    assert found == due


# --- Keys of two parts (SPEC 2.5) -----------------------------------------------------------------------------------

TOKEN = "token-without-account-0042"
WRITTEN = "This key is not written as it has to be: account_id:token."


def templated(fake, **more) -> dict:
    base_url = fake.url("a").replace("/v1", "/accounts/{account_id}/v1")
    return {"a": {"base_url": base_url, "key_format": "account_id:token", "keys": [], **more}, "b": {}}


HALF_KEYS = [TOKEN, f":{TOKEN}", f"{TOKEN}:", f"../{TOKEN}:{TOKEN}", f"a/b:{TOKEN}", f"a?b:{TOKEN}"]


async def assert_never_sent(gateway, fake) -> None:
    """Neither a request nor a check nor a discovery says a part of it to anybody."""
    (key,) = [key for key in await gateway.seen("/api/keys") if key["platform"] == "a"]
    assert (key["status"], key["last_error"]) == ("invalid", WRITTEN)
    assert (await gateway.chat(model="a-model")).text == "hello from b"
    for path in (f"/api/keys/{key['id']}/check", "/api/models/discover"):
        assert (await gateway.call("POST", path, {}))[0] == 200
    for change in ({"status": "unknown"}, {"enabled": True}):
        status, changed = await gateway.call("PATCH", f"/api/keys/{key['id']}", change)
        assert (status, changed["status"], changed["last_error"]) == (200, "invalid", WRITTEN)
    assert (await gateway.chat()).text == "hello from b"
    await asyncio.sleep(0.1)  # twenty rechecks
    assert set(fake.called) == {"b"}
    assert not any(TOKEN in str((request.path, request.headers, request.raw)) for request in fake.requests)


@pytest.mark.parametrize("secret", HALF_KEYS)
async def test_a_key_without_its_account_is_invalid_and_never_sent_when_it_comes_over_the_api(
    start_gateway, fake, secret
):
    gateway = await start_gateway(templated(fake, discover=True, check_path="/key"), {"KEY_RECHECK_MS": "5"})
    added = await add_key(gateway, key=secret)
    assert (added["status"], added["last_error"]) == ("invalid", WRITTEN)
    await assert_never_sent(gateway, fake)
    status, again = await gateway.call("POST", "/api/keys", {"platform": "a", "key": secret})
    assert (status, again["status"], again["last_error"]) == (200, "invalid", WRITTEN)


@pytest.mark.parametrize("way", ["file", "environment"])
async def test_a_key_without_its_account_is_invalid_and_never_sent_when_it_comes_at_the_start(start_gateway, fake, way):
    more = {"keys": [TOKEN]} if way == "file" else {"env": ["A_KEY"]}
    gateway = await start_gateway(templated(fake, **more), {"A_KEY": TOKEN, "KEY_RECHECK_MS": "5"})
    await assert_never_sent(gateway, fake)


async def test_a_key_with_its_account_serves_and_an_account_from_the_environment_completes_one(start_gateway, fake):
    platforms = templated(fake, keys=["acc-1:token-0001"], env=["A_KEY"], quirks={"env_account": ["A_ACCOUNT"]})
    gateway = await start_gateway(platforms, {"A_KEY": TOKEN, "A_ACCOUNT": "acc_2"})
    for _ in range(2):
        assert (await gateway.chat()).text == "hello from a"
    sent = {(request.path.split("/")[3], request.key) for request in fake.requests}
    assert sent == {("acc-1", "token-0001"), ("acc_2", TOKEN)}


async def test_a_key_that_has_become_right_because_the_address_changed_is_tried(start_gateway, fake):
    gateway = await start_gateway(templated(fake, keys=[TOKEN]))
    await gateway.stop()
    gateway = await start_gateway({"a": {"keys": [TOKEN]}, "b": {}})
    assert (await gateway.chat()).text == "hello from a"
    (key,) = [key for key in await gateway.seen("/api/keys") if key["platform"] == "a"]
    assert key["last_error"] is None
