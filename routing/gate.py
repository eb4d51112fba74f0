"""The health gate: leaves a broken model within a few requests and wins it back within minutes (SPEC 10.4).

A CUSUM over each model's outcomes, in front of the slow statistics that scores.py goes by: failures add to a sum,
successes take from it, and past THRESHOLD the gate opens. An open gate puts its model behind all healthy ones, apart
from trials: ordinary requests with failover behind them, one at a time and further apart after each that fails.
Constants and their reasons: shared facts on the health gate (simulated: three failures in a row at a success rate of
95 % open it; at most one false alarm in 2,000 requests). No I/O; `now` (monotonic seconds) and `rng` are arguments.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import log
from random import Random

THRESHOLD = 6.0
WORSE = 0.5  # what counts as broken: half as likely to answer as before
RATE_MIN, RATE_MAX = 0.70, 0.97  # a model that fails every second call anyway is the slow statistics' affair
RATE_UNSEEN = 0.9
TRIAL_S, TRIAL_S_MAX = 15.0, 120.0
JITTER = 0.2  # of a trial's time, either way, so that gates that opened together are not tried together
REQUESTS_BETWEEN = 8  # trials are a small share of the traffic, however rare it is …
QUIET_S = 300.0  # … but after this long a trial is due whatever the traffic
SUCCESSES_TO_CLOSE = 2
MASS_S = 60.0  # more than half of the models gated within this time: the fault is ours, not theirs
NONE_OPEN: frozenset[int] = frozenset()


@dataclass(slots=True)
class Gate:
    """One model's state. `opened_at` is None while the gate is closed."""

    sum: float = 0.0
    opened_at: float | None = None
    trial_at: float = 0.0
    trials_failed: int = 0
    successes: int = 0
    requests_at_trial: int = 0
    tried_at: float = 0.0


class Gates:
    """All models' gates, by model id; bounded by the catalogue."""

    def __init__(self) -> None:
        self._gates: dict[int, Gate] = {}
        self._open: set[int] = set()
        self._held: dict[int, float] = {}  # models whose gates would have opened but for `hold`, and until when
        self._requests = 0

    def arrived(self) -> None:
        """Count one auto-routed request: trials are spaced by requests, too."""
        self._requests += 1

    def is_open(self, model: int) -> bool:
        return model in self._open

    def knows(self, model: int) -> bool:
        """Whether anything is remembered of this model."""
        return model in self._gates

    def any_open(self) -> bool:
        return bool(self._open)

    def doubted(self, now: float) -> Collection[int]:
        """The models whose gates are held, lately: in every mode others come first, if there are any without doubts.
        Where all have doubts, which is what holding is for, the order stays as it is."""
        if self._held:
            self._held = {model: until for model, until in self._held.items() if until > now}
        return self._held

    def trial_due(self, model: int, now: float, *, arriving: int = 0) -> bool:
        """Whether the next request should try this model first although its gate is open. `arriving` requests have not
        been counted yet."""
        if model not in self._open:
            return False
        gate = self._gates[model]
        since = self._requests + arriving - gate.requests_at_trial
        spaced = since >= REQUESTS_BETWEEN or now - gate.tried_at >= QUIET_S
        return now >= gate.trial_at and spaced

    def trial_began(self, model: int, now: float) -> None:
        if model in self._open:
            gate = self._gates[model]
            gate.requests_at_trial, gate.tried_at = self._requests, now

    def feed(
        self,
        model: int,
        *,
        ok: bool,
        rate: float,
        hold: bool,
        began: float,
        now: float,
        rng: Random,
        trial: bool = True,
    ) -> str | None:
        """Hear of the outcome of an attempt that began then. `rate` is the model's slow success rate; `hold` keeps a
        closed gate from opening. Gives `opened`, `closed`, `failed` (a trial) or None.

        Of failures, an open gate hears of trials alone: clients that insist on the model would push the next trial out
        of reach.
        """
        gate = self._gates.get(model)
        if gate is None:
            if ok:  # a sum never falls below zero, so there is nothing to remember
                return None
            gate = self._gates[model] = Gate()
        if gate.opened_at is not None:
            if began < gate.opened_at or not (ok or trial):  # one of a crowd that was on its way knows nothing new
                return None
            return self._trial_ended(model, gate, ok, now, rng)
        if ok:
            gate.sum = max(0.0, gate.sum + log(WORSE))
            self._held.pop(model, None)
            return None
        rate = min(max(rate, RATE_MIN), RATE_MAX)
        gate.sum += log((1 - WORSE * rate) / (1 - rate))
        if gate.sum < THRESHOLD:
            return None
        if hold:
            gate.sum = THRESHOLD
            self._held[model] = now + MASS_S
            return None
        self._open.add(model)
        self._held.pop(model, None)
        self._gates[model] = Gate(opened_at=now, trial_at=now + jittered(TRIAL_S, rng), tried_at=now)
        self._gates[model].requests_at_trial = self._requests
        return "opened"

    def opened_within(self, now: float, since_s: float = MASS_S) -> set[int]:
        """The models whose gates opened lately and are open still."""
        return {model for model in self._open if now - (self._gates[model].opened_at or 0.0) <= since_s}

    def snapshot(self) -> frozenset[int]:
        """The models whose gates are open now."""
        return frozenset(self._open) if self._open else NONE_OPEN

    def restore(self, models: Collection[int]) -> None:
        """These gates are open, and no others."""
        self._gates = {model: Gate(opened_at=0.0) for model in models}
        self._open = set(models)

    def open_gates(self) -> Iterator[tuple[int, Gate]]:
        for model in self._open:
            yield model, self._gates[model]

    def close_all(self) -> int:
        """The operator's wish; gives how many were open."""
        closed = len(self._open)
        self._open.clear()
        self._held.clear()
        self._gates.clear()
        return closed

    def keep(self, models: set[int]) -> None:
        """Forget the models that are gone."""
        for model in [model for model in self._gates if model not in models]:
            del self._gates[model]
            self._open.discard(model)
            self._held.pop(model, None)

    def _trial_ended(self, model: int, gate: Gate, ok: bool, now: float, rng: Random) -> str | None:
        if not ok:
            gate.trials_failed += 1
            gate.successes = 0
            gate.trial_at = now + jittered(min(TRIAL_S_MAX, TRIAL_S * 2.0**gate.trials_failed), rng)
            return "failed"
        gate.successes += 1
        if gate.successes < SUCCESSES_TO_CLOSE:
            gate.trial_at = now
            gate.requests_at_trial = self._requests - REQUESTS_BETWEEN  # the second trial follows the first at once
            return None
        self._open.discard(model)
        self._gates[model] = Gate(sum=THRESHOLD / 2)  # a head start: a relapse is caught by two failures
        return "closed"


def jittered(seconds: float, rng: Random) -> float:
    return seconds * rng.uniform(1 - JITTER, 1 + JITTER)
