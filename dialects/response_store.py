"""Finished responses, kept in memory for requests that build on them (SPEC 9.4). No I/O; `now` is an argument."""

from __future__ import annotations

from dataclasses import dataclass

from wire.jsontext import JSON

KEPT_S = 30 * 60.0  # SPEC 9.4
KEPT_MAX = 500
KEPT_BYTES_MAX = 64 * 1024 * 1024  # of JSON, each response with its whole conversation: twice the largest body


@dataclass(frozen=True, slots=True)
class Kept:
    """A finished response and the conversation up to its end."""

    response: JSON
    items: list[JSON]
    inputs: int  # how many of the items came before the response's own
    size: int
    expires_at: float


class ResponseStore:
    """Finished responses, oldest first out: after a time, beyond a number, beyond a size.

    A conversation's items are shared by its responses but counted in each, which errs on the safe side.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._kept: dict[str, Kept] = {}  # in order of age
        self._items: dict[str, tuple[str, JSON]] = {}  # by item id: the youngest response that holds it, and the item
        self._size = 0

    def get(self, id: str, now: float) -> Kept | None:
        kept = self._kept.get(id)
        return kept if kept is not None and kept.expires_at > now else None

    def item(self, id: str, now: float) -> JSON | None:
        owner, item = self._items.get(id, ("", None))
        return item if self.get(owner, now) else None

    def add(self, kept: Kept, now: float) -> None:
        if kept.size > self._bytes_max:
            return
        id = kept.response["id"]
        self._kept[id] = kept
        self._size += kept.size
        for item in kept.items:
            if isinstance(item_id := item.get("id"), str):
                self._items[item_id] = (id, item)
        while self._crowded(now):
            self.remove(next(iter(self._kept)))

    def remove(self, id: str) -> None:
        kept = self._kept.pop(id, None)
        if kept is None:
            return
        self._size -= kept.size
        for item in kept.items:
            if isinstance(item_id := item.get("id"), str) and self._items.get(item_id, ("",))[0] == id:
                del self._items[item_id]

    def _crowded(self, now: float) -> bool:
        if len(self._kept) > KEPT_MAX or self._size > self._bytes_max:
            return True
        return bool(self._kept) and next(iter(self._kept.values())).expires_at <= now
