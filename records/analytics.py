"""What the request log says of a window of time, for the operator's charts and tables.

Rows are attempts; a request is what shares a `request_id`, and its outcome is that of its last attempt. Times are of
successes only, and not of answers from memory. Drills count nowhere. Everything is worked out by the database, asked
from the store's reading thread; `since` bounds every query and is served by the index on `created_at`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from records.clients import client_names
from records.connection import Connection
from records.rows import iso

HOUR_S, DAY_S = 3600, 86_400
REPORT_LONG_S = 1.0
REPORT_SHARE = 0.05  # of the time, at most, for a report that takes so long
# How far back, and how much time one point of the charts stands for: 24 to 30 points each.
WINDOWS: Mapping[str, tuple[int, int]] = {
    "24h": (DAY_S, HOUR_S),
    "7d": (7 * DAY_S, 6 * HOUR_S),
    "30d": (30 * DAY_S, DAY_S),
    "90d": (90 * DAY_S, 3 * DAY_S),
}
COUNTS = ("successes", "errors", "cancelled", "input_tokens", "output_tokens")
# Cancelled attempts are shown, and count in nothing else (SPEC 8.6).
TOKENS = ", ".join(
    f"COALESCE(SUM(CASE WHEN status <> 'cancelled' THEN {name} END), 0) AS {name}"
    for name in ("input_tokens", "output_tokens")
)
COUNTED = f"""
    COUNT(*) FILTER (WHERE status = 'success') AS successes, COUNT(*) FILTER (WHERE status = 'error') AS errors,
    COUNT(*) FILTER (WHERE status = 'cancelled') AS cancelled, {TOKENS}"""
# In SQLite the other columns beside MAX() are those of its row.
LAST_ATTEMPTS = """(
    SELECT MAX(id), status, created_at FROM requests WHERE created_at >= :since AND drill = 0 GROUP BY request_id
) AS last"""
NONE = (None, None)
BUCKET = "CAST((julianday(created_at) - julianday(:start)) * 86400 / :step AS INTEGER)"
PER_MODEL, PER_PLATFORM, PER_CLIENT, ALL = ("platform", "model_id"), ("platform",), ("client",), ("1",)


class Reports:
    """The last report of each window, kept only where it took long: an open dashboard asks every ten seconds, and over
    a million rows a report takes fifteen."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[dict[str, Any], float]] = {}  # window: its report, and until when

    def kept(self, window: str, now: float) -> dict[str, Any] | None:
        report, until = self._kept.get(window, (None, now))
        return report if now < until else None

    def keep(self, window: str, report: dict[str, Any], began: float, ended: float) -> None:
        spent_s = ended - began
        self._kept[window] = report, ended + spent_s / REPORT_SHARE if spent_s > REPORT_LONG_S else ended


def analytics(db: Connection, window: str, utc: float) -> dict[str, Any]:
    """Totals, the same by model, platform and client, and a series over time, in the contract's shape."""
    length_s, step_s = WINDOWS[window]
    since = utc - length_s
    start = since - since % step_s
    bound = {"since": iso(since), "start": iso(start), "step": step_s}
    return {
        "window": window,
        "totals": totals(db, bound),
        "by_model": grouped(db, PER_MODEL, bound),
        "by_platform": grouped(db, PER_PLATFORM, bound),
        "by_client": by_client(db, bound),
        "series": series(db, bound, start, step_s, utc),
    }


def totals(db: Connection, bound: Mapping[str, Any]) -> dict[str, Any]:
    requests, successes, errors, cancelled = db.execute(
        "SELECT COUNT(*), COUNT(*) FILTER (WHERE status = 'success'), COUNT(*) FILTER (WHERE status = 'error'), "
        f"COUNT(*) FILTER (WHERE status = 'cancelled') FROM {LAST_ATTEMPTS}",
        bound,
    ).fetchone()
    tokens = db.execute(f"SELECT {TOKENS} FROM requests WHERE created_at >= :since AND drill = 0", bound).fetchone()
    latency = percentiles(db, ALL, "latency_ms", bound).get((1,), NONE)
    ttfb = percentiles(db, ALL, "ttfb_ms", bound).get((1,), NONE)
    return {
        "requests": requests,
        "successes": successes,
        "errors": errors,
        "cancelled": cancelled,
        "input_tokens": tokens[0],
        "output_tokens": tokens[1],
        "p50_ms": latency[0],
        "p95_ms": latency[1],
        "ttfb_p50_ms": ttfb[0],
        "ttfb_p95_ms": ttfb[1],
    }


def grouped(db: Connection, columns: tuple[str, ...], bound: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Attempts by these columns, most used first."""
    by, order = ", ".join(columns), ", ".join(f"{column} NULLS FIRST" for column in columns)
    rows = db.execute(
        f"SELECT {by}, COUNT(*) AS attempts, {COUNTED} FROM requests "
        f"WHERE created_at >= :since AND drill = 0 AND platform IS NOT NULL GROUP BY {by} "
        f"ORDER BY attempts DESC, {order}",
        bound,
    ).fetchall()
    latency, ttfb = (percentiles(db, columns, measure, bound) for measure in ("latency_ms", "ttfb_ms"))
    entries = []
    for row in rows:
        group = row[: len(columns)]
        p50, p95 = latency.get(group, NONE)
        ttfb_p50, ttfb_p95 = ttfb.get(group, NONE)
        entry = dict(zip((*columns, "attempts", *COUNTS), row, strict=True))
        entries.append(entry | {"p50_ms": p50, "p95_ms": p95, "ttfb_p50_ms": ttfb_p50, "ttfb_p95_ms": ttfb_p95})
    return entries


def by_client(db: Connection, bound: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Attempts of each client key; client null is the gateway's own key."""
    names = client_names(db)
    return [{**entry, "name": names.get(entry["client"])} for entry in grouped(db, PER_CLIENT, bound)]


def percentiles(
    db: Connection, columns: tuple[str, ...], measure: str, bound: Mapping[str, Any]
) -> dict[tuple[Any, ...], tuple[int, int]]:
    """Median and 95th percentile of the successes in each group: the smallest value that so many do not exceed."""
    groups = [f"g{number}" for number in range(len(columns))]
    named = ", ".join(f"{column} AS {group}" for column, group in zip(columns, groups, strict=True))
    by = ", ".join(groups)
    query = f"""
        WITH counted AS (
            SELECT {named}, {measure} AS value, COUNT(*) AS occurred FROM requests
            WHERE created_at >= :since AND status = 'success' AND cached = 0 AND drill = 0 AND {measure} IS NOT NULL
            GROUP BY {by}, value
        ), ranked AS (
            SELECT {by}, value, SUM(occurred) OVER (PARTITION BY {by} ORDER BY value) AS place,
                   SUM(occurred) OVER (PARTITION BY {by}) AS size
            FROM counted
        )
        SELECT {by}, MIN(CASE WHEN place >= size * 0.5 THEN value END),
               MIN(CASE WHEN place >= size * 0.95 THEN value END)
        FROM ranked GROUP BY {by}"""
    return {row[:-2]: (row[-2], row[-1]) for row in db.execute(query, bound)}


def series(db: Connection, bound: Mapping[str, Any], start: float, step_s: int, utc: float) -> list[dict[str, Any]]:
    """One entry for each step of the window, also where nothing happened; the first and last are incomplete."""
    requests = {
        place: (count, errors)
        for place, count, errors in db.execute(
            f"SELECT {BUCKET} AS place, COUNT(*), COUNT(*) FILTER (WHERE status = 'error') FROM {LAST_ATTEMPTS} "
            "GROUP BY place",
            bound,
        )
    }
    tokens = dict(
        db.execute(
            f"SELECT {BUCKET} AS place, COALESCE(SUM(output_tokens), 0) FROM requests "
            "WHERE created_at >= :since AND status <> 'cancelled' AND drill = 0 GROUP BY place",
            bound,
        ).fetchall()
    )
    latency = percentiles(db, (BUCKET,), "latency_ms", bound)
    last = max(int((utc - start) // step_s), max(requests, default=0))  # a clock that was ahead has left later rows
    entries = []
    for place in range(min(last, 1000) + 1):
        count, errors = requests.get(place, (0, 0))
        entries.append(
            {
                "start": iso(start + place * step_s),
                "requests": count,
                "errors": errors,
                "output_tokens": tokens.get(place, 0),
                "p50_ms": latency.get((place,), NONE)[0],
            }
        )
    return entries
