"""What a failure means and what it costs whom: decisions only.

Owns the failure table (SPEC 5.2), the rules engine (SPEC 7.3) and `costs`, which turns an attempt's end into effects.
The state that effects change is in routing/standing.py and routing/sessions.py. It knows platforms and models only as
ids, does no I/O and reads no clock: `now` is always an argument, in seconds of one monotonic clock.

How an attempt's end travels: `classify` names a failure once; `costs` turns any outcome into effects, by the failure
table `RULES` and by `evaluate` for the session; `apply` in engine/settle.py changes state by them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from msgspec import Struct

HINTLESS_STEPS = 16  # the first rest after a 429 that names no time is this part of the longest (SPEC 7.9)
RETRY_WAIT_MAX_S = 5.0  # a pinned route's Retry-After up to this is waited out (SPEC 5.1)
RETRY_PAUSE_S = 0.4  # before a pinned route is asked again after a 500, 502 or a broken connection (SPEC 5.1)
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


class KeyStatus(StrEnum):
    """What is known of a credential (SPEC 2.3)."""

    UNKNOWN = "unknown"
    HEALTHY = "healthy"
    RATE_LIMITED = "rate_limited"
    INVALID = "invalid"


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
        return Kind.SERVER if self.status in GATEWAY_STATUSES and not self.ours else self.rule.kind


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


# --- What an attempt's end costs --------------------------------------------------------------------------------------


class Answered(Struct, frozen=True):
    """The provider answered to the end. `cut_short`: far below every length that was allowed (SPEC 7.8)."""

    cut_short: bool = False


class Failed(Struct, frozen=True):
    """`blameless`: it costs nothing, such as a prefill that a model does not take."""

    error: UpstreamError
    phase: Phase
    blameless: bool = False


class Cancelled(Struct, frozen=True):
    """The client left, or the server stopped; or the gateway itself failed. That costs no provider anything."""

    defect: str | None = None  # the name of our own error


class LostRace(Struct, frozen=True):
    """Another attempt of the same request answered first (SPEC 15)."""


Outcome = Answered | Failed | Cancelled | LostRace


@dataclass(frozen=True, slots=True)
class RestModel:
    """The model rests for everybody until then."""

    until: float


@dataclass(frozen=True, slots=True)
class RestKey:
    """The key rests for this model until then. `firm`: the provider named that time, so nobody tries before it."""

    until: float
    firm: bool


@dataclass(frozen=True, slots=True)
class Recover:
    """A success ends what failures have left behind: the rests of its model, and of its key for this model, that stood
    when it began; a bad status of the key; a point of the model's penalty."""


@dataclass(frozen=True, slots=True)
class SpaceTrials:
    """A trial has failed in a way that rests nobody: the next one of what rests still keeps its distance."""


@dataclass(frozen=True, slots=True)
class MarkKey:
    status: KeyStatus
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Skip:
    """What this request leaves alone. `again`: the reason passes, so it may be tried again later (SPEC 5.5)."""

    scope: Scope
    again: bool


@dataclass(frozen=True, slots=True)
class Ban:
    """The session avoids the platform."""

    reason: str


@dataclass(frozen=True, slots=True)
class ClearPin:
    """The session forgets its preferred model, if it is this one."""


@dataclass(frozen=True, slots=True)
class ClearKeyPin:
    """The session forgets its preferred key, if it is this one."""


@dataclass(frozen=True, slots=True)
class AvoidNext:
    """The session's next request uses this model last."""


@dataclass(frozen=True, slots=True)
class Pin:
    """The session prefers this model and key from now on."""


@dataclass(frozen=True, slots=True)
class Penalise:
    """The model has lost its last key to a 429 (SPEC 4.6)."""


@dataclass(frozen=True, slots=True)
class FeedGate:
    """The model's health gate hears of one outcome (SPEC 10.4)."""

    ok: bool


Effect = (
    RestModel
    | RestKey
    | Recover
    | SpaceTrials
    | MarkKey
    | Skip
    | Ban
    | ClearPin
    | ClearKeyPin
    | AvoidNext
    | Pin
    | Penalise
    | FeedGate
)


@dataclass(frozen=True, slots=True)
class Rests:
    """The two settings that say how long things rest, in seconds."""

    transient_s: float
    rate_limit_s: float


class Facts(Struct, frozen=True):
    """What `costs` has to know beside the outcome."""

    level: Level
    keys_left: bool  # this request may still ask the model with another key
    strikes: int  # earlier 429s in a row, of this key for this model, that named no time
    rests: Rests
    trial: bool = False  # the attempt was a trial of something that is better left alone


SUCCESS = (Recover(), Pin(), FeedGate(ok=True))
# Failures that say nothing of a model's health: the key's affair, or the request's own fault (SPEC 10.4).
NOT_HEALTH = frozenset(
    {
        Failure.RATE_LIMITED, Failure.AUTH, Failure.FORBIDDEN, Failure.OUT_OF_CREDIT, Failure.BAD_REQUEST,
        Failure.CONTEXT_LENGTH, Failure.CONTENT_FILTER,
    }
)  # fmt: skip


def costs(outcome: Outcome, facts: Facts, now: float) -> tuple[Effect, ...]:
    """Everything that one attempt's end changes, for this request, its session and everybody. The only place that
    knows (SPEC 5.2, 7, 10.4)."""
    if isinstance(outcome, Answered):
        if not outcome.cut_short:
            return SUCCESS
        return (*SUCCESS, *session_costs(Kind.TRUNCATION, Phase.MID_STREAM, facts.level))
    if not isinstance(outcome, Failed) or outcome.blameless:
        return ()
    error, rule = outcome.error, outcome.error.rule
    effects = [*rests(error, facts, now), Skip(rule.scope, again=rule.cooling in (Cooling.TRANSIENT, Cooling.KEY))]
    if facts.trial:
        effects.append(SpaceTrials())
    if rule.scope is Scope.KEY and not facts.keys_left and error.failure is Failure.RATE_LIMITED:
        effects.append(Penalise())
    if error.kind is not None and not (rule.scope is Scope.KEY and facts.keys_left):
        effects += session_costs(error.kind, outcome.phase, facts.level)
    if error.failure not in NOT_HEALTH and not error.ours:
        effects.append(FeedGate(ok=False))
    return tuple(effects)


def rests(error: UpstreamError, facts: Facts, now: float) -> list[Effect]:
    """What rests for everybody after this failure, and what is known of the key."""
    cooling = error.rule.cooling
    if cooling is Cooling.TRANSIENT:
        return [RestModel(now + facts.rests.transient_s)]
    if cooling is Cooling.INVALID:
        return [MarkKey(KeyStatus.INVALID, error.message), ClearKeyPin()]
    if cooling is not Cooling.KEY:
        return []
    named_s = error.retry_after_s if error.retry_after_s is not None else error.rule.cooldown_s
    if error.failure is not Failure.RATE_LIMITED:
        return [RestKey(now + (named_s if named_s is not None else facts.rests.rate_limit_s), firm=True)]
    if named_s is None:
        rest_s = min(facts.rests.rate_limit_s, facts.rests.rate_limit_s / HINTLESS_STEPS * 2.0**facts.strikes)
        return [RestKey(now + rest_s, firm=False), MarkKey(KeyStatus.RATE_LIMITED)]
    return [RestKey(now + named_s, firm=True), MarkKey(KeyStatus.RATE_LIMITED)]


def session_costs(kind: Kind, phase: Phase, level: Level) -> list[Effect]:
    """What `evaluate` decides, as effects."""
    action, effects = evaluate(Context(level, kind, phase)), list[Effect]()
    if action.ban_provider:
        effects.append(Ban(action.reason))
    if action.clear_sticky_if_pinned:
        effects.append(ClearPin())
    if action.skip_model and phase is Phase.MID_STREAM:  # this request is over, so it acts on the next one
        effects.append(AvoidNext())
    return effects


def retry_s(error: UpstreamError) -> float | None:
    """How long to wait before a pinned route is asked once more; None when it is not (SPEC 5.1)."""
    if error.failure is Failure.RATE_LIMITED:
        named_s = error.retry_after_s
        return named_s if named_s is not None and named_s <= RETRY_WAIT_MAX_S else None
    if error.ours or error.failure is Failure.STALL or error.failure is Failure.TIMEOUT:
        return None
    return RETRY_PAUSE_S if error.failure is Failure.CONNECTION or error.status in (500, 502) else None
