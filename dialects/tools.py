"""A request's tools in the one form that adapters know, and the choice among them. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import orjson

from dialects.history import safe_name, wrong_type
from wire.jsontext import JSON, plain_value

TOOL_FIELDS = frozenset({"tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"})
REMEMBERED_MAX = 16  # lists of tools of clients that are at work
REMEMBERED_BYTES_MAX = 128 * 1024  # of each: as objects they take eight times as much, 16 MB in all


@dataclass(frozen=True, slots=True)
class Toolset:
    """A request's tools, mended. Never changed: many requests may share one."""

    tools: list[JSON] = field(default_factory=list)
    safe_names: Mapping[str, str] = field(default_factory=dict)  # of those that need one, by the client's own
    chars: int = 0
    texts: Mapping[str, bytes] = field(default_factory=dict)  # of `tools`, where nothing had to be mended


NO_TOOLS = Toolset()


def toolset_of(text: bytes) -> Toolset:
    """The tools as they came, remembered: a client sends the same ones each time. Raises InvalidRequest, and ValueError
    where they cannot go on as text."""
    return remembered(text) if len(text) <= REMEMBERED_BYTES_MAX else remembered.__wrapped__(text)


@lru_cache(maxsize=REMEMBERED_MAX)
def remembered(text: bytes) -> Toolset:
    given = plain_value(text)
    if not given:
        raise ValueError
    mended = mended_tools(given)
    same = all(a is b for a, b in zip(given, mended.tools, strict=True))
    return replace(mended, texts={"tools": text}) if same else mended


def mended_tools(given: object) -> Toolset:
    """Tools in today's nested form, under names that every server takes. Raises InvalidRequest.

    MCP clients name tools with dots, slashes and blanks, and at length; strict servers refuse that.
    """
    if not isinstance(given, list):
        raise wrong_type("tools", "a list")
    tools = [mended_tool(tool, f"tools[{index}]") for index, tool in enumerate(given)]
    functions = [tool["function"] for tool in tools if isinstance(tool.get("function"), dict)]
    safe_names = {f["name"]: safe for f in functions if (safe := safe_name(f["name"])) != f["name"]}
    if safe_names:
        tools = [with_name(tool, safe_names) if "function" in tool else tool for tool in tools]
    return Toolset(tools, safe_names, len(orjson.dumps(tools)) if tools else 0)


def mend_tools(body: JSON, toolset: Toolset | None) -> Toolset:
    """The body's tools in the form that adapters know; a choice only where there are tools. Raises InvalidRequest."""
    if toolset is None and TOOL_FIELDS.isdisjoint(body):
        return NO_TOOLS
    if "functions" in body:
        functions = body.pop("functions")
        if not isinstance(functions, list):
            raise wrong_type("functions", "a list")
        if "tools" not in body and toolset is None:
            body["tools"] = [{"type": "function", "function": function} for function in functions]
    if "function_call" in body:
        choice = body.pop("function_call")
        body.setdefault("tool_choice", {"type": "function", "function": choice} if isinstance(choice, dict) else choice)
    toolset = toolset or mended_tools(body.get("tools", []))
    if not toolset.tools:
        for name in ("tools", "tool_choice", "parallel_tool_calls"):
            body.pop(name, None)
        return NO_TOOLS
    body["tools"] = toolset.tools
    if "tool_choice" in body:
        choice = mended_choice(body["tool_choice"])
        named = isinstance(choice, dict) and isinstance(choice.get("function"), dict)
        body["tool_choice"] = with_name(choice, toolset.safe_names) if toolset.safe_names and named else choice
    return toolset


def with_name(tool: Any, safe_names: Mapping[str, str]) -> JSON:
    function = tool["function"]
    name = function.get("name")
    if not isinstance(name, str):
        raise wrong_type("tool_choice.function.name", "a string")
    return {**tool, "function": {**function, "name": safe_names.get(name, name)}}


def mended_tool(tool: object, param: str) -> JSON:
    if not isinstance(tool, dict):
        raise wrong_type(param, "an object")
    if tool.get("type", "function") != "function" and "function" not in tool:
        return tool
    function = tool.get("function")
    if function is None and "name" in tool:  # flat, as in the Responses API
        function = {name: value for name, value in tool.items() if name != "type"}
    if not isinstance(function, dict):
        raise wrong_type(f"{param}.function", "an object")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise wrong_type(f"{param}.function.name", "a non-empty string")
    if not function.get("parameters"):
        function = {**function, "parameters": {"type": "object", "properties": {}}}
    elif not isinstance(function["parameters"], dict):
        raise wrong_type(f"{param}.function.parameters", "an object")
    if "type" in tool and function is tool.get("function"):
        return tool
    return {"type": "function", "function": function}


def mended_choice(choice: object) -> object:
    if isinstance(choice, str):
        return "required" if choice == "any" else choice
    if not isinstance(choice, dict):
        raise wrong_type("tool_choice", "a string or an object")
    kind = choice.get("type")
    if kind in ("auto", "none", "required", "any"):
        return "required" if kind == "any" else kind
    if kind in ("tool", "function") and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice
