"""GATEWAY_LOG: a PostgreSQL that gateways share, and what happens when it goes away (SPEC 20.2, 20.3)."""

import asyncio
import json
import re
import sqlite3
import time
from collections.abc import Awaitable, Callable
from contextlib import closing

import pytest
from conftest import API_KEY, ROOT, Gateway, client_of
from fake_provider import error, until
from scale.postgres import PASSWORD, Lossy, Server, query

from records.database import Store
from records.keys import add_key
from records.rows import Row
from records.vault import StoreError

pytest_plugins = ["scale.postgres"]
KEY = {"platform": "a", "key": "sk-made-by-the-operator"}


@pytest.fixture
async def store(database, tmp_path):
    opened = Store(tmp_path / "gateway.db", bytes(32), database)
    yield opened
    await opened.close()


@pytest.fixture
def shared(start_gateway, database):
    """Start one more gateway on the same database."""

    async def start(**settings: str) -> Gateway:
        return await start_gateway(["a", "b"], {"GATEWAY_LOG": database, **settings})

    return start


def rows_of(numbers: range, status: str = "success") -> list[Row]:
    return [Row(f"r{n}", time.time(), platform="a", model_id="m", status=status, attempt=1) for n in numbers]


async def so(check: Callable[[], Awaitable[object]], within_s: float = 5) -> None:
    """Wait until this is true."""
    async with asyncio.timeout(within_s):
        while not await check():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def ids_in(database: str) -> list[str]:
    return [row["request_id"] for row in await query(database, "SELECT request_id FROM requests ORDER BY id")]


# --- The database -----------------------------------------------------------------------------------------------------


async def test_tables_and_columns_are_those_of_the_file_in_the_same_order(store, database):
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript((ROOT / "schema.sql").read_text())
        tables = [
            name
            for (name,) in db.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
            )
        ]
        ours = {name: [row[1] for row in db.execute(f"PRAGMA table_info({name})")] for name in tables}
    listed = await query(
        database,
        "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'public' "
        "ORDER BY table_name, ordinal_position",
    )
    theirs: dict[str, list[str]] = {}
    for row in listed:
        theirs.setdefault(row["table_name"], []).append(row["column_name"])

    assert theirs.keys() == ours.keys() | {"log_writers"}
    assert {name: theirs[name] for name in ours} == ours


async def test_gateways_that_start_at_once_make_one_schema_and_one_key(database, tmp_path):
    stores = await asyncio.gather(
        *(asyncio.to_thread(Store, tmp_path / f"{n}.db", bytes(32), database) for n in range(4))
    )
    for opened in stores:
        await opened.close()

    kept = {row["key"]: row["value"] for row in await query(database, "SELECT key, value FROM settings")}
    assert kept.keys() == {"key_check", "changed", "schema_version"}
    assert len(await query(database, "SELECT writer FROM log_writers")) == 4


async def test_the_wrong_encryption_key_is_noticed_and_changes_nothing(store, database, tmp_path):
    before = await query(database, "SELECT key, value FROM settings ORDER BY key")
    with pytest.raises(StoreError, match="ENCRYPTION_KEY"):
        await asyncio.to_thread(Store, tmp_path / "other.db", bytes(31) + b"x", database)
    assert await query(database, "SELECT key, value FROM settings ORDER BY key") == before


async def test_another_host_without_the_key_file_is_told_so(database, tmp_path):
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    await Store(tmp_path / "one" / "gateway.db", None, database).close()
    with pytest.raises(StoreError, match=r"missing.*ENCRYPTION_KEY"):
        await asyncio.to_thread(Store, tmp_path / "two" / "gateway.db", None, database)
    assert not (tmp_path / "two" / "gateway.db.key").exists()


async def test_tables_of_somebody_else_are_left_alone(database, tmp_path):
    await query(database, "CREATE TABLE settings (key text, value text)")
    with pytest.raises(StoreError, match="not Freeway's"):
        await asyncio.to_thread(Store, tmp_path / "gateway.db", bytes(32), database)
    tables = await query(database, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    assert [row["tablename"] for row in tables] == ["settings"]


async def test_a_database_of_a_later_version_is_left_alone(store, database, tmp_path):
    await query(database, "UPDATE settings SET value = '1000' WHERE key = 'schema_version'")
    with pytest.raises(StoreError, match="newer version"):
        await asyncio.to_thread(Store, tmp_path / "gateway.db", bytes(32), database)


# --- Rows -------------------------------------------------------------------------------------------------------------


async def test_rows_are_in_the_database_in_order_within_a_second_and_the_file_is_not_made(shared, database, tmp_path):
    gateway = await shared()
    asked = [(await gateway.chat()).headers["X-Request-Id"] for _ in range(3)]

    rows = await gateway.rows(3)

    assert [row["request_id"] for row in rows] == asked == await ids_in(database)
    assert {row["status"] for row in rows} == {"success"}
    assert not (tmp_path / "gateway.db").exists()
    (raw,) = await query(database, "SELECT streamed, cached, created_at FROM requests LIMIT 1")
    assert (raw["streamed"], raw["cached"]) == (rows[0]["streamed"], rows[0]["cached"]) == (0, 0)
    assert raw["created_at"] == rows[0]["created_at"]


async def test_all_gateways_report_the_rows_of_all_of_them(shared):
    one, other = await shared(), await shared()
    await one.chat()
    await other.chat()
    for gateway in (one, other):
        assert len(await gateway.rows(2)) == 2
        assert (await gateway.seen("/api/analytics"))["totals"]["requests"] == 2


async def test_a_row_that_no_database_takes_is_counted_and_holds_up_no_other(store, database):
    store.log(Row("half an emoji", time.time(), error="\ud83d"))
    store.log(Row("too much", time.time(), input_tokens=1 << 64))
    store.log(Row("zero", time.time(), error="a\0b"))
    await store.flush()

    assert await ids_in(database) == ["zero"]
    assert (store.dropped, store.pending) == (2, 0)


async def test_a_stop_writes_what_is_waiting_however_much_it_is(database, tmp_path):
    store = Store(tmp_path / "gateway.db", bytes(32), database)
    for row in rows_of(range(7_000)):
        store.log(row)
    await store.close()
    assert len(await ids_in(database)) == 7_000
    assert store.dropped == 0


@pytest.mark.parametrize("lost", [b"COMMIT", b"INSERT 0 1", b"COPY 3"], ids=["commit", "number", "copy"])
async def test_rows_are_in_once_wherever_the_connection_breaks(postgres, database, tmp_path, lost):
    async with Lossy(postgres.port) as proxy:
        address = database.replace(f":{postgres.port}/", f":{proxy.port}/")
        store = await asyncio.to_thread(Store, tmp_path / "gateway.db", bytes(32), address)
        proxy.lose(lost)
        for row in rows_of(range(3)):
            store.log(row)
        await until(lambda: proxy.losses == 1)
        for row in rows_of(range(3, 6)):
            store.log(row)
        await until(lambda: not store.pending, within_s=10)
        await store.close()

    assert await ids_in(database) == [f"r{n}" for n in range(6)]


async def test_rows_older_than_their_retention_go(shared, database, store):
    for age_days, name in ((100, "old"), (89, "kept")):
        store.log(Row(name, time.time() - age_days * 86_400, status="success"))
    await store.flush()
    await shared(ENCRYPTION_KEY="00" * 32)

    async def gone() -> bool:
        return await ids_in(database) == ["kept"]

    await so(gone)


# --- What the operator changes ----------------------------------------------------------------------------------------


async def test_a_change_of_keys_models_chain_and_clients_reaches_every_gateway_within_a_second(shared):
    one, other = await shared(), await shared()
    model = next(m for m in await one.seen("/api/models") if m["model_id"] == "a-model")

    began = time.monotonic()
    assert (await one.call("POST", "/api/keys", KEY))[0] == 201
    assert (await one.call("PATCH", f"/api/models/{model['id']}", {"enabled": False}))[0] == 200
    _, client = await one.call("POST", "/api/clients", {"name": "laptop"})
    asked = other.request(model="a-model")
    headers = {"authorization": f"Bearer {client['key']}"}

    async def arrived() -> bool:
        off = (await other.send(asked)).status == 400  # a model that is switched off is not found
        return off and (await other.chat(headers=headers)).status == 200

    await so(arrived, within_s=began + 1 - time.monotonic())
    assert len(await other.seen("/api/keys")) == 3


async def test_a_change_is_noticed_without_being_told_of_it(shared, database, fake):
    gateway = await shared()
    await query(database, "DROP TRIGGER revised ON fallback_config")
    await query(
        database,
        "UPDATE fallback_config SET priority = -1 WHERE model_db_id = (SELECT id FROM models WHERE platform = 'b')",
    )
    await query(database, "UPDATE settings SET value = '-' WHERE key = 'changed'")

    async def taken_over() -> bool:
        return (await gateway.chat()).headers["X-Routed-Via"] == "b/b-model"

    await so(taken_over)


async def test_a_key_that_one_gateway_finds_invalid_is_invalid_for_all(shared, fake):
    one, other = await shared(), await shared()
    fake.script("a", error(401))
    await one.chat()

    async def avoided() -> bool:
        return (await other.chat()).headers["X-Routed-Via"] == "b/b-model"

    await so(avoided, within_s=3)
    (key,) = [key for key in await other.seen("/api/keys") if key["platform"] == "a"]
    assert key["status"] == "invalid"


async def test_a_gateway_with_a_smaller_catalogue_takes_no_model_from_the_others(start_gateway, database):
    both = await start_gateway(["a", "b"], {"GATEWAY_LOG": database})
    await start_gateway(["b"], {"GATEWAY_LOG": database})
    await asyncio.sleep(0.7)  # the time in which a change is looked up

    assert (await both.chat(model="a-model")).headers["X-Routed-Via"] == "a/a-model"


# --- When it goes away ------------------------------------------------------------------------------------------------


def lines_of(running) -> list[dict]:
    found = [json.loads(line) for line in running.output if line.startswith("{")]
    return [line for line in found if line["event"].startswith("database_")]


async def test_a_database_that_stops_answering_costs_no_request_and_no_row(
    postgres: Server, database, shared, tmp_path
):
    gateway = await shared()
    await gateway.chat()
    slowest, statuses, refusals = 0.0, [], []

    async def ask() -> None:
        nonlocal slowest
        began = time.monotonic()
        statuses.append((await gateway.chat()).status)
        slowest = max(slowest, time.monotonic() - began)

    async def look() -> None:
        began = time.monotonic()
        status, answered = await gateway.call("GET", "/api/requests")
        refusals.append((status, answered["error"]["code"], time.monotonic() - began))

    postgres.pause()
    try:
        asking = [asyncio.create_task(look())]
        for _ in range(80):
            asking.append(asyncio.create_task(ask()))
            await asyncio.sleep(0.05)
        asking.append(asyncio.create_task(look()))
        await asyncio.gather(*asking)
        assert (await gateway.get("/healthz")).json["database"] == "away"
        assert "freeway_log_up 0.0" in (await gateway.get("/metrics")).body.decode()
    finally:
        postgres.resume()

    assert set(statuses) == {200}
    assert slowest < 1.0  # less than any limit of a command
    assert {refusal[:2] for refusal in refusals} == {(503, "database_unavailable")}
    assert max(took_s for *_, took_s in refusals) < 5.0

    async def all_in() -> bool:
        return len(await ids_in(database)) >= 81

    await so(all_in, within_s=12)
    await asyncio.sleep(0.1)  # for what would be written twice
    written = await ids_in(database)
    assert len(written) == len(set(written)) == 81
    assert (await gateway.seen("/api/status"))["log_dropped"] == 0
    assert "freeway_log_up 1.0" in (await gateway.get("/metrics")).body.decode()


async def test_a_server_that_is_restarted_gets_everything_and_it_is_said_in_two_lines(
    postgres: Server, database, start_process
):
    running = await start_process({"a": {}}, {"GATEWAY_LOG": database, "GATEWAY_API_KEY": API_KEY})
    async with client_of(running) as client:
        await client.chat()
        await asyncio.to_thread(postgres.stop)
        for _ in range(20):
            assert (await client.chat()).status == 200
            await asyncio.sleep(0.05)
        await asyncio.to_thread(postgres.start)

        async def all_in() -> bool:
            return len(await ids_in(database)) == 21

        await so(all_in, within_s=15)
        await until(lambda: "database_up" in running.text)
    assert [line["event"] for line in lines_of(running)] == ["database_down", "database_up"]
    assert PASSWORD not in running.text


async def test_rows_that_the_server_refuses_wait_and_it_is_said_once(store, database):
    said = []
    store.backend.on_turn(lambda up, why: said.append((up, why)))
    await query(database, "ALTER TABLE requests RENAME TO hidden")
    store.log(rows_of(range(1))[0])
    for _ in range(3):
        await store.flush()
    assert (store.pending, store.backend.is_up) == (1, False)
    await query(database, "ALTER TABLE hidden RENAME TO requests")
    await store.flush()

    assert await ids_in(database) == ["r0"]
    assert [up for up, _ in said] == [False, True]
    assert "requests" in said[0][1]


# --- The start --------------------------------------------------------------------------------------------------------

ADDRESSES = {
    "nobody listens": ("postgresql://me:{password}@127.0.0.1:1/log", "Connect call failed"),
    "wrong password": ("postgresql://postgres:wrong-{password}@127.0.0.1:{port}/postgres", "authentication failed"),
    "no such database": ("postgresql://postgres:{password}@127.0.0.1:{port}/nowhere", "does not exist"),
    "no address": ("postgresql://me:{password}@host:port/log", "cannot be understood"),
}


@pytest.mark.parametrize(("address", "words"), ADDRESSES.values(), ids=ADDRESSES)
async def test_a_start_without_the_database_ends_in_one_clear_line_without_the_password(
    postgres, start_process, address, words
):
    settings = {"GATEWAY_LOG": address.format(password=PASSWORD, port=postgres.port)}
    running = await start_process({"a": {}}, settings)

    assert await running.ended(within_s=25) == 2

    assert len(running.output) == 1
    assert running.text.startswith("freeway: GATEWAY_LOG: ")
    assert words in running.text
    assert PASSWORD not in running.text


async def test_a_gateway_waits_at_its_start_for_a_server_that_is_starting(postgres: Server, database, start_process):
    await asyncio.to_thread(postgres.stop)
    running = await start_process({"a": {}}, {"GATEWAY_LOG": database})
    await asyncio.sleep(1.0)
    await asyncio.to_thread(postgres.start)
    await running.ready()


# --- The doctor -------------------------------------------------------------------------------------------------------


async def test_the_doctor_looks_into_the_shared_database(database, start_process, store):
    await store.write(lambda db: add_key(db, store.vault, "a", "sk-of-the-doctor-0001", "mine"))
    await query(database, "UPDATE api_keys SET enabled = 0")  # so that it is not tried at its provider
    settings = {"GATEWAY_LOG": database, "ENCRYPTION_KEY": "00" * 32}
    running = await start_process({"a": {"keys": []}}, settings, ("doctor",))
    await running.ended()

    assert re.search(r"database.*GATEWAY_LOG, schema 1, 1 keys", running.text)
    assert "sk-of-the-doctor-0001" not in running.text
    assert PASSWORD not in running.text


async def test_the_doctor_says_that_the_shared_database_is_away(postgres, start_process):
    settings = {"GATEWAY_LOG": f"postgresql://me:{PASSWORD}@127.0.0.1:1/log"}
    running = await start_process({"a": {"keys": []}}, settings, ("doctor",))

    assert await running.ended() == 1
    assert re.search(r"database.*GATEWAY_LOG: PostgreSQL: .*Connect call failed", running.text)
    assert PASSWORD not in running.text
