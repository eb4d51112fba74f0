"""One key's account for one model, as one of several gateways keeps it: what it has used, what it is lent, and what it
may use when it can ask nobody. Arithmetic only; `now` is in seconds of one monotonic clock.

A loan is a slice of what is left: requests and tokens that this gateway may use without asking. It is small, because
what is lent to a gateway that dies is lost to the others for a while, and it is given back when it is not needed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from routing.catalog import Model
from routing.ledger import DAY_S

WINDOW_S = 61.5  # a minute, and what may pass between counting a call here and its arrival on a busy day
BUCKET_S = 0.5  # uses are counted together, as at the end of their bucket
LOAN_S = 5.0  # then it is over for Redis …
KEPT_S = 4.0  # … and before that for us: no clock and no delay lets both count it
IDLE_S = 0.3  # what is not needed for so long is given back
RECENT_S = 0.1  # what was used within it is what is asked for ahead: enough for many round trips
RECENT_MAX = 1_000


@dataclass(frozen=True, slots=True)
class Limits:
    """Requests a minute and a day, tokens a minute and a day; None: no limit."""

    rpm: int | None
    rpd: int | None
    tpm: int | None
    tpd: int | None

    @property
    def tokens(self) -> bool:
        return self.tpm is not None or self.tpd is not None

    def told(self) -> tuple[int, ...]:
        return tuple(-1 if limit is None else limit for limit in (self.rpm, self.rpd, self.tpm, self.tpd))


@dataclass(frozen=True, slots=True)
class Known:
    """What all gateways together had used at that moment, and this one of it on its day."""

    at: float
    day: int
    minute: tuple[int, int]  # requests, tokens
    today: tuple[int, int]
    own_today: tuple[int, int]


@dataclass(eq=False, slots=True)
class Account:
    name: str
    limits: Limits
    day: int = 0
    today: list[int] = field(default_factory=lambda: [0, 0])  # requests and tokens, by this process alone
    restored: tuple[int, int] = (0, 0)  # of today's, what the log knew at the start
    buckets: dict[int, list[int]] = field(default_factory=dict)  # of the last minute: requests and tokens
    lent: list[int] = field(default_factory=lambda: [0, 0])  # left of the loan
    lent_until: float = 0.0
    used_at: float = 0.0
    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RECENT_MAX))
    denied_until: float = 0.0
    denied_tokens: int = 0  # to a request of so many or more
    known: Known | None = None
    number: int = 0  # of the last message
    urgent: asyncio.Event = field(default_factory=asyncio.Event)  # somebody waits for the next one

    def has(self, tokens: int, now: float) -> bool:
        """Whether the loan is enough."""
        if self.lent_until <= now or self.lent[0] < 1:
            return False
        return not self.limits.tokens or self.lent[1] >= tokens

    def take(self, at: float, tokens: int, now: float, day: int) -> None:
        """Out of the loan, if there is one: one request that began `at`."""
        if self.lent_until > now:
            self.lent = [max(0, self.lent[0] - 1), max(0, self.lent[1] - tokens)]
        self.count(at, 1, tokens, day)
        self.recent.append((now, tokens))
        self.used_at = now

    def count(self, at: float, requests: int, tokens: int, day: int) -> None:
        """Count so much more, or less, as used then."""
        bucket = self.buckets.setdefault(int(at // BUCKET_S), [0, 0])
        self.roll(day)
        for sums in (bucket, self.today):
            sums[0], sums[1] = max(0, sums[0] + requests), max(0, sums[1] + tokens)

    def roll(self, day: int) -> None:
        if day != self.day:
            self.day, self.today, self.restored = day, [0, 0], (0, 0)

    def prune(self, now: float) -> None:
        oldest = int((now - WINDOW_S - BUCKET_S) // BUCKET_S)
        for bucket in [bucket for bucket in self.buckets if bucket < oldest]:
            del self.buckets[bucket]

    def uses(self, now: float) -> str:
        """The last minute's, for Redis: `age in ms:requests:tokens`."""
        self.prune(now)
        return ";".join(
            f"{round((now - (bucket + 1) * BUCKET_S) * 1000)}:{requests}:{tokens}"
            for bucket, (requests, tokens) in self.buckets.items()
        )

    def wanted(self, now: float) -> tuple[int, int]:
        """What to ask for beyond what is needed: as much as was used a moment ago, where that was more than one."""
        while self.recent and self.recent[0][0] <= now - RECENT_S:
            self.recent.popleft()
        if len(self.recent) < 2:
            return 0, 0
        return len(self.recent), sum(tokens for _, tokens in self.recent) if self.limits.tokens else 0

    def idle(self, now: float) -> bool:
        """Whether there is a loan that nobody has needed for long."""
        return any(self.lent) and now - self.used_at >= IDLE_S

    def held(self, now: float) -> tuple[int, int]:
        """What is left of the loan, to be kept; nothing, where it is over or not needed."""
        if self.lent_until <= now or self.idle(now):
            self.lent = [0, 0]
        return self.lent[0], self.lent[1]

    def day_known(self) -> tuple[int, int]:
        """What has been used today at least, whoever knows of it."""
        return self.restored[0] + self.today[0], self.restored[1] + self.today[1]

    def learn(self, sent_at: float, totals: Sequence[int], own_today: tuple[int, int], day: int) -> None:
        requests, tokens, day_requests, day_tokens = totals
        self.known = Known(sent_at, day, (requests, tokens), (day_requests, day_tokens), own_today)

    def alone_wait_s(self, tokens: int, gateways: int, now: float, day_left_s: float) -> float:
        """0 when this gateway may use it without asking, else seconds until it may: its part of what was left when it
        could last ask, and of whole limits from then on. A part of a minute is never nothing, or nobody would use it;
        a part of a day may be, since overrunning it costs until the next."""
        if not self._day_has_room(tokens, gateways):
            return day_left_s
        known = self.known if self.known is not None and now - self.known.at < WINDOW_S else None
        since = now - WINDOW_S if known is None else known.at
        used, before = self._used_since(since), (0, 0) if known is None else known.minute
        for limit, n, more, place in ((self.limits.rpm, used[0], 1, 0), (self.limits.tpm, used[1], tokens, 1)):
            if limit is None:
                continue
            left = limit - before[place]
            part = max(more if left >= more else 0, left // gateways)
            if n + more > part:
                return self._minute_wait_s(known, now)
        return 0.0

    def _day_has_room(self, tokens: int, gateways: int) -> bool:
        known = self.known if self.known is not None and self.known.day == self.day else None
        for place, limit, more in ((0, self.limits.rpd, 1), (1, self.limits.tpd, tokens)):
            if limit is None:
                continue
            if known is None:
                left, own = limit - self.restored[place], self.today[place]
            else:
                left, own = limit - known.today[place], self.today[place] - known.own_today[place]
            if own + more > left // gateways:
                return False
        return True

    def _used_since(self, since: float) -> tuple[int, int]:
        first = int(since // BUCKET_S)
        found = [sums for bucket, sums in self.buckets.items() if bucket >= first]
        return sum(sums[0] for sums in found), sum(sums[1] for sums in found)

    def _minute_wait_s(self, known: Known | None, now: float) -> float:
        ends = [(bucket + 1) * BUCKET_S + WINDOW_S - now for bucket in self.buckets]
        if known is not None:
            ends.append(known.at + WINDOW_S - now)
        return max(BUCKET_S, min((end for end in ends if end > 0), default=BUCKET_S))


def limits_of(model: Model) -> Limits:
    return Limits(model.rpm, model.rpd, model.tpm, model.tpd)


def day_of(now: float, utc_offset_s: float) -> tuple[int, float]:
    """The UTC day, and seconds until it ends."""
    utc = now + utc_offset_s
    return int(utc // DAY_S), DAY_S - utc % DAY_S
