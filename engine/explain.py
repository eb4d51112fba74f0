"""Why each of the latest requests went where it went, and where one would go now (SPEC 21.1).

What a request was routed by is kept as it is, references and small copies, so that keeping costs a few microseconds; it
is put into words when somebody asks.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping
from random import Random
from typing import Any

from msgspec import Struct

from engine.record import Ended, Exchange
from router import Router
from routing.explain import Candidate, Moment
from routing.plan import Plan
from wire.chat import Chat, Need
from wire.errors import GatewayError, ModelNotFound

KEPT_MAX = 1_000  # SPEC 21.1; about 10 KB each with a hundred candidates
WEIGHT_MAX = 200_000  # entries of state over all of them, about 10 MB; reached only where hundreds of keys rest


class Kept(Struct):
    """One request that is over."""

    model: str
    session: str
    status: str
    plan: Plan
    moment: Moment | None  # None: it was answered without routing
    attempts: list[Ended]
    waited_s: float
    cached: bool


class Explanations:
    """The latest requests, oldest first out."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._weight = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, exchange: Exchange) -> None:
        """Remember a request that has ended."""
        chat, moment = exchange.chat, exchange.moment
        cached = exchange.cache == "hit"
        if chat is None or (moment is None and not cached):
            return
        plan = exchange.plan or Plan(chat.need)
        self._kept[exchange.id] = Kept(
            chat.model, exchange.session, exchange.status, plan, moment, exchange.ended, exchange.waited_s,
            cached,
        )  # fmt: skip
        if moment is not None and (moment.transient or moment.keys):
            self._weight += moment.weight
        while len(self._kept) > KEPT_MAX or (self._weight > WEIGHT_MAX and len(self._kept) > 1):
            _, oldest = self._kept.popitem(last=False)
            self._weight -= oldest.moment.weight if oldest.moment is not None else 0

    def of(self, request_id: str) -> dict[str, Any] | None:
        """What is kept of this request, in CONTRACT's shape; None where it is no longer."""
        kept = self._kept.get(request_id)
        if kept is None:
            return None
        moment, plan = kept.moment, kept.plan
        candidates: list[Candidate] = []
        if moment is not None:
            candidates = Router.as_of(moment).explain(plan.as_of(moment), moment.at)
        return {
            "request_id": request_id,
            **described(kept.model, plan.need, kept.session),
            "status": kept.status,
            "cached": kept.cached,
            "candidates": [candidate.as_json() for candidate in candidates],
            "attempts": [attempt_json(attempt) for attempt in kept.attempts],
            "waited_ms": round(kept.waited_s * 1000),
        }

    def rehearse(self, chat: Chat, session: str, rng: Random) -> dict[str, Any]:
        """Where this request would go now. Asks nobody, reserves nothing, remembers nothing.

        Raises ModelNotFound.
        """
        router, now, need = self._router, time.monotonic(), chat.need
        told: dict[str, Any] = {"error": None}
        try:
            plan = router.rehearse(need, session, now, rng)
        except ModelNotFound:
            raise
        except GatewayError as error:  # nothing can serve it: then the reasons are what is asked for
            plan, told = Plan(need), {"error": {"message": error.message, "type": error.type, "code": error.code}}
        candidates = [candidate.as_json() for candidate in router.explain(plan, now)]
        return {
            **described(chat.model, need, session),
            **told,
            "candidates": candidates,
            "attempts": [],
            "waited_ms": 0,
        }


def described(model: str, need: Need, session: str) -> Mapping[str, Any]:
    return {
        "model": model or "auto",
        "requested_model": model or "auto",
        "mode": str(need.mode),
        "session": session or None,
        "min_rank": need.min_rank,
        "privacy": "no-train" if need.no_train else None,
    }


def attempt_json(attempt: Ended) -> dict[str, Any]:
    row = attempt.row
    return {
        "platform": row.platform,
        "model": row.model_id,
        "model_id": row.model_id,
        "status": row.http_status,
        "kind": row.error_kind or (None if row.status == "success" else row.status),
        "ms": row.latency_ms,
        "message": row.error,
        "rung": attempt.rung,
        "hedge": attempt.hedge,
        "resumed_at": row.resumed_at,
    }
