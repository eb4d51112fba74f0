"""What protection holds back at this moment, shown to the operator, and lifted when he says so (SPEC 11.3)."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from admin.http import json_response, resource
from engine.exchange import Engine
from protection import Level


class ProtectionAdmin:
    """The endpoints under /api/protection."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def routes(self) -> list[Route]:
        return [
            resource("/api/protection", GET=self.show),
            resource("/api/protection/cooldowns", DELETE=self.clear_cooldowns),
            resource("/api/protection/bans", DELETE=self.lift_bans),
        ]

    async def show(self, request: Request) -> Response:
        """Levels, and everything that bends routing just now. A model that has left the catalogue is left out."""
        now, protection, known = time.monotonic(), self._engine.protection, self._engine.router.catalog.by_id
        return json_response(
            {
                "levels": protection.levels,
                "default_level": Level.MODEL_SKIP,
                "sessions": self._sessions(now),
                "bans": self._bans(now),
                "gates": self._gates(now),
                "waiting": self._waiting(now),
                "trials": [
                    {"model_db_id": model, "since_ms": ms(now - since)} for model, since in protection.trials.items()
                ],
                "active": [
                    {**self._named(a.model), "ms": ms(now - a.since)} for a in protection.active if a.model in known
                ],
                "transient_cooldowns": [
                    {"model_db_id": model, **self._named(model), "ms_left": ms(left)}
                    for model, left in protection.transient.active(now)
                    if model in known
                ],
                "key_cooldowns": [
                    {"key_id": key, **self._named(model), "ms_left": ms(left)}
                    for (key, model), left in protection.keys.active(now)
                    if model in known and self._in_use(key)
                ],
            }
        )

    async def clear_cooldowns(self, request: Request) -> Response:
        protection = self._engine.protection
        count = len(protection.transient) + len(protection.keys)
        protection.clear_cooldowns()
        self._engine.router.gates.close_all()
        self._engine.waiting.wake()
        self._engine.log.write("info", "cooldowns_cleared", count=count)
        return json_response({"cleared": count})

    async def lift_bans(self, request: Request) -> Response:
        lifted = self._engine.protection.lift_bans(time.monotonic())
        self._engine.waiting.wake()
        self._engine.log.write("info", "bans_lifted", count=lifted)
        return json_response({"lifted": lifted})

    def _in_use(self, key: int) -> bool:
        """Not deleted nor switched off; 0 is the absence of a key, on a platform that needs none."""
        return not key or key in self._engine.router.key_status

    def _named(self, id: int) -> dict[str, Any]:
        model = self._engine.router.catalog.by_id[id]
        return {"platform": model.platform.id, "model_id": model.model_id}

    def _sessions(self, now: float) -> dict[str, Any]:
        sessions = [session for _, session in self._engine.protection.sessions.active(now)]
        known = self._engine.router.catalog.by_id
        by_model = Counter(session.model for session in sessions if session.model is not None)
        return {
            "count": len(sessions),
            "by_model": [{**self._named(id), "count": count} for id, count in by_model.most_common() if id in known],
        }

    def _bans(self, now: float) -> list[dict[str, Any]]:
        return [
            {
                "session": session,
                "platforms": [
                    {"platform": platform, "reason": ban.reason, "ms_left": ms(ban.until - now)}
                    for platform, ban in bans.items()
                ],
            }
            for session, bans in self._engine.protection.bans(now)
        ]

    def _gates(self, now: float) -> list[dict[str, Any]]:
        return [
            {
                "model_db_id": model,
                **self._named(model),
                "since_ms": ms(now - (gate.opened_at or now)),
                "next_trial_ms": max(0, ms(gate.trial_at - now)),
                "trials_failed": gate.trials_failed,
            }
            for model, gate in self._engine.router.gates.open_gates()
        ]

    def _waiting(self, now: float) -> list[dict[str, Any]]:
        return [
            {
                "request_id": waiter.request_id,
                "since_ms": ms(now - waiter.since),
                "eta_ms": max(0, ms(waiter.eta - now)),
            }
            for waiter in self._engine.waiting.waiters()
        ]


def ms(seconds: float) -> int:
    return round(seconds * 1000)
