"""How to ask: a call to a platform, and what comes back turned into a committed `Reply` or a failure.

`Providers.open` returns when the answer is committed: whole, or with its first meaningful event decoded. Everything
that goes wrong, before or after, leaves here as an `UpstreamError` that protection.classify has named. The connection
lives until the reply is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any, Protocol

import faults
from adapters import (
    Endpoint,
    OpenAIAdapter,
    Request,
    Surroundings,
    as_chunks,
    base_url,
    failed_generation,
    note,
    note_completion,
    note_plain,
    well_formed,
    with_json,
)
from catalog import Key, Model, Platform, is_demo
from deadlines import Limit
from gemini import GeminiAdapter
from protection import Failure, UpstreamError, classify
from router import Route
from upstream import BROKEN, Body, ConnectTimeout, Response, Upstream
from wire import Chat, Completion, Event, EventTooLarge, SSEDecoder, Tally, chunk_of, dump, frame, load_lenient

COMPLETION_BYTES_MAX = 64 * 1024 * 1024  # SPEC 13.3
STREAM_BYTES_MAX = 256 * 1024 * 1024  # of one stream; 128,000 tokens in chunks of 1 KB are half of it
ERROR_BYTES_MAX = 64 * 1024  # of an error body; the ones seen stay far below
HELD_BYTES_MAX = 1024 * 1024  # of a preamble without a meaningful event (SPEC 8.7)
AFTER_FINISH_S = 5.0  # an answer that has said how it ended waits no longer for its usage and end marker
CONNECTION_END_S = 0.02  # after [DONE]: the end of the body is usually in the same packet
OUR_OWN = (errno.EMFILE, errno.ENFILE)  # no file is left for another connection, whosever it would be
CHECK_S = 10.0  # for a list of models
CLOCK_STEP_S = 0.002  # uvloop's clock counts whole milliseconds, and its timers may fire in the one before


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long to wait for a provider, in seconds."""

    request_s: float
    stall_s: float
    first_token_s: float


class Translator(Protocol):
    """One stream's chunks, from the adapter's wire to OpenAI's chat form."""

    @property
    def plain_text(self) -> Callable[[Any], str | None] | None:
        """Gives the text of a chunk that holds nothing else and so need not be fed; None while all have to be."""

    def feed(self, raw: bytes, chunk: dict[str, Any]) -> list[Event]:
        """The events that this chunk amounts to; its raw frame goes out unchanged where nothing had to change.

        Raises UpstreamError for an answer that is none.
        """

    def end(self) -> list[Event]:
        """What was held back until the end marker. Raises UpstreamError."""


class Adapter(Protocol):
    """One wire format."""

    def request(self, model: Model, key: Key, chat: Chat) -> Request: ...

    def headers(self, secret: str, quirks: Mapping[str, Any]) -> dict[str, str]:
        """Of every call; the secret is in one of them."""

    def plain_answer(self, body: Any, chat: Chat) -> str | None:
        """The text of a whole answer in OpenAI's form that is nothing else, so that it can go out as it came."""

    def completion(self, raw: bytes, body: dict[str, Any], chat: Chat) -> Completion | None:
        """A whole answer; None when this is none. Raises UpstreamError for one that says it failed."""

    def translator(self, tally: Tally, chat: Chat) -> Translator: ...


class Incoming:
    """One provider's stream on its way from bytes to events: decoded once, checked, counted."""

    def __init__(self, translator: Translator, tally: Tally, route: Route, *, is_sse: bool) -> None:
        self._is_sse = is_sse  # by its own words
        self.done = False  # [DONE] has been seen
        self.error: UpstreamError | None = None  # found behind the events that `feed` returned
        self.bytes_seen = 0
        self._decoder = SSEDecoder()
        self._surroundings = Surroundings()
        self._translator = translator
        self._tally = tally
        self._route = route

    def feed(self, data: bytes) -> tuple[list[Event], bool]:
        """The events in these bytes, and whether one of them may open the answer."""
        self.bytes_seen += len(data)
        if self.bytes_seen > STREAM_BYTES_MAX:
            self.error = UpstreamError(Failure.MALFORMED, f"The answer is larger than {STREAM_BYTES_MAX} bytes.")
            return [], False
        if not self._decoder.held and (text := self._surroundings.text(data)) is not None:
            return [Event(data, text_chunk(text))], self._count(text)
        return self._decoded(partial(self._decoder.feed, data))

    def flush(self) -> tuple[list[Event], bool]:
        return self._decoded(self._decoder.flush)

    def _decoded(self, decode: Callable[[], list[tuple[bytes, bytes]]]) -> tuple[list[Event], bool]:
        try:
            return self._events(decode())
        except EventTooLarge:
            self.error = UpstreamError(Failure.MALFORMED, "The provider sent an event larger than 1 MiB.")
            return [], False

    def _events(self, frames: list[tuple[bytes, bytes]]) -> tuple[list[Event], bool]:
        events: list[Event] = []
        meaningful = False
        tally, translator = self._tally, self._translator
        plain_text, surroundings = translator.plain_text, self._surroundings
        for raw, payload in frames:
            if payload == b"[DONE]":
                self.done = True
                meaningful |= self._take(translator.end, events)
                break
            text = surroundings.text(raw) if plain_text is not None else None
            if text is not None:
                chunk: Any = text_chunk(text)
            else:
                chunk = decoded(payload)
                if plain_text is not None and (text := plain_text(chunk)):
                    surroundings.learn(raw, payload, chunk)
            if text is not None:
                meaningful |= self._count(text)
                if not tally.head:
                    tally.head = chunk
                events.append(Event(raw, chunk))
                continue
            if not well_formed(chunk):
                tally.malformed += 1
                continue
            if fault := faults.wrapped(chunk, self._route.model.quirks):
                self.error = failure_inside(fault, chunk, self._route)
                break
            meaningful |= self._take(partial(translator.feed, raw, chunk), events)
            if self.error:
                break
            plain_text = translator.plain_text  # which may have become possible
        return events, meaningful

    def _count(self, text: str) -> bool:
        """True when this text may open the answer."""
        tally = self._tally
        tally.text_chars += len(text)
        if not text or not (tally.has_text or not text.isspace()):
            return False
        tally.has_text = True
        return True

    def _take(self, translated: Callable[[], list[Event]], events: list[Event]) -> bool:
        """Count and keep what the translator makes; True when it may open the answer."""
        meaningful = False
        try:
            for event in translated():
                meaningful |= note(event.chunk, self._tally)
                events.append(event)
        except UpstreamError as error:
            self.error = error
        return meaningful

    def ending(self) -> UpstreamError | None:
        """What is wrong with a stream that ends here, if anything."""
        tally = self._tally
        if not self.done and tally.finish is None:
            if not tally.head and (self.bytes_seen or not self._is_sse):
                return UpstreamError(
                    Failure.MALFORMED, "The provider's answer is neither JSON nor a stream.", status=200
                )
            return UpstreamError(Failure.TRUNCATED, "The provider's stream ended before the answer did.")
        if tally.empty:
            return empty_answer()
        return None


def text_chunk(text: str) -> dict[str, Any]:
    """What a chunk says that holds nothing but text."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


def empty_answer() -> UpstreamError:
    return UpstreamError(Failure.EMPTY, "The provider's answer was empty.", status=200)


def decoded(payload: bytes) -> Any:
    """An event's JSON; None for what is none."""
    try:
        return load_lenient(payload)
    except ValueError:
        return None


def failure_inside(fault: faults.Fault, body: object, route: Route) -> UpstreamError:
    """The failure that a 200 carried."""
    status = fault.status if fault.status is not None and fault.status >= 300 else 200
    return named_failure(status, fault, {}, body, route)


def named_failure(
    status: int, fault: faults.Fault, headers: Mapping[str, str], body: object, route: Route
) -> UpstreamError:
    quirks = route.model.quirks
    if fault.sure and fault.status is not None:
        status = fault.status
    failure = classify(status, fault.code, fault.message)
    rest_s = faults.retry_after_s(fault, headers, body, time.time(), quirks)
    if failure is Failure.OUT_OF_CREDIT and rest_s is None and quirks.get("credit_resets_daily"):
        rest_s = faults.until_reset_s(quirks.get("daily_reset", "UTC"), time.time())
    return UpstreamError(
        failure,
        faults.redact(fault.message, route.key.secret) or f"HTTP {status}",
        status=status,
        code=faults.redact(fault.code, route.key.secret) if fault.code else None,
        retry_after_s=rest_s,
    )


class Reply:
    """A committed answer: whole, or a stream that has begun."""

    def __init__(self, tally: Tally, *, completion: Completion | None = None, first: list[Event] | None = None) -> None:
        self.tally = tally
        self.completion = completion
        self.ended = True  # with the last batch: nothing more has to be waited for
        self._first = first

    async def next_batch(self, idle_s: float) -> list[Event] | None:
        """The next events, those that arrived together; [] when none came for `idle_s`, None at the end.

        Raises UpstreamError.
        """
        events, self._first = self._first, None
        return events

    def close(self) -> None:
        """Whoever opened it calls this once; nothing is read afterwards, and the connection is free or closed."""


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
        self._content = response.content
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
                data = await self._content.readany() if until > now else None
            except asyncio.CancelledError:
                if not self._limit.passed():
                    raise
                data = None
            except BROKEN as error:
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
        return self._at_end or incoming.error is not None or (incoming.done and self._content.is_eof())

    def _broken(self, error: Exception) -> bytes:
        """The end of a stream whose connection has broken: that says nothing once the answer is complete."""
        error.__traceback__ = None  # the body keeps it, and its frames keep the body: a cycle
        if self.tally.finish is not None:
            return b""
        raise UpstreamError(Failure.CONNECTION, f"The connection broke: {type(error).__name__}") from None

    async def _ending(self) -> list[Event] | None:
        if error := self._incoming.error or self._incoming.ending():
            raise error
        if self.tally.finish is None:  # [DONE] alone: clients want to be told how it ended
            chunk = chunk_of(self.tally.head, {}, "tool_calls" if self.tally.has_tool_calls else "stop")
            note(chunk, self.tally)
            return [Event(frame(chunk), chunk)]
        if self._incoming.done and not self._content.is_eof():  # lets the connection go back to the pool
            with contextlib.suppress(TimeoutError, *BROKEN), self._limit.within(CONNECTION_END_S):
                await self._content.readany()
        return None

    def close(self) -> None:
        self._response.close()  # goes back to the pool where the body has been read to its end


def cut_short(tally: Tally, chat: Chat, model: Model) -> bool:
    """Whether an answer that ended for length stopped far below every length that was allowed (SPEC 7.8)."""
    limits = [limit for limit in (chat.max_tokens, model.max_output) if limit is not None]
    return tally.finish == "length" and bool(limits) and all(tally.output_tokens() * 2 < limit for limit in limits)


class Providers:
    """All platforms over one pool of connections."""

    def __init__(self, timeouts: Timeouts, upstream: Upstream) -> None:
        self._timeouts = timeouts
        self._upstream = upstream
        self._adapters: dict[str, Adapter] = {"openai": OpenAIAdapter(), "google": GeminiAdapter(time.time)}

    async def open(self, route: Route, chat: Chat, limit: Limit) -> Reply:
        """Call the route's provider; gives its committed answer, which the caller closes. `limit` is the caller's own,
        for all that it waits for here and with the reply.

        Raises UpstreamError, then and while it is read.
        """
        if is_demo(route.model.platform):
            return demo_reply(chat)
        adapter = self._adapters[route.model.platform.adapter]
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
                        raise refusal(response, refused, route)
                    reply = whole_reply(rescued, adapter, chat, route)
                elif deadline is None:
                    reply = whole_reply(await read_body(response.content, b""), adapter, chat, route)
                else:
                    opening = Opening(self._timeouts, limit, deadline)
                    reply = await opening.reply(response, adapter, chat, route)
        except BROKEN as error:
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
        except BROKEN as error:
            raise no_answer(error, route, None) from None
        if not 200 <= response.status < 300:
            raise refusal(response, said_instead(raw), route)
        if not raw.lstrip().startswith(b"["):  # some give a bare list
            checked_answer(loaded(raw), route)
        return bool(path)

    async def list_models(self, platform: Platform, key: Key) -> object:
        """What GET {base_url}/models says; discovery.py reads it. Raises UpstreamError, or ValueError for no JSON."""
        url, secret = base_url(platform, key)
        headers = self._adapters[platform.adapter].headers(secret, platform.quirks)
        try:
            response, raw = await self._get(Endpoint(f"{url}/models", headers))
        except BROKEN as error:
            raise UpstreamError(Failure.CONNECTION, type(error).__name__) from None
        if not 200 <= response.status < 300:
            raise UpstreamError(Failure.WRAPPED, f"HTTP {response.status}", status=response.status)
        return load_lenient(raw)

    async def _get(self, endpoint: Endpoint) -> tuple[Response, bytes]:
        async with asyncio.timeout(min(CHECK_S, self._timeouts.request_s)):
            response = await self._upstream.call("GET", endpoint)
            try:
                return response, await read_body(response.content, b"")
            finally:
                response.close()


def no_answer(error: Exception, route: Route, deadline: float | None) -> UpstreamError:
    """Name what went wrong before an answer was committed; `deadline` is a stream's for its first token."""
    error.__traceback__ = None  # as in LiveReply
    if isinstance(error, ConnectTimeout):
        return UpstreamError(Failure.TIMEOUT, "The provider could not be reached in time.", status=504)
    if isinstance(error, TimeoutError):
        if deadline is None or asyncio.get_running_loop().time() >= deadline - CLOCK_STEP_S:
            return UpstreamError(Failure.TIMEOUT, "The provider did not answer in time.", status=504)
        return UpstreamError(Failure.STALL, "The provider sent nothing for too long.", status=504)
    words = faults.redact(f"{type(error).__name__}: {error}", route.key.secret)
    ours = isinstance(error, OSError) and error.errno in OUR_OWN
    return UpstreamError(Failure.CONNECTION, f"No answer from the provider: {words}", ours=ours)


async def read_body(content: Body, begun: bytes, bytes_max: int = COMPLETION_BYTES_MAX) -> bytes:
    pieces, size = [begun], len(begun)
    while not content.at_eof():
        data = await content.readany()
        pieces.append(data)
        size += len(data)
        if size > bytes_max:
            raise UpstreamError(Failure.MALFORMED, f"The answer is larger than {bytes_max} bytes.", status=200)
    return b"".join(pieces)


async def error_body(response: Response) -> object:
    """What came with a status other than 2xx."""
    raw = b""
    while len(raw) < ERROR_BYTES_MAX and (data := await response.content.readany()):
        raw += data
    return said_instead(raw)


def said_instead(raw: bytes) -> object:
    """An error's body: JSON, words, or nothing worth reading."""
    try:
        return load_lenient(raw)
    except ValueError:
        words = raw[:300].decode(errors="replace").strip()
        return None if not words or words.startswith("<") else words


def refusal(response: Response, body: object, route: Route) -> UpstreamError:
    """The failure that a status other than 2xx means."""
    fault = faults.read(body, route.model.quirks)
    return named_failure(response.status, fault, response.headers, body, route)


def whole_reply(raw: bytes, adapter: Adapter, chat: Chat, route: Route) -> Reply:
    """A committed answer from a whole body."""
    tally, body = Tally(), loaded(raw)
    if (text := adapter.plain_answer(body, chat)) is not None:
        completion = Completion(raw, body)
        note_plain(body, text, tally)
    else:
        completion = whole_completion(raw, body, adapter, chat, route)
        note_completion(completion.body, tally)
        if tally.empty:
            raise empty_answer()
    if not chat.stream:
        return Reply(tally, completion=completion)
    return Reply(tally, first=[Event(frame(chunk), chunk) for chunk in as_chunks(completion.body)])


def whole_completion(raw: bytes, body: Any, adapter: Adapter, chat: Chat, route: Route) -> Completion:
    checked = checked_answer(body, route)
    completion = adapter.completion(raw, checked, chat)
    if completion is None:
        raise UpstreamError(Failure.MALFORMED, "The provider's answer has no message.", status=200)
    if "response_format" in chat.body and not chat.has_tools:  # beside tools some platforms know no JSON mode
        return with_json(completion, chat)
    return completion


def loaded(raw: bytes) -> Any:
    try:
        return load_lenient(raw)
    except ValueError:
        raise UpstreamError(Failure.MALFORMED, "The provider's answer is not JSON.", status=200) from None


def checked_answer(body: Any, route: Route) -> dict[str, Any]:
    """A 200's JSON, unless it is an error after all."""
    if isinstance(body, list) and body and isinstance(body[0], dict) and "error" in body[0]:
        body = body[0]
    if not isinstance(body, dict):
        raise UpstreamError(Failure.MALFORMED, "The provider's answer is not a JSON object.", status=200)
    if fault := faults.wrapped(body, route.model.quirks):
        raise failure_inside(fault, body, route)
    return body


class Opening:
    """The time between a stream's headers and its first meaningful event, in which it can still be swapped."""

    def __init__(self, timeouts: Timeouts, limit: Limit, first_token_deadline: float) -> None:
        self._timeouts = timeouts
        self._limit = limit
        self._deadline = first_token_deadline
        self._clock = asyncio.get_running_loop().time

    async def reply(self, response: Response, adapter: Adapter, chat: Chat, route: Route) -> Reply:
        tally, content = Tally(), response.content
        is_sse = response.content_type == "text/event-stream"
        incoming = Incoming(adapter.translator(tally, chat), tally, route, is_sse=is_sse)
        held: list[Event] = []
        held_bytes = 0
        while True:
            data = await self._read(content)
            if not incoming.bytes_seen and data.lstrip()[:1] in (b"{", b"["):  # not a stream, whatever was asked
                return whole_reply(await read_body(content, data), adapter, chat, route)
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

    async def _read(self, content: Body) -> bytes:
        now = self._clock()
        if now >= self._deadline:  # a provider that never pauses would never let the timer run
            raise TimeoutError
        self._limit.set(min(now + self._timeouts.stall_s, self._deadline))
        return await content.readany()

    @staticmethod
    def _cut(tally: Tally, chat: Chat, route: Route) -> UpstreamError | None:
        if not tally.has_text and not tally.has_tool_calls and cut_short(tally, chat, route.model):
            return UpstreamError(Failure.TRUNCATED, "The provider cut the answer off before its first word.")
        return None


DEMO_WORDS = (
    "This is Freeway's built-in demo model, not a language model: no provider key is configured yet, so the gateway "
    "wrote this answer itself. It shows that your client, its key and streaming work. Add a provider's key on the "
    "dashboard, and the same request will be answered by a real model."
)


def demo_reply(chat: Chat) -> Reply:
    """An answer made in-process, so that the first request works without a key and without a network."""
    words = DEMO_WORDS.split(" ")
    usage = {"prompt_tokens": chat.prompt_tokens, "completion_tokens": len(words)}
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    head = {"id": f"chatcmpl-demo-{time.time_ns():x}", "created": int(time.time()), "model": "demo"}
    message = {"role": "assistant", "content": DEMO_WORDS}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    body = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
    tally = Tally()
    note_completion(body, tally)
    if not chat.stream:
        return Reply(tally, completion=Completion(dump(body), body))
    head["object"] = "chat.completion.chunk"
    deltas: list[dict[str, Any]] = [{"content": word if index == 0 else f" {word}"} for index, word in enumerate(words)]
    deltas[0]["role"] = "assistant"
    chunks = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    return Reply(tally, first=[Event(frame(chunk), chunk) for chunk in chunks])
