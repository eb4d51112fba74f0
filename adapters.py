"""The OpenAI-shaped wire: a `Chat` out to a platform, its answers back in one form.

An OpenAI-compatible platform is a list of differences, and the list is data: `quirks` in the catalogue. No platform
is named here. No I/O.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from catalog import Key, Model, Platform
from outgoing import outgoing
from protection import Failure, UpstreamError
from rescue import TextGate, Unreadable, declared_tools, mended_arguments, split_thoughts, whole
from wire import Chat, Completion, Event, Tally, dump, frame

JSON = dict[str, Any]
USER_AGENT = "freeway/0.1"  # some edges refuse a client without a name of its own
ENDPOINTS_MAX = 1024  # pairs of model and key in use lately
FINISH_REASONS = {
    "eos": "stop", "eos_token": "stop", "end_turn": "stop", "stop_sequence": "stop", "COMPLETE": "stop",
    "tool_use": "tool_calls", "model_length": "length", "max_tokens": "length", "MAX_TOKENS": "length",
    "sensitive": "content_filter", "safety": "content_filter",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP call to a provider."""

    url: str
    headers: dict[str, str]
    body: bytes


def base_url(platform: Platform, key: Key) -> tuple[str, str]:
    """The platform's address and the credential to send, with `{account_id}` taken from an `account_id:token` key."""
    url, secret = platform.base_url, key.secret
    if "{" in url:
        account, _, secret = secret.partition(":")
        url = re.sub(r"\{\w+\}", account, url)
    return url, secret or platform.quirks.get("anonymous_key", "")


def bearer_headers(secret: str, quirks: Mapping[str, Any]) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": USER_AGENT}
    if secret:
        headers["Authorization"] = f"Bearer {secret}"
    return {**headers, **quirks.get("headers", {})}


@lru_cache(maxsize=ENDPOINTS_MAX)
def endpoint(model: Model, key: Key) -> tuple[str, dict[str, str]]:
    """Where and with which headers this model is asked with this key. A new snapshot has new models."""
    url, secret = base_url(model.platform, key)
    return f"{url}/chat/completions", bearer_headers(secret, model.quirks)


class OpenAIAdapter:
    """POST {base_url}/chat/completions."""

    def request(self, model: Model, key: Key, chat: Chat) -> Request:
        url, headers = endpoint(model, key)
        return Request(url, headers, dump(outgoing(model, chat)))

    def headers(self, secret: str, quirks: Mapping[str, Any]) -> dict[str, str]:
        return bearer_headers(secret, quirks)

    def plain_answer(self, body: Any, chat: Chat) -> str | None:
        return None if chat.has_tools else plain_answer(body)

    def completion(self, raw: bytes, body: JSON, chat: Chat) -> Completion | None:
        if not well_formed_answer(body):
            return None
        return Completion(dump(body) if mend_completion(body, chat) else raw, body)

    def translator(self, tally: Tally, chat: Chat) -> ChunkMender:
        return ChunkMender(tally, chat)


PLAIN_CHUNK = frozenset({"id", "object", "created", "model", "system_fingerprint", "service_tier", "choices", "usage"})
PLAIN_CHOICE = frozenset({"index", "delta", "finish_reason", "logprobs"})
PLAIN_DELTA = frozenset({"content", "role"})
PLAIN_WHOLE_CHOICE = frozenset({"index", "message", "finish_reason", "logprobs"})
PLAIN_MESSAGE = frozenset({"content", "role", "refusal", "annotations"})
TEXT_OR_NONE = (str, type(None))  # as tuples, because a union is made anew each time it is written
CONTENT = (str, list, type(None))
ARGUMENTS = (str, dict, type(None))


def plain_text(chunk: Any) -> str | None:
    """The text of a chunk that holds nothing else: most of every stream. None when it needs a closer look.

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
    if type(delta) is not dict or not PLAIN_DELTA.issuperset(delta):
        return None
    text = delta.get("content")
    return text if type(text) is str and text else None


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
        changed |= mend_whole_text(message, chat)
        calls = message.get("tool_calls")
        if isinstance(calls, list) and calls:
            changed |= mend_whole_calls(calls, chat, cut=choice.get("finish_reason") == "length")
        changed |= mend_finish(choice, has_calls=bool(calls))
        if not calls and not message.get("content") and choice.get("finish_reason") == "stop":
            thoughts = message.get("reasoning_content")
            if isinstance(thoughts, str) and thoughts.strip():  # the whole answer, in the wrong field
                message["content"], changed = thoughts, True
    return changed


def mend_whole_text(message: JSON, chat: Chat) -> bool:
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
    message["tool_calls"] = [called(index, name, arguments) for index, (name, arguments) in enumerate(calls)]
    return True


def lost_turn() -> UpstreamError:
    return UpstreamError(Failure.MALFORMED, "The model's tool call cannot be read.", status=200)


def called(index: int, name: str, arguments: str) -> JSON:
    return {"id": f"call_{index}", "type": "function", "function": {"name": name, "arguments": arguments}}


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


def mend_whole_calls(calls: list[JSON], chat: Chat, *, cut: bool) -> bool:
    """Calls with ids, types, the client's own names and readable arguments (a call cut off by length stays so)."""
    changed = False
    tools = declared_tools(chat.body)
    for index, call in enumerate(calls):
        if not call.get("id"):
            call["id"], changed = f"call_{index}", True
        changed |= mend_call(call)
        function = call.get("function")
        if not isinstance(function, dict):
            continue
        name, arguments = function.get("name"), function.get("arguments")
        if name in tools and isinstance(arguments, str) and not cut:
            mended = mended_arguments(arguments, tools[name])
            if mended is None:
                raise lost_turn()
            if mended is not arguments:
                function["arguments"], changed = mended, True
        if isinstance(name, str) and name in chat.tool_names:
            function["name"], changed = chat.tool_names[name], True
    return changed


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


def mend_call(call: JSON) -> bool:
    """A tool call with a type, and arguments as text."""
    changed = False
    if not call.get("type"):
        call["type"], changed = "function", True
    function = call.get("function")
    if isinstance(function, dict):
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            function["arguments"], changed = dump(arguments).decode(), True
        elif arguments is None or arguments == "":
            function["arguments"], changed = "{}", True
    return changed


def mend_finish(choice: JSON, *, has_calls: bool) -> bool:
    finish = choice.get("finish_reason")
    if finish == "stop" and has_calls:
        choice["finish_reason"] = "tool_calls"
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
        self._calls: dict[int, str] = {}  # ids of the tool calls begun so far, by index
        tools = declared_tools(chat.body) if chat.has_tools else {}
        self._gate: TextGate | None = TextGate(tools)  # until it is open
        self._held: list[Event] = []  # what the gate holds back, as it came

    def plain_text(self, chunk: Any) -> str | None:
        return plain_text(chunk) if self._gate is None else None

    def feed(self, raw: bytes, chunk: JSON) -> list[Event]:
        choices = chunk.get("choices")
        usage = chunk.get("usage")
        changed = False
        if usage:
            self._tally.note_usage(usage)
        if not choices:  # usage goes out once and last; anything else here would only break clients
            if usage:
                self._tally.usage_raw = raw
            return []
        choice = choices[0]
        if usage:
            del chunk["usage"]
            changed = True
        delta = choice.get("delta")
        if delta:
            if "reasoning" in delta or type(delta.get("content")) is list:
                changed |= mend_text(delta)
            if delta.get("tool_calls"):
                changed |= self._mend_calls(delta["tool_calls"])
        if choice.get("finish_reason"):
            for name, vendor in chunk.items():  # some tell it in an object of their own: x_vendor.usage
                if name.startswith("x_") and isinstance(vendor, dict):
                    self._tally.note_usage(vendor.get("usage"))
            changed |= mend_finish(choice, has_calls=bool(self._calls))
        elif choice.get("finish_reason") == "":
            choice["finish_reason"], changed = None, True
        event = Event(frame(chunk) if changed else raw, chunk)
        return [event] if self._gate is None else self._through_gate(event, choice)

    def end(self) -> list[Event]:
        """At the end marker: what is still held back goes out, finish reason or not."""
        return [] if self._gate is None else self._settle(self._tally.head)

    def _through_gate(self, event: Event, choice: JSON) -> list[Event]:
        """The first words pass the gate, until it is open. Raises UpstreamError."""
        gate, delta = self._gate, choice.get("delta") or {}
        assert gate is not None
        text = delta.get("content")
        events: list[Event] = []
        if text and isinstance(text, str):
            self._held.append(event)
            pieces = gate.feed(text)
            if gate.open and gate.untouched:
                self._gate = None
                return self._released()
            events = self._rewritten(event.chunk, pieces, role=delta.get("role"))
            if gate.open:
                self._gate = None
                self._held.clear()
            if not choice.get("finish_reason"):
                return events
            delta.pop("content")
            event = Event(frame(event.chunk), event.chunk)
        if choice.get("finish_reason") or delta.get("tool_calls"):
            events += self._settle(event.chunk) if self._gate is not None else []
            if mend_finish(choice, has_calls=bool(self._calls)):
                event = Event(frame(event.chunk), event.chunk)
        return [*events, event]

    def _settle(self, like: JSON) -> list[Event]:
        """No more text will come: what is held back becomes text, thoughts or calls."""
        gate, self._gate = self._gate, None
        assert gate is not None
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
        for place, (name, arguments) in enumerate(calls, start=len(self._calls)):
            call = called(place, self._chat.tool_names.get(name, name), arguments)
            self._calls[place] = call["id"]
            events.append(piece_of(like, {"tool_calls": [{"index": place, **call}]}))
        return events

    def _released(self) -> list[Event]:
        events, self._held = self._held, []
        return events

    def _rewritten(self, like: JSON, pieces: list[tuple[str, str]], role: str | None = None) -> list[Event]:
        deltas: list[JSON] = [{field: text} for field, text in pieces]
        if deltas and role:
            deltas[0] = {"role": role, **deltas[0]}
        return [piece_of(like, delta) for delta in deltas]

    def _mend_calls(self, calls: list[JSON]) -> bool:
        """Every piece with its index; id, type and name exactly once, because clients join what repeats."""
        changed = False
        for call in calls:
            given, index = call.get("index"), self._index_of(call)
            if given != index:
                call["index"], changed = index, True
            function = call.get("function")
            if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
                function["arguments"], changed = dump(function["arguments"]).decode(), True
            if index not in self._calls:
                changed |= self._begin(call, index)
                continue
            if call.get("id"):
                del call["id"]
                changed = True
            if isinstance(function, dict) and function.get("name"):
                del function["name"]
                changed = True
        return changed

    def _index_of(self, call: JSON) -> int:
        """Which call a piece belongs to. A new id begins a new call, whatever index it claims; so does a name, where
        there are neither ids nor indexes."""
        given, call_id = call.get("index"), call.get("id")
        if call_id:
            for index, begun in self._calls.items():
                if begun == call_id:
                    return index
            return given if isinstance(given, int) and given not in self._calls else len(self._calls)
        if isinstance(given, int):
            return given
        named = bool((call.get("function") or {}).get("name"))
        return len(self._calls) if named or not self._calls else max(self._calls)

    def _begin(self, call: JSON, index: int) -> bool:
        changed = False
        if not call.get("id"):
            call["id"], changed = f"call_{index}", True
        if not call.get("type"):
            call["type"], changed = "function", True
        self._calls[index] = call["id"]
        function = call.get("function")
        if self._chat.tool_names and isinstance(function, dict) and function.get("name") in self._chat.tool_names:
            function["name"], changed = self._chat.tool_names[function["name"]], True
        return changed


def piece_of(like: JSON, delta: JSON) -> Event:
    """A chunk with this delta and the identity of that chunk."""
    head: JSON = {name: like[name] for name in ("id", "object", "created", "model") if name in like}
    chunk = {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
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
    head: JSON = {"object": "chat.completion.chunk"}
    head.update((name, body[name]) for name in ("id", "created", "model") if name in body)
    choice = body["choices"][0]
    delta = {name: value for name, value in (choice.get("message") or {}).items() if value is not None}
    if calls := delta.get("tool_calls"):
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
    last: JSON = {"index": 0, "delta": {}, "finish_reason": choice.get("finish_reason") or "stop"}
    return [
        {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
        {**head, "choices": [last]},
    ]
