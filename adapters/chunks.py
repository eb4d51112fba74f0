"""A whole answer as the chunks of a stream, and a stream's chunks as one whole answer: for platforms that answer in the
form that nobody asked for. Also what a whole answer must say of itself before it goes out (SPEC 3.11). No I/O."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

from adapters.answers import find_usage, has_head, whole_number
from wire.chat import CUT_OFF, Completion, Usage, chunk_of, told_usage
from wire.jsontext import JSON, dump, load_inner


def as_chunks(body: JSON) -> list[JSON]:
    """A whole answer as chunks; a call as two pieces, as clients know it from streams. A call that was cut off is left
    out, as in a stream (SPEC 14.7)."""
    choice = body["choices"][0]
    cut = choice.get("finish_reason") in CUT_OFF
    delta = {name: value for name, value in (choice.get("message") or {}).items() if value is not None}
    calls = delta.pop("tool_calls", None) or ()
    chunks = [chunk_of(body, delta)] if delta else []
    for index, call in enumerate(call for call in calls if not cut or has_arguments(call)):
        chunks += [chunk_of(body, {"tool_calls": [piece]}) for piece in call_pieces(index, call)]
    return [*chunks, chunk_of(body, {}, choice.get("finish_reason") or "stop")]


def has_arguments(call: JSON) -> bool:
    """Whether a call says all of what it is made with."""
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, dict) else None
    return isinstance(arguments, str) and isinstance(load_inner(arguments), dict)


def call_pieces(index: int, call: JSON) -> list[JSON]:
    """A tool call in the two pieces in which it is streamed: who is called, then with what."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return [{"index": index, **call}]
    arguments = {"index": index, "function": {"arguments": function["arguments"]}}
    return [{"index": index, **call, "function": {**function, "arguments": ""}}, arguments]


def joined(chunks: Iterable[JSON], usage: JSON | None) -> JSON:
    """A stream's chunks, brought into the one form, as a whole answer."""
    head: JSON = {}
    message: JSON = {"role": "assistant", "content": None}
    calls: list[JSON] = []
    finish: str | None = None
    for chunk in chunks:
        choice = chunk["choices"][0]
        head = head or {name: value for name, value in chunk.items() if name not in ("choices", "usage")}
        finish = choice.get("finish_reason") or finish
        for name, value in (choice.get("delta") or {}).items():
            if name == "tool_calls":
                join_calls(calls, value)
            elif (isinstance(value, str) and isinstance(message.get(name), str) and name != "role") or (
                isinstance(value, list) and isinstance(message.get(name), list)
            ):
                message[name] += value
            elif value is not None:
                message[name] = value
    if calls:
        message["tool_calls"] = calls
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
    body = {**head, "object": "chat.completion", "choices": [choice]}
    return {**body, "usage": usage} if usage else body


def join_calls(calls: list[JSON], pieces: list[JSON]) -> None:
    """Each piece has the index of its call, and the indexes leave out none."""
    for piece in pieces:
        said = {name: value for name, value in piece.items() if name != "index"}
        if piece["index"] == len(calls):
            calls.append(said)
        elif isinstance(function := said.get("function"), dict):
            begun = calls[piece["index"]].setdefault("function", {})
            begun["arguments"] = (begun.get("arguments") or "") + (function.get("arguments") or "")


def completed(completion: Completion, model_id: str, utc: float) -> Completion:
    """The answer with what its provider left out and every client reads: id, object, created, model, and of each choice
    its index, role and finish reason; usage where clients look for it."""
    body = completion.body
    before = completion.raw if has_head(body) else None
    if not has_head(body):
        seed = blake2b(completion.raw + str(utc).encode(), digest_size=12).hexdigest()
        body["id"] = text_or(body.get("id"), f"chatcmpl-{seed}")
        body["object"] = "chat.completion"
        created = body.get("created")
        body["created"] = whole_number(created) or int(utc)
        body["model"] = text_or(body.get("model"), model_id)
    usage = find_usage(body)
    read = Usage.read(usage)
    if usage is not None and read is not None:
        told = told_usage(usage, read)
        if told is not body.get("usage"):
            body["usage"], before = told, None
    for place, choice in enumerate(body["choices"]):
        message = choice["message"]
        if type(choice.get("index")) is not int:
            choice["index"], before = place, None
        if not isinstance(message.get("role"), str) or not message["role"]:
            message["role"], before = "assistant", None
        if "content" not in message:
            message["content"], before = None, None
    return Completion(before or dump(body), body)


def text_or(value: Any, instead: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value else instead
