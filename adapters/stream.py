"""A provider's answer from bytes to events or one completion: decoded once, checked, counted. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from adapters.base import Adapter, Reply, Translator, as_chunks
from adapters.embeddings import embedding_reply
from adapters.errors import Fault, read, redact, retry_after_s, wrapped
from adapters.openai import with_json
from adapters.plain import Surroundings, note, note_completion, note_plain, text_chunk, well_formed
from protection import Failure, UpstreamError, classify
from routing.catalog import Model
from routing.day import until_reset_s
from routing.route import Route
from wire.chat import Chat, Completion, Event, ModelKind, Tally, frame
from wire.jsontext import load_lenient
from wire.sse import EventTooLarge, SSEDecoder

STREAM_BYTES_MAX = 256 * 1024 * 1024  # of one stream; 128,000 tokens in chunks of 1 KB are half of it


class Incoming:
    """One provider's stream on its way from bytes to events: decoded once, checked, counted."""

    def __init__(self, translator: Translator, tally: Tally, route: Route, utc: float, *, is_sse: bool) -> None:
        self._is_sse = is_sse  # by its own words
        self.done = False  # [DONE] has been seen
        self.error: UpstreamError | None = None  # found behind the events that `feed` returned
        self.bytes_seen = 0
        self._decoder = SSEDecoder()
        self._surroundings = Surroundings()
        self._translator = translator
        self._tally = tally
        self._route = route
        self._utc = utc

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
            if fault := wrapped(chunk, self._route.model.quirks):
                self.error = failure_inside(fault, chunk, self._route, self._utc)
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


def empty_answer() -> UpstreamError:
    return UpstreamError(Failure.EMPTY, "The provider's answer was empty.", status=200)


def decoded(payload: bytes) -> Any:
    """An event's JSON; None for what is none."""
    try:
        return load_lenient(payload)
    except ValueError:
        return None


def failure_inside(fault: Fault, body: object, route: Route, utc: float) -> UpstreamError:
    """The failure that a 200 carried."""
    status = fault.status if fault.status is not None and fault.status >= 300 else 200
    return named_failure(status, fault, {}, body, route, utc)


def named_failure(
    status: int, fault: Fault, headers: Mapping[str, str], body: object, route: Route, utc: float
) -> UpstreamError:
    quirks, reset = route.model.quirks, route.model.platform.daily_reset
    if fault.sure and fault.status is not None:
        status = fault.status
    failure = classify(status, fault.code, fault.message)
    rest_s = retry_after_s(fault, headers, body, utc, quirks, reset)
    if failure is Failure.OUT_OF_CREDIT and rest_s is None and quirks.get("credit_resets_daily"):
        rest_s = until_reset_s(reset, utc)
    return UpstreamError(
        failure,
        redact(fault.message, route.key.secret) or f"HTTP {status}",
        status=status,
        code=redact(fault.code, route.key.secret) if fault.code else None,
        retry_after_s=rest_s,
    )


def cut_short(tally: Tally, chat: Chat, model: Model) -> bool:
    """Whether an answer that ended for length stopped far below every length that was allowed (SPEC 7.8)."""
    asked = None if chat.max_tokens is None else min(chat.max_tokens, model.answer_max(chat.prompt_tokens))
    limits = [limit for limit in (asked, model.max_output) if limit is not None]
    return tally.finish == "length" and bool(limits) and all(tally.output_tokens() * 2 < limit for limit in limits)


def said_instead(raw: bytes) -> object:
    """An error's body: JSON, words, or nothing worth reading."""
    try:
        return load_lenient(raw)
    except ValueError:
        words = raw[:300].decode(errors="replace").strip()
        return None if not words or words.startswith("<") else words


def refusal(status: int, headers: Mapping[str, str], body: object, route: Route, utc: float) -> UpstreamError:
    """The failure that a status other than 2xx means."""
    fault = read(body, route.model.quirks)
    return named_failure(status, fault, headers, body, route, utc)


def whole_reply(raw: bytes, adapter: Adapter, chat: Chat, route: Route, utc: float) -> Reply:
    """A committed answer from a whole body."""
    tally, body = Tally(), loaded(raw)
    if chat.need.kind is ModelKind.EMBEDDING:
        return embedding_reply(checked_answer(body, route, utc), chat, route.model)
    if (text := adapter.plain_answer(body, chat)) is not None:
        completion = Completion(raw, body)
        note_plain(body, text, tally)
    else:
        completion = whole_completion(raw, body, adapter, chat, route, utc)
        note_completion(completion.body, tally)
        if tally.empty:
            raise empty_answer()
    if not chat.stream:
        return Reply(tally, completion=completion)
    return Reply(tally, first=[Event(frame(chunk), chunk) for chunk in as_chunks(completion.body)])


def whole_completion(raw: bytes, body: Any, adapter: Adapter, chat: Chat, route: Route, utc: float) -> Completion:
    checked = checked_answer(body, route, utc)
    completion = adapter.completion(raw, checked, chat)
    if completion is None:
        raise UpstreamError(Failure.MALFORMED, "The provider's answer has no message.", status=200)
    if "response_format" in chat.body and not chat.need.tools:  # beside tools some platforms know no JSON mode
        return with_json(completion, chat)
    return completion


def loaded(raw: bytes) -> Any:
    try:
        return load_lenient(raw)
    except ValueError:
        raise UpstreamError(Failure.MALFORMED, "The provider's answer is not JSON.", status=200) from None


def checked_answer(body: Any, route: Route, utc: float) -> dict[str, Any]:
    """A 200's JSON, unless it is an error after all."""
    if isinstance(body, list) and body and isinstance(body[0], dict) and "error" in body[0]:
        body = body[0]
    if not isinstance(body, dict):
        raise UpstreamError(Failure.MALFORMED, "The provider's answer is not a JSON object.", status=200)
    if fault := wrapped(body, route.model.quirks):
        raise failure_inside(fault, body, route, utc)
    return body
