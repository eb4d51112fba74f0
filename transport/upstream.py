"""One HTTP call to a provider: aiohttp's connections, its TLS and its parser, without its session.

Nearly all of a call is the same in the next one: where it goes, the credential, the headers. `ClientSession.request`
works that out each time, which costs more than the call itself (measured: half of a bare proxy's time). Here it is
worked out once for each `Endpoint`, and a call is one write and one wait. What that needs of aiohttp (3.14) lies below
its session: `BaseConnector.connect`, a `ClientRequest` that tells it where to, `ResponseHandler` and what it keeps of a
body. Check these at an upgrade. Between two calls a connection waits here for the next one to the same place; to the
connector it is in use until it is closed. Its own books of what waits and what is in use cost 5 % of a plain request
(measured).

A call has two steps, `start` (connect and write) and `Call.head` (wait for the answer's head). The second may be
cancelled and awaited again, so that a caller can stop waiting for a while without losing the request. Only exceptions
of our own leave this module, all of them `CallFailed`: aiohttp's errors and OSError are mapped where they are raised,
so that a defect of ours is never taken for a broken connection.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import cached_property, lru_cache, partial
from math import inf
from typing import Self

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ConnectionKey
from aiohttp.connector import Connection
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from wire.http import ENDPOINTS_MAX, NO_PROXIES, Endpoint, Proxies
from wire.unshown import Unshown

KEEPALIVE_S = 15.0  # for which an idle connection may be used again; many servers close theirs after 20 s and more
STALE_S = 1.0  # the least patient servers in use close after 2 s; one that breaks sooner means it
DNS_TTL_S = 300
COPY_BYTES_MAX = 64 * 1024  # of a body that is joined to its head: one packet, mostly; a larger one is not copied
HEADER_BYTES_MAX = 64 * 1024  # of one header; aiohttp allows 8 KB, which tracing and cookie headers exceed
HEADERS_MAX = 256  # of one answer
INTERIM = frozenset({*range(100, 200)} - {101})  # the answer is still to come
UNSAFE = re.compile("[\r\n\0]")  # would let a header's value begin another header
NO_FILE = (errno.EMFILE, errno.ENFILE)  # this process, or this machine, may open no more files


class CallFailed(Exception):
    """A call came to nothing: it could not be sent, was not answered, or only in part.

    `cause` names the foreign exception behind it, for messages that must not repeat its words.
    """

    def __init__(self, words: str, cause: str = "") -> None:
        super().__init__(f"{cause}: {words}" if cause else words)
        self.cause = cause


class ConnectionBroken(CallFailed):
    """No connection, no answer over it, or one that ended too early or was not HTTP."""


class ConnectTimeout(CallFailed):
    """No connection within the time for connecting."""


class NoFileLeft(CallFailed):
    """Our own limit of open files was reached; it says nothing about the provider."""


class Unsendable(CallFailed):
    """An address or a header that no request can carry."""


def failed(error: BaseException) -> CallFailed:
    """The exception of ours for a foreign one."""
    error.__traceback__ = None  # a body keeps its exception, whose frames would keep the body: a cycle
    kind = NoFileLeft if isinstance(error, OSError) and error.errno in NO_FILE else ConnectionBroken
    return kind(str(error), type(error).__name__)


class Handler(ResponseHandler):
    """aiohttp's with two corrections: what is given up is closed at once, and whoever reads is told."""

    idle_since = inf  # by the loop's clock; a new connection has not been idle
    listener: Callable[[], None] | None = None  # is told whenever something has arrived, or the connection is lost

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if data and self.listener is not None:  # without any it is called by whoever reads
            self.listener()

    def resume_reading(self, resume_parser: bool = True) -> None:
        if self._reading_paused:  # aiohttp asks its parser for more after each read, also where nothing was held back
            super().resume_reading(resume_parser)

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        if self.listener is not None:
            self.listener()

    def expect_response(self) -> None:
        """One parser reads all the answers of a connection; aiohttp would make one for each."""
        if self._parser is None:
            self.set_response_params(read_until_eof=True, max_field_size=HEADER_BYTES_MAX, max_headers=HEADERS_MAX)

    def close(self) -> None:
        self.abort()  # else TLS waits 30 s for the provider's goodbye, and what is not sent yet for its reading

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        super().set_exception(exc, *cause)  # of a body that is no HTTP its reader is not told
        body = self._payload
        if body is not None and not body.is_eof() and body.exception() is None and not body._buffer:
            body.set_exception(aiohttp.ClientPayloadError(f"{type(exc).__name__}: {exc}"))


Idle = list[tuple[Connection, Handler]]  # connections to one place that wait for a call, the last used last


class Target(aiohttp.ClientRequest):
    """Tells the connector where to."""

    idle: Idle  # at the same place

    @cached_property
    def connection_key(self) -> ConnectionKey:
        return super().connection_key


class Response(Unshown):
    """A status, headers, and a body that is still arriving."""

    status: int
    headers: Mapping[str, str]
    _content: aiohttp.StreamReader
    _connection: Connection
    _taken: int = 0  # bytes of the body

    @property
    def content_type(self) -> str:
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    @property
    def begun(self) -> bool:
        """Whether the first bytes of the body have arrived, read or not."""
        return self._content.total_bytes > 0

    @property
    def complete(self) -> bool:
        """Whether the body's last byte has arrived, read or not."""
        return self._content.is_eof()

    async def read(self) -> bytes:
        """The next bytes of the body, as soon as there are any; b"" at its end. Raises CallFailed."""
        while (data := self.take()) is None:
            await self.each(lambda: True)
        return data

    def take(self) -> bytes | None:
        """What of the body has arrived; b"" at its end, None where there is nothing yet. Raises CallFailed."""
        content = self._content
        if (error := content.exception()) is not None:
            raise failed(error) from None
        if content.total_bytes == self._taken:
            return b"" if content.is_eof() else None
        data = content.read_nowait()
        self._taken += len(data)
        return data

    async def each(self, look: Callable[[], bool]) -> None:
        """Call `look` whenever more of the body has arrived, or its end, or that it broke off, until it says True.

        It is called by the connection and wakes no task, which costs more than most chunks do. What it raises is raised
        here. Raises CallFailed where nothing can arrive any more.
        """
        protocol = self._connection.protocol
        if protocol is None or not protocol.is_connected():
            raise ConnectionBroken("The connection has been closed.")
        assert isinstance(protocol, Handler)
        waiter = asyncio.get_running_loop().create_future()
        protocol.listener = partial(tell, waiter, look)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and (error := waiter.exception()) is not None:
                raise error from None  # it came first, and is told once
            raise
        finally:
            protocol.listener = None
            del waiter

    def close(self) -> None:
        """Give the connection up, unless the body has arrived to its end: then it serves others."""
        if not self._content.is_eof():
            self._connection.close()


def tell(waiter: asyncio.Future[None], look: Callable[[], bool]) -> None:
    """Something has arrived: the waiter waits on until `look` says True, or raises."""
    if waiter.done():
        return
    try:
        if look() and not waiter.done():
            waiter.set_result(None)
    except Exception as error:
        if not waiter.done():
            waiter.set_exception(error)
        del waiter  # which holds the error, whose traceback holds this frame


class Call(Unshown):
    """A request that has been written, and whose answer's head is still to come. Whoever started it closes it."""

    _upstream: Upstream
    _target: Target
    _head: bytes
    _body: bytes
    _connection: Connection | None = None
    _protocol: Handler | None = None
    _idle_s: float = 0.0  # how long its connection was idle before

    async def send(self) -> Self:
        """Connect and write. Raises CallFailed."""
        self._connection, protocol = await self._upstream.connect(self._target)
        self._protocol, transport = protocol, protocol.transport
        self._idle_s = self._upstream.now() - protocol.idle_since
        protocol.expect_response()
        if transport is None:
            pass  # lost in this moment, which `head` will notice
        elif len(self._body) <= COPY_BYTES_MAX:
            transport.write(self._head + self._body)
        else:
            transport.writelines((self._head, self._body))
        return self

    async def head(self) -> Response:
        """The answer, as soon as its head is there. Redirects are answers like others.

        May be cancelled and awaited again; the request is still on its way then. Raises CallFailed, and then the call
        is over.
        """
        while True:
            if self._connection is None:
                await self.send()
            connection, protocol = self._connection, self._protocol
            assert connection is not None and protocol is not None
            try:
                message, content = await protocol.read()
                while message.code in INTERIM:
                    message, content = await protocol.read()
                keep = partial(self._upstream.keep, connection, protocol, self._target)
                content.on_eof(connection.close if message.should_close else keep)
                self._connection = None  # the response's from now on
                return Response(message.code, message.headers, content, connection)
            except asyncio.CancelledError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                connection.close()
                if self._idle_s < self._upstream.stale_s:
                    raise failed(error) from None
                self._connection = None  # stale keep-alive: resend
            except HttpProcessingError as error:
                connection.close()
                raise ConnectionBroken(error.message, type(error).__name__) from None
            except (aiohttp.ClientError, OSError) as error:
                connection.close()
                raise failed(error) from None
            except BaseException:
                connection.close()
                raise

    def close(self) -> None:
        """Give the connection up, unless its answer has begun, which then owns it."""
        if self._connection is not None:
            self._connection.close()


class Upstream:
    """All connections to providers, through the operator's proxies. `async with Upstream(connect_s) as upstream`.

    A connection that breaks at once after it was idle for `stale_s` was most likely closed by its server in the moment
    in which it was used again (a stale keep-alive): the request is sent once more.
    """

    def __init__(
        self,
        connect_s: float,
        stale_s: float = STALE_S,
        proxies: Proxies = NO_PROXIES,
        *,
        keepalive_s: float = KEEPALIVE_S,
    ) -> None:
        self.stale_s = stale_s
        self._keepalive_s = keepalive_s
        self._proxies = proxies
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_s)

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._prepared = lru_cache(maxsize=ENDPOINTS_MAX)(self._prepare)
        self._idle: dict[ConnectionKey, Idle] = {}  # by place: as many as the platforms and proxies have
        self._sweep: asyncio.TimerHandle | None = None
        self._connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=DNS_TTL_S)
        self._connector._factory = partial(Handler, loop=self._loop)  # type: ignore[assignment]
        return self

    def now(self) -> float:
        """By the loop's clock."""
        return self._loop.time()

    async def __aexit__(self, *exc: object) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        for idle in self._idle.values():
            for connection, _ in idle:
                connection.close()
        await self._connector.close()

    def _prepare(self, method: str, endpoint: Endpoint) -> tuple[Target, bytes]:
        target, head = prepared(method, endpoint, self._proxies, self._loop)
        target.idle = self._idle.setdefault(target.connection_key, [])
        return target, head

    def start(self, method: str, endpoint: Endpoint, body: bytes = b"") -> Awaitable[Call]:
        """Connect and write a request. Raises CallFailed."""
        target, head = self._prepared(method, endpoint)
        head = b"%bContent-Length: %d\r\n\r\n" % (head, len(body)) if body else head + b"\r\n"
        return Call(self, target, head, body).send()

    async def call(self, method: str, endpoint: Endpoint, body: bytes = b"") -> Response:
        """Send a request and wait for the head of its answer. Raises CallFailed."""
        call = await self.start(method, endpoint, body)
        try:
            return await call.head()
        except BaseException:
            call.close()
            raise

    async def connect(self, target: Target) -> tuple[Connection, Handler]:
        """A connection to write a request to: one that is idle, or a new one. Raises CallFailed."""
        while target.idle:
            connection, protocol = target.idle.pop()
            if self._may_go_on(protocol):
                return connection, protocol
            connection.close()
        try:
            connection = await self._connector.connect(target, [], self._timeout)
        except TimeoutError:
            raise ConnectTimeout(f"no connection to {target.host} in time") from None
        except UnicodeError:
            raise Unsendable("not a host's name") from None
        except (aiohttp.ClientError, OSError) as error:
            raise failed(error) from None
        assert isinstance(connection.protocol, Handler)
        return connection, connection.protocol

    def _may_go_on(self, protocol: Handler) -> bool:
        """Whether an idle connection can serve another call: it is open, not too old, and while it was idle its server
        said nothing that nobody had asked for."""
        return (
            protocol.is_connected()
            and not protocol.should_close
            and self._loop.time() - protocol.idle_since < self._keepalive_s
        )

    def keep(self, connection: Connection, protocol: Handler, target: Target) -> None:
        """Let the connection wait for the next call, unless it was answered before the whole question had been
        sent."""
        transport = protocol.transport
        if transport is None or transport.get_write_buffer_size():
            connection.close()
            return
        protocol.idle_since = self._loop.time()
        target.idle.append((connection, protocol))
        if self._sweep is None:
            self._sweep = self._loop.call_later(self._keepalive_s, self._close_old)

    def _close_old(self) -> None:
        """Close what nobody has used for so long, and what its server has closed."""
        self._sweep = None
        for idle in self._idle.values():
            for waiting in [waiting for waiting in idle if not self._may_go_on(waiting[1])]:
                idle.remove(waiting)
                waiting[0].close()
        if any(self._idle.values()):
            self._sweep = self._loop.call_later(self._keepalive_s, self._close_old)


def prepared(
    method: str, endpoint: Endpoint, proxies: Proxies, loop: asyncio.AbstractEventLoop
) -> tuple[Target, bytes]:
    """Where the connector has to connect to, and the request's head up to its length.

    Raises Unsendable.
    """
    try:
        url = URL(endpoint.url)
        proxy, login = proxy_of(url, proxies)
        target = Target(method, url, headers=endpoint.headers, loop=loop, proxy=proxy, proxy_headers=login)
        headers = target.headers
        headers.popall("Content-Length", None)
        path = url.raw_path_qs
        if proxy is not None and not target.is_ssl():  # the proxy reads the request itself; through TLS it only tunnels
            path = str(url.with_user(None).with_fragment(None))
            headers.update(login or {})
        lines = [f"{method} {path} HTTP/1.1"]
        lines += [f"{name}: {text}" for name, text in headers.items()]
        head = "".join(f"{line}\r\n" for line in lines).encode()
    except ValueError as error:
        raise Unsendable("not an address", type(error).__name__) from None
    if any(UNSAFE.search(line) for line in lines):
        raise Unsendable("a header holds a line break")
    return target, head


def proxy_of(url: URL, proxies: Proxies) -> tuple[URL | None, dict[str, str] | None]:
    """The proxy to this address, and the header in which it is told who asks."""
    address = proxies.through(url.scheme, url.host or "", url.port)
    if address is None:
        return None, None
    proxy = URL(address)
    if proxy.user is None:
        return proxy, None
    login = aiohttp.encode_basic_auth(proxy.user, proxy.password or "")
    return proxy.with_user(None), {"Proxy-Authorization": login}
