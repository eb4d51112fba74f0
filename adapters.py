"""The OpenAI-shaped wire: a `Chat` out to a platform, its answers back in one form.

An OpenAI-compatible platform is a list of differences, and the list is data: `quirks` in the catalogue. No platform
is named here. No I/O.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from catalog import Key, Model
from chat import flat_text
from wire import Chat, Completion, Event, Tally, dump, frame

JSON = dict[str, Any]
USER_AGENT = "freeway/0.1"  # some edges refuse a client without a name of its own
FINISH_REASONS = {
    "eos": "stop", "eos_token": "stop", "end_turn": "stop", "stop_sequence": "stop", "COMPLETE": "stop",
    "tool_use": "tool_calls", "model_length": "length", "max_tokens": "length", "MAX_TOKENS": "length",
    "sensitive": "content_filter", "safety": "content_filter",
}  # fmt: skip
REPLAYED_FIELDS = ("reasoning", "reasoning_content", "reasoning_details", "annotations", "audio", "refusal")
# Every quirk an openai platform's catalogue entry may have: the catalogue's reader warns of any other.
QUIRKS = frozenset(
    {
        "drop", "rename", "max", "min", "default", "headers", "stop_max", "stop_as_array", "drop_message_fields",
        "message_fields", "flatten_content", "null_content_rejected", "tool_call_id_pattern", "reasoning_efforts",
        "single_tool_call", "replay_reasoning_content", "strip_tool_schema_keys", "no_stream", "no_stream_usage",
        "env_account", "daily_reset",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP call to a provider."""

    url: str
    headers: dict[str, str]
    body: bytes


def base_url(model: Model, key: Key) -> tuple[str, str]:
    """The platform's address and the credential to send, with `{account_id}` taken from an `account_id:token` key."""
    url, secret = model.platform.base_url, key.secret
    if "{" in url:
        account, _, secret = secret.partition(":")
        url = re.sub(r"\{\w+\}", account, url)
    return url, secret


class OpenAIAdapter:
    """POST {base_url}/chat/completions."""

    def request(self, model: Model, key: Key, chat: Chat) -> Request:
        url, secret = base_url(model, key)
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": USER_AGENT}
        if secret:
            headers["Authorization"] = f"Bearer {secret}"
        headers.update(model.platform.quirks.get("headers", ()))
        return Request(f"{url}/chat/completions", headers, dump(outgoing(model, chat)))

    def completion(self, raw: bytes, body: JSON) -> Completion | None:
        if not well_formed_answer(body):
            return None
        return Completion(dump(body) if mend_completion(body) else raw, body)

    def translator(self, tally: Tally) -> ChunkMender:
        return ChunkMender(tally)


def outgoing(model: Model, chat: Chat) -> JSON:
    """The chat body as this platform takes it."""
    quirks = model.platform.quirks
    body: JSON = {**chat.body, "model": model.model_id}
    if chat.stream and not quirks.get("no_stream"):
        body["stream"] = True
        if not quirks.get("no_stream_usage"):
            body["stream_options"] = {"include_usage": True}
    if model.max_output is not None and body.get("max_tokens", 0) > model.max_output:
        body["max_tokens"] = model.max_output  # asking for more is a 400 nearly everywhere
    body["messages"] = outgoing_messages(body["messages"], quirks)
    if quirks:
        apply_quirks(body, quirks)
    return body


def apply_quirks(body: JSON, quirks: Any) -> None:
    """Leave out, clamp and rename what the platform would refuse."""
    for name in quirks.get("drop", ()):
        body.pop(name, None)
    for name, value in quirks.get("default", {}).items():
        body.setdefault(name, value)
    for name, limit in quirks.get("max", {}).items():
        if name in body and body[name] > limit:
            body[name] = limit
    for name, limit in quirks.get("min", {}).items():
        if name in body and body[name] < limit:
            body[name] = limit
    stop = body.get("stop")
    if isinstance(stop, str) and quirks.get("stop_as_array"):
        body["stop"] = [stop]
    elif isinstance(stop, list) and len(stop) > quirks.get("stop_max", len(stop)):
        body["stop"] = stop[: quirks["stop_max"]]
    if "reasoning_effort" in body and "reasoning_efforts" in quirks:
        clamp_effort(body, quirks["reasoning_efforts"])
    if "tools" in body:
        if quirks.get("single_tool_call"):
            body["parallel_tool_calls"] = False
        if stripped := quirks.get("strip_tool_schema_keys"):
            body["tools"] = [without_keys(tool, frozenset(stripped)) for tool in body["tools"]]
    for name, new_name in quirks.get("rename", {}).items():
        if name in body:
            body[new_name] = body.pop(name)


EFFORTS = ("none", "minimal", "low", "medium", "high")


def clamp_effort(body: JSON, known: list[str]) -> None:
    """The nearest effort the platform knows, rather the next higher; an effort we cannot place is left out."""
    effort = body["reasoning_effort"]
    if effort in known:
        return
    if effort not in EFFORTS:
        del body["reasoning_effort"]
        return
    place = EFFORTS.index(effort)
    ladder = [e for e in EFFORTS[place:] if e in known] or [e for e in EFFORTS[:place][::-1] if e in known]
    body["reasoning_effort"] = ladder[0]


def without_keys(schema: Any, names: frozenset[str]) -> Any:
    """A JSON schema without these keywords; inside `properties` every key is a name and stays."""
    if isinstance(schema, list):
        return [without_keys(item, names) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {}
    for key, value in schema.items():
        if key == "properties" and isinstance(value, dict):
            kept[key] = {name: without_keys(item, names) for name, item in value.items()}
        elif key not in names:
            kept[key] = without_keys(value, names)
    return kept


def outgoing_messages(messages: list[JSON], quirks: Any) -> list[JSON]:
    """History as this platform takes it. Untouched messages stay the very objects the client sent."""
    dropped = {*quirks.get("drop_message_fields", ())}
    if not quirks.get("replay_reasoning_content"):
        dropped.update(REPLAYED_FIELDS)
    return [outgoing_message(message, dropped, quirks) for message in messages]


def outgoing_message(message: JSON, dropped: set[str], quirks: Any) -> JSON:
    if not dropped.isdisjoint(message):
        message = {name: value for name, value in message.items() if name not in dropped}
    if not quirks:
        return message
    allowed = quirks.get("message_fields")
    if allowed and not message.keys() <= set(allowed):
        message = {name: value for name, value in message.items() if name in allowed}
    if quirks.get("flatten_content") and isinstance(message.get("content"), list):
        message = {**message, "content": flat_text(message["content"])}
    if quirks.get("null_content_rejected") and message.get("content") is None:
        message = {**message, "content": ""}
    if pattern := quirks.get("tool_call_id_pattern"):
        message = with_safe_ids(message, pattern)
    return message


def with_safe_ids(message: JSON, pattern: str) -> JSON:
    """Tool call ids that the platform accepts, the same ones on both sides of a call."""
    if calls := message.get("tool_calls"):
        calls = [{**call, "id": safe_id(call["id"], pattern)} for call in calls]
        return {**message, "tool_calls": calls}
    if message.get("role") == "tool":
        return {**message, "tool_call_id": safe_id(message.get("tool_call_id", ""), pattern)}
    return message


def safe_id(call_id: str, pattern: str) -> str:
    if re.fullmatch(pattern, call_id):
        return call_id
    return blake2b(call_id.encode(), digest_size=8).hexdigest()[:9]  # nine characters of [0-9a-f]


PLAIN_CHUNK = frozenset({"id", "object", "created", "model", "system_fingerprint", "service_tier", "choices", "usage"})
PLAIN_CHOICE = frozenset({"index", "delta", "finish_reason", "logprobs"})
PLAIN_DELTA = frozenset({"content", "role"})


def plain_text(chunk: Any) -> str | None:
    """The text of a chunk that holds nothing else: most of every stream. None when it needs a closer look.

    What passes here has no error, no usage and nothing to mend, so that it costs one look instead of four.
    """
    if type(chunk) is not dict or not PLAIN_CHUNK.issuperset(chunk) or chunk.get("usage"):
        return None
    choices = chunk.get("choices")
    if type(choices) is not list or len(choices) != 1:
        return None
    choice = choices[0]
    if type(choice) is not dict or not PLAIN_CHOICE.issuperset(choice) or choice.get("finish_reason") is not None:
        return None
    delta = choice.get("delta")
    if type(delta) is not dict or not PLAIN_DELTA.issuperset(delta):
        return None
    text = delta.get("content")
    return text if type(text) is str and text else None


def well_formed(chunk: Any) -> bool:
    """Whether a parsed event has the types that reading it relies on."""
    if type(chunk) is not dict:
        return False
    choices = chunk.get("choices")
    if not choices:
        return True
    if type(choices) is not list or type(choices[0]) is not dict:
        return False
    delta = choices[0].get("delta")
    if not delta:
        return True
    if type(delta) is not dict:
        return False
    calls = delta.get("tool_calls")
    return not calls or (type(calls) is list and all(map(well_formed_call, calls)))


def well_formed_call(call: Any) -> bool:
    return type(call) is dict and isinstance(call.get("function"), dict | None)


def well_formed_answer(body: Any) -> bool:
    """The same for a whole answer."""
    if type(body) is not dict or type(body.get("choices")) is not list or not body["choices"]:
        return False
    choice = body["choices"][0]
    if type(choice) is not dict or type(choice.get("message")) is not dict:
        return False
    calls = choice["message"].get("tool_calls")
    return not calls or (type(calls) is list and all(map(well_formed_call, calls)))


def mend_completion(body: JSON) -> bool:
    """Bring a whole answer into the one form; True when something had to change."""
    changed = False
    for choice in body["choices"]:
        message = choice.get("message")
        if not isinstance(message, dict):
            continue
        changed |= mend_text(message)
        calls = message.get("tool_calls")
        for index, call in enumerate(calls if isinstance(calls, list) else ()):
            if not call.get("id"):
                call["id"], changed = f"call_{index}", True
            changed |= mend_call(call)
        changed |= mend_finish(choice, has_calls=bool(calls))
    return changed


def mend_text(message: JSON) -> bool:
    """Reasoning under one name, and content as text."""
    changed = False
    content = message.get("content")
    if isinstance(content, list):  # segments of text and thinking
        message["content"] = flat_text(content)
        thoughts = [part.get("thinking") for part in content if isinstance(part, dict) and "thinking" in part]
        if thoughts:
            message["reasoning_content"] = "".join(t if isinstance(t, str) else flat_text(t) for t in thoughts)
        changed = True
    if "reasoning" in message and isinstance(message["reasoning"], str):
        reasoning = message.pop("reasoning")
        message.setdefault("reasoning_content", reasoning)
        changed = True
    return changed


def mend_call(call: JSON) -> bool:
    """A tool call with a type, and arguments as text."""
    changed = False
    if not call.get("type"):
        call["type"], changed = "function", True
    function = call.get("function")
    if isinstance(function, dict):
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            function["arguments"], changed = dump(arguments).decode(), True
        elif arguments is None or arguments == "":
            function["arguments"], changed = "{}", True
    return changed


def mend_finish(choice: JSON, *, has_calls: bool) -> bool:
    finish = choice.get("finish_reason")
    if finish == "stop" and has_calls:
        choice["finish_reason"] = "tool_calls"
    elif finish in FINISH_REASONS:
        choice["finish_reason"] = FINISH_REASONS[finish]
    else:
        return False
    return True


class ChunkMender:
    """Brings one stream's chunks into the one form. A chunk that needs no change keeps the bytes it came in."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._calls: dict[int, str] = {}  # ids of the tool calls begun so far, by index

    def plain_text(self, chunk: Any) -> str | None:
        return plain_text(chunk)

    def feed(self, raw: bytes, chunk: JSON) -> list[Event]:
        choices = chunk.get("choices")
        usage = chunk.get("usage")
        changed = False
        if usage:
            self._tally.note_usage(usage)
        if not choices:  # usage goes out once and last; anything else here would only break clients
            if usage:
                self._tally.usage_raw = raw
            return []
        choice = choices[0]
        if usage:
            del chunk["usage"]
            changed = True
        delta = choice.get("delta")
        if delta:
            if "reasoning" in delta or type(delta.get("content")) is list:
                changed |= mend_text(delta)
            if delta.get("tool_calls"):
                changed |= self._mend_calls(delta["tool_calls"])
        if choice.get("finish_reason"):
            for name, vendor in chunk.items():  # some tell it in an object of their own: x_vendor.usage
                if name.startswith("x_") and isinstance(vendor, dict):
                    self._tally.note_usage(vendor.get("usage"))
            changed |= mend_finish(choice, has_calls=bool(self._calls))
        elif choice.get("finish_reason") == "":
            choice["finish_reason"], changed = None, True
        return [Event(frame(chunk) if changed else raw, chunk)]

    def _mend_calls(self, calls: list[JSON]) -> bool:
        """Every piece with its index; id, type and name exactly once, because clients join what repeats."""
        changed = False
        for call in calls:
            given, index = call.get("index"), self._index_of(call)
            if given != index:
                call["index"], changed = index, True
            function = call.get("function")
            if isinstance(function, dict) and isinstance(function.get("arguments"), dict):
                function["arguments"], changed = dump(function["arguments"]).decode(), True
            if index not in self._calls:
                changed |= self._begin(call, index)
                continue
            if call.get("id"):
                del call["id"]
                changed = True
            if isinstance(function, dict) and function.get("name"):
                del function["name"]
                changed = True
        return changed

    def _index_of(self, call: JSON) -> int:
        """Which call a piece belongs to. A new id begins a new call, whatever index it claims; so does a name, where
        there are neither ids nor indexes."""
        given, call_id = call.get("index"), call.get("id")
        if call_id:
            for index, begun in self._calls.items():
                if begun == call_id:
                    return index
            return given if isinstance(given, int) and given not in self._calls else len(self._calls)
        if isinstance(given, int):
            return given
        named = bool((call.get("function") or {}).get("name"))
        return len(self._calls) if named or not self._calls else max(self._calls)

    def _begin(self, call: JSON, index: int) -> bool:
        changed = False
        if not call.get("id"):
            call["id"], changed = f"call_{index}", True
        if not call.get("type"):
            call["type"], changed = "function", True
        self._calls[index] = call["id"]
        return changed


def note(chunk: JSON, tally: Tally) -> bool:
    """Count one chunk; True when it is the kind that may open an answer (SPEC 8.1): text, reasoning, a call, a refusal
    or a filter's stop. `length` alone is not: with nothing said it may be a truncation, which its usage decides.
    """
    choices = chunk.get("choices")
    if not choices:
        return False
    if not tally.head:
        tally.head = chunk
    choice = choices[0]
    delta = choice.get("delta")
    meaningful = False
    if delta:
        for name in ("content", "reasoning_content", "refusal"):
            text = delta.get(name)
            if text and type(text) is str:
                tally.text_chars += len(text)
                if tally.has_text or not text.isspace():
                    tally.has_text = meaningful = True
        calls = delta.get("tool_calls")
        if calls:
            tally.has_tool_calls = meaningful = True
            for call in calls:
                tally.text_chars += len((call.get("function") or {}).get("arguments") or "")
        elif delta.get("function_call"):
            tally.has_tool_calls = meaningful = True
    finish = choice.get("finish_reason")
    if finish is not None:
        tally.finish = finish
        meaningful = meaningful or finish == "content_filter"
    return meaningful


def note_completion(body: JSON, tally: Tally) -> None:
    """Count a whole answer."""
    tally.note_usage(body.get("usage"))
    choice = body["choices"][0]
    message = choice.get("message") or {}
    note({**body, "choices": [{"delta": message, "finish_reason": choice.get("finish_reason")}]}, tally)


def as_chunks(body: JSON) -> list[JSON]:
    """A whole answer as the chunks of a stream, for platforms that do not stream."""
    head: JSON = {"object": "chat.completion.chunk"}
    head.update((name, body[name]) for name in ("id", "created", "model") if name in body)
    choice = body["choices"][0]
    delta = {name: value for name, value in (choice.get("message") or {}).items() if value is not None}
    if calls := delta.get("tool_calls"):
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
    last: JSON = {"index": 0, "delta": {}, "finish_reason": choice.get("finish_reason") or "stop"}
    return [
        {**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]},
        {**head, "choices": [last]},
    ]
