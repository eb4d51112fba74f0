"""The OpenAI-shaped wire: a `Chat` out to a platform, its answers back in one form.

outgoing.py writes the body of a request, calls.py mends the tool calls of an answer. No platform is named here. No I/O.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import orjson

from calls import StreamedCalls, called, lost_turn, mend_whole_calls
from catalog import Key, Model, Platform
from outgoing import outgoing
from protection import Failure, UpstreamError
from rescue import TextGate, Unreadable, declared_tools, found_json, split_thoughts, whole
from wire import EVENT_BYTES_MAX, Chat, Completion, Event, Tally, chunk_of, dump, frame, load_inner

JSON = dict[str, Any]
USER_AGENT = "freeway/0.1"  # some edges refuse a client without a name of its own
ENDPOINTS_MAX = 1024  # pairs of model and key in use lately
FINISH_REASONS = {
    "eos": "stop", "eos_token": "stop", "end_turn": "stop", "stop_sequence": "stop", "COMPLETE": "stop",
    "tool_use": "tool_calls", "model_length": "length", "max_tokens": "length", "MAX_TOKENS": "length",
    "sensitive": "content_filter", "safety": "content_filter",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Endpoint:
    """Where a platform is called, and with which headers; what is found out for it is kept by its identity."""

    url: str
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Request:
    """One question to a provider."""

    endpoint: Endpoint
    body: bytes


def base_url(platform: Platform, key: Key) -> tuple[str, str]:
    """The platform's address and the credential to send, with `{account_id}` taken from an `account_id:token` key."""
    url, secret = platform.base_url, key.secret
    if "{" in url:
        account, _, secret = secret.partition(":")
        url = re.sub(r"\{\w+\}", account, url)
    return url, secret or platform.quirks.get("anonymous_key", "")


def call_headers(credential: dict[str, str], quirks: Mapping[str, Any]) -> dict[str, str]:
    """Of every call to a platform."""
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": USER_AGENT}
    return {**headers, **credential, **quirks.get("headers", {})}


def bearer_headers(secret: str, quirks: Mapping[str, Any]) -> dict[str, str]:
    return call_headers({"Authorization": f"Bearer {secret}"} if secret else {}, quirks)


@lru_cache(maxsize=ENDPOINTS_MAX)
def endpoint(model: Model, key: Key) -> Endpoint:
    """Where this model is asked with this key. A new snapshot has new models."""
    url, secret = base_url(model.platform, key)
    return Endpoint(f"{url}/chat/completions", bearer_headers(secret, model.quirks))


class OpenAIAdapter:
    """POST {base_url}/chat/completions."""

    def request(self, model: Model, key: Key, chat: Chat) -> Request:
        return Request(endpoint(model, key), dump(outgoing(model, chat)))

    def headers(self, secret: str, quirks: Mapping[str, Any]) -> dict[str, str]:
        return bearer_headers(secret, quirks)

    def plain_answer(self, body: Any, chat: Chat) -> str | None:
        return None if chat.has_tools or "response_format" in chat.body else plain_answer(body)

    def completion(self, raw: bytes, body: JSON, chat: Chat) -> Completion | None:
        if body.get("choices", body) in ([], None):
            raise UpstreamError(Failure.EMPTY, "The provider's answer was empty.", status=200)
        if not well_formed_answer(body):
            return None
        return Completion(dump(body) if mend_completion(body, chat) else raw, body)

    def translator(self, tally: Tally, chat: Chat) -> ChunkMender:
        return ChunkMender(tally, chat)


PLAIN_CHUNK = frozenset({"id", "object", "created", "model", "system_fingerprint", "service_tier", "choices", "usage"})
PLAIN_CHOICE = frozenset({"index", "delta", "finish_reason", "logprobs"})
PLAIN_DELTA = frozenset({"content", "role", "refusal"})
PLAIN_WHOLE_CHOICE = frozenset({"index", "message", "finish_reason", "logprobs"})
PLAIN_MESSAGE = frozenset({"content", "role", "refusal", "annotations"})
LESSONS_MAX = 5  # in one stream; where each chunk has its own surroundings they would cost more than they save
CONTENT_NAME = b'"content"'
JSON_TEXT = re.compile(rb'"(?:[^"\\]|\\.)*"')
TEXT_OR_NONE = (str, type(None))  # as tuples, because a union is made anew each time it is written
CONTENT = (str, list, type(None))
ARGUMENTS = (str, dict, type(None))


def plain_text(chunk: Any) -> str | None:
    """The text of a chunk that holds nothing else, perhaps none: most of every stream. None when it needs a look.

    What passes here has no error, no usage and nothing to mend, so that it costs one look instead of four.
    """
    if type(chunk) is not dict or not PLAIN_CHUNK.issuperset(chunk) or chunk.get("usage"):
        return None
    choices = chunk.get("choices")
    if type(choices) is not list or len(choices) != 1:
        return None
    choice = choices[0]
    if type(choice) is not dict or not PLAIN_CHOICE.issuperset(choice) or choice.get("finish_reason") is not None:
        return None
    delta = choice.get("delta")
    if type(delta) is not dict or not PLAIN_DELTA.issuperset(delta) or (len(delta) > 1 and delta.get("refusal")):
        return None
    text = delta.get("content")
    return text if type(text) is str else None


class Surroundings:
    """What stands around the text in one stream's events: byte for byte the same in nearly all of them, and then only
    the text has to be read."""

    __slots__ = ("_after", "_before", "_between", "_lessons")

    def __init__(self) -> None:
        self._before = self._after = b""  # of the text, its quotes included
        self._between = b""  # two texts
        self._lessons = 0

    def text(self, data: bytes) -> str | None:
        """The text of one event or several, all of them whole and with nothing but a text in these surroundings; None
        for anything else."""
        before, after, between = self._before, self._after, self._between
        if not after or not data.startswith(before) or not data.endswith(after):
            return None
        if not len(before) + len(after) <= len(data) <= EVENT_BYTES_MAX:
            return None
        inner = data[len(before) : len(data) - len(after)]
        try:
            texts = orjson.loads(b'["%b"]' % inner.replace(between, b'","'))
        except orjson.JSONDecodeError:
            return None
        return "".join(texts) if len(texts) == inner.count(between) + 1 else None

    def learn(self, raw: bytes, payload: bytes, chunk: JSON) -> None:
        """From an event that is plain text; one that also says its role is no lesson, for that would be forgotten."""
        delta = chunk["choices"][0]["delta"]
        if len(delta) > 1:
            return
        self._lessons += 1
        if self._lessons == 1 or self._lessons > LESSONS_MAX or payload.count(CONTENT_NAME) != 1:
            return  # the first chunk often says more than the others
        found = JSON_TEXT.search(payload, payload.index(CONTENT_NAME) + len(CONTENT_NAME))
        if found is not None and load_inner(found[0].decode(errors="replace")) == delta["content"]:
            lead, _, end = raw.partition(payload)
            self._before = lead + payload[: found.start() + 1]
            self._after = payload[found.end() - 1 :] + end
            self._between = self._after + self._before


def plain_answer(body: Any) -> str | None:
    """The same of a whole answer that has ended by itself."""
    if type(body) is not dict or not PLAIN_CHUNK.issuperset(body):
        return None
    choices = body.get("choices")
    if type(choices) is not list or len(choices) != 1:
        return None
    choice = choices[0]
    if type(choice) is not dict or not PLAIN_WHOLE_CHOICE.issuperset(choice) or choice.get("finish_reason") != "stop":
        return None
    message = choice.get("message")
    if type(message) is not dict or not PLAIN_MESSAGE.issuperset(message) or message.get("refusal"):
        return None
    text = message.get("content")
    if type(text) is not str or text[:1].isspace() or text[:1] in ("", "<") or "</think" in text:
        return None
    return text


def well_formed(chunk: Any) -> bool:
    """Whether a parsed event has the types that reading it relies on."""
    if type(chunk) is not dict:
        return False
    choices = chunk.get("choices")
    if not choices:
        return True
    return type(choices) is list and well_formed_choice(choices[0], "delta")


def well_formed_answer(body: Any) -> bool:
    """The same for a whole answer."""
    if type(body) is not dict or type(body.get("choices")) is not list or not body["choices"]:
        return False
    return all(well_formed_choice(choice, "message") and choice.get("message") for choice in body["choices"])


def well_formed_choice(choice: Any, part: str) -> bool:
    if type(choice) is not dict or not isinstance(choice.get("finish_reason"), TEXT_OR_NONE):
        return False
    message = choice.get(part)
    if not message:
        return message is None or message == {}
    if type(message) is not dict or not isinstance(message.get("content"), CONTENT):
        return False
    if type(message.get("content")) is list and not all(map(well_formed_segment, message["content"])):
        return False
    calls = message.get("tool_calls")
    return not calls or (type(calls) is list and all(map(well_formed_call, calls)))


def well_formed_segment(part: Any) -> bool:
    return type(part) is dict and isinstance(part.get("text", ""), str)


def well_formed_call(call: Any) -> bool:
    if type(call) is not dict or not isinstance(call.get("id"), TEXT_OR_NONE):
        return False
    function = call.get("function")
    if function is None:
        return True
    if type(function) is not dict or not isinstance(function.get("name"), TEXT_OR_NONE):
        return False
    return isinstance(function.get("arguments"), ARGUMENTS)


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
    if not chat.has_tools or message.get("tool_calls"):
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
    if not isinstance(text, str) or not chat.has_tools:
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
        tools = declared_tools(chat.body) if chat.has_tools else {}
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


def piece_of(like: JSON, delta: JSON) -> Event:
    chunk = chunk_of(like, delta)
    return Event(frame(chunk), chunk)


def note(chunk: JSON, tally: Tally) -> bool:
    """Count one chunk; True when it is the kind that may open an answer (SPEC 8.1): text, reasoning, a call, a refusal
    or a filter's stop. `length` alone is not: with nothing said it may be a truncation, which its usage decides.
    """
    choices = chunk.get("choices")
    if not choices:
        return False
    if not tally.head:
        tally.head = chunk
    choice = choices[0]
    return note_part(choice.get("delta"), choice.get("finish_reason"), tally)


def note_completion(body: JSON, tally: Tally) -> None:
    """Count a whole answer."""
    tally.head = body
    tally.note_usage(body.get("usage"))
    choice = body["choices"][0]
    note_part(choice.get("message"), choice.get("finish_reason"), tally)


def note_plain(body: JSON, text: str, tally: Tally) -> None:
    """Count a whole answer that is plain text."""
    tally.head = body
    tally.note_usage(body.get("usage"))
    tally.finish, tally.has_text, tally.text_chars = "stop", True, len(text)


def note_part(part: JSON | None, finish: str | None, tally: Tally) -> bool:
    meaningful = False
    if part:
        for name in ("content", "reasoning_content", "refusal"):
            text = part.get(name)
            if text and type(text) is str:
                tally.text_chars += len(text)
                if tally.has_text or not text.isspace():
                    tally.has_text = meaningful = True
        calls = part.get("tool_calls")
        if calls:
            tally.has_tool_calls = meaningful = True
            for call in calls:
                tally.text_chars += len((call.get("function") or {}).get("arguments") or "")
        elif part.get("function_call"):
            tally.has_tool_calls = meaningful = True
    if finish is not None:
        tally.finish = finish
        meaningful = meaningful or finish == "content_filter"
    return meaningful


def as_chunks(body: JSON) -> list[JSON]:
    """A whole answer as the chunks of a stream, for platforms that do not stream."""
    choice = body["choices"][0]
    delta = {name: value for name, value in (choice.get("message") or {}).items() if value is not None}
    if calls := delta.get("tool_calls"):
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
    return [chunk_of(body, delta), chunk_of(body, {}, choice.get("finish_reason") or "stop")]
