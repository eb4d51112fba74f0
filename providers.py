"""How to ask: a call to a platform, and what comes back turned into a committed `Reply` or a failure.

`Providers.open` returns when the answer is committed: whole, or with its first meaningful event decoded. Everything
that goes wrong, before or after, leaves here as an `UpstreamError` that protection.classify has named. The connection
lives until the reply is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from math import inf

from adapters.base import Adapter, Reply, base_url
from adapters.errors import redact
from adapters.openai import failed_generation
from adapters.plain import note
from adapters.registry import ADAPTERS
from adapters.stream import Incoming, checked_answer, cut_short, loaded, refusal, said_instead, whole_reply
from protection import Failure, UpstreamError
from routing.catalog import Key, Model, Platform, is_demo
from routing.route import Route
from transport.deadlines import Limit
from transport.upstream import CallFailed, ConnectTimeout, NoFileLeft, Response, Upstream
from wire.chat import Chat, Event, Tally, chunk_of, frame
from wire.http import Endpoint
from wire.jsontext import load_lenient

COMPLETION_BYTES_MAX = 64 * 1024 * 1024  # SPEC 13.3
ERROR_BYTES_MAX = 64 * 1024  # of an error body; the ones seen stay far below
HELD_BYTES_MAX = 1024 * 1024  # of a preamble without a meaningful event (SPEC 8.7)
AFTER_FINISH_S = 5.0  # an answer that has said how it ended waits no longer for its usage and end marker
CONNECTION_END_S = 0.02  # after [DONE]: the end of the body is usually in the same packet
CHECK_S = 10.0  # for a list of models
CLOCK_STEP_S = 0.002  # uvloop's clock counts whole milliseconds, and its timers may fire in the one before


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long to wait for a provider, in seconds."""

    request_s: float
    stall_s: float
    first_token_s: float


class LiveReply(Reply):
    """A stream that is still arriving. `limit` is that of the task that reads it."""

    def __init__(
        self,
        tally: Tally,
        first: list[Event],
        incoming: Incoming,
        response: Response,
        limit: Limit,
        stall_s: float,
    ) -> None:
        super().__init__(tally, first=first)
        self._incoming = incoming
        self._response = response
        self._limit = limit
        self._stall_s = self._stall_left_s = stall_s
        self._at_end = False
        self._end_at = inf  # for what may come behind the finish
        self._clock = asyncio.get_running_loop().time
        self.ended = self._is_ended()

    async def next_batch(self, idle_s: float) -> list[Event] | None:
        if self._first:
            return await super().next_batch(idle_s)
        incoming = self._incoming
        now = self._clock()
        idle_at = now + idle_s
        while not (self._at_end or incoming.done or incoming.error):
            finished = self.tally.finish is not None
            if finished and self._end_at == inf:
                self._end_at = now + min(self._stall_s, AFTER_FINISH_S)
            stall_at = now + self._stall_left_s
            until = self._end_at if finished else stall_at if stall_at < idle_at else idle_at
            self._limit.set(until)
            try:
                data = await self._response.read() if until > now else None
            except asyncio.CancelledError:
                if not self._limit.passed():
                    raise
                data = None
            except CallFailed as error:
                data = self._broken(error)
            finally:
                self._limit.due = inf
            waited_since, now = now, self._clock()
            if data:
                self._stall_left_s = self._stall_s
                events, _ = incoming.feed(data)
                if events and finished:  # it goes on after all
                    self._end_at = inf
            elif data is not None or finished:
                self._at_end = True
                events, _ = incoming.flush()
            else:  # only this waiting counts as a stall, never the time our client takes
                self._stall_left_s -= now - waited_since
                if self._stall_left_s <= 0:
                    raise UpstreamError(Failure.STALL, "The provider sent nothing for too long.", status=504)
                events = []
            if events or now >= idle_at:
                if incoming.done or incoming.error or self._at_end:
                    self.ended = self._is_ended()
                return events
        return await self._ending()

    def _is_ended(self) -> bool:
        incoming = self._incoming
        return self._at_end or incoming.error is not None or (incoming.done and self._response.complete)

    def _broken(self, error: CallFailed) -> bytes:
        """The end of a stream whose connection has broken: that says nothing once the answer is complete."""
        if self.tally.finish is not None:
            return b""
        raise UpstreamError(Failure.CONNECTION, f"The connection broke: {error.cause}") from None

    async def _ending(self) -> list[Event] | None:
        if error := self._incoming.error or self._incoming.ending():
            raise error
        if self.tally.finish is None:  # [DONE] alone: clients want to be told how it ended
            chunk = chunk_of(self.tally.head, {}, "tool_calls" if self.tally.has_tool_calls else "stop")
            note(chunk, self.tally)
            return [Event(frame(chunk), chunk)]
        if self._incoming.done and not self._response.complete:  # lets the connection go back to the pool
            with contextlib.suppress(TimeoutError, CallFailed), self._limit.within(CONNECTION_END_S):
                await self._response.read()
        return None

    def close(self) -> None:
        self._response.close()  # goes back to the pool where the body has been read to its end


class Providers:
    """All platforms over one pool of connections."""

    def __init__(self, timeouts: Timeouts, upstream: Upstream) -> None:
        self._timeouts = timeouts
        self._upstream = upstream
        self._adapters = {name: make(time.time) for name, make in ADAPTERS.items()}

    async def open(self, route: Route, chat: Chat, limit: Limit) -> Reply:
        """Call the route's provider; gives its committed answer, which the caller closes. `limit` is the caller's own,
        for all that it waits for here and with the reply.

        Raises UpstreamError, then and while it is read.
        """
        adapter = self._adapters[route.model.platform.adapter]
        if (made_here := adapter.reply_here(chat)) is not None:
            return made_here
        request = adapter.request(route.model, route.key, chat)
        whole = not chat.stream or bool(route.model.quirks.get("no_stream"))
        wait_s = self._timeouts.request_s if whole else min(self._timeouts.stall_s, self._timeouts.first_token_s)
        deadline = None if whole else asyncio.get_running_loop().time() + self._timeouts.first_token_s
        response: Response | None = None
        reply: Reply | None = None
        try:
            with limit.within(wait_s):
                response = await self._upstream.call("POST", request.endpoint, request.body)
                if not 200 <= response.status < 300:
                    refused = await error_body(response)
                    if (rescued := failed_generation(refused, chat)) is None:
                        raise refusal(response.status, response.headers, refused, route, time.time())
                    reply = whole_reply(rescued, adapter, chat, route, time.time())
                elif deadline is None:
                    reply = whole_reply(await read_body(response), adapter, chat, route, time.time())
                else:
                    opening = Opening(self._timeouts, limit, deadline)
                    reply = await opening.reply(response, adapter, chat, route)
        except (CallFailed, TimeoutError) as error:
            raise no_answer(error, route, deadline) from None
        finally:
            if response is not None and not isinstance(reply, LiveReply):
                response.close()  # a no-op once the body has been read to its end
        return reply

    async def check_key(self, model: Model, key: Key) -> bool:
        """Ask the model's platform for its list of models, which uses no quota. Raises UpstreamError when it refuses.

        False when nothing is proved, because the platform gives its list to everyone.
        """
        if is_demo(model.platform):
            return True
        route, path = Route(model, key, None), model.quirks.get("check_path", "/models")
        url, secret = base_url(model.platform, key)
        headers = self._adapters[model.platform.adapter].headers(secret, model.quirks)
        try:
            response, raw = await self._get(Endpoint(url + (path or "/models"), headers))
        except (CallFailed, TimeoutError) as error:
            raise no_answer(error, route, None) from None
        if not 200 <= response.status < 300:
            raise refusal(response.status, response.headers, said_instead(raw), route, time.time())
        if not raw.lstrip().startswith(b"["):  # some give a bare list
            checked_answer(loaded(raw), route, time.time())
        return bool(path)

    async def list_models(self, platform: Platform, key: Key) -> object:
        """What GET {base_url}/models says; discovery.py reads it. Raises UpstreamError, or ValueError for no JSON."""
        url, secret = base_url(platform, key)
        headers = self._adapters[platform.adapter].headers(secret, platform.quirks)
        try:
            response, raw = await self._get(Endpoint(f"{url}/models", headers))
        except (CallFailed, TimeoutError) as error:
            raise UpstreamError(Failure.CONNECTION, getattr(error, "cause", "") or type(error).__name__) from None
        if not 200 <= response.status < 300:
            raise UpstreamError(Failure.WRAPPED, f"HTTP {response.status}", status=response.status)
        return load_lenient(raw)

    async def _get(self, endpoint: Endpoint) -> tuple[Response, bytes]:
        async with asyncio.timeout(min(CHECK_S, self._timeouts.request_s)):
            response = await self._upstream.call("GET", endpoint)
            try:
                return response, await read_body(response)
            finally:
                response.close()


def no_answer(error: CallFailed | TimeoutError, route: Route, deadline: float | None) -> UpstreamError:
    """Name what went wrong before an answer was committed; `deadline` is a stream's for its first token."""
    if isinstance(error, ConnectTimeout):
        return UpstreamError(Failure.TIMEOUT, "The provider could not be reached in time.", status=504)
    if isinstance(error, TimeoutError):
        if deadline is None or asyncio.get_running_loop().time() >= deadline - CLOCK_STEP_S:
            return UpstreamError(Failure.TIMEOUT, "The provider did not answer in time.", status=504)
        return UpstreamError(Failure.STALL, "The provider sent nothing for too long.", status=504)
    words = redact(str(error), route.key.secret)
    ours = isinstance(error, NoFileLeft)
    return UpstreamError(Failure.CONNECTION, f"No answer from the provider: {words}", ours=ours)


async def read_body(response: Response, begun: bytes = b"", bytes_max: int = COMPLETION_BYTES_MAX) -> bytes:
    pieces, size = [begun], len(begun)
    while data := await response.read():
        pieces.append(data)
        size += len(data)
        if size > bytes_max:
            raise UpstreamError(Failure.MALFORMED, f"The answer is larger than {bytes_max} bytes.", status=200)
    return b"".join(pieces)


async def error_body(response: Response) -> object:
    """What came with a status other than 2xx."""
    raw = b""
    while len(raw) < ERROR_BYTES_MAX and (data := await response.read()):
        raw += data
    return said_instead(raw)


class Opening:
    """The time between a stream's headers and its first meaningful event, in which it can still be swapped."""

    def __init__(self, timeouts: Timeouts, limit: Limit, first_token_deadline: float) -> None:
        self._timeouts = timeouts
        self._limit = limit
        self._deadline = first_token_deadline
        self._clock = asyncio.get_running_loop().time

    async def reply(self, response: Response, adapter: Adapter, chat: Chat, route: Route) -> Reply:
        tally = Tally()
        is_sse = response.content_type == "text/event-stream"
        incoming = Incoming(adapter.translator(tally, chat), tally, route, time.time(), is_sse=is_sse)
        held: list[Event] = []
        held_bytes = 0
        while True:
            data = await self._read(response)
            if not incoming.bytes_seen and data.lstrip()[:1] in (b"{", b"["):  # not a stream, whatever was asked
                return whole_reply(await read_body(response, data), adapter, chat, route, time.time())
            events, meaningful = incoming.feed(data) if data else incoming.flush()
            held += events
            if meaningful or (tally.finish == "length" and not cut_short(tally, chat, route.model)):
                return self._live(tally, held, incoming, response)
            if incoming.error:
                raise incoming.error
            if incoming.done or not data:
                if error := incoming.ending() or self._cut(tally, chat, route):
                    raise error
                return self._live(tally, held, incoming, response)
            held_bytes += len(data)
            if held_bytes > HELD_BYTES_MAX:
                raise UpstreamError(Failure.EMPTY, "The provider sent 1 MiB without a word of an answer.", status=200)

    def _live(self, tally: Tally, held: list[Event], incoming: Incoming, response: Response) -> LiveReply:
        return LiveReply(tally, held, incoming, response, self._limit, self._timeouts.stall_s)

    async def _read(self, response: Response) -> bytes:
        now = self._clock()
        if now >= self._deadline:  # a provider that never pauses would never let the timer run
            raise TimeoutError
        self._limit.set(min(now + self._timeouts.stall_s, self._deadline))
        return await response.read()

    @staticmethod
    def _cut(tally: Tally, chat: Chat, route: Route) -> UpstreamError | None:
        if not tally.has_text and not tally.has_tool_calls and cut_short(tally, chat, route.model):
            return UpstreamError(Failure.TRUNCATED, "The provider cut the answer off before its first word.")
        return None
