"""Trials of what rests, one at a time among all gateways: whoever holds the lease in Redis makes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from routing.trials import LEASE_S, Trials
from shared.link import Away, Link
from shared.names import Names
from shared.rests import PREFIX, Tell
from shared.scripts import RELEASE

LOOK_AGAIN_S = 0.1  # where a lease turns out to be gone by the time its end is asked for


class Leases:
    def __init__(self, id: str, trials: Trials, link: Link, names: Names, tell: Tell) -> None:
        self._id = id
        self._trials = trials
        self._link = link
        self._names = names
        self._tell = tell
        self._held: set[int] = set()  # models; bounded by the catalogue

    async def take(self, model: int) -> bool:
        """Whether this gateway may try the model. Without Redis each may."""
        name = self._names.model(model)
        if name is None:
            return True
        lease_ms = round(LEASE_S * 1000)
        try:
            if await self._link.send("SET", redis_key(name), self._id, "NX", "PX", lease_ms):
                self._held.add(model)
                return True
            left_ms = int(await self._link.send("PTTL", redis_key(name)))
        except Away:
            return True
        left_s = left_ms / 1000 if left_ms > 0 else LOOK_AGAIN_S
        self._trials.taken_elsewhere(model, time.monotonic() + left_s)
        return False

    def ended(self, model: int) -> None:
        """The trial that this gateway made is over."""
        if model not in self._held:
            return
        self._held.discard(model)
        if (name := self._names.model(model)) is not None:
            self._tell(RELEASE, redis_key(name), self._id, kind="trial_ended", message={"model": name})

    def heard_ended(self, told: Mapping[str, Any], freed: Callable[[], None]) -> None:
        if (model := self._names.model_id(str(told["model"]))) is not None:
            self._trials.released_elsewhere(model)
            freed()


def redis_key(model: str) -> str:
    return f"{PREFIX}{{:{model}}}:trial"
