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

BODILESS = (204, 304)  # statuses whose responses end with the head
OF_THE_CONNECTION = (b"connection", b"transfer-encoding")  # headers that say how the connection goes on


class ResponseWriter:
    """`send` of one request, in place of its cycle's, whose state it keeps (uvicorn 0.54; check it at an upgrade).

    What is rare is sent by the cycle itself: the answer to HEAD, one without a body, one whose headers are about the
    connection. `done` is a future that has its result, to be awaited where nothing has to be waited for.
    """

    __slots__ = ("_cycle", "_done", "_length", "_start", "_usual")

    def __init__(self, cycle: RequestResponseCycle, done: asyncio.Future[None]) -> None:
        self._cycle = cycle
        self._done = done
        self._start: Any = None  # the message, until the body begins
        self._length: int | None = None  # of the body that is still to come; None: it is sent in chunks
        self._usual = False  # the cycle sends this response

    def __call__(self, message: Any) -> Awaitable[None]:
        if message["type"] == "http.response.start" and not self._cycle.response_started:
            self._start = message
            return self._done
        if self._usual or self._cycle.response_complete or message["type"] != "http.response.body":
            return self._cycle.send(message)  # which also says what is wrong
        if self._cycle.flow.write_paused:
            return self._write_later(message)
        return self._write(message)

    async def _write_later(self, message: Any) -> None:
        """As soon as the client takes bytes again, or is gone."""
        await self._cycle.flow.drain()
        await self._write(message)

    def _write(self, message: Any) -> Awaitable[None]:
        cycle = self._cycle
        if cycle.disconnected:
            return self._done
        body, more = message.get("body", b""), message.get("more_body", False)
        pieces: list[bytes] = []
        if not cycle.response_started:
            if (head := self._head()) is None:
                return self._send_usually(message)
            pieces.append(head)
        if self._length is not None:
            self._length -= len(body)
            if self._length < 0 or (self._length and not more):
                raise RuntimeError("The body is not as long as its Content-Length says.")
            pieces.append(body)
        else:
            if body:
                pieces += (b"%x\r\n" % len(body), body, b"\r\n")
            if not more:
                pieces.append(b"0\r\n\r\n")
        cycle.response_started, cycle.waiting_for_100_continue = True, False
        cycle.transport.write(b"".join(pieces))
        if not more:
            self._complete()
        return self._done

    def _head(self) -> bytes | None:
        """None where the cycle has to send this response."""
        cycle, start = self._cycle, self._start
        if start is None or start["status"] in BODILESS or cycle.scope["method"] == "HEAD":
            return None
        headers = [*cycle.default_headers, *start.get("headers", ())]
        pieces = [STATUS_LINE[start["status"]]]
        for name, value in headers:
            if name == b"content-length":
                self._length = int(value)
            elif name in OF_THE_CONNECTION:
                return None
            pieces += (name, b": ", value, b"\r\n")
        if not cycle.keep_alive:
            pieces.append(b"connection: close\r\n")
        if self._length is None:
            pieces.append(b"transfer-encoding: chunked\r\n")
        pieces.append(b"\r\n")
        head = b"".join(pieces)
        if head.count(b"\n") != 2 + len(headers) + (not cycle.keep_alive) + (self._length is None):
            raise RuntimeError("A header of the response holds a line break.")
        return head

    async def _send_usually(self, message: Any) -> None:
        self._usual = True
        if self._start is not None:
            await self._cycle.send(self._start)
        await self._cycle.send(message)

    def _complete(self) -> None:
        cycle = self._cycle
        cycle.response_complete = True
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()
