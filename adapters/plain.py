"""The short path: chunks and answers that are nothing but text are recognised in one look; and what an answer has said
so far is counted, by whichever path it came. No I/O."""

from __future__ import annotations

from typing import Any

from wire.chat import Tally, Usage, is_exact
from wire.jsontext import JSON

PLAIN_CHUNK = frozenset({"id", "object", "created", "model", "system_fingerprint", "service_tier", "choices", "usage"})
PLAIN_CHOICE = frozenset({"index", "delta", "finish_reason", "logprobs"})
PLAIN_DELTA = frozenset({"content", "role", "refusal"})
PLAIN_WHOLE_CHOICE = frozenset({"index", "message", "finish_reason", "logprobs"})
PLAIN_MESSAGE = frozenset({"content", "role", "refusal", "annotations"})


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


def plain_answer(body: Any) -> str | None:
    """The text of a whole answer that holds nothing else, is complete (SPEC 3.11) and ended by itself."""
    if type(body) is not dict or not PLAIN_CHUNK.issuperset(body) or not has_head(body):
        return None
    usage = body.get("usage")
    if usage is not None and (type(usage) is not dict or not is_exact(usage)):
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
    if type(choice.get("index")) is not int or type(message.get("role")) is not str:
        return None
    text = message.get("content")
    if type(text) is not str or not text or text[0] in "<[◁" or text[0].isspace() or "</" in text:
        return None  # it may be thoughts in tags
    return text


def has_head(body: JSON) -> bool:
    """Whether an answer says what every client reads of it besides its choices."""
    return (
        body.get("object") == "chat.completion"
        and type(body.get("created")) is int
        and type(body.get("id")) is str
        and body["id"] != ""
        and type(body.get("model")) is str
        and body["model"] != ""
    )


def odd_head(chunk: JSON) -> bool:
    """Whether a chunk tells its id, moment or model in another type than the one that strict clients read."""
    created = chunk.get("created", 0)
    return (
        type(created) is not int
        or type(chunk.get("id", "")) is not str
        or type(chunk.get("model", "")) is not str
        or type(chunk.get("object", "")) is not str
    )


def right_head(chunk: JSON) -> None:
    """The same in the right types, where that can be; left out where not."""
    for name in ("id", "model", "object", "created"):
        value = chunk.get(name)
        number = whole_number(value) if name == "created" else None
        if number is not None:
            chunk[name] = number
        elif name == "id" and type(value) is int:
            chunk[name] = str(value)
        elif name in chunk and (name == "created" or type(value) is not str):
            del chunk[name]


def whole_number(value: object) -> int | None:
    """A count or a moment, also as a fraction or spelled as text."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else -1.0
    except (ValueError, OverflowError):
        return None
    return int(number) if 0 <= number < 1e12 else None


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


def note_text(text: str, tally: Tally) -> bool:
    """Count text of any kind; True when it may open an answer."""
    tally.text_chars += len(text)
    if not text or not (tally.has_text or not text.isspace()):
        return False
    tally.has_text = True
    return True


def note_part(part: JSON | None, finish: str | None, tally: Tally) -> bool:
    meaningful = False
    if part:
        for name in ("content", "reasoning_content", "refusal"):
            text = part.get(name)
            if text and type(text) is str:
                meaningful |= note_text(text, tally)
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


def find_usage(body: JSON) -> JSON | None:
    """The tokens that an answer or a chunk tells, wherever a platform puts them (SPEC 3.11): at the root, in the choice
    or in what it says, in an object of the vendor's own."""
    if (usage := usage_in(body)) is not None:
        return usage
    places: list[Any] = []
    choices = body.get("choices")
    if type(choices) is list and choices and type(choices[0]) is dict:
        choice = choices[0]
        places += (choice, choice.get("delta"), choice.get("message"))
    places += [body[name] for name in body if name[:2] == "x_"]
    return next((usage for place in places if (usage := usage_in(place)) is not None), None)


def usage_in(place: Any) -> JSON | None:
    usage: JSON | None = place.get("usage") if type(place) is dict else None
    return usage if usage and Usage.read(usage) is not None else None
