"""Tool calls and JSON that models write as text: calls in their own dialects, broken arguments, JSON between words.

Only an answer that opens so counts, because an answer may well talk about such things; and a call only where the
request declared tools, and only for those. text_gate.py does the same for the first words of a stream. No I/O.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import orjson

from wire.jsontext import JSON, dump, load_inner

Tools = Mapping[str, JSON]  # the schema of each declared tool's parameters, by name
Calls = list[tuple[str, str]]  # names and arguments
CALL_CHARS_MAX = 262_144  # of a call written as text; what is longer is let go as text
NAME = re.compile(r"[\w.-]{1,128}")
NO_ARGUMENTS = frozenset({"", "null", "None", "undefined", '""'})  # what calls of tools that take none are made with
END_MARK = re.compile(r"(?:</?[\w:|.-]{1,40}>|<\|[\w|.-]{1,40}>)?\s*")  # behind complete arguments, or nothing


class Unreadable(Exception):
    """The answer opens with a tool call that cannot be made out: a lost turn."""


def declared_tools(body: Mapping[str, Any]) -> dict[str, JSON]:
    functions = [tool["function"] for tool in body.get("tools", ()) if isinstance(tool.get("function"), dict)]
    return {function["name"]: function.get("parameters") or {} for function in functions}


# --- Calls in text --------------------------------------------------------------------------------------------------
Found = tuple[str, Any]  # a name, and arguments as text or as a value


def enclosed(text: str, start: str, end: str) -> Iterator[str]:
    """What stands between each start and the end behind it; the last may be left open. Takes linear time, unlike
    the regular expressions that this invites."""
    at = text.find(start)
    while at >= 0:
        at += len(start)
        stop = text.find(end, at)
        if stop < 0:
            yield text[at:]
            return
        yield text[at:stop]
        at = text.find(start, stop + len(end))


def section_calls(text: str, tools: Tools) -> Iterator[Found]:
    for inner in enclosed(text, "<|tool_call_begin|>", "<|tool_call_end|>"):
        head, _, arguments = inner.partition("<|tool_call_argument_begin|>")
        name, _, _ = head.strip().removeprefix("functions.").partition(":")
        yield name, arguments


def fullwidth_calls(text: str, tools: Tools) -> Iterator[Found]:
    for inner in enclosed(text, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"):
        name, _, arguments = inner.partition("<｜tool▁sep｜>")
        if name.strip() == "function":
            name, _, arguments = arguments.partition("\n")
        yield name.strip(), unfenced(arguments)


def bracketed_calls(text: str, tools: Tools) -> Iterator[Found]:
    listed = load_inner(text.removeprefix("[TOOL_CALLS]"))
    for item in listed if isinstance(listed, list) else ():
        yield from object_call(item)


def tagged_calls(text: str, tools: Tools) -> Iterator[Found]:
    for inner in map(str.strip, enclosed(text, "<tool_call>", "</tool_call>")):
        if inner.startswith("{"):
            yield from object_call(load_inner(inner))
        elif inner.startswith("<function="):
            yield from function_calls(inner, tools)
        else:
            name = NAME.match(inner)
            pairs = [
                (key.strip(), value.partition("<arg_value>")[2])
                for key, _, value in (p.partition("</arg_key>") for p in enclosed(inner, "<arg_key>", "</arg_value>"))
            ]
            if name and (pairs or name.end() == len(inner)):
                yield name[0], spelled_out(pairs, tools.get(name[0], {}))


def function_calls(text: str, tools: Tools) -> Iterator[Found]:
    for inner in enclosed(text, "<function=", "</function>"):
        if (name := NAME.match(inner)) is None:
            continue
        rest = inner[name.end() :].removeprefix(">").strip()
        pairs = [
            (key, value.removeprefix("\n").removesuffix("\n"))
            for key, _, value in (p.partition(">") for p in enclosed(rest, "<parameter=", "</parameter>"))
        ]
        yield name[0], spelled_out(pairs, tools.get(name[0], {})) if pairs else rest


def bare_calls(text: str, tools: Tools) -> Iterator[Found]:
    yield from object_call(load_inner(unfenced(text)))


def object_call(value: object) -> Iterator[Found]:
    """`{"name": …, "arguments": {…}}`, or with `parameters`."""
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        arguments = value.get("arguments", value.get("parameters"))
        if isinstance(arguments, dict | str):
            yield value["name"], arguments


def spelled_out(pairs: list[tuple[str, str]], schema: JSON) -> JSON:
    """Arguments given one by one as text: what the schema calls a string stays one."""
    properties = properties_of(schema)
    values: JSON = {}
    for name, text in pairs:
        kinds = kinds_of(properties.get(name))
        value = None if "string" in kinds else load_inner(text)
        values[name] = text if value is None else value
    return values


def unfenced(text: str) -> str:
    """Without the code fence around it."""
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and len(text) > 6:
        text = text[3:-3].removeprefix("json").strip()
    return text


# How a call begins, and how it is read. The last: whether no answer in words would ever begin so.
DIALECTS: list[tuple[str, Callable[[str, Tools], Iterator[Found]], bool]] = [
    ("<|tool_calls_section_begin|>", section_calls, True),
    ("<｜tool▁calls▁begin｜>", fullwidth_calls, True),
    ("[TOOL_CALLS]", bracketed_calls, True),
    ("<tool_call>", tagged_calls, False),
    ("<function=", function_calls, False),
]
FIRST_CHARS = "<[{`"  # of a call


def calls_in(text: str, tools: Tools) -> Calls | None:
    """The calls that a text which opens with one amounts to; None when it is text. Raises Unreadable."""
    text = text.strip()
    for marker, read, sure in DIALECTS:
        if text.startswith(marker):
            found = list(read(text, tools))
            if found and not sure and any(name not in tools for name, _ in found):
                return None  # it talks about something else
            calls = settled(found, tools)
            if calls is None:
                raise Unreadable
            return calls
    if text[:1] in ("{", "`"):
        return settled(list(bare_calls(text, tools)), tools)
    return None


def settled(found: list[Found], tools: Tools) -> Calls | None:
    """None unless there are calls, all of declared tools and with readable arguments."""
    calls: Calls = []
    for name, given in found:
        arguments = mended_arguments(given if isinstance(given, str) else dump(given).decode(), tools.get(name))
        if name not in tools or arguments is None:
            return None
        calls.append((name, arguments))
    return calls or None


def text_and_calls(text: str, tools: Tools) -> tuple[str, Calls] | None:
    """A whole answer that ends with calls: the text before them, and the calls. None when it has none. Raises
    Unreadable."""
    start = text.lstrip()
    if start[:1] in FIRST_CHARS and (calls := calls_in(start, tools)):
        return "", calls
    places = [at for marker, _, _ in DIALECTS if (at := text.find(marker)) > 0]
    if not places or text.count("```", 0, min(places)) % 2:  # in a code block it is being shown
        return None
    try:
        calls = calls_in(text[min(places) :], tools)
    except Unreadable:
        return None
    return (text[: min(places)].rstrip(), calls) if calls else None


# --- JSON mode ------------------------------------------------------------------------------------------------------
def found_json(text: str) -> str | None:
    """The JSON in an answer that should be nothing else: the very text where it is, else what stands in a code fence
    or between words. None where there is none."""
    if load_inner(text) is not None or text.strip() == "null":
        return text
    within = [block.removeprefix("json") for block in enclosed(text, "```", "```")]
    for opening, end in sorted((("{", "}"), ("[", "]")), key=lambda pair: text.find(pair[0])):
        within.append(text[text.find(opening) : text.rfind(end) + 1])
    return next((part.strip() for part in within if part.strip() and load_inner(part) is not None), None)


# --- Arguments ------------------------------------------------------------------------------------------------------
def mended_arguments(text: str, schema: JSON | None) -> str | None:
    """A call's arguments as the JSON text of an object; None for what cannot be read.

    Some models encode the whole or a nested value twice. A nested value is decoded only where the schema asks for a
    list or an object, and never where it allows text.
    """
    if text.strip() in NO_ARGUMENTS:
        return "{}"
    value = lenient(text)
    if isinstance(value, str):
        value = lenient(value)
    if value is None:
        value = told_apart(text)
    if not isinstance(value, dict):
        return None
    decoded = decoded_values(value, schema or {})
    if decoded is value and text[0] == "{" and load_inner(text) is not None:
        return text
    return dump(decoded).decode()


def told_apart(text: str) -> JSON | None:
    """The one object that arguments mean which say more than that: an empty object before it, the same once more, or
    behind it the mark with which the model ended its call. None where more than one could be meant."""
    decoder, rest, found = json.JSONDecoder(strict=False), text.strip(), None
    while rest[:1] == "{":
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        if found and value and value != found:
            return None
        found, rest = found or value, rest[end:].lstrip()
    return found if found is not None and END_MARK.fullmatch(rest) else None


def lenient(text: str) -> Any:
    """JSON with the mistakes that models make: fences around it, line ends in strings, a comma too many."""
    if (value := load_inner(text)) is not None:
        return value
    text = unfenced(text)
    for attempt in (text, re.sub(r",(\s*[}\]])", r"\1", text)):
        try:
            value = json.loads(attempt, strict=False)
            orjson.dumps(value)
        except (ValueError, RecursionError, orjson.JSONEncodeError):
            continue
        return value
    return None


def kinds_of(schema: object) -> frozenset[str]:
    kind = schema.get("type") if isinstance(schema, dict) else None
    return frozenset(name for name in (kind if isinstance(kind, list) else [kind]) if isinstance(name, str))


def properties_of(schema: JSON) -> JSON:
    """Clients' schemas are passed on unseen, so they may be anything."""
    properties = schema.get("properties")
    return properties if isinstance(properties, dict) else {}


def decoded_values(value: Any, schema: object) -> Any:
    """The value with what was encoded twice decoded; the same object where nothing was."""
    if not isinstance(schema, dict):
        return value
    if isinstance(value, str):
        kinds = kinds_of(schema)
        if "string" in kinds or not kinds & {"array", "object"} or value[:1] not in ("[", "{"):
            return value
        inner = load_inner(value)
        fits = (isinstance(inner, list) and "array" in kinds) or (isinstance(inner, dict) and "object" in kinds)
        return decoded_values(inner, schema) if fits else value
    if isinstance(value, dict):
        properties = properties_of(schema)
        decoded = {name: decoded_values(item, properties.get(name)) for name, item in value.items()}
        return decoded if any(decoded[name] is not value[name] for name in value) else value
    if isinstance(value, list):
        items = [decoded_values(item, schema.get("items")) for item in value]
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value
