"""Models and the fallback chain as the operator sees and changes them (SPEC 11.2)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from admin.bodies import fields, json_response, needed, path_id, read_json, resource, unknown
from admin.control import Control
from admin.discovery import discover
from config.shapes import FLAG, WHOLE, Shape
from engine.exchange import Engine
from records.controls import Link, change_chain, list_models, set_model_enabled
from routing.catalog import Model, ModelKind, pools
from routing.scores import UNSEEN
from wire.errors import InvalidRequest

PRIORITY_MAX = 10**9
MODEL_CHANGE: Mapping[str, Shape] = {"enabled": FLAG}
LINK: Mapping[str, Shape] = {"model_db_id": WHOLE, "priority": WHOLE, "enabled": FLAG}


class Chain:
    """The endpoints under /api/models and /api/fallback."""

    def __init__(self, engine: Engine, control: Control) -> None:
        self._engine = engine
        self._control = control

    def routes(self) -> list[Route]:
        return [
            resource("/api/models", GET=self.list_models),
            resource("/api/models/discover", POST=self.discover_models),
            resource("/api/models/{id}", PATCH=self.change_model),
            resource("/api/fallback", GET=self.show, PUT=self.change),
        ]

    async def list_models(self, request: Request) -> Response:
        return json_response(await self._engine.store.read(list_models))

    async def discover_models(self, request: Request) -> Response:
        """Ask the servers that list their own models at once; otherwise they are asked every minute."""
        counts = await discover(self._engine, self._control)
        return json_response([{"platform": platform, "models": count} for platform, count in counts.items()])

    async def change_model(self, request: Request) -> Response:
        body = fields(await read_json(request), MODEL_CHANGE)
        id = path_id(request)
        if id not in self._engine.router.catalog.by_id:
            raise unknown("model", id)
        needed(body, "enabled")
        model = await self._control.apply(lambda db: set_model_enabled(db, id, body["enabled"]))
        return json_response(model)

    async def show(self, request: Request) -> Response:
        return json_response(self.entries())

    async def change(self, request: Request) -> Response:
        """All of the changes or none; gives the chain as it is then."""
        changes = await read_json(request)
        if not isinstance(changes, list):
            raise InvalidRequest("The body must be a list of {model_db_id, priority, enabled}.", code="invalid_type")
        links = [self._link(index, change) for index, change in enumerate(changes)]
        ids = Counter(link.model_db_id for link in links)
        if twice := [id for id, count in ids.items() if count > 1]:
            raise InvalidRequest(f"Model {twice[0]} occurs twice.", param="model_db_id", code="duplicate_id")
        await self._control.apply(lambda db: change_chain(db, links))
        return json_response(self.entries())

    def _link(self, index: int, change: Any) -> Link:
        place = f"[{index}]"
        body = fields(change, LINK, place)
        id, priority = body.get("model_db_id"), body.get("priority")
        if id not in self._engine.router.catalog.by_id:
            message = f"{place}: there is no model {id}. GET /api/fallback lists what there is. Nothing was changed."
            raise InvalidRequest(message, param=f"{place}.model_db_id", code="unknown_model")
        if priority is not None and not 0 <= priority <= PRIORITY_MAX:
            message = f"{place}: 'priority' must be from 0 to {PRIORITY_MAX}."
            raise InvalidRequest(message, param=f"{place}.priority", code="invalid_value")
        return Link(id, priority, body.get("enabled"))

    def entries(self) -> list[dict[str, Any]]:
        """Every chat model in the order of the chain (SPEC 11.2), with what routing thinks of it now."""
        router, catalog, now = self._engine.router, self._engine.router.catalog, time.monotonic()
        scores = router.displayed_scores(now)
        ordered = sorted((m for m in catalog.models if m.kind is ModelKind.CHAT), key=lambda model: model.priority)
        anywhere = pools(ordered)  # where a model would be that is switched off
        return [
            self._entry(model, catalog.pools.get(model.id) or anywhere[model.id], scores.get(model.id), now)
            for model in ordered
        ]

    def _entry(self, model: Model, pool: str, score: float | None, now: float) -> dict[str, Any]:
        router, protection = self._engine.router, self._engine.protection
        stats = router.scores.stats.get(model.id, UNSEEN)
        return {
            "model_db_id": model.id,
            "platform": model.platform.id,
            "model_id": model.model_id,
            "display_name": model.name,
            "priority": model.priority,
            "enabled": model.in_chain,
            "pool": pool,
            "intelligence_rank": model.intelligence_rank,
            "speed_rank": model.speed_rank,
            "score": None if score is None else round(score, 4),
            "success_rate": round(stats.successes / stats.total, 4) if stats.total else None,
            "total": stats.raw_total,
            "tok_per_sec": round(stats.tok_per_sec, 1) if stats.raw_successes else None,
            "avg_ttfb_ms": round(stats.avg_ttfb_ms) if stats.avg_ttfb_ms is not None else None,
            "penalty": router.penalties.points(model.id, now),
            "usable_keys": router.count_usable_keys(model, now),
            "cooldown_ms": round(protection.transient.left(model.id, now) * 1000),
        }
