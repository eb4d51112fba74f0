"""What each key has used of each model, and what running dry costs a model.

Owns the rate ledger (SPEC 4.7) and penalties (SPEC 4.6). No I/O; `now` is an argument, in seconds of a monotonic clock.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from msgspec import Struct

from routing.catalog import Model

MINUTE_S, DAY_S = 60.0, 86_400.0
WAIT_S_MIN = 0.001  # a wait is never rounded to "now": that would be one request too many
PENALTY_STEP, PENALTY_MAX, PENALTY_DECAY_S = 3.0, 10.0, 120.0  # SPEC 4.6


class Reservation(Struct, eq=False):
    """Capacity taken for one attempt: one request and, until settled, its estimated tokens."""

    model: int
    key: int
    at: float
    tokens: int
    day: int
    running: bool = True  # the tokens are an estimate, of which a part may be given back
    granted: bool = True  # by the other gateways, where there are any; until then its attempt must not begin


class Shares(Protocol):
    """What several gateways use together (SPEC 20): each has a share of every account, and asks for more."""

    def wait_s(self, model: Model, key: int, tokens: int, now: float) -> float:
        """0 where there is room, or might be; else seconds until there may be."""

    def take(self, model: Model, reservation: Reservation, restored: tuple[int, int]) -> None:
        """Out of this gateway's share; where that is not enough it is not granted yet. `restored`: the requests and
        tokens of today that the log knew at the start."""

    def settle(self, reservation: Reservation, tokens: int) -> None:
        """So much was really used."""

    def release(self, reservation: Reservation) -> None:
        """Nothing was used."""


@dataclass(slots=True)
class Account:
    """What one key has used of one model: the last minute, and the current UTC day."""

    minute: deque[Reservation] = field(default_factory=deque)
    day: int = 0
    day_requests: int = 0
    day_tokens: int = 0
    restored_requests: int = 0  # of the day's, these were found in the log
    restored_tokens: int = 0

    def roll(self, now: float, day: int) -> None:
        while self.minute and self.minute[0].at <= now - MINUTE_S:
            self.minute.popleft()
        if day != self.day:
            self.day, self.day_requests, self.day_tokens = day, 0, 0
            self.restored_requests = self.restored_tokens = 0


class Ledger:
    """Requests and tokens per (model, key) against the model's limits. Bounded: a minute of traffic within limits."""

    def __init__(self) -> None:
        self.utc_offset_s = 0.0  # UTC minus `now`, for quotas that end with the day; the shell keeps it true
        self.shares: Shares | None = None  # None: this gateway has everything to itself
        self._accounts: dict[tuple[int, int], Account] = {}

    def wait_s(self, model: Model, key: int, tokens: int, now: float) -> float | None:
        """0 when there is room, else seconds until there is; None when no wait makes room for so many tokens."""
        if not model.limited:
            return 0.0
        wait_s = self._own_wait_s(model, key, tokens, now)
        if wait_s is None or self.shares is None:
            return wait_s
        return max(wait_s, self.shares.wait_s(model, key, tokens, now))

    def _own_wait_s(self, model: Model, key: int, tokens: int, now: float) -> float | None:
        if any(limit is not None and tokens > limit for limit in (model.tpm, model.tpd)):
            return None
        account = self._account(model.id, key, now)
        if exceeds(model.rpd, account.day_requests + 1) or exceeds(model.tpd, account.day_tokens + tokens):
            return DAY_S - (now + self.utc_offset_s) % DAY_S
        wait_s = 0.0
        if exceeds(model.rpm, len(account.minute) + 1):
            wait_s = max(WAIT_S_MIN, account.minute[0].at + MINUTE_S - now)
        if model.tpm is not None:
            wait_s = max(wait_s, self._tokens_wait_s(account, model.tpm, tokens, now))
        return wait_s

    def may_be_given_back(self, model: Model, key: int, tokens: int, now: float) -> bool:
        """Whether there would be room if the calls that run now turned out to use none of the tokens they have
        reserved."""
        if model.tpm is None and model.tpd is None:
            return False
        account = self._account(model.id, key, now)
        running = sum(entry.tokens for entry in account.minute if entry.running)
        used = sum(entry.tokens for entry in account.minute) - running
        if not running or exceeds(model.rpm, len(account.minute) + 1) or exceeds(model.rpd, account.day_requests + 1):
            return False
        return not exceeds(model.tpm, used + tokens) and not exceeds(model.tpd, account.day_tokens - running + tokens)

    def day_left(self, model: Model, key: int, now: float) -> float:
        """The share of this key's day that is left, of requests or tokens, whichever is less; 1 without a limit."""
        if model.rpd is None and model.tpd is None:
            return 1.0
        account = self._account(model.id, key, now)
        used = ((model.rpd, account.day_requests), (model.tpd, account.day_tokens))
        return min(max(0.0, 1 - count / limit) for limit, count in used if limit is not None)

    def reserve(self, model: Model, key: int, tokens: int, now: float) -> Reservation | None:
        if not model.limited:
            return None
        account = self._account(model.id, key, now)
        reservation = Reservation(model.id, key, now, tokens, account.day)
        account.minute.append(reservation)
        account.day_requests += 1
        account.day_tokens += tokens
        if self.shares is not None:
            self.shares.take(model, reservation, (account.restored_requests, account.restored_tokens))
        return reservation

    def release(self, reservation: Reservation | None) -> None:
        """It was not used at all: its attempt never began."""
        if reservation is None:
            return
        account = self._accounts[reservation.model, reservation.key]
        if account.day == reservation.day:
            account.day_requests -= 1
            account.day_tokens = max(0, account.day_tokens - reservation.tokens)
        if reservation in account.minute:
            account.minute.remove(reservation)
        if self.shares is not None:
            self.shares.release(reservation)

    def keep(self, reservation: Reservation | None) -> None:
        """What was really used will never be known, so the estimate stays."""
        if reservation is not None:
            reservation.running = False

    def settle(self, reservation: Reservation | None, tokens: int) -> bool:
        """Replace the estimate by what was really used; the request itself stays counted. Gives whether that has made
        room."""
        if reservation is None:
            return False
        account = self._accounts[reservation.model, reservation.key]
        if account.day == reservation.day:
            account.day_tokens = max(0, account.day_tokens + tokens - reservation.tokens)  # a clock may have jumped
        if self.shares is not None:
            self.shares.settle(reservation, tokens)
        made_room = tokens < reservation.tokens
        reservation.tokens, reservation.running = tokens, False
        return made_room

    def restore(self, model: int, key: int, *, at: float, requests: int, tokens: int, now: float) -> None:
        """Count attempts found in the log, the last of them at `at`, which is on the scale of `now`; oldest first, and
        those of the last minute one by one."""
        account = self._account(model, key, now)
        if at > now - MINUTE_S:
            account.minute.append(Reservation(model, key, at, tokens, account.day, running=False))
        if (at + self.utc_offset_s) // DAY_S == account.day:
            account.day_requests += requests
            account.day_tokens += tokens
            account.restored_requests += requests
            account.restored_tokens += tokens

    def _account(self, model: int, key: int, now: float) -> Account:
        account = self._accounts.get((model, key))
        if account is None:
            account = self._accounts[model, key] = Account()
        account.roll(now, int((now + self.utc_offset_s) // DAY_S))
        return account

    @staticmethod
    def _tokens_wait_s(account: Account, tpm: int, tokens: int, now: float) -> float:
        used = sum(entry.tokens for entry in account.minute)
        for entry in account.minute:
            if used + tokens <= tpm:
                return 0.0
            used -= entry.tokens
            if used + tokens <= tpm:
                return max(WAIT_S_MIN, entry.at + MINUTE_S - now)
        return 0.0


def exceeds(limit: int | None, value: int) -> bool:
    return limit is not None and value > limit


class Penalties:
    """Points against models whose keys run dry; they fall by one every two minutes and with every success."""

    def __init__(self) -> None:
        self._points: dict[int, tuple[float, float]] = {}  # model: (points, when they last fell by themselves)

    def __len__(self) -> int:
        return len(self._points)

    def points(self, model: int, now: float) -> float:
        if not self._points or model not in self._points:
            return 0.0
        points, since = self._points[model]
        steps = (now - since) // PENALTY_DECAY_S
        if steps:
            points, since = points - steps, since + steps * PENALTY_DECAY_S
            self._set(model, points, since)
        return max(0.0, points)

    def add(self, model: int, now: float, step: float = PENALTY_STEP) -> None:
        points = self.points(model, now)
        since = self._points[model][1] if points else now
        self._set(model, min(PENALTY_MAX, points + step), since)

    def success(self, model: int, now: float) -> None:
        if self._points and (points := self.points(model, now)):
            self._set(model, points - 1, self._points[model][1])

    def _set(self, model: int, points: float, since: float) -> None:
        if points > 0:
            self._points[model] = (points, since)
        else:
            self._points.pop(model, None)
