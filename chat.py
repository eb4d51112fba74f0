"""OpenAI's Chat Completions as clients really send it: body to `Chat`, answers back to bytes.

`chat_from` is the one place that judges and mends a request; every dialect ends there. It is lenient about spelling
(what real clients send, SPEC 3.5) and strict about meaning (SPEC 3.6): what would be misread is refused with the name
of the field. What needs no mending is passed on as the very object that came in. No I/O.
"""

from __future__ import annotations

import math
from typing import Any

import orjson

from wire import (
    CHARS_PER_TOKEN,
    DONE,
    Chat,
    Completion,
    Event,
    InvalidRequest,
    Tally,
    frame,
    load_object,
    parse_model,
)

JSON = dict[str, Any]
ROLES = frozenset({"system", "user", "assistant", "tool"})
ROLE_ALIASES = {"developer": "system", "function": "tool"}
MAX_TOKENS_NAMES = ("max_completion_tokens", "max_tokens", "max_output_tokens", "num_predict")
ANSWER_TOKENS_ASSUMED = 1000  # SPEC 3.7, where the client sets no limit
EFFORT_ALIASES = {
    "max": "high", "xhigh": "high", "ultra": "high", "mid": "medium", "balanced": "medium", "normal": "medium",
    "min": "minimal", "off": "none", "disabled": "none", "auto": None, "adaptive": None, "default": None,
}  # fmt: skip
NUMBERS = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "min_p", "repetition_penalty")
INTEGERS = ("n", "seed", "top_k", "top_logprobs")
OBJECTS = ("response_format", "logit_bias")
TEXT_PART_TYPES = frozenset({"text", "input_text", "output_text", "refusal"})
IMAGE_PART_TYPES = frozenset({"image_url", "input_image", "image"})
AUDIO_PART_TYPES = frozenset({"input_audio", "audio"})


def wrong_type(param: str, expected: str) -> InvalidRequest:
    return InvalidRequest(f"'{param}' must be {expected}.", param=param, code="invalid_type")


def chat_from(body: JSON) -> Chat:
    """Judge and mend a chat body. Raises InvalidRequest naming the field."""
    body = {name: value for name, value in body.items() if value is not None}  # clients null what they do not set
    model = body.pop("model", "")
    if not isinstance(model, str):
        raise wrong_type("model", "a string")
    stream = boolean(body.pop("stream", False), "stream")
    options = body.pop("stream_options", {})
    if not isinstance(options, dict):
        raise wrong_type("stream_options", "an object")
    refuse_unserved(body)
    mend_tools(body)
    mend_sampling(body)
    mend_response_format(body)
    messages = Messages(body.get("messages"))
    body["messages"] = messages.mended
    chars = messages.chars + (len(orjson.dumps(body["tools"])) if "tools" in body else 0)
    prompt_tokens = -(-chars // CHARS_PER_TOKEN)
    max_tokens: int | None = body.get("max_tokens")
    mode, pinned = parse_model(model)
    return Chat(
        body=body,
        model=model,
        mode=mode,
        pinned=pinned,
        stream=stream,
        include_usage=stream and bool(options.get("include_usage")),
        has_images=messages.has_images,
        has_tools="tools" in body,
        tokens=prompt_tokens + (ANSWER_TOKENS_ASSUMED if max_tokens is None else max_tokens),
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        first_user_text=messages.first_user_text,
    )


def boolean(value: object, param: str) -> bool:
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise wrong_type(param, "true or false")
    return value


def number(value: object, param: str, *, whole: bool = False) -> float | int:
    """A number, also spelled as text; a whole one also spelled 1024.0."""
    expected = "a whole number" if whole else "a number"
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise wrong_type(param, expected) from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong_type(param, expected)
    if whole:
        if value != int(value):
            raise wrong_type(param, expected)
        return int(value)
    return value


def refuse_unserved(body: JSON) -> None:
    """What no platform here serves is refused, not ignored."""
    if "n" in body and number(body["n"], "n", whole=True) != 1:
        raise InvalidRequest("Only n = 1 is supported: send the request several times.", param="n")
    if "audio" in body or "audio" in body.get("modalities", ()):
        param = "audio" if "audio" in body else "modalities"
        raise InvalidRequest("Audio output is not supported by any platform here.", param=param)


def mend_sampling(body: JSON) -> None:
    for name in NUMBERS:
        if name in body:
            body[name] = number(body[name], name)
    for name in INTEGERS:
        if name in body:
            body[name] = number(body[name], name, whole=True)
    for name in OBJECTS:
        if name in body and not isinstance(body[name], dict):
            raise wrong_type(name, "an object")
    given = [int(number(body.pop(name), name, whole=True)) for name in MAX_TOKENS_NAMES if name in body]
    if given and given[0] > 0:
        body["max_tokens"] = given[0]
    if "stop" in body:
        stops = [body["stop"]] if isinstance(body["stop"], str) else body["stop"]
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise wrong_type("stop", "a string or a list of strings")
        if not all(stops) or not stops:
            body["stop"] = [stop for stop in stops if stop]
        if not body["stop"]:
            del body["stop"]
    if "reasoning_effort" in body:
        effort = body["reasoning_effort"]
        if not isinstance(effort, str):
            raise wrong_type("reasoning_effort", "a string")
        body["reasoning_effort"] = EFFORT_ALIASES.get(effort, effort)
        if body["reasoning_effort"] is None:
            del body["reasoning_effort"]


def mend_response_format(body: JSON) -> None:
    """`text` is the default, which some servers refuse to be told; a schema may lie one level too high."""
    wanted = body.get("response_format")
    if wanted is None:
        return
    if wanted.get("type") == "text":
        del body["response_format"]
    elif wanted.get("type") == "json_schema":
        spec = wanted.get("json_schema")
        if spec is None and isinstance(wanted.get("schema"), dict):
            spec = {name: value for name, value in wanted.items() if name != "type"}
        if not isinstance(spec, dict):
            raise wrong_type("response_format.json_schema", "an object")
        if "schema" not in spec and "type" in spec:
            spec = {"schema": spec}
        if "name" not in spec:
            spec = {"name": "answer", **spec}
        if spec is not wanted.get("json_schema"):
            body["response_format"] = {"type": "json_schema", "json_schema": spec}


def mend_tools(body: JSON) -> None:
    """Tools in today's nested form; a choice only where there are tools."""
    if "functions" in body:
        functions = body.pop("functions")
        if "tools" not in body and isinstance(functions, list):
            body["tools"] = [{"type": "function", "function": function} for function in functions]
    if "function_call" in body:
        choice = body.pop("function_call")
        body.setdefault("tool_choice", {"type": "function", "function": choice} if isinstance(choice, dict) else choice)
    tools = body.get("tools", [])
    if not isinstance(tools, list):
        raise wrong_type("tools", "a list")
    if not tools:
        for name in ("tools", "tool_choice", "parallel_tool_calls"):
            body.pop(name, None)
        return
    body["tools"] = [mended_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    if "tool_choice" in body:
        body["tool_choice"] = mended_choice(body["tool_choice"])


def mended_tool(tool: object, param: str) -> JSON:
    if not isinstance(tool, dict):
        raise wrong_type(param, "an object")
    if tool.get("type", "function") != "function":
        return tool
    function = tool.get("function")
    if function is None and "name" in tool:  # flat, as in the Responses API
        function = {name: value for name, value in tool.items() if name != "type"}
    if not isinstance(function, dict):
        raise wrong_type(f"{param}.function", "an object")
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise wrong_type(f"{param}.function.name", "a non-empty string")
    if function.get("parameters") is None:
        function = {**function, "parameters": {"type": "object", "properties": {}}}
    elif not isinstance(function["parameters"], dict):
        raise wrong_type(f"{param}.function.parameters", "an object")
    if "type" in tool and function is tool.get("function"):
        return tool
    return {"type": "function", "function": function}


def mended_choice(choice: object) -> object:
    if isinstance(choice, str):
        return "required" if choice == "any" else choice
    if not isinstance(choice, dict):
        raise wrong_type("tool_choice", "a string or an object")
    kind = choice.get("type")
    if kind in ("auto", "none", "required", "any"):
        return "required" if kind == "any" else kind
    if kind in ("tool", "function") and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


class Messages:
    """The messages of one request while they are mended: what they hold, and which tool calls wait for a result."""

    def __init__(self, messages: object) -> None:
        if not isinstance(messages, list):
            raise InvalidRequest("'messages' must be a non-empty list.", param="messages")
        if not messages:
            raise InvalidRequest("'messages' must not be empty.", param="messages")
        self.chars = 0
        self.has_images = False
        self.first_user_text = ""
        self._seen_user = False
        self._waiting: list[str] = []  # ids of tool calls that have no result yet
        self.mended: list[JSON] = []
        for index, message in enumerate(messages):
            mended = self._mended(message, f"messages[{index}]")
            if mended is not None:
                self.mended.append(mended)
        if not self.mended:
            raise InvalidRequest("'messages' holds only empty turns.", param="messages")

    def _mended(self, message: object, param: str) -> JSON | None:
        if not isinstance(message, dict):
            raise wrong_type(param, "an object")
        role = message.get("role")
        if role is None:
            raise InvalidRequest(f"'{param}' has no role.", param=f"{param}.role")
        if not isinstance(role, str) or (role not in ROLES and role not in ROLE_ALIASES):
            raise wrong_type(f"{param}.role", f"one of {', '.join(sorted({*ROLES, *ROLE_ALIASES}))}")
        if None in message.values():
            message = {name: value for name, value in message.items() if value is not None or name == "content"}
        if role in ROLE_ALIASES:
            message = {**message, "role": ROLE_ALIASES[role]}
        message = self._with_content(message, param)
        if role == "assistant":
            return self._assistant(message, param)
        if message["role"] == "tool":
            return self._tool(message)
        if role == "user" and not self._seen_user:
            self._seen_user = True
            self.first_user_text = flat_text(message["content"])
        return message

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
            if message["role"] == "tool":  # a result handed over as an object
                text = orjson.dumps(content).decode()
                self.chars += len(text)
                return {**message, "content": text}
            return self._with_parts(message, [content], f"{param}.content")
        raise wrong_type(f"{param}.content", "a string, null or a list of parts")

    def _with_parts(self, message: JSON, parts: list[Any], param: str) -> JSON:
        mended = [self._part(part, f"{param}[{index}]") for index, part in enumerate(parts)]
        same = len(parts) == len(mended) and all(a is b for a, b in zip(parts, mended, strict=True))
        return message if same and parts is message["content"] else {**message, "content": mended}

    def _part(self, part: object, param: str) -> JSON:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise wrong_type(param, "an object")
        kind = part.get("type", "text" if "text" in part else "image_url" if "image_url" in part else None)
        if kind in TEXT_PART_TYPES:
            text = part.get("text", part.get("refusal"))
            if not isinstance(text, str):
                raise wrong_type(f"{param}.text", "a string")
            self.chars += len(text)
            return part if part.get("type") == "text" else {"type": "text", "text": text}
        if kind in IMAGE_PART_TYPES:
            self.has_images = True
            return mended_image(part, param)
        if kind in AUDIO_PART_TYPES:
            raise InvalidRequest("Audio input is not supported by any platform here.", param=param)
        if kind is None:
            raise wrong_type(f"{param}.type", "given")
        return part

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
        mended = [self._call(call, f"{param}.tool_calls[{index}]") for index, call in enumerate(calls)]
        self._waiting = [call["id"] for call in mended]
        same = all(a is b for a, b in zip(calls, mended, strict=True))
        return message if same else {**message, "tool_calls": mended}

    def _call(self, call: object, param: str) -> JSON:
        if not isinstance(call, dict):
            raise wrong_type(param, "an object")
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise wrong_type(f"{param}.function", "an object with a name")
        arguments = mended_arguments(function.get("arguments"))
        self.chars += len(arguments)
        if call.get("id") and "type" in call and arguments == function.get("arguments"):
            return call
        made = f"call_{len(self.mended)}_{param.rpartition('[')[2].rstrip(']')}"
        mended = {**call, "id": call.get("id") or made, "type": call.get("type") or "function"}
        mended["function"] = {**function, "arguments": arguments}
        return mended

    def _tool(self, message: JSON) -> JSON | None:
        """A result belongs to the call it names, else to the first one that still waits; an orphan is dropped."""
        if message.get("tool_call_id"):
            if message["tool_call_id"] in self._waiting:
                self._waiting.remove(message["tool_call_id"])
            return message
        if not self._waiting:
            return None
        return {**message, "tool_call_id": self._waiting.pop(0)}


def mended_arguments(arguments: object) -> str:
    """A tool call's arguments as JSON text: clients send objects, nothing, or JSON text encoded twice."""
    if arguments is None or arguments == "":
        return "{}"
    if not isinstance(arguments, str):
        return orjson.dumps(arguments).decode()
    if arguments.startswith('"'):
        try:
            inner = orjson.loads(arguments)
        except orjson.JSONDecodeError:
            return arguments
        return inner if isinstance(inner, str) else arguments
    return arguments


def mended_image(part: JSON, param: str) -> JSON:
    """An image part as `{"type": "image_url", "image_url": {"url": …}}`, whichever API it was written for."""
    image = part.get("image_url")
    if part.get("type") == "image_url" and isinstance(image, dict) and isinstance(image.get("url"), str):
        return part
    source = part.get("source")
    if isinstance(image, dict):
        url = image.get("url")
    elif isinstance(source, dict):  # Anthropic's form
        data = f"data:{source.get('media_type', 'image/png')};base64,{source.get('data', '')}"
        url = source.get("url") if source.get("type") == "url" else data
    else:
        url = image if image is not None else part.get("image")
    if not isinstance(url, str) or not url:
        raise wrong_type(f"{param}.image_url", "an object with a url")
    detail = {"detail": part["detail"]} if isinstance(part.get("detail"), str) else {}
    return {"type": "image_url", "image_url": {"url": url, **detail}}


def flat_text(content: object) -> str:
    """The text of a message's content, parts joined by line ends."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if isinstance(part, dict) and part.get("type") == "text")
    return ""


class ChatEncoder:
    """Answers are in this dialect already: bytes go out as they came."""

    def __init__(self, include_usage: bool) -> None:
        self._include_usage = include_usage

    def whole(self, completion: Completion) -> bytes:
        return completion.raw

    def feed(self, events: list[Event]) -> bytes:
        return events[0].raw if len(events) == 1 else b"".join([event.raw for event in events])

    def end(self, tally: Tally) -> bytes:
        if not self._include_usage or tally.usage_object is None:
            return DONE
        return (tally.usage_raw or frame({**chunk_head(tally), "choices": [], "usage": tally.usage_object})) + DONE

    def fail(self, message: str, type: str, code: int, tally: Tally) -> bytes:
        chunk = chunk_head(tally)
        chunk["error"] = {"message": message, "type": type, "code": code, "param": None}
        chunk["choices"] = [{"index": 0, "delta": {}, "finish_reason": "error"}]
        return frame(chunk) + DONE


def chunk_head(tally: Tally) -> JSON:
    head: JSON = {"object": "chat.completion.chunk"}
    head.update((name, tally.head[name]) for name in ("id", "created", "model") if name in tally.head)
    return head


class ChatDialect:
    """POST /v1/chat/completions."""

    def parse(self, raw: bytes, now: float) -> Chat:
        return chat_from(load_object(raw))

    def encoder(self, chat: Chat, now: float) -> ChatEncoder:
        return ChatEncoder(chat.include_usage)
