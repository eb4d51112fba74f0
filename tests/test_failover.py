"""SPEC 5.1 and 5.2: what each failure before the first token leads to, and that the client sees none of it."""

import asyncio
import gzip
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from conftest import both_ways, case, stored_keys
from fake_provider import (
    CUT,
    PAUSE,
    RESET,
    Every,
    Wait,
    answer,
    body,
    chunk,
    chunked,
    completion,
    error,
    not_tls_url,
    raw,
    refusing_url,
    silent_url,
    sse,
    until,
)
from faults import EITHER, STREAMED, TWO_KEYS, UNSAID, WHOLE, Failure

SHORT_TIMES = {
    "CONNECT_TIMEOUT_MS": "120",
    "REQUEST_TIMEOUT_MS": "150",
    "MAX_STREAM_STALL_MS": "120",
    "FIRST_TOKEN_TIMEOUT_MS": "300",
}
KINDS = {"server_error", "connection", "timeout", "stall", "rate_limited", "auth", "forbidden", "out_of_credit"}
KINDS |= {"bad_request", "not_found", "context_length", "content_filter", "truncated", "empty", "malformed", "wrapped"}


@both_ways
@pytest.mark.parametrize("silent", [False, True], ids=["told", "silent"])  # a busy machine must not run into the limits
async def test_a_failing_provider_is_replaced_before_the_client_sees_anything(start_gateway, fake, streaming, silent):
    gateway = await start_gateway({"a": TWO_KEYS, "b": {}, "c": {}}, SHORT_TIMES if silent else {})
    failures = EITHER | (STREAMED if streaming else WHOLE)
    for name, failure in failures.items():
        if (failure.kind in ("timeout", "stall")) is silent:
            with case(name):
                fake.clear()
                fake.script("a", failure.reply)
                await assert_replaced(gateway, fake, failure, streaming)
                await gateway.recovered()


async def test_a_body_of_more_than_64_mib_is_given_up_however_small_it_was_packed(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", body(gzip.compress(bytes(65 << 20), 1), headers={"content-encoding": "gzip"}))

    got = await gateway.chat()

    assert (got.text, got.headers["X-Fallback-Trail"]) == ("hello from b", "a/a-model=malformed")
    assert "67108864" in (await gateway.rows(2))[0]["error"]


async def assert_replaced(gateway, fake, failure: Failure, streaming: bool) -> None:
    failed = ["a", "a"] if failure.next_key else ["a"]
    unusable = failure.cools or failure.kind == "auth"

    got = await gateway.ask(streaming=streaming)

    assert got.text == "hello from b", got.headers
    assert fake.called == [*failed, "b"]
    assert len({request.key for request in fake.requests}) == len(fake.requests)
    assert got.headers["X-Routed-Via"] == "b/b-model"
    assert got.headers["X-Fallback-Attempts"] == str(len(failed))
    rows = await gateway.rows_of(got, len(failed) + 1)
    kind = rows[0]["error_kind"]
    assert kind == failure.kind if failure.kind else kind in KINDS
    assert got.headers["X-Fallback-Trail"] == "; ".join([f"a/a-model={kind}"] * len(failed))
    for number, row in enumerate(rows[:-1], start=1):
        assert (row["platform"], row["model_id"], row["status"], row["attempt"]) == ("a", "a-model", "error", number)
        assert row["error_kind"] == kind
        assert failure.http_status in (UNSAID, row["http_status"])
    assert (rows[-1]["platform"], rows[-1]["status"], rows[-1]["error_kind"]) == ("b", "success", None)
    assert {row["request_id"] for row in rows} == {got.headers["X-Request-Id"]}
    assert set(await gateway.cooled_models()) == ({"a-model"} if failure.cools == "model" else set())
    assert set(await gateway.cooled_keys()) == ({"a-model"} if failure.cools == "key" else set())

    fake.script("a", answer("recovered"))  # the next request leaves alone what cools, and asks again what does not
    assert (await gateway.ask(streaming=streaming)).text == ("hello from b" if unusable else "recovered")
    assert fake.called == [*failed, "b", "b" if unusable else "a"]


@both_ways
@pytest.mark.parametrize("place", ["refused", "unresolvable", "silent", "not TLS"])
async def test_a_platform_that_cannot_be_reached_is_replaced(start_gateway, fake, place, streaming):
    with refusing_url() as refusing, silent_url() as silent:
        async with not_tls_url() as not_tls:
            urls = {"refused": refusing, "unresolvable": "http://host.invalid/v1", "silent": silent, "not TLS": not_tls}
            gateway = await start_gateway({"a": {"base_url": urls[place]}, "b": {}}, {"CONNECT_TIMEOUT_MS": "300"})

            got = await gateway.ask(streaming=streaming)

    assert got.text == "hello from b"
    failed, succeeded = await gateway.rows(2)
    assert failed["error_kind"] in ({"connection", "timeout"} if place == "silent" else {"connection"})
    assert place == "silent" or failed["http_status"] is None
    assert succeeded["platform"] == "b"
    assert set(await gateway.cooled_models()) == {"a-model"}


@both_ways
async def test_failures_in_a_row_lead_down_the_chain_each_with_its_row(start_gateway, fake, streaming):
    gateway = await start_gateway(["a", "b", "c", "d"])
    fake.script("a", error(503))
    fake.script("b", error(429, headers={"retry-after": "9"}))
    fake.script("c", raw(RESET))

    got = await gateway.ask(streaming=streaming)

    assert got.text == "hello from d"
    trail = "a/a-model=server_error; b/b-model=rate_limited; c/c-model=connection"
    assert got.headers["X-Fallback-Trail"] == trail
    assert got.headers["X-Fallback-Attempts"] == "3"
    rows = await gateway.rows(4)
    assert [(row["platform"], row["attempt"]) for row in rows] == [("a", 1), ("b", 2), ("c", 3), ("d", 4)]
    assert all(row["streamed"] == int(streaming) for row in rows)
    assert [row["http_status"] for row in rows] == [503, 429, None, 200]


@pytest.mark.parametrize("ending", [CUT, RESET], ids=["closed", "reset"])
async def test_a_connection_that_ends_after_an_answer_is_no_failure(start_gateway, fake, ending):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", raw(*completion("all well").steps, ending))

    for _ in range(5):
        assert (await gateway.chat()).text == "all well"

    assert {row["status"] for row in await gateway.rows(5)} == {"success"}


# --- Keys -------------------------------------------------------------------------------------------------------


async def test_a_rate_limited_key_still_serves_the_platforms_other_models(start_gateway, fake):
    models = [{"model_id": "first", "intelligence_rank": 1}, {"model_id": "second", "intelligence_rank": 2}]
    gateway = await start_gateway({"a": {"models": models}})
    fake.script("a", error(429), answer("from the second model"))

    assert (await gateway.chat()).text == "from the second model"

    assert [request.json["model"] for request in fake.requests] == ["first", "second"]
    assert len({request.key for request in fake.requests}) == 1
    assert set(await gateway.cooled_keys()) == {"first"}


def in_an_hour() -> str:
    return format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)


@pytest.mark.parametrize(
    ("status", "headers", "low_ms", "high_ms"),
    [
        (429, lambda: {"retry-after": "7"}, 5_000, 7_000),
        (429, lambda: {"retry-after": in_an_hour()}, 3_590_000, 3_600_000),
        (429, dict, 1_600, 1_875),  # a sixteenth of the setting (SPEC 7.9)
        (429, lambda: {"retry-after": "soon"}, 1_600, 1_875),
        (403, dict, 28_000, 30_000),
        (402, dict, 3_595_000, 3_600_000),
        (402, lambda: {"retry-after": "60"}, 55_000, 60_000),
    ],
    ids=["seconds", "date", "none", "nonsense", "403", "402", "402 that tells its reset"],
)
async def test_a_key_cools_for_as_long_as_the_platform_says_or_the_setting(
    start_gateway, fake, status, headers, low_ms, high_ms
):
    gateway = await start_gateway(["a", "b"], {"RATE_LIMIT_COOLDOWN_MS": "30000"})
    fake.script("a", error(status, headers=headers()))

    assert (await gateway.chat()).text == "hello from b"

    left_ms = (await gateway.cooled_keys())["a-model"]
    assert low_ms <= left_ms <= high_ms


async def test_a_later_failure_never_shortens_a_key_cooldown(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    second_may_fail = asyncio.Event()
    late = error(429, headers={"retry-after": "5"})
    fake.script("a", raw(Wait(second_may_fail), *late.steps), error(429, headers={"retry-after": "100"}))
    waiting = asyncio.create_task(gateway.chat())
    await fake.arrived(1)
    assert (await gateway.chat()).text == "hello from b"

    second_may_fail.set()

    assert (await waiting).text == "hello from b"
    assert (await gateway.cooled_keys())["a-model"] > 90_000


async def test_an_unauthorized_key_is_marked_invalid_and_never_used_again(start_gateway, fake):
    gateway = await start_gateway({"a": TWO_KEYS})
    bad, good = TWO_KEYS["keys"]
    fake.script("a", lambda request: error(401, f"wrong key {bad}") if request.key == bad else answer()(request))
    for _ in range(4):
        assert (await gateway.chat()).text == "hello"
    assert [request.key for request in fake.requests].count(bad) == 1

    await until(lambda: stored_keys(gateway.db)["a-0"]["status"] == "invalid")
    assert stored_keys(gateway.db)["a-0"]["last_error"]
    await until(lambda: stored_keys(gateway.db)["a-1"]["status"] == "healthy")
    await gateway.stop()
    fake.clear()
    restarted = await start_gateway({"a": TWO_KEYS})
    assert (await restarted.chat()).text == (await restarted.chat()).text == "hello"
    assert {request.key for request in fake.requests} == {good}


async def test_a_rate_limited_key_is_marked_so_until_it_works_again(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], {"RATE_LIMIT_COOLDOWN_MS": "30"})
    fake.script("a", error(429), answer())

    await gateway.chat()

    await until(lambda: stored_keys(gateway.db)["a-0"]["status"] == "rate_limited")
    while not (await gateway.chat()).headers["X-Routed-Via"].startswith("a/"):
        pass
    await until(lambda: stored_keys(gateway.db)["a-0"]["status"] == "healthy")


# --- Skipping within the request --------------------------------------------------------------------------------


@both_ways
async def test_context_length_exceeded_skips_every_model_whose_window_is_not_larger(start_gateway, fake, streaming):
    windows = {"a": 8_000, "b": 8_000, "c": 4_000, "d": 32_000}
    gateway = await start_gateway({name: {"model": {"context_window": size}} for name, size in windows.items()})
    fake.script("a", error(400, "maximum context length is 8000 tokens", code="context_length_exceeded"))

    assert (await gateway.ask(streaming=streaming)).text == "hello from d"

    assert fake.called == ["a", "d"]
    assert await gateway.cooled_models() == await gateway.cooled_keys() == {}


@both_ways
@pytest.mark.parametrize("code", ["content_filter", "content_policy_violation"])
async def test_a_content_filter_reaches_the_client_at_once(start_gateway, fake, code, streaming):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", error(400, "this prompt violates our rules", code=code))

    got = await gateway.ask(streaming=streaming)

    assert got.status == 400
    assert got.error["code"] == code
    assert "this prompt violates our rules" in got.error["message"]
    assert fake.called == ["a"]
    assert (await gateway.row())["error_kind"] == "content_filter"
    assert await gateway.cooled_models() == await gateway.cooled_keys() == {}


@both_ways
async def test_a_content_filter_can_be_set_to_fail_over(start_gateway, fake, streaming):
    gateway = await start_gateway({"a": TWO_KEYS, "b": {}}, {"CONTENT_FILTER": "failover"})
    fake.script("a", error(400, code="content_filter"))

    got = await gateway.ask(streaming=streaming)

    assert got.text == "hello from b"
    assert got.headers["X-Fallback-Trail"] == "a/a-model=content_filter"
    assert fake.called == ["a", "b"]
    assert await gateway.cooled_models() == await gateway.cooled_keys() == {}


TOOL_CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
NOT_EMPTY = {
    "stopped by length": ({"finish": "length"}, {}),
    "stopped by a filter": ({"finish": "content_filter"}, {}),
    "reasoning": ({}, {"reasoning_content": "thinking"}),
    "refusal": ({}, {"refusal": "no"}),
    "a tool call": (
        {"finish": "tool_calls"},
        {"tool_calls": [{"index": 0, "id": "x", "type": "function", "function": {"name": "f"}}]},
    ),
}


@pytest.mark.parametrize(("how", "message"), NOT_EMPTY.values(), ids=NOT_EMPTY)
async def test_an_answer_without_text_can_still_be_an_answer(start_gateway, fake, how, message):
    gateway = await start_gateway(["a", "b"])
    finish = how.get("finish", "stop")
    fake.script("a", completion("", finish=finish, message=message), sse(chunk(**message), chunk(finish=finish)))

    whole = await gateway.chat()
    streamed = await gateway.stream()

    assert whole.status == streamed.status == 200
    assert streamed.finishes == [finish]
    assert whole.json["choices"][0]["finish_reason"] == finish
    assert fake.called == ["a", "a"]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(start_gateway, fake, status):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", error(status, headers={"location": fake.url("elsewhere") + "/chat/completions"}))

    assert (await gateway.chat()).text == "hello from b"

    assert fake.called == ["a", "b"]


# --- Transient cooldowns (7.4) ----------------------------------------------------------------------------------


async def test_a_transient_cooldown_ends_by_itself(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], {"TRANSIENT_COOLDOWN_MS": "150"})
    fake.script("a", error(500), answer("back again"))
    assert (await gateway.chat()).text == "hello from b"
    assert 0 < (await gateway.cooled_models())["a-model"] <= 150

    await gateway.uncooled()

    assert (await gateway.chat()).text == "back again"


async def test_a_success_that_began_before_a_cooldown_does_not_lift_it(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    first_may_end = asyncio.Event()
    fake.script("a", raw(Wait(first_may_end), *completion("late success").steps), error(500))
    early = asyncio.create_task(gateway.chat())
    await fake.arrived(1)
    assert (await gateway.chat()).text == "hello from b"

    first_may_end.set()

    assert (await early).text == "late success"
    assert set(await gateway.cooled_models()) == {"a-model"}


async def test_a_transient_cooldown_overrides_a_clients_choice_of_model(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", error(500))
    await gateway.chat()
    fake.clear()

    assert (await gateway.chat(model="a-model")).text == "hello from b"

    assert fake.called == ["b"]


# --- Limits of one request --------------------------------------------------------------------------------------


async def test_a_request_makes_no_more_attempts_than_it_may(start_gateway, fake):
    gateway = await start_gateway(["a", "b", "c"], {"MAX_FALLBACK_ATTEMPTS": "2"})
    fake.script("a", error(500))
    fake.script("b", error(500))

    got = await gateway.chat()

    assert fake.called == ["a", "b"]
    assert got.status == 502
    assert got.error["code"] == "all_attempts_failed"
    assert [attempt["platform"] for attempt in got.error["attempts"]] == ["a", "b"]


async def test_no_attempt_starts_when_the_budget_is_used_up(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], {"REQUEST_BUDGET_MS": "50", "REQUEST_TIMEOUT_MS": "80"})
    fake.script("a", raw(PAUSE))

    got = await gateway.chat()

    assert fake.called == ["a"]
    assert (got.status, got.error["code"]) == (504, "timeout")


async def test_a_body_without_end_is_given_up_at_its_limit(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", chunked(Every(0, b"x" * (1 << 20)), headers={"content-type": "application/json"}))

    assert (await gateway.chat()).text == "hello from b"

    await fake.closed(0)
    assert 64 << 20 <= fake.requests[0].written <= 80 << 20
