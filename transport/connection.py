"""One client's connection: how much it may send before it is a request, and how long it may take.

uvicorn reads a request's head without a limit of size or time, and keeps a connection that never says anything for
ever. Here both end, and so does a pause between two requests; a connection that is served is uvicorn's affair. An offer
of another protocol is declined, as every server may: uvicorn would lose the body of a request that makes one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from weakref import WeakMethod

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from transport.client import Client
from transport.response import ResponseWriter
from wire.errors import GatewayError, InvalidRequest

HEAD_BYTES_MAX = 64 * 1024  # of a request line and its headers; checked read by read, so a little more may slip in
REFUSED_BYTES_MAX = 1024 * 1024  # that a refused client may go on to send before it is cut off
LINGER_S = 2.0  # for a refused client to read why
HEAD_S = 20.0  # for a head to arrive, and for what is left of a body whose request has been answered already


def with_writer(
    app: Callable[..., Awaitable[None]], writer: ResponseWriter, scope: Any, receive: Any, send: Any
) -> Awaitable[None]:
    """The app with a `send` of ours instead of the cycle's."""
    return app(scope, receive, writer)


class ClientConnection(HttpToolsProtocol):
    """uvicorn's, with limits. What they cost: one look per read, and one timer per connection, which does for uvicorn's
    own between two requests, too: that one is set and taken back with each of them."""

    def __init__(self, *args: Any, head_s: float = HEAD_S, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_s = head_s
        self._done = self.loop.create_future()  # for whoever has nothing to wait for
        self._done.set_result(None)
        self._head_bytes = 0
        self._refused = False
        self._last_seen: object = self  # the request at the last look; at first none, and not even a look
        self._idle_since: float | None = None  # by the loop's clock, between two requests
        self._timer: asyncio.TimerHandle | None = None
        self._cut = WeakMethod(self._cut_served)  # the client is held by the request, and that by this connection
        self._client: Client | None = None  # whose request is being served
        self._served: RequestResponseCycle | None = None  # `cycle` is the last request that came, perhaps behind this

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._served is not None and not self._served.response_complete:  # uvicorn tells the last one only
            self._served.disconnected = True
            self._served.message_event.set()
            if self._client is not None:
                self._client.leave()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._served = cycle
        self._client = Client(self.flow.resume_reading, self._cut)
        cycle.scope["freeway.client"] = self._client  # type: ignore[typeddict-unknown-key]
        super()._start_asgi_task(cycle, partial(with_writer, app, ResponseWriter(cycle, self._done)))

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._idle_since = self.loop.time()

    def _cut_served(self) -> None:
        if self._served is not None:
            self._served.disconnected = True  # by us: nothing that uvicorn would have to complain of
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._refused:  # what arrives is read and dropped, because a reset would overtake the answer
            self._head_bytes += len(data)
            if self._head_bytes > REFUSED_BYTES_MAX:
                self.transport.close()
            return
        self._idle_since = None
        self._feed(data)
        if self.scope is None or (self.cycle is not None and self.cycle.scope is self.scope):  # not within a head
            self._head_bytes = 0
            return
        self._head_bytes += len(data)
        if self._head_bytes > HEAD_BYTES_MAX and not self.transport.is_closing():
            words = f"The request's head is larger than {HEAD_BYTES_MAX} bytes."
            self._refuse(InvalidRequest(words, code="head_too_large", status=431))

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as offer:  # what follows the head is not read: a body in another protocol's terms
            if self._declines:
                self._feed(self._head_without_offer() + data[offer.args[0] :])
        except HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    @property
    def _declines(self) -> bool:
        """Whether this head offers to go on in another protocol. CONNECT, which asks for a tunnel, is answered as it
        is: there is nothing else to be made of it."""
        return bool(self.parser.should_upgrade()) and self.parser.get_method() != b"CONNECT"

    def on_headers_complete(self) -> None:
        if not self._declines:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self._declines:
            if self._client is not None:
                self._client.sent_all = True
            super().on_message_complete()

    def _head_without_offer(self) -> bytes:
        """The head that has just been read, for a parser of its own, as a client without the offer sends it."""
        line = b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        lines = [b"%b: %b" % (name, value) for name, value in self.headers if name != b"connection"]
        options = [option for name, value in self.headers if name == b"connection" for option in value.split(b",")]
        kept = [option for option in options if option.strip().lower() != b"upgrade"]
        if kept:
            lines.append(b"connection: " + b",".join(kept))
        self.parser = HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        return b"\r\n".join([line, *lines]) + b"\r\n\r\n"

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidRequest(msg, code="invalid_http"))

    def _refuse(self, error: GatewayError) -> None:
        """Answer without a request, and hang up."""
        body = error.body()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        served = self._served
        if served is not None and served.response_started and not served.response_complete:  # amid another's answer
            self.transport.close()
            return
        self._refused = True
        self.transport.write(STATUS_LINE[error.status] + head + body)
        if not self.transport.is_closing():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _look(self) -> None:
        """Hang up when no request has begun since the last look, nor is one running, nor is it the pause between two:
        then a head, or the rest of a body that nobody reads, has been arriving all the time. And when that pause has
        been too long."""
        served, idle_since = self.cycle is not None and not self.cycle.response_complete, self._idle_since
        if idle_since is not None and self.loop.time() - idle_since >= self.timeout_keep_alive:
            self.transport.close()
            return
        if served or idle_since is not None:
            self._last_seen = self
        elif self._last_seen is self.cycle:
            self.transport.close()
            return
        else:
            self._last_seen = self.cycle
        self._timer = self.loop.call_later(self._head_s, self._look)
