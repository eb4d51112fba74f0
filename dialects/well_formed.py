"""Messages that need no mending, recognised in one pass over their text.

Most requests are well formed, and those of agents are long: to make objects of them, walk through these and write them
again costs ten times what the rest of the gateway does. msgspec reads the text against the shapes below, and what is
left to check are the strings. Whatever does not fit, in whichever way, is not judged here: history.py mends it or says
what is wrong with it. Only what history.py would pass on as the very same messages, and what every platform without
quirks takes as it is, may be recognised; a property test holds both. No I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec
import orjson
from msgspec import UNSET, Meta, Struct, UnsetType

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


MESSAGES = msgspec.json.Decoder(list[System | User | Assistant | Result])


@dataclass(frozen=True, slots=True)
class WellFormed:
    """What routing wants to know of messages that stay as they came."""

    text: bytes = field(repr=False)
    chars: int
    first_user_text: str = field(repr=False)
    has_images: bool = False


class Odd(Exception):
    """Something in the messages has to be looked at by history.py."""


def recognised(text: bytes) -> WellFormed | None:
    """None for messages that are anything but well formed."""
    try:
        messages = MESSAGES.decode(text)
        texts = checked(messages)
    except (msgspec.DecodeError, UnicodeDecodeError, orjson.JSONDecodeError, Odd):
        return None
    first_user = next((message for message in messages if isinstance(message, User)), None)
    return WellFormed(text, sum(map(len, texts)), "\n".join(texts_of(first_user.content)) if first_user else "")


def texts_of(content: str | list[TextPart]) -> list[str]:
    return [content] if isinstance(content, str) else [part.text for part in content]


def checked(messages: list[System | User | Assistant | Result]) -> list[str]:
    """All that counts as text. Raises Odd, and orjson's error."""
    texts: list[str] = []
    ids: list[str] = []
    names: set[str] = set()
    waiting: list[str] = []  # ids of calls without a result yet, the next one last
    for message in messages:
        if isinstance(message, Result):
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
        if isinstance(message, Assistant):
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
    if waiting or not messages or isinstance(messages[-1], Assistant) or any("\0" in text for text in texts):
        raise Odd
    all_ids = "".join(ids)
    if "\0" in all_ids or "\n" in all_ids or not all(map(SAFE_NAME.fullmatch, names)):
        raise Odd
    return texts
