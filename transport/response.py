"""How a response leaves: the head together with the first bytes of the body.

uvicorn writes the two apart and looks at each header with two regular expressions. A write is a call to the system and
a packet, and wakes a client that sleeps; all that is a tenth of what a plain request costs. ASGI leaves a server free
to hold the head until the body begins.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from wire.unshown import Unshown

BODILESS = (204, 304)  # statuses whose responses end with the head
OF_THE_CONNECTION = (b"connection", b"transfer-encoding")  # headers that say how the connection goes on


class ResponseWriter(Unshown):
    """`send` of one request, in place of its cycle's, which it hands over to once the body has begun (uvicorn 0.54;
    check at an upgrade that it leaves the cycle as its own `send` would).

    What is rare is sent by the cycle altogether: the answer to HEAD, one without a body, one whose headers are about
    the connection. `done` is a future that has its result, to be awaited where nothing has to be waited for.
    """

    _cycle: RequestResponseCycle
    _done: asyncio.Future[None]
    _start: Any = None  # the message, until the body begins
    _begun: bool = False  # the cycle sends the rest, and says what is wrong with it
    _in_chunks: bool = False  # its head was sent from here and names no length

    def __call__(self, message: Any) -> Awaitable[None]:
        if self._begun:
            return self._go_on(message)
        if message["type"] == "http.response.start":
            self._start = message
            return self._done
        if self._cycle.flow.write_paused:
            return self._begin_later(message)
        return self._begin(message)

    def _go_on(self, message: Any) -> Awaitable[None]:
        """One more chunk of a body is written as the cycle would write it, without a coroutine of its own."""
        cycle = self._cycle
        if not (self._in_chunks and message.get("more_body")) or cycle.flow.write_paused or cycle.disconnected:
            return cycle.send(message)
        if data := message.get("body", b""):
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return self._done

    async def _begin_later(self, message: Any) -> None:
        """As soon as the client takes bytes again, or is gone."""
        await self._cycle.flow.drain()
        await self._begin(message)

    def _begin(self, message: Any) -> Awaitable[None]:
        cycle = self._cycle
        if cycle.disconnected:
            return self._done
        if message["type"] != "http.response.body" or (told := self._head()) is None:
            return self._send_usually(message)
        head, length = told
        data, more = message.get("body", b""), message.get("more_body", False)
        if length is None:
            data = b"%x\r\n%b\r\n" % (len(data), data) if data else b""
            data = data if more else data + b"0\r\n\r\n"
        else:
            length -= len(data)
            if length < 0 or (length and not more):
                raise RuntimeError("The body is not as long as its Content-Length says.")
        self._begun = cycle.response_started = True
        self._in_chunks = more and length is None
        cycle.waiting_for_100_continue = False
        cycle.chunked_encoding, cycle.expected_content_length = length is None, length or 0
        cycle.transport.write(head + data)
        if not more:
            cycle.response_complete = True
            cycle.message_event.set()
            if not cycle.keep_alive:
                cycle.transport.close()
            cycle.on_response()
        return self._done

    def _head(self) -> tuple[bytes, int | None] | None:
        """And the length of the body, None for one in chunks. None where the cycle has to send this response."""
        cycle, start, length = self._cycle, self._start, None
        if start is None or start["status"] in BODILESS or cycle.scope["method"] == "HEAD":
            return None
        headers = [*cycle.default_headers, *start.get("headers", ())]
        pieces = [STATUS_LINE[start["status"]]]
        for name, value in headers:
            if name == b"content-length":
                length = int(value)
            elif name in OF_THE_CONNECTION:
                return None
            pieces += (name, b": ", value, b"\r\n")
        if not cycle.keep_alive:
            pieces.append(b"connection: close\r\n")
        if length is None:
            pieces.append(b"transfer-encoding: chunked\r\n")
        pieces.append(b"\r\n")
        head = b"".join(pieces)
        if head.count(b"\n") != 2 + len(headers) + (not cycle.keep_alive) + (length is None):
            raise RuntimeError("A header of the response holds a line break.")
        return head, length

    async def _send_usually(self, message: Any) -> None:
        self._begun = True
        if self._start is not None:
            await self._cycle.send(self._start)
        await self._cycle.send(message)
