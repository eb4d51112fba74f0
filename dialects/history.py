"""A conversation as clients really send it, mended into the one form that every adapter reads.

Afterwards: roles are OpenAI's four, parts have types, every tool call has an id and is directly followed by its
result, names are ones that strict servers take. What needs no mending is passed on as the very object that came in.
No I/O.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import blake2b
from operator import is_
from typing import Any

import orjson

from dialects.custom_tools import custom_arguments
from dialects.message_blocks import TOOL_ERROR
from dialects.parts import THOUGHT_PART_TYPES, kind_of, mended_parts, result_content
from dialects.values import wrong_type
from wire.chat import flat_text
from wire.errors import InvalidRequest
from wire.jsontext import JSON, without_nulls

ROLES = frozenset({"system", "user", "assistant", "tool"})
RESULT_ROLES = frozenset({"tool", "function"})
PLAIN_ROLES = ("user", "assistant", "system")
ROLE_ALIASES = {"developer": "system", "function": "tool"}
SAFE_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_-]{0,63}")  # of a tool, on the strictest servers


def safe_name(name: str) -> str:
    """A tool's name that every server takes: the same one each time, and another for another tool."""
    if SAFE_NAME.fullmatch(name):
        return name
    tail = blake2b(name.encode(errors="replace"), digest_size=3).hexdigest()
    return re.sub(r"^(?![a-zA-Z_])", "_", re.sub(r"[^a-zA-Z0-9_-]", "_", name))[:57] + "_" + tail


class History:
    """The messages of one request while they are mended: what they hold, and which tool calls wait for a result."""

    def __init__(self, messages: object, tool_names: Mapping[str, str]) -> None:
        """`tool_names` are the safe names of the declared tools that need one, by the client's own."""
        if not isinstance(messages, list):
            raise InvalidRequest("'messages' must be a non-empty list.", param="messages")
        if not messages:
            raise InvalidRequest("'messages' must not be empty.", param="messages")
        self.chars = 0
        self.has_images = False
        self.first_user_text = ""
        self._seen_user = False
        self._has_calls = False  # or results of some
        self._tool_names = tool_names
        self._waiting: list[str] = []  # ids of tool calls that have no result yet
        self._made_ids: set[str] = set()  # of calls that came without one
        self.mended: list[JSON] = []
        for index, message in enumerate(messages):
            if self._plain(message):
                self.mended.append(message)
                continue
            for unfolded in unfolded_blocks(message):
                if (mended := self._mended(unfolded, f"messages[{index}]")) is not None:
                    self.mended.append(mended)
        if self._has_calls:
            self.mended = paired(self.mended)
        if not self.mended:
            raise InvalidRequest("'messages' holds only empty turns.", param="messages")

    def _plain(self, message: Any) -> bool:
        """Whether a message is nothing but role and text, as most are: then there is nothing to mend."""
        if type(message) is not dict or len(message) != 2:
            return False
        role, text = message.get("role"), message.get("content")
        if type(text) is not str or not text or role not in PLAIN_ROLES:
            return False
        self.chars += len(text)
        if role == "user" and not self._seen_user:
            self._seen_user = True
            self.first_user_text = text
        return True

    def _mended(self, message: object, param: str) -> JSON | None:
        if not isinstance(message, dict):
            raise wrong_type(param, "an object")
        role = message.get("role")
        if role is None:
            raise InvalidRequest(f"'{param}' has no role.", param=f"{param}.role")
        if not isinstance(role, str) or (role not in ROLES and role not in ROLE_ALIASES):
            raise wrong_type(f"{param}.role", f"one of {', '.join(sorted({*ROLES, *ROLE_ALIASES}))}")
        message = with_result_as_text(message, param) if role in RESULT_ROLES else with_set_fields(message)
        if role in ROLE_ALIASES:
            message = {**message, "role": ROLE_ALIASES[role]}
        if "name" in message and isinstance(message["name"], str):
            message = self._with_safe_name(message)
        message = self._with_content(message, param)
        if role == "assistant":
            return self._assistant(message, param)
        if message["role"] == "tool":
            return self._tool(message)
        if role == "user" and not self._seen_user:
            self._seen_user = True
            self.first_user_text = flat_text(message["content"])
        return message

    def _with_safe_name(self, message: JSON) -> JSON:
        """A speaker's name without blanks and the like; a tool's under which it was declared."""
        name = message["name"]
        safe = self._tool_names.get(name) or re.sub(r"[^a-zA-Z0-9_-]+", "_", name)[:64].strip("_")
        if safe == name:
            return message
        kept = {field: value for field, value in message.items() if field != "name"}
        return {**kept, "name": safe} if safe else kept

    def _with_content(self, message: JSON, param: str) -> JSON:
        content = message.get("content")
        if isinstance(content, str):
            self.chars += len(content)
            return message
        if isinstance(content, list):
            return self._with_parts(message, content, f"{param}.content")
        if content is None:
            return message if message["role"] == "assistant" else {**message, "content": ""}
        if isinstance(content, dict):
            return self._with_parts(message, [content], f"{param}.content")
        raise wrong_type(f"{param}.content", "a string, null or a list of parts")

    def _with_parts(self, message: JSON, parts: list[Any], param: str) -> JSON:
        parts = [part for part in parts if part is not None]
        if message["role"] == "assistant":
            parts = [part for part in parts if kind_of(part) not in THOUGHT_PART_TYPES]
        mended = [mended for index, part in enumerate(parts) for mended in self._parts(part, f"{param}[{index}]")]
        if not mended:  # a list of nothing, which servers refuse
            return {**message, "content": None if message["role"] == "assistant" else ""}
        same = len(message["content"]) == len(mended) and all(map(is_, message["content"], mended))
        return message if same else {**message, "content": mended}

    def _parts(self, part: object, param: str) -> list[JSON]:
        parts = mended_parts(part, param)
        for mended in parts:
            if mended["type"] == "text":
                self.chars += len(mended["text"])
            elif mended["type"] == "image_url":
                self.has_images = True
        return parts

    def _assistant(self, message: JSON, param: str) -> JSON | None:
        if "function_call" in message:
            call = message.pop("function_call") if "tool_calls" in message else message["function_call"]
            message = {name: value for name, value in message.items() if name != "function_call"}
            message.setdefault("tool_calls", [{"type": "function", "function": call}])
        calls = message.get("tool_calls")
        if not calls:
            if "tool_calls" in message:
                message = {name: value for name, value in message.items() if name != "tool_calls"}
            return message if message.get("content") else None  # an empty turn says nothing, and some refuse it
        if not isinstance(calls, list):
            raise wrong_type(f"{param}.tool_calls", "a list")
        self._waiting, self._has_calls = [], True
        mended = [self._call(call, f"{param}.tool_calls[{index}]") for index, call in enumerate(calls)]
        same = all(a is b for a, b in zip(calls, mended, strict=True))
        return message if same else {**message, "tool_calls": mended}

    def _call(self, call: object, param: str) -> JSON:
        if not isinstance(call, dict):
            raise wrong_type(param, "an object")
        function = call.get("function")
        if function is None and isinstance(call.get("name"), str):  # flat, with its arguments as text or as an object
            function = {"name": call["name"], "arguments": call.get("arguments", call.get("args"))}
            call = {name: value for name, value in call.items() if name not in ("name", "arguments", "args")}
        if isinstance(custom := call.get("custom"), dict):
            function = {"name": custom.get("name"), "arguments": custom_arguments(custom.get("input"))}
            call = {name: value for name, value in call.items() if name not in ("custom", "type")}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise wrong_type(f"{param}.function", "an object with a name")
        arguments, name = arguments_text(function.get("arguments")), safe_name(function["name"])
        self.chars += len(arguments)
        given = call.get("id")
        call_id = str(given) if given else ""
        if not call_id or call_id in self._waiting:  # some give two calls one id
            call_id = f"call_{len(self.mended)}_{len(self._waiting)}"
            self._made_ids.add(call_id)
        self._waiting.append(call_id)
        same = call_id == given and arguments == function.get("arguments") and name == function["name"]
        if same and call.get("type") == "function" and function is call.get("function"):
            return call
        mended = {**call, "id": call_id, "type": "function"}
        mended["function"] = {**function, "name": name, "arguments": arguments}
        return mended

    def _tool(self, message: JSON) -> JSON | None:
        """A result belongs to the call it names, else to the first one that waits without a name of its own; an
        orphan is dropped, this one here or one with a name by `paired`."""
        self._has_calls = True
        call_id = message.get("tool_call_id")
        if call_id:
            if not isinstance(call_id, str):
                message = {**message, "tool_call_id": str(call_id)}
            if message["tool_call_id"] in self._waiting:
                self._waiting.remove(message["tool_call_id"])
                return message
        unnamed = [waiting for waiting in self._waiting if not call_id or waiting in self._made_ids]
        if not unnamed:
            return message if call_id else None
        self._waiting.remove(unnamed[0])
        return {**message, "tool_call_id": unnamed[0]}


def with_set_fields(message: JSON) -> JSON:
    """A message without nulls, but for content that is one."""
    kept = without_nulls(message)
    return {"content": None, **kept} if kept is not message and "content" in message and "content" not in kept else kept


def with_result_as_text(message: JSON, param: str) -> JSON:
    """A tool's result, whose content is the tool's own affair."""
    content = message.get("content")
    told = result_content(content, f"{param}.content")
    fields = {name: value for name, value in message.items() if name != "content"}
    kept = without_nulls(fields)
    return message if told is content and kept is fields else {**kept, "content": told}


def unfolded_blocks(message: Any) -> list[Any]:
    """A message in the Messages API's form as chat has it: its calls as calls, and results as messages in front of what
    else the user says."""
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, list):
        return [message]
    blocks = [
        block for block in content if isinstance(block, dict) and block.get("type") in ("tool_use", "tool_result")
    ]
    if not blocks:
        return [message]
    calls = [called_block(block) for block in blocks if block["type"] == "tool_use"]
    results = [result_of_block(block) for block in blocks if block["type"] == "tool_result"]
    rest = [part for part in content if all(part is not block for block in blocks)]
    message = {**message, "content": rest or None}
    if calls:
        given = message.get("tool_calls")
        message["tool_calls"] = [*(given if isinstance(given, list) else ()), *calls]
    return [*results, message] if rest or calls else results


def called_block(block: JSON) -> JSON:
    function = {"name": block.get("name"), "arguments": block.get("input")}
    return {"id": block.get("id"), "type": "function", "function": function}


def result_of_block(block: JSON) -> JSON:
    content = block.get("content")
    if block.get("is_error") is True:
        told = content if isinstance(content, list) else [] if content is None else [content]
        content = [TOOL_ERROR, *told]
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content}


def paired(messages: list[JSON]) -> list[JSON]:
    """Every step's calls directly followed by their results, in their order; what has no counterpart is left out,
    because servers refuse it. Images among the results become a user's message behind them: only users show some."""
    order: list[JSON | None] = [*messages]
    results: dict[int, dict[str, JSON]] = {}  # by the place of the message with the calls, and their ids
    asked = -1  # the place of the last calls
    for place, message in enumerate(messages):
        if message["role"] == "tool":
            order[place] = None
            if asked >= 0:
                results[asked].setdefault(message["tool_call_id"], message)
        elif "tool_calls" in message:
            asked, results[place] = place, {}
    out: list[JSON] = []
    for place, kept in enumerate(order):
        if kept is None:
            continue
        if place not in results:
            out.append(kept)
            continue
        step = with_answered_calls(kept, results[place])
        if "tool_calls" in step or step.get("content"):
            out.append(step)
        out += with_images_apart([results[place][call["id"]] for call in step.get("tool_calls", ())])
    return out


def with_answered_calls(message: JSON, results: Mapping[str, JSON]) -> JSON:
    calls = [call for call in message["tool_calls"] if call["id"] in results]
    if len(calls) == len(message["tool_calls"]):
        return message
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "tool_calls": calls} if calls else rest


def with_images_apart(results: list[JSON]) -> list[JSON]:
    contents = [result.get("content") for result in results]
    if not any(isinstance(content, list) for content in contents):
        return results
    texts = [{**result, "content": flat_text(result.get("content")) or "[image]"} for result in results]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    images = [part for part in parts if part.get("type") == "image_url"]
    told = {"type": "text", "text": "Images from the tool results above:"}
    return [*texts, {"role": "user", "content": [told, *images]}] if images else texts


def arguments_text(arguments: object) -> str:
    """A tool call's arguments as the JSON text of an object: clients send objects, nothing, JSON text encoded twice, or
    what a model left behind when it was cut off, on which servers choke."""
    if arguments is None or arguments == "":
        return "{}"
    text, value = arguments, arguments
    for _ in range(2):
        if not isinstance(value, str):
            break
        try:
            text, value = value, orjson.loads(value)
        except orjson.JSONDecodeError:
            break
    if isinstance(value, dict):
        return text if isinstance(text, str) else orjson.dumps(value).decode()
    return orjson.dumps({"value": value}).decode()
