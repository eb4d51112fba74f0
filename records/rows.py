"""The rows of the request log: one per attempt, and how they are inserted in bulk."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain
from typing import Any

from msgspec import Struct
from msgspec.structs import astuple

UNSTORABLE = (OverflowError, ValueError, sqlite3.InterfaceError, sqlite3.ProgrammingError, sqlite3.DataError)


# sqlite3 looks for an adapter of all that is not plainly a number or text, and where it finds none makes an exception
# that nobody sees: 0.2 us for each None and bool, of which a row has ten.
sqlite3.register_adapter(bool, int)
sqlite3.register_adapter(type(None), lambda none: none)


class Row(Struct):
    """One row of `requests`, by column name; `created_at` in seconds since 1970 until it is written."""

    request_id: str
    created_at: float
    platform: str | None = None
    model_id: str | None = None
    key_id: int | None = None
    requested_model: str | None = None
    routing_mode: str | None = None
    status: str = "error"
    error_kind: str | None = None
    http_status: int | None = None
    error: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    latency_ms: int | None = None
    ttfb_ms: int | None = None
    attempt: int = 0
    streamed: bool = False
    skipped_models: str | None = None
    client: int | None = None  # clients.id
    cached: bool = False
    resumed_at: int | None = None  # characters that the client had before
    drill: bool = False
    waited_ms: int | None = None
    uncounted: bool = False  # its model's health gate was open, or the gateway itself failed

    def values(self) -> tuple[Any, ...]:
        """In the order of ROW_COLUMNS."""
        request_id, created_at, *others = astuple(self)
        return (request_id, iso(created_at), *others)


ROW_COLUMNS = Row.__struct_fields__
INSERT_ROWS = f"INSERT INTO requests ({', '.join(ROW_COLUMNS)}) VALUES "
ONE_ROW = f"({', '.join('?' * len(ROW_COLUMNS))})"
# Rows of one statement. sqlite3 gives the interpreter's lock away at every step, and while requests keep the event loop
# busy each return costs 5 ms, so that row by row 200 a second would be the most. A few sizes, so that each statement is
# compiled once; 64 rows stay far below SQLite's 32,766 parameters.
ROWS_AT_ONCE = (64, 8, 1)


MILLISECONDS = tuple(f".{ms:03}Z" for ms in range(1000))


def iso(utc: float) -> str:
    """Seconds since 1970 as ISO-8601 with milliseconds and Z."""
    second, ms = divmod(int(utc * 1000), 1000)
    return iso_second(second) + MILLISECONDS[ms]


@lru_cache(maxsize=16)
def iso_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def insert_rows(db: sqlite3.Connection, rows: Sequence[Row]) -> None:
    done = 0
    for size in ROWS_AT_ONCE:
        statement = INSERT_ROWS + ", ".join([ONE_ROW] * size)
        while len(rows) - done >= size:
            db.execute(statement, list(chain.from_iterable(map(Row.values, rows[done : done + size]))))
            done += size


def insert_each(db: sqlite3.Connection, rows: Sequence[Row]) -> int:
    """All that SQLite can hold; gives how many it cannot."""
    lost = 0
    for row in rows:
        try:
            insert_rows(db, [row])
        except UNSTORABLE:
            lost += 1
    return lost
