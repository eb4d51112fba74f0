"""A Messages request's tools as chat's functions.

Only what the client runs is offered to models: what Anthropic's own servers would run is left out, for nobody here
could. A conversation may add and withdraw tools on its way, and keep some back until a search has found them; what
counts is what is on offer at its end. No I/O.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dialects.message_blocks import SYSTEM_ROLES, invalid, text_in
from wire.jsontext import JSON

CHOICES = {"auto": "auto", "any": "required", "none": "none"}
SEARCH_ON_SERVERS = "tool_search_"  # how the types of tools begin with which Anthropic's servers look for others
# Tools that the client runs and whose schema Anthropic's models know by heart, by how their types begin.
KNOWN: Mapping[str, JSON] = {
    "bash_": {
        "description": "Run a command in a shell that stays open, and see its output.",
        "input_schema": {
            "type": "object",
            "properties": {
                "command": {"type": "string", "description": "The command to run."},
                "restart": {"type": "boolean", "description": "Start the shell anew instead."},
            },
        },
    },
    "text_editor_": {
        "description": "View, create and edit files.",
        "input_schema": {
            "type": "object",
            "properties": {
                "command": {"type": "string", "enum": ["view", "create", "str_replace", "insert"]},
                "path": {"type": "string", "description": "Absolute path of a file or folder."},
                "view_range": {"type": "array", "items": {"type": "integer"}, "description": "For view: two lines."},
                "file_text": {"type": "string", "description": "For create: the whole content."},
                "old_str": {"type": "string", "description": "For str_replace: what to replace, once in the file."},
                "new_str": {"type": "string", "description": "For str_replace: what to put there."},
                "insert_line": {"type": "integer", "description": "For insert: the line to insert after."},
                "insert_text": {"type": "string", "description": "For insert: the text."},
            },
            "required": ["command", "path"],
        },
    },
}


class Offer:
    """The tools of one request: those declared, and what the conversation has made of them."""

    def __init__(self, request: JSON) -> None:
        self._functions: dict[str, JSON] = {}
        self._kept_back: set[str] = set()
        self._found: set[str] = set()  # kept back no longer
        self._withdrawn: set[str] = set()
        tools = request.get("tools")
        if tools is not None and not isinstance(tools, list):
            raise invalid("tools", "Input should be a valid list")
        for place, tool in enumerate(tools or ()):
            self._declare(tool, f"tools.{place}")
        if any(isinstance(tool, dict) and is_search(tool) for tool in tools or ()):  # which nobody here carries out
            self._kept_back.clear()
        for block in blocks_in(request):
            self._change(block)

    def functions(self) -> list[JSON]:
        """What is on offer; all of it where nothing else would be."""
        there = {name: f for name, f in self._functions.items() if name not in self._withdrawn}
        shown = [f for name, f in there.items() if name in self._found or name not in self._kept_back]
        return shown or list(there.values())

    def _declare(self, tool: object, path: str) -> str | None:
        """The name under which models get to see a tool; None where they do not."""
        if not isinstance(tool, dict):
            raise invalid(path, "Input should be an object")
        function = chat_tool(tool, path)
        if function is None:
            return None
        name = str(function["function"]["name"])
        self._functions[name] = function
        if tool.get("defer_loading") is True:
            self._kept_back.add(name)
        return name

    def _change(self, block: JSON) -> None:
        match block.get("type"):
            case "tool_addition" if isinstance(tool := block.get("tool"), dict):
                name = tool.get("name")
                if tool.get("type") == "tool_definition":
                    name = self._declare(tool.get("definition"), "tool_addition.tool.definition")
                self._found.add(str(name))
                self._withdrawn.discard(str(name))
            case "tool_removal" if isinstance(tool := block.get("tool"), dict):
                self._withdrawn.add(str(tool.get("name")))
            case "tool_reference":
                self._found.add(str(block.get("tool_name")))
            case "tool_use":
                self._found.add(str(block.get("name")))


def is_search(tool: JSON) -> bool:
    return str(tool.get("type")).startswith(SEARCH_ON_SERVERS)


def blocks_in(request: JSON) -> Iterator[JSON]:
    """All blocks of the conversation that may say something about tools, those in results and summaries included."""
    turns = request.get("messages")
    for turn in turns if isinstance(turns, list) else ():
        for block in objects_in(turn, "content"):
            yield block
            yield from objects_in(block, "content" if block.get("type") == "tool_result" else "tool_changes")


def objects_in(holder: object, name: str) -> list[JSON]:
    held = holder.get(name) if isinstance(holder, dict) else None
    return [inner for inner in held if isinstance(inner, dict)] if isinstance(held, list) else []


def chat_tool(tool: JSON, path: str) -> JSON | None:
    """A tool as chat's function; None for one that the client does not run, or of which nobody knows how to call it."""
    kind = str(tool.get("type") or "custom")
    if kind == "function" and isinstance(tool.get("function"), dict):  # OpenAI's own form
        tool = {"input_schema": tool["function"].get("parameters"), **tool["function"]}
    elif kind not in ("custom", "function"):
        known = next((known for begins, known in KNOWN.items() if kind.startswith(begins)), None)
        if known is None:
            return None
        tool = {**tool, **known}
    function: JSON = {"name": text_in(tool, "name", path)}
    if not function["name"]:
        raise invalid(f"{path}.name", "String should have at least 1 character")
    if isinstance(tool.get("description"), str):
        function["description"] = tool["description"]
    schema = tool.get("input_schema") or tool.get("inputSchema") or tool.get("parameters") or {}
    if not isinstance(schema, dict):
        raise invalid(f"{path}.input_schema", "Input should be an object")
    function["parameters"] = schema
    return {"type": "function", "function": function}


def chat_choice(choice: object, tools: list[JSON]) -> tuple[Any, bool]:
    """The tool choice in chat's form, and whether parallel calls are forbidden. One of a tool that is not on offer is
    as good as none."""
    if choice is None or not tools:
        return None, False
    if isinstance(choice, str):
        choice = {"type": choice}
    if not isinstance(choice, dict):
        raise invalid("tool_choice", "Input should be an object")
    one_by_one = choice.get("disable_parallel_tool_use") is True
    kind = choice.get("type")
    if kind == "tool":
        name = text_in(choice, "name", "tool_choice.tool")
        offered = any(tool["function"]["name"] == name for tool in tools)
        return {"type": "function", "function": {"name": name}} if offered else "auto", one_by_one
    if kind not in CHOICES:
        raise invalid("tool_choice.type", "Input should be 'auto', 'any', 'tool' or 'none'")
    return CHOICES[kind], one_by_one


def effort_of_turn(request: JSON) -> object:
    """The effort that the conversation asks for on its way; the latest word counts."""
    turns = request.get("messages")
    configs = [t.get("output_config") for t in turns or () if isinstance(t, dict) and t.get("role") in SYSTEM_ROLES]
    efforts = [config.get("effort") for config in configs if isinstance(config, dict)]
    return next((effort for effort in reversed(efforts) if isinstance(effort, str)), None)
