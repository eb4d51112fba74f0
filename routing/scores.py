"""How good a model seems: what the log says of it, and scores drawn from that (SPEC 4.2, 10.3).

Owns the statistics in force. A score is the model's success probability plus the value of an answer from it: speed,
time to first token, intelligence. The probability is sampled for every request and model (Thompson sampling);
everything else is computed once, when statistics or catalogue change. No I/O; `rng` is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import exp, log, sqrt
from random import Random

from routing.catalog import Model, median
from wire.chat import Mode

STEPS = 128  # of a table of quantiles; a draw is linear between two of them
POINTS = 512  # at which the density is computed for the table
SPREAD = 8  # standard deviations to either side; what lies beyond happens less than once in ten thousand draws
SHEETS_MAX = 64  # sets of candidates in use: modes times kinds of request (tools, vision, length)


@dataclass(frozen=True, slots=True)
class Stats:
    """What the log says of one model over the analytics window. Rates and times are of successes only."""

    successes: float = 0.0  # recency-weighted
    total: float = 0.0  # recency-weighted
    raw_successes: int = 0
    raw_total: int = 0
    tok_per_sec: float = 0.0
    avg_ttfb_ms: float | None = None


UNSEEN = Stats()


def ttfb_score(avg_ms: float) -> float:
    """The reward for a quick first token: a line through (500, .25), (1000, .15), (2000, 0), (10000, -.5)."""
    if avg_ms < 500:
        return 0.25
    if avg_ms <= 1000:
        return 0.25 - 0.10 * (avg_ms - 500) / 500
    if avg_ms <= 2000:
        return 0.15 - 0.15 * (avg_ms - 1000) / 1000
    if avg_ms <= 10_000:
        return -0.5 * (avg_ms - 2000) / 8000
    return -0.5


def speed_score(tok_s: float, tok_s_max: float) -> float:
    score = 0.3 * tok_s / tok_s_max if tok_s_max else 0.0
    return score - 0.35 * (1 - tok_s / 10) if tok_s < 10 else score


@dataclass(frozen=True, slots=True)
class Weights:
    speed: float
    ttfb: float
    intelligence: float


WEIGHTS = {
    Mode.BALANCED: Weights(speed=1.0, ttfb=1.0, intelligence=0.1),
    Mode.SMART: Weights(speed=0.2, ttfb=0.2, intelligence=0.6),
    Mode.FAST: Weights(speed=2.0, ttfb=2.0, intelligence=0.0),
}
UNSEEN_SPEED, UNSEEN_TTFB = 0.3, 0.25 * 0.75  # an optimistic prior, so that new models are tried


@dataclass(frozen=True, slots=True)
class Yardstick:
    """What scores are relative to: the fastest, the best and the worst of the models compared, and their median."""

    tok_s_max: float
    rank_best: float
    rank_worst: float
    rank_median: float  # what an unranked one counts as (SPEC 2.4)

    @classmethod
    def of(cls, models: Sequence[Model], stats: Mapping[int, Stats]) -> Yardstick:
        ranks = [m.intelligence_rank for m in models if m.intelligence_rank is not None]
        tok_s_max = max((stats.get(m.id, UNSEEN).tok_per_sec for m in models), default=0.0)
        return cls(tok_s_max, min(ranks, default=0.0), max(ranks, default=0.0), median(ranks) or 0.0)

    def intelligence(self, rank: float | None) -> float:
        width = self.rank_worst - self.rank_best
        return (self.rank_worst - (self.rank_median if rank is None else rank)) / width if width else 1.0


def value(model: Model, stats: Stats, weights: Weights, yardstick: Yardstick, *, optimistic: bool = True) -> float:
    """What an answer of this model is worth (SPEC 4.2)."""
    speed, ttfb, intelligence = value_parts(model, stats, weights, yardstick, optimistic=optimistic)
    return speed + ttfb + intelligence


def value_parts(
    model: Model, stats: Stats, weights: Weights, yardstick: Yardstick, *, optimistic: bool = True
) -> tuple[float, float, float]:
    """The same apart: for speed, time to first token and intelligence."""
    if stats.raw_successes:
        speed = speed_score(stats.tok_per_sec, yardstick.tok_s_max)
        ttfb = ttfb_score(stats.avg_ttfb_ms) if stats.avg_ttfb_ms is not None else 0.0
    else:
        seen = stats.raw_total > 0 or not optimistic
        speed, ttfb = (0.0, 0.0) if seen else (UNSEEN_SPEED, UNSEEN_TTFB)
    intelligence = yardstick.intelligence(model.intelligence_rank)
    return weights.speed * speed, weights.ttfb * ttfb, weights.intelligence * intelligence


def belief(stats: Stats) -> tuple[float, float]:
    """The parameters of the Beta distribution over a model's success rate."""
    return 2 + max(0.1, stats.successes), 2 + max(0.1, stats.total - stats.successes)


def success_probabilities(stats: Stats) -> tuple[float, ...]:
    """The table to sample this model's success probability from. It is cached and takes 0.2 ms to compute, so the job
    that brings new statistics computes it before a request needs it."""
    alpha, beta = belief(stats)
    return quantiles(round(alpha, 2), round(beta, 2))


@lru_cache(maxsize=512)  # of 4 KB each
def quantiles(alpha: float, beta: float) -> tuple[float, ...]:
    """Quantiles 0/STEPS, 1/STEPS … of Beta(alpha, beta). Sampling from the table costs a tenth of `betavariate`, and
    every request samples once for each candidate."""
    mean = alpha / (alpha + beta)
    reach = SPREAD * sqrt(mean * (1 - mean) / (alpha + beta + 1))
    low, high = max(0.0, mean - reach), min(1.0, mean + reach)
    width = (high - low) / POINTS
    middles = [low + (point + 0.5) * width for point in range(POINTS)]
    heights = [(alpha - 1) * log(x) + (beta - 1) * log(1 - x) for x in middles]
    top = max(heights)
    areas = list(accumulate((exp(height - top) for height in heights), initial=0.0))
    values, point = [], 0
    for step in range(STEPS + 1):
        wanted = areas[-1] * step / STEPS
        while point < POINTS - 1 and areas[point + 1] < wanted:
            point += 1
        share = (wanted - areas[point]) / (areas[point + 1] - areas[point]) if areas[point + 1] > areas[point] else 0.0
        values.append(low + (point + min(share, 1.0)) * width)
    return tuple(values)


class Scores:
    """Scores of models by the statistics in force."""

    def __init__(self) -> None:
        self.stats: Mapping[int, Stats] = {}
        self._sheets: dict[tuple[Mode, tuple[int, ...]], list[tuple[float, tuple[float, ...]]]] = {}

    def learn(self, stats: Mapping[int, Stats]) -> None:
        """Use these statistics from now on. Also called with the same ones when the models have changed."""
        self.stats = stats
        self._sheets.clear()

    def drawn(self, models: Sequence[Model], mode: Mode, rng: Random) -> list[float]:
        """A score for each model, with a fresh sample of its success probability."""
        random, scores = rng.random, []
        for worth, table in self._sheet(models, mode):
            place = random() * STEPS
            step = int(place)
            low = table[step]
            scores.append(worth + low + (place - step) * (table[step + 1] - low))
        return scores

    def expected(self, models: Sequence[Model]) -> list[float]:
        """Balanced scores with the expectation in place of the draw, and no bonus for the unseen (SPEC 10.3)."""
        if not models:
            return []
        yardstick, scores = Yardstick.of(models, self.stats), []
        for model in models:
            stats = self.stats.get(model.id, UNSEEN)
            alpha, beta = belief(stats)
            worth = value(model, stats, WEIGHTS[Mode.BALANCED], yardstick, optimistic=False)
            scores.append(alpha / (alpha + beta) + worth)
        return scores

    def _sheet(self, models: Sequence[Model], mode: Mode) -> list[tuple[float, tuple[float, ...]]]:
        """For each of these candidates: the value of its answer, and the table of its success probability."""
        key = (mode, tuple([m.id for m in models]))
        sheet = self._sheets.get(key)
        if sheet is None:
            if len(self._sheets) >= SHEETS_MAX:
                self._sheets.clear()
            weights, yardstick = WEIGHTS[mode], Yardstick.of(models, self.stats)
            known = [(m, self.stats.get(m.id, UNSEEN)) for m in models]
            sheet = [(value(m, stats, weights, yardstick), success_probabilities(stats)) for m, stats in known]
            self._sheets[key] = sheet
        return sheet
