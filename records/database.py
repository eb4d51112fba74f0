"""The database: one SQLite file, opened, migrated, written and read off the event loop.

One thread owns the connection that writes; a second one reads, so that a long query never holds up the log. Request
rows wait in a bounded queue and are written in batches, off the event loop; a locked or full database makes them wait
longer and never fails a request.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from records.migrations import MIGRATIONS, SCHEMA_VERSION
from records.rows import UNSTORABLE, Row, insert_each, insert_rows
from records.vault import StoreError, Vault, read_key_file

SCHEMA = Path(__file__).parent.parent / "schema.sql"
ROWS_MAX = 20_000  # waiting to be written; about 10 MB, and hours of a laptop's traffic
FLUSH_S = 0.04  # half of the 100 ms that a kill may cost (SPEC 12.2), the other half is for the write itself
RETRY_S = 0.5  # after a write that failed
CLOSE_S = 5.0  # for the last rows, when the database is locked while we stop
BUSY_MS = 250  # SQLite's own wait for another process's lock
T = TypeVar("T")
Connection = sqlite3.Connection  # for the types of what others hand to `write` and `read`
DatabaseError = sqlite3.Error  # what `write` and `read` raise when the database is locked, full or broken


class Store:
    """The database of one gateway. Construct it to open; `close` writes what is pending."""

    def __init__(self, path: Path, encryption_key: bytes | None) -> None:
        self.dropped = 0  # rows lost because the queue was full
        self._path = path
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="store-reader")
        self._rows: deque[Row] = deque()
        self._taken = 0  # of them, by the writer
        self._timer: asyncio.TimerHandle | None = None
        self._writing: Future[int] | None = None
        self._owed: dict[Hashable, Callable[[sqlite3.Connection], object]] = {}  # the writer's; see write_later
        try:
            self._db: sqlite3.Connection = self._writer.submit(self._open, encryption_key).result()
            self._read_db: sqlite3.Connection = self._reader.submit(connect, path).result()
        except sqlite3.Error as error:
            self._stop_threads()
            raise StoreError(f"{path}: cannot be used as a database: {error}") from None
        except BaseException:
            self._stop_threads()
            raise

    # Opening: on the writer's thread, before anything is served.

    def _open(self, encryption_key: bytes | None) -> sqlite3.Connection:
        if not self._path.parent.is_dir():
            raise StoreError(f"{self._path}: the folder does not exist")
        db = connect(self._path)
        try:
            self.vault = self._unlock(db, encryption_key)
            db.execute("PRAGMA journal_mode = WAL")
            migrate(db, self.vault)
        except BaseException:
            db.close()
            raise
        return db

    def _unlock(self, db: sqlite3.Connection, encryption_key: bytes | None) -> Vault:
        """The vault for this file. Proves the key on what is stored before anything is written."""
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise StoreError(f"{self._path}: made by a newer version of the gateway (schema {version})")
        sealed = []
        if version:
            sealed = [row[0] for row in db.execute("SELECT value FROM settings WHERE key = 'key_check'")]
        key_file = self._path.with_name(self._path.name + ".key")
        if encryption_key is None:
            encryption_key = read_key_file(key_file, must_exist=bool(sealed))
        vault = Vault(encryption_key)
        for value in sealed:
            vault.unseal(value)
        return vault

    # Reading and writing on behalf of the event loop.

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run on the writer's thread, in one transaction, after the rows that are pending now."""
        self._submit()
        return await asyncio.wrap_future(self._writer.submit(self._transaction, work))

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return await asyncio.wrap_future(self._reader.submit(lambda: work(self._read_db)))

    def write_now(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`write` for the start, before there is an event loop."""
        return self._writer.submit(self._transaction, work).result()

    def write_later(self, name: Hashable, work: Callable[[sqlite3.Connection], object]) -> None:
        """`write` without waiting. If the database is locked or full the work is kept and done before the next write of
        any kind; newer work of the same name replaces it."""
        self._writer.submit(self._owe, name, work)

    def _owe(self, name: Hashable, work: Callable[[sqlite3.Connection], object]) -> None:
        in_time = not self._owed
        self._owed.pop(name, None)
        self._owed[name] = work
        if in_time:
            with suppress(sqlite3.Error):
                self._transaction(lambda db: None)

    def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with transaction(self._db) as db:
            for owed in self._owed.values():
                with suppress(*UNSTORABLE):  # it must not block the rest
                    owed(db)
            done = work(db)
        self._owed.clear()
        return done

    def _write_rows(self, rows: Sequence[Row]) -> int:
        """Gives how many rows SQLite cannot hold and were left out: one such row must not block all others."""
        try:
            self._transaction(lambda db: insert_rows(db, rows))
            return 0
        except UNSTORABLE:
            return self._transaction(lambda db: insert_each(db, rows))

    # The request log.

    @property
    def pending(self) -> int:
        return len(self._rows) + self._taken

    def log(self, row: Row) -> None:
        """Queue one row. Never blocks; when the queue is full the oldest row is lost and counted."""
        if len(self._rows) >= ROWS_MAX:
            self._rows.popleft()
            self.dropped += 1
        self._rows.append(row)
        self._arm(FLUSH_S)

    async def flush(self) -> None:
        """Wait until the rows queued so far have been tried."""
        await self._tried()  # which does not hold what has been queued since it began
        self._submit()
        await self._tried()

    async def _tried(self) -> None:
        """Wait for the batch that is being written. Its failure is dealt with by `_written`, not here."""
        if self._writing is not None:
            (done,), _ = await asyncio.wait([asyncio.wrap_future(self._writing)])
            done.exception()  # retrieved, or asyncio would log it

    def _arm(self, delay_s: float) -> None:
        if self._timer is None and self._writing is None:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._submit)

    def _submit(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._writing is not None or not self._rows:
            return
        rows = list(self._rows)
        self._taken = len(rows)
        self._rows.clear()
        loop = asyncio.get_running_loop()
        self._writing = self._writer.submit(self._write_rows, rows)
        self._writing.add_done_callback(lambda done: loop.call_soon_threadsafe(self._written, done, rows))

    def _written(self, done: Future[int], rows: list[Row]) -> None:
        self._writing, self._taken = None, 0
        failed = done.exception() is not None
        if not failed:
            self.dropped += done.result()
        else:
            self._rows.extendleft(reversed(rows))
            while len(self._rows) > ROWS_MAX:
                self._rows.popleft()
                self.dropped += 1
        if self._rows:
            self._arm(RETRY_S if failed else FLUSH_S)

    async def close(self) -> None:
        """Write what is pending, within a limit, and let go of the file."""
        deadline = time.monotonic() + CLOSE_S
        while self._rows or self._writing is not None:
            self._submit()
            await self._tried()
            await asyncio.sleep(0)  # `_written` runs now
            if self._rows:
                if time.monotonic() > deadline:
                    self.dropped += len(self._rows)
                    self._rows.clear()
                    break
                await asyncio.sleep(0.05)
        if self._timer is not None:
            self._timer.cancel()
        for executor, db in ((self._reader, self._read_db), (self._writer, self._db)):
            await asyncio.wrap_future(executor.submit(db.close))
        self._stop_threads()

    def _stop_threads(self) -> None:
        self._writer.shutdown(wait=False)
        self._reader.shutdown(wait=False)


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


def ping(db: sqlite3.Connection) -> None:
    db.execute("SELECT 1 FROM settings LIMIT 1").fetchone()
