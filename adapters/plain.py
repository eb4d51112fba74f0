"""Answers that are nothing but text, recognised in one pass: most chunks of every stream, and most whole answers.

msgspec reads the JSON against the shapes below and makes no other objects. What fits has no error, no tool call and
nothing to mend in it, so it goes out as it came; whatever does not fit is not judged here, but looked at closely. No
I/O.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

Name = Annotated[str, Meta(min_length=1)]
Scalar = int | float | str | bool | None
Counts = dict[str, Scalar | dict[str, Scalar]]  # a `usage` object with its details


class PlainDelta(Struct, forbid_unknown_fields=True, gc=False):
    content: str | None = None
    role: str | None = None
    refusal: None = None  # this and the rest are told as null by servers that tell everything
    reasoning_content: None = None
    tool_calls: None = None
    function_call: None = None


class PlainPiece(Struct, forbid_unknown_fields=True, gc=False):
    delta: PlainDelta
    index: int = 0
    finish_reason: Literal["stop", "length"] | None = None
    logprobs: None = None
    native_finish_reason: str | None = None


class PlainChunk(Struct, forbid_unknown_fields=True, gc=False):
    """One chunk of a stream: text, how the answer ended, or its usage."""

    choices: Annotated[list[PlainPiece], Meta(max_length=1)]
    id: str | UnsetType = UNSET
    object: str | UnsetType = UNSET
    created: int | UnsetType = UNSET
    model: str | UnsetType = UNSET
    system_fingerprint: str | None = None
    service_tier: str | None = None
    provider: str | None = None
    obfuscation: str | None = None
    usage: Counts | None = None

    def head(self) -> dict[str, Any]:
        """What is the same in all chunks of an answer."""
        head: dict[str, Any] = {"object": "chat.completion.chunk"}
        if self.id is not UNSET:
            head["id"] = self.id
        if self.created is not UNSET:
            head["created"] = self.created
        if self.model is not UNSET:
            head["model"] = self.model
        return head


class PlainMessage(Struct, forbid_unknown_fields=True, gc=False):
    content: Name
    role: str
    refusal: None = None
    reasoning_content: None = None
    tool_calls: None = None
    function_call: None = None
    annotations: Annotated[list[None], Meta(max_length=0)] | None = None


class PlainChoice(Struct, forbid_unknown_fields=True, gc=False):
    message: PlainMessage
    finish_reason: Literal["stop"]
    index: int
    logprobs: None = None
    native_finish_reason: str | None = None


class PlainAnswer(Struct, forbid_unknown_fields=True, gc=False):
    """A whole answer that is complete (SPEC 3.11) and ended by itself."""

    choices: Annotated[list[PlainChoice], Meta(min_length=1, max_length=1)]
    id: Name
    object: Literal["chat.completion"]
    created: int
    model: Name
    system_fingerprint: str | None = None
    service_tier: str | None = None
    provider: str | None = None
    usage: Counts | None = None

    def head(self) -> dict[str, Any]:
        """What chunks of it would have in common."""
        return {"id": self.id, "created": self.created, "model": self.model}


CHUNKS = msgspec.json.Decoder(PlainChunk)
ANSWERS = msgspec.json.Decoder(PlainAnswer)


def plain_chunk(payload: bytes) -> PlainChunk | None:
    """None for one that needs a look."""
    try:
        return CHUNKS.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def plain_answer(raw: bytes) -> PlainAnswer | None:
    """None for one that needs a look; its text may be thoughts in tags. Its usage is judged by whoever counts it."""
    try:
        answer = ANSWERS.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    text = answer.choices[0].message.content
    return None if text[0] in "<[◁" or text[0].isspace() or "</" in text else answer
