"""What an answer says of itself, and what it has said so far: head, text, calls, finish and usage. No I/O."""

from __future__ import annotations

from typing import Any

from adapters.plain import PlainAnswer
from wire.chat import Event, Tally, Usage
from wire.jsontext import JSON


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


def note(event: Event, tally: Tally) -> bool:
    """Count one event; True when it is the kind that may open an answer (SPEC 8.1): text, reasoning, a call, a refusal
    or a filter's stop. `length` alone is not: with nothing said it may be a truncation, which its usage decides.
    """
    if event.text is not None:
        tally.head = tally.head or event.chunk
        return note_text(event.text, tally)
    if event.ending is not None:
        tally.finish = event.ending
        return False
    choice = event.choice
    if not choice:
        return False
    tally.head = tally.head or event.chunk
    return note_part(choice.get("delta"), choice.get("finish_reason"), tally)


def note_completion(body: JSON, tally: Tally) -> None:
    """Count a whole answer."""
    tally.head = body
    tally.note_usage(body.get("usage"))
    choice = body["choices"][0]
    note_part(choice.get("message"), choice.get("finish_reason"), tally)


def note_plain(answer: PlainAnswer, tally: Tally) -> bool:
    """Count a whole answer that is nothing but text. False, and nothing is counted, where its usage needs a look."""
    if answer.usage is not None:
        if (usage := Usage.exact(answer.usage)) is None:
            return False
        tally.usage, tally.usage_object = usage, answer.usage
    tally.head = answer.head()
    tally.finish, tally.has_text = "stop", True
    tally.text_chars = len(answer.choices[0].message.content)
    return True


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
