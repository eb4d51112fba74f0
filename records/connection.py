"""What the records ask of a database: a connection that runs statements, and a backend for the store.

Statements are written once, in words that SQLite and PostgreSQL both understand, with `?` or `:name` for what is bound.
Where the two have no words in common the statement is SQLite's, and records/postgres_sql.py has the other's.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from records.rows import Row
from records.vault import Vault

T = TypeVar("T")


class DatabaseAway(Exception):
    """A database server does not answer. Its texts are for the operator and hold no password, like the next one's."""


class DatabaseRefused(Exception):
    """The server answered, and would not: nothing of the transaction has been kept."""


class Cursor(Protocol):
    @property
    def rowcount(self) -> int: ...
    @property
    def description(self) -> Any: ...
    def fetchone(self) -> Any: ...
    def fetchall(self) -> list[Any]: ...
    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """A sqlite3.Connection, or what runs statements as one does."""

    def execute(self, sql: str, parameters: Sequence[Any] | Mapping[str, Any] = ..., /) -> Cursor: ...


class Backend(Protocol):
    """One database. `open`, `write*` and `close` are called on the store's writing thread, `read` and the other two on
    its reading thread, `follow` in the event loop."""

    rows_at_once: int  # of the log, in one transaction

    def open(self) -> Vault:
        """Bring the schema up to date. Raises StoreError."""

    def open_reading(self) -> None: ...

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run in a transaction that no other of its kind overlaps."""

    def write_rows(self, rows: Sequence[Row]) -> int:
        """Add these to the log, all of them or none; gives how many cannot be stored at all and were left out."""

    def read(self, work: Callable[[Connection], T]) -> T: ...
    def close(self) -> None: ...
    def close_reading(self) -> None: ...

    async def follow(self, changed: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Call `changed` after each change that others have made to keys, models or clients, until cancelled."""

    def on_turn(self, say: Callable[[bool, str], None]) -> None:
        """From now on `say` when a server stops answering, and why, and when it answers again; from any thread."""

    @property
    def is_up(self) -> bool | None:
        """Whether the server answers; None where there is none."""
