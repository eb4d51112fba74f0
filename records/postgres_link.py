"""One connection to PostgreSQL for one thread: statements in, rows out, and nothing that waits without a limit.

The store's threads are synchronous and asyncpg is not: a link has an event loop of its own, which runs while the thread
waits for an answer. Errors of the library are mapped here: a server that does not answer, or refuses, is DatabaseAway.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import asyncpg

from records.breaker import Breaker, Pass
from records.connection import DatabaseAway, DatabaseRefused
from records.postgres_sql import bound, plain, worded

T = TypeVar("T")
COMMAND_S = 2.0  # for each command of a transaction that writes, and for connecting; a healthy one takes milliseconds
READ_S = 15.0  # for a report: over a million rows it takes some seconds
EARLIER_S = 0.3  # by how much the server gives up before we do: then it is a slow statement, not a server that is away
CONNECT_S = 1.5  # for one of the hosts that an address may name; two of them are waited for
LATE_S = 0.2  # for an answer that has arrived and was not looked at
QUERY = re.compile(r"\s*(SELECT|WITH)\b")
# A server that is away, going away, or no place to write: none of these says anything of the statement.
AWAY = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.IdleInTransactionSessionTimeoutError,
)


@dataclass(frozen=True, slots=True)
class How:
    """Of a transaction. The server has the same limits, a little shorter."""

    command_s: float  # for each command
    lock_s: float = COMMAND_S / 2  # for each lock, the one in `lock` included
    lock: str = ""  # a statement that waits for a lock
    mode: str = ""

    def beginning(self) -> str:
        limits = {
            "lock_timeout": self.lock_s,
            "statement_timeout": self.command_s - EARLIER_S,
            "idle_in_transaction_session_timeout": 2 * COMMAND_S,  # a gateway that was stopped in the middle
        }
        settings = [f"SET LOCAL {name} = {round(limit * 1000)}" for name, limit in limits.items()]
        return "; ".join([f"BEGIN {self.mode}", settings[0], self.lock, *settings[1:]])


class Link:
    """Connects when it is first used, and anew after a failure."""

    def __init__(self, address: str, breaker: Breaker) -> None:
        self._address = address
        self._breaker = breaker
        self._loop = asyncio.new_event_loop()
        self._connection: asyncpg.Connection | None = None
        breaker.on_turn(self._turned)

    def transaction(self, work: Callable[[Session], T], how: How) -> T:
        """Raises DatabaseAway, DatabaseRefused, and whatever `work` raises."""
        given = self._breaker.enter(time.monotonic())
        if given is None:
            raise DatabaseAway(f"PostgreSQL is away ({self._breaker.why}) and is asked again every few seconds")
        try:
            self._begin(how)
        except AWAY as error:
            self._lost(given, error)
            raise DatabaseAway(f"PostgreSQL: {words(error)}") from None
        except (asyncpg.PostgresError, ValueError) as error:
            self._lost(given, error)
            raise DatabaseRefused(f"PostgreSQL: {words(error)}") from None
        try:
            done = work(Session(self, how.command_s))
            self.run(lambda db: db.execute("COMMIT"), COMMAND_S)
        except (OverflowError, ValueError):  # the library's too, before anything is sent: a value that cannot be held
            self._roll_back(given)
            raise
        except AWAY as error:
            self._lost(given, error)
            raise DatabaseAway(f"PostgreSQL: {words(error)}") from None
        except asyncpg.PostgresError as error:
            self._roll_back(given)
            raise DatabaseRefused(f"PostgreSQL: {words(error)}") from None
        except BaseException:
            self._roll_back(given)
            raise
        self._breaker.worked(given)
        return done

    def run(self, call: Callable[[Any], Coroutine[Any, Any, T]], limit_s: float) -> T:
        return self._loop.run_until_complete(in_time(call(self._connection), limit_s))

    def _begin(self, how: How) -> None:
        """A connection that has died while it was idle is no news: another one is made."""
        statements, limit_s = how.beginning(), how.lock_s + EARLIER_S
        if self._connection is not None and not self._connection.is_closed():
            try:
                self.run(lambda db: db.execute(statements), limit_s)
                return
            except TimeoutError:
                raise
            except AWAY:
                self._drop()
        self._connection = self._loop.run_until_complete(connect(self._address))
        self.run(lambda db: db.execute(statements), limit_s)

    def _roll_back(self, given: Pass) -> None:
        """The server answered; what went wrong is the statement's or the caller's."""
        try:
            self.run(lambda db: db.execute("ROLLBACK"), COMMAND_S)
        except (*AWAY, asyncpg.PostgresError) as error:
            self._lost(given, error)
        else:
            self._breaker.worked(given)

    def _lost(self, given: Pass, error: BaseException) -> None:
        self._drop()
        self._breaker.failed(given, words(error), time.monotonic())

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None

    def _turned(self, up: bool, why: str) -> None:
        """Another connection has found the server away: what runs on this one is not waited for."""
        connection = self._connection
        if not up and connection is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(connection.terminate)

    def close(self) -> None:
        if self._connection is not None and not self._connection.is_closed():
            with suppress(*AWAY, asyncpg.PostgresError):
                self.run(lambda db: db.close(), EARLIER_S)
        self._drop()
        self._loop.run_until_complete(asyncio.sleep(0))  # what was scheduled by `terminate`
        self._loop.close()


class Session:
    """A Connection in the sense of the records, for the length of one transaction."""

    def __init__(self, link: Link, limit_s: float) -> None:
        self._link = link
        self._limit_s = limit_s

    def execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = (), /) -> Result:
        text, names = worded(sql)
        values = bound(names, parameters)
        if QUERY.match(text):
            return Result(self._link.run(lambda db: db.fetch(text, *values), self._limit_s))
        return Result(status=self._link.run(lambda db: db.execute(text, *values), self._limit_s))

    def script(self, text: str) -> None:
        """Several statements, as they are."""
        self._link.run(lambda db: db.execute(text), self._limit_s)

    def copy(self, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self._link.run(lambda db: db.copy_records_to_table(table, columns=columns, records=rows), self._limit_s)


class Result:
    """A Cursor in the sense of the records; all rows have been read."""

    def __init__(self, records: Sequence[Any] = (), status: str = "") -> None:
        self.description = [(name,) for name in records[0].keys()] if records else []  # noqa: SIM118
        self._rows = iter([tuple(map(plain, record)) for record in records])
        affected = status.rpartition(" ")[2]
        self.rowcount = int(affected) if affected.isdigit() else -1

    def fetchone(self) -> Any:
        return next(self._rows, None)

    def fetchall(self) -> list[Any]:
        return list(self._rows)

    def __iter__(self) -> Iterator[Any]:
        return self._rows


async def connect(address: str) -> asyncpg.Connection:
    """No statements are kept prepared and nothing is set for the session, so that a pooler may stand between."""
    calling = asyncpg.connect(
        address, timeout=CONNECT_S, statement_cache_size=0, server_settings={"application_name": "freeway"}
    )
    return await in_time(calling, 2 * CONNECT_S)


async def in_time(command: Coroutine[Any, Any, T], limit_s: float) -> T:
    """The command's result. On a busy machine it may be we who are late: then the answer is there already, and an
    ordinary timeout would take the server for one that is away."""
    running = asyncio.ensure_future(command)
    try:
        for wait_s in (limit_s, LATE_S):
            await asyncio.wait([running], timeout=wait_s)
            if running.done():
                return running.result()
        raise TimeoutError
    finally:
        running.cancel()


def words(error: BaseException) -> str:
    """What went wrong in one line. An error in the address itself would quote from it."""
    if isinstance(error, ValueError):
        return "the address cannot be understood"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return " ".join(str(error).split())[:300] or type(error).__name__
