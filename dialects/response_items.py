"""A Responses request's tools and items as chat's tools and messages, and errors put back into its own terms.

Nothing is judged here that chat.chat_from judges: it gets the messages, and `in_own_terms` says what it found with the
names and places that the client knows (`Source`). No I/O.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from dialects.history import IMAGE_PART_TYPES, TEXT_PART_TYPES, wrong_type
from dialects.response_events import Offer
from wire.errors import InvalidRequest
from wire.jsontext import JSON, dump

ROLES = ("assistant", "developer", "system", "user")
COMPUTER_TOOLS = ("computer", "computer_use_preview")
NO_FILES = "Files are not kept here, so '{path}' cannot be resolved: send {instead} instead."


# --- Tools ----------------------------------------------------------------------------------------------------------
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
            function.update(description=custom_description(spec), parameters=CUSTOM_PARAMETERS)
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
            self._keep([chat_name(tool.get("namespace"), flat(tool).get("name")) for tool in allowed])
            return choice.get("mode", "auto")
        if kind in ("function", "custom"):
            spec = choice.get(kind, choice)
            name = spec.get("name") if isinstance(spec, dict) else None
            if not isinstance(name, str):
                raise wrong_type("tool_choice.name", "a string")
            return {"type": "function", "name": chat_name(choice.get("namespace"), name)}
        return choice if kind in ("auto", "none", "required", "any") else None

    def _keep(self, names: list[Any]) -> None:
        if isinstance(self.chat, list):
            kept = [n for n, tool in enumerate(self.chat) if flat(tool).get("name") in names]
            self.chat, self.paths = [self.chat[n] for n in kept], [self.paths[n] for n in kept]


CUSTOM_PARAMETERS: JSON = {
    "type": "object",
    "properties": {"input": {"type": "string", "description": "The whole text for the tool, exactly as it is."}},
    "required": ["input"],
    "additionalProperties": False,
}


def custom_description(spec: JSON) -> str:
    """A free-form tool's description, with its grammar, for models that only know functions."""
    words = [str(spec.get("description") or ""), "Give the tool's whole text as the string 'input'."]
    grammar = spec.get("format")
    if isinstance(grammar, dict) and grammar.get("definition"):
        words.append(f"It must follow this {grammar.get('syntax', '')} grammar:\n{grammar['definition']}")
    return "\n\n".join(word for word in words if word)


# --- Turns ----------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Source:
    """Where in the request a chat message comes from."""

    path: str
    content: str = "content"  # the name of its content there
    calls: list[str] = field(default_factory=list)  # paths of its tool calls


class Turns:
    """Chat messages made of items. What a model said in one go is one assistant message, calls and reasoning included.

    System and developer items join the instructions in front, because many models take them nowhere else.
    """

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self._messages: list[JSON] = []
        self._system: list[str] = []
        self._reasoning = ""  # of the assistant's turn that comes next
        self._images: list[JSON] = []  # of tool results: chat has no place for them but the user's next message
        self._images_path = ""
        self._callers: dict[str, JSON] = {}  # by call id: the turn that made the call
        self._skipped: set[str] = set()

    def add(self, item: JSON, path: str) -> None:
        match item.get("type") or "message":
            case "message":
                self._message(item, path)
            case "function_call" | "custom_tool_call":
                self._call(item, path)
            case "function_call_output" | "custom_tool_call_output":
                self._result(item, path)
            case "reasoning":
                self._think(item)
            case _:  # of OpenAI's own tools, or unknown: nothing that a provider could read
                if isinstance(call_id := item.get("call_id"), str):
                    self._skipped.add(call_id)

    def messages_after(self, instructions: str) -> list[JSON]:
        self._show_images()
        system = "\n\n".join(text for text in (instructions, *self._system) if text)
        if not system:
            return self._messages
        self.sources.insert(0, Source("instructions"))
        return [{"role": "system", "content": system}, *self._messages]

    def _append(self, message: JSON, source: Source) -> None:
        self._show_images()
        if message["role"] != "assistant":
            self._reasoning = ""
        self._messages.append(message)
        self.sources.append(source)

    def _message(self, item: JSON, path: str) -> None:
        role, content = item.get("role"), item.get("content")
        if role not in ROLES:
            raise wrong_type(f"{path}.role", f"one of {', '.join(ROLES)}")
        if role == "user":
            if isinstance(content, list):
                content = [user_part(part, f"{path}.content[{n}]") for n, part in enumerate(content)]
            self._append({"role": role, "content": content}, Source(path))
            return
        text = text_of(content, f"{path}.content")
        if role != "assistant":
            self._system.append(text)
        elif text:
            turn = self._turn(path)
            turn["content"] = f"{turn['content']}\n{text}" if turn["content"] else text

    def _turn(self, path: str) -> JSON:
        """The assistant's turn that is going on, or a new one."""
        if not self._messages or self._messages[-1]["role"] != "assistant":
            self._append({"role": "assistant", "content": None}, Source(path))
            if self._reasoning:
                self._messages[-1]["reasoning_content"], self._reasoning = self._reasoning, ""
        return self._messages[-1]

    def _call(self, item: JSON, path: str) -> None:
        call_id, arguments = item.get("call_id"), item.get("arguments")
        if not isinstance(call_id, str) or not call_id:
            raise wrong_type(f"{path}.call_id", "a non-empty string")
        if item["type"] == "custom_tool_call":
            arguments = dump({"input": item.get("input")}).decode()
        turn = self._turn(path)
        function = {"name": chat_name(item.get("namespace"), item.get("name")), "arguments": arguments}
        turn.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
        self.sources[-1].calls.append(path)
        self._callers[call_id] = turn

    def _result(self, item: JSON, path: str) -> None:
        call_id, output = item.get("call_id"), item.get("output")
        if isinstance(call_id, str) and call_id in self._skipped:
            return
        if not isinstance(call_id, str) or call_id not in self._callers:
            words = f"No tool call found for call_id '{call_id}': send the call as well, or a previous_response_id."
            raise InvalidRequest(words, param=f"{path}.call_id")
        if isinstance(output, list):
            output = self._result_text(output, path)
        place = self._place_after(self._callers[call_id])
        self._messages.insert(place, {"role": "tool", "tool_call_id": call_id, "content": output})
        self.sources.insert(place, Source(path, "output"))

    def _place_after(self, turn: JSON) -> int:
        """Behind a turn and the results that follow it: in chat nothing else may come between, among items it may."""
        place = len(self._messages)
        while self._messages[place - 1] is not turn:
            place -= 1
        while place < len(self._messages) and self._messages[place]["role"] == "tool":
            place += 1
        return place

    def _result_text(self, output: list[Any], path: str) -> str:
        """A result of parts, or any other list, as text."""
        kinds = [str(part.get("type")) if isinstance(part, dict) else "" for part in output]
        if not all(kind in TEXT_PART_TYPES or kind in IMAGE_PART_TYPES for kind in kinds):
            return dump(output).decode()
        images = [user_part(p, path) for p, kind in zip(output, kinds, strict=True) if kind in IMAGE_PART_TYPES]
        if images:
            self._images += images
            self._images_path = path
        texts = [part for part, kind in zip(output, kinds, strict=True) if kind in TEXT_PART_TYPES]
        return text_of(texts, f"{path}.output") or ("[image]" if images else "")

    def _show_images(self) -> None:
        if self._images:
            images, self._images = self._images, []
            caption = {"type": "text", "text": "The images in the tool results:"}
            self._append({"role": "user", "content": [caption, *images]}, Source(self._images_path, "output"))

    def _think(self, item: JSON) -> None:
        """Reasoning goes back to the platforms that want to see it again."""
        parts = item.get("content") or item.get("summary")
        if not isinstance(parts, list):
            return
        texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
        thought = "\n".join(texts)
        if self._messages and self._messages[-1]["role"] == "assistant":
            turn = self._messages[-1]
            turn["reasoning_content"] = "\n".join(filter(None, (turn.get("reasoning_content"), thought)))
        else:
            self._reasoning = "\n".join(filter(None, (self._reasoning, thought)))


def user_part(part: Any, path: str) -> Any:
    """A user's content part, of which chat_from knows all but uploaded files."""
    if not isinstance(part, dict):
        return part
    kind = part.get("type")
    if kind == "input_image" and part.get("file_id") and not part.get("image_url"):
        instead = "'image_url' with a URL or a data: URL"
        raise InvalidRequest(NO_FILES.format(path=f"{path}.file_id", instead=instead), param=f"{path}.file_id")
    if kind == "input_file":
        if not isinstance(part.get("file_data"), str):
            words = NO_FILES.format(path=path, instead="'file_data'")
            raise InvalidRequest(words, param=path)
        named = {name: part[name] for name in ("filename", "file_data") if part.get(name)}
        return {"type": "file", "file": named}
    return part


def text_of(content: object, path: str) -> str:
    """Content of which only text makes sense."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise wrong_type(path, "a string or a list of parts")
    texts = []
    for index, part in enumerate(content):
        text = part.get("text", part.get("refusal")) if isinstance(part, dict) else part
        if not isinstance(text, str):
            raise wrong_type(f"{path}[{index}].text", "a string")
        texts.append(text)
    return "\n".join(texts)


# --- Errors ---------------------------------------------------------------------------------------------------------
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
