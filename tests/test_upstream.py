"""Calls to providers on the wire: what is sent, which connections are used again, and odd beginnings of an answer."""

import asyncio
import contextlib
import gzip
from collections.abc import AsyncIterator

import pytest
from conftest import case
from fake_provider import (
    CUT,
    PAUSE,
    RESET,
    Every,
    FakeProvider,
    Wait,
    answer,
    body,
    chunk,
    chunked,
    completion,
    error,
    head,
    raw,
    silent_url,
    sse,
    until,
)

from transport.upstream import CallFailed, ConnectionBroken, ConnectTimeout, Response, Unsendable, Upstream
from wire.http import Endpoint

GOODBYE = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


async def test_the_second_call_goes_over_the_first_ones_connection(fake, start_gateway):
    fake.script("a", answer("one"), answer("two"), answer("three"))
    gateway = await start_gateway(["a"])
    for streaming in (False, True, False):
        assert (await gateway.ask("hi", streaming=streaming)).status == 200
    assert fake.connections == 1


async def test_a_request_is_sent_as_plain_http_with_its_length_and_its_names(fake, start_gateway):
    fake.script("a", answer("one"))
    gateway = await start_gateway(["a"])
    await gateway.chat("hi")
    request = fake.requests[0]
    assert (request.method, request.path) == ("POST", "/a/v1/chat/completions")
    assert request.headers["host"] == fake.url("a").split("/")[2]
    assert request.headers["content-length"] == str(len(request.raw))
    assert request.headers["content-type"] == "application/json"
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["user-agent"].startswith("freeway/")
    assert request.headers["authorization"].startswith("Bearer ")
    expected = {"host", "accept", "accept-encoding", "authorization", "content-length", "content-type", "user-agent"}
    assert {name for name in request.headers if name} == expected


@pytest.mark.parametrize("ending", [[], [CUT]], ids=["and stays", "and leaves"])
async def test_what_a_provider_says_to_an_idle_connection_is_nobodys_answer(fake, start_gateway, ending):
    idle = asyncio.Event()
    fake.script("a", raw(*completion("first").steps, Wait(idle), GOODBYE, *ending), answer("fresh"))
    gateway = await start_gateway(["a"])
    assert (await gateway.chat("hi")).text == "first"
    idle.set()
    await until(lambda: fake.requests[0].finished or fake.open_connections == 0)
    await asyncio.sleep(0.01)  # for the gateway to read it
    got = await gateway.chat("hi again")
    assert got.text == "fresh"
    assert "X-Fallback-Attempts" not in got.headers
    assert fake.connections == 2


async def test_what_comes_behind_an_answer_is_nobodys_answer_either(fake, start_gateway):
    fake.script("a", raw(*completion("first").steps[:-1], completion("first").steps[-1] + GOODBYE), answer("fresh"))
    gateway = await start_gateway(["a"])
    assert (await gateway.chat("hi")).text == "first"
    assert (await gateway.chat("hi again")).text == "fresh"
    assert fake.connections == 2


async def test_answers_of_every_kind_follow_one_another_on_a_connection(fake, start_gateway):
    packed = gzip.compress(completion("packed").steps[-1])
    kinds = {
        "plain": completion("plain"),
        "packed": body(packed, headers={"content-encoding": "gzip"}),
        "an error": error(400),
        "streamed": sse(chunk("streamed"), chunk(finish="stop")),
        "nothing": raw(head(204, {})),
        "chunked": chunked(completion("chunked").steps[-1], headers={"content-type": "application/json"}),
    }
    gateway = await start_gateway(["a"], {"TRANSIENT_COOLDOWN_MS": "1"})
    for before in kinds:
        for name in ("plain", "packed", "chunked", "streamed"):
            fake.script("a", kinds[before], kinds[name])
            await gateway.ask("hi", streaming=before == "streamed")
            await gateway.uncooled()
            with case(f"{name} after {before}"):
                assert (await gateway.ask("hi", streaming=name == "streamed")).text == name
    assert fake.connections == 1


@pytest.mark.parametrize("interim", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early\r\nLink: </x>\r\n\r\n"])
async def test_an_interim_answer_is_waited_through(fake, start_gateway, interim):
    fake.script("a", raw(interim, interim, *completion("fresh").steps))
    gateway = await start_gateway(["a"])
    assert (await gateway.chat("hi")).text == "fresh"


async def test_an_answer_without_a_length_ends_with_its_connection(fake, start_gateway):
    whole = completion("fresh").steps[-1]
    fake.script("a", raw(head(200, {"Content-Type": "application/json"}), whole, CUT), answer("next"))
    gateway = await start_gateway(["a"])
    assert (await gateway.chat("hi")).text == "fresh"
    assert (await gateway.chat("hi")).text == "next"


@pytest.mark.parametrize("status", [101, 204, 301, 304])
async def test_a_status_that_can_be_no_answer_moves_to_the_next_route(fake, start_gateway, status):
    fake.script("a", raw(head(status, {"Location": fake.url("c"), "Connection": "close"}), CUT))
    fake.script("b", answer("from b"))
    gateway = await start_gateway(["a", "b", "c"])
    got = await gateway.chat("hi")
    assert got.text == "from b"
    assert fake.called == ["a", "b"]


async def test_a_prompt_of_megabytes_arrives_whole(fake, start_gateway):
    fake.script("a", answer("read"))
    gateway = await start_gateway({"a": {"model": {"context_window": 10_000_000}}})
    prompt = "Grüße, " * 500_000
    assert (await gateway.chat(prompt)).status == 200
    assert fake.requests[0].prompt == prompt


@pytest.mark.parametrize("address", ["http://[::1", "http://" + "a" * 70 + ".example/v1", "http://xn--/v1"])
async def test_an_address_that_is_none_is_a_failure_like_others(fake, start_gateway, address):
    fake.script("b", answer("from b"))
    gateway = await start_gateway({"a": {"base_url": address}, "b": {}})
    got = await gateway.chat("hi")
    assert got.text == "from b"


async def body_of(response: Response) -> AsyncIterator[bytes]:
    while data := await response.read():
        yield data


async def read(response: Response) -> bytes:
    try:
        return b"".join([data async for data in body_of(response)])
    finally:
        response.close()


@pytest.mark.parametrize("breaks", [RESET, CUT])
async def test_an_idle_connection_that_breaks_at_once_is_replaced_by_a_fresh_one(fake, breaks):
    fake.script("a", completion("first"), raw(breaks), completion("fresh"))
    async with Upstream(connect_s=1.0, stale_s=0.0) as upstream:
        endpoint = Endpoint(fake.url("a"), {})
        await read(await upstream.call("POST", endpoint, b"{}"))
        assert b"fresh" in await read(await upstream.call("POST", endpoint, b"{}"))
    assert fake.connections == 2


async def test_a_fresh_connection_that_breaks_is_a_failure(fake):
    fake.script("a", completion("first"), raw(RESET), raw(CUT), completion("fresh"))
    async with Upstream(connect_s=1.0, stale_s=0.0) as upstream:
        endpoint = Endpoint(fake.url("a"), {})
        await read(await upstream.call("POST", endpoint, b"{}"))
        with pytest.raises(ConnectionBroken):  # on the fresh one it is the server's own doing
            await upstream.call("POST", endpoint, b"{}")
        assert fake.connections == 2
        assert b"fresh" in await read(await upstream.call("POST", endpoint, b"{}"))


async def test_a_connection_in_steady_use_that_breaks_is_a_failure_at_once(fake):
    fake.script("a", completion("first"), raw(CUT), completion("fresh"))
    async with Upstream(connect_s=1.0, stale_s=60.0) as upstream:
        endpoint = Endpoint(fake.url("a"), {})
        await read(await upstream.call("POST", endpoint, b"{}"))
        with pytest.raises(ConnectionBroken):
            await upstream.call("POST", endpoint, b"{}")
        assert fake.connections == 1


async def test_a_connection_that_has_been_idle_for_too_long_is_closed_and_not_used_again(fake):
    fake.script("a", completion("first"), completion("second"), completion("third"))
    async with Upstream(connect_s=1.0, keepalive_s=0.05) as upstream:
        endpoint = Endpoint(fake.url("a"), {})
        await read(await upstream.call("POST", endpoint, b"{}"))
        await fake.closed()
        await read(await upstream.call("POST", endpoint, b"{}"))
        assert fake.connections == 2
        await fake.closed(1)  # whoever closes what is old comes again
    async with Upstream(connect_s=1.0, keepalive_s=0.0) as upstream:  # too old before anybody has closed it
        for _ in range(2):
            await read(await upstream.call("POST", Endpoint(fake.url("a"), {}), b"{}"))
    assert fake.connections == 4


async def test_an_idle_connection_serves_every_key_of_its_place_and_no_other_place(fake):
    async with FakeProvider().serving() as other, Upstream(connect_s=1.0) as upstream:
        for name in ("one", "two", "three"):
            for provider in (fake, other):
                provider.script("a", completion(name))
                endpoint = Endpoint(provider.url("a"), {"Authorization": f"Bearer {name}"})
                assert name.encode() in await read(await upstream.call("POST", endpoint, b"{}"))
        assert (fake.connections, other.connections) == (1, 1)


async def test_a_connection_whose_server_will_close_it_is_closed_and_not_used_again(fake):
    farewell = raw(head(200, {"Content-Length": "2", "Connection": "close"}), b"{}", PAUSE)
    fake.script("a", farewell, completion("fresh"))
    async with Upstream(connect_s=1.0) as upstream:
        assert await read(await upstream.call("POST", Endpoint(fake.url("a"), {}), b"{}")) == b"{}"
        await fake.closed()
        assert b"fresh" in await read(await upstream.call("POST", Endpoint(fake.url("a"), {}), b"{}"))
    assert fake.connections == 2


async def test_idle_connections_end_with_their_owner(fake):
    fake.script("a", completion("x"))
    async with Upstream(connect_s=1.0) as upstream:
        calls = [await upstream.start("POST", Endpoint(fake.url("a"), {}), b"{}") for _ in range(3)]
        for call in calls:
            await read(await call.head())
        assert (fake.connections, fake.open_connections) == (3, 3)
    await until(lambda: fake.open_connections == 0)


async def test_a_connection_that_still_holds_a_part_of_the_question_is_not_used_again():
    over = asyncio.Event()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\n{}")
        with contextlib.suppress(ConnectionError):
            while await reader.read(1 << 16):
                pass
        over.set()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server, Upstream(connect_s=1.0) as upstream:
        endpoint = Endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", {})
        response = await upstream.call("POST", endpoint, bytes(32 * 1024 * 1024))
        assert (response.status, await read(response)) == (413, b"{}")
        async with asyncio.timeout(5):
            await over.wait()


async def test_a_server_that_speaks_first_is_called_once():
    connections = []

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        writer.write(b"220 mail.example ready\r\n")

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server, Upstream(connect_s=1.0) as upstream:
        endpoint = Endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", {})
        with pytest.raises(ConnectionBroken):
            await upstream.call("POST", endpoint, b"{}")
    assert len(connections) == 1
    connections[0].close()


@pytest.mark.parametrize("value", ["a\r\nX-Other: b", "a\nb", "a\0b", "a\rb"])
async def test_no_header_can_bring_another_along(fake, value):
    async with Upstream(connect_s=1.0) as upstream:
        with pytest.raises(Unsendable) as raised:
            await upstream.call("POST", Endpoint(fake.url("a"), {"Authorization": value}), b"{}")
    assert fake.connections == 0
    assert value not in str(raised.value)


# --- A call in two steps --------------------------------------------------------------------------------------------


async def test_waiting_for_a_head_can_be_given_up_and_taken_up_again(fake):
    later = asyncio.Event()
    fake.script("a", raw(Wait(later), *completion("late").steps))
    async with Upstream(connect_s=1.0) as upstream:
        call = await upstream.start("POST", Endpoint(fake.url("a"), {}), b"{}")
        for _ in range(2):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await call.head()
        later.set()
        assert b"late" in await read(await call.head())
    assert (fake.called, fake.connections) == (["a"], 1)


async def test_a_call_that_is_closed_before_its_head_closes_its_connection(fake):
    fake.script("a", raw(PAUSE))
    async with Upstream(connect_s=1.0) as upstream:
        call = await upstream.start("POST", Endpoint(fake.url("a"), {}), b"{}")
        await fake.arrived()
        call.close()
        await fake.closed()


async def test_a_call_and_its_answer_show_nothing_of_what_they_carry(fake):
    fake.script("a", completion("w0rd"))
    async with Upstream(connect_s=1.0) as upstream:
        endpoint = Endpoint(fake.url("a"), {"Authorization": "Bearer s3cret"})
        call = await upstream.start("POST", endpoint, b'{"prompt": "w0rd"}')
        response = await call.head()
        assert b"w0rd" in await response.read()
        shown = f"{call} {response} {call.head} {response.take}"
    assert "s3cret" not in shown
    assert "w0rd" not in shown
    assert "<Call>" in shown


async def test_a_stale_connection_is_replaced_within_the_wait_for_the_head(fake):
    later = asyncio.Event()
    fake.script("a", completion("first"), raw(CUT), raw(Wait(later), *completion("fresh").steps))
    async with Upstream(connect_s=1.0, stale_s=0.0) as upstream:
        endpoint = Endpoint(fake.url("a"), {})
        await read(await upstream.call("POST", endpoint, b"{}"))
        call = await upstream.start("POST", endpoint, b"{}")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await call.head()
        later.set()
        assert b"fresh" in await read(await call.head())
    assert (len(fake.called), fake.connections) == (3, 2)


async def test_a_body_that_breaks_raises_our_own_exception(fake):
    promised = {"Content-Length": "99"}
    fake.script("a", raw(head(200, promised), b"half", CUT), raw(head(200, promised), b"half", RESET))
    async with Upstream(connect_s=1.0) as upstream:
        for _ in range(2):
            response = await upstream.call("GET", Endpoint(fake.url("a"), {}))
            with pytest.raises(ConnectionBroken):
                await read(response)
            with pytest.raises(ConnectionBroken):  # also when it is read once more
                await read(response)


async def test_a_body_that_was_closed_raises_our_own_exception(fake):
    fake.script("a", raw(head(200, {"Content-Length": "99"}), PAUSE))
    async with Upstream(connect_s=1.0) as upstream:
        response = await upstream.call("GET", Endpoint(fake.url("a"), {}))
        response.close()
        with pytest.raises(ConnectionBroken):
            await read(response)


# --- A body that is taken as it comes -------------------------------------------------------------------------------


async def taken(response: Response, pieces: list[bytes], *, stops: bool = False) -> bytes:
    """The whole body by `each`; `stops` where the task looks after every piece, and lets others run."""

    def look() -> bool:
        while (data := response.take()) is not None:
            pieces.append(data)
            if stops or not data:
                return True
        return False

    try:
        while not pieces or pieces[-1]:
            if not look():
                await response.each(look)
            await asyncio.sleep(0)
        return b"".join(pieces)
    finally:
        response.close()


async def test_a_body_is_taken_piece_by_piece_within_one_wait(fake):
    gates = [asyncio.Event() for _ in range(3)]
    fake.script("a", chunked(b"one", Wait(gates[0]), b"two", Wait(gates[1]), b"three", Wait(gates[2])), completion("x"))
    async with Upstream(connect_s=1.0) as upstream:
        response = await upstream.call("GET", Endpoint(fake.url("a"), {}))
        pieces: list[bytes] = []

        def look() -> bool:
            while (data := response.take()) is not None:
                pieces.append(data)
                if not data:
                    return True
            return False

        assert not look()
        waiting = asyncio.create_task(response.each(look))
        for count, gate in enumerate(gates, 1):
            await until(lambda count=count: len(pieces) == count)
            gate.set()
        await waiting
        assert pieces == [b"one", b"two", b"three", b""]
        await read(await upstream.call("POST", Endpoint(fake.url("a"), {}), b"{}"))
    assert fake.connections == 1  # and the next call goes over the same one


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("stops", [False, True])
async def test_a_large_body_is_taken_in_its_order_however_slowly(fake, packed, stops):
    whole = b"".join(b"%d," % number for number in range(400_000))  # far above what aiohttp keeps for a slow reader
    sent = gzip.compress(whole) if packed else whole
    fake.script("a", body(sent, headers={"content-encoding": "gzip"} if packed else {}))
    async with Upstream(connect_s=1.0) as upstream:
        response = await upstream.call("GET", Endpoint(fake.url("a"), {}))
        assert await taken(response, [], stops=stops) == whole


@pytest.mark.parametrize("breaks", [CUT, RESET])
async def test_a_body_that_breaks_while_it_is_waited_for_says_so(fake, breaks):
    later = asyncio.Event()
    fake.script("a", raw(head(200, {"Content-Length": "99"}), b"half", Wait(later), breaks))
    async with Upstream(connect_s=1.0) as upstream:
        response = await upstream.call("GET", Endpoint(fake.url("a"), {}))
        pieces: list[bytes] = []
        taking = asyncio.create_task(taken(response, pieces))
        await until(lambda: pieces == [b"half"])
        later.set()
        with pytest.raises(ConnectionBroken):
            await taking


async def test_of_a_connection_that_was_closed_nothing_is_waited_for(fake):
    fake.script("a", raw(head(200, {"Content-Length": "99"}), b"half", PAUSE))
    async with Upstream(connect_s=1.0) as upstream:
        response = await upstream.call("GET", Endpoint(fake.url("a"), {}))
        response.close()
        with pytest.raises(ConnectionBroken):
            await response.each(lambda: False)


@pytest.mark.parametrize("leaves", [False, True], ids=["alone", "with a cancellation behind it"])
async def test_what_goes_wrong_in_taking_a_body_is_told_to_who_waits_for_it(fake, leaves):
    later = asyncio.Event()
    fake.script("a", chunked(b"one", Wait(later), b"two"))

    def look() -> bool:
        if leaves:
            asyncio.get_running_loop().call_soon(waiting.cancel)  # before the task has heard of it
        raise LookupError("a defect")

    async with Upstream(connect_s=1.0) as upstream:
        response = await upstream.call("GET", Endpoint(fake.url("a"), {}))
        assert await response.read() == b"one"
        waiting = asyncio.create_task(response.each(look))
        await asyncio.sleep(0)
        later.set()
        with pytest.raises(LookupError):
            await waiting
        assert await read(response) == b"two"  # the connection has not suffered


async def test_a_connection_that_cannot_be_made_in_time_has_its_own_name():
    with silent_url() as url:
        async with Upstream(connect_s=0.05) as upstream:
            with pytest.raises(ConnectTimeout):
                await upstream.start("POST", Endpoint(url, {}), b"{}")


@pytest.mark.parametrize("address", ["http://[::1", "http://" + "a" * 70 + ".example/v1", "not an address"])
async def test_an_address_that_is_none_raises_our_own_exception(address):
    async with Upstream(connect_s=1.0) as upstream:
        with pytest.raises(CallFailed):
            await upstream.start("POST", Endpoint(address, {}), b"{}")


@pytest.mark.parametrize("size", [9_000, 60_000])
async def test_headers_may_be_larger_than_8_kb(fake, size):
    headers = {"content-security-policy": "x" * size} | {f"x-trace-{n}": "y" for n in range(100)}
    fake.script("a", raw(head(200, headers | {"content-length": "2"}), b"{}"))
    async with Upstream(connect_s=1.0) as upstream:
        response = await upstream.call("GET", Endpoint(fake.url("a"), {}))
        assert (len(response.headers["content-security-policy"]), await read(response)) == (size, b"{}")


async def test_headers_without_end_are_a_broken_answer(fake):
    fake.script("a", raw(b"HTTP/1.1 200 OK\r\nx: ", Every(0.0, b"x" * 65_536), b"\r\n\r\n"))
    async with Upstream(connect_s=1.0) as upstream:
        with pytest.raises(ConnectionBroken):
            await upstream.call("GET", Endpoint(fake.url("a"), {}))
