"""The store: what survives a gateway, written and read off the event loop.

One thread writes; a second one reads, so that a long query never holds up the log. Request rows wait in a bounded queue
and are written in batches; a database that is locked, full or away makes them wait longer and never fails a request.
Which database it is, a SQLite file or a PostgreSQL that gateways share, is the backend's affair.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from records.cipher import MakeCipher, local_cipher
from records.connection import Backend, Connection, DatabaseAway, DatabaseRefused
from records.rows import UNSTORABLE, Row
from records.sqlite import ROWS_MAX, SQLite, SQLiteError
from records.vault import StoreError

FLUSH_S = 0.04  # half of the 100 ms that a kill may cost (SPEC 12.2), the other half is for the write itself
RETRY_S = 0.5  # after a write that failed
CLOSE_S = 5.0  # for the last rows, when the database is locked while we stop
T = TypeVar("T")
# What `write` and `read` raise when the database is locked, full, broken or away.
DatabaseError: tuple[type[Exception], ...] = (SQLiteError, DatabaseAway, DatabaseRefused)


class Store:
    """The database of one gateway. Construct it to open; `close` writes what is pending."""

    def __init__(
        self,
        path: Path,
        encryption_key: bytes | None,
        address: str | None = None,
        make_cipher: MakeCipher = local_cipher,
    ) -> None:
        """`address` is that of a PostgreSQL to use instead of the file (SPEC 20.2)."""
        self.dropped = 0  # rows lost because the queue was full
        self.backend = backend_of(path, encryption_key, address, make_cipher)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="store-reader")
        self._rows: deque[Row] = deque()
        self._taken = 0  # of them, by the writer
        self._timer: asyncio.TimerHandle | None = None
        self._writing: Future[int] | None = None
        self._owed: dict[Hashable, Callable[[Connection], object]] = {}  # the writer's; see write_later
        try:
            self.vault = self._writer.submit(self.backend.open).result()
            self._reader.submit(self.backend.open_reading).result()
        except BaseException:
            self._stop_threads()
            raise

    # Reading and writing on behalf of the event loop.

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Run on the writer's thread, in one transaction, after the rows that are pending now."""
        self._submit()
        return await asyncio.wrap_future(self._writer.submit(self._transaction, work))

    async def read(self, work: Callable[[Connection], T]) -> T:
        return await asyncio.wrap_future(self._reader.submit(self.backend.read, work))

    def write_now(self, work: Callable[[Connection], T]) -> T:
        """`write` for the start, before there is an event loop."""
        return self._writer.submit(self._transaction, work).result()

    def write_later(self, name: Hashable, work: Callable[[Connection], object]) -> None:
        """`write` without waiting. If the database is locked, full or away the work is kept and done before the next
        write of any kind; newer work of the same name replaces it."""
        self._writer.submit(self._owe, name, work)

    def _owe(self, name: Hashable, work: Callable[[Connection], object]) -> None:
        in_time = not self._owed
        self._owed.pop(name, None)
        self._owed[name] = work
        if in_time:
            with suppress(*DatabaseError):
                self._transaction(lambda db: None)

    def _transaction(self, work: Callable[[Connection], T]) -> T:
        def all_of_it(db: Connection) -> T:
            for owed in self._owed.values():
                with suppress(*UNSTORABLE):  # it must not block the rest
                    owed(db)
            return work(db)

        done = self.backend.write(all_of_it)
        self._owed.clear()
        return done

    def _write_rows(self, rows: Sequence[Row]) -> int:
        if self._owed:
            self._transaction(lambda db: None)
        return self.backend.write_rows(rows)

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
        if self._timer is None:
            self._arm(FLUSH_S)

    async def flush(self) -> None:
        """Wait until the rows queued so far have been tried."""
        await self._tried()  # which does not hold what has been queued since it began
        for _ in range(0, len(self._rows), self.backend.rows_at_once):
            self._submit()
            if not await self._tried():
                break

    async def _tried(self) -> bool:
        """Wait for the batch that is being written; gives whether it was. A failure is dealt with by `_written`."""
        if self._writing is None:
            return True
        (done,), _ = await asyncio.wait([asyncio.wrap_future(self._writing)])
        return done.exception() is None  # retrieved, or asyncio would log it

    def _arm(self, delay_s: float) -> None:
        if self._timer is None and self._writing is None:
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._submit)

    def _submit(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._writing is not None or not self._rows:
            return
        self._taken = min(len(self._rows), self.backend.rows_at_once)
        rows = [self._rows.popleft() for _ in range(self._taken)]
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
        """Write what is pending, within a limit, and let go of the database."""
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
        await asyncio.wrap_future(self._reader.submit(self.backend.close_reading))
        await asyncio.wrap_future(self._writer.submit(self.backend.close))
        self._stop_threads()

    def _stop_threads(self) -> None:
        self._writer.shutdown(wait=False)
        self._reader.shutdown(wait=False)


def backend_of(
    path: Path, encryption_key: bytes | None, address: str | None, make_cipher: MakeCipher = local_cipher
) -> Backend:
    """The file, or the PostgreSQL at this address."""
    if address is None:
        return SQLite(path, encryption_key, make_cipher)
    made: Backend = postgres_at(address, path, encryption_key, make_cipher)
    return made


def postgres_at(address: str, path: Path, encryption_key: bytes | None, make_cipher: MakeCipher = local_cipher) -> Any:
    """Loaded only where it is wanted: its library is an extra."""
    try:
        return import_module("records.postgres").Postgres(address, path, encryption_key, make_cipher)
    except ModuleNotFoundError as error:
        raise StoreError(f"GATEWAY_LOG needs the package {error.name}: pip install -r requirements-scale.txt") from None


def ping(db: Connection) -> None:
    db.execute("SELECT 1 FROM settings LIMIT 1").fetchone()
