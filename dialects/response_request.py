"""A Responses request as a chat body, and errors about that body put back into the request's own terms.

Nothing is judged here that chat.chat_from judges: it gets the body, and `in_own_terms` says what it found with the
names and places that the client knows. No I/O.
"""

from __future__ import annotations

import re
from typing import Any

from dialects.compaction import Seal
from dialects.response_items import Source, Turns
from dialects.response_tools import Tools
from dialects.values import boolean, wrong_type
from wire.errors import InvalidRequest
from wire.jsontext import JSON

# What goes on to providers under its own name. The rest is this API's own business, or news to most providers.
PASSED_ON = (
    "model", "stream", "temperature", "top_p", "parallel_tool_calls", "max_output_tokens", "user", "stop", "seed",
    "presence_penalty", "frequency_penalty", "logit_bias", "top_k", "min_p", "repetition_penalty",
)  # fmt: skip


def check_types(request: JSON) -> None:
    """Of the fields that are only read here and in the encoder."""
    for name in ("text", "reasoning", "metadata"):
        if not isinstance(request.get(name, {}), dict):
            raise wrong_type(name, "an object")
    if not isinstance(request.get("instructions", ""), str):
        raise wrong_type("instructions", "a string")
    for name in ("store", "parallel_tool_calls"):
        if name in request:
            request[name] = boolean(request[name], name)


def input_items(request: JSON) -> list[Any]:
    given = request.get("input")
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    if isinstance(given, dict):
        given = [given]
    if not isinstance(given, list):
        raise wrong_type("input", "a string or a list of items")
    return [item for item in given if item is not None]


def is_of_items(body: JSON) -> bool:
    """Whether what came as a chat body is a request of this API."""
    return body.get("messages") is None and body.get("input") is not None


def chat_of_items(request: JSON, items: list[JSON], paths: list[str], seal: Seal) -> tuple[JSON, Tools, Turns]:
    """The request in chat's form, as yet unjudged, with the tools and turns it was made of. `paths` say where in the
    request each of the items is."""
    tools, turns = Tools(request.get("tools")), Turns(seal)
    for item, path in zip(items, paths, strict=True):
        turns.add(item, path)
    return chat_body(request, tools, turns), tools, turns


def chat_body(request: JSON, tools: Tools, turns: Turns) -> JSON:
    """The request in chat's form, as yet unjudged."""
    body = {name: request[name] for name in PASSED_ON if name in request}
    body["messages"] = turns.messages_after(request.get("instructions", ""))
    body["tool_choice"] = tools.choice(request.get("tool_choice"))  # may take tools away
    body["tools"] = tools.chat
    body["reasoning_effort"] = request.get("reasoning", {}).get("effort")
    wanted = request.get("text", {}).get("format")
    if isinstance(wanted, dict):  # chat_from knows a schema at this level
        wanted = {name: value for name, value in wanted.items() if value is not None}
    body["response_format"] = wanted
    return body


MESSAGE_PATH = re.compile(r"messages\[(\d+)\](?:\.tool_calls\[(\d+)\](?:\.function)?)?(\.content)?")
TOOL_PATH = re.compile(r"tools\[(\d+)\](?:\.function)?")
OWN_NAMES = {
    "response_format.json_schema": "text.format.schema",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "messages": "input",
}


def in_own_terms(error: InvalidRequest, sources: list[Source], tools: list[str]) -> InvalidRequest:
    """An error about a chat body as one about the request that it was made of."""

    def of_message(match: re.Match[str]) -> str:
        source = sources[int(match[1])]
        if match[2] is not None:
            return source.calls[int(match[2])]
        return f"{source.path}.{source.content}" if match[3] else source.path

    def translated(text: str) -> str:
        text = MESSAGE_PATH.sub(of_message, text)
        text = TOOL_PATH.sub(lambda match: tools[int(match[1])], text)
        for name, own in OWN_NAMES.items():
            if name in text:
                return text.replace(name, own)
        return text

    param = translated(error.param) if error.param else None
    return InvalidRequest(translated(error.message), param=param, code=error.code, status=error.status)
