"""What survives a restart: SQLite, and the credentials encrypted in it.

One thread owns the connection that writes; a second one reads, so that a long query never holds up the log. Request
rows wait in a bounded queue and are written in batches, off the event loop; a locked or full database makes them wait
longer and never fails a request. The only sqlite3 and cryptography.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from catalog import Catalog, Key, KeyStatus, Model, Platform
from scores import Stats

SCHEMA = Path(__file__).with_name("schema.sql")
MIGRATIONS: Sequence[str] = ()  # the n-th brings a file from user_version n to n + 1; a fresh file starts at the last
SCHEMA_VERSION = 1 + len(MIGRATIONS)
ROWS_MAX = 20_000  # waiting to be written; about 10 MB, and hours of a laptop's traffic
FLUSH_S = 0.04  # half of the 100 ms that a kill may cost (SPEC 12.2), the other half is for the write itself
RETRY_S = 0.5  # after a write that failed
CLOSE_S = 5.0  # for the last rows, when the database is locked while we stop
BUSY_MS = 250  # SQLite's own wait for another process's lock
TAG_BYTES, IV_BYTES = 16, 12
T = TypeVar("T")
Connection = sqlite3.Connection  # for the types of what others hand to `write` and `read`
UNSTORABLE = (OverflowError, ValueError, sqlite3.InterfaceError, sqlite3.ProgrammingError, sqlite3.DataError)
DatabaseError = sqlite3.Error  # what `write` and `read` raise when the database is locked, full or broken


class StoreError(Exception):
    """The database cannot be used; the text is one line for the operator."""


@dataclass(slots=True)
class Row:
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

    def values(self) -> tuple[Any, ...]:
        return (iso(self.created_at), *OTHER_COLUMNS_OF(self))


ROW_COLUMNS = ("created_at", *(f.name for f in fields(Row) if f.name != "created_at"))
OTHER_COLUMNS_OF = attrgetter(*ROW_COLUMNS[1:])
INSERT_ROWS = f"INSERT INTO requests ({', '.join(ROW_COLUMNS)}) VALUES "
ONE_ROW = f"({', '.join('?' * len(ROW_COLUMNS))})"
# Rows of one statement. sqlite3 gives the interpreter's lock away at every step, and while requests keep the event loop
# busy each return costs 5 ms, so that row by row 200 a second would be the most. A few sizes, so that each statement is
# compiled once; 64 rows stay far below SQLite's 32,766 parameters.
ROWS_AT_ONCE = (64, 8, 1)

# Recency: a row weighs 1 now and 0 at the window's far end (SPEC 10.1). One pass, the window bound once.
STATS_QUERY = """
WITH weighed AS (
    SELECT platform, model_id, status, output_tokens, latency_ms, ttfb_ms,
           MIN(1.0, MAX(0.0, 1.0 - (julianday('now') - julianday(created_at)) / :days)) AS weight
    FROM requests
    WHERE created_at >= strftime('%Y-%m-%dT%H:%M:%fZ', julianday('now') - :days)
      AND platform IS NOT NULL AND status <> 'cancelled'
)
SELECT platform, model_id,
       SUM(weight) AS total,
       SUM(CASE status WHEN 'success' THEN weight ELSE 0 END) AS successes,
       COUNT(*) AS raw_total,
       SUM(status = 'success') AS raw_successes,
       SUM(CASE status WHEN 'success' THEN output_tokens END) * 1000.0
           / NULLIF(SUM(CASE status WHEN 'success' THEN latency_ms END), 0) AS tok_per_sec,
       AVG(CASE status WHEN 'success' THEN ttfb_ms END) AS avg_ttfb_ms
FROM weighed
GROUP BY platform, model_id
"""


def iso(utc: float) -> str:
    """Seconds since 1970 as ISO-8601 with milliseconds and Z."""
    ms = int(utc * 1000)
    return f"{iso_second(ms // 1000)}.{ms % 1000:03}Z"


@lru_cache(maxsize=16)
def iso_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


class Vault:
    """AES-256-GCM with one key; encrypts credentials, and recognises them without reading them."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._cipher = AESGCM(key)

    def encrypt(self, secret: str) -> tuple[bytes, bytes, bytes]:
        """Ciphertext, iv, tag."""
        iv = secrets.token_bytes(IV_BYTES)
        sealed = self._cipher.encrypt(iv, secret.encode(), None)
        return sealed[:-TAG_BYTES], iv, sealed[-TAG_BYTES:]

    def decrypt(self, ciphertext: bytes, iv: bytes, tag: bytes) -> str:
        try:
            return self._cipher.decrypt(iv, ciphertext + tag, None).decode()
        except InvalidTag:
            raise StoreError(
                "ENCRYPTION_KEY (or the key file) is not the one this database was encrypted with. "
                "Nothing was changed; start with the right key, or with another database."
            ) from None

    def fingerprint(self, platform: str, secret: str) -> bytes:
        return hmac.digest(self._key, f"{platform}\0{secret}".encode(), "sha256")

    def seal(self, text: str) -> str:
        """For `settings`: ciphertext, iv and tag in one hex text."""
        return ".".join(part.hex() for part in self.encrypt(text))

    def unseal(self, sealed: str) -> str:
        ciphertext, iv, tag = (bytes.fromhex(part) for part in sealed.split("."))
        return self.decrypt(ciphertext, iv, tag)


def mask(secret: str) -> str:
    """What may be shown of a key: `gsk_…a1b2`."""
    if len(secret) < 12:
        return "…"
    prefix = secret[: secret.find("_") + 1] if 0 < secret.find("_") <= 5 else secret[:3]
    return f"{prefix}…{secret[-4:]}"


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
        """`write` without waiting. While the database takes nothing the work is owed, and done before whatever is
        written next, be it the log; work of the same name takes its place."""
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
                with suppress(*UNSTORABLE):  # like a row, it must not hold up the rest
                    owed(db)
            done = work(db)
        self._owed.clear()
        return done

    def _write_rows(self, rows: Sequence[Row]) -> int:
        """Gives how many had to be left out because SQLite cannot hold what is in them: such a row must not keep the
        others waiting for ever."""
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
        """Wait for the batch that is being written, whatever becomes of it: a log never fails who waits for it."""
        if self._writing is not None:
            (done,), _ = await asyncio.wait([asyncio.wrap_future(self._writing)])
            done.exception()  # `_written` deals with it

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
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if not version:
        with transaction(db):
            run_script(db, SCHEMA.read_text())
            db.execute("INSERT INTO settings VALUES ('key_check', ?)", (vault.seal("freeway"),))
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    for number in range(max(version, 1), SCHEMA_VERSION if version else 0):
        with transaction(db):
            run_script(db, MIGRATIONS[number - 1])
            db.execute(f"PRAGMA user_version = {number + 1}")


def run_script(db: sqlite3.Connection, script: str) -> None:
    """Like executescript(), which would commit our transaction first."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""


def read_key_file(path: Path, *, must_exist: bool) -> bytes:
    """The key in this file, which is made on first start, readable by its owner only."""
    try:
        text = path.read_text().strip()
    except FileNotFoundError:
        if must_exist:
            raise StoreError(
                f"{path} is missing, and the database holds what was encrypted with it. Nothing was changed; "
                "put the file back, or set ENCRYPTION_KEY."
            ) from None
        key = secrets.token_bytes(32)
        with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(key.hex() + "\n")
        return key
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"{path}: cannot be read: {error}") from None
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise StoreError(f"{path}: expected 64 hex digits (the content is not shown)")
    return key


def insert_rows(db: sqlite3.Connection, rows: Sequence[Row]) -> None:
    done = 0
    for size in ROWS_AT_ONCE:
        statement = INSERT_ROWS + ", ".join([ONE_ROW] * size)
        while len(rows) - done >= size:
            db.execute(statement, [value for row in rows[done : done + size] for value in row.values()])
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


# What the gateway asks of the database. Each is one transaction's work, for `write` or `read`.


def client_key(db: sqlite3.Connection, vault: Vault) -> tuple[str, bool]:
    """The API key kept in `settings`, and whether it was made just now."""
    row = db.execute("SELECT value FROM settings WHERE key = 'api_key'").fetchone()
    if row is not None:
        return vault.unseal(row[0]), False
    key = f"fw-{secrets.token_urlsafe(32)}"
    db.execute("INSERT INTO settings VALUES ('api_key', ?)", (vault.seal(key),))
    return key, True


def sync_models(db: sqlite3.Connection, models: Sequence[Model]) -> None:
    """Bring the tables to the catalogue's facts; what the user changed stays, what has gone is disabled (SPEC 2.1)."""
    known = {(row[1], row[2]): row[0] for row in db.execute("SELECT id, platform, model_id FROM models")}
    by_rank = sorted(models, key=lambda m: (m.intelligence_rank, m.speed_rank))  # stable: then catalogue order
    last = db.execute("SELECT COALESCE(MAX(priority), 0) FROM fallback_config").fetchone()[0]
    for model in by_rank:
        facts = (
            model.name, model.intelligence_rank, model.speed_rank, model.context_window, model.rpm, model.rpd,
            model.tpm, model.tpd, model.tools, model.vision,
        )  # fmt: skip
        id = known.pop((model.platform.id, model.model_id), None)
        if id is not None:
            db.execute(
                "UPDATE models SET display_name = ?, intelligence_rank = ?, speed_rank = ?, context_window = ?, "
                "rpm_limit = ?, rpd_limit = ?, tpm_limit = ?, tpd_limit = ?, supports_tools = ?, supports_vision = ?, "
                "enabled = COALESCE(enabled_before, enabled), enabled_before = NULL WHERE id = ?",
                (*facts, id),
            )
            continue
        last += 1
        cursor = db.execute(
            "INSERT INTO models (display_name, intelligence_rank, speed_rank, context_window, rpm_limit, rpd_limit, "
            "tpm_limit, tpd_limit, supports_tools, supports_vision, platform, model_id) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*facts, model.platform.id, model.model_id),
        )
        db.execute("INSERT INTO fallback_config (model_db_id, priority) VALUES (?, ?)", (cursor.lastrowid, last))
    for id in known.values():
        db.execute(
            "UPDATE models SET enabled_before = enabled, enabled = 0 WHERE id = ? AND enabled_before IS NULL", (id,)
        )


def add_key(db: sqlite3.Connection, vault: Vault, platform: str, secret: str, label: str) -> int:
    """Store a key once; the same key of the same platform is the same row. Gives its id."""
    fingerprint = vault.fingerprint(platform, secret)
    row = db.execute(
        "SELECT id FROM api_keys WHERE platform = ? AND fingerprint = ?", (platform, fingerprint)
    ).fetchone()
    if row is not None:
        return int(row[0])
    ciphertext, iv, tag = vault.encrypt(secret)
    cursor = db.execute(
        "INSERT INTO api_keys (platform, label, encrypted_key, iv, auth_tag, fingerprint, created_at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (platform, label, ciphertext, iv, tag, fingerprint, iso(time.time())),
    )
    return int(cursor.lastrowid or 0)


def sync_file_keys(db: sqlite3.Connection, vault: Vault, given: Sequence[tuple[str, str, str]]) -> None:
    """Store (platform, secret, label) once; a key that a variable gave before is the file's from now on."""
    for platform, secret, label in given:
        id = add_key(db, vault, platform, secret, label)
        db.execute(
            "UPDATE api_keys SET label = ?, enabled = MAX(enabled, gone), gone = 0 WHERE id = ? AND label LIKE 'env:%'",
            (label, id),
        )


def sync_environment_keys(db: sqlite3.Connection, vault: Vault, given: Sequence[tuple[str, str, str]]) -> None:
    """Upsert (platform, secret, `env:NAME`); a key whose variable has gone is disabled until it comes back."""
    present = set()
    for platform, secret, label in given:
        id = add_key(db, vault, platform, secret, label)
        present.add(id)
        db.execute("UPDATE api_keys SET label = ? WHERE id = ? AND label LIKE 'env:%'", (label, id))
        db.execute("UPDATE api_keys SET enabled = 1, gone = 0 WHERE id = ? AND gone = 1", (id,))
    for (id,) in db.execute("SELECT id FROM api_keys WHERE label LIKE 'env:%'").fetchall():
        if id not in present:
            db.execute("UPDATE api_keys SET enabled = 0, gone = 1 WHERE id = ? AND enabled = 1", (id,))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The catalogue in force and the status of every enabled key."""

    catalog: Catalog
    key_status: dict[int, KeyStatus]


def load_snapshot(
    db: sqlite3.Connection, vault: Vault, platforms: Mapping[str, Platform], models: Sequence[Model]
) -> Snapshot:
    """Facts from the catalogue files; ids, switches, order and keys from the database."""
    state = {
        (platform, model_id): (id, bool(enabled), priority, bool(in_chain))
        for id, platform, model_id, enabled, priority, in_chain in db.execute(
            "SELECT m.id, m.platform, m.model_id, m.enabled, f.priority, f.enabled "
            "FROM models m JOIN fallback_config f ON f.model_db_id = m.id"
        )
    }
    placed = []
    for model in models:
        id, enabled, priority, in_chain = state[model.platform.id, model.model_id]
        placed.append(replace(model, id=id, enabled=enabled, priority=priority, in_chain=in_chain))
    keys, status = [], {}
    for id, platform, label, ciphertext, iv, tag, state_name in db.execute(
        "SELECT id, platform, label, encrypted_key, iv, auth_tag, status FROM api_keys WHERE enabled = 1 ORDER BY id"
    ):
        if platform in platforms:
            keys.append(Key(id, platform, vault.decrypt(ciphertext, iv, tag), label))
            status[id] = KeyStatus(state_name)
    return Snapshot(Catalog(platforms.values(), placed, keys), status)


def set_key_status(db: sqlite3.Connection, id: int, status: KeyStatus, last_error: str | None) -> None:
    db.execute("UPDATE api_keys SET status = ?, last_error = ? WHERE id = ?", (status, last_error, id))


def model_stats(db: sqlite3.Connection, window_days: int) -> dict[tuple[str, str], Stats]:
    """What the log says of each (platform, model_id) over the window."""
    return {
        (platform, model_id): Stats(
            successes=successes,
            total=total,
            raw_successes=raw_successes,
            raw_total=raw_total,
            tok_per_sec=tok_per_sec or 0.0,
            avg_ttfb_ms=avg_ttfb_ms,
        )
        for platform, model_id, total, successes, raw_total, raw_successes, tok_per_sec, avg_ttfb_ms in db.execute(
            STATS_QUERY, {"days": window_days}
        )
    }


def todays_use(db: sqlite3.Connection, utc: float) -> list[tuple[int, int, float, int, int]]:
    """(model, key, seconds ago, requests, tokens) of the limited models' attempts on this UTC day, oldest first; each
    attempt of the last minute stands for itself, the earlier ones are added up."""
    return [
        (model, key or 0, max(0.0, days_ago * 86_400), requests, tokens)
        for model, key, days_ago, requests, tokens in db.execute(
            "SELECT m.id, r.key_id, julianday(:now) - julianday(MAX(r.created_at)), COUNT(*), "
            "SUM(COALESCE(r.input_tokens, 0) + COALESCE(r.output_tokens, 0)) "
            "FROM requests r JOIN models m ON m.platform = r.platform AND m.model_id = r.model_id "
            "WHERE r.created_at >= :since AND COALESCE(m.rpm_limit, m.rpd_limit, m.tpm_limit, m.tpd_limit) IS NOT NULL "
            "GROUP BY m.id, r.key_id, CASE WHEN r.created_at >= :minute_ago THEN r.id END ORDER BY MAX(r.id)",
            {"now": iso(utc), "since": iso(min(utc - utc % 86_400, utc - 60)), "minute_ago": iso(utc - 60)},
        )
    ]


def delete_old_rows(db: sqlite3.Connection, retention_days: int) -> int:
    """Remove a slice of the rows past retention; gives how many, so that the caller goes on until none is left."""
    return db.execute(
        "DELETE FROM requests WHERE id IN (SELECT id FROM requests WHERE created_at < ? LIMIT 5000)",
        (iso(time.time() - retention_days * 86_400),),
    ).rowcount


FILTERS = {"status": "status", "platform": "platform", "model": "model_id", "request_id": "request_id"}


def list_requests(
    db: sqlite3.Connection, *, limit: int, before_id: int | None, filters: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Rows of the log, newest first; `filters` by the names of FILTERS."""
    conditions = ["id < ?"]
    bound: list[Any] = [before_id if before_id is not None else 2**62]
    for name, value in filters.items():
        conditions.append(f"{FILTERS[name]} = ?")
        bound.append(value)
    cursor = db.execute(
        f"SELECT * FROM requests WHERE {' AND '.join(conditions)} ORDER BY id DESC LIMIT ?",
        (*bound, limit),
    )
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor]


def ping(db: sqlite3.Connection) -> None:
    db.execute("SELECT 1 FROM settings LIMIT 1").fetchone()
