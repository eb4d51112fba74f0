"""Conversations that move from one gateway to another keep model, key and bans: written behind, read once on a miss.

What is read late or not at all costs a provider's cache and nothing else.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import orjson

from routing.sessions import SESSIONS_MAX, Banned, Session, Sessions
from shared.clock import Clock
from shared.link import Away, Link
from shared.names import Names
from shared.rests import PREFIX, Tell
from shared.scripts import TELL

READ_S = 0.02  # a new conversation waits for no more (SPEC 20.1)
RENEWALS = 4  # in a lifetime: one in use does not end in Redis, and is not written with every request


class SharedSessions:
    """`tell` sends a script with a message for the others; it never waits."""

    def __init__(self, sessions: Sessions, ttl_s: float, link: Link, names: Names, clock: Clock, tell: Tell) -> None:
        self._sessions = sessions
        self._ttl_s = ttl_s
        self._link = link
        self._names = names
        self._clock = clock
        self._tell = tell
        self._told: OrderedDict[str, tuple[object, float]] = OrderedDict()  # what Redis holds, and since when
        self._unbanned_at = 0.0

    async def recall(self, key: str) -> None:
        """Ask for a conversation that this gateway does not know."""
        if not key or not self._link.up or self._sessions.get(key, time.monotonic()) is not None:
            return
        try:
            found = await self._link.send("GET", redis_key(key), limit_s=READ_S)
        except Away:
            return
        now = time.monotonic()
        if found is not None and self._sessions.get(key, now) is None:
            self._adopt(key, orjson.loads(found), now)

    def changed(self, key: str, now: float) -> None:
        """Something of this conversation has, perhaps."""
        session = self._sessions.get(key, now)
        if session is None:
            return
        state = (session.model, session.key, tuple(session.banned(now).items()))
        told, since = self._told.get(key, (None, 0.0))
        if told == state and now - since < self._ttl_s / RENEWALS:
            return
        self._note(key, state, now)
        record = self._record(session, now)
        message = {"session": key, **record}
        value = orjson.dumps(record)
        self._tell(TELL, redis_key(key), value, int(self._ttl_s * 1000), kind="session", message=message)

    def heard(self, told: Mapping[str, Any]) -> None:
        """Another gateway has served it; where it is not known here, it is read when it comes."""
        key, now = str(told["session"]), time.monotonic()
        if self._sessions.get(key, now) is not None:
            self._adopt(key, told, now)

    def unbanned(self, now: float) -> None:
        """The operator has lifted all bans: those in Redis too."""
        self._unbanned_at = now

    def _record(self, session: Session, now: float) -> dict[str, Any]:
        bans = {
            platform: [self._clock.shared_ms(ban.until, now), ban.reason]
            for platform, ban in session.banned(now).items()
        }
        model = None if session.model is None else self._names.model(session.model)
        key = None if session.key is None else self._names.key(session.key)
        return {"model": model, "key": key, "bans": bans, "at": self._clock.shared_ms(now, now)}

    def _adopt(self, key: str, record: Mapping[str, Any], now: float) -> None:
        name, key_name = record.get("model"), record.get("key")
        model = None if name is None else self._names.model_id(str(name))
        key_id = None if key_name is None else self._names.key_id(str(key_name))
        bans = {
            str(platform): Banned(self._clock.local(float(until), now), str(reason))
            for platform, (until, reason) in record["bans"].items()
        }
        if self._clock.local(float(record["at"]), now) < self._unbanned_at:
            bans = {}
        self._sessions.adopt(key, model, key_id, bans, now)
        self._note(key, (model, key_id, tuple(bans.items())), now)

    def _note(self, key: str, state: object, now: float) -> None:
        self._told[key] = (state, now)
        self._told.move_to_end(key)
        if len(self._told) > SESSIONS_MAX:
            self._told.popitem(last=False)


def redis_key(session: str) -> str:
    return f"{PREFIX}{{session:{session}}}"
