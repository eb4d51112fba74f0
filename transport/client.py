"""The client's side of an exchange: its body as it comes in, and its leaving.

Owns what ends a request from outside: a body that is too large, too slow or packed in an unknown way, a client that has
gone, a server that stops. Knows ASGI, and nothing of what is done for the client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from transport.packing import too_large, unpacked
from wire.errors import GatewayError, InvalidRequest

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
T = TypeVar("T")
BODY_READ_S = 60.0  # for a client to send its request; a laptop's slowest upload of 32 MB is faster


class ClientGone(Exception):
    """The client closed its connection. A normal exit."""


class CutShort(Exception):
    """The client's connection is to be closed in the middle of its answer, which must not look like a finished one."""


class Stopping(GatewayError):
    """The server no longer waits for this request."""

    words = "The gateway is stopping. Send the request again."

    def __init__(self) -> None:
        super().__init__(self.words, status=503, type="routing_error", code="gateway_stopping")


async def read_body(
    headers: Mapping[bytes, bytes], receive: Receive, bytes_max: int, *, arrived: bool = False
) -> bytes:
    """The request's body, refused as soon as it is too large. `arrived`: all of it is here, nothing is waited for."""
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > bytes_max:
        raise too_large(bytes_max)
    if arrived:
        raw = await received(receive, bytes_max)
    else:
        try:
            async with asyncio.timeout(BODY_READ_S):
                raw = await received(receive, bytes_max)
        except TimeoutError:
            raise InvalidRequest("The body did not arrive in time.", code="request_timeout", status=408) from None
        except asyncio.CancelledError:
            raise Stopping from None
    encodings = headers.get(b"content-encoding")
    return unpacked(raw, encodings, bytes_max) if encodings else raw


async def received(receive: Receive, bytes_max: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece = message.get("body", b"")
        size += len(piece)
        if size > bytes_max:
            raise too_large(bytes_max)
        if not message.get("more_body"):
            return b"".join((*pieces, piece)) if pieces else piece
        pieces.append(piece)


class Client:
    """Whoever sent a request: its connection says here when it is lost, which cancels the work that is done for it.

    `listen` makes the connection read on: uvicorn stops reading behind a large body, and would not notice its end.
    `cutting` gives what closes it in the middle of its answer; None when it has gone anyway.
    """

    __slots__ = ("_cutting", "gone", "listen", "sent_all", "task")

    def __init__(
        self, listen: Callable[[], None], cutting: Callable[[], Callable[[], None] | None] = lambda: None
    ) -> None:
        self.gone = False
        self.sent_all = False  # its whole body has arrived
        self.listen = listen
        self._cutting = cutting
        self.task: asyncio.Task[Any] | None = None  # that works for it

    def cut(self) -> None:
        """Close the connection in the middle of the answer."""
        if (close := self._cutting()) is not None:
            close()

    def leave(self) -> None:
        self.gone = True
        if self.task is not None:
            self.task.cancel()


async def unless_gone(client: Client, task: asyncio.Task[Any], work: Coroutine[Any, Any, T]) -> T:
    """Run the work in `task`, the current one; the client's leaving cancels it and raises ClientGone."""
    client.task = task
    client.listen()
    try:
        result = await work
    except asyncio.CancelledError:
        if not client.gone or task.uncancel() > 0:  # somebody else's cancellation goes on
            raise
        raise ClientGone from None
    except BaseException:
        if not client.gone:
            raise
        await absorb_cancellation(task)
        raise ClientGone from None
    finally:
        client.task = None
    if client.gone:
        await absorb_cancellation(task)
        raise ClientGone
    return result


async def absorb_cancellation(task: asyncio.Task[Any]) -> None:
    """The work ended in the same moment as its cancellation was asked for: take it before it hits something else."""
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        task.uncancel()
