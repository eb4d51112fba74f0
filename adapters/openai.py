"""The OpenAI-shaped wire: a `Chat` out to a platform, its answers back in one form.

outgoing.py writes the body of a request, calls.py mends the tool calls of an answer. No platform is named here. No I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from adapters.base import Request, base_url, bearer_headers, piece_of
from adapters.embeddings import embedding_request
from adapters.legacy import legacy_request, takes_prompts, told_in_chat, told_in_chat_whole
from adapters.plain import plain_answer, plain_text, well_formed_answer
from adapters.quirks import outgoing
from adapters.text_rescue import TextGate, Unreadable, declared_tools, found_json, split_thoughts, whole
from adapters.tool_calls import StreamedCalls, called, lost_turn, mend_whole_calls
from protection import Failure, UpstreamError
from routing.catalog import Key, Model
from wire.chat import Chat, Completion, Event, ModelKind, Tally, frame
from wire.http import ENDPOINTS_MAX, Endpoint
from wire.jsontext import JSON, dump

FINISH_REASONS = {
    "eos": "stop", "eos_token": "stop", "end_turn": "stop", "stop_sequence": "stop", "COMPLETE": "stop",
    "tool_use": "tool_calls", "model_length": "length", "max_tokens": "length", "MAX_TOKENS": "length",
    "sensitive": "content_filter", "safety": "content_filter",
}  # fmt: skip


@lru_cache(maxsize=ENDPOINTS_MAX)
def endpoint(model: Model, key: Key) -> Endpoint:
    """Where this model is asked with this key. A new snapshot has new models."""
    url, secret = base_url(model.platform, key)
    return Endpoint(f"{url}/chat/completions", bearer_headers(secret, model.quirks))


class OpenAIAdapter:
    """POST {base_url}/chat/completions."""

    def reply_here(self, chat: Chat) -> None:
        return None

    def request(self, model: Model, key: Key, chat: Chat) -> Request:
        if chat.need.kind is ModelKind.EMBEDDING:
            return embedding_request(model, key, chat)
        if takes_prompts(model, chat):
            return legacy_request(model, key, chat)
        return Request(endpoint(model, key), dump(outgoing(model, chat)))

    def headers(self, secret: str, quirks: Mapping[str, Any]) -> dict[str, str]:
        return bearer_headers(secret, quirks)

    def plain_answer(self, body: Any, chat: Chat) -> str | None:
        return None if chat.need.tools or "response_format" in chat.body else plain_answer(body)

    def completion(self, raw: bytes, body: JSON, chat: Chat) -> Completion | None:
        if body.get("choices", body) in ([], None):
            raise UpstreamError(Failure.EMPTY, "The provider's answer was empty.", status=200)
        changed = chat.legacy is not None and told_in_chat_whole(body)
        if not well_formed_answer(body):
            return None
        return Completion(dump(body) if mend_completion(body, chat) or changed else raw, body)

    def translator(self, tally: Tally, chat: Chat) -> ChunkMender:
        return ChunkMender(tally, chat)


def mend_completion(body: JSON, chat: Chat) -> bool:
    """Bring a whole answer into the one form; True when something had to change. Raises UpstreamError."""
    changed = False
    for choice in body["choices"]:
        message = choice.get("message")
        if not isinstance(message, dict):
            continue
        changed |= mend_text(message)
        changed |= mend_whole_text(message, body, chat)
        calls = message.get("tool_calls")
        if isinstance(calls, list) and calls:
            changed |= mend_whole_calls(calls, body, chat, cut=choice.get("finish_reason") == "length")
        changed |= mend_finish(choice, has_calls=bool(calls))
        if not calls and not message.get("content") and choice.get("finish_reason") == "stop":
            thoughts = message.get("reasoning_content")
            if isinstance(thoughts, str) and thoughts.strip():  # the whole answer, in the wrong field
                message["content"], changed = thoughts, True
    return changed


def mend_whole_text(message: JSON, answer: JSON, chat: Chat) -> bool:
    """Thoughts in tags go where thoughts belong, and calls written as text become calls."""
    text = message.get("content")
    if not isinstance(text, str) or not text:
        return False
    thoughts, rest = split_thoughts(text)
    if thoughts is not None:
        message["content"] = rest
        if thoughts:
            message["reasoning_content"] = thoughts
    if not chat.need.tools or message.get("tool_calls"):
        return thoughts is not None
    try:
        rescued = whole(rest, declared_tools(chat.body))
    except Unreadable:
        raise lost_turn() from None
    if rescued is None:
        return thoughts is not None
    message["content"], calls = rescued[0] or None, rescued[1]
    message["tool_calls"] = [called(answer, place, *call) for place, call in enumerate(calls)]
    return True


def with_json(completion: Completion, chat: Chat) -> Completion:
    """The answer with nothing but JSON in it, where JSON was asked for. Raises UpstreamError for one without: another
    model may do better. One that was cut off stands: with the client's limit the others would be cut off too."""
    choice = completion.body["choices"][0]
    text = choice["message"].get("content")
    if not text or not isinstance(text, str) or choice.get("finish_reason") != "stop":
        return completion
    found = found_json(text)
    if found is None:
        raise UpstreamError(Failure.MALFORMED, "The answer is not the JSON that was asked for.", status=200)
    if found is text:
        return completion
    choice["message"]["content"] = found
    return Completion(dump(completion.body), completion.body)


def failed_generation(body: object, chat: Chat) -> bytes | None:
    """The answer that a server refused to pass on because its own parser failed, if ours can read it."""
    error = body.get("error") if isinstance(body, dict) else None
    text = error.get("failed_generation") if isinstance(error, dict) else None
    if not isinstance(text, str) or not chat.need.tools:
        return None
    try:
        rescued = whole(text, declared_tools(chat.body))
    except Unreadable:
        return None
    message = {"role": "assistant", "content": text}
    answer = {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    return dump(answer) if rescued else None


def mend_text(message: JSON) -> bool:
    """Reasoning under one name, and content as text."""
    changed = False
    content = message.get("content")
    if isinstance(content, list):  # segments of text and thinking
        thoughts = [part["thinking"] for part in content if "thinking" in part]
        message["content"] = joined_text(content)
        if thoughts:
            message["reasoning_content"] = "".join(t if isinstance(t, str) else joined_text(t) for t in thoughts)
        changed = True
    if "reasoning" in message and isinstance(message["reasoning"], str):
        reasoning = message.pop("reasoning")
        message.setdefault("reasoning_content", reasoning)
        changed = True
    return changed


def joined_text(segments: object) -> str:
    """The text of an answer's segments, which are pieces of one text."""
    parts = segments if isinstance(segments, list) else []
    return "".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def mend_finish(choice: JSON, *, has_calls: bool) -> bool:
    """The ending by its one name; for a whole answer that gives none, the one it must have had."""
    finish = choice.get("finish_reason")
    if (not finish or finish == "stop") and has_calls:
        choice["finish_reason"] = "tool_calls"
    elif not finish:
        choice["finish_reason"] = "stop"
    elif finish in FINISH_REASONS:
        choice["finish_reason"] = FINISH_REASONS[finish]
    else:
        return False
    return True


class ChunkMender:
    """Brings one stream's chunks into the one form. A chunk that needs no change keeps the bytes it came in."""

    def __init__(self, tally: Tally, chat: Chat) -> None:
        self._tally = tally
        self._chat = chat
        self._calls = StreamedCalls(chat)
        tools = declared_tools(chat.body) if chat.need.tools else {}
        self._has_tools = bool(tools)
        self._gate: TextGate | None = TextGate(tools)  # until it is open
        self._held: list[Event] = []  # what the gate holds back, as it came

    @property
    def plain_text(self) -> Callable[[Any], str | None] | None:
        if self._gate is None:
            return plain_text
        return None if self._has_tools else self._first_text

    def feed(self, raw: bytes, chunk: JSON) -> list[Event]:
        choices = chunk.get("choices")
        usage = chunk.get("usage")
        changed = False
        if usage:
            self._tally.note_usage(usage)
        if not choices:  # usage goes out once and last; anything else here would only break clients
            if usage:
                self._tally.usage_raw = raw if choices == [] else None
            return []
        choice = choices[0]
        if usage:
            del chunk["usage"]
            changed = True
        if self._chat.legacy is not None:
            changed |= told_in_chat(choice, "delta")
        delta = choice.get("delta")
        if delta is None:  # clients look into it unasked
            delta = choice["delta"] = {}
            changed = True
        if delta:
            if "reasoning" in delta or type(delta.get("content")) is list:
                changed |= mend_text(delta)
            if delta.get("tool_calls"):
                changed |= self._calls.mend(delta["tool_calls"], chunk)
        if choice.get("finish_reason"):
            changed |= self._finish(chunk, choice, delta)
        elif choice.get("finish_reason") == "":
            choice["finish_reason"], changed = None, True
        event = Event(frame(chunk) if changed else raw, chunk)
        return [event] if self._gate is None else self._through_gate(event, choice)

    def end(self) -> list[Event]:
        """At the end marker: what is still held back goes out, finish reason or not."""
        events = [] if self._gate is None else self._settle(self._tally.head)
        if rest := self._calls.rest(cut=self._tally.finish == "length"):
            events.append(piece_of(self._tally.head, {"tool_calls": rest}))
        return events

    def _finish(self, chunk: JSON, choice: JSON, delta: JSON) -> bool:
        """A finish reason by its one name and once; with it goes out what its calls still lack."""
        for name, vendor in chunk.items():  # some tell usage in an object of their own: x_vendor.usage
            if name.startswith("x_") and isinstance(vendor, dict):
                self._tally.note_usage(vendor.get("usage"))
        if self._tally.finish is not None:
            choice["finish_reason"] = None
            return True
        changed = mend_finish(choice, has_calls=bool(self._calls))
        if rest := self._calls.rest(cut=choice["finish_reason"] == "length"):
            delta["tool_calls"] = [*(delta.get("tool_calls") or ()), *rest]
            changed = True
        return changed

    def _through_gate(self, event: Event, choice: JSON) -> list[Event]:
        """The first words pass the gate, until it is open. Raises UpstreamError."""
        gate, delta = self._gate, choice.get("delta") or {}
        assert gate is not None
        text = delta.get("content")
        more = choice.get("finish_reason") or delta.get("tool_calls")
        events: list[Event] = []
        if text and isinstance(text, str):
            self._held.append(event)
            pieces = gate.feed(text)
            if gate.open and gate.untouched:
                self._gate = None
                return self._released()
            if more:  # only the text waits
                self._held[-1] = piece_of(event.chunk, {"content": delta.pop("content")})
                event = Event(frame(event.chunk), event.chunk)
            events = self._rewritten(event.chunk, pieces, role=delta.get("role"))
            if gate.open:
                self._gate = None
                self._held.clear()
            if not more:
                return events
        if more:
            events += self._settle(event.chunk) if self._gate is not None else []
            if choice.get("finish_reason") and mend_finish(choice, has_calls=bool(self._calls)):
                event = Event(frame(event.chunk), event.chunk)
        return [*events, event]

    def _settle(self, like: JSON) -> list[Event]:
        """No more text will come: what is held back becomes text, thoughts or calls."""
        gate = self._gate
        assert gate is not None
        self._gate = None
        try:
            pieces, calls = gate.finish()
        except Unreadable:
            if not self._tally.has_text:
                raise lost_turn() from None
            return self._released()  # the client has thoughts already: then it gets all there is
        if gate.untouched:
            return self._released()
        self._held.clear()
        events = self._rewritten(like, pieces)
        for name, arguments in calls:
            events.append(piece_of(like, {"tool_calls": [self._calls.add(name, arguments, like)]}))
        return events

    def _first_text(self, chunk: Any) -> str | None:
        """Where no tools are declared, only an answer that begins with a tag is not what it seems."""
        text = plain_text(chunk)
        if text:
            if self._held or text[0] == "<" or text[0].isspace():
                return None
            self._gate = None
        return text

    def _released(self) -> list[Event]:
        events, self._held = self._held, []
        return events

    def _rewritten(self, like: JSON, pieces: list[tuple[str, str]], role: str | None = None) -> list[Event]:
        deltas: list[JSON] = [{field: text} for field, text in pieces]
        if deltas and role:
            deltas[0] = {"role": role, **deltas[0]}
        return [piece_of(like, delta) for delta in deltas]
