"""Client keys as the operator makes and changes them (SPEC 19). A key is shown once, when it is made."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from admin.bodies import fields, json_response, label, needed, path_id, read_json, resource, unknown
from admin.control import Control
from config.shapes import COUNT, FLAG, OBJECT, TEXT, TEXTS, Shape, one_of
from engine.exchange import Engine
from records.clients import add_client, change_client, delete_client, list_clients, parse_time, show_client
from records.rows import iso
from wire.errors import InvalidRequest

MODELS_MAX = 1000  # in one client's list
YEAR_MAX_S = 253_402_300_799.0  # the last moment of the year 9999, which ISO-8601 can write
CHANGE: Mapping[str, Shape] = {
    "name": TEXT, "limits": OBJECT.or_null(), "models": TEXTS.or_null(), "min_rank": COUNT,
    "privacy": one_of("no-train").or_null(), "expires_at": TEXT.or_null(), "enabled": FLAG,
}  # fmt: skip
LIMITS: Mapping[str, Shape] = {"rpm": COUNT, "rpd": COUNT, "tpd": COUNT}


class Clients:
    """The endpoints under /api/clients."""

    def __init__(self, engine: Engine, control: Control) -> None:
        self._engine = engine
        self._control = control

    def routes(self) -> list[Route]:
        return [
            resource("/api/clients", GET=self.list, POST=self.add),
            resource("/api/clients/{id}", PATCH=self.change, DELETE=self.delete),
        ]

    async def list(self, request: Request) -> Response:
        return json_response([self._live(client) for client in await self._engine.store.read(list_clients)])

    async def add(self, request: Request) -> Response:
        """201 with the client and its key."""
        body = fields(await read_json(request), CHANGE)
        needed(body, "name")
        changes = checked(body)
        id, key = await self._control.apply(lambda db: add_client(db, changes))
        return await self._shown(id, "client_added", {"key": key}, 201)

    async def change(self, request: Request) -> Response:
        id, changes = path_id(request), checked(fields(await read_json(request), CHANGE))
        await self._control.apply(lambda db: change_client(db, id, changes))
        return await self._shown(id, "client_changed", {})

    async def delete(self, request: Request) -> Response:
        id = path_id(request)
        if not await self._control.apply(lambda db: delete_client(db, id)):
            raise unknown("client", id)
        self._engine.log.write("info", "client_deleted", client_id=id)
        return json_response({"id": id, "deleted": True})

    async def _shown(self, id: int, event: str, more: dict[str, Any], status: int = 200) -> Response:
        """The client as it is after a change, which is logged."""
        client = await self._engine.store.read(lambda db: show_client(db, id))
        if client is None:
            raise unknown("client", id)
        self._engine.log.write("info", event, client_id=id, name=client["name"])
        return json_response(self._live(client) | more, status)

    def _live(self, client: dict[str, Any]) -> dict[str, Any]:
        return {**client, "used": self._control.clients.used(client["id"], time.monotonic(), time.time())}


def checked(body: dict[str, Any]) -> dict[str, Any]:
    """What a body sets, each value as it is stored. Raises InvalidRequest naming the field."""
    changes = dict(body)
    if "name" in body:
        changes["name"] = label(body["name"], "name")
        if not changes["name"]:
            raise InvalidRequest("'name' must not be empty.", param="name", code="invalid_value")
    if body.get("limits") is not None:
        fields(body["limits"], LIMITS, "limits")
    models = body.get("models")
    if models is not None and not (0 < len(models) <= MODELS_MAX and all(name.strip() for name in models)):
        message = f"'models' must name 1 to {MODELS_MAX} models or modes, or be null for all."
        raise InvalidRequest(message, param="models", code="invalid_value")
    if body.get("expires_at") is not None:
        changes["expires_at"] = expiry(body["expires_at"])
    return changes


def expiry(text: str) -> str:
    """A moment as it is stored, with milliseconds and Z."""
    try:
        utc = parse_time(text)
    except (ValueError, OverflowError):
        utc = -1.0
    if not 0 <= utc <= YEAR_MAX_S:
        message = "'expires_at' must be a moment like 2027-01-31T12:00:00Z, or null for never."
        raise InvalidRequest(message, param="expires_at", code="invalid_value")
    return iso(utc)
