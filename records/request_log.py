"""What is asked of the request log: statistics for routing, what was used of quotas and limits, and pages of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from records.connection import Connection
from records.rows import iso
from routing.scores import Stats

# Recency: a row weighs 1 now and 0 at the window's far end (SPEC 10.1). One pass, the window bound once. Answers from
# memory and drills say nothing of a model, and while its health gate is open the gate alone judges it (SPEC 10.4).
WEIGHT = "MIN(1.0, MAX(0.0, 1.0 - (julianday('now') - julianday(created_at)) / :days))"
SINCE = "strftime('%Y-%m-%dT%H:%M:%fZ', julianday('now') - :days)"
STATS_QUERY = f"""
WITH weighed AS (
    SELECT platform, model_id, status, output_tokens, latency_ms, ttfb_ms,
           {WEIGHT} AS weight
    FROM requests
    WHERE created_at >= {SINCE}
      AND platform IS NOT NULL AND status <> 'cancelled' AND cached = 0 AND drill = 0
      AND uncounted = 0
)
SELECT platform, model_id,
       SUM(weight) AS total,
       SUM(CASE status WHEN 'success' THEN weight ELSE 0 END) AS successes,
       COUNT(*) AS raw_total,
       COUNT(*) FILTER (WHERE status = 'success') AS raw_successes,
       SUM(CASE status WHEN 'success' THEN output_tokens END) * 1000.0
           / NULLIF(SUM(CASE status WHEN 'success' THEN latency_ms END), 0) AS tok_per_sec,
       AVG(CASE status WHEN 'success' THEN ttfb_ms END) AS avg_ttfb_ms
FROM weighed
GROUP BY platform, model_id
"""


def model_stats(db: Connection, window_days: int) -> dict[tuple[str, str], Stats]:
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


def todays_use(db: Connection, utc: float) -> list[tuple[int, int, float, int, int]]:
    """(model, key, seconds ago, requests, tokens) of the limited models' attempts on this UTC day, oldest first; each
    attempt of the last minute stands for itself, the earlier ones are added up."""
    return [
        (model, key or 0, max(0.0, days_ago * 86_400), requests, tokens)
        for model, key, days_ago, requests, tokens in db.execute(
            "SELECT m.id, r.key_id, julianday(:now) - julianday(MAX(r.created_at)), COUNT(*), "
            "SUM(COALESCE(r.input_tokens, 0) + COALESCE(r.output_tokens, 0)) "
            "FROM requests r JOIN models m ON m.platform = r.platform AND m.model_id = r.model_id "
            "WHERE r.created_at >= :since AND r.cached = 0 "
            "AND COALESCE(m.rpm_limit, m.rpd_limit, m.tpm_limit, m.tpd_limit) IS NOT NULL "
            "GROUP BY m.id, r.key_id, CASE WHEN r.created_at >= :minute_ago THEN r.id END ORDER BY MAX(r.id)",
            {"now": iso(utc), "since": iso(min(utc - utc % 86_400, utc - 60)), "minute_ago": iso(utc - 60)},
        )
    ]


def use_since(db: Connection, utc: float) -> list[tuple[tuple[str, str, int], int, int]]:
    """((platform, model_id, key), attempts, tokens) since then. Answers from memory used nothing."""
    return [
        ((platform, model_id, key or 0), requests, tokens)
        for platform, model_id, key, requests, tokens in db.execute(
            "SELECT platform, model_id, key_id, COUNT(*), "
            "SUM(COALESCE(input_tokens, 0) + COALESCE(output_tokens, 0)) FROM requests "
            "WHERE created_at >= ? AND platform IS NOT NULL AND cached = 0 GROUP BY platform, model_id, key_id",
            (iso(utc),),
        )
    ]


def clients_use(db: Connection, utc: float) -> list[tuple[int, float, int, int]]:
    """(client, seconds ago, requests, tokens) of this UTC day, oldest first; each request of the last minute stands for
    itself. A request counts once, by its first attempt; one that asked nobody does not count."""
    return [
        (client, max(0.0, days_ago * 86_400), requests, tokens)
        for client, days_ago, requests, tokens in db.execute(
            "WITH asked AS ("
            "  SELECT client, request_id, MIN(created_at) AS began,"
            "  SUM(CASE cached WHEN 0 THEN COALESCE(input_tokens, 0) + COALESCE(output_tokens, 0) ELSE 0 END) AS spent"
            "  FROM requests WHERE created_at >= :since AND client IS NOT NULL AND (attempt > 0 OR cached = 1)"
            "  GROUP BY client, request_id"
            ") SELECT client, julianday(:now) - julianday(MAX(began)), COUNT(*), SUM(spent) FROM asked "
            "GROUP BY client, CASE WHEN began >= :minute_ago THEN request_id END ORDER BY MAX(began)",
            {"now": iso(utc), "since": iso(min(utc - utc % 86_400, utc - 60)), "minute_ago": iso(utc - 60)},
        )
    ]


def delete_old_rows(db: Connection, retention_days: int) -> int:
    """Remove a slice of the rows past retention; gives how many, so that the caller goes on until none is left."""
    return db.execute(
        "DELETE FROM requests WHERE id IN (SELECT id FROM requests WHERE created_at < ? LIMIT 5000)",
        (iso(time.time() - retention_days * 86_400),),
    ).rowcount


FILTERS = {
    "status": "status", "platform": "platform", "model": "model_id", "request_id": "request_id",
    "client": "CAST(client AS TEXT)",
}  # fmt: skip


def list_requests(
    db: Connection, *, limit: int, before_id: int | None, filters: Mapping[str, str]
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
