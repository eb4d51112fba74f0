"""Conversations: what each prefers and avoids, and what it has used lately (SPEC 7.1, 7.5, 7.10).

`now` is in seconds of one monotonic clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field

SESSIONS_MAX = 10_000  # SPEC 7.1; about 4 MB
CONVERSATION_REQUESTS = 2  # a session with fewer is a one-shot prompt, which holds back nobody (SPEC 7.10)


@dataclass(frozen=True, slots=True)
class Banned:
    """A platform that one session avoids, until when and why."""

    until: float
    reason: str


@dataclass(slots=True)
class Session:
    """What one conversation prefers and avoids. `last_used` moves with every touch."""

    last_used: float
    requests: int = 0
    model: int | None = None
    key: int | None = None
    bans: dict[str, Banned] = field(default_factory=dict)  # by platform; bounded by the catalogue
    avoid: frozenset[int] = frozenset()  # by the request that runs now
    avoid_next: frozenset[int] = frozenset()  # by the one after it

    def banned(self, now: float) -> dict[str, Banned]:
        """The bans in force; a ban counts from itself, however much the session is used."""
        if self.bans:
            self.bans = {platform: ban for platform, ban in self.bans.items() if ban.until > now}
        return self.bans


class Sessions:
    """Conversations by session key, oldest use first. The empty key is no session: every operation is a no-op."""

    def __init__(self, ttl_s: float, entries_max: int = SESSIONS_MAX) -> None:
        self._ttl_s = ttl_s
        self._entries_max = entries_max
        self._by_key: OrderedDict[str, Session] = OrderedDict()

    def get(self, key: str, now: float) -> Session | None:
        if not key or (session := self._by_key.get(key)) is None:
            return None
        if session.last_used + self._ttl_s <= now:
            del self._by_key[key]
            return None
        return session

    def arrived(self, key: str, now: float) -> None:
        """Count one more request; what it has to avoid becomes its own."""
        if session := self._touch(key, now):
            session.requests += 1
            session.avoid, session.avoid_next = session.avoid_next, frozenset()

    def is_conversation(self, key: str, now: float) -> bool:
        """Whether it has had more than one request (SPEC 7.10)."""
        session = self.get(key, now)
        return session is not None and session.requests >= CONVERSATION_REQUESTS

    def pin(self, key: str, model: int, key_id: int, now: float) -> None:
        if session := self._touch(key, now):
            session.model, session.key = model, key_id

    def adopt(self, key: str, model: int | None, key_id: int | None, bans: Mapping[str, Banned], now: float) -> None:
        """A conversation that began at another gateway goes on as that one left it."""
        if session := self._touch(key, now):
            session.model, session.key, session.bans = model, key_id, dict(bans)
            session.requests = max(session.requests, 1)

    def ban(self, key: str, platform: str, reason: str, now: float) -> None:
        if session := self._touch(key, now):
            session.bans[platform] = Banned(now + self._ttl_s, reason)

    def lift_bans(self, now: float) -> int:
        """End every ban; gives how many there were."""
        lifted = 0
        for _, session in self.active(now):
            lifted += len(session.banned(now))
            session.bans = {}
        return lifted

    def avoid_next(self, key: str, model: int, now: float) -> None:
        if session := self._touch(key, now):
            session.avoid_next |= {model}

    def clear_model(self, key: str, model: int, now: float) -> None:
        """Forget the preference for this model and its key; bans stay."""
        if (session := self.get(key, now)) and session.model == model:
            session.model = session.key = None

    def clear_key(self, key: str, key_id: int, now: float) -> None:
        """Forget the preferred key; the preferred model stays."""
        if (session := self.get(key, now)) and session.key == key_id:
            session.key = None

    def active(self, now: float) -> Iterator[tuple[str, Session]]:
        self._prune(now)
        yield from self._by_key.items()

    def __len__(self) -> int:
        return len(self._by_key)

    def _touch(self, key: str, now: float) -> Session | None:
        if not key:
            return None
        self._prune(now)
        session = self.get(key, now)
        if session is None:
            while len(self._by_key) >= self._entries_max:
                self._by_key.popitem(last=False)
            session = self._by_key[key] = Session(last_used=now)
        session.last_used = now
        self._by_key.move_to_end(key)
        return session

    def _prune(self, now: float) -> None:
        while self._by_key:
            oldest = next(iter(self._by_key.values()))
            if oldest.last_used + self._ttl_s > now:
                return
            self._by_key.popitem(last=False)


class Uses:
    """Who used a thing last: for each thing its two latest distinct sessions, which is all that
    "did another session use this since then?" needs. Bounded by the catalogue."""

    def __init__(self) -> None:
        self._latest: dict[Hashable, tuple[tuple[str, float], tuple[str, float]]] = {}

    def record(self, thing: Hashable, session: str, now: float) -> None:
        never = ("", float("-inf"))
        first, second = self._latest.get(thing, (never, never))
        self._latest[thing] = ((session, now), second if first[0] == session else first)

    def by_others(self, session: str, since: float) -> set[Hashable]:
        """The things that some other session used after `since`."""
        return {
            thing
            for thing, (first, second) in self._latest.items()
            if (second if first[0] == session else first)[1] > since
        }

    def clear(self) -> None:
        self._latest.clear()
