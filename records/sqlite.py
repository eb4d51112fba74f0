"""The SQLite file that a gateway keeps its records in unless told otherwise: opened, migrated, written and read.

Each of the store's two threads has a connection, so that a long query never holds up the log.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from records.cipher import MakeCipher, local_cipher
from records.connection import Connection
from records.migrations import MIGRATIONS, SCHEMA_VERSION
from records.rows import UNSTORABLE, Row, insert_each, insert_rows
from records.vault import StoreError, Vault, unlocked

SCHEMA = Path(__file__).parent.parent / "schema.sql"
ROWS_MAX = 20_000  # waiting to be written; about 10 MB, and hours of a laptop's traffic
BUSY_MS = 250  # SQLite's own wait for another process's lock
T = TypeVar("T")
SQLiteError = sqlite3.Error  # what `write` and `read` raise when the file is locked, full or broken


class SQLite:
    """Backend of one file."""

    rows_at_once = ROWS_MAX

    def __init__(self, path: Path, encryption_key: bytes | None, make_cipher: MakeCipher = local_cipher) -> None:
        self._path = path
        self._encryption_key = encryption_key
        self._make_cipher = make_cipher
        self._db: sqlite3.Connection  # the writer's
        self._read_db: sqlite3.Connection

    def open(self) -> Vault:
        try:
            return self._open()
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def open_reading(self) -> None:
        try:
            self._read_db = connect(self._path)
        except sqlite3.Error as error:
            raise self._unusable(error) from None

    def _unusable(self, error: sqlite3.Error) -> StoreError:
        return StoreError(f"{self._path}: cannot be used as a database: {error}")

    def _open(self) -> Vault:
        if not self._path.parent.is_dir():
            raise StoreError(f"{self._path}: the folder does not exist")
        db = connect(self._path)
        try:
            vault = self._unlock(db)
            db.execute("PRAGMA journal_mode = WAL")
            migrate(db, vault)
        except BaseException:
            db.close()
            raise
        self._db = db
        return vault

    def _unlock(self, db: sqlite3.Connection) -> Vault:
        """The vault for this file. Proves the key on what is stored before anything is written."""
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise StoreError(f"{self._path}: made by a newer version of the gateway (schema {version})")
        sealed = []
        if version:
            sealed = [row[0] for row in db.execute("SELECT value FROM settings WHERE key = 'key_check'")]
        return unlocked(sealed, self._encryption_key, self._path, self._make_cipher)

    def write(self, work: Callable[[Connection], T]) -> T:
        with transaction(self._db) as db:
            return work(db)

    def write_rows(self, rows: Sequence[Row]) -> int:
        try:
            with transaction(self._db) as db:
                insert_rows(db, rows)
            return 0
        except UNSTORABLE:  # one such row must not hold up all others
            with transaction(self._db) as db:
                return insert_each(db, rows)

    def read(self, work: Callable[[Connection], T]) -> T:
        return work(self._read_db)

    def close(self) -> None:
        self._db.close()

    def close_reading(self) -> None:
        self._read_db.close()

    async def follow(self, changed: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Nobody else changes a gateway's own file."""

    def on_turn(self, say: Callable[[bool, str], None]) -> None:
        """A file does not go away."""

    @property
    def is_up(self) -> bool | None:
        return None


def connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_MS / 1000, isolation_level=None)
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA synchronous = NORMAL")  # in WAL mode a kill loses nothing committed; a power cut may
    db.execute("PRAGMA cache_size = -256")  # KB, of 2 MB: rows are added at the end and read in passes, in no less time
    return db


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite has rolled back by itself when the disk is full
            db.execute("ROLLBACK")
        raise


def migrate(db: sqlite3.Connection, vault: Vault) -> None:
    """Bring the file to today's schema: all of it at once when it is new, else step by step."""
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if not version:
        with transaction(db):
            run_script(db, SCHEMA.read_text())
            db.execute("INSERT INTO settings VALUES ('key_check', ?)", (vault.seal("freeway"),))
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        return
    db.execute("PRAGMA foreign_keys = OFF")  # else DROP TABLE deletes what refers to the table; no transaction can
    for number in range(version, SCHEMA_VERSION):
        with transaction(db):
            run_script(db, MIGRATIONS[number - 1])
            if db.execute("PRAGMA foreign_key_check").fetchone() is not None:
                raise sqlite3.IntegrityError(f"migration {number} left rows that refer to nothing")
            db.execute(f"PRAGMA user_version = {number + 1}")
    db.execute("PRAGMA foreign_keys = ON")


def run_script(db: sqlite3.Connection, script: str) -> None:
    """Like executescript(), which would commit our transaction first."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""
