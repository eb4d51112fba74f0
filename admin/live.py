"""What is true at this moment: counts, platforms, what protection blocks for whom (SPEC 11.3), and the metrics."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from admin.bodies import json_response, resource
from admin.together import metrics_of, of_all, protection_of, status_of
from engine.exchange import Engine
from protection import Level
from records.controls import count_keys
from records.metrics import CONTENT_TYPE
from transport.siblings import Siblings

VERSION = "0.1.0"


class Live:
    """/api/status, /api/platforms, /api/protection and /metrics."""

    def __init__(self, engine: Engine, siblings: Siblings | None) -> None:
        self._engine = engine
        self._siblings = siblings
        self._started = time.monotonic()
        watch(engine)
        if siblings is not None:
            siblings.answers["protection"] = lambda _: orjson.dumps(self._protection())
            siblings.answers["metrics"] = lambda _: engine.metrics.text()
            siblings.answers["status"] = lambda _: orjson.dumps(self._status({}))

    def routes(self) -> list[Route]:
        return [
            resource("/api/status", GET=self.status),
            resource("/api/platforms", GET=self.list_platforms),
            resource("/api/protection", GET=self.protection),
            resource("/api/protection/cooldowns", DELETE=self.clear_cooldowns),
            resource("/api/protection/bans", DELETE=self.lift_bans),
            resource("/metrics", GET=self.metrics),
        ]

    async def status(self, request: Request) -> Response:
        own = self._status(await self._engine.store.read(count_keys))
        return json_response(status_of(await of_all(self._siblings, "status", own)))

    def _status(self, keys: Mapping[str, int]) -> dict[str, Any]:
        engine, catalog = self._engine, self._engine.router.catalog
        return {
            "version": VERSION,
            "uptime_s": round(time.monotonic() - self._started),
            "platforms": len(catalog.platforms),
            "models": len(catalog.models),
            "keys": sum(keys.values()),
            "routable_models": sum(engine.router.has_key(model) for model in catalog.auto_chain),
            "log_queue": engine.store.pending,
            "log_dropped": engine.store.dropped,
        }

    async def list_platforms(self, request: Request) -> Response:
        keys = await self._engine.store.read(count_keys)
        return json_response(
            [
                {
                    "id": platform.id,
                    "name": platform.name,
                    "adapter": platform.adapter,
                    "base_url": platform.base_url,
                    "keyless": platform.keyless,
                    "protection": self._engine.protection.level(platform.id),
                    "keys": keys.get(platform.id, 0),
                    "signup_url": platform.signup_url,
                    "local": platform.local,
                    "trains_on_prompts": platform.trains_on_prompts,
                    "terms_url": platform.terms_url,
                    "terms_checked": platform.terms_checked,
                }
                for platform in self._engine.router.catalog.platforms.values()
            ]
        )

    async def protection(self, request: Request) -> Response:
        return json_response(protection_of(await of_all(self._siblings, "protection", self._protection())))

    def _protection(self) -> dict[str, Any]:
        """Levels, sessions, bans, running attempts and cooldowns."""
        protection, now = self._engine.protection, time.monotonic()
        sessions = [session for _, session in protection.sessions.active(now)]
        by_model = Counter(session.model for session in sessions if session.model is not None)
        return {
            "levels": protection.levels,
            "default_level": Level.MODEL_SKIP,
            "sessions": {
                "count": len(sessions),
                "by_model": self._of_models((model, {"count": count}) for model, count in by_model.most_common()),
            },
            **self._restrictions(now),
            "waiting": [
                {
                    "request_id": waiter.request_id,
                    "since_ms": ms(now - waiter.since),
                    "eta_ms": max(0, ms(waiter.eta - now)),
                }
                for waiter in self._engine.waiting.waiters()
            ],
            "trials": [
                {"model_db_id": model, "since_ms": ms(now - since)} for model, since in protection.trials.running()
            ],
            "active": self._of_models((a.model, {"ms": ms(now - a.since)}) for a in protection.active),
            "rescues": self._rescues(now),
        }

    def _rescues(self, now: float) -> list[dict[str, Any]]:
        """The calls that go on with an answer which broke off elsewhere (SPEC 14)."""
        found = []
        for exchange in self._engine.running:
            running, broken = exchange.current, exchange.broken
            if running is None or running.resumption is None or broken is None:
                continue
            entry = {
                "request_id": exchange.id,
                "since_ms": ms(now - running.attempt.started),
                "resumed_at": running.resumption.at,
                "broken": {
                    "platform": broken.route.model.platform.id,
                    "model_id": broken.route.model.model_id,
                    "kind": str(broken.error.failure),
                },
            }
            found.append((running.attempt.route.model.id, entry))
        return self._of_models(found)

    def _restrictions(self, now: float) -> dict[str, Any]:
        """What is left alone: bans, gates, and cooldowns of models and keys."""
        protection, key_status = self._engine.protection, self._engine.router.key_status
        gates = (
            (
                model,
                {
                    "model_db_id": model,
                    "since_ms": ms(now - (gate.opened_at or now)),
                    "next_trial_ms": max(0, ms(gate.trial_at - now)),
                    "trials_failed": gate.trials_failed,
                },
            )
            for model, gate in self._engine.router.gates.open_gates()
        )
        models = ((m, {"model_db_id": m, "ms_left": ms(left)}) for m, left in protection.transient.active(now))
        keys = (
            (model, {"key_id": key, "ms_left": ms(left)})
            for (key, model), left in protection.keys.active(now)
            if not key or key in key_status  # else it has been deleted or switched off
        )
        return {
            "bans": [
                {
                    "session": session,
                    "platforms": [
                        {"platform": platform, "reason": ban.reason, "ms_left": ms(ban.until - now)}
                        for platform, ban in bans.items()
                    ],
                }
                for session, bans in protection.bans(now)
            ],
            "gates": self._of_models(gates),
            "transient_cooldowns": self._of_models(models),
            "key_cooldowns": self._of_models(keys),
        }

    def _of_models(self, entries: Iterable[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
        """Each entry with its model's names. One whose model is gone, because its server no longer lists it, is left
        out."""
        by_id = self._engine.router.catalog.by_id
        return [
            {"platform": by_id[id].platform.id, "model_id": by_id[id].model_id, **entry}
            for id, entry in entries
            if id in by_id
        ]

    async def clear_cooldowns(self, request: Request) -> Response:
        protection = self._engine.protection
        count = len(protection.transient) + len(protection.keys)
        protection.clear_cooldowns(time.monotonic())
        self._engine.router.gates.close_all()
        if self._engine.shared is not None:
            self._engine.shared.cooldowns_cleared()
        self._engine.waiting.wake()
        self._engine.log.write("info", "cooldowns_cleared", count=count)
        return json_response({"cleared": count})

    async def lift_bans(self, request: Request) -> Response:
        lifted = self._engine.protection.lift_bans(time.monotonic())
        if self._engine.shared is not None:
            self._engine.shared.bans_lifted()
        self._engine.waiting.wake()
        self._engine.log.write("info", "bans_lifted", count=lifted)
        return json_response({"lifted": lifted})

    async def metrics(self, request: Request) -> Response:
        texts = [self._engine.metrics.text()]
        if self._siblings is not None:
            texts += await self._siblings.ask("metrics")
        return Response(metrics_of(texts), headers={"content-type": CONTENT_TYPE})


def ms(seconds: float) -> int:
    return round(seconds * 1000)


def watch(engine: Engine) -> None:
    """Show at /metrics what is true at the moment of a scrape."""
    protection, router, rows, recall = engine.protection, engine.router, engine.store, engine.recall
    gauge, clock = engine.metrics.gauge, time.monotonic

    def count(items: Iterable[object]) -> float:
        return float(sum(1 for _ in items))

    gauge("freeway_active_attempts", "Calls to providers that are running.", lambda: len(protection.active))
    gauge("freeway_running_requests", "Requests that are being served.", lambda: len(engine.running))
    gauge("freeway_tasks", "Tasks of the event loop.", lambda: len(asyncio.all_tasks()))
    gauge("freeway_sessions", "Conversations remembered.", lambda: count(protection.sessions.active(clock())))
    gauge(
        "freeway_bans", "Platforms banned, over all sessions.", lambda: sum(len(b) for _, b in protection.bans(clock()))
    )
    gauge("freeway_transient_cooldowns", "Models resting for all.", lambda: count(protection.transient.active(clock())))
    gauge("freeway_key_cooldowns", "Pairs of key and model resting.", lambda: count(protection.keys.active(clock())))
    gauge(
        "freeway_routable_models",
        "Models of the chain that have a usable key.",
        lambda: count(model for model in router.catalog.auto_chain if router.has_key(model)),
    )
    gauge("freeway_cache_bytes", "Memory of the answers kept.", lambda: recall.cache.size if recall else 0)
    gauge("freeway_waiting", "Requests that wait for a route to come back.", lambda: len(engine.waiting))
    gauge("freeway_gates_open", "Models whose health gate is open.", lambda: count(router.gates.open_gates()))
    gauge("freeway_log_queue_rows", "Rows of the request log waiting to be written.", lambda: rows.pending)
    gauge("freeway_log_dropped_rows_total", "Rows of the request log that were lost.", lambda: rows.dropped)
    if rows.backend.is_up is not None:
        gauge("freeway_log_up", "Whether the shared database takes the log's rows.", lambda: bool(rows.backend.is_up))
    gauge("freeway_log_dropped_lines_total", "Lines of the event log that were lost.", lambda: engine.log.dropped)
