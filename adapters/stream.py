"""A provider's answer from bytes to events or one completion: decoded once, checked, counted. No I/O."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from msgspec import field

from adapters.answers import note, note_completion, note_plain
from adapters.base import Adapter, Reply, Translator
from adapters.chunks import as_chunks, completed, joined
from adapters.embeddings import embedding_reply
from adapters.errors import Fault, read, redact, wrapped
from adapters.openai import with_json
from adapters.shapes import answer_within, unreadable
from adapters.waits import retry_after_s
from protection import Failure, UpstreamError, classify
from routing.catalog import Model
from routing.day import until_reset_s
from routing.route import Route
from wire.chat import Chat, Completion, Event, ModelKind, Tally, frame
from wire.jsontext import BOM, dump, load_lenient, load_mended
from wire.sse import EventTooLarge, Frame, SSEDecoder
from wire.unshown import Unshown

STREAM_BYTES_MAX = 256 * 1024 * 1024  # of one stream; 128,000 tokens in chunks of 1 KB are half of it
# In data that cannot be read: part of an answer, neither a heartbeat nor the head of a chunk alone (SPEC 6.6).
ANSWERS = re.compile(rb"""(?:choices|candidates)['"].*['"](?:content|tool_calls|text|parts)['"]""", re.DOTALL)
MORE_DATA = re.compile(rb"\A(?:data:\s*)+")
AFTER_FINISH_S = 5.0  # of silence behind a finish reason, and it is believed (SPEC 8.9)
AFTER_FINISH_BEFORE_CALL_S = 15.0  # where a tool call may still come: some servers say `stop` seconds before it


class Incoming(Unshown):
    """One provider's stream on its way from bytes to events: decoded once, checked, counted.

    Whoever reads the connection feeds it, and flushes it at the end of the body, or when it has been silent for
    `silence_s` behind a finish reason.
    """

    _translator: Translator
    _tally: Tally
    _route: Route
    _utc: float
    is_sse: bool  # by its own words
    done: bool = False  # [DONE] has been seen
    error: UpstreamError | None = None  # found behind the events that `feed` returned
    bytes_seen: int = 0
    progressed: bool = False  # the last bytes said something, even if it is held back
    _flushing: bool = False  # nothing more will come: what is cut off is no more than that
    _held_chars: int = 0  # how much of calls the translator had held back when that was last looked at
    _decoder: SSEDecoder = field(default_factory=SSEDecoder)

    @property
    def finishing(self) -> bool:
        """Whether a finish reason has come, after which nothing more has to."""
        return self._translator.finishing

    @property
    def holding(self) -> bool:
        """Whether a tool call is being held back: nothing of it has been sent, but the model has begun to answer."""
        return self._translator.holding

    @property
    def silence_s(self) -> float:
        """How long a stream may be silent behind its finish reason before that is believed."""
        return AFTER_FINISH_BEFORE_CALL_S if self._translator.expects_calls else AFTER_FINISH_S

    def feed(self, data: bytes) -> tuple[list[Event], bool]:
        """The events in these bytes, and whether one of them may open the answer."""
        if self.error is not None:
            return [], False
        self.bytes_seen += len(data)
        if self.bytes_seen > STREAM_BYTES_MAX:
            self.error = UpstreamError(Failure.MALFORMED, f"The answer is larger than {STREAM_BYTES_MAX} bytes.")
            return [], False
        try:
            return self._counted(self._decoder.feed(data))
        except EventTooLarge:
            return self._too_large()

    def flush(self) -> tuple[list[Event], bool]:
        """The rest, where nothing more will come."""
        self._flushing = True
        try:
            events, meaningful = self._counted(self._decoder.flush())
        except EventTooLarge:
            return self._too_large()
        if self.finishing and not self.done and self.error is None:
            meaningful |= self._take(self._translator.end, events)
        return events, meaningful

    def _too_large(self) -> tuple[list[Event], bool]:
        self.error = UpstreamError(Failure.MALFORMED, "The provider sent an event larger than 1 MiB.")
        return [], False

    def _counted(self, frames: list[Frame]) -> tuple[list[Event], bool]:
        events, meaningful = self._events(frames)
        self.progressed = meaningful
        if not meaningful and self._translator.held_chars > self._held_chars:
            self.progressed, self._held_chars = True, self._translator.held_chars
        return events, meaningful

    def _events(self, frames: list[Frame]) -> tuple[list[Event], bool]:
        events: list[Event] = []
        meaningful = False
        tally, translator = self._tally, self._translator
        recognised = translator.recognised
        fault: Fault | None
        for raw, payload, is_error in frames:
            if payload == b"[DONE]" and not is_error:
                self.done = True
                meaningful |= self._take(translator.end, events)
                break
            if not is_error and (plain := recognised(raw, payload)) is not None:
                for event in plain:
                    meaningful |= note(event, tally)
                    events.append(event)
                continue
            chunk = decoded(payload)
            if chunk is None and not is_error and (inner := mended_frames(payload)) is not None:
                more, opens = self._events(inner)
                events, meaningful = events + more, meaningful or opens
                if self.error or self.done:
                    break
                continue
            moved = type(chunk) is list and len(chunk) == 1
            if moved:
                chunk = chunk[0]
            if type(chunk) is dict and (inner_chunk := answer_within(chunk)) is not None:
                chunk, moved = inner_chunk, True
            if is_error:
                fault = read(chunk if chunk is not None else said(payload), self._route.model.quirks)
            elif type(chunk) is not dict:
                tally.malformed += 1
                if ANSWERS.search(payload) and not self._flushing:  # text would be missing, or a call
                    self.error = unreadable()
                    break
                continue
            else:
                fault = wrapped(chunk, self._route.model.quirks)
            if fault:
                self.error = failure_inside(fault, chunk, self._route, self._utc)
                break
            meaningful |= self._take(partial(translator.feed, frame(chunk) if moved else raw, payload, chunk), events)
            if self.error:
                break
        return events, meaningful

    def _take(self, translated: Callable[[], list[Event]], events: list[Event]) -> bool:
        """Count and keep what the translator makes; True when it may open the answer."""
        meaningful = False
        try:
            for event in translated():
                meaningful |= note(event, self._tally)
                events.append(event)
        except UpstreamError as error:
            self.error = error
        return meaningful

    def ending(self) -> UpstreamError | None:
        """What is wrong with a stream that ends here, if anything."""
        tally = self._tally
        if not self.done and tally.finish is None:
            if not tally.head and not self.holding and (self.bytes_seen or not self.is_sse):
                return UpstreamError(
                    Failure.MALFORMED, "The provider's answer is neither JSON nor a stream.", status=200
                )
            return UpstreamError(Failure.TRUNCATED, "The provider's stream ended before the answer did.")
        if tally.empty:
            return empty_answer()
        return None


def empty_answer() -> UpstreamError:
    return UpstreamError(Failure.EMPTY, "The provider's answer was empty.", status=200)


def mended_frames(payload: bytes) -> list[Frame] | None:
    """The events that data which are no JSON were meant as: one on each line, a second `data:` within, JSON with odd
    values. None where there is no more to be made of them."""
    if b"\n" in payload:
        lines = [line.removeprefix(b"data:").strip() for line in payload.split(b"\n")]
        lines = [line for line in lines if line]
        if all(line == b"[DONE]" or line[:1] == b"{" for line in lines):
            return [framed(line) for line in lines]
    if payload[:5] == b"data:":
        return [framed(MORE_DATA.sub(b"", payload, count=1))]
    if payload[:1] != b"{":
        return None
    try:
        return [framed(dump(load_mended(payload)))]
    except ValueError:
        return None


def framed(data: bytes) -> Frame:
    return b"data: %b\n\n" % data, data, False


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
    if tally.finish != "length":
        return False
    asked = None if chat.max_tokens is None else min(chat.max_tokens, model.answer_max(chat.prompt_tokens))
    limits = [limit for limit in (asked, model.max_output) if limit is not None]
    return bool(limits) and all(tally.output_tokens() * 2 < limit for limit in limits)


def said_instead(raw: bytes) -> object:
    """An error's body: JSON, an event of a stream, words, or nothing worth reading."""
    try:
        return load_lenient(raw.removeprefix(BOM))
    except ValueError:
        pass
    if raw.lstrip()[:6] in (b"data: ", b"event:") or raw.lstrip()[:5] == b"data:":
        decoder = SSEDecoder()
        payload = next((data for _, data, _ in decoder.feed(raw) + decoder.flush() if data), b"")
        return decoded(payload) or said(payload)
    return said(raw)


def said(raw: bytes) -> str | None:
    """The words of a body that is no JSON; None for a page, or nothing."""
    words = raw[:300].decode(errors="replace").strip()
    return None if not words or words.startswith("<") else words


def refusal(status: int, headers: Mapping[str, str], body: object, route: Route, utc: float) -> UpstreamError:
    """The failure that a status other than 2xx means."""
    fault = read(body, route.model.quirks)
    return named_failure(status, fault, headers, body, route, utc)


def whole_reply(raw: bytes, adapter: Adapter, chat: Chat, route: Route, utc: float) -> Reply:
    """A committed answer from a whole body."""
    if chat.need.kind is ModelKind.EMBEDDING:
        return embedding_reply(checked_answer(loaded(raw), route, utc), chat, route.model)
    tally = Tally()
    if (plain := adapter.plain_answer(raw, chat)) is not None and note_plain(plain, tally):
        completion = Completion(raw, raw)
    else:
        tally, completion = looked_at(raw, adapter, chat, route, utc)
    if not chat.stream:
        return Reply(tally, completion=completion)
    return Reply(tally, first=[Event(frame(chunk), chunk) for chunk in as_chunks(completion.body)])


def looked_at(raw: bytes, adapter: Adapter, chat: Chat, route: Route, utc: float) -> tuple[Tally, Completion]:
    """A whole body in any form. Raises UpstreamError."""
    try:
        body = load_lenient(raw.removeprefix(BOM))
    except ValueError:
        raw, body = mended_body(raw)
    if body is None:
        return joined_stream(raw, adapter, chat, route, utc)
    tally, completion = Tally(), whole_completion(raw, body, adapter, chat, route, utc)
    note_completion(completion.body, tally)
    if tally.empty:
        raise empty_answer()
    return tally, completion


def mended_body(raw: bytes) -> tuple[bytes, Any]:
    """A body that is no JSON as it stands: as JSON, and what it says; None where it must be something else."""
    try:
        value = load_mended(raw.removeprefix(BOM).strip())
    except ValueError:
        return raw, None
    return dump(value), value


def whole_completion(raw: bytes, body: Any, adapter: Adapter, chat: Chat, route: Route, utc: float) -> Completion:
    checked = checked_answer(body, route, utc)
    completion = adapter.completion(raw if checked is body else dump(checked), checked, chat)
    if completion is None:
        raise UpstreamError(Failure.MALFORMED, "The provider's answer has no message.", status=200)
    return finished(completion, chat, route, utc)


def joined_stream(raw: bytes, adapter: Adapter, chat: Chat, route: Route, utc: float) -> tuple[Tally, Completion]:
    """A body that is no JSON: some servers stream to those who did not ask for it. Raises UpstreamError."""
    tally = Tally()
    incoming = Incoming(adapter.translator(tally, chat), tally, route, utc, is_sse=False)
    events, _ = incoming.feed(raw)
    if not (incoming.done or incoming.error):
        events += incoming.flush()[0]
    if error := incoming.error or incoming.ending():
        raise error
    body = joined((event.chunk for event in events), tally.usage_object)
    return tally, finished(Completion(dump(body), body), chat, route, utc)


def finished(completion: Completion, chat: Chat, route: Route, utc: float) -> Completion:
    """A whole answer as it goes out: complete, and JSON where JSON was asked for. Raises UpstreamError."""
    completion = completed(completion, route.model.model_id, utc)
    if "response_format" in chat.body and not chat.need.tools:  # beside tools some platforms know no JSON mode
        return with_json(completion, chat)
    return completion


def loaded(raw: bytes) -> Any:
    try:
        return load_lenient(raw.removeprefix(BOM))
    except ValueError:
        raise UpstreamError(Failure.MALFORMED, "The provider's answer is not JSON.", status=200) from None


def checked_answer(body: Any, route: Route, utc: float) -> dict[str, Any]:
    """A 200's JSON, unless it is an error after all."""
    if isinstance(body, list) and body and isinstance(body[0], dict) and (len(body) == 1 or "error" in body[0]):
        body = body[0]
    if not isinstance(body, dict):
        raise UpstreamError(Failure.MALFORMED, "The provider's answer is not a JSON object.", status=200)
    if fault := wrapped(body, route.model.quirks):
        raise failure_inside(fault, body, route, utc)
    return answer_within(body) or body
