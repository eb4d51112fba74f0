"""Cooldowns of models and of keys for models, told to the other gateways and heard from them.

They travel by publishing, and the later time holds; what lies in Redis is for gateways that start or come back. Losing
a message does little harm: another gateway learns by a failure of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from protection import HINTLESS_STEPS
from routing.cooldowns import COOLDOWNS_MAX, Rest
from routing.standing import Protection
from shared.clock import Clock
from shared.names import Names
from shared.scripts import LIFT, REST

PREFIX = "fw:"
SUFFIX = ":rest"
Pair = tuple[int | None, int]  # a key, or None for all of them, and a model
Tell = Callable[..., None]  # script, key, its own arguments, and what the others are told


class Rests:
    """`tell` sends a script with a message for the others; it never waits."""

    def __init__(self, protection: Protection, names: Names, clock: Clock, tell: Tell) -> None:
        self._protection = protection
        self._names = names
        self._clock = clock
        self._tell = tell
        self._resting: dict[Pair, float] = {}  # what others know to rest, and until when

    def rested(self, key: int | None, model: int, now: float) -> None:
        """A model (`key` is None), or a key for a model, has just been given a rest here."""
        cooldowns: Any = self._protection.transient if key is None else self._protection.keys
        rest, place = cooldowns.get(model if key is None else (key, model), now), self._place(key, model)
        if rest is None or place is None:
            return
        times = [self._clock.shared_ms(at, now) for at in (rest.until, rest.failed_at)]
        firm = self._clock.shared_ms(rest.firm_until, now) if rest.firm_until else 0
        strikes = 0 if key is None else self._protection.strikes.get((key, model), 0)
        self._note((key, model), rest.until, now)
        message = {**place, "until": times[0], "firm": firm, "failed": times[1], "strikes": strikes}
        self._tell(REST, redis_key(place), times[0], firm, times[1], kind="rest", message=message)

    def lifted(self, key: int, model: int, began: float, now: float) -> None:
        """A success that began then has ended what rested, if anything did."""
        if not self._resting:  # the usual case
            return
        for pair in ((None, model), (key, model)):
            if self._resting.pop(pair, 0.0) > now and (place := self._place(*pair)) is not None:
                at = self._clock.shared_ms(began, now)
                self._tell(LIFT, redis_key(place), at, kind="lift", message={**place, "began": at})

    def tell_all(self, now: float) -> None:
        """Everything that rests here, to a Redis that may have missed it."""
        for model, _ in list(self._protection.transient.active(now)):
            self.rested(None, model, now)
        for (key, model), _ in list(self._protection.keys.active(now)):
            self.rested(key, model, now)

    def heard_rest(self, told: Mapping[str, Any]) -> None:
        now = time.monotonic()
        until, firm, failed = (float(told[name]) for name in ("until", "firm", "failed"))
        until, failed_at = self._clock.local(until, now), min(now, self._clock.local(failed, now))
        firm_until = self._clock.local(firm, now) if firm else 0.0
        rest = Rest(until, firm_until, failed_at, failed_at + self._protection.trial_spacing_s)
        key, model = self._numbers(told)
        if model is None or (key is None and told.get("key") is not None):
            return
        self._note((key, model), until, now)
        if key is None:
            self._protection.transient.merge(model, rest, now)
        else:
            self._protection.keys.merge((key, model), rest, now)
            if strikes := min(int(told.get("strikes", 0)), HINTLESS_STEPS):
                known = self._protection.strikes
                known[key, model] = max(known.get((key, model), 0), strikes)

    def heard_lift(self, told: Mapping[str, Any]) -> bool:
        """Whether something rested."""
        now = time.monotonic()
        began = self._clock.local(float(told["began"]), now)
        key, model = self._numbers(told)
        if model is None or (key is None and told.get("key") is not None):
            return False
        self._resting.pop((key, model), None)
        if key is None:
            return self._protection.transient.lift(model, began, now)
        return self._protection.keys.lift((key, model), began, now)

    def found(self, key: str, fields: Mapping[bytes, bytes]) -> None:
        """A rest as it lies in Redis."""
        name, _, model = key.removeprefix(PREFIX + "{").removesuffix("}" + SUFFIX).partition(":")
        times = {word: fields.get(word.encode(), b"0") for word in ("until", "firm", "failed")}
        self.heard_rest({"key": name or None, "model": model, **times})

    def _note(self, pair: Pair, until: float, now: float) -> None:
        if len(self._resting) >= COOLDOWNS_MAX:
            self._resting = {known: end for known, end in self._resting.items() if end > now}
        if len(self._resting) < COOLDOWNS_MAX:
            self._resting[pair] = max(until, self._resting.get(pair, 0.0))

    def _place(self, key: int | None, model: int) -> dict[str, Any] | None:
        key_name, model_name = None if key is None else self._names.key(key), self._names.model(model)
        if model_name is None or (key is not None and key_name is None):
            return None
        return {"key": key_name, "model": model_name}

    def _numbers(self, told: Mapping[str, Any]) -> tuple[int | None, int | None]:
        key = told.get("key")
        return None if key is None else self._names.key_id(str(key)), self._names.model_id(str(told["model"]))


def redis_key(place: Mapping[str, Any]) -> str:
    return f"{PREFIX}{{{place['key'] or ''}:{place['model']}}}{SUFFIX}"
