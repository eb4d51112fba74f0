"""The OpenAI-shaped wire: a `Chat` out to a platform, its answers back in one form.

quirks.py writes the body of a request, shapes.py puts odd types right, tool_calls.py and whole_calls.py mend the tool
calls of an answer. No platform is named here. No I/O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from adapters.answers import find_usage, odd_head, right_head
from adapters.base import Request, base_url, bearer_headers, piece_of
from adapters.embeddings import embedding_request
from adapters.legacy import legacy_request, takes_prompts
from adapters.plain import PlainAnswer, PlainChunk, plain_answer, plain_chunk
from adapters.quirks import given_back, holds_any, outgoing
from adapters.shapes import is_summary, joined_text, put_right, well_formed, well_formed_answer
from adapters.text_gate import TextGate
from adapters.text_rescue import Unreadable, declared_tools, found_json, text_and_calls
from adapters.thoughts import FIRST_CHARS, split_thoughts
from adapters.tool_calls import StreamedCalls, called, lost_turn, mend_whole_calls
from adapters.whole_calls import WholeCalls
from protection import Failure, UpstreamError
from routing.catalog import Key, Model
from wire.chat import CUT_OFF, Chat, Completion, Event, ModelKind, Tally, Usage, chunk_of, frame
from wire.http import ENDPOINTS_MAX, Endpoint
from wire.jsontext import JSON, dump

FINISH_REASONS = {
    "content_filter": "content_filter", "tool_calls": "tool_calls",
    "stop": "stop", "eos": "stop", "eos_token": "stop", "end_turn": "stop", "stop_sequence": "stop",
    "complete": "stop", "completed": "stop", "tool_use": "tool_calls", "tool_call": "tool_calls",
    "function_call": "tool_calls", "tool-calls": "tool_calls", "function_call_filter": "stop",
    "malformed_function_call": "stop", "unexpected_tool_call": "stop",
    "length": "length", "model_length": "length", "max_tokens": "length", "model_context_window_exceeded": "length",
    "max_output_tokens": "length", "max_length": "length", "context_length_exceeded": "length",
    "sensitive": "content_filter", "safety": "content_filter", "content-filter": "content_filter",
    "content_filtered": "content_filter", "recitation": "content_filter", "prohibited_content": "content_filter",
    "blocklist": "content_filter", "spii": "content_filter", "refusal": "content_filter",
}  # fmt: skip
NO_FINISH = frozenset({"", "null", "none"})


@lru_cache(maxsize=ENDPOINTS_MAX)
def endpoint(model: Model, key: Key) -> Endpoint:
    """Where this model is asked with this key. A new snapshot has new models."""
    url, secret = base_url(model.platform, key)
    return Endpoint(f"{url}/chat/completions", bearer_headers(secret, model.quirks))


class OpenAIAdapter:
    """POST {base_url}/chat/completions."""

    def reply_here(self, chat: Chat) -> None:
        return None

    def request(self, model: Model, key: Key, chat: Chat, *, bare: bool = False) -> Request:
        if chat.need.kind is ModelKind.EMBEDDING:
            return embedding_request(model, key, chat)
        if chat.legacy is not None and takes_prompts(model, chat.legacy):
            return legacy_request(model, key, chat)
        body = outgoing(model, chat, bare=bare)
        fields = frozenset() if bare else given_back(model)
        return Request(endpoint(model, key), dump(body), gives_back=holds_any(body["messages"], fields))

    def headers(self, secret: str, quirks: Mapping[str, Any]) -> dict[str, str]:
        return bearer_headers(secret, quirks)

    def plain_answer(self, raw: bytes, chat: Chat) -> PlainAnswer | None:
        return None if chat.need.tools or "response_format" in chat.body else plain_answer(raw)

    def completion(self, raw: bytes, body: JSON, chat: Chat) -> Completion | None:
        if body.get("choices", body) in ([], None):
            raise UpstreamError(Failure.EMPTY, "The provider's answer was empty.", status=200)
        changed = not well_formed_answer(body)
        if changed:
            put_right(body, raw, "message")
        if not body["choices"] or not all(choice.get("message") for choice in body["choices"]):
            return None
        return Completion(dump(body) if mend_completion(body, chat) or changed else raw, body)

    def translator(self, tally: Tally, chat: Chat, *, whole_calls: bool = True) -> ChunkMender:
        return ChunkMender(tally, chat, whole_calls=whole_calls)


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
        finish = final_finish(told_finish(choice.get("finish_reason")), has_calls=bool(calls))
        if choice.get("finish_reason") != finish:
            choice["finish_reason"], changed = finish, True
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
            earlier = message.get("reasoning_content")
            message["reasoning_content"] = f"{earlier}\n{thoughts}" if earlier else thoughts
    if not chat.need.tools or message.get("tool_calls"):
        return thoughts is not None
    try:
        rescued = text_and_calls(rest, declared_tools(chat.body))
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
        rescued = text_and_calls(text, declared_tools(chat.body))
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
        thoughts = [part["thinking"] for part in content if part.get("thinking")]
        message["content"] = joined_text(content)
        if thoughts:
            message["reasoning_content"] = "".join(t if isinstance(t, str) else joined_text(t) for t in thoughts)
        changed = True
    reasoning = message.pop("reasoning") if isinstance(message.get("reasoning"), str) else None
    if reasoning is None and "reasoning_content" not in message:
        reasoning = detailed_thoughts(message.get("reasoning_details"))
        if reasoning is None:
            return changed
    if reasoning is not None:
        message.setdefault("reasoning_content", reasoning)
        return True
    return changed


def detailed_thoughts(details: object) -> str | None:
    """The thoughts that stand only in `reasoning_details`, which go back to their platform as they are."""
    if not isinstance(details, list):
        return None
    parts = [part for part in details if isinstance(part, dict)]
    texts = [text for part in parts for text in (part.get("text"), part.get("summary")) if isinstance(text, str)]
    return "".join(texts) or None


def told_finish(value: object) -> str | None:
    """A finish reason by its one name; None for none."""
    if not isinstance(value, str) or value.lower() in NO_FINISH:
        return None
    name = value.lower()
    return FINISH_REASONS.get(name) or FINISH_REASONS.get(name.partition(":")[0], value)  # some say more behind it


def final_finish(finish: str | None, *, has_calls: bool) -> str:
    """How an answer ended, known at its end: with calls or without (SPEC 8.9)."""
    if finish in (None, "stop", "tool_calls"):
        return "tool_calls" if has_calls else "stop"
    return finish


class ChunkMender:
    """Brings one stream's chunks into the one form. A chunk that needs no change keeps the bytes it came in.

    A finish reason is believed at the end only (SPEC 8.9): some servers send `stop` with every chunk, or before a call.
    Tool calls go out whole where `whole_calls` says so (SPEC 14.7).
    """

    def __init__(self, tally: Tally, chat: Chat, *, whole_calls: bool) -> None:
        self._tally = tally
        self._calls = StreamedCalls(chat)
        self._whole = WholeCalls(chat) if whole_calls else None
        tools = declared_tools(chat.body) if chat.need.tools else {}
        self._has_tools = bool(tools)
        self._gate: TextGate | None = TextGate(tools)  # until it is open
        self._gated: list[Event] = []  # what the gate holds back, as it came
        self._head: JSON = {}  # a chunk to make others like
        self._finish: str | None = None
        self._odd_head = False  # id, created or model are not of the types that clients insist on
        self._ending: Event | None = None  # the provider's own event of its ending, if it says nothing else
        self._wants_all = self._has_tools  # every chunk has to be looked at, however plain: see `_looks_closely`

    def recognised(self, raw: bytes, payload: bytes) -> Sequence[Event] | None:
        if self._wants_all:
            return None
        gate = self._gate
        if (chunk := plain_chunk(payload)) is None:
            return None
        if not chunk.choices:
            return self._recognised_usage(raw, chunk)
        if chunk.usage:
            return None
        choice = chunk.choices[0]
        text = choice.delta.content
        if choice.finish_reason is not None:
            if text or not self._tally.head:
                return None
            self._note_finish(choice.finish_reason)
            self._ending = Event(raw, payload, ending=choice.finish_reason)
            return ()
        if text is None:
            return None
        if gate is not None and text:  # without tools, only an answer that begins with a tag is not what it seems
            first = text.lstrip()[:1]
            if gate.begun or not first or first in FIRST_CHARS:
                return None
            self._gate = None
        if not self._head:
            self._head = self._tally.head = self._tally.head or chunk.head()
        return (Event(raw, payload, text),)

    def _recognised_usage(self, raw: bytes, chunk: PlainChunk) -> Sequence[Event] | None:
        if not chunk.usage or (usage := Usage.exact(chunk.usage)) is None:
            return None
        tally = self._tally
        tally.usage, tally.usage_object, tally.usage_raw = usage, chunk.usage, raw
        return ()

    @property
    def finishing(self) -> bool:
        return self._finish is not None

    @property
    def holding(self) -> bool:
        return (self._whole is not None and self._whole.holding) or (self._gate is not None and self._gate.calling)

    @property
    def expects_calls(self) -> bool:
        """Whether a call is likely still to come: it has begun, or was announced, or could be made."""
        return self.holding or (not self._calls and (self._has_tools or self._finish == "tool_calls"))

    @property
    def held_chars(self) -> int:
        """How much has ever been held back of calls: it grows while they arrive."""
        return (self._whole.taken_chars if self._whole else 0) + (self._gate.taken_chars if self._gate else 0)

    def feed(self, raw: bytes, payload: bytes, chunk: JSON) -> list[Event]:
        events = self._mended(raw, payload, chunk)
        self._wants_all = self._looks_closely
        return events

    @property
    def _looks_closely(self) -> bool:
        """Whether a plain chunk, too, would be changed or held back."""
        return self._odd_head or self.holding or (self._gate is not None and self._has_tools)

    def _mended(self, raw: bytes, payload: bytes, chunk: JSON) -> list[Event]:
        changed = self._put_right(raw, payload, chunk)
        if not chunk.get("choices"):  # usage goes out once and last; anything else here would only break clients
            return []
        choice = chunk["choices"][0]
        delta = choice["delta"]
        self._head = self._head or chunk
        pieces = delta.get("tool_calls") or []
        events: list[Event] = []
        if pieces:
            changed |= self._calls.mend(pieces, chunk)
            events = self._text_before_call(chunk, delta)
            changed |= bool(events)
            if self._whole is not None:
                del delta["tool_calls"]
                changed = True
        finish = told_finish(choice.get("finish_reason"))
        if choice.get("finish_reason") != finish:
            choice["finish_reason"], changed = finish, True
        if finish is not None:
            self._note_finish(finish)
        if (finish is not None or pieces) and not self._says_something(delta):
            self._ending = self._ending if finish is None else Event(frame(chunk) if changed else raw, chunk)
        else:
            if finish is not None:
                choice["finish_reason"], changed = None, True
            if not pieces:
                events += self._complete_calls()
            event = Event(frame(chunk) if changed else raw, chunk)
            events += [event] if self._gate is None else self._gate_text(event)
        if pieces and self._whole is not None:
            events += self._pieces(self._whole.take(pieces))
        return events if finish is None else events + self._complete_calls()

    def end(self) -> list[Event]:
        """At the end of the answer: what is still held back goes out, and how it ended. Raises UpstreamError."""
        events = [] if self._gate is None else self._settle(self._head)
        cut = self._finish in CUT_OFF
        rest = self._calls.rest(cut=cut)
        if self._whole is not None:
            if rest or self._whole.holding:
                events += self._pieces([*self._whole.take(rest), *self._whole.finish(cut=cut)])
        elif rest:
            events.append(piece_of(self._head, {"tool_calls": rest}))
        finish = final_finish(self._finish, has_calls=bool(self._calls))
        if self._ending is not None and self._ending.finish == finish:
            return [*events, self._ending]
        chunk = chunk_of(self._head, {}, finish)
        return [*events, Event(frame(chunk), chunk)]

    def _put_right(self, raw: bytes, payload: bytes, chunk: JSON) -> bool:
        """Give the chunk its one form, calls and finish apart; True when something had to change. Raises
        UpstreamError."""
        changed = not well_formed(chunk)
        if changed:
            if is_summary(chunk):
                self._sum_up(chunk)
            put_right(chunk, payload, "delta")
        if not self._head and chunk.get("choices"):
            self._odd_head = odd_head(chunk)
        if self._odd_head:
            right_head(chunk)
            changed = True
        choices, usage = chunk.get("choices"), find_usage(chunk)
        if usage is not None:  # it goes out last, to those who asked for it
            self._tally.note_usage(usage)
        if not choices:
            if usage is not None:
                as_told = choices == [] and usage is chunk.get("usage") and usage is self._tally.usage_object
                self._tally.usage_raw = raw if as_told and not changed else None
            return changed
        choice = choices[0]
        for place in (chunk, choice):
            if place.get("usage"):
                del place["usage"]
                changed = True
        if choice.get("delta") is None:  # clients look into it unasked
            choice["delta"], changed = {}, True
        delta = choice["delta"]
        if "reasoning" in delta or "reasoning_details" in delta or type(delta.get("content")) is list:
            changed |= mend_text(delta)
        return changed

    def _text_before_call(self, chunk: JSON, delta: JSON) -> list[Event]:
        """A call ends the text before it: what is held back of that goes out. Raises UpstreamError."""
        events: list[Event] = []
        if self._gate is not None and delta.get("content"):
            events = self._gate_text(piece_of(chunk, {"content": delta.pop("content")}))
        return events if self._gate is None else events + self._settle(chunk)

    def _complete_calls(self) -> list[Event]:
        """Something else follows: calls that are complete go out."""
        return [] if self._whole is None or not self._whole.holding else self._pieces(self._whole.release())

    def _sum_up(self, chunk: JSON) -> None:
        """Empty the message with which a stream tells its whole answer once more, at its end."""
        choices = chunk["choices"]
        choice = choices[0] if type(choices) is list else choices
        content = choice["message"].get("content")
        again = self._calls or (isinstance(content, str) and len(content) >= self._tally.text_chars)
        if told_finish(choice.get("finish_reason")) and again and (self._tally.has_text or self._calls):
            choice["message"] = {}

    def _note_finish(self, finish: str) -> None:
        """The last one counts, but `stop` takes back none that says more."""
        if self._finish is None or finish != "stop":
            self._finish = finish

    def _says_something(self, delta: JSON) -> bool:
        said = any(value for name, value in delta.items() if name != "role")
        return said or ("role" in delta and not self._tally.head)

    def _pieces(self, pieces: list[JSON]) -> list[Event]:
        return [piece_of(self._head, {"tool_calls": [piece]}) for piece in pieces]

    def _gate_text(self, event: Event) -> list[Event]:
        """The first words pass the gate, until it is open."""
        gate, delta = self._gate, event.chunk["choices"][0]["delta"]
        assert gate is not None
        text = delta.get("content")
        if not text or not isinstance(text, str):
            return [event]
        self._gated.append(event)
        pieces = gate.feed(text)
        if gate.open and gate.untouched:
            self._gate = None
            return self._released()
        if gate.untouched:
            return []
        beside = {name: value for name, value in delta.items() if name != "content"}
        events = [piece_of(event.chunk, beside)] if beside else []
        events += self._rewritten(event.chunk, pieces)
        if gate.open:
            self._gate = None
        self._gated.clear()
        return events

    def _settle(self, like: JSON) -> list[Event]:
        """No more text will come: what is held back becomes text, thoughts or calls. Raises UpstreamError."""
        gate = self._gate
        assert gate is not None
        self._gate = None
        try:
            pieces, calls = gate.finish()
        except Unreadable:
            raise lost_turn() from None
        if gate.untouched:
            return self._released()
        self._gated.clear()
        events = self._rewritten(like, pieces)
        found = [self._calls.add(name, arguments, like) for name, arguments in calls]
        return events + self._pieces(found if self._whole is None else self._whole.take(found))

    def _released(self) -> list[Event]:
        events, self._gated = self._gated, []
        return events

    def _rewritten(self, like: JSON, pieces: list[tuple[str, str]]) -> list[Event]:
        return [piece_of(like, {field: text}) for field, text in pieces]
