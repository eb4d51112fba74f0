"""Answers as the Messages API tells them: content blocks, a stream's events, the message around them.

`Blocks` makes blocks from deltas in OpenAI's chat form and announces every step. Blocks follow one another here, they
never overlap: what begins before its turn waits. A whole answer is one large delta whose steps nobody listens to, so
streamed and whole answers cannot differ. No I/O, no clock.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from dialects.message_errors import error_of
from wire.chat import CHARS_PER_TOKEN, Completion, Event, Tally, Usage, token_count
from wire.errors import GatewayError
from wire.jsontext import JSON, dump, load_inner

Emit = Callable[..., None]
PING = b'event: ping\ndata: {"type": "ping"}\n\n'
STOP_REASONS = {"length": "max_tokens", "content_filter": "refusal", "tool_calls": "tool_use"}
USABLE_ID = re.compile(r"[a-zA-Z0-9_-]{4,64}")  # what this API takes back in a result
MADE_UP_ID = re.compile(r"(call|tool|toolu)_\d{1,3}")  # counted anew in every answer by some providers


class Asked(Struct, frozen=True):
    """What an answer needs to know of its request; travels as `Chat.origin`."""

    model: str  # as the client wrote it: it is told so again, or a session cannot be taken up
    input_tokens: int  # estimated
    thinks_aloud: bool = True  # False where the client wants no thinking


@dataclass(slots=True)
class Block:
    """One content block while it is written."""

    content: JSON
    pieces: list[str] = field(default_factory=list)  # of its text, its thoughts or its input
    told: int = 0  # pieces that have been announced
    begun: bool = False

    @property
    def kind(self) -> str:
        return str(self.content["type"])

    def complete(self) -> bool:
        """Whether nothing can follow, now that another block has begun: pieces of parallel calls may alternate."""
        return self.kind != "tool_use" or isinstance(load_inner("".join(self.pieces)), dict)

    def fill(self) -> JSON:
        """The block with all that it has got."""
        text = "".join(self.pieces)
        if self.kind == "tool_use":
            self.content["input"] = tool_input(text)
        else:
            self.content[self.kind] = text
        return self.content


def tool_input(arguments: str) -> JSON:
    """A call's arguments as an object; of one that was cut off nothing can be said."""
    value = load_inner(arguments)
    if isinstance(value, dict):
        return value
    return {} if value is None else {"value": value}


DELTAS = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}
DELTA_FIELDS = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}


class Blocks:
    """The content of one answer while it grows."""

    def __init__(self, token: str, *, thinks_aloud: bool, emit: Emit) -> None:
        self.content: list[JSON] = []  # blocks that are complete
        self.chars = 0
        self.has_calls = False
        self._token = token  # makes the ids of calls unique
        self._thinks_aloud = thinks_aloud
        self._emit = emit
        self._open: list[Block] = []  # the first is being told, the others wait for it
        self._calls: dict[int, Block] = {}
        self._ids: set[str] = set()
        self._blank = ""  # white space that may begin a text; alone it is none

    def delta(self, delta: JSON) -> None:
        """Take in one delta, or one whole message."""
        for name, kind in (("reasoning_content", "thinking"), ("content", "text"), ("refusal", "text")):
            text = delta.get(name)
            if text and type(text) is str:
                self._write(kind, text)
        calls = delta.get("tool_calls")
        if not calls and isinstance(delta.get("function_call"), dict):
            calls = [{"function": delta["function_call"]}]
        for position, call in enumerate(calls or ()):
            index = call.get("index")
            self._call(index if isinstance(index, int) else position, call)

    def tell(self, *, to_the_end: bool = False) -> None:
        """Announce what can be announced by now."""
        while self._open:
            block = self._open[0]
            if block.kind == "tool_use" and not block.content["name"] and not to_the_end:
                return  # some tell the name late
            self._announce(block)
            if not to_the_end and (len(self._open) == 1 or not block.complete()):
                return
            self._emit("content_block_stop", index=len(self.content))
            self.content.append(block.fill())
            del self._open[0]

    def _announce(self, block: Block) -> None:
        index = len(self.content)
        if not block.begun:
            block.begun = True
            self._emit("content_block_start", index=index, content_block=block.content)
        text = "".join(block.pieces[block.told :])
        block.told = len(block.pieces)
        if text:
            delta = {"type": DELTAS[block.kind], DELTA_FIELDS[block.kind]: text}
            self._emit("content_block_delta", index=index, delta=delta)

    def _write(self, kind: str, text: str) -> None:
        self.chars += len(text)
        if kind == "thinking" and not self._thinks_aloud:
            return
        block = self._open[-1] if self._open else None
        if block is None or block.kind != kind:
            if text.isspace():
                self._blank += text if kind == "text" else ""
                return
            block = Block({"type": kind, kind: ""} if kind == "text" else {"type": kind, kind: "", "signature": ""})
            self._open.append(block)
        if kind == "text":
            text, self._blank = self._blank + text, ""
        block.pieces.append(text)

    def _call(self, index: int, call: JSON) -> None:
        function = call.get("function") or {}
        name, arguments = function.get("name"), function.get("arguments")
        block = self._calls.get(index)
        if block is None:
            self._blank, self.has_calls = "", True
            id = self._usable_id(call.get("id"), index)
            block = self._calls[index] = Block({"type": "tool_use", "id": id, "name": "", "input": {}})
            self._open.append(block)
        if isinstance(name, str) and not block.content["name"]:
            block.content["name"] = name
        if arguments and type(arguments) is str:
            self.chars += len(arguments)
            block.pieces.append(arguments)

    def _usable_id(self, given: object, index: int) -> str:
        """The provider's own id of a call, where it is one that clients can tell from all others."""
        id = given if isinstance(given, str) and USABLE_ID.fullmatch(given) and not MADE_UP_ID.fullmatch(given) else ""
        if not id or id in self._ids:
            id = f"toolu_{self._token}{index:02x}"
        self._ids.add(id)
        return id


def no_event(type: str, **fields: Any) -> None:
    """A whole answer announces nothing."""


class MessagesEncoder:
    """One message: whole, or as events. `token` makes its ids unlike all others."""

    def __init__(self, asked: Asked, token: str) -> None:
        self._asked = asked
        self._token = token[:24]
        self._blocks = Blocks(self._token, thinks_aloud=asked.thinks_aloud, emit=self._emit)
        self._frames: list[bytes] = []
        self._begun = False

    def whole(self, completion: Completion) -> bytes:
        choice = completion.body["choices"][0]
        blocks = Blocks(self._token, thinks_aloud=self._asked.thinks_aloud, emit=no_event)
        blocks.delta(choice.get("message") or {})
        blocks.tell(to_the_end=True)
        reason = stop_reason(choice.get("finish_reason"), blocks)
        return dump(self._message(blocks.content, reason, self._usage(completion.body.get("usage"), blocks)))

    def feed(self, events: list[Event]) -> bytes:
        self._begin()
        for event in events:
            if delta := event.delta:
                self._blocks.delta(delta)
        self._blocks.tell()
        return self._flush()

    def end(self, tally: Tally) -> bytes:
        self._begin()
        self._blocks.tell(to_the_end=True)
        reason = stop_reason(tally.finish, self._blocks)
        usage = self._usage(tally.usage_object, self._blocks)
        self._emit("message_delta", delta={"stop_reason": reason, "stop_sequence": None}, usage=usage)
        self._emit("message_stop")
        return self._flush()

    def fail(self, error: GatewayError, tally: Tally) -> bytes | None:
        """Clients send a request again whose connection breaks before a block is complete, and never one that got an
        error event (SPEC 14.9). What only they can mend they are told: to send it again would be in vain."""
        if error.type == "invalid_request_error":
            self._emit("error", error=error_of(error))
        elif self._blocks.content:
            self._emit("error", error={"type": "overloaded_error", "message": error.message})
        else:
            return None
        return self._flush()

    def heartbeat(self) -> bytes:
        return PING

    def resumed(self, label: str) -> bytes:
        return f": resumed on {label}\n\n".encode()

    def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        usage = whole_usage(Usage(self._asked.input_tokens, 0), cached=0)
        self._emit("message_start", message=self._message([], None, usage))

    def _emit(self, type: str, **fields: Any) -> None:
        self._frames.append(b"event: %b\ndata: %b\n\n" % (type.encode(), dump({"type": type, **fields})))

    def _flush(self) -> bytes:
        frames = b"".join(self._frames)
        self._frames.clear()
        return frames

    def _message(self, content: list[JSON], reason: str | None, usage: JSON) -> JSON:
        return {
            "id": f"msg_{self._token}",
            "type": "message",
            "role": "assistant",
            "model": self._asked.model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": None,
            "usage": usage,
        }

    def _usage(self, told: object, blocks: Blocks) -> JSON:
        """As the provider counts, else estimated."""
        estimate = Usage(self._asked.input_tokens, -(-blocks.chars // CHARS_PER_TOKEN))
        return whole_usage(Usage.read(told) or estimate, cached_tokens(told))


def stop_reason(finish: str | None, blocks: Blocks) -> str:
    if blocks.has_calls and finish in ("stop", None):
        return "tool_use"
    if finish == "tool_calls" and not blocks.has_calls:
        return "end_turn"
    return STOP_REASONS.get(finish or "", "end_turn")


def whole_usage(usage: Usage, cached: int) -> JSON:
    """Here what came from a cache is no part of the input: all three make the prompt."""
    cached = min(cached, usage.input_tokens)
    return {
        "input_tokens": usage.input_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.output_tokens,
    }


def cached_tokens(usage: object) -> int:
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    return token_count(details.get("cached_tokens")) or 0 if isinstance(details, dict) else 0
