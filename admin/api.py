"""The control plane: what the operator sees and changes over HTTP.

Plain Starlette endpoints over the same state the engine serves from. A change goes through control.py: one transaction,
then a new snapshot for routing. Errors are raised as GatewayError and answered in one place, by gateway.py.
"""

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

from admin.control import Control
from admin.discovery import discover
from admin.http import json_response, resource
from admin.protection import ProtectionAdmin
from config.catalog_files import provider_key
from config.settings import SettingsError, spelled
from engine.exchange import Engine
from protection import Failure, UpstreamError
from records.analytics import WINDOWS, Reports, analytics
from records.controls import (
    Link,
    change_chain,
    change_key,
    count_keys,
    delete_key,
    list_keys,
    list_models,
    put_key,
    read_secret,
    set_model_enabled,
    set_status,
    show_key,
)
from records.database import Connection
from records.metrics import CONTENT_TYPE
from records.request_log import FILTERS, list_requests
from routing.catalog import Key, KeyStatus, Model, pools
from routing.scores import UNSEEN
from transport.client import read_body
from wire.errors import InvalidRequest

VERSION = "0.1.0"
ROWS_DEFAULT, ROWS_MAX = 100, 1000  # of the log in one answer
BODY_BYTES_MAX = 1024 * 1024  # a whole chain of 10,000 models fits
LABEL_CHARS_MAX, KEY_CHARS_MAX = 100, 4096
PRIORITY_MAX = 10**9
WINDOW_DEFAULT = "24h"
KINDS_OF_JSON = {bool: "true or false", int: "a whole number", str: "a string"}


class Admin:
    """The endpoints under /api, and /metrics."""

    def __init__(self, engine: Engine, control: Control) -> None:
        self._engine = engine
        self._control = control
        self._reports = Reports()
        self._started = time.monotonic()
        watch(engine)

    def routes(self) -> list[Route]:
        return [
            resource("/api/status", GET=self.status),
            resource("/api/keys", GET=self.list_keys, POST=self.add_key),
            resource("/api/keys/{id}", PATCH=self.change_key, DELETE=self.delete_key),
            resource("/api/keys/{id}/check", POST=self.check_key),
            resource("/api/platforms", GET=self.list_platforms),
            resource("/api/models", GET=self.list_models),
            resource("/api/models/discover", POST=self.discover_models),
            resource("/api/models/{id}", PATCH=self.change_model),
            resource("/api/fallback", GET=self.show_chain, PUT=self.change_chain),
            resource("/api/analytics", GET=self.analytics),
            resource("/api/requests", GET=self.requests),
            resource("/metrics", GET=self.metrics),
            *ProtectionAdmin(self._engine).routes(),
        ]

    # What is.

    async def status(self, request: Request) -> Response:
        engine, catalog = self._engine, self._engine.router.catalog
        keys = await engine.store.read(count_keys)
        return json_response(
            {
                "version": VERSION,
                "uptime_s": round(time.monotonic() - self._started),
                "platforms": len(catalog.platforms),
                "models": len(catalog.models),
                "keys": sum(keys.values()),
                "routable_models": sum(engine.router.has_key(model) for model in catalog.auto_chain),
                "log_queue": engine.store.pending,
                "log_dropped": engine.store.dropped,
            }
        )

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
                }
                for platform in self._engine.router.catalog.platforms.values()
            ]
        )

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
        names = ("platform", "model_id", "score", "success_rate", "total", "tok_per_sec", "avg_ttfb_ms")
        scored = [entry for entry in self._chain() if entry["score"] is not None]
        scored.sort(key=lambda entry: -entry["score"])
        return json_response({**report, "scores": [{name: entry[name] for name in names} for entry in scored]})

    async def _report(self, window: str) -> dict[str, Any]:
        report = self._reports.kept(window, time.monotonic())
        if report is None:
            await self._engine.store.flush()
            began = time.monotonic()
            report = await self._engine.store.read(lambda db: analytics(db, window, time.time()))
            self._reports.keep(window, report, began, time.monotonic())
        return report

    async def metrics(self, request: Request) -> Response:
        return Response(self._engine.metrics.text(), headers={"content-type": CONTENT_TYPE})

    # What the operator changes.

    async def list_keys(self, request: Request) -> Response:
        keys = await self._engine.store.read(lambda db: list_keys(db, self._engine.store.vault))
        return json_response([self._live(key) for key in keys])

    async def add_key(self, request: Request) -> Response:
        """201 with the new key; 200 with the existing one where it was known already."""
        body = fields(await read_json(request), platform=str, key=str, label=str)
        for needed in ("platform", "key"):
            if needed not in body:
                raise InvalidRequest(f"'{needed}' is missing.", param=needed, code="missing_field")
        platform = self._control.files.platforms.get(body["platform"])
        if platform is None:
            message = f"There is no platform {body['platform'][:100]!r}. GET /api/platforms lists what there is."
            raise InvalidRequest(message, param="platform", code="unknown_platform")
        secret = credential(body["key"])
        if "{" in platform.base_url and ":" not in secret:
            message = f"A key for {platform.name} is written {platform.key_format or 'account:token'}."
            raise InvalidRequest(message, param="key", code="invalid_key")
        name = label(body["label"]) if "label" in body else None
        vault = self._engine.store.vault
        key, is_new = await self._control.apply(lambda db: put_key(db, vault, platform.id, secret, name))
        self._note("key_added" if is_new else "key_known", key)
        return json_response(self._live(key), 201 if is_new else 200)

    async def change_key(self, request: Request) -> Response:
        body = fields(await read_json(request), label=str, enabled=bool, status=str)
        if body.get("status", KeyStatus.UNKNOWN) != KeyStatus.UNKNOWN:
            message = "'status' can only be set to 'unknown', to have the key tried again."
            raise InvalidRequest(message, param="status", code="invalid_value")
        name = label(body["label"]) if "label" in body else None
        id, vault = path_id(request), self._engine.store.vault
        key = await self._control.apply(
            lambda db: change_key(db, vault, id, label=name, enabled=body.get("enabled"), reset="status" in body)
        )
        if key is None:
            raise unknown("key", id)
        self._note("key_changed", key)
        return json_response(self._live(key))

    async def delete_key(self, request: Request) -> Response:
        id = path_id(request)
        if not await self._control.apply(lambda db: delete_key(db, id)):
            raise unknown("key", id)
        self._engine.log.write("info", "key_deleted", key_id=id)
        return json_response({"id": id, "deleted": True})

    async def check_key(self, request: Request) -> Response:
        """Ask the provider whether it takes this key, without using any of its quota; gives the key as it is then."""
        id, engine = path_id(request), self._engine
        vault = engine.store.vault
        found = await engine.store.read(lambda db: read_secret(db, vault, id))
        if found is None:
            raise unknown("key", id)
        model = next((m for m in engine.router.catalog.models if m.platform.id == found[0]), None)
        if model is None:
            raise InvalidRequest("The catalogue has no model of the key's platform.", status=409, code="no_model")
        status: KeyStatus | None = None
        words: str | None = None
        try:
            if await engine.providers.check_key(model, Key(id, found[0], found[1])):
                status = KeyStatus.HEALTHY
        except UpstreamError as error:
            told = {Failure.AUTH: KeyStatus.INVALID, Failure.RATE_LIMITED: KeyStatus.RATE_LIMITED}
            status, words = told.get(error.failure), error.message

        def note(db: Connection) -> dict[str, Any] | None:
            set_status(db, id, status, words)
            return show_key(db, vault, id)

        key = await self._control.apply(note)
        if key is None:
            raise unknown("key", id)
        self._note("key_checked", key)
        return json_response(self._live(key))

    async def list_models(self, request: Request) -> Response:
        return json_response(await self._engine.store.read(list_models))

    async def discover_models(self, request: Request) -> Response:
        """Ask the servers that list their own models now, and not only from time to time."""
        told = await discover(self._engine, self._control)
        return json_response([{"platform": platform, "models": count} for platform, count in told.items()])

    async def change_model(self, request: Request) -> Response:
        body = fields(await read_json(request), enabled=bool)
        id = path_id(request)
        if id not in self._engine.router.catalog.by_id:
            raise unknown("model", id)
        if "enabled" not in body:
            raise InvalidRequest("'enabled' is missing.", param="enabled", code="missing_field")
        model = await self._control.apply(lambda db: set_model_enabled(db, id, body["enabled"]))
        return json_response(model)

    async def show_chain(self, request: Request) -> Response:
        return json_response(self._chain())

    async def change_chain(self, request: Request) -> Response:
        """All of the changes or none; gives the chain as it is then."""
        changes = await read_json(request)
        if not isinstance(changes, list):
            raise InvalidRequest("The body must be a list of {model_db_id, priority, enabled}.", code="invalid_type")
        links = [self._link(index, change) for index, change in enumerate(changes)]
        ids = Counter(link.model_db_id for link in links)
        if twice := [id for id, count in ids.items() if count > 1]:
            raise InvalidRequest(f"Model {twice[0]} occurs twice.", param="model_db_id", code="duplicate_id")
        await self._control.apply(lambda db: change_chain(db, links))
        return json_response(self._chain())

    def _link(self, index: int, change: Any) -> Link:
        place = f"[{index}]"
        body = fields(change, place, model_db_id=int, priority=int, enabled=bool)
        id, priority = body.get("model_db_id"), body.get("priority")
        if id not in self._engine.router.catalog.by_id:
            message = f"{place}: there is no model {id}. GET /api/fallback lists what there is. Nothing was changed."
            raise InvalidRequest(message, param=f"{place}.model_db_id", code="unknown_model")
        if priority is not None and not 0 <= priority <= PRIORITY_MAX:
            message = f"{place}: 'priority' must be from 0 to {PRIORITY_MAX}."
            raise InvalidRequest(message, param=f"{place}.priority", code="invalid_value")
        return Link(id, priority, body.get("enabled"))

    # How things are shown.

    def _chain(self) -> list[dict[str, Any]]:
        """Every model in the order of the chain (SPEC 11.2), with what routing thinks of it now."""
        router, catalog, now = self._engine.router, self._engine.router.catalog, time.monotonic()
        scores = router.displayed_scores(now)
        anywhere = pools(catalog.models)  # where a model would be that is switched off
        ordered = sorted(catalog.models, key=lambda model: model.priority)
        return [
            self._chain_entry(model, catalog.pools.get(model.id) or anywhere[model.id], scores.get(model.id), now)
            for model in ordered
        ]

    def _chain_entry(self, model: Model, pool: str, score: float | None, now: float) -> dict[str, Any]:
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

    def _live(self, key: dict[str, Any]) -> dict[str, Any]:
        """A key with the status that routing goes by; the database hears of a change a moment later."""
        status = self._engine.router.key_status.get(key["id"], key["status"])
        return {**key, "status": status}

    def _note(self, event: str, key: Mapping[str, Any]) -> None:
        self._engine.log.write("info", event, key_id=key["id"], platform=key["platform"], status=key["status"])


def watch(engine: Engine) -> None:
    """Show at /metrics what is true at the moment of a scrape."""
    protection, router, rows = engine.protection, engine.router, engine.store
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
    gauge("freeway_waiting", "Requests that wait for a route to come back.", lambda: len(engine.waiting))
    gauge("freeway_gates_open", "Models whose health gate is open.", lambda: count(router.gates.open_gates()))
    gauge("freeway_log_queue_rows", "Rows of the request log waiting to be written.", lambda: rows.pending)
    gauge("freeway_log_dropped_rows_total", "Rows of the request log that were lost.", lambda: rows.dropped)
    gauge("freeway_log_dropped_lines_total", "Lines of the event log that were lost.", lambda: engine.log.dropped)


# Reading what the operator sent. Each raises InvalidRequest naming the field.
async def read_json(request: Request) -> Any:
    raw = await read_body(dict(request.scope["headers"]), request.receive, BODY_BYTES_MAX)
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None


def fields(body: Any, place: str = "", **types: type) -> dict[str, Any]:
    """An object that has only these fields, each of its type where it is given."""
    if not isinstance(body, dict):
        message = f"{place or 'The body'} must be a JSON object."
        raise InvalidRequest(message, param=place or None, code="invalid_type")
    for name, value in body.items():
        param = f"{place}.{name}" if place else name
        if name not in types:
            message = f"'{param[:100]}' is unknown here; expected {', '.join(types)}."
            raise InvalidRequest(message, param=param[:100], code="unknown_field")
        if type(value) is not types[name]:
            message = f"'{param}' must be {KINDS_OF_JSON[types[name]]}."
            raise InvalidRequest(message, param=param, code="invalid_type")
    return body


def credential(text: str) -> str:
    """A provider's key. The message never quotes it."""
    message = "The key must be printable ASCII in one line and without blanks."
    if any(char.isspace() for char in text.removeprefix("Bearer ")) or len(text) > KEY_CHARS_MAX:
        raise InvalidRequest(message, param="key", code="invalid_key")
    try:
        return provider_key("key", text)
    except SettingsError:
        raise InvalidRequest(message, param="key", code="invalid_key") from None


def label(text: str) -> str:
    text = text.strip()
    if len(text) > LABEL_CHARS_MAX or not text.isprintable():
        message = f"'label' must be at most {LABEL_CHARS_MAX} printable characters."
        raise InvalidRequest(message, param="label", code="invalid_value")
    if text.startswith("env:"):  # at the next start it would be switched off for want of its variable
        raise InvalidRequest("Labels that begin with 'env:' are kept for keys from the environment.", param="label")
    return text


def path_id(request: Request) -> int:
    text = request.path_params["id"]
    id = spelled(text)
    if id is None:
        raise unknown("entry", text[:100])
    return id


def unknown(what: str, id: object) -> InvalidRequest:
    return InvalidRequest(f"There is no {what} {id}.", status=404, code="not_found")


def whole(text: str | None, name: str, default: int) -> int:
    """A query parameter that counts something."""
    if not text:
        return default
    number = spelled(text)
    if not number:
        raise InvalidRequest(f"'{name}' must be a whole number ≥ 1.", param=name, code="invalid_type")
    return number
