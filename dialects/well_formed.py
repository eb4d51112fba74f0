"""Requests that need no mending, recognised in one pass over their text.

Most requests are well formed, and those of agents are long: to make objects of them, walk through these and write them
again costs ten times what the rest of the gateway does. msgspec reads the text against the shapes below, and what is
left to check are the strings. Whatever does not fit, in whichever way, is not judged here: chat.py mends it or says
what is wrong with it. Only what chat.py would pass on as the very same request, and what every platform without quirks
takes as it is, may be recognised; a property test holds both. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import compress
from operator import is_not
from typing import Annotated, Any, Literal

import msgspec
import orjson
from msgspec import UNSET, Meta, Struct, UnsetType
from msgspec.structs import astuple

from dialects.history import SAFE_NAME

CallId = Annotated[str, Meta(min_length=1, max_length=40)]  # what all platforms take


class TextPart(Struct, forbid_unknown_fields=True, gc=False):
    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Meta(min_length=1)]


class Function(Struct, forbid_unknown_fields=True, gc=False):
    name: str
    arguments: str


class Call(Struct, forbid_unknown_fields=True, gc=False):
    id: CallId
    type: Literal["function"]
    function: Function


class System(Struct, forbid_unknown_fields=True, gc=False, tag_field="role", tag="system"):
    content: Content


class User(Struct, forbid_unknown_fields=True, gc=False, tag_field="role", tag="user"):
    content: Content


class Assistant(Struct, forbid_unknown_fields=True, gc=False, tag_field="role", tag="assistant"):
    content: Content | None = None
    tool_calls: Annotated[list[Call], Meta(min_length=1)] | UnsetType = UNSET


class Result(Struct, forbid_unknown_fields=True, gc=False, tag_field="role", tag="tool"):
    content: str
    tool_call_id: CallId


Amount = int | float
UpTo2 = Annotated[int, Meta(ge=0, le=2)] | Annotated[float, Meta(ge=0, le=2)]
UpTo1 = Annotated[int, Meta(ge=1, le=1)] | Annotated[float, Meta(ge=0.01, le=1)]
Long = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
NotEmpty = Annotated[str, Meta(min_length=1)]


class StreamOptions(Struct, forbid_unknown_fields=True, gc=False):
    include_usage: bool | None = None


class Sent(Struct, forbid_unknown_fields=True, gc=False):
    """The fields that go on as they are. What is null goes nowhere."""

    temperature: UpTo2 | None = None
    top_p: UpTo1 | None = None
    presence_penalty: Amount | None = None
    frequency_penalty: Amount | None = None
    repetition_penalty: Amount | None = None
    min_p: Amount | None = None
    top_k: Long | None = None
    seed: Long | None = None
    n: Literal[1] | None = None
    stop: NotEmpty | Annotated[list[NotEmpty], Meta(min_length=1)] | None = None
    tool_choice: Literal["auto", "none", "required"] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None
    verbosity: str | None = None
    logprobs: bool | None = None
    top_logprobs: Long | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None


class Request(Sent):
    """A chat request."""

    messages: msgspec.Raw = msgspec.Raw()
    tools: msgspec.Raw = msgspec.Raw()
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_completion_tokens: Long | None = None
    max_tokens: Long | None = None


is_given = partial(is_not, None)
SENT = Sent.__struct_fields__  # which are the first of a request's, too
REQUEST = msgspec.json.Decoder(Request)
MESSAGES = msgspec.json.Decoder(list[System | User | Assistant | Result])


class WellFormed(Struct, frozen=True, gc=False):
    """What routing wants to know of messages that stay as they came."""

    text: bytes
    chars: int
    first_user_text: str
    has_images: bool = False

    def __repr__(self) -> str:
        """Without what the client said."""
        return f"WellFormed(chars={self.chars})"


class Odd(Exception):
    """Something in the messages has to be looked at by history.py."""


def recognised_request(raw: bytes) -> Request | None:
    """None for a request of which anything but messages and tools has to be looked at; these are still text."""
    try:
        return REQUEST.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def sent_as_given(request: Request) -> dict[str, Any] | None:
    """The fields that go on as they are. None where a NUL is in one of them."""
    values = astuple(request)
    fields = dict(compress(zip(SENT, values, strict=False), map(is_given, values)))
    for value in fields.values():
        kind = type(value)
        if (kind is str or kind is list) and "\0" in "".join(value):
            return None
    return fields


def recognised(text: bytes) -> WellFormed | None:
    """None for messages that are anything but well formed."""
    try:
        messages = MESSAGES.decode(text)
        said = checked(messages)
    except (msgspec.DecodeError, UnicodeDecodeError, orjson.JSONDecodeError, Odd):
        return None
    for message in messages:
        if type(message) is User:
            return WellFormed(text, len(said), "\n".join(texts_of(message.content)))
    return WellFormed(text, len(said), "")


def texts_of(content: str | list[TextPart]) -> list[str]:
    return [content] if isinstance(content, str) else [part.text for part in content]


def checked(messages: list[System | User | Assistant | Result]) -> str:
    """All that counts as text, joined. Raises Odd, and orjson's error."""
    texts: list[str] = []
    ids: list[str] = []
    names: set[str] = set()
    waiting: list[str] = []  # ids of calls without a result yet, the next one last
    for message in messages:
        if type(message) is Result:
            if not waiting or waiting.pop() != message.tool_call_id:
                raise Odd
            texts.append(message.content)
            continue
        if waiting:
            raise Odd
        if message.content:
            if type(message.content) is str:
                texts.append(message.content)
            else:
                texts += texts_of(message.content)
        if type(message) is Assistant:
            if message.tool_calls is not UNSET:
                for call in message.tool_calls:
                    waiting.append(call.id)
                    names.add(call.function.name)
                    texts.append(call.function.arguments)
                    if type(orjson.loads(call.function.arguments)) is not dict:
                        raise Odd
                ids += waiting
                waiting.reverse()
                if len(waiting) > 1 and len(set(waiting)) < len(waiting):
                    raise Odd
            elif not message.content:  # an empty turn
                raise Odd
    if waiting or not messages or type(messages[-1]) is Assistant:
        raise Odd
    said = "".join(texts)
    if "\0" in said or (names and not safe_calls(ids, names)):
        raise Odd
    return said


def safe_calls(ids: list[str], names: Iterable[str]) -> bool:
    """Whether every platform takes calls of these ids and names."""
    all_ids = "".join(ids)
    return "\0" not in all_ids and "\n" not in all_ids and all(map(SAFE_NAME.fullmatch, names))
