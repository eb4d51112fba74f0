"""A hostile day: whoever sends too much, too slowly, for ever, or nothing at all, harms nobody else.

What takes long or wants a process of its own is in bench/hostile.py.
"""

import asyncio
import contextlib
import gzip
import json
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator
from functools import cache, partial

import aiohttp
import pytest
from conftest import API_KEY, ROOT, Client, both_ways, catalog_of, client_of, logged, run_gateway
from fake_provider import CUT, DONE, ROLE, Every, TooLate, body, chunk, chunked, event, raw, sse

from records.database import Store
from records.rows import Row
from transport.connection import HEAD_BYTES_MAX, ClientConnection

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer " + API_KEY.encode()
STALL = {"MAX_STREAM_STALL_MS": "80", "FIRST_TOKEN_TIMEOUT_MS": "150", "REQUEST_TIMEOUT_MS": "150"}


# --- Connections ----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def connected(gateway) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.base_url.rsplit(":", 1)[1]))
    try:
        async with asyncio.timeout(5):
            yield reader, writer
    finally:
        writer.close()


@pytest.fixture
async def impatient(fake, tmp_path):
    """A gateway that waits 60 ms for a request's head."""
    (tmp_path / "c.json").write_text(json.dumps(catalog_of(["a", "b"], fake)))
    running = await run_gateway(
        {"GATEWAY_CATALOG": str(tmp_path / "c.json")}, tmp_path, http=partial(ClientConnection, head_s=0.06)
    )
    yield running
    await running.stop()


async def sent_slowly(writer: asyncio.StreamWriter, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        for letter in data:
            if writer.is_closing():
                return
            writer.write(bytes([letter]))
            await writer.drain()
            await asyncio.sleep(0.002)


@pytest.mark.parametrize(
    "first", [b"", b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"], ids=["new", "used before"]
)
@pytest.mark.parametrize("slowly", [HEAD, b"\r\n" * 100], ids=["a head", "empty lines"])
async def test_a_head_that_comes_letter_by_letter_is_not_waited_for(impatient, first, slowly):
    async with connected(impatient) as (reader, writer):
        if first:
            writer.write(first)
            await reader.readuntil(b'{"status":"ok"}')
        sending = asyncio.create_task(sent_slowly(writer, slowly))
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        await sending

    assert (await impatient.chat()).status == 200


async def test_a_connection_that_says_nothing_is_closed_and_one_that_is_served_is_not(impatient, fake):
    fake.script("a", sse(chunk("be"), Every(0.02, b": c\n\n", times=15), chunk("gun"), chunk(finish="stop")))

    async with connected(impatient) as (reader, _):
        served = asyncio.create_task(impatient.stream())
        assert await reader.read() == b""
        assert not served.done()
        (await served).assert_whole("begun")


@pytest.mark.parametrize(
    "flood",
    [b"GET /" + b"x" * 400_000, HEAD + b"\r\nx-long: " + b"x" * 400_000, HEAD + b"\r\nx: y" * 80_000],
    ids=["a long address", "a long header", "many headers"],
)
async def test_a_head_without_end_is_refused_at_its_limit(start_gateway, fake, flood):
    gateway = await start_gateway()
    async with connected(gateway) as (reader, writer):
        answer = asyncio.create_task(reader.read())
        with contextlib.suppress(ConnectionError):
            for at in range(0, len(flood), HEAD_BYTES_MAX // 2):
                writer.write(flood[at : at + HEAD_BYTES_MAX // 2])
                await writer.drain()
                await asyncio.sleep(0.001)
        got = await answer

    head, _, content = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431 ")
    assert json.loads(content)["error"]["code"] == "head_too_large"
    assert fake.called == []
    assert (await gateway.chat()).status == 200


async def test_what_is_not_http_is_refused_in_our_own_words(start_gateway):
    async with connected(await start_gateway()) as (reader, writer):
        writer.write(b"hello\r\n\r\n")
        head, _, content = (await reader.read()).partition(b"\r\n\r\n")

    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(content)["error"]["code"] == "invalid_http"


async def test_a_body_that_goes_on_after_its_refusal_is_not_read_for_ever(impatient):
    async with connected(impatient) as (reader, writer):
        writer.write(HEAD + b"x\r\ntransfer-encoding: chunked\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
        await sent_slowly(writer, b"1\r\nx\r\n" * 100)
        with contextlib.suppress(ConnectionError):
            await reader.read()


# --- Providers ------------------------------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\n"
JSON = {"content-type": "application/json"}
ENDLESS = {
    "headers": raw(OK, Every(0, b"x-more: and more\r\n")),
    "one header": raw(OK, b"x-more: ", Every(0, b"x" * 1000)),
    "headers letter by letter": raw(OK, b"x-more: ", Every(0.002, b"x")),
    "interim answers": raw(Every(0.001, b"HTTP/1.1 100 Continue\r\n\r\n")),
    "white space": chunked(Every(0.001, b" " * 1000), headers=JSON),
    "letters one by one": chunked(b'{"choices": [{"message": {"content": "', Every(0.002, b"x"), headers=JSON),
    "JSON": chunked(b'{"choices": [', Every(0, b"[" * 1_000_000), headers=JSON),
    "an error's body": raw(b"HTTP/1.1 500 No\r\n\r\n", Every(0.002, b"x")),
    "comments": chunked(Every(0.001, b": c\n\n")),
    "roles": chunked(Every(0.001, event(ROLE))),
    "one event": chunked(b"data: ", Every(0, b"x" * 100_000)),
    "events of nothing": chunked(Every(0.001, b"data: {}\n\n")),
    "events of noise": chunked(Every(0.001, b"data: \xff\xfe{\r\n\r\n")),
}


@both_ways
async def test_a_provider_that_never_ends_is_given_up(start_gateway, fake, streaming):
    gateway = await start_gateway(["a", "b"], {**STALL, "TRANSIENT_COOLDOWN_MS": "1"})
    for name, endless in ENDLESS.items():
        await gateway.recovered()
        fake.clear()
        fake.script("a", endless)

        got = await gateway.ask(streaming=streaming)

        if got.status == 504:
            raise TooLate("the machine took so long that a provider which answers at once was given up")
        assert got.text == "hello from b", name
        assert fake.called == ["a", "b"], name
        await fake.closed(0)
    rows = await gateway.rows(2 * len(ENDLESS))
    assert {row["error_kind"] for row in rows if row["platform"] == "a"} <= {
        "timeout", "stall", "connection", "malformed", "empty", "server_error",
    }  # fmt: skip


SSE_HEAD = OK + b"content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
PACKED = {
    name: OK + b"content-encoding: %b\r\ncontent-length: 9\r\n\r\nnot so at" % name for name in (b"gzip", b"deflate")
}
NOT_HTTP = {
    "no size of a chunk": raw(SSE_HEAD, b"\r\nzz\r\n"),
    "a negative size": raw(SSE_HEAD, b"\r\n-5\r\nfoo\r\n"),
    "a size beyond all": raw(SSE_HEAD, b"\r\n" + b"f" * 30 + b"\r\nfoo\r\n"),
    "a long extension": raw(SSE_HEAD, b"\r\n3;" + b"x" * 100_000),
    "two lengths": raw(OK, b"content-length: 3\r\ncontent-length: 5\r\n\r\nabcde"),
    "a negative length": raw(OK, b"content-length: -3\r\n\r\nabcde"),
    "a status beyond all": raw(b"HTTP/1.1 999999 OK\r\n\r\nabcde"),
    "a header with NUL": raw(OK, b"x: a\0b\r\n\r\nabcde"),
    "another protocol": raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "an upgrade": raw(b"HTTP/1.1 101 No\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nfoo"),
    "no content": raw(b"HTTP/1.1 204 No\r\n\r\n"),
    "not gzip": raw(PACKED[b"gzip"]),
    "not deflate": raw(PACKED[b"deflate"]),
    "an event of 1 MiB without an end": raw(OK, b"\r\n", b"data: " + b"x" * ((1 << 20) - 6), CUT),
}


@both_ways
async def test_a_provider_that_speaks_no_http_is_passed_over(start_gateway, fake, streaming):
    gateway = await start_gateway(["a", "b"], {**STALL, "TRANSIENT_COOLDOWN_MS": "1"})
    for name, reply in NOT_HTTP.items():
        fake.script("a", reply)
        assert (await gateway.ask(streaming=streaming)).text == "hello from b", name
        await gateway.recovered()
    await gateway.rows(len(NOT_HTTP), platform="a", status="error")


@pytest.mark.parametrize("filler", [b": c\n\n", b"\n", event(ROLE | {"choices": []}), b"data: {\n\n"])
async def test_a_provider_that_goes_on_behind_its_finish_is_not_waited_for(start_gateway, fake, filler):
    gateway = await start_gateway(["a"], STALL)
    fake.script("a", sse(chunk("all well"), chunk(finish="stop"), Every(0.005, filler)))

    (await gateway.stream()).assert_whole("all well")

    await fake.closed(0)
    assert (await gateway.row())["status"] == "success"


async def test_a_stream_that_comes_letter_by_letter_arrives(start_gateway, fake):
    gateway = await start_gateway(["a"], STALL)
    stream = event(chunk("slow ")) + event(chunk("but sure")) + event(chunk(finish="stop")) + DONE
    fake.script("a", chunked(*(stream[at : at + 1] for at in range(len(stream)))))

    (await gateway.stream()).assert_whole("slow but sure")


@cache
def bomb() -> bytes:
    """200 MiB in one. Made where it is wanted: it takes half a second, and each of the suite's processes reads this."""
    return gzip.compress(b" " * (200 << 20), compresslevel=1)


@both_ways
@pytest.mark.parametrize("status", [200, 500])
async def test_an_answer_that_unpacks_without_end_is_given_up(start_gateway, fake, streaming, status):
    gateway = await start_gateway(["a", "b"], {"REQUEST_TIMEOUT_MS": "2000"})
    fake.script("a", body(bomb(), status=status, headers={"content-encoding": "gzip"}))

    got = await gateway.ask(streaming=streaming)

    assert got.text == "hello from b"
    assert (await gateway.rows(2))[0]["error_kind"] in ("malformed", "empty", "connection", "server_error")


# --- The log --------------------------------------------------------------------------------------------------------


async def test_a_row_that_no_database_can_hold_keeps_no_other_from_being_written(tmp_path):
    store = Store(tmp_path / "x.db", None)
    store.log(Row("good 1", 0.0))
    store.log(Row("too large a number", 0.0, output_tokens=10**300))
    store.log(Row("half an emoji", 0.0, error="\ud83d"))
    store.log(Row("good 2", 0.0))

    await store.flush()
    await asyncio.sleep(0)

    assert [id for (id,) in await store.read(lambda db: list(db.execute("SELECT request_id FROM requests")))] == [
        "good 1",
        "good 2",
    ]
    assert (store.pending, store.dropped) == (0, 2)
    await store.close()


async def test_a_full_disk_delays_no_request_and_loses_no_row(start_process, fake, tmp_path):
    """No file of the process may grow, which SQLite takes for a disk without room."""
    running = await start_process(["a"], {"GATEWAY_API_KEY": API_KEY})
    async with client_of(running) as client:
        await client.chat()
        await client.rows(1)
        pid = running.process.pid
        free = resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        for n in range(20):
            assert (await client.ask(streaming=bool(n % 2))).status == 200
        waiting = (await client.get("/api/status")).json["log_queue"]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, free)
        await client.rows(21)
        assert (await client.get("/api/status")).json["log_dropped"] == 0
    assert waiting >= 20, waiting


def closed() -> None:
    os.close(1)


def full() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


@pytest.mark.parametrize("output", [closed, full])
async def test_without_anybody_to_tell_the_gateway_serves_and_stops_in_order(tmp_path, output):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(ROOT / "gateway.py"), "--port", str(port), cwd=tmp_path, preexec_fn=output,
        env={"PATH": os.environ["PATH"], "GATEWAY_API_KEY": API_KEY}, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(20), aiohttp.ClientSession() as http:
        client = Client(f"http://127.0.0.1:{port}", http)
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                assert (await client.chat(model="auto")).status == 200
                break
            assert process.returncode is None, await process.stderr.read()
            await asyncio.sleep(0.01)
        process.terminate()
        assert b"Traceback" not in await process.stderr.read()
    assert await process.wait() in (0, 120)  # 120 is Python's own, for words it still could not write
    assert len(logged(tmp_path / "gateway.db")) == 1
