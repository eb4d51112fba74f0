"""Invalid keys heal by themselves: a provider that answered 401 once is asked again (SPEC 2.3).

A key is checked KEY_RECHECK_MS after it was found invalid, then after twice that, and so on up to an hour. Where its
platform has a free check that is asked; elsewhere the key becomes `unknown`, so that the next request tries it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from admin.control import Control
from admin.keys import check_key
from engine.exchange import Engine
from protection import KeyStatus
from records.connection import DatabaseAway
from records.controls import forget_status
from records.database import DatabaseError
from routing.catalog import Platform, how_written
from wire.errors import GatewayError

PAUSE_S_MAX = 3600.0
LOOK_S = (0.005, 1.0)  # how often the statuses are looked at: a quarter of the first pause, within these
TROUBLE: tuple[type[Exception], ...] = (*DatabaseError, GatewayError)
AT_ONCE_MAX = 8  # checks running together; each ends by itself within ten seconds


class Rechecks:
    """When each invalid key is due. Times are in seconds of one clock; bounded by the keys there are."""

    def __init__(self, first_s: float) -> None:
        self._first_s = first_s
        self._due: dict[int, float] = {}
        self._pauses: dict[int, float] = {}

    def due(self, statuses: Mapping[int, KeyStatus], now: float) -> list[int]:
        """The invalid keys whose time has come, longest due first. Each is due again later, until it works."""
        for key in self._due.keys() | self._pauses.keys():
            status = statuses.get(key)
            if status is not KeyStatus.INVALID:
                self._due.pop(key, None)
                if status is not KeyStatus.UNKNOWN:  # it has worked, or is gone; `unknown` it is only being tried again
                    self._pauses.pop(key, None)
        for key, status in statuses.items():
            if status is KeyStatus.INVALID and key not in self._due:
                self._due[key] = now + self._pauses.setdefault(key, self._first_s)
        found = sorted((key for key, at in self._due.items() if at <= now), key=self._due.__getitem__)
        for key in found:
            self._pauses[key] = min(2 * self._pauses[key], PAUSE_S_MAX)
            self._due[key] = now + self._pauses[key]
        return found


async def keep_rechecking(engine: Engine, control: Control, first_s: float) -> None:
    """For the lifespan: runs until it is cancelled."""
    rechecks, look_s = Rechecks(min(first_s, PAUSE_S_MAX)), max(LOOK_S[0], min(first_s / 4, LOOK_S[1]))
    while True:
        await asyncio.sleep(look_s)
        platforms, statuses = usable(engine), engine.router.key_status
        due = rechecks.due({id: statuses[id] for id in platforms}, time.monotonic())
        for start in range(0, len(due), AT_ONCE_MAX):
            await asyncio.gather(
                *(recheck(engine, control, platforms[id], id) for id in due[start : start + AT_ONCE_MAX])
            )


def usable(engine: Engine) -> dict[int, Platform]:
    """Every key that is written as its platform needs it. No other key is sent anywhere (SPEC 2.5)."""
    catalog, statuses = engine.router.catalog, engine.router.key_status
    return {
        key.id: platform
        for platform in catalog.platforms.values()
        for key in catalog.keys.get(platform.id, ())
        if key.id in statuses and how_written(platform, key.secret) is None
    }


async def recheck(engine: Engine, control: Control, platform: Platform, id: int) -> None:
    """Find out whether this key works again. What cannot be found out now is tried at the next time."""
    try:
        if platform.check_path:
            await check_key(engine, control, id)
        else:
            await control.apply(lambda db: forget_status(db, id))
    except DatabaseAway:  # said once, when it was noticed
        return
    except TROUBLE as error:
        engine.log.write("warning", "key_recheck", key_id=id, message=str(error))
        return
    engine.log.write("info", "key_rechecked", key_id=id, platform=platform.id, status=engine.router.key_status.get(id))
