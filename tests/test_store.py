"""The request log as the store writes it: one statement for a batch, and no row that holds up the others."""

import contextlib
import re
import sqlite3
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import logged
from fake_provider import body

from records.database import Store
from records.keys import add_key
from records.request_log import model_stats, todays_use
from records.rows import ROW_COLUMNS, Row, insert_rows, iso
from records.vault import StoreError, Vault

SCHEMA = Path(__file__).resolve().parent.parent / "schema.sql"


@pytest.fixture
async def store(tmp_path):
    opened = Store(tmp_path / "gateway.db", bytes(32))
    yield opened
    await opened.close()


def test_a_batch_of_rows_is_a_few_statements_in_order_with_every_value_as_it_was():
    # Each step of sqlite3 gives the interpreter's lock away and, under load, waits 5 ms to have it back.
    everything = Row(
        "r0", 1_700_000_000.125, platform="p", model_id='m"1\\', key_id=2**40, requested_model="é🙂 'x'",
        routing_mode="smart", status="error", error_kind="wrapped", http_status=503, error="two\nlines", input_tokens=0,
        output_tokens=7, latency_ms=12, ttfb_ms=3, attempt=2, streamed=True, skipped_models='["a/b"]', client=3,
        cached=True, resumed_at=17, drill=True, waited_ms=250,
    )  # fmt: skip
    rows = [everything, *(Row(f"r{n}", 1_700_000_000 + n, status="success") for n in range(1, 500))]
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(SCHEMA.read_text())
        statements: list[str] = []
        db.set_trace_callback(statements.append)

        insert_rows(db, rows)

        db.set_trace_callback(None)
        written = db.execute(f"SELECT {', '.join(ROW_COLUMNS)} FROM requests ORDER BY id").fetchall()
    assert sum("INSERT" in statement for statement in statements) <= 500 / 64 + 16
    assert written == [tuple(row.values()) for row in rows]
    assert written[0][ROW_COLUMNS.index("created_at")] == "2023-11-14T22:13:20.125Z"


def test_a_days_use_is_added_up_but_for_the_last_minute_and_only_where_it_is_limited():
    noon = 1_700_049_600.0
    limits = {"rpm": (1, "rpm_limit"), "tpd": (2, "tpd_limit"), "free": (3, "context_window")}
    ages = [13 * 3600, 7200, 3600, 61, 59, 1]  # the first is yesterday's
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(SCHEMA.read_text())
        for name, (id, column) in limits.items():
            db.execute(
                "INSERT INTO models (id, platform, model_id, display_name, intelligence_rank, speed_rank, "
                "context_window, supports_tools, supports_vision) VALUES (?, 'p', ?, '', 1, 1, 1, 0, 0)", (id, name),
            )  # fmt: skip
            db.execute(f"UPDATE models SET {column} = 5 WHERE id = ?", (id,))
        rows = [
            Row("r", noon - age, platform="p", model_id=name, key_id=key, status="success", input_tokens=age, attempt=1)
            for age in ages
            for name in limits
            for key in (None, 7)
        ]
        insert_rows(db, rows)

        use = todays_use(db, noon)

    assert {model for model, *_ in use} == {1, 2}
    for model in (1, 2):
        for key in (0, 7):
            own = [(round(ago_s), requests, tokens) for m, k, ago_s, requests, tokens in use if (m, k) == (model, key)]
            assert own == [(61, 3, 7200 + 3600 + 61), (59, 1, 59), (1, 1, 1)]


def test_answers_from_memory_and_drills_feed_no_statistics_and_memory_uses_no_quota():
    now = time.time()
    with contextlib.closing(sqlite3.connect(":memory:")) as db:
        db.executescript(SCHEMA.read_text())
        db.execute(
            "INSERT INTO models (id, platform, model_id, display_name, context_window, rpd_limit, supports_tools, "
            "supports_vision) VALUES (1, 'p', 'm', '', 1, 5, 0, 0)"
        )
        for more in ({}, {"cached": True}, {"drill": True}):
            insert_rows(db, [Row("r", now, platform="p", model_id="m", status="success", attempt=1, **more)])

        assert model_stats(db, 7)["p", "m"].raw_total == 1
        assert sum(requests for _, _, _, requests, _ in todays_use(db, now)) == 2


async def test_a_row_that_no_database_takes_is_counted_and_holds_up_no_other(store, tmp_path):
    store.log(Row("half an emoji", time.time(), error="\ud83d"))
    await store.flush()
    store.log(Row("good", time.time()))
    await store.flush()

    assert [row["request_id"] for row in logged(tmp_path / "gateway.db")] == ["good"]
    assert (store.dropped, store.pending) == (1, 0)


async def test_what_a_provider_says_in_half_an_emoji_reaches_client_and_log(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", body({"error": {"message": "x\0y\ud83dz", "code": "odd\ud83d"}}, status=400))

    got = await gateway.chat()

    assert (got.status, got.error["message"], got.error["code"]) == (400, "x y?z", "odd?")
    assert (await gateway.row())["error"] == "x y?z"


@pytest.mark.parametrize("tokens", [b"1e999", b"18446744073709551616", b"-5", b'"many"'])
async def test_a_count_of_tokens_that_cannot_be_is_no_count(start_gateway, fake, tokens):
    gateway = await start_gateway(["a"])
    usage = b'"usage":{"prompt_tokens":%b,"completion_tokens":%b}' % (tokens, tokens)
    choice = b'"choices":[{"index":0,"message":{"role":"assistant","content":"hello"},"finish_reason":"stop"}]'
    fake.script("a", body(b"{%b,%b}" % (choice, usage)))

    assert (await gateway.chat()).text == "hello"

    row = await gateway.row()
    assert row["status"] == "success"
    assert 0 < row["output_tokens"] < 10


async def test_what_a_locked_database_did_not_take_is_done_before_the_next_write_and_only_the_latest_of_a_name(
    store, tmp_path
):
    made: list[str] = []
    with contextlib.closing(sqlite3.connect(tmp_path / "gateway.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for name, what in ((1, "first"), (2, "second"), (1, "third")):
            store.write_later(name, lambda db, what=what: made.append(what))
        with pytest.raises(sqlite3.OperationalError):
            await store.write(lambda db: made.append("too early"))
        assert made == []
        other.execute("ROLLBACK")

    await store.write(lambda db: made.append("the operator's"))
    await store.write(lambda db: made.append("the next"))

    assert made == ["second", "third", "the operator's", "the next"]


# --- Files of earlier versions --------------------------------------------------------------------------------------

FIRST_EDITION = Path(__file__).with_name("schemas") / "first_edition.sql"
ENCRYPTION_KEY = bytes(32)


def made_by_the_first_edition(path: Path) -> None:
    """A file with a model that the operator moved and switched off in the chain, a key and a row of the log."""
    vault = Vault(ENCRYPTION_KEY)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.executescript(FIRST_EDITION.read_text())
        db.execute("INSERT INTO settings VALUES ('key_check', ?)", (vault.seal("freeway"),))
        db.execute(
            "INSERT INTO models (id, platform, model_id, display_name, intelligence_rank, speed_rank, context_window, "
            "rpm_limit, supports_tools, supports_vision, enabled) VALUES (7, 'p', 'm', 'M', 3, 4, 1000, 9, 1, 0, 0)"
        )
        db.execute("INSERT INTO fallback_config VALUES (7, 42, 0)")
        add_key(db, vault, "p", "sk-kept-over-the-years", "mine")
        db.execute(
            "INSERT INTO requests (request_id, created_at, status, attempt, streamed) VALUES ('r', ?, 'success', 1, 0)",
            (iso(1_700_000_000),),
        )
        db.execute("PRAGMA user_version = 1")


def shape(db: sqlite3.Connection) -> dict[str, object]:
    """Every table and index: columns in order, keys, and its text without comments, quotes and spacing."""
    shapes: dict[str, object] = {}
    for name, text in db.execute("SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"):
        words = re.sub(r"\s+|--[^\n]*|\"", "", text.replace(f'"{name}"', name))
        shapes[name] = (
            Counter(words.split(",")),  # an added column stands behind the table's own constraints in the text
            db.execute(f"PRAGMA table_xinfo({name})").fetchall(),
            db.execute(f"PRAGMA foreign_key_list({name})").fetchall(),
            sorted(db.execute(f"PRAGMA index_list({name})").fetchall()),
        )
    return shapes


async def test_a_file_of_the_first_edition_becomes_like_a_fresh_one_and_keeps_what_is_in_it(tmp_path):
    made_by_the_first_edition(tmp_path / "old.db")
    for name in ("old.db", "fresh.db"):
        await Store(tmp_path / name, ENCRYPTION_KEY).close()

    with contextlib.closing(sqlite3.connect(tmp_path / "old.db")) as old:
        with contextlib.closing(sqlite3.connect(tmp_path / "fresh.db")) as fresh:
            assert shape(old) == shape(fresh)
            assert old.execute("PRAGMA user_version").fetchone() == fresh.execute("PRAGMA user_version").fetchone()
        assert old.execute("SELECT id, model_id, rpm_limit, enabled, kind FROM models").fetchall() == [
            (7, "m", 9, 0, "chat")
        ]
        assert old.execute("SELECT * FROM fallback_config").fetchall() == [(7, 42, 0)]
        assert old.execute("SELECT request_id, cached, drill, client FROM requests").fetchall() == [("r", 0, 0, None)]
        assert old.execute("SELECT label, trains_on_prompts FROM api_keys").fetchall() == [("mine", None)]


async def test_a_migration_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "old.db"
    made_by_the_first_edition(path)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("CREATE TABLE clients (somebody TEXT)")  # in the way of ours
        before = db.execute("SELECT * FROM sqlite_master").fetchall()

    with pytest.raises(StoreError, match="cannot be used as a database"):
        Store(path, ENCRYPTION_KEY)

    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("SELECT * FROM sqlite_master").fetchall() == before
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert db.execute("SELECT * FROM fallback_config").fetchall() == [(7, 42, 0)]


async def test_a_file_of_a_later_version_is_left_alone(tmp_path):
    path = tmp_path / "gateway.db"
    await Store(path, ENCRYPTION_KEY).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 1000")

    with pytest.raises(StoreError, match="newer version"):
        Store(path, ENCRYPTION_KEY)
