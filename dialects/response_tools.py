"""A Responses request's tools as chat's functions. No I/O.

Nothing is judged here that chat.chat_from judges.
"""

from __future__ import annotations

from typing import Any

from dialects.client_tools import CLIENT_TOOLS, runs_here
from dialects.custom_tools import as_function
from dialects.response_events import Offer
from dialects.values import wrong_type
from wire.errors import InvalidRequest
from wire.jsontext import JSON

COMPUTER_TOOLS = ("computer", "computer_use_preview")


def chat_name(namespace: object, name: Any) -> Any:
    """What providers call a tool: they know no namespaces."""
    return f"{namespace}__{name}" if namespace and isinstance(name, str) else name


def flat(spec: JSON) -> JSON:
    """A tool, a choice or a format in this API's own form; clients send chat's nested one too."""
    kind = spec.get("type") or "function"
    nested = spec.get(kind) if isinstance(kind, str) else None
    return {"type": kind, **nested} if isinstance(nested, dict) else {**spec, "type": kind}


def flat_choice(choice: Any) -> Any:
    """A tool choice in this API's own form."""
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind in ("auto", "none", "required", "any"):
        return "required" if kind == "any" else kind
    return flat(choice) if isinstance(choice, dict) else choice


class Tools:
    """The request's tools as chat's functions; what is built into OpenAI's servers is left out."""

    def __init__(self, tools: object) -> None:
        self.chat: Any = tools  # in chat's form; chat_from says so where it is no list
        self.paths: list[str] = []  # where each of them is in the request
        self.offers: dict[str, Offer] = {}
        if isinstance(tools, list):
            self.chat = []
            for index, tool in enumerate(tools):
                self._add(tool, f"tools[{index}]", None)

    def _add(self, tool: object, path: str, namespace: str | None) -> None:
        if not isinstance(tool, dict):
            raise wrong_type(path, "an object")
        kind = tool.get("type") or "function"
        if not isinstance(kind, str):
            raise wrong_type(f"{path}.type", "a string")
        if kind == "namespace" and namespace is None:
            nested = tool.get("tools")
            for index, inner in enumerate(nested if isinstance(nested, list) else ()):
                self._add(inner, f"{path}.tools[{index}]", str(tool.get("name", "")))
        elif kind in ("function", "custom"):
            self.chat.append(self._function(tool, kind, namespace))
            self.paths.append(path)
        elif kind in CLIENT_TOOLS and runs_here(tool):
            self.chat.append(client_function(kind))
            self.offers[kind] = Offer(kind, kind, None)
            self.paths.append(path)
        elif kind in COMPUTER_TOOLS:  # other tools of OpenAI's servers are a help; this one is the whole task
            words = "No provider here can use a computer: offer your own functions instead."
            raise InvalidRequest(words, param=path, code="unsupported_tool", status=422)

    def _function(self, tool: JSON, kind: str, namespace: str | None) -> JSON:
        spec = tool.get(kind, tool)
        if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
            return tool  # chat_from says what is wrong with it
        function = {name: spec[name] for name in ("name", "description", "parameters", "strict") if spec.get(name)}
        function["name"] = chat_name(namespace, spec["name"])
        if kind == "custom":
            function = as_function(spec, function["name"])
        if kind == "custom" or namespace:
            self.offers[function["name"]] = Offer(kind, spec["name"], namespace)
        return {"type": "function", "function": function}

    def choice(self, choice: Any) -> Any:
        """The tool choice in chat's form; None where it names a tool that is not offered to providers."""
        if not isinstance(choice, dict):
            return choice
        kind = choice.get("type")
        if kind == "allowed_tools":
            allowed = choice.get("tools")
            if not isinstance(allowed, list) or not all(isinstance(tool, dict) for tool in allowed):
                raise wrong_type("tool_choice.tools", "a list of objects")
            names = [chat_name(tool.get("namespace"), flat(tool).get("name", tool.get("type"))) for tool in allowed]
            self._keep(names)
            return choice.get("mode", "auto")
        if kind in ("function", "custom"):
            spec = choice.get(kind, choice)
            name = spec.get("name") if isinstance(spec, dict) else None
            if not isinstance(name, str):
                raise wrong_type("tool_choice.name", "a string")
            return {"type": "function", "name": chat_name(choice.get("namespace"), name)}
        if isinstance(kind, str) and kind in CLIENT_TOOLS and kind in self.offers:
            return {"type": "function", "name": kind}
        return choice if kind in ("auto", "none", "required", "any") else None

    def _keep(self, names: list[Any]) -> None:
        if isinstance(self.chat, list):
            kept = [n for n, tool in enumerate(self.chat) if flat(tool).get("name") in names]
            self.chat, self.paths = [self.chat[n] for n in kept], [self.paths[n] for n in kept]


def client_function(kind: str) -> JSON:
    tool = CLIENT_TOOLS[kind]
    spec = {"name": kind, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": spec}
