"""The short path: chunks and answers that are nothing but text are recognised in one look and counted.

Also the shape checks every other answer passes before it is read. No I/O.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from wire.chat import Tally
from wire.jsontext import JSON, load_inner
from wire.sse import EVENT_BYTES_MAX

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


def text_chunk(text: str) -> dict[str, Any]:
    """What a chunk says that holds nothing but text."""
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
