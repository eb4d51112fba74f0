"""What is allowed now: what a failure means, and what it blocks for whom.

Owns the failure table (SPEC 5.2), the rules engine (SPEC 7.3) and the in-memory state both act on: sessions with
their bans, cooldowns, and which sessions use what at the moment. It knows platforms and models only as ids, does no
I/O, and reads no clock: `now` is always an argument, in seconds of one monotonic clock.

How a failure travels: `classify` names it once, `RULES` says what the name costs, `evaluate` says what it costs the
session on a platform of a given protection level, and `Protection` keeps the result until it expires.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

SESSIONS_MAX = 10_000  # SPEC 7.1; about 4 MB
COOLDOWNS_MAX = 10_000  # far above models x keys of any laptop's catalogue; a bound, not a budget
MESSAGE_CHARS_MAX = 500  # of a provider's words in a log row or an error body
CODE_CHARS_MAX = 100


class Failure(StrEnum):
    """Every way an attempt can end badly; the value is `error_kind` in the log and `kind` in the trail."""

    SERVER_ERROR = "server_error"
    CONNECTION = "connection"
    TIMEOUT = "timeout"
    STALL = "stall"
    RATE_LIMITED = "rate_limited"
    AUTH = "auth"
    FORBIDDEN = "forbidden"
    OUT_OF_CREDIT = "out_of_credit"
    BAD_REQUEST = "bad_request"
    NOT_FOUND = "not_found"
    CONTEXT_LENGTH = "context_length"
    CONTENT_FILTER = "content_filter"
    TRUNCATED = "truncated"
    EMPTY = "empty"
    MALFORMED = "malformed"
    WRAPPED = "wrapped"


class Scope(StrEnum):
    """What a failure takes out of the running for the rest of this request."""

    KEY = "key"
    MODEL = "model"
    WINDOW = "window"  # the model and every model whose context window is not larger
    REQUEST = "request"  # nothing more is tried: the client gets the provider's answer


class Cooling(StrEnum):
    """What a failure takes out of the running for everybody."""

    NONE = "none"
    TRANSIENT = "transient"
    KEY = "key"  # this key for this model
    INVALID = "invalid"  # this key, until someone repairs it


class Kind(StrEnum):
    """What protection calls a failure."""

    SERVER = "5xx"
    TRUNCATION = "truncation"
    RETRYABLE = "retryable"


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the failure table."""

    scope: Scope
    cooling: Cooling
    kind: Kind | None
    cooldown_s: float | None = None  # where the platform tells nothing; None: the setting


RULES: Mapping[Failure, Rule] = {
    Failure.SERVER_ERROR: Rule(Scope.MODEL, Cooling.TRANSIENT, Kind.RETRYABLE),
    Failure.STALL: Rule(Scope.MODEL, Cooling.TRANSIENT, Kind.RETRYABLE),
    Failure.TIMEOUT: Rule(Scope.MODEL, Cooling.TRANSIENT, Kind.RETRYABLE),
    Failure.CONNECTION: Rule(Scope.MODEL, Cooling.TRANSIENT, Kind.RETRYABLE),
    Failure.RATE_LIMITED: Rule(Scope.KEY, Cooling.KEY, Kind.RETRYABLE),
    Failure.AUTH: Rule(Scope.KEY, Cooling.INVALID, None),
    Failure.OUT_OF_CREDIT: Rule(Scope.KEY, Cooling.KEY, Kind.RETRYABLE, cooldown_s=3600),
    Failure.FORBIDDEN: Rule(Scope.KEY, Cooling.KEY, Kind.RETRYABLE),
    Failure.BAD_REQUEST: Rule(Scope.MODEL, Cooling.NONE, None),  # the request's or the catalogue's fault bans nobody
    Failure.NOT_FOUND: Rule(Scope.MODEL, Cooling.NONE, None),
    Failure.MALFORMED: Rule(Scope.MODEL, Cooling.NONE, Kind.RETRYABLE),
    Failure.CONTEXT_LENGTH: Rule(Scope.WINDOW, Cooling.NONE, Kind.TRUNCATION),
    Failure.TRUNCATED: Rule(Scope.MODEL, Cooling.NONE, Kind.TRUNCATION),
    Failure.CONTENT_FILTER: Rule(Scope.REQUEST, Cooling.NONE, None),
    Failure.EMPTY: Rule(Scope.MODEL, Cooling.NONE, Kind.RETRYABLE),
    Failure.WRAPPED: Rule(Scope.MODEL, Cooling.NONE, Kind.RETRYABLE),
}
OURS = Rule(Scope.MODEL, Cooling.NONE, None)  # whatever it is called
GATEWAY_STATUSES = frozenset({500, 502, 503, 504})  # these the protection calls 5xx, whatever carried them


def writable(text: str) -> str:
    """Without halves of emojis, which no UTF-8 holds: not a log row, not an answer."""
    return text.encode(errors="replace").decode()


class UpstreamError(Exception):
    """One attempt failed. Ours alone: a client never sees it as such.

    `status` is the HTTP status, or the one found inside a 200, or 504 for our own time limits; None when there was
    none. `code` and `message` are the provider's words with secrets removed. `ours`: it says nothing of the provider.
    """

    def __init__(
        self,
        failure: Failure,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        ours: bool = False,
    ) -> None:
        super().__init__(message)
        self.failure = failure
        self.message = writable(message[:MESSAGE_CHARS_MAX])
        self.status = status
        self.code = writable(code[:CODE_CHARS_MAX]) if code else code
        self.retry_after_s = retry_after_s
        self.ours = ours

    @property
    def rule(self) -> Rule:
        return OURS if self.ours else RULES[self.failure]

    @property
    def kind(self) -> Kind | None:
        return Kind.SERVER if self.status in GATEWAY_STATUSES else self.rule.kind


# Codes that say more than the status they arrive with.
CONTEXT_CODES = frozenset(
    {
        "context_length_exceeded", "context_window_exceeded", "model_context_window_exceeded", "tokens_limit_reached",
        "string_above_max_length", "prompt_too_long", "input_too_long",
    }
)  # fmt: skip
MODEL_GONE_CODES = frozenset(
    {"model_not_found", "model_decommissioned", "model_unavailable", "model_not_supported", "invalid_model"}
)
BAD_KEY_CODES = frozenset({"invalid_api_key", "api_key_invalid", "wrong_api_key"})
CREDIT_CODES = frozenset({"insufficient_quota", "insufficient_balance", "insufficient_credits", "out_of_credit"})
CONTENT_CODE_PREFIXES = ("content_filter", "content_policy")
# Words are read only where no status and no code tells: servers name a prompt that is too long in two dozen ways, and
# an account without money is dressed as a rate limit, though waiting does not cure it.
CONTEXT_TEXT = re.compile(
    "|".join(
        (
            r"context[ _-]?(?:length|window|size)",
            r"maximum (?:prompt|input|sequence|model) length|max_model_len|max(?:imum)?[ _]input[ _]tokens",
            r"\bn_(?:keep|ctx)\b",
            r"(?:prompt|inputs?|conversation|messages?) (?:is|are|was) (?:too (?:long|large)|longer than)",
            r"(?:prompt|input) too (?:long|large)|too many (?:input |prompt )?tokens|too long to fit",
            r"too large for (?:the |[^ ]* )?model",
            r"exceed\w* (?:the )?(?:model(?:'s)? )?(?:maximum )?(?:input |prompt )?token (?:limit|count)",
            r"token limit exceeded|input token limit",
            r"exceed\w* the (?:maximum|max|allowed|limit).{0,20} (?:number of |input )tokens",
            r"(?:input|prompt) (?:token count|tokens?|length)\b.{0,40}\bexceed|range of input length",
            r"must have (?:less|fewer) than \d+ tokens|inputs`? tokens \+",
            r"reduce the length of (?:the |your )?(?:messages|prompt|input)|shorter or fewer inputs",
        )
    ),
    re.IGNORECASE,
)
CREDIT_TEXT = re.compile(
    r"insufficient[ _](?:account[ _])?(?:balance|credits?|funds)|余额不足|欠费"
    r"|(?:balance|credits?) (?:is|are) (?:insufficient|too low)|(?:out of|no|requires? more) credits?\b",
    re.IGNORECASE,
)
TRUNCATION_TEXTS = ("truncated", "truncation", "cut off", "token_limit", "maximum length", "response_length_limit")
BY_STATUS = {
    401: Failure.AUTH,
    402: Failure.OUT_OF_CREDIT,
    403: Failure.FORBIDDEN,
    404: Failure.NOT_FOUND,
    408: Failure.SERVER_ERROR,  # these four say that the server could not serve it just then
    410: Failure.NOT_FOUND,
    425: Failure.SERVER_ERROR,
    429: Failure.RATE_LIMITED,
    498: Failure.SERVER_ERROR,
    499: Failure.SERVER_ERROR,
}


def classify(status: int, code: str | None, message: str) -> Failure:
    """Name what a provider's failing answer means; nobody downstream reads a status, code or message again.

    `status` is the HTTP status, or for an error inside a 200 the status that it names (200 when it names none).
    """
    code = (code or "").lower()
    if status >= 500:
        return Failure.SERVER_ERROR
    if status == 400 and code.startswith(CONTENT_CODE_PREFIXES):
        return Failure.CONTENT_FILTER
    if status == 400 and code in BAD_KEY_CODES:
        return Failure.AUTH
    if status != 401 and (code in CREDIT_CODES or CREDIT_TEXT.search(message)):
        return Failure.OUT_OF_CREDIT
    if status in (401, 402, 403, 429):
        return BY_STATUS[status]
    if code in CONTEXT_CODES or CONTEXT_TEXT.search(message):
        return Failure.CONTEXT_LENGTH
    text = message.lower()
    if any(words in text or words == code for words in TRUNCATION_TEXTS):
        return Failure.TRUNCATED
    if status < 300:
        return Failure.WRAPPED
    if code in MODEL_GONE_CODES:
        return Failure.NOT_FOUND
    return BY_STATUS.get(status, Failure.BAD_REQUEST)


class Level(StrEnum):
    """How much a platform's failure costs the session that met it."""

    PROVIDER_BAN = "provider-ban"
    MODEL_SKIP = "model-skip"
    OFF = "off"


class Phase(StrEnum):
    """Whether the client had bytes of the answer when it failed."""

    BEFORE_STREAM = "before-stream"
    MID_STREAM = "mid-stream"


LEVELS = frozenset(Level)


@dataclass(frozen=True, slots=True)
class Context:
    level: Level
    kind: Kind
    phase: Phase


@dataclass(frozen=True, slots=True)
class Action:
    """What protection does about a failure, and why, as `level:kind:phase`."""

    ban_provider: bool
    skip_model: bool
    clear_sticky_if_pinned: bool
    reason: str


def evaluate(context: Context) -> Action:
    """Decide what one failure costs (SPEC 7.3). The only place that does."""
    return Action(
        ban_provider=context.level is Level.PROVIDER_BAN,
        skip_model=context.level is Level.MODEL_SKIP,
        clear_sticky_if_pinned=context.level is Level.PROVIDER_BAN,
        reason=f"{context.level}:{context.kind}:{context.phase}",
    )


def parse_levels(text: str, defaults: Mapping[str, Level]) -> tuple[dict[str, Level], list[str]]:
    """Read `platform:level,…` over the defaults; gives the levels and one warning per malformed pair."""
    levels, warnings = dict(defaults), []
    spelling = {platform.lower(): platform for platform in defaults}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        platform, colon, name = (word.strip().lower() for word in pair.partition(":"))
        if not (platform and colon) or name not in LEVELS:
            warnings.append(f"ignored {pair!r}: expected platform:level with level provider-ban, model-skip or off")
        else:
            levels[spelling.get(platform, platform)] = Level(name)
    return levels, warnings


K = TypeVar("K", bound=Hashable)


class Cooldowns(Generic[K]):
    """Until when each key rests. Entries expire by themselves and are pruned when read; the map is bounded."""

    def __init__(self, entries_max: int = COOLDOWNS_MAX) -> None:
        self._until: dict[K, float] = {}
        self._entries_max = entries_max

    def set(self, key: K, until: float, now: float) -> None:
        """Rest until then. A later time already set knew more, so it stays."""
        if until <= max(now, self._until.get(key, now)):
            return
        if key not in self._until and len(self._until) >= self._entries_max:
            self._make_room(now)
        self._until[key] = until

    def left(self, key: K, now: float) -> float:
        """Seconds of rest left; 0 when it may be used."""
        if not self._until or (until := self._until.get(key)) is None:
            return 0.0
        if until <= now:
            del self._until[key]
            return 0.0
        return until - now

    def active(self, now: float) -> Iterator[tuple[K, float]]:
        for key in list(self._until):
            if left := self.left(key, now):
                yield key, left

    def clear(self) -> None:
        self._until.clear()

    def __len__(self) -> int:
        return len(self._until)

    def _make_room(self, now: float) -> None:
        for key in [key for key, until in self._until.items() if until <= now]:
            del self._until[key]
        if len(self._until) >= self._entries_max:  # full of live ones: the soonest to end is the least loss
            del self._until[min(self._until, key=self._until.__getitem__)]


@dataclass(slots=True)
class Session:
    """What one conversation prefers and avoids. `last_used` moves with every touch."""

    last_used: float
    model: int | None = None
    key: int | None = None
    bans: frozenset[str] = frozenset()
    avoid: frozenset[int] = frozenset()  # for the next request only


class Sessions:
    """Conversations by session key, oldest use first. The empty key is no session: every operation is a no-op."""

    def __init__(self, ttl_s: float, entries_max: int = SESSIONS_MAX) -> None:
        self._ttl_s = ttl_s
        self._entries_max = entries_max
        self._by_key: OrderedDict[str, Session] = OrderedDict()

    def get(self, key: str, now: float) -> Session | None:
        if not key or (session := self._by_key.get(key)) is None:
            return None
        if session.last_used + self._ttl_s <= now:
            del self._by_key[key]
            return None
        return session

    def pin(self, key: str, model: int, key_id: int, now: float) -> None:
        if session := self._touch(key, now):
            session.model, session.key = model, key_id

    def ban(self, key: str, platform: str, now: float) -> None:
        if session := self._touch(key, now):
            session.bans |= {platform}

    def avoid_next(self, key: str, model: int, now: float) -> None:
        if session := self._touch(key, now):
            session.avoid |= {model}

    def clear_model(self, key: str, model: int, now: float) -> None:
        """Forget the preference for this model and its key; bans stay."""
        if (session := self.get(key, now)) and session.model == model:
            session.model = session.key = None

    def clear_key(self, key: str, key_id: int, now: float) -> None:
        """Forget the preferred key; the preferred model stays."""
        if (session := self.get(key, now)) and session.key == key_id:
            session.key = None

    def active(self, now: float) -> Iterator[tuple[str, Session]]:
        self._prune(now)
        yield from self._by_key.items()

    def __len__(self) -> int:
        return len(self._by_key)

    def _touch(self, key: str, now: float) -> Session | None:
        if not key:
            return None
        self._prune(now)
        session = self.get(key, now)
        if session is None:
            while len(self._by_key) >= self._entries_max:
                self._by_key.popitem(last=False)
            session = self._by_key[key] = Session(last_used=now)
        session.last_used = now
        self._by_key.move_to_end(key)
        return session

    def _prune(self, now: float) -> None:
        while self._by_key:
            oldest = next(iter(self._by_key.values()))
            if oldest.last_used + self._ttl_s > now:
                return
            self._by_key.popitem(last=False)


class Uses:
    """Who used a thing last: for each thing its two latest distinct sessions, which is all that
    "did another session use this since then?" needs. Bounded by the catalogue."""

    def __init__(self) -> None:
        self._latest: dict[Hashable, tuple[tuple[str, float], tuple[str, float]]] = {}

    def record(self, thing: Hashable, session: str, now: float) -> None:
        never = ("", float("-inf"))
        first, second = self._latest.get(thing, (never, never))
        self._latest[thing] = ((session, now), second if first[0] == session else first)

    def by_others(self, session: str, since: float) -> set[Hashable]:
        """The things that some other session used after `since`."""
        return {
            thing
            for thing, (first, second) in self._latest.items()
            if (second if first[0] == session else first)[1] > since
        }

    def clear(self) -> None:
        self._latest.clear()


@dataclass(eq=False, slots=True)
class Active:
    """One attempt that is running now."""

    session: str
    platform: str
    model: int
    since: float


@dataclass(frozen=True, slots=True)
class Standing:
    """What protection says of one request before it is routed. Ids of models; names of platforms."""

    preferred_model: int | None = None
    preferred_key: int | None = None
    banned: Collection[str] = ()
    avoided_models: Collection[int] = ()  # cut this session's last answer short
    others_models: Collection[Hashable] = ()  # used by other sessions lately
    others_platforms: Collection[Hashable] = ()
    busy_platforms: Collection[Hashable] = ()  # serving another session right now

    def holds_back(self, model: int, platform: str) -> bool:
        """Whether this model comes last. It is not forbidden: it is tried when all others have failed (SPEC 7.7)."""
        if platform in self.busy_platforms or model in self.avoided_models:
            return True
        return model != self.preferred_model and (model in self.others_models or platform in self.others_platforms)


NO_STANDING = Standing()


class Protection:
    """All protection state of one gateway."""

    def __init__(self, *, levels: Mapping[str, Level], sticky_ttl_s: float, thread_cooldown_s: float) -> None:
        self.levels = dict(levels)
        self.sessions = Sessions(sticky_ttl_s)
        self.transient: Cooldowns[int] = Cooldowns()
        self.keys: Cooldowns[tuple[int, int]] = Cooldowns()  # (key, model)
        self.active: set[Active] = set()
        self._thread_cooldown_s = thread_cooldown_s
        self._model_uses = Uses()
        self._platform_uses = Uses()

    def level(self, platform: str) -> Level:
        return self.levels.get(platform, Level.MODEL_SKIP)

    def standing(self, session: str, now: float, *, auto: bool) -> Standing:
        """How this request stands; a pinned one (`auto` false) is held back by nobody."""
        if not auto:
            return NO_STANDING
        busy: set[Hashable] = {
            entry.platform
            for entry in self.active
            if entry.session and entry.session != session and self.level(entry.platform) is Level.PROVIDER_BAN
        }
        if not session:
            return Standing(busy_platforms=busy) if busy else NO_STANDING
        own = self.sessions.get(session, now) or Session(now)
        avoided, own.avoid = own.avoid, frozenset()
        since = now - self._thread_cooldown_s
        return Standing(
            preferred_model=None if own.model in avoided else own.model,
            preferred_key=own.key,
            banned=own.bans,
            avoided_models=avoided,
            others_models=self._model_uses.by_others(session, since),
            others_platforms=self._platform_uses.by_others(session, since),
            busy_platforms=busy,
        )

    def begin(self, session: str, platform: str, model: int, now: float) -> Active:
        """Note a running attempt; whoever began it gives the entry to `end` on every way out."""
        entry = Active(session, platform, model, now)
        self.active.add(entry)
        return entry

    def end(self, entry: Active) -> None:
        self.active.discard(entry)

    def used(self, session: str, platform: str, model: int, now: float) -> None:
        """A session was served here: others leave it alone for a while, as far as the level says (SPEC 7.5)."""
        if not session:
            return
        level = self.level(platform)
        if level is Level.PROVIDER_BAN:
            self._platform_uses.record(platform, session, now)
        elif level is Level.MODEL_SKIP:
            self._model_uses.record(model, session, now)

    def punish(self, session: str, platform: str, model: int, kind: Kind, phase: Phase, now: float) -> Action:
        """Apply `evaluate` to this session."""
        action = evaluate(Context(self.level(platform), kind, phase))
        if action.ban_provider:
            self.sessions.ban(session, platform, now)
        if action.clear_sticky_if_pinned:
            self.sessions.clear_model(session, model, now)
        if action.skip_model and phase is Phase.MID_STREAM:  # this request is over, so it acts on the next one
            self.sessions.avoid_next(session, model, now)
        return action

    def bans(self, now: float) -> list[tuple[str, list[str]]]:
        return [(key, sorted(session.bans)) for key, session in self.sessions.active(now) if session.bans]

    def clear_cooldowns(self) -> None:
        self.transient.clear()
        self.keys.clear()
