"""How responses leave: what a client reads on its connection, byte by byte (transport/response.py)."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import pytest
import uvicorn

from transport.connection import ClientConnection

App = Callable[..., Awaitable[None]]
GET, POST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


def start(*headers: tuple[bytes, bytes], status: int = 200):
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def part(text: bytes = b"", *, more: bool = False):
    return {"type": "http.response.body", "body": text, "more_body": more}


def length(count: int) -> tuple[bytes, bytes]:
    return b"content-length", str(count).encode()


def sending(*messages) -> App:
    """An app that answers every request with these messages."""

    async def app(scope, receive, send):
        for message in messages:
            await send(message)

    return app


@contextlib.asynccontextmanager
async def served(app: App, head_s: float = 20, keep_alive_s: int = 65) -> AsyncIterator[int]:
    """The port of a server that runs this app as the gateway's is run."""
    config = uvicorn.Config(
        app, http=partial(ClientConnection, head_s=head_s), interface="asgi3", lifespan="off", log_config=None,
        server_header=False, timeout_keep_alive=keep_alive_s,
    )  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve(sockets=[listener]))
        yield listener.getsockname()[1]
        server.should_exit = True
        await running


async def read_all(app: App, *requests: bytes) -> bytes:
    """Everything the server sends until it hangs up, without the date."""
    async with served(app) as port, asyncio.timeout(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"".join(requests))
        got = await reader.read()
        writer.close()
    return b"\r\n".join(line for line in got.split(b"\r\n") if not line.startswith(b"date: "))


async def test_head_and_first_bytes_leave_in_one_packet():
    async def app(scope, receive, send):
        await send(start())
        await asyncio.sleep(0.01)
        await send(part(b"first", more=True))
        await asyncio.sleep(0.05)
        await send(part(b"last"))

    async with served(app) as port, asyncio.timeout(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(POST)
        first, rest = await reader.read(65_536), await reader.readuntil(b"0\r\n\r\n")
        writer.close()

    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert first.endswith(b"transfer-encoding: chunked\r\n\r\n5\r\nfirst\r\n")
    assert rest == b"4\r\nlast\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    ("messages", "answer"),
    [
        ([start(length(2)), part(b"ok")], b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"),
        ([start(length(2)), part(b"o", more=True), part(b"k")],
         b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"),
        ([start(length(0)), part()], b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"),
        ([start((b"x-a", b"1"), status=503), part(b"no")],
         b"HTTP/1.1 503 Service Unavailable\r\nx-a: 1\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
         b"2\r\nno\r\n0\r\n\r\n"),
        ([start(), part(b"", more=True), part(b"a", more=True), part()],
         b"HTTP/1.1 200 OK\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"),
        ([start(status=204), part()], b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n"),
        ([start((b"connection", b"close"), length(1)), part(b"x")],
         b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 1\r\n\r\nx"),
    ],
    ids=["whole", "in two", "empty", "chunked", "begins empty", "without a body", "its own connection header"],
)  # fmt: skip
async def test_a_response_is_what_the_app_said(messages, answer):
    assert await read_all(sending(*messages), LAST) == answer


async def test_the_answer_to_head_is_a_head():
    got = await read_all(sending(start(length(2)), part(b"ok")), LAST.replace(b"GET", b"HEAD"))

    assert got == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n"


async def test_a_client_of_http_1_0_is_told_that_the_connection_ends():
    got = await read_all(sending(start(length(2)), part(b"ok")), b"GET / HTTP/1.0\r\n\r\n")

    assert got == b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"


async def test_requests_of_one_connection_are_answered_in_their_order():
    async def app(scope, receive, send):
        await send(start(length(len(scope["path"]))))
        await asyncio.sleep(0.02 if scope["path"] == "/slow" else 0)
        await send(part(scope["path"].encode()))

    got = await read_all(app, GET.replace(b"/ ", b"/slow "), GET.replace(b"/ ", b"/2 "), LAST.replace(b"/ ", b"/3 "))

    assert [answer.split(b"\r\n\r\n")[1] for answer in got.split(b"HTTP/1.1 200 OK")[1:]] == [b"/slow", b"/2", b"/3"]


@pytest.mark.parametrize(("keep_alive_s", "kept"), [(0, False), (65, True)])
async def test_a_connection_is_kept_for_so_long_between_two_requests(keep_alive_s, kept):
    async with served(sending(start(length(2)), part(b"ok")), 0.02, keep_alive_s) as port, asyncio.timeout(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GET)
        await reader.readuntil(b"ok")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2 if kept else 5):
                assert await reader.read() == b""
        assert reader.at_eof() is not kept
        writer.close()


@pytest.mark.parametrize(
    "messages",
    [[start((b"x-a", b"1\r\nx-b: 2"), length(2)), part(b"ok")], [start(length(1)), part(b"ok")], [start(length(2))]],
    ids=["a line break in a header", "longer than it says", "without a body"],
)
async def test_an_app_that_says_something_wrong_sends_nothing_of_it(caplog, messages):
    with caplog.at_level(logging.CRITICAL, logger="uvicorn.error"):
        got = await read_all(sending(*messages), LAST)

    assert got.startswith(b"HTTP/1.1 500 ")
    assert b"x-b" not in got
    assert b"ok" not in got


async def test_an_app_that_fails_behind_its_head_has_sent_none(caplog):
    async def app(scope, receive, send):
        await send(start())
        raise ValueError

    with caplog.at_level(logging.CRITICAL, logger="uvicorn.error"):
        assert (await read_all(app, LAST)).startswith(b"HTTP/1.1 500 ")


async def test_a_body_shorter_than_it_says_ends_with_the_connection(caplog):
    with caplog.at_level(logging.CRITICAL, logger="uvicorn.error"):
        got = await read_all(sending(start(length(3)), part(b"a", more=True), part(b"b")), GET)

    assert got.endswith(b"\r\n\r\nab")


async def test_a_client_that_reads_slowly_gets_everything_and_holds_the_app_up():
    piece, count, sent = b"x" * 65_536, 100, 0

    async def app(scope, receive, send):
        nonlocal sent
        await send(start())
        for _ in range(count):
            await send(part(piece, more=True))
            sent += 1
        await send(part())

    async with served(app) as port, asyncio.timeout(10):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", port))
        await loop.sock_sendall(client, LAST)
        before = -1
        while sent != before:  # until it is held up
            before = sent
            await asyncio.sleep(0.05)
        held_up_at, got = sent, bytearray()
        while data := await loop.sock_recv(client, 1 << 20):
            got += data
        client.close()

    assert held_up_at < count
    assert got.count(b"x") == len(piece) * count
    assert got.endswith(b"0\r\n\r\n")


async def test_what_is_sent_to_a_client_that_has_gone_is_dropped():
    done = asyncio.Event()

    async def app(scope, receive, send):
        await send(start())
        await send(part(b"a", more=True))
        while (await receive())["type"] != "http.disconnect":
            pass
        await send(part(b"b", more=True))
        await send(part())
        done.set()

    async with served(app) as port, asyncio.timeout(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(POST)
        await reader.readuntil(b"1\r\na\r\n")
        writer.close()
        await done.wait()
