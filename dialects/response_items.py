"""A Responses request's items as chat's messages.

Nothing is judged here that chat.chat_from judges: it gets the messages, and where each comes from is remembered
(`Source`), so that an error can be told with the names and places that the client knows. No I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dialects.client_tools import CLIENT_TOOLS, call_arguments
from dialects.compaction import ITEM_TYPES, Seal, summary_in
from dialects.custom_tools import custom_arguments
from dialects.response_tools import chat_name
from dialects.values import wrong_type
from wire.errors import InvalidRequest
from wire.jsontext import JSON

ROLES = ("assistant", "developer", "system", "user")
CLIENT_CALLS = {f"{kind}_call": kind for kind in CLIENT_TOOLS}  # types of items, and the tools that they call
CALLS = frozenset({"function_call", "custom_tool_call", *CLIENT_CALLS})
OUTPUTS = frozenset(f"{kind}_output" for kind in CALLS)
NO_FILES = "Files are not kept here, so '{path}' cannot be resolved: send {instead} instead."


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

    def __init__(self, seal: Seal) -> None:
        self.sources: list[Source] = []
        self._seal = seal
        self._messages: list[JSON] = []
        self._system: list[str] = []
        self._reasoning = ""  # of the assistant's turn that comes next
        self._callers: dict[str, JSON] = {}  # by call id: the turn that made the call
        self._skipped: set[str] = set()

    def add(self, item: JSON, path: str) -> None:
        kind = item.get("type") or "message"
        if not isinstance(kind, str):
            raise wrong_type(f"{path}.type", "a string")
        if kind == "message":
            self._message(item, path)
        elif kind in CALLS:
            self._call(item, kind, path)
        elif kind in OUTPUTS:
            self._result(item, kind, path)
        elif kind == "reasoning":
            self._think(item)
        elif kind in ITEM_TYPES:
            self._append({"role": "user", "content": summary_in(item, self._seal)}, Source(path))
        elif isinstance(call_id := item.get("call_id"), str):  # of OpenAI's own tools, or unknown: nobody could read it
            self._skipped.add(call_id)

    def messages_after(self, instructions: str) -> list[JSON]:
        system = "\n\n".join(text for text in (instructions, *self._system) if text)
        if not system:
            return self._messages
        self.sources.insert(0, Source("instructions"))
        return [{"role": "system", "content": system}, *self._messages]

    def _append(self, message: JSON, source: Source) -> None:
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

    def _call(self, item: JSON, kind: str, path: str) -> None:
        name, arguments = chat_name(item.get("namespace"), item.get("name")), item.get("arguments")
        if kind == "custom_tool_call":
            arguments = custom_arguments(item.get("input"))
        elif kind in CLIENT_CALLS:
            name = CLIENT_CALLS[kind]
            arguments = call_arguments(name, item)
        call_id = item.get("call_id") or item.get("id")
        if not isinstance(call_id, str) or not call_id:
            raise wrong_type(f"{path}.call_id", "a non-empty string")
        turn = self._turn(path)
        function = {"name": name, "arguments": arguments}
        turn.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
        self.sources[-1].calls.append(path)
        self._callers[call_id] = turn

    def _result(self, item: JSON, kind: str, path: str) -> None:
        call_id, output = item.get("call_id") or item.get("id"), item.get("output")
        if isinstance(call_id, str) and call_id in self._skipped:
            return
        if not isinstance(call_id, str) or call_id not in self._callers:
            words = f"No tool call found for call_id '{call_id}': send the call as well, or a previous_response_id."
            raise InvalidRequest(words, param=f"{path}.call_id")
        if not output and kind.removesuffix("_output") in CLIENT_CALLS:  # all that these may say
            output = item.get("status")
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
