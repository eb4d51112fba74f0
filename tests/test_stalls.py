"""SPEC 8.3, 8.4 and 8.7: heartbeats, stalls before and after the headers, slow clients."""

import asyncio
import time

import pytest
from conftest import Stream
from fake_provider import PAUSE, ROLE, STOP, Every, Wait, answer, chunk, chunked, event, in_time, raw, sse, until

HEARTBEAT = b": keep-alive"
STALL_MS = 80
SHORT_STALL = {"MAX_STREAM_STALL_MS": str(STALL_MS)}


# --- Heartbeats -------------------------------------------------------------------------------------------------


async def test_a_silent_stream_is_kept_alive_with_comments(start_gateway, fake):
    gateway = await start_gateway(["a"], {"KEEPALIVE_INTERVAL_MS": "20"})
    go_on = asyncio.Event()
    fake.script("a", sse(chunk("be"), Wait(go_on), chunk("gin"), STOP))

    async with gateway.post(gateway.request(stream=True)) as response, asyncio.timeout(5):
        received = b""
        while received.count(HEARTBEAT) < 3:
            received += await response.content.readany()
        go_on.set()
        got = Stream(200, response.headers, received + await response.read())

    got.assert_whole("begin")
    assert got.body.startswith(event(chunk("be")) + HEARTBEAT + b"\n\n")
    assert set(got.comments) == {": keep-alive"}
    assert (await gateway.row())["status"] == "success"


async def test_no_heartbeat_is_sent_before_the_headers(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], {"KEEPALIVE_INTERVAL_MS": "10", **SHORT_STALL})
    fake.script("a", sse(ROLE, PAUSE))

    got = await gateway.stream()

    got.assert_whole("hello from b")
    assert not got.comments


async def test_a_busy_stream_needs_no_heartbeat(start_gateway, fake):
    gateway = await start_gateway(["a"], {"KEEPALIVE_INTERVAL_MS": "200"})
    fake.script("a", sse(Every(0.005, event(chunk("x")), times=60), STOP))

    got = await gateway.stream()

    got.assert_whole("x" * 60)
    assert not got.comments


# --- Stalls before the headers ----------------------------------------------------------------------------------

SILENCES = {"no answer at all": raw(PAUSE), "nothing after the headers": chunked(PAUSE), "a role": sse(ROLE, PAUSE)}


@pytest.mark.parametrize("silence", SILENCES.values(), ids=SILENCES)
async def test_a_stall_before_the_first_token_closes_the_connection_and_moves_on(start_gateway, fake, silence):
    gateway = await start_gateway(["a", "b"], SHORT_STALL)
    fake.script("a", silence)

    got = await gateway.stream()

    got.assert_whole("hello from b")
    assert await fake.closed(0) - fake.requests[0].arrived_at < 5 * STALL_MS / 1000
    assert fake.requests[0].closed_at <= fake.requests[1].arrived_at + 0.02
    assert got.headers["X-Fallback-Trail"] == "a/a-model=stall"
    assert set(await gateway.cooled_models()) == {"a-model"}


@pytest.mark.parametrize("silence", SILENCES.values(), ids=SILENCES)
async def test_a_stall_that_leaves_no_route_is_a_504_in_json(start_gateway, fake, silence):
    gateway = await start_gateway(["a"], SHORT_STALL)
    fake.script("a", silence)

    got = await gateway.stream()

    assert got.status == 504
    assert got.headers["content-type"].startswith("application/json")
    assert (got.error["type"], got.error["code"]) == ("stream_timeout", "stream_timeout")
    assert got.error["attempts"][0]["kind"] == "stall"
    await fake.closed(0)
    row = await gateway.row()
    assert (row["status"], row["error_kind"]) == ("error", "stall")


async def test_comments_keep_a_provider_from_stalling(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], SHORT_STALL)
    comments = Every(0.02, b": OPENROUTER PROCESSING\n\n", times=15)  # in all, more than three times the stall
    fake.script("a", sse(comments, ROLE, comments, chunk("patience"), comments, STOP))

    got = await gateway.stream()

    got.assert_whole("patience")
    assert fake.called == ["a"]


@pytest.mark.parametrize("filler", [b": working\n\n", event(ROLE), event(chunk(" "))], ids=["comment", "role", "blank"])
async def test_a_first_token_that_never_comes_is_given_up_whatever_else_arrives(start_gateway, fake, filler):
    gateway = await start_gateway(["a", "b"], {"FIRST_TOKEN_TIMEOUT_MS": "100", "MAX_STREAM_STALL_MS": "5000"})
    fake.script("a", chunked(Every(0.01, filler)))

    got = await gateway.stream()

    got.assert_whole("hello from b")
    taken_s = await fake.closed(0) - fake.requests[0].arrived_at
    assert 0.05 <= taken_s < 0.5  # from when the request was seen here, a little after it began
    assert (await gateway.rows(2))[0]["error_kind"] == "timeout"
    assert set(await gateway.cooled_models()) == {"a-model"}


@pytest.mark.parametrize(
    ("first_token_ms", "stall_ms", "kind"),
    [("40", "5000", "timeout"), ("5000", "40", "stall"), ("40", "40", "timeout")],
)
async def test_which_limit_ended_the_wait_does_not_depend_on_the_tick_in_which_its_timer_fired(
    start_gateway, fake, first_token_ms, stall_ms, kind
):
    """The loop's clock counts whole milliseconds, and a timer may fire in the last one before its time."""
    gateway = await start_gateway(["a"], {"FIRST_TOKEN_TIMEOUT_MS": first_token_ms, "MAX_STREAM_STALL_MS": stall_ms})
    fake.script("a", sse(PAUSE))

    for _ in range(10):
        got = await asyncio.gather(*(gateway.stream(model="a-model") for _ in range(5)))
        assert {answer.error["code"] for answer in got} <= {"stream_timeout", "all_models_exhausted"}
        await gateway.recovered()

    rows = (await gateway.get("/api/requests?limit=1000&platform=a")).json["rows"]
    assert len(rows) >= 10
    assert {row["error_kind"] for row in rows} == {kind}


async def test_the_first_token_timeout_ends_with_the_first_token(start_gateway, fake):
    gateway = await start_gateway(["a"], {"FIRST_TOKEN_TIMEOUT_MS": "60"})
    fake.script("a", sse(Every(0.01, event(chunk("x")), times=20), STOP))

    (await gateway.stream()).assert_whole("x" * 20)


async def test_a_whole_answer_knows_no_stall(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], {"MAX_STREAM_STALL_MS": "20", "FIRST_TOKEN_TIMEOUT_MS": "20"})
    slow = chunked(Every(0.03, b" ", times=3), b"", headers={"content-type": "application/json"})
    content = b'{"choices":[{"index":0,"message":{"role":"assistant","content":"slow"},"finish_reason":"stop"}]}'
    steps = (*slow.steps[:2], b"%x\r\n%b\r\n" % (len(content), content), b"0\r\n\r\n")
    fake.script("a", raw(*steps))

    assert (await gateway.chat()).text == "slow"


# --- Stalls after the headers -----------------------------------------------------------------------------------


async def test_a_stall_after_the_first_token_ends_the_stream_with_an_error_and_done(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], SHORT_STALL)
    fake.script("a", sse(ROLE, chunk("half an ans"), PAUSE))

    got = await gateway.stream()

    assert got.text == "half an ans"
    assert (got.error["type"], got.error["code"]) == ("stream_timeout", 504)
    assert got.error["message"]
    told, ended = got.chunks[-2:]  # the error alone, then an ending of its own (SPEC 8.5)
    assert told.keys() == {"error"}
    assert ended["choices"] == [{"index": 0, "delta": {}, "finish_reason": "error"}]
    got.assert_done_once()
    assert fake.called == ["a"]
    assert await fake.closed(0) - fake.requests[0].arrived_at < 5 * STALL_MS / 1000
    row = await gateway.row()
    assert (row["status"], row["error_kind"]) == ("error", "stall")
    assert set(await gateway.cooled_models()) == {"a-model"}


async def test_heartbeats_do_not_hide_a_stall(start_gateway, fake):
    gateway = await start_gateway(["a"], {"KEEPALIVE_INTERVAL_MS": "10", **SHORT_STALL})
    fake.script("a", sse(chunk("half"), PAUSE))

    got = await gateway.stream()

    assert got.comments
    assert got.error["type"] == "stream_timeout"
    got.assert_done_once()


async def test_a_stall_after_the_finish_is_a_normal_end(start_gateway, fake):
    gateway = await start_gateway(["a"], SHORT_STALL)
    fake.script("a", sse(chunk("all well"), STOP, PAUSE))

    (await gateway.stream()).assert_whole("all well")

    assert (await gateway.row())["status"] == "success"
    assert await gateway.cooled_models() == {}


# --- Slow clients -----------------------------------------------------------------------------------------------

BIG_WORD = "x" * (1 << 16)
BIG_WORDS = 640  # 40 MiB: more than all the socket buffers on the way


async def test_a_slow_client_pauses_its_provider_is_no_stall_and_slows_nobody(start_gateway, fake):
    gateway = await start_gateway(["a", "b"], {**SHORT_STALL, "FIRST_TOKEN_TIMEOUT_MS": "60000"})
    fake.script("a", sse(*[chunk(BIG_WORD)] * BIG_WORDS, STOP), answer("quick"))
    request = fake.requests

    async with gateway.post(gateway.request(stream=True)) as response:
        written = -1
        while request[0].written != written:  # the provider is held up for some stall times
            written = request[0].written
            await unread(3 * STALL_MS / 1000, gateway)
        assert written < 30 << 20
        assert request[0].closed_at is None
        got = Stream(200, response.headers, await response.read())

    got.assert_whole(BIG_WORD * BIG_WORDS)
    assert (await gateway.rows(fake.called.count("a")))[-1]["status"] == "success"
    assert await gateway.cooled_models() == {}


async def unread(seconds: float, gateway) -> None:
    """Let the time pass in which the slow client reads nothing, while another one is served at once."""
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        async with in_time(0.5):
            (await gateway.stream()).assert_whole("quick")
        await asyncio.sleep(0.02)


async def test_a_slow_client_that_leaves_frees_its_provider(start_gateway, fake):
    gateway = await start_gateway(["a"], SHORT_STALL)
    fake.script("a", sse(*[chunk(BIG_WORD)] * BIG_WORDS, STOP))
    response = await gateway.post(gateway.request(stream=True))
    request = await fake.arrived(1)
    await until(lambda: request.written > 1 << 20)

    response.close()

    await fake.closed(0)
    assert (await gateway.row())["status"] == "cancelled"
