"""The built-in demo: answers made in-process, so that the first request works without a key and without a network."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any

from adapters.answers import note_completion
from adapters.base import Reply, Request, Translator
from adapters.embeddings import committed, texts_of, unit
from routing.catalog import Key, Model
from wire.chat import Chat, Completion, Event, ModelKind, Tally, frame
from wire.jsontext import JSON, dump

DEMO_WORDS = (
    "This is Freeway's built-in demo model, not a language model: no provider key is configured yet, so the gateway "
    "wrote this answer itself. It shows that your client, its key and streaming work. Add a provider's key on the "
    "dashboard, and the same request will be answered by a real model."
)


EMBEDDER = "demo-embedding-hashes"
DIMENSIONS = 256
NUMBERS_IN_BLOCK = 16  # of four bytes, in one hash


class DemoAdapter:
    """Asks nobody. `clock` gives seconds since 1970."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock

    def reply_here(self, chat: Chat) -> Reply:
        if chat.need.kind is ModelKind.EMBEDDING:
            return demo_vectors(chat)
        return demo_reply(chat, self._clock())

    def request(self, model: Model, key: Key, chat: Chat, *, bare: bool = False) -> Request:
        raise NotImplementedError("the demo is not called over a network")

    def headers(self, secret: str, quirks: Mapping[str, Any]) -> dict[str, str]:
        return {}

    def plain_answer(self, raw: bytes, chat: Chat) -> None:
        return None

    def completion(self, raw: bytes, body: JSON, chat: Chat) -> None:
        return None

    def translator(self, tally: Tally, chat: Chat, *, whole_calls: bool = True) -> Translator:
        raise NotImplementedError("the demo's answers need no translation")


def demo_reply(chat: Chat, utc: float) -> Reply:
    """An answer made in-process, so that the first request works without a key and without a network."""
    words = DEMO_WORDS.split(" ")
    usage = {"prompt_tokens": chat.prompt_tokens, "completion_tokens": len(words)}
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    head = {"id": f"chatcmpl-demo-{int(utc * 1e9):x}", "created": int(utc), "model": "demo"}
    message = {"role": "assistant", "content": DEMO_WORDS}
    choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
    body = {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
    tally = Tally()
    note_completion(body, tally)
    if not chat.stream:
        return Reply(tally, completion=Completion(dump(body), body))
    head["object"] = "chat.completion.chunk"
    deltas: list[dict[str, Any]] = [{"content": word if index == 0 else f" {word}"} for index, word in enumerate(words)]
    deltas[0]["role"] = "assistant"
    chunks = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    return Reply(tally, first=[Event(frame(chunk), chunk) for chunk in chunks])


def demo_vectors(chat: Chat) -> Reply:
    """Hashes in place of meaning: the same text has the same vector each time, and that is all."""
    length = chat.body.get("dimensions", DIMENSIONS)
    return committed([hashed(text, length) for text in texts_of(chat)], chat, EMBEDDER, None)


def hashed(text: object, length: int) -> list[float]:
    """Numbers from -1 to 1 that depend on nothing but the text, brought to length 1."""
    seed = dump(text)
    blocks = [blake2b(b"%d:%b" % (block, seed)).digest() for block in range(-(-length // NUMBERS_IN_BLOCK))]
    numbers = struct.unpack(f"<{len(blocks) * NUMBERS_IN_BLOCK}i", b"".join(blocks))[:length]
    return unit([number / 2**31 for number in numbers])
