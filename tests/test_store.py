"""The request log as the store writes it: one statement for a batch, and no row that holds up the others."""

import contextlib
import sqlite3
import time
from pathlib import Path

import pytest
from conftest import logged
from fake_provider import body

from records.database import Store
from records.request_log import todays_use
from records.rows import ROW_COLUMNS, Row, insert_rows

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
        output_tokens=7, latency_ms=12, ttfb_ms=3, attempt=2, streamed=True, skipped_models='["a/b"]',
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
    assert written[0][0] == "2023-11-14T22:13:20.125Z"


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
