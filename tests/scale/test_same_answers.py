"""Whatever is in the log, PostgreSQL says of it what SQLite says."""

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from records.analytics import WINDOWS, analytics
from records.connection import Connection
from records.postgres import Postgres
from records.request_log import clients_use, delete_old_rows, list_requests, model_stats, todays_use, use_since
from records.rows import Row, insert_rows

pytest_plugins = ["scale.postgres"]
DAY_S = 86_400.0
counts = st.none() | st.integers(0, 5_000)
ages_s = st.floats(-60, 120) | st.floats(0, 2 * DAY_S) | st.floats(0, 100 * DAY_S)
ROWS = st.lists(
    st.builds(
        dict,
        request_id=st.sampled_from(["r1", "r2", "r3", "é🙂", "R1"]),
        ago_s=ages_s,
        platform=st.sampled_from([None, "p", "q", "P"]),
        model_id=st.sampled_from(["m", "n", "vendor/m"]),
        key_id=st.sampled_from([None, 1, 2]),
        status=st.sampled_from(["success", "success", "error", "cancelled"]),
        input_tokens=counts,
        output_tokens=counts,
        latency_ms=counts,
        ttfb_ms=counts,
        attempt=st.integers(0, 2),
        client=st.sampled_from([None, None, 1, 2]),
        cached=st.booleans(),
        drill=st.sampled_from([False, False, False, True]),
    ),
    max_size=25,
)


@pytest.fixture(scope="module")
def backend(postgres, tmp_path_factory) -> Iterator[Postgres]:
    made = Postgres(postgres.make_database(), tmp_path_factory.mktemp("same") / "gateway.db", bytes(32))
    made.open()
    made.open_reading()
    made.write(with_models)
    yield made
    made.close()
    made.close_reading()


def with_models(db: Connection) -> None:
    for number, name in enumerate(("m", "n", "vendor/m"), start=1):
        db.execute(
            "INSERT INTO models (platform, model_id, display_name, context_window, rpd_limit, supports_tools, "
            "supports_vision) VALUES ('p', ?, '', 1, ?, 0, 0)",
            (name, number if number < 3 else None),
        )
    db.execute("INSERT INTO clients (name, key_hash, masked, created_at) VALUES ('laptop', ?, '', '')", (b"hash",))


def in_seconds(found: list[tuple]) -> list[tuple]:
    """What was used, without its order among those of the same moment."""
    return sorted(
        (tuple(round(value, 3) if type(value) is float else value for value in row) for row in found), key=str
    )


def questions(utc: float) -> dict[str, Callable[[Connection], Any]]:
    def page(**filters: str) -> Callable[[Connection], Any]:
        return lambda db: [
            {name: value for name, value in row.items() if name != "id"}
            for row in list_requests(db, limit=7, before_id=None, filters=filters)
        ]

    return {
        **{window: lambda db, window=window: analytics(db, window, utc) for window in WINDOWS},
        "today": lambda db: in_seconds(todays_use(db, utc)),
        "since": lambda db: sorted(use_since(db, utc - 3600), key=str),
        "clients": lambda db: in_seconds(clients_use(db, utc)),
        "newest": page(),
        "filtered": page(status="success", platform="p", client="1"),
        "nobody": page(client="nobody"),
    }


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS)
def test_every_report_is_the_same_over_either_database(backend, given):
    utc = time.time()
    rows = [Row(created_at=utc - row.pop("ago_s"), **row) for row in map(dict, given)]
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as file:
        file.executescript(Path(ROOT / "schema.sql").read_text())
        with_models(file)
        insert_rows(file, rows)
        backend.write(lambda db: db.execute("TRUNCATE requests"))
        assert backend.write_rows(rows) == 0

        for name, ask in questions(utc).items():
            assert backend.read(ask) == ask(file), name
        theirs, ours = backend.read(lambda db: model_stats(db, 7)), model_stats(file, 7)
        assert theirs.keys() == ours.keys()
        for name, stats in ours.items():
            for field in stats.__dataclass_fields__:
                assert getattr(theirs[name], field) == pytest.approx(getattr(stats, field), abs=1e-5), (name, field)
        assert backend.write(lambda db: delete_old_rows(db, 30)) == delete_old_rows(file, 30)
        assert backend.read(lambda db: use_since(db, 0)) is not None
