"""Tools of the Responses API that the client runs though their schema is the server's: a shell, and patches of files.

Models here do not know these by heart, so each is offered as a function, and an answer's call is told as the item that
the client waits for (SPEC 9.5). No I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from wire.jsontext import JSON, dump, load_inner

PATCHES = ("create_file", "update_file", "delete_file")


@dataclass(frozen=True, slots=True)
class ClientTool:
    """One of them: as a function, and as the items of its calls."""

    description: str
    parameters: JSON
    id_prefix: str  # of its items
    field: str  # of an item, in which the call is told
    told: Callable[[JSON], JSON]  # a call's arguments as that field's value
    arguments: Callable[[JSON], JSON]  # and back


def schema(required: tuple[str, ...], **properties: JSON) -> JSON:
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


def text(description: str, **more: Any) -> JSON:
    return {"type": "string", "description": description, **more}


def whole(description: str) -> JSON:
    return {"type": "integer", "description": description}


def texts(description: str) -> JSON:
    return {"type": "array", "items": {"type": "string"}, "description": description}


def listed(value: object) -> list[str]:
    """Texts in a list, also where a model gave one alone."""
    given = value if isinstance(value, list) else [] if value is None else [value]
    return [part if isinstance(part, str) else dump(part).decode() for part in given]


def number(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def set_fields(given: JSON) -> JSON:
    return {name: value for name, value in given.items() if value is not None}


def shell_action(call: JSON) -> JSON:
    limits = {name: number(call.get(name)) for name in ("timeout_ms", "max_output_length")}
    return {"commands": listed(call.get("commands", call.get("command"))), **limits}


def local_shell_action(call: JSON) -> JSON:
    directory = call.get("working_directory")
    return {
        "type": "exec",
        "command": listed(call.get("command")),
        "env": {},
        "timeout_ms": number(call.get("timeout_ms")),
        "user": None,
        "working_directory": directory if isinstance(directory, str) else None,
    }


def operation(call: JSON) -> JSON:
    call = call["operation"] if isinstance(call.get("operation"), dict) else call
    kind = call.get("type") if call.get("type") in PATCHES else "update_file"
    told: JSON = {"type": kind, "path": str(call.get("path", ""))}
    return told if kind == "delete_file" else {**told, "diff": str(call.get("diff", ""))}


CLIENT_TOOLS: Mapping[str, ClientTool] = {
    "shell": ClientTool(
        "Run commands in a shell on the user's machine, and get each one's output and exit code.",
        schema(
            ("commands",),
            commands=texts("The commands, each a whole line for the shell."),
            timeout_ms=whole("The longest that they may take."),
            max_output_length=whole("The most characters of output to return."),
        ),
        "sh", "action", shell_action, set_fields,
    ),
    "local_shell": ClientTool(
        "Run one command on the user's machine, and get its output.",
        schema(
            ("command",),
            command=texts("The program and its arguments, such as ['bash', '-lc', 'ls -la']."),
            working_directory=text("Where to run it."),
            timeout_ms=whole("The longest that it may take."),
        ),
        "lsh", "action", local_shell_action,
        lambda action: set_fields({name: action.get(name) for name in ("command", "working_directory", "timeout_ms")}),
    ),
    "apply_patch": ClientTool(
        "Create, change or delete one file in the user's workspace.",
        schema(
            ("type", "path"),
            type=text("What to do.", enum=[*PATCHES]),
            path=text("The file's path, relative to the workspace."),
            diff=text(
                "For create_file: every line of the file with + in front. For update_file: hunks, each headed by a "
                "line that begins with @@, with lines of context (a blank in front), removed (-) and added (+) lines."
            ),
        ),
        "apc", "operation", operation, set_fields,
    ),
}  # fmt: skip


def runs_here(tool: JSON) -> bool:
    """Whether a tool of one of these types is for the client to run: a shell may also be in a vendor's container."""
    environment = tool.get("environment")
    kind = environment.get("type", "local") if isinstance(environment, dict) else "local"
    return bool(kind == "local")


def call_fields(kind: str, arguments: str) -> JSON:
    """What an item says of its call, from a function call's arguments, however they were written."""
    tool, given = CLIENT_TOOLS[kind], load_inner(arguments)
    if not isinstance(given, dict):
        given = {"commands": arguments, "command": arguments, "diff": arguments}
    return {tool.field: tool.told(given)}


def call_arguments(kind: str, item: JSON) -> JSON:
    """A function call's arguments out of an item of the conversation."""
    tool = CLIENT_TOOLS[kind]
    told = item.get(tool.field)
    return tool.arguments(told if isinstance(told, dict) else {})
