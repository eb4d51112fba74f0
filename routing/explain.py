"""Why a model is asked, asked later or not at all, in words and numbers for a user (SPEC 21.1).

`Router.explain` works on a plan as things stand. For a request of the past a `Moment` is kept: references and small
copies, taken in microseconds, of which `Router.as_of` makes a router as it was then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import Struct

from routing.catalog import Catalog, Model, is_demo
from routing.clients import is_among
from routing.cooldowns import Rest
from routing.fit import reaches_floor
from routing.reach import Reach
from routing.route import Rung
from routing.scores import UNSEEN, WEIGHTS, Stats, Yardstick, value_parts
from routing.trials import Snapshot as TrialsTaken
from wire.chat import Mode, Need

BLOCKED_WORDS = {
    "transient": "rests after a failure",
    "keys": "no key with capacity",
    "trial": "another request is trying it",
    "failed": "failed in this request",
}
RUNG_WORDS = {
    Rung.HELD_BACK: "held back: other conversations use it",
    Rung.EXCLUDED: "excluded from this mode",
    Rung.DOUBTED: "banned for this session, or its health gate is open",
    Rung.RESTING: "rests after a failure",
    Rung.KEY_RESTING: "its keys rest after rate limits",
}


class Draws(Struct):
    """The scores that one request drew: before and after penalties, in the models' order."""

    mode: Mode
    models: Sequence[Model]
    drawn: Sequence[float]
    scores: Sequence[float]


@dataclass(frozen=True, slots=True)
class Parts:
    """What a score is the sum of; a penalty is negative."""

    success: float  # the sampled probability
    speed: float
    ttfb: float
    intelligence: float
    penalty: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """One model of the catalogue, as one request sees it."""

    model: Model
    rung: Rung | None = None  # None: no candidate at all
    score: float | None = None  # None where the mode does not score it
    parts: Parts | None = None
    excluded: str | None = None  # why it would not be asked now

    def as_json(self) -> dict[str, Any]:
        parts = self.parts
        names = ("success", "speed", "ttfb", "intelligence", "penalty")
        return {
            "platform": self.model.platform.id,
            "model_id": self.model.model_id,
            "rung": None if self.rung is None else int(self.rung),
            "score": None if self.score is None else round(self.score, 4),
            "parts": None if parts is None else {name: round(getattr(parts, name), 4) for name in names},
            "excluded": self.excluded,
        }


class Moment(Struct):
    """What routing went by when it planned one request. Nothing in it is changed by what happens later."""

    at: float
    need: Need
    catalog: Catalog
    everything: Reach
    private: Reach
    stats: Mapping[int, Stats]
    transient: Mapping[int, Rest]
    keys: Mapping[tuple[int, int], Rest]
    trials: TrialsTaken
    gates: Collection[int]  # that were open
    order: Sequence[Model]  # of the plan, as far as it had been worked out
    banned: Collection[str]
    trial: int | None

    @property
    def weight(self) -> int:
        """How many entries of state are kept for its sake."""
        return len(self.transient) + len(self.keys)


def scored(draws: Draws | None, stats: Mapping[int, Stats]) -> dict[int, tuple[float, Parts]]:
    """Each model's score and its parts, by the statistics that it was drawn from."""
    if draws is None:
        return {}
    weights, yardstick = WEIGHTS[draws.mode], Yardstick.of(draws.models, stats)
    told = {}
    for model, drawn, score in zip(draws.models, draws.drawn, draws.scores, strict=True):
        speed, ttfb, intelligence = value_parts(model, stats.get(model.id, UNSEEN), weights, yardstick)
        told[model.id] = score, Parts(drawn - speed - ttfb - intelligence, speed, ttfb, intelligence, score - drawn)
    return told


def left_out(model: Model, need: Need, named: Collection[int], catalog: Catalog, reaches: tuple[Reach, Reach]) -> str:
    """Why this model is no candidate. `named` are the pinned models; `reaches` all routes, and the private ones."""
    everything, private = reaches
    if not model.enabled:
        return "switched off"
    if model.kind is not need.kind:
        return f"serves {model.kind} only"
    if not everything.has_key(model):
        return "no key" if not catalog.keys.get(model.platform.id) else "its key is invalid"
    if model.id not in named:
        if need.pinned is not None and need.strict:
            return "another model was asked for, and nothing else may answer"
        if not model.in_chain:
            return "switched off in the fallback chain"
        if is_demo(model.platform):
            return "answers only while there is nothing else, or by its name"
    if not is_among(need.allowed, model):
        return "not allowed by the client's key"
    if need.no_train and not private.has_key(model):
        return "not known to keep prompts out of training"
    if need.vision and not model.vision:
        return "cannot see images"
    if need.tools and not model.tools:
        return "cannot call tools"
    if not model.holds(need.tokens):
        return f"too small: it holds {model.tokens_max} tokens, and this needs {need.tokens}"
    if not reaches_floor(need, model, catalog):
        return f"below the floor: it ranks {catalog.intelligence(model):g}, and {need.min_rank} was asked for"
    return "not needed"


def blocked_words(reason: str, left_s: float | None) -> str:
    words = BLOCKED_WORDS[reason]
    return words if not left_s else f"{words}; may be asked in {max(0.1, left_s):.1f} s"
