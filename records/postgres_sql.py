"""Statements as PostgreSQL wants them: how the records' SQL is put for it, and what its values are in return.

Pure. The records write for SQLite; the few pieces that only SQLite understands stand in WORDED, next to the same thing
in PostgreSQL's words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

from records.analytics import BUCKET, LAST_ATTEMPTS
from records.request_log import SINCE, WEIGHT

# julianday() is a function of ours in postgres.sql.
WORDED: Mapping[str, str] = {
    WEIGHT: "LEAST(1.0, GREATEST(0.0, 1.0 - (julianday('now') - julianday(created_at)) / :days))",
    SINCE: "to_char((now() - :days * interval '1 day') AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"')",
    BUCKET: "TRUNC((julianday(created_at) - julianday(:start)) * 86400 / :step)::integer",
    LAST_ATTEMPTS: """(
    SELECT DISTINCT ON (request_id) id, status, created_at FROM requests WHERE created_at >= :since AND drill = 0
    ORDER BY request_id, id DESC
) AS last""",
}
BOUND = re.compile(r"\?|(?<!:):([a-z_]+)")  # not the `::` of a cast
INTEGER_BITS = 63


@lru_cache(maxsize=256)  # statements are constants, but for the columns that some of them name
def worded(sql: str) -> tuple[str, tuple[str, ...]]:
    """The statement with `$1`, `$2`…, and the names of what is bound; without names it is bound by position."""
    for ours, theirs in WORDED.items():
        sql = sql.replace(ours, theirs)
    names: list[str] = []
    count = 0

    def numbered(found: re.Match[str]) -> str:
        nonlocal count
        name = found[1]
        if name is None:
            count += 1
            return f"${count}"
        if name not in names:
            names.append(name)
        return f"${names.index(name) + 1}"

    return BOUND.sub(numbered, sql), tuple(names)


def bound(names: Sequence[str], parameters: Sequence[Any] | Mapping[str, Any]) -> list[Any]:
    values = [parameters[name] for name in names] if isinstance(parameters, Mapping) else list(parameters)
    return [storable(value) for value in values]


def storable(value: Any) -> Any:
    """PostgreSQL's texts hold no NUL, and nothing stores half an emoji; a number beyond 64 bits raises."""
    if isinstance(value, str):
        return value.replace("\0", "\N{REPLACEMENT CHARACTER}")
    if isinstance(value, int) and not -(1 << INTEGER_BITS) <= value < 1 << INTEGER_BITS:
        raise OverflowError("a number beyond 64 bits")
    return value


def plain(value: Any) -> Any:
    """A value as SQLite gives it: sums of whole numbers are whole."""
    if isinstance(value, Decimal):
        return int(value) if value.as_tuple().exponent == 0 else float(value)
    return value


def is_storable(values: Sequence[Any]) -> bool:
    """Whether a row of the log can be stored at all."""
    try:
        for value in values:
            if isinstance(storable(value), str):
                value.encode()
    except (OverflowError, UnicodeEncodeError):
        return False
    return True
