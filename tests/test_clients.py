"""Client keys (SPEC 19): made and changed by the operator; limits exact under parallel use and over a restart."""

import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from conftest import ROOT, behind, case
from hypothesis import given
from hypothesis import strategies as st
from worlds import a_model, a_platform

from records.request_log import clients_use
from records.rows import Row, insert_rows
from routing.catalog import Catalog, ModelKind
from routing.clients import Client, ClientKeys, Limits, allowed_models, hash_of, is_among
from wire.chat import Mode, Need
from wire.errors import GatewayError

NOON = 1_700_049_600.0  # of a UTC day
KEY = b"fwc-a-clients-key"


def a_client(id: int = 1, **given) -> Client:
    return Client(**({"id": id, "name": f"c{id}", "key_hash": hash_of(KEY)} | given))


def keys_of(*clients: Client) -> ClientKeys:
    keys = ClientKeys()
    keys.load(clients)
    return keys


def refusal(keys: ClientKeys, client: Client, tokens: int, now: float) -> GatewayError:
    with pytest.raises(GatewayError) as refused:
        keys.admit(client, tokens, now, NOON + now)
    return refused.value


# --- Whose key it is ------------------------------------------------------------------------------------------------

HOLDERS = {
    "in force": (a_client(), True),
    "switched off": (a_client(enabled=False), False),
    "expired this moment": (a_client(expires_at=NOON), False),
    "not yet expired": (a_client(expires_at=NOON + 0.001), True),
    "another's": (a_client(key_hash=hash_of(b"fwc-another")), False),
}


@pytest.mark.parametrize(("client", "found"), HOLDERS.values(), ids=HOLDERS)
def test_a_key_opens_while_it_is_in_force(client, found):
    assert (keys_of(client).find(KEY, NOON) == client) is found


def test_without_clients_nobody_is_found():
    assert keys_of().find(KEY, NOON) is None


# --- How much -------------------------------------------------------------------------------------------------------


def test_a_limit_by_the_minute_slides():
    keys, client = ClientKeys(), a_client(limits=Limits(rpm=2))
    keys.load([client])
    for now in (0.0, 30.0):
        keys.admit(client, 1, now, NOON + now)

    assert refusal(keys, client, 1, 45.0).retry_after_s == pytest.approx(15)
    keys.admit(client, 1, 60.0, NOON + 60)
    assert refusal(keys, client, 1, 61.0).retry_after_s == pytest.approx(29)


def test_limits_by_the_day_end_at_midnight():
    client = a_client(limits=Limits(rpd=1, tpd=None))
    keys = keys_of(client)
    keys.admit(client, 1, 0.0, NOON)

    error = refusal(keys, client, 1, 60.0)

    assert (error.status, error.code, error.retry_after_s) == (429, "client_rate_limited", 12 * 3600 - 60)
    keys.admit(client, 1, 12 * 3600.0, NOON + 12 * 3600)


def test_tokens_are_reserved_by_the_estimate_and_settled_by_what_was_used():
    client = a_client(limits=Limits(tpd=1000))
    keys = keys_of(client)
    first = keys.admit(client, 900, 0.0, NOON)
    assert refusal(keys, client, 200, 0.0).code == "client_rate_limited"
    keys.settle(first, 100)
    keys.admit(client, 900, 0.0, NOON)

    assert keys.used(1, 0.0, NOON) == {"rpm": 2, "rpd": 2, "tpd": 1000}


def test_a_request_that_asked_nobody_is_given_back():
    client = a_client(limits=Limits(rpm=1, rpd=1, tpd=10))
    keys = keys_of(client)
    keys.give_back(keys.admit(client, 10, 0.0, NOON))

    assert keys.used(1, 0.0, NOON) == {"rpm": 0, "rpd": 0, "tpd": 0}
    keys.admit(client, 10, 0.0, NOON)


def test_what_ends_after_midnight_or_after_its_client_is_gone_changes_no_other_count():
    client, other = a_client(1, limits=Limits(tpd=100)), a_client(2, key_hash=b"")
    keys = keys_of(client, other)
    late, gone = keys.admit(client, 50, 0.0, NOON), keys.admit(other, 50, 0.0, NOON)
    keys.load([client])
    keys.settle(gone, 10)
    keys.give_back(gone)
    tomorrow = 12 * 3600.0
    keys.admit(client, 70, tomorrow, NOON + tomorrow)
    keys.settle(late, 10)

    assert keys.used(1, tomorrow, NOON + tomorrow)["tpd"] == 70
    assert refusal(keys, client, 31, tomorrow).status == 429


def test_changed_limits_hold_at_once_and_what_was_used_stays():
    client = a_client(limits=Limits(rpm=5, rpd=5))
    keys = keys_of(client)
    for _ in range(4):
        keys.admit(client, 1, 0.0, NOON)
    lower = replace(client, limits=Limits(rpm=2, rpd=9))
    keys.load([lower])

    assert refusal(keys, lower, 1, 10.0).retry_after_s == pytest.approx(50)
    assert keys.used(1, 10.0, NOON)["rpd"] == 4


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["admit", "admit", "admit", "settle", "give back"]),
        st.floats(0, 40),  # seconds since the step before
        st.integers(0, 60),  # tokens
    ),
    max_size=60,
)


@given(STEPS, st.integers(1, 4), st.integers(1, 8), st.integers(1, 200))
def test_no_limit_is_ever_overshot_whatever_the_order(steps, rpm, rpd, tpd):
    client = a_client(limits=Limits(rpm=rpm, rpd=rpd, tpd=tpd))
    keys, now, open_ones, counted = keys_of(client), 0.0, [], []
    for step, pause_s, tokens in steps:
        now += pause_s
        if step == "admit":
            before = keys.used(1, now, NOON + now)
            try:
                open_ones.append(keys.admit(client, tokens, now, NOON + now))
                counted.append(open_ones[-1])
            except GatewayError:
                assert before["rpm"] == rpm or before["rpd"] == rpd or before["tpd"] + tokens > tpd
        elif open_ones:
            admission = open_ones.pop(tokens % len(open_ones))
            if step == "settle":
                keys.settle(admission, min(tokens, admission.tokens))
            else:
                keys.give_back(admission)
                counted.remove(admission)
        used = keys.used(1, now, NOON + now)
        assert used["rpm"] == sum(admission.at > now - 60 for admission in counted) <= rpm
        assert used["rpd"] == len(counted) <= rpd
        assert used["tpd"] == sum(admission.tokens for admission in counted) <= tpd


# --- What it may ask for --------------------------------------------------------------------------------------------

P, Q = a_platform("p"), a_platform("q")
CATALOG = Catalog(
    [P, Q],
    [
        a_model(1, P, model_id="m"),
        a_model(2, Q, model_id="m"),
        a_model(3, Q, model_id="x/y"),
        a_model(4, Q, model_id="e", kind=ModelKind.EMBEDDING),
    ],
    [],
    {"fixed": "x/y", "quick": "auto-fast"},
)
# (the client's list, the request's mode or model) → what may serve it; a text is the code of a refusal
ALLOWED = {
    "no list": (None, Mode.SMART, None),
    "a listed mode": (["auto-smart"], Mode.SMART, None),
    "auto is balanced": (["auto"], Mode.BALANCED, None),
    "another spelling of a mode": (["auto:smart"], Mode.SMART, None),
    "another mode": (["auto-smart"], Mode.FAST, "model_not_allowed"),
    "a mode where models are listed": (["m"], Mode.BALANCED, "model_not_allowed"),
    "a listed model": (["m", "x/y"], "m", ["m", "x/y"]),
    "a listed model on a named platform": (["m"], "p/m", ["m"]),
    "a model listed on one platform": (["p/m"], "m", ["p/m"]),
    "the other platform": (["p/m"], "q/m", "model_not_allowed"),
    "a model beside a listed mode": (["auto", "m"], "m", ["auto", "m"]),
    "a model that is not listed": (["m"], "x/y", "model_not_allowed"),
    "an id that ends like a listed one": (["y"], "x/y", "model_not_allowed"),
    "an unknown model": (["m"], "nothing", "model_not_found"),
    "a listed alias of a model": (["fixed"], "x/y", ["fixed", "x/y"]),
    "a listed alias of a mode": (["quick"], Mode.FAST, None),
    "an embedding model asked for chat": (["e"], "e", "model_not_found"),
}


@pytest.mark.parametrize(("listed", "asked", "expected"), ALLOWED.values(), ids=ALLOWED)
def test_a_list_allows_what_it_names(listed, asked, expected):
    client = a_client(models=None if listed is None else frozenset(listed))
    mode, pinned = (asked, None) if isinstance(asked, Mode) else (Mode.BALANCED, asked)
    need = Need(mode, pinned, 1)
    if isinstance(expected, str):
        with pytest.raises(GatewayError) as refused:
            allowed_models(client, need, CATALOG)
        assert refused.value.code == expected
        assert refused.value.status == (403 if expected == "model_not_allowed" else 400)
    else:
        assert allowed_models(client, need, CATALOG) == (None if expected is None else frozenset(expected))


def test_an_embedding_model_is_allowed_by_its_name():
    need = Need(Mode.BALANCED, "e", 1)
    assert allowed_models(a_client(models=frozenset(["e"])), need, CATALOG, ModelKind.EMBEDDING) == {"e"}


def test_only_listed_models_take_over():
    models = CATALOG.models
    assert [is_among(frozenset(["p/m", "x/y"]), model) for model in models] == [True, False, True, False]
    assert all(is_among(None, model) for model in models)


# --- Over a restart -------------------------------------------------------------------------------------------------


def test_what_the_log_says_of_today_counts_after_a_restart(tmp_path):
    hour = 3600.0
    rows = [
        ("yesterday", 13 * hour, 1, {}),
        ("r1", 2 * hour, 1, {"status": "error"}),
        ("r1", 2 * hour - 1, 2, {}),  # a second attempt of the same request
        ("r2", 90, 1, {"status": "cancelled"}),
        ("refused", 50, 0, {"status": "error"}),  # asked nobody
        ("r3", 30, 1, {}),
        ("hit", 20, 0, {"cached": True}),
    ]
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript((ROOT / "schema.sql").read_text())
        for client in (1, 2, None):
            insert_rows(
                db,
                [
                    Row(f"{id}-{client}", NOON - ago, platform="p", model_id="m", attempt=attempt, client=client,
                        input_tokens=10, output_tokens=5, **({"status": "success"} | more))
                    for id, ago, attempt, more in rows
                ],
            )  # fmt: skip
        use = clients_use(db, NOON)
    keys = keys_of(a_client(1), a_client(2, key_hash=b""))
    for client, ago_s, requests, tokens in use:
        keys.restore(client, ago_s=ago_s, requests=requests, tokens=tokens, now=0.0, utc=NOON)

    for client in (1, 2):
        assert keys.used(client, 0.0, NOON) == {"rpm": 2, "rpd": 4, "tpd": 60}
        assert keys.used(client, 31.0, NOON + 31)["rpm"] == 1


# --- Over HTTP ------------------------------------------------------------------------------------------------------

FIELDS = {
    "id", "name", "masked", "enabled", "limits", "models", "min_rank", "privacy", "expires_at", "created_at", "used",
}  # fmt: skip


async def test_a_client_is_made_with_a_key_that_is_shown_once(start_gateway):
    gateway = await start_gateway(["a"])

    status, made = await gateway.call("POST", "/api/clients", {"name": "laptop"})

    assert (status, made.keys()) == (201, FIELDS | {"key"})
    assert made["key"].startswith("fwc-") and len(made["key"]) > 40
    assert (made["enabled"], made["models"], made["expires_at"]) == (True, None, None)
    assert made["limits"] == {"rpm": None, "rpd": None, "tpd": None}
    assert made["used"] == {"rpm": 0, "rpd": 0, "tpd": 0}
    listed = await gateway.seen("/api/clients")
    assert listed == [{name: value for name, value in made.items() if name != "key"}]
    (row,) = behind(gateway.db, lambda db: db.execute("SELECT * FROM clients").fetchall())
    assert hash_of(made["key"].encode()) in row
    for path in gateway.db.parent.glob("gateway.db*"):
        assert made["key"].encode() not in path.read_bytes()


async def test_what_is_given_is_stored_and_changed_one_by_one(start_gateway):
    gateway = await start_gateway(["a"])
    given = {
        "name": " agent ", "limits": {"rpm": 3, "tpd": 1000}, "models": ["auto-smart", "a-model"], "min_rank": 12,
        "privacy": "no-train", "expires_at": "2031-01-31T12:00:00+01:00",
    }  # fmt: skip
    _, made = await gateway.call("POST", "/api/clients", given)
    assert (made["name"], made["models"], made["min_rank"]) == ("agent", ["auto-smart", "a-model"], 12)
    assert (made["privacy"], made["expires_at"]) == ("no-train", "2031-01-31T11:00:00.000Z")
    path = f"/api/clients/{made['id']}"
    changes = [
        ({"limits": {"rpd": 9, "rpm": None}}, "limits", {"rpm": None, "rpd": 9, "tpd": 1000}),
        ({"limits": None}, "limits", {"rpm": None, "rpd": None, "tpd": None}),
        ({"models": None}, "models", None),
        ({"enabled": False}, "enabled", False),
        ({"expires_at": None}, "expires_at", None),
        ({"min_rank": None, "privacy": None}, "privacy", None),
        ({"name": "other"}, "name", "other"),
    ]
    for change, field, value in changes:
        with case(change):
            status, changed = await gateway.call("PATCH", path, change)
            assert (status, changed[field]) == (200, value)
            assert changed.keys() == FIELDS
    assert await gateway.seen("/api/clients") == [changed]
    assert await gateway.call("DELETE", path) == (200, {"id": made["id"], "deleted": True})
    assert await gateway.seen("/api/clients") == []
    _, later = await gateway.call("POST", "/api/clients", {"name": "later"})
    assert later["id"] != made["id"]


WRONG = [
    ({}, "name", "missing_field"),
    ({"limits": {"rpm": 1}}, "name", "missing_field"),
    ({"name": ""}, "name", "invalid_value"),
    ({"name": "x" * 101}, "name", "invalid_value"),
    ({"name": 7}, "name", "invalid_type"),
    ({"name": "c", "limits": {"rpm": 0}}, "limits.rpm", "invalid_type"),
    ({"name": "c", "limits": {"tpm": 5}}, "limits.tpm", "unknown_field"),
    ({"name": "c", "limits": [5]}, "limits", "invalid_type"),
    ({"name": "c", "models": []}, "models", "invalid_value"),
    ({"name": "c", "models": [" "]}, "models", "invalid_value"),
    ({"name": "c", "models": "auto"}, "models", "invalid_type"),
    ({"name": "c", "expires_at": "soon"}, "expires_at", "invalid_value"),
    ({"name": "c", "expires_at": 1900000000}, "expires_at", "invalid_type"),
    ({"name": "c", "privacy": "secret"}, "privacy", "invalid_type"),
    ({"name": "c", "min_rank": 0}, "min_rank", "invalid_type"),
    ({"name": "c", "key": "mine"}, "key", "unknown_field"),
    ([], None, "invalid_type"),
    (b"{", None, "invalid_json"),
]


async def test_a_client_that_cannot_be_made_is_refused_with_the_field(start_gateway):
    gateway = await start_gateway(["a"])
    _, made = await gateway.call("POST", "/api/clients", {"name": "c"})
    for content, param, code in WRONG:
        with case(content):
            status, refused = await gateway.call("POST", "/api/clients", content)
            assert (status, refused["error"]["param"], refused["error"]["code"]) == (400, param, code)
            if code not in ("missing_field",):
                assert (await gateway.call("PATCH", f"/api/clients/{made['id']}", content))[0] == 400
    assert [client["name"] for client in await gateway.seen("/api/clients")] == ["c"]


@pytest.mark.parametrize("id", ["999", "x", "-1", "9" * 30])
async def test_an_unknown_client_is_a_404(start_gateway, id):
    gateway = await start_gateway(["a"])
    assert (await gateway.call("PATCH", f"/api/clients/{id}", {"name": "c"}))[0] == 404
    assert (await gateway.call("DELETE", f"/api/clients/{id}"))[0] == 404


async def test_what_clients_used_is_reported_by_client_and_restored(start_gateway):
    gateway = await start_gateway(["a"])
    _, made = await gateway.call("POST", "/api/clients", {"name": "c", "limits": {"rpd": 5}})
    await gateway.stop()
    row = {"platform": "a", "model_id": "a-model", "status": "success", "input_tokens": 7, "output_tokens": 3}
    rows = [Row(f"r{n}", time.time(), attempt=1, client=made["id"], **row) for n in range(3)]
    behind(gateway.db, lambda db: insert_rows(db, rows))

    again = await start_gateway(["a"])

    (client,) = await again.seen("/api/clients")
    today = 3 if datetime.now(UTC).strftime("%H%M") != "0000" else client["used"]["rpd"]
    assert client["used"] == {"rpm": 3, "rpd": today, "tpd": 10 * today}
    (entry,) = (await again.seen("/api/analytics"))["by_client"]
    assert (entry["client"], entry["name"], entry["attempts"], entry["input_tokens"]) == (made["id"], "c", 3, 21)
    rows = (await again.seen(f"/api/requests?client={made['id']}"))["rows"]
    assert [row["client"] for row in rows] == [made["id"]] * 3
