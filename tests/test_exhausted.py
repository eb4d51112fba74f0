"""SPEC 5.3: what the client is told when nothing is left, and that nobody is called in vain."""

import asyncio

from conftest import assert_error, both_ways, client_of, default_key
from fake_provider import PAUSE, RESET, Wait, answer, chunked, completion, error, raw, sse, until

INVALID = "invalid_request_error"


# --- The request itself is bad ----------------------------------------------------------------------------------


@both_ways
async def test_three_platforms_in_a_row_that_call_the_request_bad_end_it(start_gateway, fake, streaming):
    gateway = await start_gateway(["a", "b", "c", "d"])
    for name in "abc":
        fake.script(name, error(400, "temperature must be a number", code="invalid_temperature"))

    got = await gateway.ask(streaming=streaming)

    assert_error(got, 400, INVALID, "invalid_temperature")
    assert "temperature must be a number" in got.error["message"]
    assert fake.called == ["a", "b", "c"]
    assert [row["error_kind"] for row in await gateway.rows(3)] == ["bad_request"] * 3


@both_ways
async def test_all_platforms_there_are_can_call_the_request_bad(start_gateway, fake, streaming):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", error(422))
    fake.script("b", error(422))

    got = await gateway.ask(streaming=streaming)

    assert_error(got, 422, INVALID, "bad_request")
    assert fake.called == ["a", "b"]


async def test_bad_requests_that_are_not_in_a_row_do_not_end_it(start_gateway, fake):
    gateway = await start_gateway(["a", "b", "c", "d"])
    for name, status in {"a": 400, "b": 404, "c": 400}.items():
        fake.script(name, error(status))

    assert (await gateway.chat()).text == "hello from d"


# --- Nothing could serve ----------------------------------------------------------------------------------------


@both_ways
async def test_keys_that_are_all_invalid_give_no_providers_and_not_the_demo(start_gateway, fake, streaming):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", error(401))
    fake.script("b", error(401))
    assert (await gateway.ask(streaming=streaming)).status == 502

    got = await gateway.ask(streaming=streaming)

    assert_error(got, 503, "routing_error", "no_providers")
    assert fake.called == ["a", "b"]
    refused = (await gateway.rows(3))[-1]
    assert refused["status"] == "error"
    assert not refused["platform"]
    assert refused["request_id"] == got.headers["X-Request-Id"]


# --- Everything cools -------------------------------------------------------------------------------------------


@both_ways
async def test_only_transient_cooldowns_in_the_way_give_503_with_the_soonest_time(start_gateway, fake, streaming):
    gateway = await start_gateway(["a", "b"], {"TRANSIENT_COOLDOWN_MS": "5000"})
    fake.script("a", error(500))
    fake.script("b", error(500))
    await gateway.chat()

    got = await gateway.ask(streaming=streaming)

    assert_error(got, 503, "routing_error", "all_models_exhausted")
    assert 1 <= int(got.headers["Retry-After"]) <= 5
    assert fake.called == ["a", "b"]
    assert (await gateway.rows(3))[-1]["status"] == "error"


async def test_transient_cooldowns_and_rate_limits_together_give_503(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", error(500))
    fake.script("b", error(429, headers={"retry-after": "3"}))
    await gateway.chat()

    got = await gateway.chat()

    assert_error(got, 503, "routing_error", "all_models_exhausted")
    assert 1 <= int(got.headers["Retry-After"]) <= 3
    assert fake.called == ["a", "b"]


@both_ways
async def test_only_key_cooldowns_give_429_with_the_soonest_time_before_and_after_attempts(
    start_gateway, fake, streaming
):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", error(429, headers={"retry-after": "70"}))
    fake.script("b", error(429, headers={"retry-after": "8"}))

    first = await gateway.ask(streaming=streaming)
    second = await gateway.ask(streaming=streaming)

    for got in (first, second):
        assert_error(got, 429, "rate_limit_error", "rate_limited")
        assert 7 <= int(got.headers["Retry-After"]) <= 8
    assert fake.called == ["a", "b"]
    assert [attempt["kind"] for attempt in first.error["attempts"]] == ["rate_limited"] * 2
    assert "attempts" not in second.error


async def test_a_reached_rate_limit_gives_429(start_gateway, fake):
    gateway = await start_gateway({"a": {"model": {"rpm": 1}}})
    assert (await gateway.chat()).status == 200

    got = await gateway.chat()

    assert_error(got, 429, "rate_limit_error", "rate_limited")
    assert 1 <= int(got.headers["Retry-After"]) <= 60
    assert fake.called == ["a"]


# --- Timeouts and the rest --------------------------------------------------------------------------------------


async def test_a_last_timeout_gives_504(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], {"REQUEST_TIMEOUT_MS": "60"})
    fake.script("a", error(500))
    fake.script("b", raw(PAUSE))

    assert_error(await gateway.chat(), 504, "timeout", "timeout")


async def test_a_last_stall_of_a_stream_gives_504_as_json(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], {"MAX_STREAM_STALL_MS": "60"})
    fake.script("a", error(500))
    fake.script("b", chunked(PAUSE))

    got = await gateway.stream()

    assert_error(got, 504, "stream_timeout", "stream_timeout")


@both_ways
async def test_failures_of_all_sorts_give_502_and_list_every_attempt(start_gateway, fake, streaming):
    gateway = await start_gateway(["a", "b", "c"])
    fake.script("a", error(404, f"no such model for {default_key('a')}"))
    fake.script("b", raw(RESET))
    fake.script("c", error(503, "overloaded"))

    got = await gateway.ask(streaming=streaming)

    assert_error(got, 502, "provider_error", "all_attempts_failed")
    first, second, third = got.error["attempts"]
    assert [set(attempt) for attempt in got.error["attempts"]] == [
        {"platform", "model", "status", "kind", "ms", "message"}
    ] * 3
    assert (first["platform"], first["model"], first["status"], first["kind"]) == ("a", "a-model", 404, "not_found")
    assert (second["platform"], second["status"], second["kind"]) == ("b", None, "connection")
    assert (third["platform"], third["status"], third["kind"]) == ("c", 503, "server_error")
    assert third["message"] == "overloaded"
    assert "no such model for" in first["message"]
    assert default_key("a").encode() not in got.body
    assert all(attempt["ms"] >= 0 for attempt in got.error["attempts"])
    assert got.headers["X-Fallback-Attempts"] == "3"


async def test_an_exhausted_request_is_noted_in_the_output_with_the_state_of_the_pool(start_process, fake):
    fake.script("a", error(500))
    running = await start_process(["a"], {"GATEWAY_API_KEY": "fw-test-0123456789abcdef"})
    async with client_of(running) as client:
        codes = [(await client.chat()).error["code"] for _ in range(2)]
        assert codes[-1] == "all_models_exhausted"
        await until(lambda: len(exhausted_lines(running)) == 2)
    for line, code in zip(exhausted_lines(running), codes, strict=True):
        assert code in line
        assert "pool" in line
        assert "a-model" in line


def exhausted_lines(running) -> list[str]:
    return [line for line in running.output if '"event":"all_models_exhausted"' in line.replace(": ", ":")]


# --- Pinned models ----------------------------------------------------------------------------------------------


async def test_without_fallback_only_the_pinned_model_is_tried(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", error(404))

    got = await gateway.chat(model="a-model", headers={"X-Fallback": "none"})

    assert_error(got, 502, "provider_error", "all_attempts_failed")
    assert fake.called == ["a"]


async def test_without_fallback_a_cooling_model_is_exhausted(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", error(500))
    await gateway.chat()
    fake.clear()

    got = await gateway.chat(model="a-model", headers={"X-Fallback": "none"})

    assert_error(got, 503, "routing_error", "all_models_exhausted")
    assert fake.called == []


async def test_a_recovered_platform_serves_again_after_exhaustion(start_gateway, fake):
    gateway = await start_gateway(["a"], {"TRANSIENT_COOLDOWN_MS": "60"})
    fake.script("a", error(500), answer("well again"))
    assert (await gateway.chat()).status == 502

    await gateway.uncooled()

    assert (await gateway.chat()).text == "well again"


@both_ways
async def test_requests_in_parallel_share_what_one_of_them_learned(start_gateway, fake, streaming):
    gateway = await start_gateway(["a", "b"])
    b_may_answer = asyncio.Event()
    fake.script("a", error(503))
    good = sse(*[{"choices": [{"index": 0, "delta": {"content": "ok"}, "finish_reason": "stop"}]}])
    slow = raw(Wait(b_may_answer), *(good if streaming else completion("ok")).steps)
    fake.script("b", slow)
    first = asyncio.create_task(gateway.ask(streaming=streaming))
    await fake.arrived(2)

    second = asyncio.create_task(gateway.ask(streaming=streaming))
    await fake.arrived(3)
    b_may_answer.set()

    assert (await first).text == (await second).text == "ok"
    assert fake.called == ["a", "b", "b"]
    assert "X-Fallback-Attempts" not in (await second).headers
