"""The ledger that several gateways keep together: the sum of what they use of a key never overshoots its limits.

Each account lies in Redis as one hash. One script at a time per account says what this gateway has used and asks for
more (shared/scripts.py); a request that the loan covers goes on at once, any other waits for the script's answer, for
LIMIT_S at most. When Redis is away each gateway goes on with its part of what was left (shared/account.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from routing.catalog import Model
from routing.ledger import Ledger, Reservation
from shared.account import BUCKET_S, IDLE_S, KEPT_S, LOAN_S, WINDOW_S, Account, Limits, day_of, limits_of
from shared.link import LIMIT_S, Away, Link
from shared.names import Names
from shared.rests import PREFIX
from shared.scripts import SHARE

DENIED_S_MIN = 0.05  # before the same is asked again
PAUSE_S = 0.01  # between two exchanges that nobody waits for; what is used in it comes out of the loan
SETTLE_S = 0.1  # how soon real numbers of tokens replace estimates elsewhere
ACCOUNTS_MAX = 10_000  # models x keys of any catalogue; a bound, not a budget
LOOK_S = 0.1  # how often loans are looked at that nobody needs


@dataclass(eq=False, slots=True)
class Asking:
    """One request that waits for the others' word."""

    tokens: int
    at: float
    granted: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def was_granted(self) -> bool:
        """Whether the answer came in the moment in which waiting for it ended."""
        return self.granted.done() and not self.granted.cancelled() and self.granted.result()


class SharedLedger:
    """What routing/ledger.py calls Shares, and the talk with Redis behind it."""

    def __init__(self, id: str, link: Link, names: Names, ledger: Ledger) -> None:
        self.gateways = 1  # that were seen lately, this one with them
        self._id = id
        self._link = link
        self._names = names
        self._ledger = ledger
        self._accounts: dict[Hashable, Account] = {}  # by model and key, or by client
        self._asking: dict[Account, list[Asking]] = {}
        self._dirty: dict[Account, None] = {}
        self._talks: dict[Account, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None

    # What the ledger calls: memory only.

    def wait_s(self, model: Model, key: int, tokens: int, now: float) -> float:
        account = self._account(model, key)
        if account is None or account.has(tokens, now):
            return 0.0
        if not self._link.up:
            day, left_s = day_of(now, self._ledger.utc_offset_s)
            account.roll(day)
            return account.alone_wait_s(tokens, self.gateways, now, left_s)
        return max(0.0, account.denied_until - now) if tokens >= account.denied_tokens else 0.0

    def take(self, model: Model, reservation: Reservation, restored: tuple[int, int]) -> None:
        account = self._account(model, reservation.key)
        if account is None:
            return
        account.roll(reservation.day)
        account.restored = restored
        if self._link.up:
            reservation.granted = self.taken(account, reservation.tokens, reservation.at, reservation.day)
        else:  # `wait_s` has said that there is room
            account.take(reservation.at, reservation.tokens, reservation.at, reservation.day)
            self._dirty[account] = None

    def taken(self, account: Account, tokens: int, now: float, day: int) -> bool:
        """Whether the loan was enough for one more, which has taken it then."""
        if not account.has(tokens, now):
            return False
        account.take(now, tokens, now, day)
        self._talk_soon(account)
        return True

    def settle(self, reservation: Reservation, tokens: int) -> None:
        account = self._accounts.get((reservation.model, reservation.key))
        if account is None or not reservation.granted or not account.limits.tokens or tokens == reservation.tokens:
            return
        self.correct(account, reservation.at, reservation.day, 0, tokens - reservation.tokens)

    def release(self, reservation: Reservation) -> None:
        account = self._accounts.get((reservation.model, reservation.key))
        if account is not None and reservation.granted:
            self.correct(account, reservation.at, reservation.day, -1, -reservation.tokens)

    # What the engine waits for.

    async def admit(self, model: Model, reservation: Reservation) -> bool:
        """Whether there is room for it among all gateways."""
        account = self._account(model, reservation.key)
        reservation.granted = account is None or await self.granted(account, reservation.tokens, reservation.at)
        return reservation.granted

    async def granted(self, account: Account, tokens: int, at: float) -> bool:
        """Whether one more request with so many tokens may use this account. One that is cancelled has used nothing."""
        asking = Asking(tokens, at)
        self._asking.setdefault(account, []).append(asking)
        account.urgent.set()
        self._talk_soon(account)
        try:
            async with asyncio.timeout(LIMIT_S):
                return await asking.granted
        except TimeoutError:
            return asking.was_granted() or self._granted_alone(account, asking)
        except asyncio.CancelledError:
            if asking.was_granted():
                self.correct(account, at, account.day, -1, -tokens)
            raise
        finally:
            if asking in (waiting := self._asking.get(account, [])):
                waiting.remove(asking)

    def correct(self, account: Account, at: float, day: int, requests: int, tokens: int) -> None:
        """So much more, or less, was used by one that began then, on a day that may be over. The others hear of it
        soon."""
        if day == account.day:
            account.count(at, requests, tokens, day)
        elif (bucket := account.buckets.get(int(at // BUCKET_S))) is not None:
            bucket[0], bucket[1] = max(0, bucket[0] + requests), max(0, bucket[1] + tokens)
        self._dirty[account] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SETTLE_S, self._talk_of_all)

    # The talk with Redis.

    async def run(self) -> None:
        """Give back what nobody needs, and say what could not be said. Runs until it is cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            for account in self._accounts.values():
                if account.idle(now) or account in self._dirty:
                    self._talk_soon(account)

    def tell_all(self) -> None:
        """Say again what was used here, to a Redis that has been away: it may know less, or nothing."""
        for account in self._accounts.values():
            if account.buckets or any(account.today):
                self._talk_soon(account)

    async def close(self) -> None:
        """Say the last, and give back what is lent."""
        for account in self._accounts.values():
            account.used_at = time.monotonic() - IDLE_S
            if any(account.lent) or account in self._dirty:
                self._talk_soon(account)
        if self._timer is not None:
            self._timer.cancel()
        if self._talks:
            await asyncio.wait(list(self._talks.values()), timeout=LIMIT_S * 2)
        for task in self._talks.values():
            task.cancel()

    def _talk_of_all(self) -> None:
        self._timer = None
        for account in list(self._dirty):
            self._talk_soon(account)

    def _talk_soon(self, account: Account) -> None:
        self._dirty[account] = None
        if self._link.up and account not in self._talks:
            self._talks[account] = asyncio.get_running_loop().create_task(self._talk(account))

    async def _talk(self, account: Account) -> None:
        """One exchange after the other, as long as there is something to say or to ask."""
        try:
            while self._link.up and (account in self._dirty or self._asking.get(account)):
                self._dirty.pop(account, None)
                account.urgent.clear()
                asked = list(self._asking.pop(account, ()))
                try:
                    await self._exchange(account, asked)
                except Away:
                    self._dirty[account] = None
                    for asking in asked:
                        self._decide(asking, self._granted_alone(account, asking))
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(PAUSE_S):
                        await account.urgent.wait()
        finally:
            del self._talks[account]

    async def _exchange(self, account: Account, asked: list[Asking]) -> None:
        now = time.monotonic()
        day, day_left_s = day_of(now, self._ledger.utc_offset_s)
        account.roll(day)
        needed = len(asked), sum(asking.tokens for asking in asked) if account.limits.tokens else 0
        held, own_today = account.held(now), (account.today[0], account.today[1])
        account.number += 1
        answer = await self._link.run(
            SHARE, f"{PREFIX}{{{account.name}}}:use", self._id, account.number, round(LOAN_S * 1000),
            round(WINDOW_S * 1000), *account.limits.told(), day, *own_today, *held, *needed, *account.wanted(now),
            *account.day_known(), account.uses(now),
        )  # fmt: skip
        got_requests, got_tokens, *totals, wait_ms = (int(part) for part in answer)
        if got_requests < 0:  # a later message was quicker
            raise Away
        account.lent = [account.lent[0] + got_requests, account.lent[1] + got_tokens]
        account.lent_until = now + KEPT_S
        account.learn(now, totals, own_today, day)
        for asking in asked:
            if asking.granted.done():
                continue
            if account.has(asking.tokens, now):
                account.take(asking.at, asking.tokens, now, day)
                self._dirty[account] = None
                self._decide(asking, True)
            else:
                wait_s = day_left_s if wait_ms < 0 else wait_ms / 1000
                account.denied_until = now + max(DENIED_S_MIN, wait_s)
                account.denied_tokens = asking.tokens if account.lent[0] else 0
                self._decide(asking, False)

    def _granted_alone(self, account: Account, asking: Asking) -> bool:
        """Without an answer. As long as others may still get theirs, taking a part unasked would be one too many."""
        now = time.monotonic()
        if self._link.up:
            account.denied_until, account.denied_tokens = now + DENIED_S_MIN, 0
            return False
        day, left_s = day_of(now, self._ledger.utc_offset_s)
        account.roll(day)
        if account.alone_wait_s(asking.tokens, self.gateways, now, left_s) > 0:
            account.denied_until, account.denied_tokens = now + DENIED_S_MIN, asking.tokens
            return False
        account.take(asking.at, asking.tokens, now, day)
        self._dirty[account] = None
        return True

    @staticmethod
    def _decide(asking: Asking, granted: bool) -> None:
        if not asking.granted.done():
            asking.granted.set_result(granted)

    def _account(self, model: Model, key: int) -> Account | None:
        return self.account((model.id, key), limits_of(model), lambda: self._names.pair(key, model.id))

    def account(self, id: Hashable, limits: Limits, named: Callable[[], str | None]) -> Account | None:
        """One account; None where it has no name that others would know."""
        account = self._accounts.get(id)
        if account is not None and (account.limits is limits or account.limits == limits):
            return account
        if (name := named()) is None:
            return None
        if account is None:
            if len(self._accounts) >= ACCOUNTS_MAX:
                del self._accounts[next(iter(self._accounts))]
            account = self._accounts[id] = Account(name, limits)
        account.limits = limits
        return account
