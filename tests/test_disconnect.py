"""SPEC 8.6: a client that leaves takes its provider's connection with it, at once and without a trace."""

import asyncio
import contextlib
import fcntl
import json
import os
import socket
import struct
import termios
import time

import pytest
from conftest import both_ways
from fake_provider import (
    CUT,
    PAUSE,
    PROMISED,
    ROLE,
    Every,
    answer,
    assert_in_time,
    chunk,
    chunked,
    event,
    raw,
    silent_url,
    sse,
    until,
)  # fmt: skip

ESTABLISHED, SYN_SENT = 1, 2  # as in TCP_INFO

# How far the exchange has got when the client leaves: is it a stream, what has the provider done so far.
MOMENTS = {
    "waiting for a whole answer": (False, raw(PAUSE)),
    "in the middle of the body": (False, raw(PROMISED, b'{"id":', PAUSE)),
    "waiting for the provider's headers": (True, raw(PAUSE)),
    "waiting for the first token": (True, chunked(PAUSE)),
    "after a role": (True, sse(ROLE, PAUSE)),
    "in mid-stream": (True, sse(ROLE, chunk("half an ans"), PAUSE)),
}


async def leave_when(gateway, condition, *, streaming: bool, **fields: object) -> float:
    """Send a request and close its connection when the condition holds; returns when that was."""
    response = None

    async def exchange() -> None:
        nonlocal response
        response = await gateway.post(gateway.request("I will not wait", stream=streaming, **fields))
        await response.read()

    task = asyncio.create_task(exchange())
    await until(condition)
    left_at = time.monotonic()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    if response is not None:
        response.close()
    return left_at


@pytest.mark.parametrize(("streaming", "reply"), MOMENTS.values(), ids=MOMENTS)
async def test_a_client_that_leaves_ends_the_providers_work(start_gateway, fake, streaming, reply):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", reply)

    left_at = await leave_when(gateway, lambda: fake.requests and fake.requests[0].paused, streaming=streaming)

    assert_in_time(await fake.closed(0) - left_at)
    row = await gateway.row()
    assert (row["status"], row["platform"], row["streamed"]) == ("cancelled", "a", int(streaming))
    assert fake.called == ["a"]
    assert await gateway.cooled_models() == await gateway.cooled_keys() == {}
    assert (await gateway.protection())["active"] == []


@both_ways
async def test_a_client_that_leaves_while_connecting_ends_the_attempt(start_gateway, fake, streaming):
    with silent_url() as url:
        gateway = await start_gateway({"a": {"base_url": url}, "b": {}})
        before = len(unsent(SYN_SENT))

        left_at = await leave_when(gateway, lambda: len(unsent(SYN_SENT)) > before, streaming=streaming)

        await until(lambda: len(unsent(SYN_SENT)) == before)
        assert_in_time(time.monotonic() - left_at)
        assert (await gateway.row())["status"] == "cancelled"
        assert fake.called == []
        assert await gateway.cooled_models() == {}


async def test_a_client_that_leaves_while_the_provider_does_not_even_read_ends_the_attempt(start_gateway, fake):
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # the system answers for it, and its buffers fill
        port = deaf.getsockname()[1]
        gateway = await start_gateway({"a": {"base_url": f"http://127.0.0.1:{port}/v1"}})

        def stuck() -> bool:
            return any(unsent(ESTABLISHED, port))

        left_at = await leave_when(gateway, stuck, streaming=True, padding="x" * (16 << 20))

        await until(lambda: not unsent(ESTABLISHED, port))
        assert_in_time(time.monotonic() - left_at)
        assert (await gateway.row())["status"] == "cancelled"


def unsent(state: int, port: int | None = None) -> list[int]:
    """This process's connections in that state, and to that port where there is one: how many bytes each has not sent.

    The system's own table would do, but to read it takes a hundredth of a second where many connections have ended.
    """
    found: list[int] = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
        except FileNotFoundError:  # closed in the meantime
            continue
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as one:
            if one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != state:
                continue
            if port is None or one.getpeername()[1] == port:
                found.append(struct.unpack("i", fcntl.ioctl(one, termios.TIOCOUTQ, bytes(4)))[0])
    return found


async def test_a_client_that_leaves_after_a_failover_cancels_only_the_last_attempt(start_gateway, fake):
    gateway = await start_gateway(["a", "b", "c"])
    fake.script("a", raw(CUT))
    fake.script("b", raw(PAUSE))

    left_at = await leave_when(gateway, lambda: len(fake.requests) == 2, streaming=True)

    assert_in_time(await fake.closed(1) - left_at)
    assert [row["status"] for row in await gateway.rows(2)] == ["error", "cancelled"]
    assert fake.called == ["a", "b"]


async def test_a_client_that_sends_only_half_its_body_reaches_no_provider(start_gateway, fake):
    gateway = await start_gateway(["a"])
    port = int(gateway.base_url.rsplit(":", 1)[1])
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\nauthorization: Bearer {gateway.api_key}"
    writer.write(f'{lines}\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{{"model":'.encode())
    await writer.drain()
    writer.transport.abort()

    assert (await gateway.chat()).status == 200

    assert fake.called == ["a"]
    assert (await gateway.row())["status"] == "success"


def as_bytes(gateway, request: dict) -> bytes:
    body = json.dumps(request).encode()
    lines = f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {gateway.api_key}"
    return f"{lines}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


async def test_a_client_that_leaves_with_a_second_request_in_the_pipe_ends_the_first_one_all_the_same(
    start_gateway, fake
):
    gateway = await start_gateway(["a", "b"])
    fake.script("a", sse(ROLE, chunk("half an ans"), Every(0.01, event(chunk("!")))))
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.base_url.rsplit(":", 1)[1]))
    writer.write(2 * as_bytes(gateway, gateway.request("I will not wait", stream=True)))
    await reader.readuntil(b"half an ans")

    left_at = time.monotonic()
    writer.transport.abort()

    assert_in_time(await fake.closed(0) - left_at)
    assert [row["status"] for row in await gateway.rows(1)] == ["cancelled"]
    assert fake.called == ["a"]


async def test_what_is_no_request_behind_one_that_is_served_ends_it_and_adds_nothing_to_its_answer(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", sse(chunk("half an ans"), PAUSE))
    reader, writer = await asyncio.open_connection("127.0.0.1", int(gateway.base_url.rsplit(":", 1)[1]))
    writer.write(as_bytes(gateway, gateway.request(stream=True)))
    await reader.readuntil(b"half an ans")

    writer.write(b"\0\0 no request\r\n\r\n")

    assert b"HTTP/1.1" not in await reader.read()
    assert (await gateway.row())["status"] == "cancelled"
    writer.close()


async def test_a_client_that_has_its_answer_and_leaves_is_a_success(start_gateway, fake):
    gateway = await start_gateway(["a"])
    for streaming in (False, True) * 5:
        async with gateway.post(gateway.request(stream=streaming), headers={"connection": "close"}) as response:
            await response.read()

    assert {row["status"] for row in await gateway.rows(10)} == {"success"}


async def test_other_requests_are_served_while_clients_leave(start_gateway, fake):
    gateway = await start_gateway(["a"])
    fake.script("a", lambda request: raw(PAUSE) if "not wait" in request.prompt else answer("served")(request))
    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(leave_when(gateway, lambda: len(fake.requests) >= 20, streaming=True))
        served = [group.create_task(gateway.ask(streaming=bool(n % 2))) for n in range(40)]

    assert {(await task).text for task in served} == {"served"}


async def test_three_hundred_clients_that_leave_leak_nothing(start_gateway, fake):
    gateway = await start_gateway(["a", "b"])
    await leave_in_batches(gateway, fake, count=30)
    await settled(gateway, fake)
    before = resources()

    await leave_in_batches(gateway, fake, count=300)

    await settled(gateway, fake)
    await until(lambda: all(now <= then for now, then in zip(resources(), before, strict=True)))
    rows = await gateway.rows(330)
    assert {row["status"] for row in rows} == {"cancelled"}


async def leave_in_batches(gateway, fake, *, count: int) -> None:
    """In batches of 30, five of each moment."""
    moments = list(MOMENTS.values())
    for _ in range(count // 30):
        fake.clear()
        for streaming, reply in moments:
            fake.script("a", reply)
            expected = len(fake.requests) + 5

            def all_there(expected: int = expected) -> bool:
                return len(fake.requests) == expected and all(request.paused for request in fake.requests)

            await asyncio.gather(*[leave_when(gateway, all_there, streaming=streaming) for _ in range(5)])


async def settled(gateway, fake) -> None:
    """All connections of those who left are gone; those that are kept for later are as many as ever."""
    await until(lambda: all(request.closed_at for request in fake.requests))
    assert (await gateway.get("/healthz")).status == 200


def resources() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
