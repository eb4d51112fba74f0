"""The catalogue as routing sees it: platforms, models and keys at one moment.

Owns these types and `Catalog`, an immutable snapshot; an admin's change makes a new one. Whatever depends on the
catalogue alone (the chain, pools, names) is worked out here, once. No I/O: store.py fills it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from protection import LEVELS as LEVELS
from protection import Level as Level  # what a platform's `protection` says
from wire.chat import Need
from wire.errors import ModelNotFound

DEMO_ADAPTER = "demo"  # the built-in platform that serves only when there is nothing else (SPEC 1.5)


class KeyStatus(StrEnum):
    UNKNOWN = "unknown"
    HEALTHY = "healthy"
    RATE_LIMITED = "rate_limited"
    INVALID = "invalid"


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
    quirks: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A `model_id` on a platform. Ranks: lower is better. A limit of None is no limit."""

    id: int
    platform: Platform
    model_id: str
    name: str
    intelligence_rank: float
    speed_rank: float
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

    @property
    def label(self) -> str:
        return f"{self.platform.id}/{self.model_id}"

    @property
    def limited(self) -> bool:
        return not (self.rpm is None and self.rpd is None and self.tpm is None and self.tpd is None)


@dataclass(frozen=True, slots=True)
class Key:
    """One credential. Id 0 is the absence of one, on a keyless platform."""

    id: int
    platform: str
    secret: str = field(repr=False)
    label: str = ""


KEYLESS = Key(0, "", "")


class Pool(StrEnum):
    FAST = "fast"
    BALANCED = "balanced"
    SMART = "smart"


class Catalog:
    """Platforms, models and enabled keys at one moment. Never changed; an admin's change makes a new one."""

    def __init__(self, platforms: Iterable[Platform], models: Iterable[Model], keys: Iterable[Key]) -> None:
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
        self.chain = sorted((m for m in self.models if m.enabled and m.in_chain), key=lambda m: m.priority)
        self.pools = pools(self.chain)
        demo_only = not any(self.keys.get(p.id) or p.keyless for p in self.platforms.values() if not is_demo(p))
        self.auto_chain = [m for m in self.chain if demo_only or not is_demo(m.platform)]

    def knows(self, name: str) -> bool:
        """Whether a model has this name, enabled or not."""
        platform, _, model_id = name.partition("/")
        return name in self.by_name or any(m.platform.id == platform for m in self.by_name.get(model_id, ()))

    def meant(self, need: Need) -> Need:
        """The need with the mode in place of a model, where the name only stands for one because no model has it."""
        if need.pinned is None or need.unknown_means is None or self.knows(need.pinned):
            return need
        return replace(need, mode=need.unknown_means, pinned=None)

    def resolve(self, name: str) -> list[Model]:
        """The enabled models a client means by this name: on the platform it named, then elsewhere under the same id.

        An exact `model_id` wins over `platform/model_id`, because ids contain slashes.
        """
        if name in self.by_name:
            named, others = self.by_name[name], []
        else:
            platform, _, model_id = name.partition("/")
            same_id = self.by_name.get(model_id, []) if platform in self.platforms else []
            named = [m for m in same_id if m.platform.id == platform]
            others = [m for m in same_id if m.platform.id != platform]
        if not named:
            raise ModelNotFound(f"The model '{name}' does not exist. GET /v1/models lists what there is.", status=400)
        if not (usable := [m for m in named if m.enabled]):
            raise ModelNotFound(f"The model '{name}' is disabled.", status=400)
        return usable + [m for m in others if m.enabled]


def is_demo(platform: Platform) -> bool:
    return platform.adapter == DEMO_ADAPTER


def spread(values: Sequence[float]) -> Callable[[float], float]:
    """Maps the smallest of the values to 0 and the largest to 1; everything to 0 when they do not vary."""
    low, high = min(values, default=0.0), max(values, default=0.0)
    width = high - low
    return (lambda value: (value - low) / width) if width else (lambda value: 0.0)


def pools(chain: Sequence[Model]) -> dict[int, Pool]:
    """Which pool each model of the enabled chain belongs to (SPEC 4.8)."""
    speed = spread([m.speed_rank for m in chain])
    intelligence = spread([m.intelligence_rank for m in chain])
    speed_varies = len({m.speed_rank for m in chain}) > 1
    intelligence_varies = len({m.intelligence_rank for m in chain}) > 1

    def pool(model: Model) -> Pool:
        if Pool.SMART in model.prefer_in:
            return Pool.SMART
        if speed_varies and speed(model.speed_rank) <= 0.4:
            return Pool.FAST
        if intelligence_varies and intelligence(model.intelligence_rank) <= 0.4:
            return Pool.SMART
        return Pool.BALANCED

    return {model.id: pool(model) for model in chain}
