"""How much of each key's day is left, and until when it will last: GET /api/quota (SPEC 21.2)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from admin.bodies import json_response, resource
from engine.exchange import Engine
from protection import KeyStatus
from records.analytics import Reports
from records.connection import Connection
from records.request_log import use_since
from records.rows import iso
from routing.catalog import KEYLESS, Key, Model, is_demo
from routing.day import day_began
from routing.forecast import HOUR_S, NOTHING, Forecast, Use, Used, earliest, forecast, latest
from wire.chat import Mode

MINUTE_S = 60.0
NAME = "quota"  # of the one report that is kept
Pair = tuple[str, str, int]  # platform, model_id, key


class Quota:
    """The endpoint. A report that took long is kept for a while, like those of the log."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._reports = Reports()

    def routes(self) -> list[Route]:
        return [resource("/api/quota", GET=self.show)]

    async def show(self, request: Request) -> Response:
        report = self._reports.kept(NAME, time.monotonic())
        if report is None:
            await self._engine.store.flush()
            began, utc = time.monotonic(), time.time()
            resets = {platform.daily_reset for platform in self._engine.router.catalog.platforms.values()}
            used = await self._engine.store.read(lambda db: read_use(db, resets, utc))
            report = self._report(used, utc)
            self._reports.keep(NAME, report, began, time.monotonic())
        return json_response(report)

    def _report(self, used: Mapping[str, Mapping[Pair, Used]], utc: float) -> dict[str, Any]:
        found = []
        for model, key in self._pairs():
            pair = (model.platform.id, model.model_id, key.id)
            spans = (used[span].get(pair, NOTHING) for span in ("minute", "hour", model.platform.daily_reset))
            use = Use(*spans)
            found.append((model, key, use, forecast(model, use, utc)))
        return {
            "keys": [entry(model, key, use, outlook) for model, key, use, outlook in found],
            "modes": [self._mode(mode, [(model, key, outlook) for model, key, _, outlook in found]) for mode in Mode],
        }

    def _pairs(self) -> Iterator[tuple[Model, Key]]:
        """Every enabled model with every key that could be used for it."""
        catalog = self._engine.router.catalog
        for model in catalog.models:
            platform = model.platform
            if not model.enabled or is_demo(platform):
                continue
            yield from (
                (model, key) for key in catalog.keys.get(platform.id) or ([KEYLESS] if platform.keyless else ())
            )

    def _mode(self, mode: Mode, found: list[tuple[Model, Key, Forecast]]) -> dict[str, Any]:
        """A model runs dry with the last of its keys; a mode with the last of its models."""
        catalog, statuses = self._engine.router.catalog, self._engine.router.key_status
        candidates = {model.id for model in catalog.auto_chain if mode not in model.exclude_from}
        by_model: dict[int, list[float | None]] = {}
        for model, key, outlook in found:
            if model.id in candidates and statuses.get(key.id) is not KeyStatus.INVALID:
                by_model.setdefault(model.id, []).append(outlook.dry_at)
        dry = [latest(times) for times in by_model.values()]
        return {"mode": mode, "first_dry_at": moment(earliest(dry)), "last_dry_at": moment(latest(dry))}


def read_use(db: Connection, resets: set[str], utc: float) -> dict[str, dict[Pair, Used]]:
    """What was used in the last minute, the last hour, and since the day began by each of these clocks."""
    since = {"minute": utc - MINUTE_S, "hour": utc - HOUR_S} | {reset: day_began(reset, utc) for reset in resets}
    return {
        span: {pair: Used(requests, tokens) for pair, requests, tokens in use_since(db, began)}
        for span, began in since.items()
    }


def entry(model: Model, key: Key, use: Use, outlook: Forecast) -> dict[str, Any]:
    return {
        "key_id": key.id or None,
        "platform": model.platform.id,
        "model_id": model.model_id,
        "limits": outlook.limits,
        "used": outlook.used,
        "left": outlook.left,
        "resets_at": moment(outlook.resets_at),
        "per_hour": {"requests": use.hour.requests, "tokens": use.hour.tokens},
        "dry_at": moment(outlook.dry_at),
    }


def moment(utc: float | None) -> str | None:
    return None if utc is None else iso(utc)
