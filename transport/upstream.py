"""One HTTP call to a provider: aiohttp's pool of connections, its TLS and its parser, without its session.

Nearly all of a call is the same in the next one: where it goes, the credential, the headers. `ClientSession.request`
finds that anew each time, which costs more than the call itself (measured: half of a bare proxy's time). Here it is
found once for each `Endpoint`, and a call is one write and one wait. What that needs of aiohttp (3.14) stands below its
session: `BaseConnector.connect`, a `ClientRequest` that tells it where to, `ResponseHandler`. Look again at an upgrade.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from functools import cached_property, lru_cache, partial
from math import inf
from typing import Self

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from wire.http import ENDPOINTS_MAX, Endpoint

KEEPALIVE_S = 15.0  # idle connections; many servers close theirs after 20 s and more
STALE_S = 1.0  # the least patient servers in use close after 2 s; one that breaks sooner means it
DNS_TTL_S = 300
COPY_BYTES_MAX = 64 * 1024  # of a body that is joined to its head: one packet, mostly; a larger one is not copied
INTERIM = frozenset({*range(100, 200)} - {101})  # the answer is still to come
UNSAFE = re.compile("[\r\n\0]")  # would let a header's value begin another header
# What a read raises when the connection has ended before its body. RuntimeError is aiohttp's way to say that it has
# been closed already.
BROKEN = (aiohttp.ClientError, OSError, RuntimeError)
ConnectTimeout = aiohttp.ConnectionTimeoutError
Body = aiohttp.StreamReader


class Handler(ResponseHandler):
    """aiohttp's with two corrections: what is given up is closed at once, and whoever reads is told."""

    idle_since = inf  # by the loop's clock; a new connection has not been idle

    def expect_response(self) -> None:
        """One parser reads all the answers of a connection; aiohttp would make one for each."""
        if self._parser is None:
            self.set_response_params(read_until_eof=True)

    def begin_idling(self) -> None:
        self.idle_since = self._loop.time()

    def close(self) -> None:
        self.abort()  # else TLS waits 30 s for the provider's goodbye, and what is not sent yet for its reading

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        super().set_exception(exc, *cause)  # of a body that is no HTTP its reader is not told
        body = self._payload
        if body is not None and not body.is_eof() and body.exception() is None and not body._buffer:
            body.set_exception(aiohttp.ClientPayloadError(f"{type(exc).__name__}: {exc}"))


def handler(connection: Connection) -> Handler:
    protocol = connection.protocol
    assert isinstance(protocol, Handler)
    return protocol


class Target(aiohttp.ClientRequest):
    """Tells the connector where to."""

    @cached_property
    def connection_key(self) -> ConnectionKey:
        return super().connection_key


class Response:
    """A status, headers, and a body that is still arriving."""

    __slots__ = ("_connection", "content", "headers", "status")

    def __init__(self, status: int, headers: Mapping[str, str], content: Body, connection: Connection) -> None:
        self.status = status
        self.headers = headers
        self.content = content
        self._connection = connection
        content.on_eof(partial(let_go, connection))

    @property
    def content_type(self) -> str:
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    def close(self) -> None:
        """Give the connection up, unless the body has been read to its end."""
        self._connection.close()


def let_go(connection: Connection) -> None:
    """Back into the pool, unless it was answered before the whole question had been sent."""
    transport = connection.transport
    if transport is None or transport.get_write_buffer_size():
        connection.close()
    else:
        handler(connection).begin_idling()
        connection.release()


class Upstream:
    """All connections to providers. `async with Upstream(connect_s) as upstream`.

    A connection that breaks at once after it was idle for `stale_s` has most likely been closed by a server that had
    tired of it, in the moment in which it was used again: the request goes out anew.
    """

    def __init__(self, connect_s: float, stale_s: float = STALE_S) -> None:
        self._stale_s = stale_s
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_s)
        self._prepared = lru_cache(maxsize=ENDPOINTS_MAX)(prepared)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S, ttl_dns_cache=DNS_TTL_S)
        self._connector._factory = partial(Handler, loop=self._loop)  # type: ignore[assignment]
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._connector.close()

    async def call(self, method: str, endpoint: Endpoint, body: bytes = b"") -> Response:
        """Send a request; gives the response as soon as its head is there. Redirects are answers like others.

        Raises what is in BROKEN.
        """
        target, head = self._prepared(method, endpoint, self._loop)
        head = b"%bContent-Length: %d\r\n\r\n" % (head, len(body)) if body else head + b"\r\n"
        while True:
            connection = await self._connect(target)
            idle_s = self._loop.time() - handler(connection).idle_since
            try:
                return await ask(connection, head, body)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if idle_s < self._stale_s:
                    raise

    async def _connect(self, target: Target) -> Connection:
        while True:
            try:
                connection = await self._connector.connect(target, [], self._timeout)
            except TimeoutError:
                raise ConnectTimeout(f"Connection timeout to {target.host}") from None
            except UnicodeError:
                raise aiohttp.InvalidUrlClientError(target.url, "not a host's name") from None
            protocol = handler(connection)
            if not protocol.should_close or protocol.idle_since == inf:
                return connection
            connection.close()  # while it was idle its server has said something that nobody asked


async def ask(connection: Connection, head: bytes, body: bytes) -> Response:
    """Over a connection of its own, which is closed when no response comes of it."""
    protocol, transport = handler(connection), connection.transport
    try:
        if transport is None:
            raise aiohttp.ServerDisconnectedError
        protocol.expect_response()
        if len(body) <= COPY_BYTES_MAX:
            transport.write(head + body)
        else:
            transport.writelines((head, body))
        message, content = await protocol.read()
        while message.code in INTERIM:
            message, content = await protocol.read()
        return Response(message.code, message.headers, content, connection)
    except HttpProcessingError as error:
        connection.close()
        raise aiohttp.ClientPayloadError(f"{type(error).__name__}: {error.message}") from None
    except BaseException:
        connection.close()
        raise


def prepared(method: str, endpoint: Endpoint, loop: asyncio.AbstractEventLoop) -> tuple[Target, bytes]:
    """Where the connector has to connect to, and the request's head up to its length.

    Raises aiohttp.ClientError for an address or a header that cannot be sent.
    """
    try:
        target = Target(method, URL(endpoint.url), headers=endpoint.headers, loop=loop)
        target.headers.popall("Content-Length", None)
        lines = [f"{method} {target.url.raw_path_qs} HTTP/1.1"]
        lines += [f"{name}: {text}" for name, text in target.headers.items()]
        head = "".join(f"{line}\r\n" for line in lines).encode()
    except ValueError as error:
        raise aiohttp.InvalidUrlClientError(endpoint.url, type(error).__name__) from None
    if any(UNSAFE.search(line) for line in lines):
        raise aiohttp.ClientError("A header holds a line break.")
    return target, head
