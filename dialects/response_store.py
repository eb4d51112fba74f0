"""Finished responses, kept in memory for requests that build on them (SPEC 9.4). No I/O; `now` is an argument."""

from __future__ import annotations

from dataclasses import dataclass

from wire.jsontext import JSON

KEPT_S = 30 * 60.0  # SPEC 9.4
KEPT_MAX = 500
KEPT_BYTES_MAX = 64 * 1024 * 1024  # of JSON, each response with its whole conversation: twice the largest body


Name = tuple[int | None, str]  # whose it is (None: of the gateway's own key), and its id


@dataclass(frozen=True, slots=True)
class Kept:
    """A finished response and the conversation up to its end."""

    response: JSON
    items: list[JSON]
    inputs: int  # how many of the items came before the response's own
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
