"""The catalogue as routing sees it: platforms, models and keys at one moment.

Owns these types and `Catalog`, an immutable snapshot; an operator's change makes a new one. Whatever depends on the
catalogue alone (the chain, pools, names) is worked out here, once. No I/O: records/models.py fills it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from msgspec.structs import replace

from protection import LEVELS as LEVELS
from protection import KeyStatus as KeyStatus
from protection import Level as Level  # what a platform's `protection` says
from wire.chat import ANSWER_TOKENS_ASSUMED, VENDOR_PREFIX, Need, parse_model, plain_name
from wire.chat import ModelKind as ModelKind
from wire.errors import ModelNotFound

DEMO_ADAPTER = "demo"  # the built-in platform that serves only when there is nothing else (SPEC 1.5)


class Prefill(StrEnum):
    """How a model is asked to go on with an assistant message that has been begun (SPEC 14.4)."""

    NONE = "none"  # it would start anew, or refuse
    PLAIN = "plain"  # the begun message comes last, nothing else
    PREFIX = "prefix"  # with `"prefix": true` in it
    PARTIAL = "partial"  # with `"partial": true` in it
    CONTINUE_FINAL_MESSAGE = "continue_final_message"  # with this in the body, and no generation prompt


@dataclass(frozen=True, slots=True, eq=False)
class Platform:
    """A provider account type. `quirks` are its differences from its adapter's plain wire format."""

    id: str
    name: str
    adapter: str
    base_url: str
    env: tuple[str, ...] = ()
    keyless: bool = False
    protection: Level = Level.MODEL_SKIP
    signup_url: str | None = None
    key_format: str | None = None
    discover: bool = False  # its models are what it lists, besides those in the catalogue
    local: bool = False  # the operator's own machine: prompts stay there
    trains_on_prompts: bool | None = None  # None: unknown, which counts as yes
    terms_url: str | None = None
    terms_checked: str | None = None  # the date on which somebody read them
    check_path: str | None = None  # what a GET proves a key with, after the base URL; "": nothing does; None: not known
    daily_reset: str = "UTC"  # when daily quotas begin anew: "[HH:MM ]Time/Zone"
    prefill: Prefill = Prefill.NONE
    completions: bool = False  # it has an endpoint of its own for legacy completions
    quirks: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A `model_id` on a platform. Ranks: lower is better, None is unranked (SPEC 2.4). A limit of None is no limit."""

    id: int
    platform: Platform
    model_id: str
    name: str
    intelligence_rank: float | None
    speed_rank: float | None
    context_window: int
    max_output: int | None
    rpm: int | None
    rpd: int | None
    tpm: int | None
    tpd: int | None
    tools: bool
    vision: bool
    exclude_from: frozenset[str]
    prefer_in: frozenset[str]
    enabled: bool
    priority: int
    in_chain: bool
    quirks: Mapping[str, Any] = field(default_factory=dict)  # the platform's, and over them its own
    discovered: bool = False  # its platform's server has listed it; no catalogue file has it
    kind: ModelKind = ModelKind.CHAT
    family: str = ""  # the same weights, whoever serves them; its own id where the catalogue does not say
    dimensions: int | None = None  # of an embedding
    prefill: Prefill = Prefill.NONE
    completions: bool = False
    label: str = field(init=False)  # how it is called in headers, logs and the page
    limited: bool = field(init=False)  # it has a limit that the ledger has to count

    def __post_init__(self) -> None:
        limited = any(limit is not None for limit in (self.rpm, self.rpd, self.tpm, self.tpd))
        object.__setattr__(self, "label", f"{self.platform.id}/{self.model_id}")
        object.__setattr__(self, "limited", limited)

    def answer_max(self, prompt_tokens: int) -> int:
        """The most tokens to ask for: what the model gives and what its window leaves, by an estimate that may be short
        by an eighth. A request that fits at all leaves ANSWER_TOKENS_ASSUMED (SPEC 3.7)."""
        room = self.context_window - prompt_tokens - prompt_tokens // 8
        return min(max(room, ANSWER_TOKENS_ASSUMED), self.max_output or self.context_window)

    def holds(self, tokens: int) -> bool:
        """Whether a request of so many can ever be sent: no wait makes room for one that alone exceeds a limit."""
        if tokens > self.context_window:
            return False
        return (self.tpm is None or tokens <= self.tpm) and (self.tpd is None or tokens <= self.tpd)

    @property
    def tokens_max(self) -> int:
        """Of the longest request that it holds."""
        return min(limit for limit in (self.context_window, self.tpm, self.tpd) if limit is not None)


@dataclass(frozen=True, slots=True)
class Key:
    """One credential. Id 0 is the absence of one, on a keyless platform."""

    id: int
    platform: str
    secret: str = field(repr=False)
    label: str = ""
    trains_on_prompts: bool | None = None  # overrides the platform's, for example on a paid plan


KEYLESS = Key(0, "", "")


def keeps_prompts_private(platform: Platform, key: Key) -> bool:
    """Whether prompts sent with this key are known not to train anybody's models (SPEC 21.4)."""
    trains = platform.trains_on_prompts if key.trains_on_prompts is None else key.trains_on_prompts
    return platform.local or trains is False


ACCOUNT = re.compile(r"[A-Za-z0-9_-]+")  # goes into an address as it is
WRITTEN = "This key is not written as it has to be: "


def is_templated(platform: Platform) -> bool:
    """Whether the address has a place for the account that a key belongs to."""
    return "{" in platform.base_url


def how_written(platform: Platform, secret: str) -> str | None:
    """What the operator is told of a key without its account; None for a key that can be used as it is (SPEC 2.5)."""
    if not is_templated(platform):
        return None
    account, _, token = secret.partition(":")
    if ACCOUNT.fullmatch(account) and token:
        return None
    return f"{WRITTEN}{platform.key_format or 'account_id:token'}."


class Pool(StrEnum):
    FAST = "fast"
    BALANCED = "balanced"
    SMART = "smart"


NO_ALIASES: Mapping[str, str] = {}


class Catalog:
    """Platforms, models and enabled keys at one moment. Never changed; an operator's change makes a new one."""

    def __init__(
        self,
        platforms: Iterable[Platform],
        models: Iterable[Model],
        keys: Iterable[Key],
        aliases: Mapping[str, str] = NO_ALIASES,
    ) -> None:
        self.platforms = {platform.id: platform for platform in platforms}
        self.models = tuple(models)  # in catalogue order, which prefer_in follows
        self.by_id = {model.id: model for model in self.models}
        self.position = {model.id: index for index, model in enumerate(self.models)}
        self.keys: dict[str, list[Key]] = {platform: [] for platform in self.platforms}
        for key in keys:
            self.keys.setdefault(key.platform, []).append(key)
        self.by_name: dict[str, list[Model]] = {}
        for model in self.models:
            self.by_name.setdefault(model.model_id, []).append(model)
        self._spelled: dict[str, str] = {}  # by what clients may call a model: what it is called here
        for name in (*self.by_name, *(model.label for model in self.models)):
            self._spelled.setdefault(plain_name(name), name)
        for name in self.by_name:  # behind all others: the id with the prefix may be one platform's own
            self._spelled.setdefault(plain_name(name).removeprefix(VENDOR_PREFIX), name)
        self._spelled |= {model.label: model.label for model in self.models}
        self.aliases = {plain_name(name): meaning for name, meaning in aliases.items()}  # each a mode or a model
        self._as_written = frozenset(name for name in self.by_name if self._alias(name) is None)
        self._resolved: dict[tuple[str, ModelKind | None], list[Model]] = {}  # bounded by the names that there are
        in_order = sorted((m for m in self.models if m.enabled and m.in_chain), key=lambda m: m.priority)
        self.chain = [m for m in in_order if m.kind is ModelKind.CHAT]
        self.embeddings = [m for m in in_order if m.kind is ModelKind.EMBEDDING]
        self.pools = pools(self.chain)
        self._median_rank = median(m.intelligence_rank for m in self.chain) or 0.0
        demo_only = not any(self.keys.get(p.id) or p.keyless for p in self.platforms.values() if not is_demo(p))
        self.auto_chain = [m for m in self.chain if demo_only or not is_demo(m.platform)]
        self.auto_embeddings = [m for m in self.embeddings if demo_only or not is_demo(m.platform)]

    def intelligence(self, model: Model) -> float:
        """The rank that a model counts as where a limit is set on ranks: the chain's median for an unranked one."""
        return self._median_rank if model.intelligence_rank is None else model.intelligence_rank

    def known_as(self, name: str) -> str | None:
        """A model's id, or platform and id, as the catalogue spells it; None when no model, enabled or not, has this
        name. Letter case, `:latest` and the prefix `openai/` make no difference, unless another model is called so."""
        if name in self.by_name:
            return name
        plain = plain_name(name)
        return (
            self._spelled.get(name) or self._spelled.get(plain) or self._spelled.get(plain.removeprefix(VENDOR_PREFIX))
        )

    def _alias(self, name: str) -> str | None:
        plain = plain_name(name)
        return self.aliases.get(plain) or self.aliases.get(plain.removeprefix(VENDOR_PREFIX))

    def meant(self, need: Need) -> Need:
        """The need in the catalogue's own words: with the mode or the model that an alias stands for, and with a
        model's name as it is spelled here (SPEC 3.10); or with the mode that an unknown name stands for."""
        if need.pinned is None or need.pinned in self._as_written:
            return need
        alias = self._alias(need.pinned)
        mode, wanted = (need.mode, need.pinned) if alias is None else parse_model(alias)
        pinned = None if wanted is None else self.known_as(wanted) or wanted
        if pinned is not None and need.unknown_means is not None and self.known_as(pinned) is None:
            mode, pinned = need.unknown_means, None
        if (mode, pinned) == (need.mode, need.pinned):
            return need
        return replace(need, mode=mode, pinned=pinned)

    def resolve(self, name: str, kind: ModelKind | None = ModelKind.CHAT) -> list[Model]:
        """The enabled models a client means by this name: on the platform it named, then elsewhere under the same id.

        An exact `model_id` wins over `platform/model_id`, because ids contain slashes. A `kind` of None is any. Raises
        ModelNotFound.
        """
        if (found := self._resolved.get((name, kind))) is not None:
            return found
        if name in self.by_name:
            named, others = self.by_name[name], []
        else:
            platform, _, model_id = name.partition("/")
            same_id = self.by_name.get(model_id, []) if platform in self.platforms else []
            named = [m for m in same_id if m.platform.id == platform]
            others = [m for m in same_id if m.platform.id != platform]
        if not named:
            raise ModelNotFound(f"The model '{name}' does not exist. GET /v1/models lists what there is.", status=400)
        if kind is not None and all(m.kind is not kind for m in named):
            raise ModelNotFound(f"The model '{name}' is of another kind: it serves {named[0].kind} only.", status=400)
        named, others = ([m for m in models if kind in (m.kind, None)] for models in (named, others))
        if not (usable := [m for m in named if m.enabled]):
            raise ModelNotFound(f"The model '{name}' is disabled.", status=400)
        found = self._resolved[name, kind] = usable + [m for m in others if m.enabled]
        return found


def is_demo(platform: Platform) -> bool:
    return platform.adapter == DEMO_ADAPTER


def spread(values: Sequence[float]) -> Callable[[float], float]:
    """Maps the smallest of the values to 0 and the largest to 1; everything to 0 when they do not vary."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    width = high - low
    return (lambda value: (value - low) / width) if width else (lambda value: 0.0)


def median(ranks: Iterable[float | None]) -> float | None:
    """What an unranked model counts as among these (SPEC 2.4); None when nothing is ranked."""
    known = sorted(rank for rank in ranks if rank is not None)
    return (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2 if known else None


def by_rank(models: Sequence[Model]) -> list[Model]:
    """Best first: by intelligence, then speed, then the order they have."""
    intelligence = median(m.intelligence_rank for m in models) or 0.0
    speed = median(m.speed_rank for m in models) or 0.0

    def ranks(model: Model) -> tuple[float, float]:
        return (
            intelligence if model.intelligence_rank is None else model.intelligence_rank,
            speed if model.speed_rank is None else model.speed_rank,
        )

    return sorted(models, key=ranks)


def pools(chain: Sequence[Model]) -> dict[int, Pool]:
    """Which pool each model of the enabled chain belongs to (SPEC 4.8). An unranked model takes no part in the
    comparison, so it moves no other; one with only one of its ranks counts as unranked."""
    ranks = [(m.speed_rank, m.intelligence_rank) for m in chain]
    ranked = [(speed, wits) for speed, wits in ranks if speed is not None and wits is not None]
    speeds, intelligences = [speed for speed, _ in ranked], [wits for _, wits in ranked]
    speed, intelligence = spread(speeds), spread(intelligences)
    speed_varies, intelligence_varies = len(set(speeds)) > 1, len(set(intelligences)) > 1

    def pool(model: Model) -> Pool:
        if Pool.SMART in model.prefer_in:
            return Pool.SMART
        if model.speed_rank is None or model.intelligence_rank is None:
            return Pool.BALANCED
        if speed_varies and speed(model.speed_rank) <= 0.4:
            return Pool.FAST
        if intelligence_varies and intelligence(model.intelligence_rank) <= 0.4:
            return Pool.SMART
        return Pool.BALANCED

    return {model.id: pool(model) for model in chain}
