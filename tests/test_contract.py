"""CONTRACT.md's second edition, literally: every field of every shape that tells why, and what comes.

A shape here is an example of what may stand there: a type, a dict of fields that must all be present, a list with the
shape of its entries, or a tuple of alternatives. More fields are allowed, as the contract allows them.
"""

import asyncio
import json
import re

from conftest import case
from continuing import HALF, NO_RESTS, broken, on
from fake_provider import PAUSE, ROLE, answer, completion, error, sse, until

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
NUMBER = (int, float)
OR_NULL = (int, None)
LIMITS = {"rpm": OR_NULL, "rpd": OR_NULL, "tpm": OR_NULL, "tpd": OR_NULL}
CLIENT = {
    "id": int, "name": str, "masked": str, "enabled": bool, "limits": {"rpm": OR_NULL, "rpd": OR_NULL, "tpd": OR_NULL},
    "models": ([str], None), "min_rank": OR_NULL, "privacy": ("no-train", None), "expires_at": (TIME, None),
    "created_at": TIME, "used": {"rpm": int, "rpd": int, "tpd": int},
}  # fmt: skip
PARTS = {"success": float, "speed": NUMBER, "ttfb": NUMBER, "intelligence": NUMBER, "penalty": NUMBER}
CANDIDATE = {
    "platform": str, "model_id": str, "rung": (1, 2, 3, 4, 5, 6, None), "score": (*NUMBER, None),
    "parts": (PARTS, None), "excluded": (str, None),
}  # fmt: skip
ATTEMPT = {
    "platform": str, "model": str, "model_id": str, "status": OR_NULL, "kind": (str, None), "ms": int,
    "message": (str, None), "rung": int, "hedge": bool, "resumed_at": OR_NULL,
}  # fmt: skip
REHEARSAL = {
    "model": str, "requested_model": str, "mode": ("balanced", "smart", "fast", "priority"), "session": (str, None),
    "candidates": [CANDIDATE], "waited_ms": int,
}  # fmt: skip
EXPLANATION = REHEARSAL | {"request_id": str, "attempts": [ATTEMPT]}
QUOTA = {
    "keys": [
        {
            "key_id": OR_NULL, "platform": str, "model_id": str, "limits": LIMITS, "used": dict.fromkeys(LIMITS, int),
            "left": LIMITS, "resets_at": (TIME, None), "per_hour": {"requests": int, "tokens": int},
            "dry_at": (TIME, None),
        }
    ],
    "modes": [
        {
            "mode": ("balanced", "smart", "fast", "priority"), "first_dry_at": (TIME, None),
            "last_dry_at": (TIME, None),
        }
    ],
}  # fmt: skip
DRILL = {
    "cases": [
        {
            "case": str, "whole": bool, "platform": (str, None), "model_id": (str, None), "calls": int, "ms": int,
            "error": (str, None),
        }
    ],
    "passed": bool,
}  # fmt: skip
MODEL = {"platform": str, "model_id": str}
PROTECTION = {
    "levels": dict, "default_level": "model-skip", "sessions": {"count": int},
    "bans": [{"session": str, "platforms": [{"platform": str, "reason": str, "ms_left": int}]}],
    "active": [MODEL | {"ms": int}],
    "transient_cooldowns": [MODEL | {"model_db_id": int, "ms_left": int}],
    "key_cooldowns": [MODEL | {"key_id": int, "ms_left": int}],
    "gates": [MODEL | {"model_db_id": int, "since_ms": int, "next_trial_ms": int, "trials_failed": int}],
    "waiting": [{"request_id": str, "since_ms": int, "eta_ms": int}],
    "trials": [{"model_db_id": int, "since_ms": int}],
    "rescues": [
        MODEL | {"request_id": str, "since_ms": int, "resumed_at": int, "broken": MODEL | {"kind": str}},
    ],
}  # fmt: skip
PLATFORM = {
    "id": str, "name": str, "adapter": str, "base_url": str, "keyless": bool, "protection": str, "keys": int,
    "signup_url": (str, None), "local": bool, "trains_on_prompts": (bool, None), "terms_url": (str, None),
    "terms_checked": (str, None),
}  # fmt: skip
KEY = {
    "id": int, "platform": str, "label": str, "masked": str, "status": str, "enabled": bool, "last_error": (str, None),
    "created_at": TIME, "trains_on_prompts": (bool, None),
}  # fmt: skip
ROW = {"client": OR_NULL, "cached": int, "resumed_at": OR_NULL, "drill": int, "waited_ms": OR_NULL}
METRICS = ("rescues", "hedges", "waits", "trials", "cache")


def faults(value: object, shape: object, place: str = "it") -> list[str]:
    """Where a value is not as its shape says."""
    match shape:
        case dict():
            if not isinstance(value, dict):
                return [f"{place} is {value!r}"]
            missing = [f"{place} has no {name!r}" for name in shape if name not in value]
            return missing + [
                f for name in shape if name in value for f in faults(value[name], shape[name], f"{place}.{name}")
            ]
        case [entry]:
            if not isinstance(value, list):
                return [f"{place} is {value!r}"]
            return [f for index, each in enumerate(value) for f in faults(each, entry, f"{place}[{index}]")]
        case tuple():
            found = [faults(value, one, place) for one in shape]
            return [] if [] in found else min(found, key=len)
        case re.Pattern():
            right = isinstance(value, str) and shape.fullmatch(value)
        case type():
            right = type(value) is shape
        case _:
            right = value == shape and type(value) is type(shape)
    return [] if right else [f"{place} is {value!r}"]


def assert_shape(value: object, shape: object, *filled: str) -> None:
    """`filled` are lists that must have an entry, so that its shape is tested too."""
    assert faults(value, shape) == []
    for name in filled:
        assert value[name], f"{name} is empty"


def test_a_shape_finds_what_is_missing_and_what_is_wrong():
    right = {"id": 1, "name": "n", "models": None}
    shape = {"id": int, "name": str, "models": ([str], None)}

    assert faults(right | {"more": 1}, shape) == []
    for name in shape:
        with case(name):
            assert faults({n: v for n, v in right.items() if n != name}, shape) == [f"it has no {name!r}"]
    assert faults(right | {"id": True}, shape) == ["it.id is True"]
    assert faults(right | {"models": ["a", 1]}, shape) == ["it.models[1] is 1"]
    assert faults([right, 3], [shape]) == ["it[1] is 3"]
    assert faults("2026-01-01 00:00", TIME) == ["it is '2026-01-01 00:00'"]


async def test_clients(start_gateway):
    gateway = await start_gateway(["a"])
    given = {
        "name": "c", "limits": {"rpm": 3, "rpd": 4, "tpd": 5000}, "models": ["auto-smart"], "min_rank": 3,
        "privacy": "no-train", "expires_at": "2031-02-03T04:05:06Z",
    }  # fmt: skip

    status, made = await gateway.call("POST", "/api/clients", given)
    assert status == 201
    assert_shape(made, CLIENT | {"key": str})
    assert {name: made[name] for name in given if name != "expires_at"} | {"expires_at": given["expires_at"]} == given
    _, bare = await gateway.call("POST", "/api/clients", {"name": "d"})
    assert_shape(bare, CLIENT | {"key": str})
    assert (bare["limits"], bare["models"], bare["expires_at"]) == (dict.fromkeys(("rpm", "rpd", "tpd")), None, None)
    listed = await gateway.seen("/api/clients")
    assert_shape(listed, [CLIENT])
    assert len(listed) == 2 and all("key" not in client for client in listed)
    assert made["key"] not in json.dumps(listed)
    status, changed = await gateway.call("PATCH", f"/api/clients/{made['id']}", {"name": "e", "models": None})
    assert (status, changed["name"], changed["models"]) == (200, "e", None)
    assert_shape(changed, CLIENT)
    assert (await gateway.call("DELETE", f"/api/clients/{made['id']}"))[0] in (200, 204)
    for method in ("PATCH", "DELETE"):
        assert (await gateway.call(method, f"/api/clients/{made['id']}", {}))[0] == 404
    assert (await gateway.call("POST", "/api/clients", {"limits": {}}))[0] == 400


async def test_explanations(start_gateway, fake):
    gateway = await start_gateway({"a": {}, "b": {}, "c": {"keys": []}})
    fake.script("a", error(503, "down"))
    for model in ("auto", "auto-smart", "auto-fast", "auto-priority", "b-model"):
        with case(model):
            told = await gateway.send(gateway.request(model=model), path="/api/explain")
            assert_shape(told.json, REHEARSAL, "candidates")
            assert "request_id" not in told.json and not told.json.get("attempts")
            got = await gateway.chat(model=model)
            path = f"/api/requests/{got.headers['X-Request-Id']}/explain"
            assert_shape(await gateway.seen(path), EXPLANATION, "candidates", "attempts")
    assert (await gateway.get("/api/requests/req_unknown/explain")).status == 404
    assert (await gateway.send(b"{", path="/api/explain")).status == 400


async def test_the_quota(start_gateway):
    limits = {"rpm": 9, "rpd": 90, "tpm": 9000, "tpd": 90_000}
    gateway = await start_gateway({"a": {"model": limits}, "b": {}, "c": {"keyless": True}})
    await gateway.chat()

    told = await gateway.seen("/api/quota")

    assert_shape(told, QUOTA, "keys", "modes")
    (entry,) = [entry for entry in told["keys"] if entry["platform"] == "a"]
    assert entry["limits"] == limits
    assert entry["left"] == {name: limit - entry["used"][name] for name, limit in limits.items()}
    assert [mode["mode"] for mode in told["modes"]] == ["balanced", "smart", "fast", "priority"]


async def test_a_drill(start_gateway):
    gateway = await start_gateway(["a", "b"])

    status, told = await gateway.call("POST", "/api/drill", {"cases": ["429", "503"]})

    assert status == 200
    assert_shape(told, DRILL, "cases")
    await gateway.chat()
    assert_shape((await gateway.seen("/api/requests"))["rows"], [ROW])


async def test_platforms_and_keys(start_gateway):
    terms = {"trains_on_prompts": False, "terms_url": "https://terms.test/", "terms_checked": "2026-11-27"}
    gateway = await start_gateway({"a": terms, "b": {"local": True}})

    platforms = await gateway.seen("/api/platforms")

    assert_shape(platforms, [PLATFORM])
    (first, second) = (next(p for p in platforms if p["id"] == id) for id in "ab")
    assert {name: first[name] for name in terms} == terms
    assert (first["local"], second["local"], second["trains_on_prompts"]) == (False, True, None)
    assert_shape(await gateway.seen("/api/keys"), [KEY])


async def test_what_protection_holds_back(start_gateway, fake):
    smart = {"protection": "provider-ban", "model": {"prefer_in": ["smart"]}}
    gateway = await start_gateway({"a": smart, "b": {}, "c": {}, "d": {}})
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
    fake.script("a", error(503))
    fake.script("b", error(429))
    await gateway.chat(messages=talk, model="auto-smart")
    await gateway.chat(model="b-model")
    fake.script("c", completion(""))
    for _ in range(5):
        await gateway.chat(model="c-model")

    shown = await gateway.protection()

    assert_shape(shown, PROTECTION, "bans", "transient_cooldowns", "key_cooldowns", "gates")
    assert await gateway.call("DELETE", "/api/protection/bans") == (200, {"lifted": 1})
    await gateway.recovered()
    shown = await gateway.protection()
    assert (shown["gates"], shown["transient_cooldowns"], shown["key_cooldowns"]) == ([], [], [])


async def test_who_waits_and_what_is_tried(start_gateway, fake):
    gateway = await start_gateway(["a"], {"TRANSIENT_COOLDOWN_MS": "60000", "WAIT_FOR_CAPACITY_MS": "20000"})
    fake.script("a", error(503), sse(ROLE, PAUSE))
    await gateway.chat(headers={"X-Max-Wait": "0"})
    trying = [asyncio.create_task(gateway.stream()) for _ in range(2)]
    await until(lambda: len(fake.requests) == 2, within_s=10)

    shown = await gateway.protection()

    assert_shape(shown, PROTECTION, "waiting", "trials", "active")
    for task in trying:
        task.cancel()


async def test_a_rescue_under_way(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], on("fin") | NO_RESTS)
    fake.script("a", broken(how="fin"))
    fake.script("b", sse(ROLE, PAUSE))
    async with gateway.post(gateway.request(stream=True)) as response:
        await response.content.readany()
        await until(lambda: "b" in fake.called)
        shown = await gateway.protection()
        assert_shape(shown, PROTECTION, "rescues", "active")
        (rescue,) = shown["rescues"]
        assert (rescue["platform"], rescue["resumed_at"]) == ("b", HALF)
        assert rescue["broken"] == {"platform": "a", "model_id": "a-model", "kind": "connection"}
        assert rescue["request_id"] == response.headers["X-Request-Id"]


async def test_headers_and_metrics(start_gateway, fake):
    gateway = await start_gateway(["a"], {"CACHE_MB": "1", "WAIT_FOR_CAPACITY_MS": "20000"})
    fake.script("a", error(429, headers={"retry-after": "1"}), answer("waited for"))

    waited = await gateway.chat()
    hit = await gateway.chat()

    assert 900 < int(waited.headers["X-Waited-Ms"]) < 10_000
    assert (waited.headers["X-Cache"], hit.headers["X-Cache"], "X-Waited-Ms" in hit.headers) == ("miss", "hit", False)
    told = (await gateway.get("/metrics")).body.decode()
    for name in METRICS:
        assert f"# TYPE freeway_{name}_total counter" in told, name
    for name in ("waiting", "gates_open"):
        assert f"# TYPE freeway_{name} gauge" in told, name
    for line in ('freeway_cache_total{result="hit"} 1.0', 'freeway_waits_total{result="served"} 1.0'):
        assert line in told
