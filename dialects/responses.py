"""OpenAI's Responses API, the second dialect: a request to a `Chat`, and the responses that later requests build on.

Judging and mending a request is chat.chat_from's affair: response_items.py makes chat messages out of items, and
response_events.py tells the answer. Responses are kept in memory only (SPEC 9.4), here. No I/O; `now` is an argument,
and new ids come from the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dialects.chat import boolean, chat_from
from dialects.history import wrong_type
from dialects.response_events import Asked, ResponsesEncoder
from dialects.response_items import Tools, Turns, flat, flat_choice, in_own_terms
from wire.chat import Chat, LocalRoute
from wire.errors import GatewayError, InvalidRequest
from wire.jsontext import JSON, dump, load_object

Name = tuple[int | None, str]  # whose it is (None: of the gateway's own key), and its id

KEPT_S = 30 * 60.0  # SPEC 9.4
KEPT_MAX = 500
KEPT_BYTES_MAX = 64 * 1024 * 1024  # of JSON, each response with its whole conversation: twice the largest body
# What goes on to providers under its own name. The rest is this API's own business, or news to most providers.
PASSED_ON = (
    "model", "stream", "temperature", "top_p", "parallel_tool_calls", "max_output_tokens", "user", "stop", "seed",
    "presence_penalty", "frequency_penalty", "logit_bias", "top_k", "min_p", "repetition_penalty",
)  # fmt: skip
# What a response repeats of its request as it came, and what it says where the request was silent.
REPEATED: JSON = {
    "instructions": None, "max_tool_calls": None, "metadata": {}, "parallel_tool_calls": True,
    "previous_response_id": None, "prompt_cache_key": None, "safety_identifier": None, "store": True,
    "top_logprobs": None, "user": None,
}  # fmt: skip
UNSERVED = {
    "background": "Responses are not made in the background here: leave 'background' out and wait, or stream.",
    "conversation": "Conversations are not kept here: use 'previous_response_id', or send the whole input.",
    "prompt": "Prompt templates are not kept here: send 'instructions' and 'input'.",
}


@dataclass(frozen=True, slots=True)
class Kept:
    """A finished response and the conversation up to its end."""

    response: JSON
    items: list[JSON]
    size: int
    expires_at: float
    client: int | None = None  # whose it is


class ResponseStore:
    """Finished responses, oldest first out: after a time, beyond a number, beyond a size.

    A conversation's items are shared by its responses but counted in each, which errs on the safe side. Ids are
    looked up together with the client, so that nobody comes by another's (SPEC 19.1).
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._kept: dict[Name, Kept] = {}  # in order of age
        self._items: dict[Name, tuple[str, JSON]] = {}  # the youngest response that holds the item, and the item
        self._size = 0

    def get(self, id: str, now: float, client: int | None) -> Kept | None:
        kept = self._kept.get((client, id))
        return kept if kept is not None and kept.expires_at > now else None

    def item(self, id: str, now: float, client: int | None) -> JSON | None:
        owner, item = self._items.get((client, id), ("", None))
        return item if self.get(owner, now, client) else None

    def add(self, kept: Kept, now: float) -> None:
        if kept.size > self._bytes_max:
            return
        id = kept.response["id"]
        self._kept[kept.client, id] = kept
        self._size += kept.size
        for item in kept.items:
            if isinstance(item_id := item.get("id"), str):
                self._items[kept.client, item_id] = (id, item)
        while self._crowded(now):
            client, id = next(iter(self._kept))
            self.remove(id, client)

    def remove(self, id: str, client: int | None) -> None:
        kept = self._kept.pop((client, id), None)
        if kept is None:
            return
        self._size -= kept.size
        for item in kept.items:
            if isinstance(item_id := item.get("id"), str) and self._items.get((client, item_id), ("",))[0] == id:
                del self._items[client, item_id]

    def _crowded(self, now: float) -> bool:
        if len(self._kept) > KEPT_MAX or self._size > self._bytes_max:
            return True
        return bool(self._kept) and next(iter(self._kept.values())).expires_at <= now


class ResponsesDialect:
    """POST /v1/responses. `new_token` gives a random text that nobody can guess, 32 characters or more."""

    paths = ("/v1/responses",)
    id_headers = (b"x-request-id",)

    def __init__(self, new_token: Callable[[], str], bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._new_token = new_token
        self._store = ResponseStore(bytes_max)

    def is_spoken(self, path: str, headers: Mapping[bytes, bytes]) -> bool:
        return False

    def status(self, error: GatewayError) -> int:
        return error.status

    def error(self, error: GatewayError, request_id: str) -> bytes:
        return error.body()

    def extra_routes(self) -> tuple[LocalRoute, ...]:
        # With its prefix, so that /v1/responses/compact and the like are a 404, which clients survive.
        path = "/v1/responses/resp_{token}"
        return (
            LocalRoute("GET", path, lambda found, raw, now, client: self.show(f"resp_{found['token']}", now, client)),
            LocalRoute(
                "DELETE", path, lambda found, raw, now, client: dump(self.delete(f"resp_{found['token']}", now, client))
            ),
        )

    def parse(self, raw: bytes, now: float, client: int | None = None) -> Chat:
        request = {name: value for name, value in load_object(raw).items() if value is not None}
        for name, words in UNSERVED.items():
            if request.get(name):
                raise InvalidRequest(words, param=name, code="unsupported_parameter")
        check_types(request)
        previous = self._previous(request, now, client)
        given = [self._resolved(item, f"input[{n}]", now, client) for n, item in enumerate(input_items(request))]
        history = previous.items if previous else []
        if not given and not history:
            raise InvalidRequest("'input' must not be empty.", param="input")
        tools = Tools(request.get("tools"))
        turns = Turns()
        for item in history:
            turns.add(item, "previous_response_id")
        for index, item in enumerate(given):
            turns.add(item, f"input[{index}]")
        try:
            chat = chat_from(chat_body(request, tools, turns))
        except InvalidRequest as error:
            raise in_own_terms(error, turns.sources, tools.paths) from None
        size = len(raw) + (previous.size if previous else 0)
        asked = Asked(repeated(request, chat.body), [*history, *given], size, tools.offers, client)
        return replace(chat, origin=asked)

    def encoder(self, chat: Chat, now: float) -> ResponsesEncoder:
        asked: Asked = chat.origin

        def keep(response: JSON, size: int) -> None:
            items = [*asked.items, *response["output"]]
            self._store.add(Kept(response, items, asked.size + size, now + KEPT_S, asked.client), now)

        wanted = asked.repeated["store"]
        return ResponsesEncoder(chat, asked, self._new_token(), int(now), keep if wanted else forget)

    def show(self, id: str, now: float, client: int | None) -> bytes:
        """The body of a kept response. Raises InvalidRequest with status 404."""
        kept = self._store.get(id, now, client)
        if kept is None:
            raise InvalidRequest(not_kept(id), code="response_not_found", status=404)
        return dump(kept.response)

    def delete(self, id: str, now: float, client: int | None) -> JSON:
        if self._store.get(id, now, client) is None:
            raise InvalidRequest(not_kept(id), code="response_not_found", status=404)
        self._store.remove(id, client)
        return {"id": id, "object": "response", "deleted": True}

    def _previous(self, request: JSON, now: float, client: int | None) -> Kept | None:
        id = request.get("previous_response_id")
        if id is None:
            return None
        kept = self._store.get(id, now, client) if isinstance(id, str) else None
        if kept is None:
            raise InvalidRequest(not_kept(id), param="previous_response_id", code="previous_response_not_found")
        return kept

    def _resolved(self, item: object, path: str, now: float, client: int | None) -> JSON:
        """The item itself, or the one that it refers to."""
        if not isinstance(item, dict):
            raise wrong_type(path, "an object")
        if item.get("type") != "item_reference" and item.keys() != {"id"}:  # the type may be left out
            return item
        id = item.get("id")
        found = self._store.item(id, now, client) if isinstance(id, str) else None
        if found is None:
            words = (
                f"Item with id '{id}' not found: items are kept for {KEPT_S / 60:.0f} minutes. Send the item itself."
            )
            raise InvalidRequest(words, param=f"{path}.id", code="item_not_found")
        return found


def forget(response: JSON, size: int) -> None:
    """`store: false` keeps nothing."""


def not_kept(id: object) -> str:
    limits = f"the latest {KEPT_MAX} are kept for {KEPT_S / 60:.0f} minutes, and none over a restart"
    return f"Response with id '{id}' not found: {limits}."


def check_types(request: JSON) -> None:
    """Of the fields that are only read here and in the encoder."""
    for name in ("text", "reasoning", "metadata"):
        if not isinstance(request.get(name, {}), dict):
            raise wrong_type(name, "an object")
    if not isinstance(request.get("instructions", ""), str):
        raise wrong_type("instructions", "a string")
    for name in ("store", "parallel_tool_calls"):
        if name in request:
            request[name] = boolean(request[name], name)


def input_items(request: JSON) -> list[Any]:
    given = request.get("input")
    if isinstance(given, str):
        return [{"type": "message", "role": "user", "content": given}]
    if not isinstance(given, list):
        raise wrong_type("input", "a string or a list of items")
    return given


def chat_body(request: JSON, tools: Tools, turns: Turns) -> JSON:
    """The request in chat's form, as yet unjudged."""
    body = {name: request[name] for name in PASSED_ON if name in request}
    body["messages"] = turns.messages_after(request.get("instructions", ""))
    body["tool_choice"] = tools.choice(request.get("tool_choice"))  # may take tools away
    body["tools"] = tools.chat
    body["reasoning_effort"] = request.get("reasoning", {}).get("effort")
    wanted = request.get("text", {}).get("format")
    if isinstance(wanted, dict):  # chat_from knows a schema at this level
        wanted = {name: value for name, value in wanted.items() if value is not None}
    body["response_format"] = wanted
    return body


def repeated(request: JSON, body: Mapping[str, Any]) -> JSON:
    """What a response says of its request: as chat_from has mended it, and in this API's own form."""
    text = {name: value for name, value in request.get("text", {}).items() if value is not None}
    return {
        **{name: request.get(name, default) for name, default in REPEATED.items()},
        "max_output_tokens": body.get("max_tokens"),
        "reasoning": {"summary": None, **request.get("reasoning", {}), "effort": body.get("reasoning_effort")},
        "temperature": body.get("temperature"),
        "text": {**text, "format": flat(body.get("response_format", {"type": "text"}))},
        "tool_choice": flat_choice(request.get("tool_choice", "auto")),
        "tools": [flat(tool) for tool in request.get("tools", ())],
        "top_p": body.get("top_p"),
    }
