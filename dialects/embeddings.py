"""OpenAI's Embeddings: texts in, vectors out, as numbers or as base64 whatever the platform gave. No I/O."""

from __future__ import annotations

import struct
from base64 import b64encode
from collections.abc import Mapping
from typing import Any

from dialects.chat import MODEL_CHARS_MAX
from dialects.values import number, wrong_type
from wire.chat import (
    CHARS_PER_TOKEN,
    Chat,
    Completion,
    Event,
    LocalRoute,
    Mode,
    ModelKind,
    Need,
    Tally,
    frame,
    parse_model,
)
from wire.errors import GatewayError, InvalidRequest
from wire.jsontext import dump, load_object

TEXTS_MAX = 2048  # in one request, as in OpenAI's own API
DIMENSIONS_MAX = 16_384  # four times the longest in use
FORMATS = ("float", "base64")


class EmbeddingsDialect:
    """POST /v1/embeddings."""

    paths = ("/v1/embeddings",)
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
        body = {name: value for name, value in load_object(raw).items() if value is not None}
        model = body.pop("model", "")
        if not isinstance(model, str) or len(model) > MODEL_CHARS_MAX:
            raise wrong_type("model", f"a string of at most {MODEL_CHARS_MAX} characters")
        tokens = tokens_in(body.get("input"))
        wanted = body.pop("encoding_format", "float")
        if wanted not in FORMATS:
            raise wrong_type("encoding_format", "'float' or 'base64'")
        if "dimensions" in body:
            body["dimensions"] = number(body["dimensions"], "dimensions", whole=True)
            if not 1 <= body["dimensions"] <= DIMENSIONS_MAX:
                raise wrong_type("dimensions", f"from 1 to {DIMENSIONS_MAX}")
        body.pop("stream", None)
        _, pinned = parse_model(model)
        return Chat(
            need=Need(mode=Mode.BALANCED, pinned=pinned, tokens=tokens, kind=ModelKind.EMBEDDING),
            body=body,
            model=model,
            stream=False,
            include_usage=False,
            prompt_tokens=tokens,
            max_tokens=None,
            first_user_text="",
            origin=wanted,
        )

    def encoder(self, chat: Chat, now: float) -> EmbeddingsEncoder:
        return EmbeddingsEncoder(as_base64=chat.origin == "base64")


def tokens_in(given: object) -> int:
    """How many tokens about; a text, texts, or either of them in tokens. Raises InvalidRequest."""
    if given is None:
        raise InvalidRequest("'input' is missing.", param="input")
    texts: list[Any] = (
        [given] if isinstance(given, str) or is_tokens(given) else given if isinstance(given, list) else []
    )
    if not texts or not all((isinstance(text, str) and text) or is_tokens(text) for text in texts):
        raise wrong_type("input", "a text or a list of texts, none of them empty")
    if len({type(text) for text in texts}) > 1:
        raise wrong_type("input", "texts or tokens, not both")
    if len(texts) > TEXTS_MAX:
        raise InvalidRequest(f"'input' has more than {TEXTS_MAX} texts: send several requests.", param="input")
    return sum(-(-len(text) // CHARS_PER_TOKEN) if isinstance(text, str) else len(text) for text in texts)


def is_tokens(given: object) -> bool:
    return isinstance(given, list) and bool(given) and all(type(token) is int for token in given)


class EmbeddingsEncoder:
    """One answer, never a stream."""

    def __init__(self, *, as_base64: bool) -> None:
        self._as_base64 = as_base64

    def whole(self, completion: Completion) -> bytes:
        body = completion.body
        if not self._as_base64:
            return dump(body)
        return dump({**body, "data": [{**entry, "embedding": packed(entry["embedding"])} for entry in body["data"]]})

    def feed(self, events: list[Event]) -> bytes:
        return b""

    def end(self, tally: Tally) -> bytes:
        return b""

    def fail(self, error: GatewayError, tally: Tally) -> bytes:
        return frame({"error": error.in_stream()})

    def heartbeat(self) -> bytes:
        return b""

    def resumed(self, label: str) -> bytes:
        return b""


def packed(vector: list[float]) -> str:
    """Little-endian float32 in base64."""
    return b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
