"""OpenAI's Responses API, the second dialect: a request to a `Chat`, and the responses that later requests build on.

Judging and mending a request is chat.chat_from's affair: response_request.py makes a chat body out of it, and
response_events.py tells the answer. Responses are kept in memory only (SPEC 9.4), in response_store.py. No I/O; `now`
is an argument, and new ids and sealing come from the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any

from msgspec.structs import replace

from dialects.chat import chat_from
from dialects.compaction import ASKED_FOR, NO_SEAL, TRIGGER, Seal
from dialects.response_events import Asked, ResponsesEncoder
from dialects.response_request import chat_of_items, check_types, in_own_terms, input_items
from dialects.response_store import KEPT_BYTES_MAX, KEPT_MAX, KEPT_S, Kept, ResponseStore
from dialects.response_tools import flat, flat_choice
from dialects.values import wrong_type
from wire.chat import Chat, LocalRoute
from wire.errors import GatewayError, InvalidRequest
from wire.jsontext import JSON, dump, load_object

LISTED, LISTED_MAX = 20, 100  # input items in one answer
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


class ResponsesDialect:
    """POST /v1/responses. `new_token` gives a random text that nobody can guess, 32 characters or more."""

    paths = ("/v1/responses",)
    id_headers = (b"x-request-id",)

    def __init__(self, new_token: Callable[[], str], seal: Seal = NO_SEAL, bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._new_token = new_token
        self._seal = seal
        self._store = ResponseStore(bytes_max)

    def is_spoken(self, path: str, headers: Mapping[bytes, bytes]) -> bool:
        return False

    def status(self, error: GatewayError) -> int:
        return error.status

    def error(self, error: GatewayError, request_id: str) -> bytes:
        return error.body()

    def extra_routes(self) -> tuple[LocalRoute, ...]:
        path = "/v1/responses/resp_{token}"  # with its prefix, so that another word is a 404
        return (
            LocalRoute("GET", path, lambda given, raw, now, client: self.show(named(given), now, client)),
            LocalRoute("DELETE", path, lambda given, raw, now, client: dump(self.delete(named(given), now, client))),
            LocalRoute(
                "GET", path + "/input_items", lambda given, raw, now, client: dump(self.list_input(given, now, client))
            ),
            LocalRoute(
                "POST", "/v1/responses/input_tokens", lambda given, raw, now, client: self.count_input(raw, now, client)
            ),
        )

    def parse(self, raw: bytes, now: float, client: int | None = None) -> Chat:
        return self.understood(raw, now, client)

    def understood(self, raw: bytes, now: float, client: int | None, *, compact: bool = False) -> Chat:
        """The request as a chat; with `compact`, or where its input says so, as one that asks for a summary."""
        request = {name: value for name, value in load_object(raw).items() if value is not None}
        for name, words in UNSERVED.items():
            if request.get(name):
                raise InvalidRequest(words, param=name, code="unsupported_parameter")
        check_types(request)
        previous = self._previous(request, now, client)
        given = [self._resolved(item, f"input[{n}]", now, client) for n, item in enumerate(input_items(request))]
        history = previous.items if previous else []
        paths = ["previous_response_id"] * len(history) + [f"input[{n}]" for n in range(len(given))]
        placed = [*zip([*history, *given], paths, strict=True)]
        compact = compact or any(item.get("type") == TRIGGER for item, _ in placed)
        placed = [(item, path) for item, path in placed if item.get("type") != TRIGGER]
        if not placed:
            raise InvalidRequest("'input' must not be empty.", param="input")
        items = [item for item, _ in placed]
        asked_of = without_tools(request) if compact else request
        body, tools, turns = chat_of_items(asked_of, items, [path for _, path in placed], self._seal)
        if compact:
            body["messages"] = [*body["messages"], {"role": "user", "content": ASKED_FOR}]
        try:
            chat = chat_from(body)
        except InvalidRequest as error:
            raise in_own_terms(error, turns.sources, tools.paths) from None
        size = len(raw) + (previous.size if previous else 0)
        asked = Asked(repeated(request, chat.body), [] if compact else items, size, tools.offers, client)
        if compact:
            asked = replace(asked, seal=self._seal)
        conversation = request.get("prompt_cache_key")
        return replace(chat, origin=asked, conversation=conversation if isinstance(conversation, str) else "")

    def encoder(self, chat: Chat, now: float) -> ResponsesEncoder:
        asked: Asked = chat.origin

        def keep(response: JSON, size: int) -> None:
            items = [*asked.items, *response["output"]]
            kept = Kept(response, items, len(asked.items), asked.size + size, now + KEPT_S, asked.client)
            self._store.add(kept, now)

        wanted = asked.repeated["store"]
        return ResponsesEncoder(chat, asked, self._new_token(), int(now), keep if wanted else forget)

    def count_input(self, raw: bytes, now: float, client: int | None) -> bytes:
        """How long the input is, by the same estimate as everywhere."""
        return dump(
            {"object": "response.input_tokens", "input_tokens": self.understood(raw, now, client).prompt_tokens}
        )

    def list_input(self, given: Mapping[str, str], now: float, client: int | None) -> JSON:
        """What a kept response was an answer to, the latest first unless asked otherwise."""
        kept = self._store.get(named(given), now, client)
        if kept is None:
            raise InvalidRequest(not_kept(named(given)), code="response_not_found", status=404)
        items = [shown(item, place) for place, item in enumerate(kept.items[: kept.inputs])]
        if given.get("order") != "asc":
            items.reverse()
        ids = [item["id"] for item in items]
        if (after := given.get("after")) in ids:
            items = items[ids.index(after) + 1 :]
        wanted = given.get("limit", "")
        page = items[: min(int(wanted), LISTED_MAX) if wanted.isascii() and wanted.isdigit() else LISTED]
        first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
        return {
            "object": "list", "data": page, "first_id": first, "last_id": last, "has_more": len(page) < len(items),
        }  # fmt: skip

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


class CompactDialect:
    """POST /v1/responses/compact: the same conversation as one item, and nothing else of a response."""

    paths = ("/v1/responses/compact",)

    def __init__(self, responses: ResponsesDialect) -> None:
        self._responses = responses
        self.id_headers = responses.id_headers
        self.is_spoken, self.status, self.error = responses.is_spoken, responses.status, responses.error

    def extra_routes(self) -> tuple[LocalRoute, ...]:
        return ()

    def parse(self, raw: bytes, now: float, client: int | None = None) -> Chat:
        chat = self._responses.understood(raw, now, client, compact=True)
        return replace(chat, stream=False, include_usage=False, origin=replace(chat.origin, bare=True))

    def encoder(self, chat: Chat, now: float) -> ResponsesEncoder:
        return self._responses.encoder(chat, now)


def without_tools(request: JSON) -> JSON:
    """A request whose answer is to be plain text."""
    return {name: value for name, value in request.items() if name not in ("tools", "tool_choice", "text")}


def shown(item: JSON, place: int) -> JSON:
    """An item of the input as this API lists it: with an id, and a message's content as parts."""
    kind = item.get("type") or "message"
    shown = {"id": f"item_{blake2b(dump(item), digest_size=12).hexdigest()}{place:04x}", "type": kind, **item}
    if kind == "message" and isinstance(item.get("content"), str):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        shown["content"] = [{"type": part, "text": item["content"]}]
    return {"status": "completed", **shown} if kind == "message" else shown


def forget(response: JSON, size: int) -> None:
    """`store: false` keeps nothing."""


def not_kept(id: object) -> str:
    limits = f"the latest {KEPT_MAX} are kept for {KEPT_S / 60:.0f} minutes, and none over a restart"
    return f"Response with id '{id}' not found: {limits}."


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


def named(given: Mapping[str, str]) -> str:
    """The id of the response that an address names."""
    return f"resp_{given['token']}"
