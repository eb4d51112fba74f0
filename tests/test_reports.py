"""What the operator reads of the log: analytics over a window, and its rows page by page."""

import asyncio
import threading
import time

import pytest
from conftest import behind, open_store
from fake_provider import until

from records.request_log import list_requests
from records.rows import Row

# --- Analytics ------------------------------------------------------------------------------------------------------


def write_rows(db, rows) -> None:
    """Rows straight into the log: (request_id, hours ago, platform, status, latency_ms, ttfb_ms, output_tokens)."""

    def work(connection):
        for request_id, hours_ago, platform, status, latency_ms, ttfb_ms, tokens in rows:
            at = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(time.time() - hours_ago * 3600))
            connection.execute(
                "INSERT INTO requests (request_id, created_at, platform, model_id, status, latency_ms, ttfb_ms, "
                "input_tokens, output_tokens, attempt, streamed) VALUES (?, ?, ?, ?, ?, ?, ?, 10, ?, 1, 0)",
                (request_id, at, platform, f"{platform}-model", status, latency_ms, ttfb_ms, tokens),
            )

    behind(db, work)


async def test_analytics_count_requests_by_their_last_attempt_and_time_by_successes(start_gateway):
    gateway = await start_gateway(["a", "b"])
    rows = [("r1", 2, "a", "error", 9000, None, 0), ("r1", 2, "b", "success", 1000, 100, 50)]
    rows += [(f"s{n}", 1, "b", "success", n * 10, n, 1) for n in range(1, 20)]
    rows += [("r2", 1, "a", "error", 7000, None, 0), ("r3", 1, "a", "cancelled", 5, None, 40)]
    rows += [("old", 25, "a", "success", 123_456, 123_456, 1)]
    write_rows(gateway.db, rows)
    report = await gateway.seen("/api/analytics?window=24h")
    assert report["totals"] == {
        "requests": 22, "successes": 20, "errors": 1, "cancelled": 1, "input_tokens": 220, "output_tokens": 69,
        "p50_ms": 100, "p95_ms": 190, "ttfb_p50_ms": 10, "ttfb_p95_ms": 19,
    }  # fmt: skip
    assert [(e["platform"], e["attempts"], e["successes"], e["errors"]) for e in report["by_platform"]] == [
        ("b", 20, 20, 0),
        ("a", 3, 0, 2),
    ]
    assert report["by_model"][0]["model_id"] == "b-model"
    assert report["by_model"][1]["p50_ms"] is None
    assert [sum(e["output_tokens"] for e in report[part]) for part in ("by_model", "by_platform", "series")] == [69] * 3
    assert (await gateway.seen("/api/analytics?window=7d"))["totals"]["requests"] == 23


@pytest.mark.parametrize(("window", "points"), [("24h", 25), ("7d", 29), ("30d", 31), ("90d", 31)])
async def test_a_series_has_a_point_for_every_step_and_adds_up(start_gateway, window, points):
    gateway = await start_gateway(["a"])
    write_rows(gateway.db, [(f"r{n}", n, "a", "success", 5, 5, 2) for n in range(24)])
    write_rows(gateway.db, [("bad", 3, "a", "error", 5, None, 0)])
    report = await gateway.seen(f"/api/analytics?window={window}")
    assert len(report["series"]) in (points - 1, points)
    assert report["series"][0].keys() == {"start", "requests", "errors", "output_tokens", "p50_ms"}
    for name, total in (("requests", 25), ("errors", 1), ("output_tokens", 48)):
        assert sum(point[name] for point in report["series"]) == report["totals"][name] == total
    starts = [point["start"] for point in report["series"]]
    assert starts == sorted(set(starts))


@pytest.mark.parametrize(("window", "requests"), [("24h", 1), ("7d", 2), ("30d", 3), ("90d", 4)])
async def test_a_window_ends_where_its_name_says(start_gateway, window, requests):
    gateway = await start_gateway(["a"])
    days = (0.99, 6.99, 29.99, 89.99, 90.01)
    write_rows(gateway.db, [(f"r{age}", age * 24, "a", "success", 5, 5, 2) for age in days])
    report = await gateway.seen(f"/api/analytics?window={window}")
    assert report.keys() == {"window", "totals", "by_model", "by_platform", "by_client", "series", "scores"}
    assert (report["window"], report["totals"]["requests"]) == (window, requests)
    assert report["by_model"][0]["attempts"] == sum(point["requests"] for point in report["series"]) == requests


async def test_a_point_of_the_series_has_the_median_of_its_own_successes(start_gateway):
    gateway = await start_gateway(["a"])
    write_rows(gateway.db, [(f"now{ms}", 0, "a", "success", ms, 5, 1) for ms in (10, 20, 30, 9000)])
    write_rows(gateway.db, [(f"then{ms}", 5, "a", "success", ms, 5, 1) for ms in (700, 800, 900)])
    write_rows(gateway.db, [("bad", 5, "a", "error", 1, None, 0)])
    points = (await gateway.seen("/api/analytics?window=24h"))["series"]
    told = [(p["requests"], p["errors"], p["output_tokens"], p["p50_ms"]) for p in points if p["requests"]]
    assert told == [(4, 1, 3, 800), (4, 0, 4, 20)]
    assert {p["p50_ms"] for p in points if not p["requests"]} == {None}


async def test_analytics_of_an_empty_log_are_zeros(start_gateway):
    gateway = await start_gateway(["a"])
    report = await gateway.seen("/api/analytics")
    assert report["window"] == "24h"
    assert report["totals"]["requests"] == 0
    assert report["totals"]["p50_ms"] is None
    assert report["by_model"] == []
    assert {point["requests"] for point in report["series"]} == {0}
    (score,) = [score for score in report["scores"] if score["model_id"] == "a-model"]
    assert score.keys() == {
        "platform", "model_id", "score", "success_rate", "total", "tok_per_sec", "avg_ttfb_ms",
    }  # fmt: skip


async def test_a_row_from_the_future_breaks_no_chart(start_gateway):
    gateway = await start_gateway(["a"])
    write_rows(gateway.db, [("r1", -2, "a", "success", 5, 5, 2), ("r2", -1e5, "a", "success", 5, 5, 2)])
    report = await gateway.seen("/api/analytics?window=24h")
    assert report["totals"]["requests"] == 2
    assert len(report["series"]) <= 1001


# --- The log itself -------------------------------------------------------------------------------------------------


async def test_the_log_is_read_page_by_page_newest_first(start_gateway):
    gateway = await start_gateway(["a"])
    write_rows(gateway.db, [(f"r{n}", 1, "a", "success", 5, 5, 1) for n in range(7)])
    pages, before = [], ""
    while rows := (await gateway.seen(f"/api/requests?limit=3{before}"))["rows"]:
        pages.append([row["request_id"] for row in rows])
        before = f"&before_id={rows[-1]['id']}"
    assert pages == [["r6", "r5", "r4"], ["r3", "r2", "r1"], ["r0"]]
    assert rows == []


async def test_whoever_reads_the_log_finds_also_what_came_while_it_was_being_written(tmp_path):
    store = open_store(tmp_path / "log.db")
    begun, go_on = threading.Event(), threading.Event()
    store.write_later("busy", lambda db: (begun.set(), go_on.wait(5)))
    store.log(Row("first", time.time()))
    writing = asyncio.create_task(store.flush())
    await until(begun.is_set)
    store.log(Row("second", time.time()))

    reading = asyncio.create_task(store.flush())
    await asyncio.sleep(0)
    go_on.set()
    await reading

    rows = await store.read(lambda db: list_requests(db, limit=9, before_id=None, filters={}))
    assert [row["request_id"] for row in rows] == ["second", "first"]
    await writing
    await store.close()


async def test_the_log_is_searched_by_every_filter_alone_and_together(start_gateway):
    gateway = await start_gateway(["a", "b"])
    rows = [("r1", "a", "error"), ("r1", "b", "success"), ("r2", "a", "success"), ("r3", "b", "cancelled")]
    write_rows(gateway.db, [(id, 1, platform, status, 5, 5, 1) for id, platform, status in rows])
    found = {
        "status=success": ["r2", "r1"],
        "status=cancelled": ["r3"],
        "status=nothing": [],
        "platform=a": ["r2", "r1"],
        "model=b-model": ["r3", "r1"],
        "request_id=r1": ["r1", "r1"],
        "platform=a&status=error": ["r1"],
        "platform=a&model=b-model": [],
        "platform=&status=": ["r3", "r2", "r1", "r1"],
    }
    for query, ids in found.items():
        assert [row["request_id"] for row in (await gateway.seen(f"/api/requests?{query}"))["rows"]] == ids, query


async def test_a_row_has_every_column_of_the_log(start_gateway):
    gateway = await start_gateway(["a"])
    await gateway.chat()
    (row,) = (await gateway.seen("/api/requests"))["rows"]
    assert row.keys() == {
        "id", "request_id", "created_at", "platform", "model_id", "key_id", "requested_model", "routing_mode", "status",
        "error_kind", "http_status", "error", "input_tokens", "output_tokens", "latency_ms", "ttfb_ms", "attempt",
        "streamed", "skipped_models", "client", "cached", "resumed_at", "drill", "waited_ms", "uncounted",
    }  # fmt: skip
