"""What one client is sent: headers once, then bytes, and heartbeats while there is nothing to say (SPEC 8.1, 8.3).

Owns the client's side of a stream from its headers on. Heartbeats come from a timer, so that whoever works on the
answer may wait for whatever it needs: a provider, a route that comes back, a second provider's first words.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from msgspec import field

from transport.alarm import CLOCK_STEP_S
from transport.client import ClientGone, CutShort, Send, Stopping
from wire.chat import Encoder, Tally
from wire.errors import GatewayError
from wire.unshown import Unshown

Headers = list[tuple[bytes, bytes]]
HEADER_SAFE = "".join(map(chr, range(33, 127))).replace("%", "") + " "
STREAM_HEADERS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
JSON_HEADERS: Headers = [(b"content-type", b"application/json")]


class Delivery(Unshown):
    """One response on its way. `headers` gives those that tell how the request was routed, as far as that is known."""

    send: Send
    encoder: Encoder
    headers: Callable[[], Headers]
    loop: asyncio.AbstractEventLoop
    interval_s: float  # between two heartbeats
    silence_s: float  # before headers go out without an answer
    started: bool = False  # headers are out: nothing can be told by a status any more
    streams: bool = False  # and the body is a stream, in which it can
    tally: Tally = field(default_factory=Tally)  # of the answer that the client is given
    blocked_since: float | None = None  # by the loop's clock, while the client takes no bytes
    _written_at: float = 0.0
    _timer: asyncio.TimerHandle | None = None
    _heartbeat: asyncio.Task[None] | None = None
    _blocked: asyncio.Task[None] | None = None  # while the client takes no bytes

    def keep_alive(self) -> None:
        """From now on the client hears something at least every so often. Whoever asks for it calls `rest`."""
        self._written_at = self.loop.time()
        self._timer = self.loop.call_later(min(self.silence_s, self.interval_s), self._beat)

    def rest(self) -> None:
        """No more heartbeats, and nothing waits for the client any more."""
        if self._timer is not None:
            self._timer.cancel()
        for task in (self._heartbeat, self._blocked):
            if task is not None:
                task.cancel()
        self._heartbeat = self._blocked = None

    def begin_whole(self, length: int) -> Awaitable[None]:
        """The head of a whole answer; its body is the last thing sent."""
        return self._begin([*JSON_HEADERS, (b"content-length", str(length).encode())])

    async def begin_stream(self) -> None:
        """The head of a stream, unless it is out already."""
        if not self.started:
            self.streams = True
            await self._begin(STREAM_HEADERS)

    def write(self, body: bytes) -> Awaitable[None] | None:
        """The next bytes of a stream; gives what is to be awaited where the client does not take them at once."""
        sent = self.send({"type": "http.response.body", "body": body, "more_body": True})
        if isinstance(sent, asyncio.Future) and sent.done():
            self._written_at = self.loop.time()
            return None
        self.blocked_since = self.loop.time()
        self._blocked = self.loop.create_task(self._taken(sent))  # of ours, should nobody come to await it
        return self._blocked

    async def _taken(self, sent: Awaitable[None]) -> None:
        await sent
        self.blocked_since, self._written_at = None, self.loop.time()

    async def finish(self, last: bytes | None) -> None:
        """End the response. Raises CutShort where the client is told best by a connection that breaks off."""
        self.blocked_since = self.loop.time()
        if last is None:
            raise CutShort
        await self.send({"type": "http.response.body", "body": last})

    async def _begin(self, headers: Headers) -> None:
        self.started = True
        await self.send({"type": "http.response.start", "status": 200, "headers": [*headers, *self.headers()]})
        self._written_at = self.loop.time()

    def _beat(self) -> None:
        """Look whether the client has heard nothing for too long. A stream that begins sets no timer anew, so the next
        look is never further away than its interval."""
        now = self.loop.time()
        due = self._written_at + (self.interval_s if self.started else self.silence_s)
        if now >= due - CLOCK_STEP_S:
            due = now + self.interval_s
            if self.blocked_since is None:
                self._heartbeat = self.loop.create_task(self._say_something())
        self._timer = self.loop.call_at(min(due, now + self.interval_s), self._beat)

    def fail(self, error: GatewayError) -> bytes | None:
        """The last bytes of a stream that broke; None where the connection has to break off."""
        return self.encoder.fail(error, self.tally)

    async def _say_something(self) -> None:
        await self.begin_stream()
        if (waiting := self.write(self.encoder.heartbeat())) is not None:
            await waiting


def response_start(status: int, headers: Headers) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


@lru_cache(maxsize=1024)  # models, and the trails of a bad hour
def header_value(text: str) -> bytes:
    """Printable ASCII; everything else percent-encoded."""
    return quote(text, safe=HEADER_SAFE).encode()


def stopped(delivery: Delivery) -> bytes | None:
    """The last bytes of an exchange that has been cancelled from outside: even then no stream just stops."""
    if delivery.blocked_since is not None:  # because its client takes nothing: then nothing can be said either
        raise ClientGone
    if not delivery.started:
        raise Stopping
    if not delivery.streams:
        return None
    return delivery.fail(GatewayError(Stopping.words, status=503, type="stream_error"))
