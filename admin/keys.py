"""Providers' keys as the operator sees and changes them, and the check of a key by its provider.

A key never leaves here whole. The check uses no quota; admin/rechecks.py runs it by itself for keys that are invalid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from admin.bodies import fields, json_response, label, needed, path_id, read_json, resource, unknown
from admin.control import Control
from config.catalog_files import provider_key
from config.settings import SettingsError
from config.shapes import FLAG, TEXT, Shape
from engine.exchange import Engine
from protection import Failure, KeyStatus, UpstreamError
from records.controls import change_key, delete_key, list_keys, put_key, read_secret, set_status, show_key
from routing.catalog import Key, how_written
from wire.errors import InvalidRequest

KEY_CHARS_MAX = 4096
NEW_KEY: Mapping[str, Shape] = {"platform": TEXT, "key": TEXT, "label": TEXT, "trains_on_prompts": FLAG.or_null()}
KEY_CHANGE: Mapping[str, Shape] = {
    "label": TEXT, "enabled": FLAG, "status": TEXT, "trains_on_prompts": FLAG.or_null(),
}  # fmt: skip
STATUS_OF = {Failure.AUTH: KeyStatus.INVALID, Failure.RATE_LIMITED: KeyStatus.RATE_LIMITED}


class Keys:
    """The endpoints under /api/keys."""

    def __init__(self, engine: Engine, control: Control) -> None:
        self._engine = engine
        self._control = control

    def routes(self) -> list[Route]:
        return [
            resource("/api/keys", GET=self.list, POST=self.add),
            resource("/api/keys/{id}", PATCH=self.change, DELETE=self.delete),
            resource("/api/keys/{id}/check", POST=self.check),
        ]

    async def list(self, request: Request) -> Response:
        keys = await self._engine.store.read(lambda db: list_keys(db, self._engine.store.vault))
        return json_response([self._live(key) for key in keys])

    async def add(self, request: Request) -> Response:
        """201 with the new key; 200 with the existing one where it was known already."""
        body = fields(await read_json(request), NEW_KEY)
        needed(body, "platform", "key")
        platform = self._control.files.platforms.get(body["platform"])
        if platform is None:
            message = f"There is no platform {body['platform'][:100]!r}. GET /api/platforms lists what there is."
            raise InvalidRequest(message, param="platform", code="unknown_platform")
        secret, changes, vault = credential(body["key"]), key_changes(body), self._engine.store.vault
        id, is_new = await self._control.apply(lambda db: put_key(db, vault, platform.id, secret, changes))
        return await self._shown(id, "key_added" if is_new else "key_known", 201 if is_new else 200)

    async def change(self, request: Request) -> Response:
        body = fields(await read_json(request), KEY_CHANGE)
        if body.get("status", KeyStatus.UNKNOWN) != KeyStatus.UNKNOWN:
            message = "'status' can only be set to 'unknown', to have the key tried again."
            raise InvalidRequest(message, param="status", code="invalid_value")
        id, changes = path_id(request), key_changes(body)
        await self._control.apply(lambda db: change_key(db, id, changes, reset="status" in body))
        return await self._shown(id, "key_changed")

    async def delete(self, request: Request) -> Response:
        id = path_id(request)
        if not await self._control.apply(lambda db: delete_key(db, id)):
            raise unknown("key", id)
        self._engine.log.write("info", "key_deleted", key_id=id)
        return json_response({"id": id, "deleted": True})

    async def check(self, request: Request) -> Response:
        id = path_id(request)
        await check_key(self._engine, self._control, id)
        return await self._shown(id, "key_checked")

    async def _shown(self, id: int, event: str, status: int = 200) -> Response:
        """The key as it is after a change, which is logged."""
        vault = self._engine.store.vault
        key = await self._engine.store.read(lambda db: show_key(db, vault, id))
        if key is None:
            raise unknown("key", id)
        key = self._live(key)
        self._engine.log.write("info", event, key_id=id, platform=key["platform"], status=key["status"])
        return json_response(key, status)

    def _live(self, key: dict[str, Any]) -> dict[str, Any]:
        """A key with the status that routing goes by; the database hears of a change a moment later."""
        status = self._engine.router.key_status.get(key["id"], key["status"])
        return {**key, "status": status}


async def check_key(engine: Engine, control: Control, id: int) -> None:
    """Ask the provider whether it takes this key, without using any of its quota, and note what it says.

    A key that is not written as its platform needs it is not sent anywhere.
    """
    vault = engine.store.vault
    found = await engine.store.read(lambda db: read_secret(db, vault, id))
    if found is None:
        return
    platform, secret = found
    model = next((m for m in engine.router.catalog.models if m.platform.id == platform), None)
    if model is None:
        raise InvalidRequest("The catalogue has no model of the key's platform.", status=409, code="no_model")
    if how_written(model.platform, secret) is not None:
        return
    status: KeyStatus | None = None
    words: str | None = None
    try:
        if await engine.providers.check_key(model, Key(id, platform, secret)):
            status = KeyStatus.HEALTHY
    except UpstreamError as error:
        status, words = STATUS_OF.get(error.failure), error.message
    await control.apply(lambda db: set_status(db, id, status, words))


def key_changes(body: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of `api_keys` that a body sets."""
    changes = {name: body[name] for name in ("enabled", "trains_on_prompts") if name in body}
    if "label" in body:
        changes["label"] = label(body["label"])
        if changes["label"].startswith("env:"):  # at the next start it would be switched off for want of its variable
            message = "Labels that begin with 'env:' are kept for keys from the environment."
            raise InvalidRequest(message, param="label")
    return changes


def credential(text: str) -> str:
    """A provider's key. The message never quotes it."""
    message = "The key must be printable ASCII in one line and without blanks."
    if any(char.isspace() for char in text.removeprefix("Bearer ")) or len(text) > KEY_CHARS_MAX:
        raise InvalidRequest(message, param="key", code="invalid_key")
    try:
        return provider_key("key", text)
    except SettingsError:
        raise InvalidRequest(message, param="key", code="invalid_key") from None
