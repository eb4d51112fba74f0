"""Odd values in an answer, put right, so that one odd part never loses the rest of what an answer says (SPEC 6.6).

Servers write text that looks like JSON without its quotation marks (`"content": 6`), number their calls, name the part
of a whole answer in a stream, or put in parts that nobody knows. `well_formed` says in one look whether a chunk has
the types that reading it relies on, which is nearly always so; `put_right` makes it so, or says that it cannot be read.
No I/O.
"""

from __future__ import annotations

import json
from typing import Any

from protection import Failure, UpstreamError
from wire.jsontext import JSON, dump

TEXT_OR_NONE = (str, type(None))  # as tuples, because a union is made anew each time it is written
NUMBER_OR_NONE = (int, type(None))
CONTENT = (str, list, type(None))
ARGUMENTS = (str, dict, type(None))
TEXT_FIELDS = ("role", "reasoning", "reasoning_content", "refusal")
WRAPPERS = ("data", "result", "response")
PART_NAMES = ("delta", "message", "text")  # what a choice says, in a stream, in a whole answer, in the older API


def unreadable() -> UpstreamError:
    return UpstreamError(Failure.MALFORMED, "The provider sent a part of its answer that cannot be read.", status=200)


def answer_within(body: JSON) -> JSON | None:
    """The answer that some gateways put into an object of their own, beside an account of how it went."""
    if "choices" in body:
        return None
    return next((body[name] for name in WRAPPERS if isinstance(body.get(name), dict) and "choices" in body[name]), None)


# --- One look -------------------------------------------------------------------------------------------------------
def well_formed(chunk: JSON) -> bool:
    """Whether a chunk of a stream has the types that reading it relies on."""
    choices = chunk.get("choices")
    if not choices:
        return choices is None or choices == []
    return type(choices) is list and well_formed_choice(choices[0], "delta")


def well_formed_answer(body: JSON) -> bool:
    """The same for a whole answer."""
    choices = body.get("choices")
    if type(choices) is not list or not choices:
        return False
    return all(well_formed_choice(choice, "message") and choice.get("message") for choice in choices)


def well_formed_choice(choice: Any, part: str) -> bool:
    if type(choice) is not dict or not isinstance(choice.get("finish_reason"), TEXT_OR_NONE):
        return False
    message = choice.get(part)
    if not message:
        elsewhere = any(choice.get(name) is not None for name in PART_NAMES if name != part)
        return (message is None or message == {}) and not elsewhere
    if type(message) is not dict or not isinstance(message.get("content"), CONTENT):
        return False
    for name in TEXT_FIELDS:
        if not isinstance(message.get(name), TEXT_OR_NONE):
            return False
    if type(message.get("content")) is list and not all(map(well_formed_segment, message["content"])):
        return False
    calls = message.get("tool_calls")
    if not calls:
        return not message.get("function_call")
    return type(calls) is list and all(map(well_formed_call, calls))


def well_formed_segment(part: Any) -> bool:
    return type(part) is dict and isinstance(part.get("text", ""), str)


def well_formed_call(call: Any) -> bool:
    if type(call) is not dict or not isinstance(call.get("id"), TEXT_OR_NONE):
        return False
    if not isinstance(call.get("index"), NUMBER_OR_NONE) or not isinstance(call.get("type"), TEXT_OR_NONE):
        return False
    function = call.get("function")
    if function is None:
        return "name" not in call and "arguments" not in call
    if type(function) is not dict or not isinstance(function.get("name"), TEXT_OR_NONE):
        return False
    return isinstance(function.get("arguments"), ARGUMENTS)


# --- Putting right --------------------------------------------------------------------------------------------------
def put_right(body: JSON, raw: bytes, part: str) -> None:
    """Give the choices of a chunk (`part` is "delta") or of a whole answer ("message") the types that reading them
    relies on. `raw` is its JSON, from which numbers are taken as they are spelled. Raises UpstreamError."""
    spelled = under(as_spelled(raw), "choices")
    choices = body.get("choices")
    if isinstance(choices, dict):
        choices, spelled = [choices], [spelled]
    if choices and not isinstance(choices, list):
        raise unreadable()
    body["choices"] = [
        right_choice(choice, under(spelled, place), part)
        for place, choice in enumerate(choices or ())
        if choice is not None
    ]


def as_spelled(raw: bytes) -> Any:
    """The same JSON with every number as it is spelled: 6.50 is half a sentence, not 6.5."""
    try:
        return json.loads(raw, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return None


def is_summary(chunk: JSON) -> bool:
    """Whether a stream's chunk has a whole message in place of something new: some tell the answer again at its end."""
    choices = chunk.get("choices")
    choice = choices[0] if type(choices) is list and choices else choices
    return isinstance(choice, dict) and choice.get("delta") is None and isinstance(choice.get("message"), dict)


def under(value: Any, name: str | int) -> Any:
    if isinstance(value, dict) and isinstance(name, str):
        return value.get(name)
    return value[name] if isinstance(value, list) and isinstance(name, int) and name < len(value) else None


def text_of(value: Any, spelled: Any) -> str | None:
    """Text, also where it lost its quotation marks; None for null, lists and objects."""
    if type(value) is str:
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return spelled if type(spelled) is str else str(value)
    return None


def right_choice(choice: object, spelled: Any, part: str) -> JSON:
    if not isinstance(choice, dict):
        raise unreadable()
    name = next((name for name in (part, *PART_NAMES) if choice.get(name) is not None), part)
    said, spelled = choice.get(name), under(spelled, name)
    if isinstance(said, str | int | float | list) and not isinstance(said, bool):
        said, spelled = {"content": said}, {"content": spelled}
    if said is not None and not isinstance(said, dict):
        raise unreadable()
    right: JSON = {key: value for key, value in choice.items() if key not in PART_NAMES}
    if not isinstance(right.get("finish_reason"), TEXT_OR_NONE):
        right["finish_reason"] = None
    right[part] = right_message(said or {}, spelled)
    return right


def right_message(message: JSON, spelled: Any) -> JSON:
    message = dict(message)
    if "content" in message:
        message["content"] = right_content(message["content"], under(spelled, "content"))
    for name in TEXT_FIELDS:
        value = message.get(name)
        if isinstance(value, TEXT_OR_NONE):
            continue
        text = text_of(value, under(spelled, name))
        if text is None and name != "role":
            content = right_content(value, under(spelled, name))
            text = content if isinstance(content, str) else joined_text(content)
        message[name] = text
        if text is None:
            del message[name]
    older = message.pop("function_call", None)
    if isinstance(older, dict) and older and not message.get("tool_calls"):  # as the API had it before
        message["tool_calls"], spelled = [{"function": older}], None
    if "tool_calls" in message:
        message["tool_calls"] = right_calls(message["tool_calls"], under(spelled, "tool_calls"))
        if not message["tool_calls"]:
            del message["tool_calls"]
    return message


def right_content(content: Any, spelled: Any) -> str | list[JSON] | None:
    """Text, or its segments; a value of no known form is the JSON that it was meant as."""
    if content is None or (text := text_of(content, spelled)) is not None:
        return content if content is None else text
    if isinstance(content, dict):
        if not content.keys() & {"type", "text", "thinking"}:
            return dump(content).decode()
        content, spelled = [content], [spelled]
    if not all(isinstance(part, dict | str | None) for part in content):
        return dump(content).decode()
    return [right_segment(part, under(spelled, place)) for place, part in enumerate(content) if part is not None]


def right_segment(part: JSON | str, spelled: Any) -> JSON:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if "text" not in part:
        return part
    return {**part, "text": text_of(part["text"], under(spelled, "text")) or ""}


def joined_text(segments: object) -> str:
    """The text of an answer's segments, which are pieces of one text."""
    parts = segments if isinstance(segments, list) else []
    return "".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def right_calls(calls: Any, spelled: Any) -> list[JSON]:
    if isinstance(calls, dict) and calls:
        calls, spelled = [calls], [spelled]
    if calls and not isinstance(calls, list):
        raise unreadable()
    return [right_call(call, under(spelled, place)) for place, call in enumerate(calls or ()) if call is not None]


def right_call(given: object, spelled: Any) -> JSON:
    """A call with an id as text, a whole number for an index, and a function."""
    if not isinstance(given, dict):
        raise unreadable()
    call: JSON = dict(given)
    function, inner = call.get("function"), under(spelled, "function")
    if function is None and call.keys() & {"name", "arguments"}:
        function = {name: call.pop(name) for name in ("name", "arguments") if name in call}
        inner = spelled
    if function is not None and not isinstance(function, dict):
        raise unreadable()
    for name, value in (("id", text_of(call.get("id"), under(spelled, "id"))), ("index", whole(call.get("index")))):
        if name in call:
            call[name] = value
            if value is None:
                del call[name]
    if not isinstance(call.get("type"), TEXT_OR_NONE):
        del call["type"]
    if function is not None:
        call["function"] = right_function(function, inner)
    return call


def right_function(function: JSON, spelled: Any) -> JSON:
    function = dict(function)
    if not isinstance(function.get("name"), TEXT_OR_NONE):
        function["name"] = text_of(function["name"], under(spelled, "name"))
        if function["name"] is None:
            raise unreadable()
    arguments = function.get("arguments")
    if not isinstance(arguments, ARGUMENTS):
        text = text_of(arguments, under(spelled, "arguments"))
        function["arguments"] = dump(arguments).decode() if text is None else text
    return function


def whole(value: Any) -> int | None:
    """A whole number, also spelled as text or with a zero behind the point."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e9:
        return int(value)
    return value if type(value) is int else None
