"""Keys that the operator gives to clients: who holds one, what it may ask for, and how much (SPEC 19).

Limits count by reservation, as the ledger does: a request takes its place and its estimated tokens when it is admitted
and settles with what was really used, so that parallel requests never go over a limit. A request is one count however
many attempts it takes; one that asked nobody is given back. No I/O; `now` is in seconds of a monotonic clock, `utc` in
seconds since 1970.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from routing.catalog import Catalog, Model, ModelKind
from routing.kinds import named
from routing.ledger import DAY_S, MINUTE_S, WAIT_S_MIN, exceeds
from wire.chat import Mode, Need, plain_name
from wire.errors import GatewayError

SHOWN_MAX = 10_000  # requests of the last minute that are remembered of a client without a limit by the minute


@dataclass(frozen=True, slots=True)
class Limits:
    """Requests per minute and per UTC day, and tokens per UTC day. None is no limit."""

    rpm: int | None = None
    rpd: int | None = None
    tpd: int | None = None


@dataclass(frozen=True, slots=True)
class Client:
    """One client key. The key itself is known by its hash only."""

    id: int
    name: str
    key_hash: bytes = field(repr=False)
    enabled: bool = True
    limits: Limits = Limits()
    models: frozenset[str] | None = None  # names of models and modes it may ask for; None: all
    min_rank: int | None = None  # SPEC 21.3
    private: bool = False  # only where prompts are known not to train (SPEC 21.4)
    expires_at: float | None = None  # UTC

    def usable(self, utc: float) -> bool:
        return self.enabled and (self.expires_at is None or utc < self.expires_at)


@dataclass(eq=False, slots=True)
class Admission:
    """One request's place within a client's limits: itself and, until settled, its estimated tokens."""

    client: int
    at: float
    tokens: int
    day: int


@dataclass(slots=True)
class Use:
    """What a client has used: the last minute, and the current UTC day."""

    minute: deque[Admission] = field(default_factory=deque)
    day: int = 0
    day_requests: int = 0
    day_tokens: int = 0

    def roll(self, now: float, day: int) -> None:
        while self.minute and self.minute[0].at <= now - MINUTE_S:
            self.minute.popleft()
        if day != self.day:
            self.day, self.day_requests, self.day_tokens = day, 0, 0


def hash_of(key: bytes) -> bytes:
    """What is kept of a client key. It is 256 random bits, so that a plain hash gives nothing away."""
    return sha256(key).digest()


class ClientKeys:
    """All client keys in force, and what each has used. Bounded by the keys, and by a minute of requests for each."""

    def __init__(self) -> None:
        self.by_id: Mapping[int, Client] = {}
        self._by_hash: Mapping[bytes, Client] = {}
        self._used: dict[int, Use] = {}

    def load(self, clients: Iterable[Client]) -> None:
        """Go by these keys from now on; what those that stay have used is remembered."""
        self.by_id = {client.id: client for client in clients}
        self._by_hash = {client.key_hash: client for client in self.by_id.values()}
        self._used = {id: use for id, use in self._used.items() if id in self.by_id}

    def find(self, key: bytes, utc: float) -> Client | None:
        """Whose key this is; None where it is nobody's, switched off or expired. The look-up is by hash, so the time it
        takes tells nothing of the keys there are."""
        client = self._by_hash.get(hash_of(key)) if self._by_hash else None
        return client if client is not None and client.usable(utc) else None

    def admit(self, client: Client, tokens: int, now: float, utc: float) -> Admission:
        """Take one request's place. Raises GatewayError 429 with the time at which there may be room again."""
        use, limits = self._use(client.id, now, utc), client.limits
        if exceeds(limits.rpd, use.day_requests + 1):
            raise over_limit(f"{limits.rpd} requests per day", until_midnight_s(utc))
        if exceeds(limits.tpd, use.day_tokens + tokens):
            raise over_limit(f"{limits.tpd} tokens per day", until_midnight_s(utc))
        if limits.rpm is not None and len(use.minute) >= limits.rpm:
            oldest = use.minute[len(use.minute) - limits.rpm]  # the limit may have been lowered since
            wait_s = max(WAIT_S_MIN, oldest.at + MINUTE_S - now)
            raise over_limit(f"{limits.rpm} requests per minute", wait_s)
        admission = Admission(client.id, now, tokens, use.day)
        use.minute.append(admission)
        if limits.rpm is None and len(use.minute) > SHOWN_MAX:
            use.minute.popleft()
        use.day_requests += 1
        use.day_tokens += tokens
        return admission

    def settle(self, admission: Admission, tokens: int) -> None:
        """Replace the estimate by what was really used; the request stays counted."""
        use = self._used.get(admission.client)
        if use is not None and use.day == admission.day:
            use.day_tokens = max(0, use.day_tokens + tokens - admission.tokens)
        admission.tokens = tokens

    def give_back(self, admission: Admission) -> None:
        """The request asked nobody: it counts as if it had not been."""
        self.settle(admission, 0)
        use = self._used.get(admission.client)
        if use is None:
            return
        if use.day == admission.day:
            use.day_requests = max(0, use.day_requests - 1)
        if admission in use.minute:
            use.minute.remove(admission)

    def restore(self, client: int, *, ago_s: float, requests: int, tokens: int, now: float, utc: float) -> None:
        """Count requests found in the log, the last of them so long ago; oldest first, and those of the last minute one
        by one."""
        if client not in self.by_id:
            return
        use = self._use(client, now, utc)
        if ago_s < MINUTE_S:
            use.minute.append(Admission(client, now - ago_s, tokens, use.day))
        if (utc - ago_s) // DAY_S == use.day:
            use.day_requests += requests
            use.day_tokens += tokens

    def used(self, client: int, now: float, utc: float) -> dict[str, int]:
        """What counts against the limits at this moment."""
        use = self._use(client, now, utc)
        return {"rpm": len(use.minute), "rpd": use.day_requests, "tpd": use.day_tokens}

    def _use(self, client: int, now: float, utc: float) -> Use:
        use = self._used.get(client)
        if use is None:
            use = self._used[client] = Use()
        use.roll(now, int(utc // DAY_S))
        return use


def until_midnight_s(utc: float) -> float:
    return DAY_S - utc % DAY_S


def over_limit(limit: str, retry_after_s: float) -> GatewayError:
    message = f"This key is limited to {limit}. Wait, or ask the operator for more."
    code = "client_rate_limited"
    return GatewayError(message, status=429, type="rate_limit_error", code=code, retry_after_s=retry_after_s)


def allowed_models(
    client: Client, need: Need, catalog: Catalog, kind: ModelKind | None = None
) -> frozenset[str] | None:
    """The names of all models that may serve this request; None: any. Raises GatewayError: 403, or 400 for an unknown
    model.

    A listed mode allows whatever it chooses. A listed model allows itself and, for failover, the other listed ones.
    """
    if client.models is None:
        return None
    names = client.models | {meaning for name in client.models if (meaning := catalog.aliases.get(plain_name(name)))}
    if need.pinned is None:
        if not names.isdisjoint(spellings(need.mode)):
            return None
        raise not_allowed(f"auto-{need.mode}")
    asked = named(catalog, need.pinned, kind or need.kind)
    asked = [m for m in asked if need.pinned in (m.model_id, m.label, m.family)]
    if any(is_among(names, model) for model in asked):
        return names
    raise not_allowed(need.pinned)


def is_among(names: frozenset[str] | None, model: Model) -> bool:
    """Whether a model may serve a request that is allowed these. An embedding model also goes by its family."""
    if names is None or model.model_id in names or model.label in names:
        return True
    return model.kind is ModelKind.EMBEDDING and model.family in names


def spellings(mode: Mode) -> set[str]:
    found = {f"auto-{mode}", f"auto:{mode}"}
    return found | {"auto"} if mode is Mode.BALANCED else found


def not_allowed(name: str) -> GatewayError:
    message = f"This key may not use '{name}'. Ask the operator which models it may use."
    return GatewayError(message, status=403, type="permission_error", code="model_not_allowed", param="model")
