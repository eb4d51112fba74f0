"""How to ask: a call to a platform, and what comes back turned into a committed answer or a failure.

`Attempt` is one call. It is committed when the answer is whole, or when the first meaningful event of a stream has been
decoded. Everything that goes wrong, before or after, leaves here as an `UpstreamError` that protection.classify has
named. What is neither the provider's nor the network's doing is a defect of ours and leaves as it is.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from math import inf

from msgspec import field

from adapters.base import Adapter, Reply, base_url
from adapters.errors import redact
from adapters.openai import failed_generation
from adapters.registry import ADAPTERS
from adapters.stream import Incoming, checked_answer, cut_short, loaded, refusal, said_instead, whole_reply
from protection import Failure, Outcome, UpstreamError
from routing.catalog import Key, Model, Platform, is_demo
from routing.route import Route
from transport.alarm import CLOCK_STEP_S, Alarm, Alarms
from transport.upstream import Call, CallFailed, ConnectTimeout, NoFileLeft, Response, Upstream
from wire.chat import Chat, Completion, Event, Tally
from wire.http import Endpoint
from wire.jsontext import BOM, load_lenient
from wire.unshown import Unshown

COMPLETION_BYTES_MAX = 64 * 1024 * 1024  # SPEC 13.3
ERROR_BYTES_MAX = 64 * 1024  # of an error body; the ones seen stay far below
HELD_BYTES_MAX = 1024 * 1024  # of a preamble without a meaningful event (SPEC 8.7)
CONNECTION_END_S = 0.02  # after [DONE]: the end of the body is usually in the same packet
CHECK_S = 10.0  # for a list of models


Into = Callable[[list[Event]], Awaitable[None] | None]  # takes events; gives what is to be awaited before the next


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long to wait for a provider, in seconds."""

    request_s: float
    stall_s: float
    first_token_s: float
    error_body_s: float = 2.0  # for an error's body: its status and headers say enough without it (SPEC 5.3)


class State(StrEnum):
    OPENING = "opening"  # nothing has been committed: another route may still take over unnoticed
    COMMITTED = "committed"
    ENDED = "ended"


OPENING, COMMITTED, ENDED = State  # by name: to look up an enum's member costs as much as a call


class Attempt(Unshown):
    """One call to a provider, from the question to the end of its answer. Nothing is sent before it is opened; whoever
    makes it closes it.

    Each wait gets its limit with the call, so that any task can drive an attempt, one at a time. Times are the event
    loop's, which are monotonic seconds.
    """

    providers: Providers
    route: Route
    chat: Chat
    number: int  # among this request's attempts, from 1
    state: State = OPENING
    outcome: Outcome | None = None  # set once, by whoever judges it
    tally: Tally = field(default_factory=Tally)
    completion: Completion | None = None  # a committed answer is this, or a stream
    ended: bool = False  # with the last events: nothing more has to be waited for
    started: float = field(default_factory=time.monotonic)
    began: float = 0.0  # the same moment by the loop's clock
    ttfb_ms: int | None = None
    _gives_back: bool = False  # the request holds what a platform gave out for itself
    _bare: bool = False  # that has been refused
    _patience_s: float = inf  # for the first token, where others could be asked
    _alarm: Alarm | None = None  # from the first wait to the end
    _heard_at: float = 0.0
    _progressed_at: float = 0.0
    _whole: bool = False  # the body is read to its end and then judged
    _call: Call | None = None
    _response: Response | None = None
    _refused: bool = False  # the status is not 2xx
    _incoming: Incoming | None = None
    _pieces: list[bytes] = field(default_factory=list)  # of a body that is read whole
    _size: int = 0
    _first: list[Event] = field(default_factory=list)  # decoded before the answer was committed
    _waiting: Awaitable[None] | None = None  # that whoever takes the events has asked for
    _end_at: float = inf  # until when something may come behind the finish
    _at_end: bool = False

    def __post_init__(self) -> None:
        self._whole = not self.chat.stream or bool(self.route.model.quirks.get("no_stream"))
        self.began = self._heard_at = self._progressed_at = self.providers.clock()

    @property
    def adapter(self) -> Adapter:
        return self.providers.adapters[self.route.model.platform.adapter]

    # Until it is committed.

    def hurry(self, first_token_s: float) -> None:
        """Wait no longer than this for the first token of a stream: there are others to ask."""
        self._patience_s = min(self._patience_s, first_token_s)

    async def open(self, late_at: float = inf) -> bool:
        """Wait until the answer is committed. False when `late_at` came first; then it may be called again.

        Raises UpstreamError.
        """
        if (reply := self.adapter.reply_here(self.chat)) is not None:
            self._commit_reply(reply)
        try:
            while self.state is OPENING:
                if not await self._advance(late_at):
                    return False
        except (CallFailed, TimeoutError) as error:
            timeout_at = self.began + self.providers.timeouts.first_token_s - CLOCK_STEP_S
            silent = not self._whole and self.providers.clock() < timeout_at
            raise no_answer(error, self.route, silent=silent) from None
        return True

    async def _advance(self, late_at: float) -> bool:
        """Wait once, and judge what has come. False when it has become late."""
        limit = self._limit()
        if self._incoming is not None and self._incoming.holding:
            late_at = inf  # it makes a tool call, which goes out when it is whole (SPEC 14.7): that is no late start
        if self.providers.clock() >= limit:  # a provider that never pauses would never let the timer run
            if not self._may_end:
                raise TimeoutError
            self._judge(b"")
            return True
        data = b""
        try:
            with self._until(min(limit, late_at)):
                if (response := self._response) is None:
                    if self._call is None:
                        self._call = await self._asking()
                    response = self._response = await self._call.head()
                    self._begin_reading(response)
                    if self._refused or not (self._whole or response.begun):  # the next wait has another limit
                        return True
                while data := response.take() or await response.read():
                    if not self._whole and not self._refused:
                        break
                    self._keep(data)
                    if response.complete or (self._refused and self._size > ERROR_BYTES_MAX):
                        break
        except TimeoutError:
            if late_at < limit:
                return False
            if not self._may_end:
                raise
        except CallFailed:
            if not self._may_end:
                raise
        self._heard_at = self.providers.clock()
        self._judge(data)
        return True

    def _until(self, when: float) -> Alarm:
        """A limit for the next wait, by the loop's clock; whoever passes it raises TimeoutError."""
        alarm = self._alarm
        if alarm is None:
            alarm = self._alarm = self.providers.alarms.take()
        return alarm.until(when)

    def _limit(self) -> float:
        """Until when the next wait may last."""
        if self._refused:
            return self._heard_at + self.providers.timeouts.error_body_s
        if self._whole:
            return self.began + self.providers.timeouts.request_s
        silence_s, first_from, incoming = self.providers.timeouts.stall_s, self.began, self._incoming
        if incoming is not None and incoming.holding:  # a long tool call has no first token to send
            first_from = self._progressed_at
        if incoming is not None and incoming.finishing:
            silence_s = min(silence_s, incoming.silence_s)
        patience_s = min(self._patience_s, self.providers.timeouts.first_token_s)
        return min(self._heard_at + silence_s, first_from + patience_s)

    @property
    def _may_end(self) -> bool:
        """Whether what has come is enough to judge the answer by, should no more come."""
        return self._refused or (self._incoming is not None and self._incoming.finishing)

    def _asking(self) -> Awaitable[Call]:
        """Send the question."""
        request = self.adapter.request(self.route.model, self.route.key, self.chat, bare=self._bare)
        self._gives_back = request.gives_back
        return self.providers.upstream.start("POST", request.endpoint, request.body)

    def _begin_reading(self, response: Response) -> None:
        """The answer's head has come."""
        self._heard_at = self.providers.clock()
        self._refused = not 200 <= response.status < 300
        if not self._whole and not self._refused:
            is_sse = response.content_type == "text/event-stream"
            translator = self.adapter.translator(self.tally, self.chat, whole_calls=self.providers.whole_calls)
            self._incoming = Incoming(translator, self.tally, self.route, time.time(), is_sse=is_sse)

    def _keep(self, data: bytes) -> None:
        """One more piece of a body that is read whole."""
        self._pieces.append(data)
        self._size += len(data)
        if self._size > COMPLETION_BYTES_MAX:
            message = f"The answer is larger than {COMPLETION_BYTES_MAX} bytes."
            raise UpstreamError(Failure.MALFORMED, message, status=200)

    def _judge(self, data: bytes) -> None:
        """What the whole body is, or the next bytes of a stream. Raises UpstreamError."""
        if self._refused:
            self._judge_refusal()
        elif self._whole or self._incoming is None:
            self._answered_whole(b"".join(self._pieces))
        elif not self._incoming.bytes_seen and starts_json(data):  # not a stream, whatever was asked
            self._whole = True
            self._keep(data)
        else:
            self._judge_opening(self._incoming, data)

    def _judge_refusal(self) -> None:
        response, body = self._response, said_instead(b"".join(self._pieces)[:ERROR_BYTES_MAX])
        assert response is not None
        if (rescued := failed_generation(body, self.chat)) is not None:
            self._answered_whole(rescued)
            return
        error = refusal(response.status, response.headers, body, self.route, time.time())
        if not self._gives_back or error.failure is not Failure.BAD_REQUEST:
            raise error
        self._ask_without()

    def _ask_without(self) -> None:
        """Ask once more, without what platforms give out for themselves: this one may have refused another's."""
        self._bare = True
        self.close()
        self.state = OPENING
        self._call = self._response = None
        self._refused = False
        self._pieces.clear()
        self._size = 0

    def _answered_whole(self, raw: bytes) -> None:
        self._commit_reply(whole_reply(raw, self.adapter, self.chat, self.route, time.time()))

    def _commit_reply(self, reply: Reply) -> None:
        self.tally, self.completion, self._first = reply.tally, reply.completion, reply.first or []
        self.state, self.ended, self._at_end = COMMITTED, True, True
        self._incoming = None  # it is not a stream, whatever was asked for

    def _judge_opening(self, incoming: Incoming, data: bytes) -> None:
        """A stream's next bytes, from its head to its first meaningful event. Raises UpstreamError."""
        tally = self.tally
        events, meaningful = incoming.feed(data) if data else incoming.flush()
        self._at_end = not data
        self._first += events
        if incoming.progressed:
            self._progressed_at = self._heard_at
        if meaningful or (tally.finish == "length" and not cut_short(tally, self.chat, self.route.model)):
            self._commit_stream(incoming)
        elif incoming.error:
            raise incoming.error
        elif incoming.done or not data:
            if error := incoming.ending() or self._cut():
                raise error
            self._commit_stream(incoming)
        elif not incoming.holding:
            self._size += len(data)
            if self._size > HELD_BYTES_MAX:
                raise UpstreamError(Failure.EMPTY, "The provider sent 1 MiB without a word of an answer.", status=200)

    def _commit_stream(self, incoming: Incoming) -> None:
        self.state = COMMITTED
        self.ended = self._is_ended(incoming)

    def _cut(self) -> UpstreamError | None:
        tally = self.tally
        if not tally.has_text and not tally.has_tool_calls and cut_short(tally, self.chat, self.route.model):
            return UpstreamError(Failure.TRUNCATED, "The provider cut the answer off before its first word.")
        return None

    # Once it is committed.

    async def pour(self, into: Into, quiet_s: Callable[[], float]) -> None:
        """Hand the events over as they come, those that arrived together at once, until the answer has ended.

        The connection itself calls `into`, which wakes no task. What `into` returns is awaited before anything more is
        handed over. `quiet_s` gives the longest time without a meaningful event; it may grow while that is waited for.
        Raises UpstreamError, and what `into` raises.
        """
        self._heard_at = self._progressed_at = self.providers.clock()
        self._waiting = into(self._first) if self._first else None
        self._first = []  # a slow client would keep them: parsed, they are several times the size
        incoming, response, alarm = self._incoming, self._response, self._alarm
        while True:
            if self._waiting is not None:
                await self._taken(self._waiting)
            if incoming is None or self._at_end or incoming.done or incoming.error:
                break
            assert response is not None and alarm is not None  # it has been waited for before
            try:
                if not self._hand_over(into):
                    with alarm.until(self._quiet_until(incoming, quiet_s)):
                        await response.each(partial(self._hand_over, into))
            except (CallFailed, TimeoutError) as error:
                if isinstance(error, TimeoutError) and self._has_moved_on(incoming, quiet_s):
                    continue
                if not incoming.finishing:
                    raise self._broken(error) from None
                self._pass_on(b"", incoming, into)  # a broken connection, or silence, says nothing behind a finish
        if incoming is not None:
            await self._end(incoming)

    async def _taken(self, waiting: Awaitable[None]) -> None:
        """Wait for whoever takes the events; that time is not the provider's silence."""
        began = self.providers.clock()
        await waiting
        self._waiting = None
        self._heard_at = now = self.providers.clock()
        self._progressed_at += now - began

    def _hand_over(self, into: Into) -> bool:
        """Hand over what has come. True when there is something else to do than to wait for more of it."""
        incoming, response = self._incoming, self._response
        assert incoming is not None and response is not None
        while (data := response.take()) is not None:
            self._heard_at = self.providers.clock()
            self._pass_on(data, incoming, into)
            if self._waiting is not None or not data or incoming.done or incoming.finishing or incoming.error:
                return True
        return False

    def _pass_on(self, data: bytes, incoming: Incoming, into: Into) -> None:
        """Hand over the events in these bytes; b"" is the end of the stream."""
        finishing = incoming.finishing
        if data:
            events, _ = incoming.feed(data)
        else:
            self._at_end = True
            events, _ = incoming.flush()
        if incoming.progressed:
            self._progressed_at = self._heard_at
        if finishing and (events or incoming.progressed):  # it goes on after all
            self._end_at = inf
        if events:
            self.ended = self._is_ended(incoming)
            self._waiting = into(events)

    def _has_moved_on(self, incoming: Incoming, quiet_s: Callable[[], float]) -> bool:
        """Whether something has come since the limit was set that has just passed."""
        return self._waiting is not None or self.providers.clock() < self._quiet_until(incoming, quiet_s)

    def _quiet_until(self, incoming: Incoming, quiet_s: Callable[[], float]) -> float:
        """Until when the provider may say nothing: less behind a finish reason, where something may still come."""
        stall_s = self.providers.timeouts.stall_s
        if not incoming.finishing:
            return min(self._heard_at + stall_s, self._progressed_at + quiet_s())
        self._end_at = min(self._end_at, self._heard_at + stall_s)  # whatever comes until then, if it says nothing
        return min(self._end_at, self._heard_at + min(stall_s, incoming.silence_s))

    def _broken(self, error: Exception) -> UpstreamError:
        """The failure that a stream ended with."""
        if isinstance(error, TimeoutError):
            return UpstreamError(Failure.STALL, "The provider sent nothing for too long.", status=504)
        words = redact(str(error), self.route.key.secret)
        return UpstreamError(Failure.CONNECTION, f"The connection broke: {words}")

    def _is_ended(self, incoming: Incoming) -> bool:
        if self._at_end or incoming.error is not None:
            return True
        return incoming.done and self._response is not None and self._response.complete

    async def _end(self, incoming: Incoming) -> None:
        if error := incoming.error or incoming.ending():
            raise error
        response = self._response
        if incoming.done and response is not None and not response.complete:  # lets the connection go to the pool
            try:
                with self._until(self.providers.clock() + CONNECTION_END_S):
                    await response.read()
            except (TimeoutError, CallFailed):
                pass

    def close(self) -> None:
        """Let go of the provider: its connection is free or closed. May be called again."""
        self.state = ENDED
        if self._alarm is not None:
            self.providers.alarms.give_back(self._alarm)
            self._alarm = None
        if self._response is not None:
            self._response.close()  # goes back to the pool where the body has been read to its end
        elif self._call is not None:
            self._call.close()


class Providers:
    """All platforms over one pool of connections."""

    def __init__(self, timeouts: Timeouts, upstream: Upstream, *, whole_calls: bool = True) -> None:
        self.timeouts = timeouts
        self.whole_calls = whole_calls  # SPEC 14.7
        self.upstream = upstream
        self.loop = asyncio.get_running_loop()
        self.clock = self.loop.time
        self.alarms = Alarms(self.loop)
        self.adapters: Mapping[str, Adapter] = {name: make(time.time) for name, make in ADAPTERS.items()}

    async def check_key(self, model: Model, key: Key) -> bool:
        """Ask the model's platform for its list of models, which uses no quota. Raises UpstreamError when it refuses.

        False when nothing is proved, because the platform gives its list to everyone.
        """
        if is_demo(model.platform):
            return True
        route, path = Route(model, key, None), model.platform.check_path
        if path is None:
            path = "/models"
        url, secret = base_url(model.platform, key)
        headers = self.adapters[model.platform.adapter].headers(secret, model.quirks)
        try:
            response, raw = await self._get(Endpoint(url + (path or "/models"), headers))
        except (CallFailed, TimeoutError) as error:
            raise no_answer(error, route) from None
        if not 200 <= response.status < 300:
            raise refusal(response.status, response.headers, said_instead(raw), route, time.time())
        if not raw.removeprefix(BOM).lstrip().startswith(b"["):  # some give a bare list
            checked_answer(loaded(raw), route, time.time())
        return bool(path)

    async def list_models(self, platform: Platform, key: Key) -> object:
        """What GET {base_url}/models says; discovery.py reads it. Raises UpstreamError, or ValueError for no JSON."""
        url, secret = base_url(platform, key)
        headers = self.adapters[platform.adapter].headers(secret, platform.quirks)
        try:
            response, raw = await self._get(Endpoint(f"{url}/models", headers))
        except (CallFailed, TimeoutError) as error:
            raise UpstreamError(Failure.CONNECTION, getattr(error, "cause", "") or type(error).__name__) from None
        if not 200 <= response.status < 300:
            raise UpstreamError(Failure.WRAPPED, f"HTTP {response.status}", status=response.status)
        return load_lenient(raw)

    async def _get(self, endpoint: Endpoint) -> tuple[Response, bytes]:
        async with asyncio.timeout(min(CHECK_S, self.timeouts.request_s)):
            response = await self.upstream.call("GET", endpoint)
            try:
                return response, await read_body(response)
            finally:
                response.close()


def starts_json(data: bytes) -> bool:
    return data.removeprefix(BOM).lstrip()[:1] in (b"{", b"[")


def no_answer(error: CallFailed | TimeoutError, route: Route, *, silent: bool = False) -> UpstreamError:
    """Name what went wrong before an answer was committed. `silent`: a stream that has stopped, not a slow answer."""
    if isinstance(error, ConnectTimeout):
        return UpstreamError(Failure.TIMEOUT, "The provider could not be reached in time.", status=504)
    if isinstance(error, TimeoutError):
        if silent:
            return UpstreamError(Failure.STALL, "The provider sent nothing for too long.", status=504)
        return UpstreamError(Failure.TIMEOUT, "The provider did not answer in time.", status=504)
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
