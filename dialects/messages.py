"""Anthropic's Messages API, the third dialect: a request to a `Chat`, errors in its words, what is answered here.

Judging and mending a request is chat.chat_from's affair: message_blocks.py makes chat messages out of turns, and
message_events.py tells the answer. Probes that clients send only to see whether somebody is there, and questions about
lengths, are answered without a provider (SPEC 16.5). No I/O; new ids come from the caller.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from msgspec.structs import replace

from dialects.chat import chat_from
from dialects.message_blocks import chat_messages, invalid
from dialects.message_errors import error_of, status_of
from dialects.message_events import Asked, MessagesEncoder
from dialects.message_tools import Offer, chat_choice, effort_of_turn
from wire.chat import Chat, Completion, Event, LocalRoute, Mode, Need, Tally, chunk_of, frame
from wire.errors import GatewayError, InvalidRequest
from wire.jsontext import JSON, dump, load_object

# Names for pickers that show only what sounds like this vendor's models, and what each means.
ALIASES = {
    "claude-freeway": Mode.BALANCED,
    "claude-freeway-smart": Mode.SMART,
    "claude-freeway-fast": Mode.FAST,
}
FAMILIES = {
    "fable": Mode.SMART,
    "opus": Mode.SMART,
    "sonnet": Mode.BALANCED,
    "haiku": Mode.FAST,
}  # by what their names contain
WINDOW_MARK = "[1m]"  # behind a name: the client's wish for a larger window
PASSED_ON = ("stream", "max_tokens", "temperature", "top_p", "top_k")
PROBE_CHARS_MAX = 32  # of a one-token probe's text; SPEC 16.5
WARM_UP = "Warmup"  # all that a warm-up probe says
PROBE_WORDS = "OK"
# What a part without text counts for in an estimate: an image at the size to which this API scales large ones, a PDF of
# a page or two.
PART_TOKENS = {"image_url": 1500, "file": 3000}
CREATED_AT = "2026-01-01T00:00:00Z"  # of a model whose release nobody here knows
OWN_NAMES = {"stop": "stop_sequences", "reasoning_effort": "output_config.effort", "response_format": "output_config"}


class MessagesDialect:
    """POST /v1/messages. `new_token` gives a random text, 24 characters or more."""

    paths = ("/v1/messages",)
    id_headers = (b"request-id", b"x-request-id")

    def __init__(self, new_token: Callable[[], str]) -> None:
        self._new_token = new_token

    def is_spoken(self, path: str, headers: Mapping[bytes, bytes]) -> bool:
        models = path == "/v1/models" or path.startswith("/v1/models/")
        return path.startswith("/v1/messages/") or (models and b"anthropic-version" in headers)

    def status(self, error: GatewayError) -> int:
        return status_of(error)

    def error(self, error: GatewayError, request_id: str) -> bytes:
        return dump({"type": "error", "error": error_of(error), "request_id": request_id})

    def extra_routes(self) -> tuple[LocalRoute, ...]:
        return (
            LocalRoute("POST", "/v1/messages/count_tokens", lambda found, raw, now, client: self.count_tokens(raw)),
            LocalRoute("GET", "/api/hello", lambda found, raw, now, client: b'{"message":"hello"}', keyless=True),
        )

    def parse(self, raw: bytes, now: float, client: int | None = None) -> Chat:
        request = {name: value for name, value in load_object(raw).items() if value is not None}
        chat = chat_of(request)
        if (words := probe_words(request)) is None:
            return chat
        return replace(chat, answered=self._answered(chat, words, now))

    def encoder(self, chat: Chat, now: float) -> MessagesEncoder:
        return MessagesEncoder(chat.origin, self._new_token())

    def count_tokens(self, raw: bytes) -> bytes:
        request = {name: value for name, value in load_object(raw).items() if value is not None}
        return dump({"input_tokens": chat_of(request).origin.input_tokens})

    def _answered(self, chat: Chat, words: str, now: float) -> bytes:
        """The whole response to a probe."""
        encoder, asked = self.encoder(chat, now), chat.origin
        finish = "length" if chat.max_tokens == 1 or not words else "stop"
        usage = {"prompt_tokens": asked.input_tokens, "completion_tokens": 1 if words else 0}
        if not chat.stream:
            choice = {"message": {"role": "assistant", "content": words}, "finish_reason": finish}
            return encoder.whole(Completion(b"", {"choices": [choice], "usage": usage}))
        chunk = chunk_of({}, {"content": words})
        tally = Tally(finish=finish)
        tally.note_usage(usage)
        return encoder.feed([Event(frame(chunk), chunk)]) + encoder.end(tally)


# --- Requests -------------------------------------------------------------------------------------------------------
def chat_of(request: JSON) -> Chat:
    """A request as a chat. Raises InvalidRequest in this API's terms."""
    model = request.get("model", "")
    if not isinstance(model, str):
        raise invalid("model", "Input should be a valid string")
    messages, tools = chat_messages(request), Offer(request).functions()
    body = {name: request[name] for name in PASSED_ON if name in request}
    body |= {"model": model, "messages": messages, "tools": tools, "stop": request.get("stop_sequences")}
    body["tool_choice"], one_by_one = chat_choice(request.get("tool_choice"), tools)
    body["parallel_tool_calls"] = False if one_by_one else None
    body |= wishes(request)
    try:
        chat = chat_from(body)
    except InvalidRequest as error:
        raise in_own_terms(error) from None
    thinking = request.get("thinking")
    silent = isinstance(thinking, dict) and thinking.get("type") == "disabled"
    asked = Asked(model, input_tokens(chat), thinks_aloud=not silent)
    metadata = request.get("metadata")
    conversation = metadata.get("user_id") if isinstance(metadata, dict) else None
    return replace(
        chat,
        need=need_of(model, chat.need),
        conversation=conversation if isinstance(conversation, str) else "",
        origin=asked,
    )


def wishes(request: JSON) -> JSON:
    """How much to think, and the form of the answer, in chat's fields."""
    body: JSON = {}
    config, thinking = request.get("output_config", {}), request.get("thinking", {})
    for name, value in (("output_config", config), ("thinking", thinking)):
        if not isinstance(value, dict):
            raise invalid(name, "Input should be an object")
    if thinking:
        body["thinking"] = thinking
    effort = effort_of_turn(request) or config.get("effort")
    if isinstance(effort, str) and thinking.get("type") != "disabled":
        body["reasoning_effort"] = effort
    wanted = config.get("format") or request.get("output_format")  # the latter as the beta had it
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
        body["response_format"] = {"type": "json_schema", "schema": wanted.get("schema")}
    return body


def need_of(model: str, need: Need) -> Need:
    """What is asked for by this name: a mode by one of our own names, a model, or the mode that the name of a model
    unknown here stands for."""
    name = model.strip().lower().removesuffix(WINDOW_MARK)
    if name in ALIASES:
        return replace(need, mode=ALIASES[name], pinned=None)
    if need.pinned is None:
        return need
    words = re.split(r"[^a-z]+", name)
    if "claude" not in words and name not in FAMILIES:
        return need
    family = next((mode for word, mode in FAMILIES.items() if word in words), Mode.BALANCED)
    return replace(need, unknown_means=family)


def input_tokens(chat: Chat) -> int:
    """An estimate of the whole prompt, never 0."""
    contents = [message.get("content") for message in chat.body["messages"]]
    parts = [part.get("type") for content in contents if isinstance(content, list) for part in content]
    return max(1, chat.prompt_tokens + sum(PART_TOKENS.get(part, 0) for part in parts))


def probe_words(request: JSON) -> str | None:
    """What to answer to a request that is only a probe; None for one that wants an answer."""
    if request.get("max_tokens") == 0:  # fills the vendor's prompt cache, and there is none here
        return ""
    messages = request["messages"]
    if len(messages) != 1 or messages[0]["role"] != "user":
        return None
    content = messages[0]["content"]
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict):
        content = content[0].get("text")
    if not isinstance(content, str):
        return None
    is_probe = request.get("max_tokens") == 1 and len(content) <= PROBE_CHARS_MAX
    return PROBE_WORDS if is_probe or content == WARM_UP else None


MESSAGE_PATH = re.compile(r"\[(\d+)\]")


def in_own_terms(error: InvalidRequest) -> InvalidRequest:
    """An error about the chat body as one about the request that it was made of."""
    param = error.param or ""
    own = OWN_NAMES.get(param, MESSAGE_PATH.sub(r".\1", param))
    words = error.message.removeprefix(f"'{param}' ")
    if not own or own.partition(".")[0] in ("messages", "tools") or words == error.message:
        return error
    return InvalidRequest(f"{own}: {words}", param=own, code=error.code, status=error.status)


# --- The list of models -----------------------------------------------------------------------------------------------
def model_entry(id: str, name: str, window: int | None, longest: int | None) -> JSON:
    """A model as this API lists it."""
    return {
        "type": "model",
        "id": id,
        "display_name": name,
        "created_at": CREATED_AT,
        "lifecycle": "active",
        "max_input_tokens": window,
        "max_tokens": longest,
    }


def model_list(entries: Iterable[Mapping[str, Any]]) -> bytes:
    """All of them on one page, whatever the client's limit."""
    data = list(entries)
    return dump({"data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]})
