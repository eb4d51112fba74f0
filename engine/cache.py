"""Answers kept for equal requests (SPEC 18.1): the least recently used goes first, within a number of bytes. Pure."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import orjson

from wire.chat import Chat, ModelKind, Need

ENTRY_BYTES = 600  # of an entry beside its answer, measured: key, dataclass, names, places in the map
NOT_REPEATABLE = ("logprobs", "top_logprobs", "audio")  # say more than an answer kept as text could give back


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer in OpenAI's chat form, as JSON, and whose it is."""

    raw: bytes
    platform: str
    model_id: str

    @property
    def label(self) -> str:
        return f"{self.platform}/{self.model_id}"

    @property
    def size(self) -> int:
        return len(self.raw) + ENTRY_BYTES


@dataclass(frozen=True, slots=True)
class Entry:
    answer: Answer
    expires_at: float


class Cache:
    """Answers by key. `now` is in seconds of one clock."""

    def __init__(self, bytes_max: int, ttl_s: float) -> None:
        self._bytes_max = bytes_max
        self._ttl_s = ttl_s
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self.size = 0  # bytes

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes, now: float) -> Answer | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.expires_at <= now:
            self._remove(key)
            return None
        self._entries.move_to_end(key)
        return entry.answer

    def put(self, key: bytes, answer: Answer, now: float) -> bool:
        """Keep an answer from now on; False for one that is larger than all there is room for."""
        if answer.size > self._bytes_max:
            return False
        self._remove(key)
        self._entries[key] = Entry(answer, now + self._ttl_s)
        self.size += answer.size
        while self.size > self._bytes_max:
            self._remove(next(iter(self._entries)))
        return True

    def _remove(self, key: bytes) -> None:
        if (entry := self._entries.pop(key, None)) is not None:
            self.size -= entry.answer.size


def repeatable(chat: Chat) -> bool:
    """Whether an equal request may get the same answer: nothing was left to chance, and nothing but the answer itself
    was asked for."""
    body = chat.body
    if chat.answered is not None or chat.need.kind is not ModelKind.CHAT:  # vectors are kept by whoever asked for them
        return False
    return not body.get("temperature") and not any(map(body.get, NOT_REPEATABLE))


def key_of(chat: Chat, client: int | None) -> bytes:
    """The same for equal requests of one client, whatever dialect they come in and whether they stream."""
    need: Need = chat.need
    asked = (client, need.mode, need.pinned, need.strict, need.min_rank, need.no_train, chat.legacy)
    body: Mapping[str, Any] = dict(chat.body)
    try:
        told = orjson.dumps((asked, body), option=orjson.OPT_SORT_KEYS)
    except TypeError:  # half an emoji, or a number larger than 64 bits
        told = json.dumps((asked, body), sort_keys=True).encode()
    return blake2b(told, digest_size=24).digest()
