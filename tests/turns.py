"""What the tests of several dialects say: tools, calls and pictures in chat's form, and Responses requests parsed."""

import itertools
import json

from fake_provider import chunk

from dialects.responses import ResponsesDialect

NOW = 1_800_000_000.0
PIXEL = "data:image/png;base64,iVBORw0KGgo="


def call_of(id: str, name: str = "weather", arguments: str = "{}") -> dict:
    """A tool call in chat's form."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def parsed(dialect=None, **request):
    dialect = dialect or ResponsesDialect(tokens())
    return dialect.parse(json.dumps({"input": "hi"} | request).encode(), NOW)


def tokens():
    numbers = itertools.count()
    return lambda: f"{next(numbers):048x}"


def piece(index: int, arguments: str | None = None, *, id: str | None = None, name: str | None = None) -> dict:
    """One piece of one tool call."""
    call: dict = {"index": index, "function": {}}
    if id:
        call |= {"id": id, "type": "function"}
        call["function"]["name"] = name
    if arguments is not None:
        call["function"]["arguments"] = arguments
    return chunk(tool_calls=[call])


CALLS = chunk(finish="tool_calls")
WEATHER = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
