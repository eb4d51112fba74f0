"""A chat body as one platform takes it: the catalogue's `quirks` carried out.

An OpenAI-compatible platform is a list of differences, and the list is data; no platform is named here. A history may
have begun elsewhere, so whatever only another platform's wire carries is dropped or translated, never sent on to be
refused. Untouched messages stay the very objects the client sent. No I/O.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from adapters.json_schema import without_keys
from protection import Failure, UpstreamError
from routing.catalog import Model, Prefill
from wire.body import Body
from wire.chat import Chat, flat_text
from wire.jsontext import JSON

STANDARD_FIELDS = frozenset(
    {
        "model", "messages", "temperature", "max_tokens", "top_p", "stop", "tools", "tool_choice", "stream",
        "parallel_tool_calls", "stream_options", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "logit_bias", "logprobs", "top_logprobs", "response_format", "reasoning_effort",
    }
)  # fmt: skip
STANDARD_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")
STANDARD_TOOL_FIELDS = frozenset({"name", "description", "parameters", "strict"})
REPLAYED_FIELDS = frozenset(
    {"reasoning", "reasoning_content", "reasoning_details", "extra_content", "annotations", "audio", "refusal"}
)
CALL_FIELDS = frozenset({"id", "type", "function"})
FUNCTION_FIELDS = frozenset({"name", "arguments"})
CALL_ID_PATTERN = r".{1,40}"  # the strictest of those without a rule of their own
MESSAGE_QUIRKS = frozenset(
    {
        "message_fields",
        "flatten_content",
        "null_content_rejected",
        "tool_call_id_pattern",
        "replay_reasoning_content",
        "system_first",
        "strict_turns",
    }
)  # that may change messages which are well formed
TOOL_QUIRKS = frozenset({"strip_tool_schema_keys", "standard_fields_only"})
STOPS_MAX = 4  # OpenAI's own limit; role-play clients send up to 64
ANY_OBJECT = {"type": "object", "properties": {}, "additionalProperties": True}


def outgoing(model: Model, chat: Chat, *, bare: bool = False) -> JSON:
    """The chat body as this model takes it; `bare`: without what platforms give out to have it back."""
    quirks = model.quirks
    body = as_sent(chat.body, quirks)
    body["model"] = model.model_id
    if chat.stream and not quirks.get("no_stream"):
        body["stream"] = True
        if not quirks.get("no_stream_usage"):
            body["stream_options"] = {"include_usage": True}
    if isinstance(body["messages"], list):
        body["messages"] = outgoing_messages(body["messages"], quirks, frozenset() if bare else given_back(model))
    apply_quirks(body, quirks, model.answer_max(chat.prompt_tokens))
    if isinstance(body["messages"], list) and body["messages"][-1]["role"] == "assistant":
        mark_prefill(body, model.prefill)
    return body


def mark_prefill(body: JSON, form: Prefill) -> None:
    """Say that the last message is to be continued: the client's own prefill, or an answer that broke (SPEC 14.4).

    Last of all, so that no rule about fields takes it away again.
    """
    *before, last = body["messages"]
    if form in (Prefill.PREFIX, Prefill.PARTIAL):
        body["messages"] = [*before, {**last, str(form): True}]
    elif form is Prefill.CONTINUE_FINAL_MESSAGE:
        body.update(continue_final_message=True, add_generation_prompt=False)
        if type(last["content"]) is str:  # its template loses white space there, and then does not find the text
            body["messages"] = [*before, {**last, "content": last["content"].rstrip()}]


def as_sent(body: Mapping[str, Any], quirks: Mapping[str, Any]) -> JSON:
    """The fields to send. Messages and tools that stay as their text are well formed: of the quirks only a few have
    anything to change in these."""
    if not isinstance(body, Body):
        return dict(body)
    read = set()
    if quirks and not MESSAGE_QUIRKS.isdisjoint(quirks):
        read.add("messages")
    if quirks and not TOOL_QUIRKS.isdisjoint(quirks):
        read.add("tools")
    return body.as_sent(read)


def given_back(model: Model) -> frozenset[str]:
    """The fields of messages and tool calls that this platform gives out and wants back: it keeps thoughts and their
    signatures there. Which platform gave them out is not told, so it may refuse another's."""
    return frozenset(model.quirks.get("replay_fields", ()))


def holds_any(messages: object, fields: frozenset[str]) -> bool:
    """Whether one of the messages, or one of their tool calls, has one of these fields."""
    if not fields or not isinstance(messages, list):
        return False
    return any(
        not fields.isdisjoint(message) or any(not fields.isdisjoint(call) for call in message.get("tool_calls") or ())
        for message in messages
    )


def apply_quirks(body: JSON, quirks: Mapping[str, Any], answer_max: int) -> None:
    """Leave out, clamp and rename what the platform would refuse."""
    if quirks:
        apply_own_rules(body, quirks)
    if body.get("max_tokens", 0) > answer_max:
        body["max_tokens"] = answer_max  # asking for more is a 400 nearly everywhere
    stop = body.get("stop")
    if isinstance(stop, list) and len(stop) > quirks.get("stop_max", STOPS_MAX):
        body["stop"] = stop[: quirks.get("stop_max", STOPS_MAX)]
    if quirks:
        apply_last_rules(body, quirks)


def apply_last_rules(body: JSON, quirks: Mapping[str, Any]) -> None:
    """What the catalogue says of fields that are within everybody's limits by now."""
    for name, limit in quirks.get("min", {}).items():
        if name in body and body[name] < limit:
            body[name] = limit
    if isinstance(body.get("stop"), str) and quirks.get("stop_as_array"):
        body["stop"] = [body["stop"]]
    if "reasoning_effort" in body and "reasoning_efforts" in quirks:
        effort = clamp_effort(body.pop("reasoning_effort"), quirks["reasoning_efforts"])
        if effort is not None:
            body["reasoning_effort"] = effort
    if quirks.get("json_object_as_schema") and (body.get("response_format") or {}).get("type") == "json_object":
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANY_OBJECT}}
    if "tools" in body:
        if quirks.get("single_tool_call"):
            body["parallel_tool_calls"] = False
        if stripped := quirks.get("strip_tool_schema_keys"):
            body["tools"] = [without_keys(tool, frozenset(stripped)) for tool in body["tools"]]
        if quirks.get("standard_fields_only"):
            body["tools"] = [plain_tool(tool) for tool in body["tools"]]
    for name, new_name in quirks.get("rename", {}).items():
        if name in body:
            body[new_name] = body.pop(name)


def apply_own_rules(body: JSON, quirks: Mapping[str, Any]) -> None:
    """What the catalogue says of fields: dropped, set, renamed, or held below a limit."""
    if "reasoning_effort" in body and (switch := quirks.get("effort_as_template")):
        thinks = body["reasoning_effort"] != "none"
        body["chat_template_kwargs"] = {**body.get("chat_template_kwargs", {}), switch: thinks}
        if not thinks:
            del body["reasoning_effort"]
    if quirks.get("effort_as_thinking") and "reasoning_effort" in body:
        body["thinking"] = {"type": "disabled" if body.pop("reasoning_effort") == "none" else "enabled"}
    elif quirks.get("standard_fields_only"):
        for name in body.keys() - STANDARD_FIELDS:
            del body[name]
    for name in quirks.get("drop", ()):
        body.pop(name, None)
    for name, value in quirks.get("default", {}).items():
        body.setdefault(name, value)
    for name, limit in quirks.get("max", {}).items():
        if name in body and body[name] > limit:
            body[name] = limit


def plain_tool(tool: JSON) -> JSON:
    """A tool without what only some APIs know."""
    if not isinstance(tool.get("function"), dict):
        return tool
    function = {name: value for name, value in tool["function"].items() if name in STANDARD_TOOL_FIELDS}
    return {"type": "function", "function": function}


EFFORTS = ("none", "minimal", "low", "medium", "high", "default")  # the last is "on", where that is all there is


def clamp_effort(effort: str, known: Sequence[str]) -> str | None:
    """The nearest effort the platform knows, rather the next higher; None for one that we cannot place."""
    if effort in known:
        return effort
    if effort not in EFFORTS:
        return None
    place = EFFORTS.index(effort)
    ladder = [e for e in EFFORTS[place:] if e in known] or [e for e in EFFORTS[:place][::-1] if e in known]
    return ladder[0] if ladder else None


# --- Messages -------------------------------------------------------------------------------------------------------
def outgoing_messages(messages: list[JSON], quirks: Mapping[str, Any], kept: frozenset[str]) -> list[JSON]:
    """History as this platform takes it, with the fields that it wants back."""
    dropped = REPLAYED_FIELDS.union(quirks.get("drop_message_fields", ())) - kept
    messages = [m if is_plain(m) else outgoing_message(m, dropped, quirks, kept) for m in messages]
    if quirks.get("system_first"):
        messages = system_first(messages)
    if quirks.get("strict_turns"):
        messages = strict_turns(messages)
    return messages


def is_plain(message: JSON) -> bool:
    """Nothing but role and text, which every platform takes."""
    return len(message) == 2 and type(message.get("content")) is str


def outgoing_message(message: JSON, dropped: frozenset[str], quirks: Mapping[str, Any], kept: frozenset[str]) -> JSON:
    if message["role"] == "assistant" and quirks.get("replay_reasoning_content"):
        message = replayed(message, dropped)
    elif not dropped.isdisjoint(message):
        message = {name: value for name, value in message.items() if name not in dropped}
    if "tool_calls" in message or message["role"] == "tool":
        message = with_plain_calls(message, quirks.get("tool_call_id_pattern", CALL_ID_PATTERN), kept)
    if not quirks:
        return message
    allowed = quirks.get("message_fields", STANDARD_MESSAGE_FIELDS if quirks.get("standard_fields_only") else ())
    if allowed and not message.keys() <= set(allowed):
        message = {name: value for name, value in message.items() if name in allowed or name in kept}
    content = message.get("content")
    if isinstance(content, list):
        if quirks.get("flatten_content"):
            message = {**message, "content": flattened(content)}
        elif quirks.get("standard_fields_only"):
            message = {**message, "content": [plain_part(part) for part in content]}
    elif content is None and quirks.get("null_content_rejected"):
        message = {**message, "content": ""}
    return message


def flattened(content: list[JSON]) -> str | list[JSON]:
    """Content as text; as parts only where an image is among them. Raises UpstreamError where a part would be lost."""
    kinds = {part.get("type") for part in content}
    if lost := kinds - {"text", "image_url"}:
        raise cannot_carry(f"a part of type {min(map(str, lost))!r}")
    return [plain_part(part) for part in content] if "image_url" in kinds else flat_text(content)


def cannot_carry(what: str) -> UpstreamError:
    return UpstreamError(Failure.BAD_REQUEST, f"This platform's wire format cannot carry {what}.", status=400)


def replayed(message: JSON, dropped: frozenset[str]) -> JSON:
    """The assistant's turn with its thoughts under the name in which they are wanted back; beside tool calls the field
    is missed even where another platform's model thought nothing that we know of."""
    thoughts = message.get("reasoning_content", message.get("reasoning"))
    kept = {name: value for name, value in message.items() if name not in dropped}
    if isinstance(thoughts, str):
        kept["reasoning_content"] = thoughts
    elif "tool_calls" in message:
        kept["reasoning_content"] = ""
    return kept


def plain_part(part: JSON) -> JSON:
    """A part without what only some APIs know, such as marks for their prompt caches."""
    kind = part.get("type")
    return {"type": kind, kind: part[kind]} if kind in ("text", "image_url") and kind in part else part


def with_plain_calls(message: JSON, pattern: str, kept: frozenset[str]) -> JSON:
    """Tool call ids that the platform accepts, the same ones on both sides of a call, and calls without extras other
    than those that it wants back."""
    if message["role"] == "tool":
        call_id = message.get("tool_call_id", "")
        safe = safe_id(call_id, pattern)
        return message if safe == call_id else {**message, "tool_call_id": safe}
    calls = message["tool_calls"]
    plain = [plain_call(call, pattern, kept) for call in calls]
    return message if all(a is b for a, b in zip(calls, plain, strict=True)) else {**message, "tool_calls": plain}


def plain_call(call: JSON, pattern: str, kept: frozenset[str]) -> JSON:
    function = call.get("function")
    if not isinstance(function, dict):
        return call
    safe = safe_id(call["id"], pattern)
    if safe == call["id"] and call.keys() <= CALL_FIELDS and function.keys() <= FUNCTION_FIELDS:
        return call
    function = {name: function[name] for name in ("name", "arguments") if name in function}
    wanted = {name: call[name] for name in kept if name in call}
    return {"id": safe, "type": "function", "function": function, **wanted}


def safe_id(call_id: str, pattern: str) -> str:
    if re.fullmatch(pattern, call_id):
        return call_id
    return blake2b(call_id.encode(errors="replace"), digest_size=8).hexdigest()[:9]  # nine characters of [0-9a-f]


def system_first(messages: list[JSON]) -> list[JSON]:
    """All system messages as one at the head, for chat templates that know it nowhere else."""
    system = [message for message in messages if message["role"] == "system"]
    if not system or (len(system) == 1 and system[0] is messages[0]):
        return messages
    text = "\n\n".join(filter(None, (flat_text(message.get("content")) for message in system)))
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": text}, *others]


def strict_turns(messages: list[JSON]) -> list[JSON]:
    """After a tool's result the assistant speaks."""
    turns: list[JSON] = []
    for message in messages:
        if turns and turns[-1]["role"] == "tool" and message["role"] == "user":
            turns.append({"role": "assistant", "content": "OK."})
        turns.append(message)
    return turns
