"""Everything that several gateways share through Redis (SPEC 20.1), behind the protocol in engine/sharing.py.

What a request reads is this process' memory. Changes are told to all on one channel and lie in Redis for those that
start or come back; only a loan of the ledger, a trial's lease and an unknown conversation are asked for, each within a
limit. When Redis is away everything goes on with what is known here; when it is back both sides tell each other all.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import orjson

from protection import Ban, ClearKeyPin, ClearPin, Effect, Pin, Recover, RestKey, RestModel
from router import Router
from routing.clients import Admission, Client
from routing.route import Route
from routing.standing import Protection
from shared import rests, scripts, statuses
from shared.clients import SharedClients
from shared.clock import Clock
from shared.leases import Leases
from shared.link import Away, Link
from shared.names import Names
from shared.outbox import Outbox
from shared.rests import PREFIX, Rests
from shared.sessions import SharedSessions
from shared.shares import SharedLedger
from shared.statuses import Statuses

CHANNEL = PREFIX + "news"
GATEWAYS = PREFIX + "gateways"
BEAT_S, GONE_S = 1.0, 5.0  # a gateway not heard of for so long is gone
NEWS_S = 0.1  # how soon a key's status is told
FOUND_MAX = 20_000  # keys that are read when Redis is back: cooldowns of any catalogue
SCAN_COUNT = 500  # keys looked at in one step; well under a millisecond of Redis' time
SCANS_MAX = 2_000  # a million keys: then others use this Redis for something else
SCRIPTS = (scripts.REST, scripts.LIFT, scripts.TELL, scripts.RELEASE, scripts.BEAT, scripts.SHARE)
Log = Callable[..., None]


class SharedState:
    def __init__(
        self,
        address: str,
        protection: Protection,
        router: Router,
        *,
        sticky_ttl_s: float,
        log: Log,
        freed: Callable[[], None],
        catalogue_changed: Callable[[], Awaitable[None]],
    ) -> None:
        """`freed` is called when something has come back that requests may wait for."""
        self._id = secrets.token_hex(6)
        self._protection = protection
        self._log = log
        self._freed = freed
        self._changed_elsewhere = catalogue_changed
        self._clock = Clock()
        self._link = Link(address, CHANNEL, SCRIPTS)
        self._outbox = Outbox(self._link)
        names = Names(router)
        self._rests = Rests(protection, names, self._clock, self._tell)
        self._leases = Leases(self._id, protection.trials, self._link, names, self._tell)
        self._statuses = Statuses(router, names, self._tell, freed)
        self._sessions = SharedSessions(protection.sessions, sticky_ttl_s, self._link, names, self._clock, self._tell)
        self._ledger = SharedLedger(self._id, self._link, names, router.ledger)
        self._clients = SharedClients(self._ledger)
        router.ledger.shares = self._ledger
        self._was_up: bool | None = None
        self._reading = asyncio.Event()  # the catalogue is to be read again
        self._count = asyncio.Event()  # the gateways are to be counted again

    @property
    def up(self) -> bool:
        return self._link.up

    @property
    def gateways(self) -> int:
        return self._ledger.gateways

    # What the engine calls; see engine/sharing.py.

    async def start(self) -> None:
        if await self._link.start():
            await self._beat()

    def jobs(self) -> list[Coroutine[Any, Any, None]]:
        return [
            self._link.keep(self._told, self._changed), self._outbox.run(), self._keep_beating(), self._keep_telling(),
            self._keep_reading(), self._ledger.run(),
        ]  # fmt: skip

    async def close(self) -> None:
        await self._ledger.close()
        if self._link.up:
            with contextlib.suppress(Away):
                await self._link.send("ZREM", GATEWAYS, self._id)
                await self._link.send("PUBLISH", CHANNEL, self._written("left", {}))
        await self._link.close()

    async def recall(self, session: str) -> None:
        await self._sessions.recall(session)

    async def admits(self, route: Route) -> bool:
        reservation = route.reservation
        needed = reservation if reservation is not None and not reservation.granted else None
        if needed is not None and not await self._ledger.admit(route.model, needed):
            return False
        return not route.trial or await self._leases.take(route.model.id)

    async def admit_client(self, client: Client, admission: Admission) -> None:
        await self._clients.admit(client, admission)

    def client_settled(self, client: Client, admission: Admission, requests: int, tokens: int) -> None:
        self._clients.settled(client, admission, requests, tokens)

    def applied(self, effect: Effect, session: str, route: Route, began: float, now: float) -> None:
        match effect:
            case RestModel():
                self._rests.rested(None, route.model.id, now)
            case RestKey():
                self._rests.rested(route.key.id, route.model.id, now)
            case Recover():
                self._rests.lifted(route.key.id, route.model.id, began, now)
            case Pin() | Ban() | ClearPin() | ClearKeyPin():
                if session:
                    self._sessions.changed(session, now)

    def trial_ended(self, model: int) -> None:
        self._leases.ended(model)

    def cooldowns_cleared(self) -> None:
        self._publish("cleared", {})

    def bans_lifted(self) -> None:
        self._sessions.unbanned(time.monotonic())
        self._publish("unbanned", {})

    def catalogue_changed(self) -> None:
        self._publish("changed", {})

    # Telling and hearing.

    def _tell(self, script: str, key: str, *args: str | bytes | int, kind: str, message: Mapping[str, Any]) -> None:
        self._outbox.put(self._link.script(script, key, *args, CHANNEL, self._written(kind, message)))

    def _publish(self, kind: str, message: Mapping[str, Any]) -> None:
        self._outbox.put(("PUBLISH", CHANNEL, self._written(kind, message)))

    def _written(self, kind: str, message: Mapping[str, Any]) -> bytes:
        return orjson.dumps({"from": self._id, "kind": kind, **message})

    def _told(self, data: bytes) -> None:
        """Hear one message. What cannot be understood comes from another version, or from somebody else."""
        try:
            told = orjson.loads(data)
            if told["from"] != self._id:
                self._hear(told["kind"], told)
        except (ValueError, KeyError, TypeError, AttributeError):
            return

    def _hear(self, kind: str, told: Mapping[str, Any]) -> None:
        match kind:
            case "rest":
                self._rests.heard_rest(told)
            case "lift":
                if self._rests.heard_lift(told):
                    self._freed()
            case "session":
                self._sessions.heard(told)
            case "status":
                self._statuses.heard(told)
            case "trial_ended":
                self._leases.heard_ended(told, self._freed)
            case "cleared":
                self._protection.clear_cooldowns(time.monotonic())
                self._freed()
            case "unbanned":
                self._sessions.unbanned(now := time.monotonic())
                self._protection.lift_bans(now)
                self._freed()
            case "changed":
                self._reading.set()
            case "joined" | "left":
                self._count.set()

    async def _changed(self, up: bool) -> None:
        """Redis has gone or is back, or has turned out to be there or not at the start. Raises Away."""
        if up is not self._was_up and not (up and self._was_up is None):
            fields = {} if up else {"why": self._link.why, "gateways": self.gateways}
            self._log("info" if up else "warning", "shared_state", up=up, **fields)
        self._was_up = up
        if not up:
            return
        await self._beat()
        await self._find()
        now = time.monotonic()
        self._publish("joined", {})
        self._rests.tell_all(now)
        self._statuses.tell_all()
        self._ledger.tell_all()

    async def _find(self) -> None:
        """Read what lies in Redis. Raises Away."""
        cursor, keys = b"0", []
        for _ in range(SCANS_MAX):
            cursor, found = await self._link.send("SCAN", cursor, "MATCH", f"{PREFIX}{{*", "COUNT", SCAN_COUNT)
            keys += [key.decode() for key in found]
            if int(cursor) == 0 or len(keys) >= FOUND_MAX:
                break
        for kind, command in ((rests.SUFFIX, "HGETALL"), (statuses.SUFFIX, "GET")):
            wanted = [key for key in keys if key.endswith(kind)]
            for start in range(0, len(wanted), SCAN_COUNT):
                some = wanted[start : start + SCAN_COUNT]
                for key, value in zip(some, await self._link.send_all([(command, key) for key in some]), strict=True):
                    self._found(kind, key, value)

    def _found(self, kind: str, key: str, value: Any) -> None:
        try:
            if value and kind == rests.SUFFIX:
                self._rests.found(key, pairs(value))
            elif value:
                self._statuses.found(key, value)
        except (ValueError, KeyError, TypeError):
            return  # not ours

    # What runs beside the requests.

    async def _beat(self) -> None:
        sent = time.monotonic()
        gateways, shared_ms = await self._link.run(scripts.BEAT, GATEWAYS, self._id, round(GONE_S * 1000))
        self._ledger.gateways = max(1, int(gateways))
        self._clock.learn(float(shared_ms), (sent + time.monotonic()) / 2)

    async def _keep_beating(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._count.wait()
            self._count.clear()
            try:
                await self._beat()
            except Away:
                continue

    async def _keep_telling(self) -> None:
        while True:
            await asyncio.sleep(NEWS_S)
            self._statuses.tell_news()

    async def _keep_reading(self) -> None:
        while True:
            await self._reading.wait()
            self._reading.clear()
            await self._changed_elsewhere()


def pairs(answer: Any) -> Mapping[bytes, bytes]:
    """A hash, whichever way the library gives it."""
    return answer if isinstance(answer, dict) else dict(zip(answer[::2], answer[1::2], strict=True))
