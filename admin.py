"""The control plane: what the operator sees and changes over HTTP.

Plain Starlette endpoints over the same state the engine serves from; a change is written by store.py and reaches
routing as a new snapshot. Errors are raised as GatewayError and answered in one place, by gateway.py.
"""

from __future__ import annotations

import time
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import store
from exchange import Engine
from wire import InvalidRequest

ROWS_DEFAULT, ROWS_MAX = 100, 1000  # of the log in one answer


def json_response(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


class Admin:
    """The endpoints under /api."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def routes(self) -> list[Route]:
        return [
            Route("/api/protection", self.protection),
            Route("/api/requests", self.requests),
        ]

    async def protection(self, request: Request) -> Response:
        """Levels, sessions, bans, running attempts and cooldowns."""
        protection, catalog, now = self._engine.protection, self._engine.router.catalog, time.monotonic()

        def named(model_id: int) -> dict[str, Any]:
            model = catalog.by_id[model_id]
            return {"platform": model.platform.id, "model_id": model.model_id}

        return json_response(
            {
                "levels": protection.levels,
                "default_level": "model-skip",
                "sessions": {"count": len(protection.sessions)},
                "bans": [{"session": key, "platforms": platforms} for key, platforms in protection.bans(now)],
                "active": [{**named(a.model), "ms": round((now - a.since) * 1000)} for a in protection.active],
                "transient_cooldowns": [
                    {"model_db_id": model, **named(model), "ms_left": round(left * 1000)}
                    for model, left in protection.transient.active(now)
                ],
                "key_cooldowns": [
                    {"key_id": key, **named(model), "ms_left": round(left * 1000)}
                    for (key, model), left in protection.keys.active(now)
                ],
            }
        )

    async def requests(self, request: Request) -> Response:
        """The request log, newest first."""
        query = request.query_params
        limit = min(whole(query.get("limit"), "limit", ROWS_DEFAULT), ROWS_MAX)
        before_id = whole(query.get("before_id"), "before_id", 0) or None
        filters = {name: query[name] for name in store.FILTERS if query.get(name)}
        await self._engine.store.flush()
        rows = await self._engine.store.read(
            lambda db: store.list_requests(db, limit=limit, before_id=before_id, filters=filters)
        )
        return json_response({"rows": rows})


def whole(text: str | None, name: str, default: int) -> int:
    """A query parameter that counts something."""
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and 1 <= int(text) < 2**62):
        raise InvalidRequest(f"'{name}' must be a whole number ≥ 1.", param=name, code="invalid_type")
    return int(text)
