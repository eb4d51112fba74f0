"""Answers as the Responses API tells them: output items, a stream's events, the response object around them.

`Output` makes items from deltas in OpenAI's chat form and announces every step. A whole answer is one large delta
whose steps nobody listens to, so streamed and whole answers cannot differ. What a client knows under a name or kind
that providers do not is turned back here (`Offer`). No I/O, no clock: ids derive from the response's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from dialects.client_tools import CLIENT_TOOLS, call_fields
from dialects.compaction import Seal
from dialects.custom_tools import custom_input
from wire.chat import CHARS_PER_TOKEN, Chat, Completion, Event, Tally, Usage
from wire.errors import GatewayError
from wire.jsontext import JSON, dump

Emit = Callable[..., None]
Keep = Callable[[JSON, int], None]  # a finished response and the bytes of it
MADE_UP_CALL_ID = re.compile(r"call_\d{1,3}")  # counted anew in every answer by some providers
# What failures are called here. Everything else is a server_error, because some clients refuse names they do not know.
CODES = {"context_length_exceeded": "context_length_exceeded", "rate_limited": "rate_limit_exceeded"}
NO_SUMMARY = "The model gave no summary of the conversation. Send the request again."
INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
# The names of a part's events: of the part itself, and of the text in it.
PART_EVENTS = {
    "output_text": ("response.content_part", "response.output_text"),
    "refusal": ("response.content_part", "response.refusal"),
    "summary_text": ("response.reasoning_summary_part", "response.reasoning_summary_text"),
}


@dataclass(frozen=True, slots=True)
class Offer:
    """A client's tool that providers get to see as a function, perhaps of another name."""

    type: str  # function, custom, or one of CLIENT_TOOLS
    name: str
    namespace: str | None


class Asked(Struct, frozen=True):
    """What an answer needs to know of its request; travels as `Chat.origin`."""

    repeated: JSON  # what a response says of its request
    items: list[JSON]  # the conversation so far, this request's input included
    size: int  # bytes of it all
    offers: Mapping[str, Offer]  # by the name that providers know; only those that need turning back
    client: int | None = None  # whose it is, and nobody else's to see (SPEC 19.1)
    seal: Seal | None = None  # what is asked for is a summary, to be sealed with this
    bare: bool = False  # and the answer is the object of /v1/responses/compact


@dataclass(slots=True)
class Open:
    """An item that is still being written."""

    item: JSON
    index: int
    part: JSON | None = None  # the part of a message or of reasoning
    client_tool: str | None = None  # that a call calls, where it is one of CLIENT_TOOLS
    pieces: list[str] = field(default_factory=list)  # of the part's text or of a call's arguments

    def where(self) -> JSON:
        """How events point to it, and to its latest part."""
        place: JSON = {"item_id": self.item["id"], "output_index": self.index}
        if self.item["type"] == "message" and self.item["content"]:
            place["content_index"] = len(self.item["content"]) - 1
        elif self.item["type"] == "reasoning" and self.item["summary"]:
            place["summary_index"] = len(self.item["summary"]) - 1
        return place


class Output:
    """The items of one answer while they grow.

    At most one message or reasoning item is open at a time: each ends where another kind of item begins. Calls stay
    open until the answer ends, because the pieces of parallel calls may alternate.
    """

    def __init__(self, suffix: str, offers: Mapping[str, Offer], emit: Emit) -> None:
        self.items: list[JSON] = []
        self.chars = 0
        self._suffix = suffix  # makes the ids of items unique
        self._offers = offers
        self._emit = emit
        self._text: Open | None = None
        self._calls: dict[int, Open] = {}
        self._latest: Open | None = None  # what a limit of length cuts
        self._blank = ""  # white space that may begin a message; before a call it is nothing

    def delta(self, delta: JSON) -> None:
        """Take in one delta, or one whole message."""
        for name, kind in (("reasoning_content", "summary_text"), ("content", "output_text"), ("refusal", "refusal")):
            text = delta.get(name)
            if text and type(text) is str:
                self._write(kind, text)
        calls = delta.get("tool_calls")
        if not calls and isinstance(delta.get("function_call"), dict):
            calls = [{"function": delta["function_call"]}]
        for position, call in enumerate(calls or ()):
            index = call.get("index")
            self._call(index if isinstance(index, int) else position, call)

    def finish(self, *, complete: bool) -> None:
        """The answer has ended as its provider wanted, or for a limit."""
        cut = None if complete else self._latest
        self._end_text(cut)
        for call in self._calls.values():
            self._end_call(call, incomplete=call is cut)

    def abandon(self) -> None:
        """The answer has broken: what there is stays, but nothing is announced as done."""
        if self._text is not None:
            fill_part(self._text)
            self._text.item["status"] = "incomplete"
        for call in self._calls.values():
            fill_call(call)
            if "status" in call.item:
                call.item["status"] = "incomplete"

    def text(self) -> str:
        parts = [part for item in self.items if item["type"] == "message" for part in item["content"]]
        return "".join(part["text"] for part in parts if part["type"] == "output_text")

    def _write(self, kind: str, text: str) -> None:
        wanted = "reasoning" if kind == "summary_text" else "message"
        if self._text is None or self._text.item["type"] != wanted:
            if text.isspace():
                self._blank += text if kind == "output_text" else ""
                return
            self._end_text()
            if wanted == "reasoning":
                self._text = self._begin("rs", {"type": wanted, "summary": [], "status": "in_progress"})
            else:
                self._text = self._begin("msg", {**MESSAGE, "content": []})
        if kind == "output_text":
            text, self._blank = self._blank + text, ""
        opened = self._latest = self._text
        if opened.part is None or opened.part["type"] != kind:
            self._end_part(opened)
            self._begin_part(opened, kind)
        opened.pieces.append(text)
        self.chars += len(text)
        more: JSON = {"logprobs": []} if kind == "output_text" else {}
        self._emit(f"{PART_EVENTS[kind][1]}.delta", **opened.where(), delta=text, **more)

    def _call(self, index: int, call: JSON) -> None:
        function = call.get("function") or {}
        opened = self._calls.get(index)
        if opened is None:
            self._end_text()
            self._blank = ""
            opened = self._calls[index] = self._begin_call(index, call.get("id"), function.get("name"))
        elif isinstance(name := function.get("name"), str) and opened.item.get("name") == "":  # some tell it late
            opened.item.update(self._named(name))
        self._latest = opened
        arguments = function.get("arguments")
        if not arguments or type(arguments) is not str:
            return
        opened.pieces.append(arguments)
        self.chars += len(arguments)
        if opened.item["type"] == "function_call":
            self._emit("response.function_call_arguments.delta", **opened.where(), delta=arguments)

    def _begin_call(self, index: int, call_id: object, name: object) -> Open:
        known = isinstance(call_id, str) and call_id and not MADE_UP_CALL_ID.fullmatch(call_id)
        if any(item.get("call_id") == call_id for item in self.items):  # clients match results to calls by it
            known = False
        name = name if isinstance(name, str) else ""
        call_id = call_id if known else f"call_{self._suffix}{index:02x}"
        kind = self._offers[name].type if name in self._offers else "function"
        if kind in CLIENT_TOOLS:
            item: JSON = {
                "type": f"{kind}_call",
                "call_id": call_id,
                **call_fields(kind, "{}"),
                "status": "in_progress",
            }
            return self._begin(CLIENT_TOOLS[kind].id_prefix, item, kind)
        item = {"call_id": call_id, **self._named(name)}
        if kind == "custom":
            return self._begin("ctc", {"type": "custom_tool_call", **item, "input": ""})
        return self._begin("fc", {"type": "function_call", **item, "arguments": "", "status": "in_progress"})

    def _named(self, name: str) -> JSON:
        """What the client calls this tool."""
        offer = self._offers.get(name)
        if offer is None:
            return {"name": name}
        return {"name": offer.name} if offer.namespace is None else {"name": offer.name, "namespace": offer.namespace}

    def _begin(self, prefix: str, item: JSON, client_tool: str | None = None) -> Open:
        index = len(self.items)
        item = {"id": f"{prefix}_{self._suffix}{index:02x}", **item}
        self.items.append(item)
        self._emit("response.output_item.added", output_index=index, item=item)
        return Open(item, index, client_tool=client_tool)

    def _begin_part(self, opened: Open, kind: str) -> None:
        opened.part = {"type": kind, "text": ""}
        if kind == "output_text":
            opened.part.update(annotations=[], logprobs=[])
        elif kind == "refusal":
            opened.part = {"type": kind, "refusal": ""}
        opened.item["summary" if kind == "summary_text" else "content"].append(opened.part)
        self._emit(f"{PART_EVENTS[kind][0]}.added", **opened.where(), part=opened.part)

    def _end_part(self, opened: Open) -> None:
        part = fill_part(opened)
        if part is None:
            return
        part_event, text_event = PART_EVENTS[part["type"]]
        name = "refusal" if part["type"] == "refusal" else "text"
        more: JSON = {"logprobs": []} if part["type"] == "output_text" else {}
        self._emit(f"{text_event}.done", **opened.where(), **{name: part[name]}, **more)
        self._emit(f"{part_event}.done", **opened.where(), part=part)
        opened.part = None

    def _end_text(self, cut: Open | None = None) -> None:
        if self._text is None:
            return
        self._end_part(self._text)
        self._end_item(self._text, incomplete=self._text is cut)
        self._text = None

    def _end_call(self, call: Open, *, incomplete: bool) -> None:
        fill_call(call)
        item = call.item
        if item["type"] == "custom_tool_call":
            self._emit("response.custom_tool_call_input.delta", **call.where(), delta=item["input"])
            self._emit("response.custom_tool_call_input.done", **call.where(), input=item["input"])
        elif item["type"] == "function_call":
            if not item["arguments"].strip() and not incomplete:
                item["arguments"] = "{}"
                self._emit("response.function_call_arguments.delta", **call.where(), delta="{}")
            name, arguments = item["name"], item["arguments"]
            self._emit("response.function_call_arguments.done", **call.where(), name=name, arguments=arguments)
        self._end_item(call, incomplete=incomplete)

    def _end_item(self, opened: Open, *, incomplete: bool) -> None:
        if "status" in opened.item:
            opened.item["status"] = "incomplete" if incomplete else "completed"
        self._emit("response.output_item.done", output_index=opened.index, item=opened.item)


class Summary:
    """The output of a compaction: whatever the model says becomes one item, once it is complete."""

    def __init__(self, suffix: str, seal: Seal, emit: Emit) -> None:
        self.items: list[JSON] = []
        self.chars = 0
        self._suffix = suffix
        self._seal = seal
        self._emit = emit
        self._texts: dict[str, list[str]] = {"content": [], "reasoning_content": []}

    def delta(self, delta: JSON) -> None:
        for name, pieces in self._texts.items():
            if isinstance(text := delta.get(name), str):
                pieces.append(text)
                self.chars += len(text)

    def finish(self, *, complete: bool) -> None:
        """A summary that a limit has cut is better than none; so are thoughts, where a model gave nothing else."""
        texts = ("".join(pieces).strip() for pieces in self._texts.values())
        if summary := next(filter(None, texts), None):
            begun = {"id": f"cmp_{self._suffix}", "type": "compaction", "encrypted_content": ""}
            self._emit("response.output_item.added", output_index=0, item=begun)
            item = {**begun, "encrypted_content": self._seal.close(summary)}
            self.items.append(item)
            self._emit("response.output_item.done", output_index=0, item=item)

    def abandon(self) -> None:
        """Half a summary is of no use."""

    def text(self) -> str:
        return ""


MESSAGE: JSON = {"type": "message", "status": "in_progress", "role": "assistant"}


def fill_part(opened: Open) -> JSON | None:
    """The open part, with all its text."""
    if opened.part is not None:
        opened.part["refusal" if opened.part["type"] == "refusal" else "text"] = "".join(opened.pieces)
        opened.pieces.clear()
    return opened.part


def fill_call(call: Open) -> None:
    text = "".join(call.pieces)
    if call.client_tool is not None:
        call.item.update(call_fields(call.client_tool, text))
    elif call.item["type"] == "custom_tool_call":
        call.item["input"] = custom_input(text)
    else:
        call.item["arguments"] = text


def no_event(type: str, **fields: Any) -> None:
    """A whole answer announces nothing."""


class ResponsesEncoder:
    """One response: whole, or as the events of SPEC 9.3. `keep` gets it when it has finished."""

    def __init__(self, chat: Chat, asked: Asked, token: str, created_at: int, keep: Keep) -> None:
        self._chat = chat
        self._asked = asked
        self._token = token
        self._created_at = created_at
        self._keep = keep
        self._model = chat.model
        self._output = self._begun(self._emit)
        self._frames: list[bytes] = []
        self._events = 0  # sent so far: the next sequence_number

    def whole(self, completion: Completion) -> bytes:
        body = completion.body
        choice = body["choices"][0]
        finish = choice.get("finish_reason")
        self._output = self._begun(no_event)
        self._output.delta(choice.get("message") or {})
        self._output.finish(complete=finish not in INCOMPLETE)
        if self._lacks_summary:
            raise GatewayError(NO_SUMMARY, status=502, type="provider_error", code="no_summary")
        self._note_model(body)
        response = self._ended(finish, body.get("usage"))
        if self._asked.bare:
            kept = {name: response[name] for name in ("id", "created_at", "output", "usage")}
            return dump({**kept, "object": "response.compaction"})
        raw = dump(response)
        self._keep(response, len(raw))
        return raw

    def feed(self, events: list[Event]) -> bytes:
        if events:
            self._begin(events[0].chunk)
        for event in events:
            if delta := event.delta:
                self._output.delta(delta)
        return self._flush()

    def end(self, tally: Tally) -> bytes:
        self._begin(tally.head)
        self._output.finish(complete=tally.finish not in INCOMPLETE)
        if self._lacks_summary:
            return self.fail(GatewayError(NO_SUMMARY, status=502, type="provider_error"), tally)
        response = self._ended(tally.finish, tally.usage_object)
        self._emit(f"response.{response['status']}", response=response)
        self._keep(response, len(self._frames[-1]))
        return self._flush()

    def fail(self, error: GatewayError, tally: Tally) -> bytes:
        self._begin(tally.head)
        self._output.abandon()
        response = self._response("failed", usage=self._usage(tally.usage_object))
        code = CODES.get(error.code or "", "server_error")
        response["error"] = {"code": code, "message": error.message, "type": error.type}
        self._emit("response.failed", response=response)
        return self._flush()

    def heartbeat(self) -> bytes:
        """An event, because some clients hang up on a stream that brings none for long, whatever its comments."""
        if self._events:
            self._emit("response.in_progress", response=self._response("in_progress"))
        else:
            self._begin({})
        return self._flush()

    def resumed(self, label: str) -> bytes:
        return b""

    def _begun(self, emit: Emit) -> Output | Summary:
        suffix, seal = self._token[:24], self._asked.seal
        return Output(suffix, self._asked.offers, emit) if seal is None else Summary(suffix, seal, emit)

    @property
    def _lacks_summary(self) -> bool:
        return self._asked.seal is not None and not self._output.items

    def _begin(self, head: JSON) -> None:
        """The first two events, before anything else."""
        self._note_model(head)
        if self._events:
            return
        response = self._response("in_progress")
        self._emit("response.created", response=response)
        self._emit("response.in_progress", response=response)

    def _note_model(self, head: JSON) -> None:
        """The provider's own name of the model, as in chat."""
        if isinstance(model := head.get("model"), str) and model:
            self._model = model

    def _emit(self, type: str, **fields: Any) -> None:
        data = dump({"type": type, "sequence_number": self._events, **fields})
        self._frames.append(b"event: %b\ndata: %b\n\n" % (type.encode(), data))
        self._events += 1

    def _flush(self) -> bytes:
        frames = b"".join(self._frames)
        self._frames.clear()
        return frames

    def _ended(self, finish: str | None, usage: object) -> JSON:
        reason = INCOMPLETE.get(finish or "") if self._asked.seal is None else None
        response = self._response("incomplete" if reason else "completed", usage=self._usage(usage))
        response["incomplete_details"] = {"reason": reason} if reason else None
        return response

    def _response(self, status: str, usage: JSON | None = None) -> JSON:
        return {
            "id": f"resp_{self._token}",
            "object": "response",
            "created_at": self._created_at,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": self._model,
            "output": self._output.items,
            "output_text": self._output.text(),
            **self._asked.repeated,
            "truncation": "disabled",
            "usage": usage,
        }

    def _usage(self, told: object) -> JSON:
        """As the provider counts, else estimated, as in the log."""
        estimate = Usage(self._chat.prompt_tokens, -(-self._output.chars // CHARS_PER_TOKEN))
        usage = Usage.read(told) or estimate
        return {
            "input_tokens": usage.input_tokens,
            "input_tokens_details": {
                "cached_tokens": detail(told, "prompt_tokens_details", "cached_tokens"),
                "cache_write_tokens": 0,
            },
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {
                "reasoning_tokens": detail(told, "completion_tokens_details", "reasoning_tokens")
            },
            "total_tokens": usage.input_tokens + usage.output_tokens,
        }


def detail(usage: object, group: str, name: str) -> int:
    """One of the finer counts; 0 where it is not told."""
    found = usage.get(group) if isinstance(usage, dict) else None
    count = found.get(name) if isinstance(found, dict) else None
    return int(count) if isinstance(count, int | float) and count >= 0 else 0
