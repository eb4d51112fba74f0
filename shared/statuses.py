"""What is known of each key, told to the other gateways. Whoever has changed it, requests or the operator: the table is
compared with what was told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from protection import KeyStatus
from router import Router
from shared.names import Names
from shared.rests import PREFIX, Tell
from shared.scripts import TELL

KEPT_MS = 3_600_000  # an invalid key is checked again within an hour (SPEC 2.3)
SUFFIX = ":status"


class Statuses:
    def __init__(self, router: Router, names: Names, tell: Tell, freed: Callable[[], None]) -> None:
        self._router = router
        self._names = names
        self._tell = tell
        self._freed = freed
        self._told: dict[int, KeyStatus] = dict(router.key_status)

    def tell_news(self) -> None:
        if self._told == self._router.key_status:
            return
        for key, status in self._router.key_status.items():
            if (before := self._told.get(key)) is not status:
                self._tell_one(key, status, before)
        self._told = dict(self._router.key_status)

    def tell_all(self) -> None:
        """Every key that does not work, to a Redis that may have missed it."""
        for key, status in self._router.key_status.items():
            if status is KeyStatus.INVALID:
                self._tell_one(key, status, None)

    def heard(self, told: Mapping[str, Any]) -> None:
        key, status = self._names.key_id(str(told["key"])), KeyStatus(told["status"])
        known = None if key is None else self._router.key_status.get(key)
        if key is None or known is None or known is status:
            return
        if known is KeyStatus.INVALID and told.get("before") != KeyStatus.INVALID:
            return  # it speaks of the time before the key stopped working
        self._router.set_key_status(key, status)
        self._told[key] = status
        if known is KeyStatus.INVALID:
            self._freed()

    def found(self, key: str, value: bytes) -> None:
        """A status as it lies in Redis."""
        name = key.removeprefix(PREFIX + "{").removesuffix("}" + SUFFIX)
        if value.decode() == KeyStatus.INVALID:
            self.heard({"key": name, "status": value.decode()})

    def _tell_one(self, key: int, status: KeyStatus, before: KeyStatus | None) -> None:
        if key and (name := self._names.key(key)) is not None:
            message = {"key": name, "status": status, "before": before}
            self._tell(TELL, f"{PREFIX}{{{name}}}{SUFFIX}", status, KEPT_MS, kind="status", message=message)
