"""A request's tools in the one form that adapters know, and the choice among them. No I/O."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from operator import is_
from typing import Any

import orjson

from dialects.custom_tools import as_function
from dialects.history import safe_name
from dialects.values import wrong_type
from wire.jsontext import JSON, plain_value, without_nulls

TOOL_FIELDS = frozenset({"tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"})
SCHEMA_NAMES = ("input_schema", "inputSchema", "parametersJsonSchema", "parameters_json_schema", "schema")
MODES = ("auto", "none", "required", "any")  # of choosing; the last is another word for the one before
REMEMBERED_MAX = 16  # lists of tools of clients that are at work
REMEMBERED_BYTES_MAX = 128 * 1024  # of each: as objects they take eight times as much, 16 MB in all


@dataclass(frozen=True, slots=True)
class Toolset:
    """A request's tools, mended. Never changed: many requests may share one."""

    tools: list[JSON] = field(default_factory=list)
    safe_names: Mapping[str, str] = field(default_factory=dict)  # of those that need one, by the client's own
    custom: frozenset[str] = frozenset()  # the client's own names of those that are custom tools to it
    chars: int = 0
    texts: Mapping[str, bytes] = field(default_factory=dict)  # of `tools`, where nothing had to be mended
    older: bool = False  # the client declared functions, as the API had them before


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
    same = len(given) == len(mended.tools) and all(map(is_, given, mended.tools))
    return replace(mended, texts={"tools": text}) if same else mended


def mended_tools(given: object) -> Toolset:
    """Tools as functions in today's nested form, each once, under names that every server takes. Raises InvalidRequest.

    MCP clients name tools with dots, slashes and blanks, and at length; strict servers refuse that.
    """
    if not isinstance(given, list):
        raise wrong_type("tools", "a list")
    by_name: dict[str, JSON] = {}
    custom = set()
    for index, tool in enumerate(given):
        if tool is None:
            continue
        if (offered := offered_tool(tool, f"tools[{index}]")) is not None:
            name = offered["function"]["name"]
            if name not in by_name and is_custom(tool):
                custom.add(name)
            by_name.setdefault(name, offered)
    safe_names = {name: safe for name in by_name if (safe := safe_name(name)) != name}
    tools = [with_name(tool, safe_names) for tool in by_name.values()] if safe_names else [*by_name.values()]
    return Toolset(tools, safe_names, frozenset(custom), len(orjson.dumps(tools)) if tools else 0)


def mend_tools(body: JSON) -> Toolset:
    """The body's tools in the form that adapters know; a choice only where there are tools. Raises InvalidRequest."""
    if TOOL_FIELDS.isdisjoint(body):
        return NO_TOOLS
    older = "functions" in body
    if older:
        functions = body.pop("functions")
        if not isinstance(functions, list):
            raise wrong_type("functions", "a list")
        older = "tools" not in body
        if older:
            body["tools"] = [{"type": "function", "function": function} for function in functions]
    if "function_call" in body:
        choice = body.pop("function_call")
        body.setdefault("tool_choice", {"type": "function", "function": choice} if isinstance(choice, dict) else choice)
    toolset = replace(mended_tools(body.get("tools", [])), older=older)
    if body.get("tool_choice") == "":
        del body["tool_choice"]
    if "tool_choice" in body:
        choice, allowed = mended_choice(body.pop("tool_choice"))
        if allowed is not None:
            toolset = narrowed(toolset, allowed)
        if isinstance(choice, dict):
            choice = with_name(choice, toolset.safe_names)
        if choice is not None:
            body["tool_choice"] = choice
    if not toolset.tools:
        for name in ("tools", "tool_choice", "parallel_tool_calls"):
            body.pop(name, None)
        return NO_TOOLS
    body["tools"] = toolset.tools
    return toolset


def with_name(tool: JSON, safe_names: Mapping[str, str]) -> JSON:
    """A tool, or a choice of one, under its safe name."""
    function = tool["function"]
    safe = safe_names.get(function["name"])
    return tool if safe is None else {**tool, "function": {**function, "name": safe}}


def is_custom(tool: JSON) -> bool:
    """Whether it takes free text; Anthropic calls every tool of the client so, but gives it a schema."""
    return tool.get("type") == "custom" and "input_schema" not in tool


def offered_tool(given: object, param: str) -> JSON | None:
    """A tool as a function; None for one that only its vendor's own servers run. The very object where it is one."""
    if not isinstance(given, dict):
        raise wrong_type(param, "an object")
    tool: JSON = without_nulls(given)
    kind = tool.get("type", "function")
    if not isinstance(kind, str):
        raise wrong_type(f"{param}.type", "a string")
    if is_custom(tool):
        spec = tool.get("custom", tool)
        return {"type": "function", "function": as_function(spec, named(spec, f"{param}.custom"))}
    function: Any
    if isinstance(tool.get("input_schema"), dict):
        function = {name: tool[name] for name in ("name", "description") if name in tool}
        function["parameters"] = tool["input_schema"]
    elif "function" in tool:
        function = with_schema(tool["function"])
    else:  # flat, as in the Responses API
        function = with_schema({name: value for name, value in tool.items() if name != "type"})
    if is_hosted(tool, kind, function):
        return None
    named(function, f"{param}.function")
    if not function.get("parameters"):
        function = {**function, "parameters": {"type": "object", "properties": {}}}
    elif not isinstance(function["parameters"], dict):
        raise wrong_type(f"{param}.function.parameters", "an object")
    return tool if function is tool.get("function") and "type" in tool else {"type": "function", "function": function}


def with_schema(function: Any) -> Any:
    """A function with its schema where chat has it: other APIs have other names for it."""
    if not isinstance(function, dict) or function.get("parameters") is not None:
        return function
    name = next((name for name in SCHEMA_NAMES if isinstance(function.get(name), dict)), None)
    return (
        function if name is None else {**{k: v for k, v in function.items() if k != name}, "parameters": function[name]}
    )


def is_hosted(tool: JSON, kind: str, function: Any) -> bool:
    """Whether a tool can only be run by servers that are not here: it tells of which kind it is, not what it takes."""
    if kind not in ("function", "custom"):
        return not (isinstance(function, dict) and isinstance(function.get("parameters"), dict))
    return len(tool) == 1 and tool.keys().isdisjoint({"type", "name", "function"})


def named(spec: Any, param: str) -> str:
    """A tool's name. Raises InvalidRequest."""
    if not isinstance(spec, dict) or not spec:
        raise wrong_type(param, "an object")
    if not isinstance(spec.get("name"), str) or not spec["name"]:
        raise wrong_type(f"{param}.name", "a non-empty string")
    return str(spec["name"])


def mended_choice(choice: object) -> tuple[Any, Collection[str] | None]:
    """A choice in chat's form, None for one of a tool that is not offered to anybody; and the names of the tools to
    which it narrows the offer, where it does."""
    if isinstance(choice, str):
        return ("required" if choice == "any" else choice), None
    if not isinstance(choice, dict):
        raise wrong_type("tool_choice", "a string or an object")
    kind = choice.get("type")
    if kind in MODES:
        return ("required" if kind == "any" else kind), None
    if kind == "allowed_tools":
        allowed = choice.get("allowed_tools", choice)
        tools = allowed.get("tools") if isinstance(allowed, dict) else None
        if not isinstance(tools, list):
            raise wrong_type("tool_choice.allowed_tools.tools", "a list")
        names = [chosen_name(tool) for tool in tools if isinstance(tool, dict)]
        return allowed.get("mode", "auto"), [name for name in names if name is not None]
    name = chosen_name(choice)
    if name is None and kind in (None, "function", "tool", "custom"):
        raise wrong_type("tool_choice.function.name", "a string")
    return (None if name is None else {"type": "function", "function": {"name": name}}), None


def chosen_name(choice: JSON) -> str | None:
    """The name of the tool that is chosen, nested or flat."""
    for spec in (choice.get("function"), choice.get("custom"), choice):
        if isinstance(spec, dict) and isinstance(spec.get("name"), str):
            return str(spec["name"])
    return None


def narrowed(toolset: Toolset, allowed: Collection[str]) -> Toolset:
    """The tools that a choice allows."""
    names = {toolset.safe_names.get(name, name) for name in allowed}
    tools = [tool for tool in toolset.tools if tool["function"]["name"] in names]
    return replace(toolset, tools=tools, chars=len(orjson.dumps(tools)), texts={})
