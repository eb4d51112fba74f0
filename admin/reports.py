"""What the request log says: rows, totals and series over a window of time (SPEC 10, 11.1)."""

from __future__ import annotations

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from admin.bodies import json_response, resource, whole
from admin.chain import Chain
from engine.exchange import Engine
from records.analytics import WINDOWS, Reports, analytics
from records.request_log import FILTERS, list_requests
from wire.errors import InvalidRequest

ROWS_DEFAULT, ROWS_MAX = 100, 1000  # of the log in one answer
WINDOW_DEFAULT = "24h"
SCORE_FIELDS = ("platform", "model_id", "score", "success_rate", "total", "tok_per_sec", "avg_ttfb_ms")


class LogReports:
    """/api/requests and /api/analytics."""

    def __init__(self, engine: Engine, chain: Chain) -> None:
        self._engine = engine
        self._chain = chain
        self._reports = Reports()

    def routes(self) -> list[Route]:
        return [
            resource("/api/analytics", GET=self.analytics),
            resource("/api/requests", GET=self.requests),
        ]

    async def requests(self, request: Request) -> Response:
        """The request log, newest first."""
        query = request.query_params
        limit = min(whole(query.get("limit"), "limit", ROWS_DEFAULT), ROWS_MAX)
        before_id = whole(query.get("before_id"), "before_id", 0) or None
        filters = {name: query[name] for name in FILTERS if query.get(name)}
        await self._engine.store.flush()
        rows = await self._engine.store.read(
            lambda db: list_requests(db, limit=limit, before_id=before_id, filters=filters)
        )
        return json_response({"rows": rows})

    async def analytics(self, request: Request) -> Response:
        window = request.query_params.get("window") or WINDOW_DEFAULT
        if window not in WINDOWS:
            message = f"'window' must be one of {', '.join(WINDOWS)}."
            raise InvalidRequest(message, param="window", code="invalid_value")
        report = await self._report(window)
        scored = [entry for entry in self._chain.entries() if entry["score"] is not None]
        scored.sort(key=lambda entry: -entry["score"])
        return json_response({**report, "scores": [{name: entry[name] for name in SCORE_FIELDS} for entry in scored]})

    async def _report(self, window: str) -> dict[str, Any]:
        report = self._reports.kept(window, time.monotonic())
        if report is None:
            await self._engine.store.flush()
            began = time.monotonic()
            report = await self._engine.store.read(lambda db: analytics(db, window, time.time()))
            self._reports.keep(window, report, began, time.monotonic())
        return report
