"""SPEC 10: what the log teaches, asked of a real database, and how it reaches routing and the operator."""

import asyncio
import time

import pytest
from conftest import behind, both_ways, open_store
from fake_provider import answer, error
from worlds import NOW, World

from records.analytics import Reports
from records.database import Store
from records.request_log import model_stats
from records.rows import Row, insert_rows
from routing.scores import Stats

DAY_S, MINUTE_S = 86_400.0, 60.0
WEEK = 7


@pytest.fixture
async def store(tmp_path):
    opened = open_store(tmp_path / "analytics.db")
    yield opened
    await opened.close()


def row(ago_s: float, status: str = "success", platform: str | None = "p", model_id: str = "m", **given) -> Row:
    made = Row("r", time.time() - ago_s, platform=platform, model_id=model_id, status=status, attempt=1)
    for name, value in given.items():
        setattr(made, name, value)
    return made


def learned(store: Store, rows: list[Row], days: int = WEEK) -> dict[tuple[str, str], Stats]:
    store.write_now(lambda db: insert_rows(db, rows))
    return store.write_now(lambda db: model_stats(db, days))


def learned_of_one(store: Store, rows: list[Row], days: int = WEEK) -> Stats:
    (stats,) = learned(store, rows, days).values()
    return stats


# --- Weights (SPEC 10.1) ------------------------------------------------------------------------------------------

# Age in days, the window in days, the weight.
WEIGHTS = [
    (0, 7, 1.0), (1, 7, 6 / 7), (3.5, 7, 0.5), (5.6, 7, 0.2), (6.99, 7, 0.01 / 7), (-1, 7, 1.0), (-4000, 7, 1.0),
    (0, 1, 1.0), (0.5, 1, 0.5), (3.5, 30, 1 - 3.5 / 30), (15, 30, 0.5), (89, 90, 1 / 90), (200, 365, 165 / 365),
]  # fmt: skip


@pytest.mark.parametrize(("days", "window", "weight"), WEIGHTS)
@pytest.mark.parametrize("status", ["success", "error"])
def test_a_row_weighs_less_the_older_it_is(store, days, window, weight, status):
    stats = learned_of_one(store, [row(days * DAY_S, status)], window)

    assert stats.total == pytest.approx(weight, abs=1e-4)
    assert stats.successes == (stats.total if status == "success" else 0.0)
    assert (stats.raw_total, stats.raw_successes) == (1, int(status == "success"))


@pytest.mark.parametrize(("days", "window"), [(7.01, 7), (100, 7), (1.1, 1), (31, 30)])
def test_what_is_older_than_the_window_counts_nowhere(store, days, window):
    assert learned(store, [row(days * DAY_S)], window) == {}


def test_the_same_rows_weigh_differently_in_another_window(store):
    rows = [row(6 * DAY_S, "success"), row(60, "error")]

    narrow, wide = learned_of_one(store, rows, WEEK), learned_of_one(store, [], 60)

    assert narrow.successes / narrow.total == pytest.approx((1 / 7) / (8 / 7), abs=1e-3)
    assert wide.successes / wide.total == pytest.approx(0.9 / 1.9, abs=1e-3)
    assert narrow.raw_total == wide.raw_total == 2


def test_a_bad_quarter_of_an_hour_outweighs_its_share_of_a_good_week(store):
    good = [row((3 + 3.99 * n / 1000) * DAY_S) for n in range(1000)]
    bad = [row(10 * MINUTE_S * n / 15, "error") for n in range(15)]

    stats = learned_of_one(store, good + bad)

    flat = 1000 / 1015
    assert (stats.raw_total, stats.raw_successes) == (1015, 1000)
    assert stats.total == pytest.approx(15 + sum(1 - (3 + 3.99 * n / 1000) / 7 for n in range(1000)), abs=0.1)
    assert stats.successes / stats.total < flat - 0.03


def test_one_success_of_days_ago_is_a_rate_of_one(store):
    stats = learned_of_one(store, [row(5.6 * DAY_S)])

    assert stats.successes / stats.total == 1.0
    assert stats.total == pytest.approx(0.2, abs=1e-4)


def test_an_empty_log_teaches_nothing(store):
    assert learned(store, []) == {}


def test_what_was_cancelled_or_refused_counts_nowhere(store):
    cancelled = [row(60, "cancelled", output_tokens=1, latency_ms=90_000, ttfb_ms=80_000) for _ in range(50)]
    refused = [row(60, "error", platform=None, model_id=None) for _ in range(50)]
    answered = [row(60, output_tokens=50, latency_ms=1000, ttfb_ms=100)]

    stats = learned_of_one(store, cancelled + refused + answered)

    assert (stats.raw_total, stats.raw_successes, stats.tok_per_sec, stats.avg_ttfb_ms) == (1, 1, 50.0, 100.0)


async def test_while_a_health_gate_is_open_outcomes_leave_the_slow_statistics_alone(start_gateway, fake):
    """So that a model is back at once when it works again (SPEC 10.4), also after a restart."""
    gateway = await start_gateway(["a", "b", "c"])
    fake.script("a", answer(""))
    while not (await gateway.protection())["gates"]:
        await gateway.chat()
    before = len(await counted_rows(gateway, uncounted=0))
    for _ in range(3):
        await gateway.chat(model="a-model")
    fake.script("a", answer("back"))
    await gateway.chat(model="a-model")

    late = await counted_rows(gateway, uncounted=1)

    assert [row["status"] for row in late] == ["success", "error", "error", "error"]
    assert len(await counted_rows(gateway, uncounted=0)) == before
    stats = behind(gateway.db, lambda db: model_stats(db, WEEK))
    assert stats["a", "a-model"].raw_total == before


async def counted_rows(gateway, uncounted: int) -> list[dict]:
    """Those of the first platform that count, or those that do not; newest first."""
    rows = (await gateway.get("/api/requests?limit=1000&platform=a")).json["rows"]
    return [row for row in rows if row["uncounted"] == uncounted]


def test_a_model_that_was_only_ever_cancelled_was_never_seen(store):
    assert learned(store, [row(60, "cancelled")]) == {}


# --- Speed and time to first token --------------------------------------------------------------------------------


def test_speed_is_all_tokens_over_all_time_of_the_successes(store):
    rows = [
        row(60, output_tokens=100, latency_ms=1000),
        row(60, output_tokens=20, latency_ms=3000),
        row(60, "error", output_tokens=5, latency_ms=60_000),
    ]

    assert learned_of_one(store, rows).tok_per_sec == pytest.approx(30.0)


def test_the_first_token_is_the_mean_of_the_successes(store):
    rows = [row(60, ttfb_ms=100), row(60, ttfb_ms=500), row(60), row(60, "error", ttfb_ms=9000)]

    assert learned_of_one(store, rows).avg_ttfb_ms == pytest.approx(300.0)


@pytest.mark.parametrize("given", [{}, {"latency_ms": 0}, {"latency_ms": 0, "output_tokens": 5}, {"output_tokens": 5}])
def test_a_success_without_numbers_is_no_error(store, given):
    stats = learned_of_one(store, [row(60, **given)])

    assert (stats.tok_per_sec, stats.avg_ttfb_ms) == (0.0, None)


def test_models_are_told_apart_by_platform_and_id(store):
    rows = [row(60, platform="p", model_id="m"), row(60, "error", platform="q", model_id="m")]
    rows += [row(60, platform="p", model_id="n") for _ in range(3)]

    stats = learned(store, rows)

    assert {name: s.raw_total for name, s in stats.items()} == {("p", "m"): 1, ("q", "m"): 1, ("p", "n"): 3}
    assert stats["q", "m"].raw_successes == 0


def test_the_query_reads_a_large_log_in_the_time_of_a_blink(store):
    rows = [row(n * 6.0, "success" if n % 3 else "error", model_id=f"m{n % 40}") for n in range(20_000)]
    store.write_now(lambda db: insert_rows(db, rows))

    began = time.perf_counter()
    stats = store.write_now(lambda db: model_stats(db, WEEK))

    assert time.perf_counter() - began < 1.0
    assert len(stats) == 40


# --- Displayed (SPEC 10.3) ----------------------------------------------------------------------------------------


def test_a_displayed_score_follows_the_weighted_rate_and_not_the_flat_one(store):
    old = [row(6 * DAY_S, output_tokens=50, latency_ms=1000, ttfb_ms=100) for _ in range(100)]
    recent = [row(60, "error") for _ in range(15)]
    stats = learned_of_one(store, old + recent)
    router = World({}, {}).router
    router.scores.learn({1: stats, 2: Stats(100.0, 115.0, 100, 115, 50.0, 100.0)})  # the same, unweighted

    scores = router.displayed_scores(NOW)

    assert stats.successes / stats.total == pytest.approx((100 / 7) / (100 / 7 + 15), abs=1e-3)
    assert scores[1] == pytest.approx((2 + 100 / 7) / (4 + 100 / 7 + 15) + 0.3 + 0.25 + 0.1, abs=1e-3)
    assert scores[1] < scores[2] - 0.3


# --- As the operator sees it, and routing ----------------------------------------------------------------------------


async def shown(gateway, total: int, platform: str = "a") -> dict:
    """The chain's entry of a platform's model, once it shows so many requests."""
    async with asyncio.timeout(3):
        while True:
            chain = (await gateway.get("/api/fallback")).json
            (entry,) = [entry for entry in chain if entry["platform"] == platform]
            if entry["total"] == total:
                return entry
            await asyncio.sleep(0.005)


async def restarted_with(start_gateway, rows: list[Row], settings: dict[str, str] | None = None):
    """A gateway whose log holds these rows."""
    gateway = await start_gateway(["a", "b"])
    await gateway.stop()
    behind(gateway.db, lambda db: insert_rows(db, rows))
    return await start_gateway(["a", "b"], settings)


def of_a(ago_s: float, status: str = "success", **given) -> Row:
    return row(ago_s, status, "a", "a-model", **given)


async def test_the_operator_sees_all_requests_and_the_weighted_rate(start_gateway):
    good = [of_a((3 + 3.99 * n / 1000) * DAY_S, output_tokens=50, latency_ms=1000, ttfb_ms=100) for n in range(1000)]
    bad = [of_a(10 * MINUTE_S * n / 15, "error") for n in range(15)]
    cancelled = [of_a(60, "cancelled") for _ in range(7)]
    gateway = await restarted_with(start_gateway, good + bad + cancelled)

    entry = await shown(gateway, 1015)

    weighted = sum(1 - (3 + 3.99 * n / 1000) / 7 for n in range(1000))
    assert entry["success_rate"] == pytest.approx(weighted / (weighted + 15), abs=1e-3)
    assert entry["success_rate"] < 1000 / 1015 - 0.03
    assert (entry["tok_per_sec"], entry["avg_ttfb_ms"]) == (50.0, 100)


@pytest.mark.parametrize(("days", "total", "rate"), [(7, 3, 0.5), (4, 2, 0.2), (30, 3, 1.5 / 2.4)])
async def test_the_window_is_a_setting(start_gateway, days, total, rate):
    rows = [of_a(60, "error"), of_a(3 * DAY_S), of_a(4.5 * DAY_S)]
    weights = [max(0.0, 1 - age / days) for age in (0.0, 3.0, 4.5)]
    gateway = await restarted_with(start_gateway, rows, {"ANALYTICS_WINDOW_DAYS": str(days)})

    entry = await shown(gateway, total)

    assert entry["success_rate"] == pytest.approx(sum(weights[1:]) / sum(weights), abs=1e-3)


async def test_a_model_never_seen_has_no_rate_and_no_bonus(start_gateway):
    gateway = await start_gateway(["a", "b"])

    entry = await shown(gateway, 0)

    assert (entry["success_rate"], entry["tok_per_sec"], entry["avg_ttfb_ms"]) == (None, None, None)
    assert entry["score"] == pytest.approx(0.5 + 0.1, abs=1e-3)  # the best rank


@both_ways
async def test_requests_are_counted_as_they_are_served(start_gateway, fake, streaming):
    gateway = await start_gateway(["a", "b"], {"STATS_REFRESH_MS": "10", "TRANSIENT_COOLDOWN_MS": "1"})
    fake.script("a", answer("x" * 400, usage=(10, 100)), error(404), error(404), answer("fine"))
    for _ in range(4):
        assert (await gateway.ask(streaming=streaming)).status == 200

    entry, other = await shown(gateway, 4), await shown(gateway, 2, "b")

    assert entry["success_rate"] == pytest.approx(0.5, abs=1e-3)
    assert other["success_rate"] == pytest.approx(1.0, abs=1e-3)
    assert entry["tok_per_sec"] is None or entry["tok_per_sec"] > 0
    assert entry["avg_ttfb_ms"] >= 0


async def test_statistics_are_not_read_within_a_request(start_gateway):
    gateway = await restarted_with(start_gateway, [of_a(60)], {"STATS_REFRESH_MS": "3600000"})
    await shown(gateway, 1)

    await gateway.chat()
    await gateway.rows(2)

    assert (await shown(gateway, 1))["total"] == 1


async def test_a_model_that_fails_in_the_log_is_left_for_one_that_answers(start_gateway, fake):
    rows = [of_a(60 + n, "error") for n in range(200)]
    rows += [row(60 + n, platform="b", model_id="b-model", output_tokens=50, latency_ms=1000) for n in range(200)]
    gateway = await restarted_with(start_gateway, rows)
    await shown(gateway, 200)

    for n in range(10):
        await gateway.chat(f"number {n}", model="auto")

    assert fake.called == ["b"] * 10


def test_a_report_that_took_long_is_shown_again_for_twenty_times_as_long():
    reports, quick, slow = Reports(), {"window": "24h"}, {"window": "7d"}
    assert reports.kept("24h", 0.0) is None
    reports.keep("24h", quick, began=100.0, ended=100.9)
    reports.keep("7d", slow, began=100.0, ended=102.0)

    assert reports.kept("24h", 100.9) is None
    assert reports.kept("7d", 141.9) is slow
    assert reports.kept("7d", 142.0) is None
    assert reports.kept("30d", 102.0) is None
