"""Changes to the catalogue and the keys in force: a transaction that fails changes neither the file nor the memory."""

import asyncio
import contextlib
import sqlite3
from pathlib import Path

from fake_provider import answer, body, error

# Rows that break a deferred foreign key are refused by COMMIT itself, when everything else has been done.
BREAK_COMMIT = """
CREATE TABLE broken (id INTEGER REFERENCES nowhere (id) DEFERRABLE INITIALLY DEFERRED);
CREATE TABLE nowhere (id INTEGER PRIMARY KEY);
CREATE TRIGGER break_models AFTER INSERT ON models BEGIN INSERT INTO broken VALUES (1); END;
CREATE TRIGGER break_keys AFTER INSERT ON api_keys BEGIN INSERT INTO broken VALUES (1); END;
CREATE TRIGGER break_chain AFTER UPDATE ON fallback_config BEGIN INSERT INTO broken VALUES (1); END;
"""
MEND_COMMIT = "DROP TRIGGER break_models; DROP TRIGGER break_keys; DROP TRIGGER break_chain;"
MINE = {"mine": {"keyless": True, "discover": True, "models": []}, "b": {}}


def run(db: Path, script: str) -> None:
    with contextlib.closing(sqlite3.connect(db)) as connection:
        connection.executescript(script)


def lists(*names: str):
    """A server that lists these models, and answers as any of them."""

    def reply(request):
        if request.method == "GET":
            return body({"data": [{"id": name} for name in names]})
        return answer(f"I am {request.json['model']}")(request)

    return reply


async def served(gateway) -> set[str]:
    return {model["id"] for model in (await gateway.get("/v1/models")).json["data"]}


async def test_a_failed_commit_of_a_discovery_changes_nothing_and_later_changes_work(start_gateway, fake):
    fake.script("mine", error(500))
    gateway = await start_gateway(MINE)
    await fake.arrived()
    fake.script("mine", lists("new:1b"))
    run(gateway.db, BREAK_COMMIT)

    status, refused = await gateway.call("POST", "/api/models/discover", {})

    assert (status, refused["error"]["code"]) == (503, "database_unavailable")
    assert "new:1b" not in await served(gateway)
    (b,) = [model for model in (await gateway.call("GET", "/api/models"))[1] if model["model_id"] == "b-model"]
    for enabled in (False, True):  # with the discovered model still unwritten
        status, changed = await gateway.call("PATCH", f"/api/models/{b['id']}", {"enabled": enabled})
        assert (status, changed["enabled"]) == (200, enabled)
    run(gateway.db, MEND_COMMIT)
    assert (await gateway.call("POST", "/api/models/discover", {}))[0] == 200
    assert (await gateway.chat(model="new:1b")).text == "I am new:1b"


async def test_a_failed_commit_of_the_operators_change_changes_nothing_and_later_changes_work(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    keys, chain = await gateway.call("GET", "/api/keys"), await gateway.call("GET", "/api/fallback")
    last = [{"model_db_id": chain[1][0]["model_db_id"], "priority": 10_000}]
    key = {"platform": "a", "key": "sk-another-key-0042"}
    run(gateway.db, BREAK_COMMIT)

    assert (await gateway.call("POST", "/api/keys", key))[0] == 503
    assert (await gateway.call("PUT", "/api/fallback", last))[0] == 503

    assert await gateway.call("GET", "/api/keys") == keys
    assert await gateway.call("GET", "/api/fallback") == chain
    run(gateway.db, MEND_COMMIT)
    assert (await gateway.call("POST", "/api/keys", key))[0] == 201
    status, changed = await gateway.call("PUT", "/api/fallback", last)
    assert (status, changed[-1]["model_db_id"]) == (200, last[0]["model_db_id"])


async def test_changes_at_the_same_time_all_hold(start_gateway, fake):
    fake.script("mine", lists(*(f"m:{n}b" for n in range(20))))
    gateway = await start_gateway(MINE)
    added = [{"platform": "b", "key": f"sk-another-key-{n:04}"} for n in range(10)]

    answers = await asyncio.gather(
        *(gateway.call("POST", "/api/keys", key) for key in added),
        *(gateway.call("POST", "/api/models/discover", {}) for _ in range(5)),
    )

    assert {status for status, _ in answers} <= {200, 201}
    assert {f"m:{n}b" for n in range(20)} <= await served(gateway)
    assert (await gateway.call("GET", "/api/status"))[1]["keys"] == 11


async def test_a_key_found_invalid_while_a_change_is_written_stays_invalid(start_gateway, fake):
    fake.script("a", error(401))
    gateway = await start_gateway(["a", "b"])
    (b,) = [model for model in (await gateway.call("GET", "/api/models"))[1] if model["model_id"] == "b-model"]

    async def change() -> None:
        for n in range(40):
            await gateway.call("PATCH", f"/api/models/{b['id']}", {"enabled": bool(n % 2)})

    changing = asyncio.create_task(change())
    for _ in range(10):
        await gateway.chat()
    await changing

    assert fake.called.count("a") == 1
    assert (await gateway.call("GET", "/api/keys"))[1][0]["status"] == "invalid"
