"""What every adapter is and shares: the protocols, a request to a provider, its address and headers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from msgspec import Struct

from adapters.plain import PlainAnswer
from protection import Failure, UpstreamError
from routing.catalog import Key, Model, Platform, how_written, is_templated
from wire.chat import Chat, Completion, Event, Tally, chunk_of, frame
from wire.http import Endpoint
from wire.jsontext import JSON

USER_AGENT = "freeway/0.1"  # some edges refuse a client without a name of its own


class Request(Struct, frozen=True):
    """What a provider is asked."""

    endpoint: Endpoint
    body: bytes
    gives_back: bool = False  # it holds what a platform gave out for itself, which another may refuse


def base_url(platform: Platform, key: Key) -> tuple[str, str]:
    """The platform's address and the credential to send, with `{account_id}` taken from an `account_id:token` key.

    Raises UpstreamError for a key without its account: no part of it may get into an address (SPEC 2.5).
    """
    url, secret = platform.base_url, key.secret
    if words := how_written(platform, secret):
        raise UpstreamError(Failure.AUTH, words)
    if is_templated(platform):
        account, _, secret = secret.partition(":")
        url = re.sub(r"\{\w+\}", account, url)
    return url, secret or platform.quirks.get("anonymous_key", "")


def call_headers(credential: dict[str, str], quirks: Mapping[str, Any]) -> dict[str, str]:
    """The headers of every call to a platform."""
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": USER_AGENT}
    return {**headers, **credential, **quirks.get("headers", {})}


def bearer_headers(secret: str, quirks: Mapping[str, Any]) -> dict[str, str]:
    return call_headers({"Authorization": f"Bearer {secret}"} if secret else {}, quirks)


def piece_of(like: JSON, delta: JSON) -> Event:
    chunk = chunk_of(like, delta)
    return Event(frame(chunk), chunk)


class Translator(Protocol):
    """One stream's chunks, from the adapter's wire to OpenAI's chat form."""

    def recognised(self, raw: bytes, payload: bytes) -> Sequence[Event] | None:
        """The events of a frame that is nothing but text, an ending or usage in the one form, and so need not be fed.
        None for one that needs a look."""

    @property
    def finishing(self) -> bool:
        """Whether a finish reason has come. It is believed at the end, when `end` gives it out (SPEC 8.9)."""

    @property
    def holding(self) -> bool:
        """Whether a tool call has begun that has not gone out (SPEC 14.7)."""

    @property
    def expects_calls(self) -> bool:
        """Whether a tool call is likely still to come."""

    @property
    def held_chars(self) -> int:
        """How much of tool calls has ever been held back. While it grows the model is answering, though nothing goes
        out."""

    def feed(self, raw: bytes, payload: bytes, chunk: dict[str, Any]) -> list[Event]:
        """The events that this chunk amounts to; its raw frame goes out unchanged where nothing had to change.

        Raises UpstreamError for an answer that is none.
        """

    def end(self) -> list[Event]:
        """At the end of the answer: what was held back until then, and how it ended. Raises UpstreamError."""


class Adapter(Protocol):
    """One wire format."""

    def reply_here(self, chat: Chat) -> Reply | None:
        """An answer made in this process; None where a provider has to be asked."""

    def request(self, model: Model, key: Key, chat: Chat, *, bare: bool = False) -> Request:
        """`bare`: without what platforms gave out for themselves, because this one has refused it."""

    def headers(self, secret: str, quirks: Mapping[str, Any]) -> dict[str, str]:
        """The headers of every call; one of them carries the secret."""

    def plain_answer(self, raw: bytes, chat: Chat) -> PlainAnswer | None:
        """A whole answer that is nothing but text in OpenAI's form, and so can go out as it came; None for any
        other."""

    def completion(self, raw: bytes, body: dict[str, Any], chat: Chat) -> Completion | None:
        """A whole answer in the one form; None for a body that is no answer. Raises UpstreamError for one that says it
        failed."""

    def translator(self, tally: Tally, chat: Chat, *, whole_calls: bool = True) -> Translator:
        """The translator of one stream. With `whole_calls` a tool call goes out when it is complete (SPEC 14.7)."""


class Reply(Struct):
    """A committed answer that is all there: whole, or as the events of a stream."""

    tally: Tally
    completion: Completion | None = None
    first: list[Event] | None = None
