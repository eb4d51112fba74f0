"""The records in a PostgreSQL that several gateways share (SPEC 20.2). Imported only where GATEWAY_LOG is set.

Two links: the writer's and the reader's. Changes of keys, models and clients run one after the other over all gateways,
as they do in one SQLite file; rows of the log go in beside them, by COPY. A batch whose COMMIT got no answer may be in
or not: the database keeps the number of each gateway's last batch, so that no row is lost and none is in twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from records.breaker import Breaker
from records.cipher import MakeCipher, local_cipher
from records.connection import Connection, DatabaseAway, DatabaseRefused
from records.postgres_link import COMMAND_S, CONNECT_S, READ_S, How, Link, Session
from records.postgres_news import followed
from records.postgres_sql import is_storable, storable
from records.rows import ROW_COLUMNS, UNSTORABLE, Row
from records.vault import StoreError, Vault, unlocked

T = TypeVar("T")
SCHEMA = Path(__file__).with_name("postgres.sql")
MIGRATIONS: Sequence[str] = ()  # the n-th brings a database from schema_version n to n + 1
SCHEMA_VERSION = 1 + len(MIGRATIONS)
START_S = 10.0  # for a server that is started at the same time as the gateway
SCHEMA_S = 30.0  # for another gateway that is bringing the schema up to date
# "freeway", as a number: whoever changes keys, models, clients or the schema holds this lock until the COMMIT.
LOCK = f"SELECT pg_advisory_xact_lock({int.from_bytes(b'freeway')})"
WRITER_DAYS = 30  # after which a gateway that wrote nothing is forgotten


class Postgres:
    """Backend of one database."""

    rows_at_once = 2_000  # far within the limit of one command

    def __init__(
        self, address: str, path: Path, encryption_key: bytes | None, make_cipher: MakeCipher = local_cipher
    ) -> None:
        """`path` is where the key file stands, if there is no `encryption_key`."""
        self._address = address
        self._path = path
        self._encryption_key = encryption_key
        self._make_cipher = make_cipher
        self._breaker = Breaker(2 * CONNECT_S)
        self._writer: Link
        self._reader: Link
        self._name = uuid4().hex
        self._batch = 0
        self._in_doubt: tuple[int, Sequence[Row]] | None = None  # a batch, by its number, that may be in
        self._are_in: dict[int, Row] = {}  # rows by identity that are in, though the store has them still
        self._starting = True
        self._refused = False
        self._say: Callable[[bool, str], None] = lambda up, why: None

    # Opening.

    def open(self) -> Vault:
        self._writer = Link(self._address, self._breaker)
        deadline = time.monotonic() + START_S
        while True:
            try:
                return self._writer.transaction(self._prepare, How(SCHEMA_S, lock_s=SCHEMA_S, lock=LOCK))
            except DatabaseRefused as error:
                self._writer.close()
                raise StoreError(f"GATEWAY_LOG: the database cannot be used: {error}") from None
            except DatabaseAway as error:
                if time.monotonic() > deadline:
                    self._writer.close()
                    raise StoreError(f"GATEWAY_LOG: {error}. The keys are there: no start without it") from None
                time.sleep(CONNECT_S / 4)  # on the writer's thread, before anything is served
            except BaseException:
                self._writer.close()
                raise

    def _kept(self, session: Session) -> dict[str, str]:
        """The table `settings`; empty where nothing is there yet."""
        if session.execute("SELECT to_regclass('settings')::text").fetchone() == (None,):
            return {}
        kept: dict[str, str] = dict(session.execute("SELECT key, value FROM settings").fetchall())
        if "schema_version" not in kept:
            raise StoreError("GATEWAY_LOG: the database has a table `settings` that is not Freeway's; use another one")
        if int(kept["schema_version"]) > SCHEMA_VERSION:
            raise StoreError(f"GATEWAY_LOG: made by a newer version of the gateway (schema {kept['schema_version']})")
        return kept

    def _prepare(self, session: Session) -> Vault:
        kept = self._kept(session)
        version = int(kept.get("schema_version", 0))
        sealed = [kept["key_check"]] if kept else []
        vault = unlocked(sealed, self._encryption_key, self._path, self._make_cipher)
        if not kept:
            session.script(SCHEMA.read_text())
            for key, value in (("key_check", vault.seal("freeway")), ("changed", "0"), ("schema_version", "0")):
                session.execute("INSERT INTO settings VALUES (?, ?)", (key, value))
        for script in MIGRATIONS[version - 1 :] if kept else ():
            session.script(script)
        session.execute("UPDATE settings SET value = ? WHERE key = 'schema_version'", (str(SCHEMA_VERSION),))
        session.script(f"DELETE FROM log_writers WHERE written_at < now() - interval '{WRITER_DAYS} days'")
        session.execute("INSERT INTO log_writers (writer, batch) VALUES (?, 0)", (self._name,))
        return vault

    def look(self, examine: Callable[[Connection, tuple[int, int]], T]) -> T | None:
        """Into a database that is not opened, changing nothing; None where there is none of ours yet."""

        def work(session: Session) -> T | None:
            kept = self._kept(session)
            return examine(session, (int(kept["schema_version"]), SCHEMA_VERSION)) if kept else None

        link = Link(self._address, self._breaker)
        try:
            return link.transaction(work, How(COMMAND_S, mode="READ ONLY"))
        except (DatabaseAway, DatabaseRefused) as error:
            raise StoreError(f"GATEWAY_LOG: {error}") from None
        finally:
            link.close()

    def open_reading(self) -> None:
        self._reader = Link(self._address, self._breaker)

    # Changes and questions.

    def write(self, work: Callable[[Connection], T]) -> T:
        lock_s = SCHEMA_S if self._starting else COMMAND_S / 2  # several gateways start at once, one after the other
        return self._writer.transaction(work, How(COMMAND_S, lock_s=lock_s, lock=LOCK))

    def read(self, work: Callable[[Connection], T]) -> T:
        mode = "ISOLATION LEVEL REPEATABLE READ READ ONLY"  # all queries of a report see the same rows
        return self._reader.transaction(work, How(READ_S, mode=mode))

    # Rows of the log.

    def write_rows(self, rows: Sequence[Row]) -> int:
        try:
            lost = self._add(rows)
        except UNSTORABLE:  # one such row must not hold up all others
            good = [row for row in rows if is_storable(row.values())]
            lost = len(rows) - len(good) + self._add(good)
        except DatabaseRefused as error:
            self._turn(refused=True, why=str(error))
            raise
        self._turn(refused=False)
        return lost

    def _add(self, rows: Sequence[Row]) -> int:
        self._batch += 1
        number = self._batch

        def work(session: Session) -> None:
            self._clear_doubt(session)
            left = [row for row in rows if id(row) not in self._are_in]
            values = [tuple(map(storable, row.values())) for row in left]
            session.execute(
                "INSERT INTO log_writers (writer, batch) VALUES (?, ?) "
                "ON CONFLICT (writer) DO UPDATE SET batch = EXCLUDED.batch, written_at = now()",
                (self._name, number),
            )
            self._in_doubt = number, left
            session.copy("requests", ROW_COLUMNS, values)

        try:
            self._writer.transaction(work, How(COMMAND_S))
        except (DatabaseRefused, *UNSTORABLE):  # rolled back: nothing of this batch is in
            if self._in_doubt is not None and self._in_doubt[0] == number:
                self._in_doubt = None
            raise
        self._in_doubt = None
        self._are_in.clear()
        return 0

    def _clear_doubt(self, session: Session) -> None:
        """Find out whether the batch in doubt is in. While its old transaction lives this waits for its lock."""
        if self._in_doubt is None:
            return
        number, rows = self._in_doubt
        found = session.execute("SELECT batch FROM log_writers WHERE writer = ? FOR UPDATE", (self._name,)).fetchone()
        if found is not None and found[0] == number:
            self._are_in |= {id(row): row for row in rows}
        self._in_doubt = None

    # What the operator is told.

    def on_turn(self, say: Callable[[bool, str], None]) -> None:
        self._starting = False
        self._say = say
        self._breaker.on_turn(say)

    def _turn(self, *, refused: bool, why: str = "") -> None:
        """A server that answers and takes no rows (a full disk, a missing right) is said once, too."""
        if refused is not self._refused:
            self._refused = refused
            self._say(not refused, why)

    @property
    def is_up(self) -> bool | None:
        return self._breaker.is_closed and not self._refused

    async def follow(self, changed: Callable[[], Coroutine[Any, Any, object]]) -> None:
        await followed(self._address, self._breaker, changed)

    def close(self) -> None:
        self._writer.close()

    def close_reading(self) -> None:
        self._reader.close()
