"""The client's side of an exchange: its body as it comes in, and its leaving.

Owns what ends a request from outside: a body that is too large, too slow or packed in an unknown way, a client that has
gone, a server that stops. Knows ASGI, and nothing of what is done for the client.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from transport.deadlines import Limit
from wire.errors import GatewayError, InvalidRequest

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]
T = TypeVar("T")
BODY_READ_S = 60.0  # for a client to send its request; a laptop's slowest upload of 32 MB is faster
WATCH_AFTER_S = 0.03  # well within the 100 ms in which a client's leaving must reach the provider (SPEC 8.6)


class ClientGone(Exception):
    """The client closed its connection. A normal exit."""


class CutShort(Exception):
    """The client's connection is to be closed in the middle of its answer, which must not look like a finished one."""


class Stopping(GatewayError):
    """The server no longer waits for this request."""

    words = "The gateway is stopping. Send the request again."

    def __init__(self) -> None:
        super().__init__(self.words, status=503, type="routing_error", code="gateway_stopping")


async def read_body(headers: dict[bytes, bytes], receive: Receive, bytes_max: int, limit: Limit) -> bytes:
    """The request's body, refused as soon as it is too large."""
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared) > bytes_max:
        raise too_large(bytes_max)
    pieces: list[bytes] = []
    size, more = 0, True
    try:
        with limit.within(BODY_READ_S):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > bytes_max:
                    raise too_large(bytes_max)
                more = message.get("more_body", False)
    except TimeoutError:
        raise InvalidRequest("The body did not arrive in time.", code="request_timeout", status=408) from None
    except asyncio.CancelledError:
        raise Stopping from None
    raw = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    encoding = headers.get(b"content-encoding", b"").strip().lower()
    return raw if encoding in (b"", b"identity") else unpacked(raw, encoding, bytes_max)


def too_large(bytes_max: int) -> InvalidRequest:
    return InvalidRequest(f"The body is larger than {bytes_max} bytes.", code="request_too_large", status=413)


def unpacked(raw: bytes, encoding: bytes, bytes_max: int) -> bytes:
    """A compressed body, refused as soon as it turns out too large."""
    if encoding not in (b"gzip", b"x-gzip", b"deflate"):
        message = f"Content-Encoding {encoding.decode('latin-1')!r} is not supported: send gzip, deflate or plain JSON."
        raise InvalidRequest(message, code="unsupported_encoding", status=415)
    bare_deflate = encoding == b"deflate" and raw[:1] != b"\x78"  # some leave out the zlib header
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS if bare_deflate else zlib.MAX_WBITS | 32)
    try:
        unpacked = unpacker.decompress(raw, bytes_max + 1)
    except zlib.error:
        raise InvalidRequest("The body is not what its Content-Encoding says.", code="invalid_encoding") from None
    if len(unpacked) > bytes_max:
        raise too_large(bytes_max)
    if not unpacker.eof:
        raise InvalidRequest("The compressed body is incomplete.", code="invalid_encoding")
    return unpacked


class Watch:
    """A client whose leaving cancels the work that is done for it."""

    __slots__ = ("_receive", "_task", "_watcher", "gone", "over", "since")

    def __init__(self, receive: Receive, task: asyncio.Task[Any], since: float) -> None:
        self.since = since
        self.gone = False
        self.over = False
        self._receive = receive
        self._task = task
        self._watcher: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._watcher = asyncio.create_task(self._wait())

    def end(self) -> None:
        self.over = True
        watcher, self._watcher = self._watcher, None  # which holds this one in turn, until it is forgotten
        if watcher is not None:
            watcher.cancel()

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self._task.cancel()


class Watches:
    """Who is still being served after WATCH_AFTER_S gets a task that watches: one for each request would cost more
    than a quick answer."""

    def __init__(self) -> None:
        self._fresh: deque[Watch] = deque()  # oldest first
        self._timer: asyncio.TimerHandle | None = None

    def add(self, watch: Watch) -> None:
        self._fresh.append(watch)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._look)

    def _look(self) -> None:
        self._timer = None
        now = time.monotonic()
        while self._fresh:
            left_s = self._fresh[0].since + WATCH_AFTER_S - now
            if left_s > 0 and not self._fresh[0].over:
                self._timer = asyncio.get_running_loop().call_later(left_s, self._look)
                return
            watch = self._fresh.popleft()
            if not watch.over:
                watch.begin()


async def unless_disconnected(watch: Watch, task: asyncio.Task[Any], work: Coroutine[Any, Any, T]) -> T:
    """Run the work in `task`, the current one; a client's disconnect cancels it and raises ClientGone.

    uvicorn neither cancels the app nor fails send() when the client leaves: only receive() tells.
    """
    try:
        result = await work
    except asyncio.CancelledError:
        if not watch.gone or task.uncancel() > 0:  # somebody else's cancellation goes on
            raise
        raise ClientGone from None
    except BaseException:
        if not watch.gone:
            raise
        await absorb_cancellation(task)
        raise ClientGone from None
    else:
        if watch.gone:
            await absorb_cancellation(task)
            raise ClientGone
        return result
    finally:
        watch.end()


async def absorb_cancellation(task: asyncio.Task[Any]) -> None:
    """The work ended in the same moment as its cancellation was asked for: take it before it hits something else."""
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        task.uncancel()
