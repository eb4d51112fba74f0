"""OpenAI's Chat Completions as clients really send it: body to `Chat`, answers back to bytes.

`chat_from` is the one place that judges and mends a request; every dialect ends there. It is lenient about spelling
(what real clients send, SPEC 3.5) and strict about meaning (SPEC 3.6): what would be misread is refused with the name
of the field. Messages and tools that need no mending are passed on as the very text that came in. No I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from msgspec.structs import replace

from dialects.compaction import NO_SEAL
from dialects.custom_tools import CustomCalls
from dialects.history import History
from dialects.older_calls import OlderCalls
from dialects.response_request import chat_of_items, check_types, in_own_terms, input_items, is_of_items
from dialects.tools import NO_TOOLS, TOOL_FIELDS, Toolset, mend_tools, toolset_of
from dialects.values import boolean, number, whole_number, wrong_type
from dialects.well_formed import WellFormed, recognised, recognised_request, sent_as_given
from wire.body import Body
from wire.chat import (
    ANSWER_TOKENS_ASSUMED,
    CHARS_PER_TOKEN,
    Chat,
    Completion,
    Event,
    LocalRoute,
    Need,
    Tally,
    chunk_head,
    chunk_of,
    frame,
    parse_model,
)
from wire.errors import GatewayError, InvalidRequest
from wire.jsontext import JSON, load_object, without_nulls
from wire.sse import DONE, KEEP_ALIVE

RAW_FIELDS = frozenset({"messages", "tools"})  # which mend their own nulls: what stands in them may be data
CHAT_ONLY = ("max_tokens", "max_completion_tokens", "stream_options", "response_format", "prompt_cache_key")
MODEL_CHARS_MAX = 300  # four times the longest in use
OLDER = object()  # `Chat.origin` of a client that reads calls as the API had them before tools
MAX_TOKENS_NAMES = dict.fromkeys(("max_completion_tokens", "max_tokens", "max_output_tokens", "num_predict"))
EFFORT_ALIASES = {
    "max": "high", "xhigh": "high", "ultra": "high", "mid": "medium", "balanced": "medium", "normal": "medium",
    "min": "minimal", "off": "none", "disabled": "none", "auto": None, "adaptive": None, "default": None,
}  # fmt: skip
EFFORT_FIELDS = frozenset({"reasoning_effort", "reasoning", "thinking", "enable_thinking", "chat_template_kwargs"})
RANGES = {"temperature": (0, 2), "top_p": (0.01, 1)}  # 0 would mean no token at all, and is refused


def read_chat(raw: bytes) -> Chat:
    """A request's text as a `Chat`. Raises InvalidRequest naming the field."""
    if (chat := recognised_chat(raw)) is not None:
        return chat
    body = load_object(raw)
    return read_items(body) if is_of_items(body) else chat_from(body)


def recognised_chat(raw: bytes) -> Chat | None:
    """A request in which nothing has to be mended; its messages and tools stay text. None for any other."""
    if (asked := recognised_request(raw)) is None or len(asked.model or "") > MODEL_CHARS_MAX:
        return None
    try:
        tools = toolset_of(bytes(asked.tools)) if asked.tools else NO_TOOLS
    except (ValueError, InvalidRequest):
        return None
    body, history = sent_as_given(asked), recognised(bytes(asked.messages))
    if body is None or history is None or "\0" in (asked.model or ""):
        return None
    if tools.tools:
        body["tools"] = tools.tools
    elif asked.tools or not TOOL_FIELDS.isdisjoint(body):
        return None
    limit = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    if limit is not None and limit > 0:
        body["max_tokens"] = limit
    options, texts = asked.stream_options, {"messages": history.text, **tools.texts}
    include_usage = options is not None and options.include_usage is True
    return chat_of(body, texts, history, tools, asked.model or "", bool(asked.stream), include_usage)


def read_items(request: JSON) -> Chat:
    """A Responses request that came to this address and wants its answer in chat's form: some clients mix the two."""
    request = {name: value for name, value in request.items() if value is not None}
    if request.get("previous_response_id") is not None:
        words = "Responses are not kept at this address: send the whole input, or use /v1/responses."
        raise InvalidRequest(words, param="previous_response_id", code="previous_response_not_found")
    check_types(request)
    items = input_items(request)
    for place, item in enumerate(items):
        an_object(item, f"input[{place}]")
    body, tools, turns = chat_of_items(request, items, [f"input[{n}]" for n in range(len(items))], NO_SEAL)
    try:
        chat = chat_from({**{name: request[name] for name in CHAT_ONLY if name in request}, **body})
    except InvalidRequest as error:
        raise in_own_terms(error, turns.sources, tools.paths) from None
    return replace(chat, origin=frozenset(name for name, offer in tools.offers.items() if offer.type == "custom"))


def chat_from(body: JSON) -> Chat:
    """Judge and mend a chat body. Raises InvalidRequest naming the field."""
    body = {name: v if name in RAW_FIELDS else without_nulls(v) for name, v in body.items() if v is not None}
    extra = body.pop("extra_body", None)  # which one client merges into the body, and others send as it is
    if isinstance(extra, dict):
        body = {**extra, **body}
    model = body.pop("model", "")
    if not isinstance(model, str) or len(model) > MODEL_CHARS_MAX:  # it is logged as it came
        raise wrong_type("model", f"a string of at most {MODEL_CHARS_MAX} characters")
    stream = boolean(body.pop("stream", False), "stream")
    options = body.pop("stream_options", {})
    if not isinstance(options, dict):
        raise wrong_type("stream_options", "an object")
    refuse_unserved(body)
    tools = mend_tools(body)
    mend_sampling(body)
    mend_effort(body)
    mend_response_format(body)
    history = History(body.get("messages"), tools.safe_names)
    body["messages"] = history.mended
    return chat_of(body, {}, history, tools, model, stream, bool(options.get("include_usage")))


def chat_of(
    body: JSON, texts: Mapping[str, bytes], history: WellFormed | History, tools: Toolset, model: str, stream: bool,
    include_usage: bool,
) -> Chat:  # fmt: skip
    """A request whose fields are in order; `texts` are those of them that can go out as they came."""
    prompt_tokens = -(-(history.chars + tools.chars) // CHARS_PER_TOKEN)
    max_tokens: int | None = body.get("max_tokens")
    conversation = body.get("prompt_cache_key")
    mode, pinned = parse_model(model)
    need = Need(
        mode=mode,
        pinned=pinned,
        tokens=prompt_tokens + min(max_tokens or ANSWER_TOKENS_ASSUMED, ANSWER_TOKENS_ASSUMED),
        vision=history.has_images,
        tools="tools" in body,
    )
    return Chat(
        need=need,
        body=Body(body, texts) if texts else body,
        model=model,
        stream=stream,
        include_usage=stream and include_usage,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        first_user_text=history.first_user_text,
        conversation=conversation if isinstance(conversation, str) else "",
        origin=OLDER if tools.older else tools.custom,
        tool_names={safe: name for name, safe in tools.safe_names.items()} if tools.safe_names else tools.safe_names,
    )


def refuse_unserved(body: JSON) -> None:
    """What no platform here serves is refused, not ignored."""
    if "n" in body and number(body["n"], "n", whole=True) != 1:
        raise InvalidRequest("Only n = 1 is supported: send the request several times.", param="n")
    modalities = body.get("modalities")
    if "audio" in body or (isinstance(modalities, list) and any(kind != "text" for kind in modalities)):
        param = "audio" if "audio" in body else "modalities"
        raise InvalidRequest("Only text can be answered: no platform here gives audio or images.", param=param)


def mend_sampling(body: JSON) -> None:
    for name in body:
        if (mend := SAMPLING.get(name)) is not None:
            body[name] = mend(body[name], name)
    if not MAX_TOKENS_NAMES.keys().isdisjoint(body):
        given = [int(number(body.pop(name), name, whole=True)) for name in MAX_TOKENS_NAMES if name in body]
        if given[0] > 0:
            body["max_tokens"] = given[0]
    if "stop" in body and not body["stop"]:
        del body["stop"]


def in_range(value: object, param: str) -> float | int:
    low, high = RANGES[param]
    return min(max(number(value, param), low), high)


def an_object(value: object, param: str) -> JSON:
    if not isinstance(value, dict):
        raise wrong_type(param, "an object")
    return value


def a_format(value: object, param: str) -> JSON:
    """A form of the answer, also by its type alone."""
    return {"type": value} if value in ("json_object", "text") else an_object(value, param)


def stops(value: object, param: str) -> str | list[str]:
    """Without empty ones, which would stop everything at once."""
    listed = [value] if isinstance(value, str) else value
    if isinstance(listed, list) and None in listed:
        value = listed = [stop for stop in listed if stop is not None]
    if not isinstance(listed, list) or not all(isinstance(stop, str) for stop in listed):
        raise wrong_type(param, "a string or a list of strings")
    return value if isinstance(value, str) else listed if all(listed) else [stop for stop in listed if stop]


SAMPLING: Mapping[str, Callable[[object, str], Any]] = {
    "temperature": in_range, "top_p": in_range, "presence_penalty": number, "frequency_penalty": number,
    "min_p": number, "repetition_penalty": number, "n": whole_number, "seed": whole_number, "top_k": whole_number,
    "top_logprobs": whole_number, "response_format": a_format, "logit_bias": an_object, "stop": stops,
}  # fmt: skip


def mend_effort(body: JSON) -> None:
    """How much to think, in whichever of the spellings in use, as `reasoning_effort`."""
    if EFFORT_FIELDS.isdisjoint(body):
        return
    given = [body.pop("reasoning_effort", None)]
    if isinstance(body.get("reasoning"), dict):
        given.append(body.pop("reasoning").get("effort"))
    if isinstance(body.get("thinking"), dict):
        given.append(effort_of_thinking(body.pop("thinking")))
    if isinstance(body.get("enable_thinking"), bool):
        given.append("medium" if body.pop("enable_thinking") else "none")
    template = body.get("chat_template_kwargs")
    if isinstance(template, dict):
        for name in ("enable_thinking", "thinking"):
            if isinstance(template.get(name), bool):
                given.append("medium" if template[name] else "none")
                template = {key: value for key, value in template.items() if key != name}
        body["chat_template_kwargs"] = template
        if not template:
            del body["chat_template_kwargs"]
    effort = next((value for value in given if value is not None), None)
    if effort is None:
        return
    if not isinstance(effort, str):
        raise wrong_type("reasoning_effort", "a string")
    effort = EFFORT_ALIASES.get(effort.lower(), effort.lower())
    if effort is not None:
        body["reasoning_effort"] = effort


def effort_of_thinking(thinking: JSON) -> str | None:
    budget = thinking.get("budget_tokens")
    if thinking.get("type") == "disabled":
        return "none"
    if isinstance(budget, int):
        return "low" if budget < 4096 else "medium" if budget < 16_384 else "high"
    return "medium" if thinking.get("type") == "enabled" else None


def mend_response_format(body: JSON) -> None:
    """`text` is the default, which some servers refuse to be told; a schema may lie one level too high."""
    wanted = body.get("response_format")
    if wanted is None:
        return
    if not wanted.get("type"):  # clients with a form to fill in leave it empty, or name a schema only
        has_schema = "json_schema" in wanted or "schema" in wanted
        wanted = body["response_format"] = {**wanted, "type": "json_schema" if has_schema else "text"}
    if wanted.get("type") == "json":
        wanted = body["response_format"] = {**wanted, "type": "json_object"}
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


class ChatEncoder:
    """Answers are in this dialect already: bytes go out as they came."""

    def __init__(self, include_usage: bool, told: CustomCalls | OlderCalls | None = None) -> None:
        """`told` tells calls as the client knows them, where that is not chat's present form."""
        self._include_usage = include_usage
        self._custom = told

    def whole(self, completion: Completion) -> bytes:
        return completion.raw if self._custom is None else self._custom.whole(completion)

    def feed(self, events: list[Event]) -> bytes:
        if self._custom is not None:
            return b"".join(map(self._custom.feed, events))
        return events[0].raw if len(events) == 1 else b"".join([event.raw for event in events])

    def end(self, tally: Tally) -> bytes:
        rest = b"" if self._custom is None else self._custom.end()
        if not self._include_usage or tally.usage_object is None:
            return rest + DONE
        usage = tally.usage_raw or frame({**chunk_head(tally.head), "choices": [], "usage": tally.usage_object})
        return rest + usage + DONE

    def fail(self, error: GatewayError, tally: Tally) -> bytes:
        """The error alone, and then how it ended: some clients see nothing else in a chunk that has choices, and some
        nothing in one that has none (SPEC 8.5)."""
        return frame({"error": error.in_stream()}) + frame(chunk_of(tally.head, {}, "error")) + DONE

    def heartbeat(self) -> bytes:
        return KEEP_ALIVE

    def resumed(self, label: str) -> bytes:
        return f": resumed on {label}\n\n".encode()


class ChatDialect:
    """POST /v1/chat/completions."""

    paths = ("/v1/chat/completions",)
    id_headers = (b"x-request-id",)

    def is_spoken(self, path: str, headers: Mapping[bytes, bytes]) -> bool:
        return False

    def status(self, error: GatewayError) -> int:
        return error.status

    def error(self, error: GatewayError, request_id: str) -> bytes:
        return error.body()

    def extra_routes(self) -> tuple[LocalRoute, ...]:
        return ()

    def parse(self, raw: bytes, now: float, client: int | None = None) -> Chat:
        return read_chat(raw)

    def encoder(self, chat: Chat, now: float) -> ChatEncoder:
        if chat.origin is OLDER:
            return ChatEncoder(chat.include_usage, OlderCalls())
        return ChatEncoder(chat.include_usage, CustomCalls(chat.origin) if chat.origin else None)
