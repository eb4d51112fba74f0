"""Custom tools, which take free text: models know only functions, so they see one with a single string (SPEC 3.5, 9.5).

Here is how such a tool is offered, and how an answer's calls become what its client knows. No I/O.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import orjson

from wire.chat import Completion, Event, frame
from wire.jsontext import JSON, dump

CUSTOM_PARAMETERS: JSON = {
    "type": "object",
    "properties": {"input": {"type": "string", "description": "The whole text for the tool, exactly as it is."}},
    "required": ["input"],
    "additionalProperties": False,
}


def as_function(spec: JSON, name: str) -> JSON:
    """The function that stands for a custom tool."""
    return {"name": name, "description": custom_description(spec), "parameters": CUSTOM_PARAMETERS}


def custom_description(spec: JSON) -> str:
    """A free-form tool's description, with its grammar, for models that only know functions."""
    words = [str(spec.get("description") or ""), "Give the tool's whole text as the string 'input'."]
    grammar = spec.get("format")
    if isinstance(grammar, dict) and isinstance(grammar.get("grammar"), dict):  # chat nests it once more
        grammar = grammar["grammar"]
    if isinstance(grammar, dict) and grammar.get("definition"):
        words.append(f"It must follow this {grammar.get('syntax', '')} grammar:\n{grammar['definition']}")
    return "\n\n".join(word for word in words if word)


def custom_arguments(text: object) -> str:
    """A custom call's text as the arguments of the function that stands for its tool."""
    return dump({"input": text}).decode()


def custom_input(arguments: str) -> str:
    """A custom tool's text out of the function call that stood in for it; models do not always keep to the schema."""
    try:
        given = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return arguments
    if isinstance(given, str):
        return given
    if not isinstance(given, dict):
        return arguments
    texts = [given["input"]] if "input" in given else list(given.values())
    return texts[0] if len(texts) == 1 and isinstance(texts[0], str) else arguments


class CustomCalls:
    """One chat answer whose calls of custom tools are told as such. `names` are those tools."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self._pieces: dict[int, list[str]] = {}  # of the arguments of custom calls that are still coming, by index
        self._head: JSON = {}  # a chunk of the stream

    def whole(self, completion: Completion) -> bytes:
        message = completion.body["choices"][0].get("message") or {}
        calls = message.get("tool_calls")
        if not calls or not any(self._is_custom(call) for call in calls):
            return completion.raw
        told = [self._told(call) if self._is_custom(call) else call for call in calls]
        choice = {**completion.body["choices"][0], "message": {**message, "tool_calls": told}}
        return dump({**completion.body, "choices": [choice]})

    def feed(self, event: Event) -> bytes:
        """The bytes of one chunk. The text of a custom call comes in one piece, when all of it is known."""
        choice = event.choice
        delta, finish = choice.get("delta") or {}, choice.get("finish_reason")
        calls = delta.get("tool_calls") or ()
        if not calls and not (finish and self._pieces):
            return event.raw
        self._head = event.chunk
        told = [piece for call in calls for piece in self._piece(call)]
        if finish:
            told += self._rest()
        delta = {name: value for name, value in delta.items() if name != "tool_calls"}
        if told:
            delta["tool_calls"] = told
        elif not delta and not finish:
            return b""
        return frame({**event.chunk, "choices": [{**choice, "delta": delta}]})

    def end(self) -> bytes:
        """What a stream without a finish reason still lacks."""
        if not self._pieces:
            return b""
        choice = {"index": 0, "delta": {"tool_calls": self._rest()}, "finish_reason": None}
        return frame({**self._head, "choices": [choice]})

    def _is_custom(self, call: JSON) -> bool:
        return (call.get("function") or {}).get("name") in self._names

    def _told(self, call: JSON) -> JSON:
        function = call["function"]
        custom = {"name": function["name"], "input": custom_input(function.get("arguments") or "")}
        kept = {name: value for name, value in call.items() if name != "function"}
        return {**kept, "type": "custom", "custom": custom}

    def _piece(self, call: JSON) -> list[JSON]:
        function, index = call.get("function") or {}, call.get("index", 0)
        told: list[JSON] = []
        if self._is_custom(call):
            self._pieces[index] = []
            kept = {name: value for name, value in call.items() if name != "function"}
            told = [{**kept, "type": "custom", "custom": {"name": function["name"], "input": ""}}]
        if index not in self._pieces:
            return [call]
        self._pieces[index].append(function.get("arguments") or "")
        return told

    def _rest(self) -> list[JSON]:
        texts: dict[int, Any] = {index: custom_input("".join(pieces)) for index, pieces in self._pieces.items()}
        self._pieces.clear()
        return [{"index": index, "custom": {"input": text}} for index, text in texts.items()]
