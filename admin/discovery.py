"""Servers that list their own models: what a local server lists, for example, is added to the catalogue.

Only platforms marked `discover` are asked, at start and then every minute, off the request's path: a server on a laptop
is started and stopped at will. One that does not answer keeps the models it had; its failures matter to routing, not
here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any

from admin.control import Control
from config.catalog_files import make_model
from engine.exchange import Engine
from protection import KeyStatus, UpstreamError
from records.connection import DatabaseAway
from records.database import DatabaseError
from routing.catalog import KEYLESS, Model, Platform

DISCOVER_S = 60.0  # a model pulled on the same machine is there within a minute
MODELS_MAX = 500  # of one server; a real list ends far below, and each costs a row
CONTEXT_MAX = 10**9  # tokens; more is no window but a broken server
CONTEXT_FIELDS = ("context_window", "context_length", "max_model_len", "max_context_length", "inputTokenLimit", "n_ctx")
# In the ids of models that answer no chat. One that gives vectors is served where a file says so, and of which family
# it is: nobody else can know whose vectors may stand beside its own.
NOT_FOR_CHAT = re.compile(r"embed|rerank|whisper|tts|(?:^|[/_-])(?:bge|e5|gte|minilm)(?:[-_:.]|$)")


async def keep_discovering(engine: Engine, control: Control) -> None:
    """For the lifespan: runs until it is cancelled."""
    while any(platform.discover for platform in control.files.platforms.values()):
        try:
            await discover(engine, control)
        except DatabaseAway:  # said once, when it was noticed
            pass
        except DatabaseError as error:
            engine.log.write("warning", "discovery", message=str(error))
        await asyncio.sleep(DISCOVER_S)


async def discover(engine: Engine, control: Control) -> dict[str, int | None]:
    """Ask every platform that is marked for it, and bring the catalogue up to date where something has changed.

    Gives how many models each listed; None for one that could not be asked. Raises DatabaseError.
    """
    asked = [platform for platform in control.files.platforms.values() if platform.discover]
    answers = await asyncio.gather(*(listed(engine, platform) for platform in asked))
    found = {platform.id: answer for platform, answer in zip(asked, answers, strict=True) if answer is not None}
    if await control.revise_models(lambda models: merged(models, found)):
        engine.log.write("info", "discovery", models=len(control.files.models))
    return {platform.id: len(found[platform.id]) if platform.id in found else None for platform in asked}


async def listed(engine: Engine, platform: Platform) -> list[Model] | None:
    """The models that a platform's server lists; None when it cannot be asked."""
    statuses = engine.router.key_status
    keys = [k for k in engine.router.catalog.keys.get(platform.id, ()) if statuses.get(k.id) is not KeyStatus.INVALID]
    if not keys and platform.keyless:
        keys = [KEYLESS]
    for key in keys[:1]:
        try:
            return read_list(await engine.providers.list_models(platform, key), platform)
        except (UpstreamError, ValueError) as error:
            engine.log.write("debug", "discovery", platform=platform.id, message=str(error))
    return None


def read_list(body: object, platform: Platform) -> list[Model]:
    """Models out of `{"data": [{"id": …}]}`, `{"models": [{"name": …}]}` or a bare list. Raises ValueError."""
    rows = body
    if isinstance(body, dict):
        rows = body.get("data") or body.get("models") or []
    if not isinstance(rows, list):
        raise ValueError("no list of models")
    found: dict[str, Model] = {}
    for row in rows[:MODELS_MAX]:
        fields = read_row(row)
        if fields is not None and not NOT_FOR_CHAT.search(fields["model_id"].lower()):
            model = make_model({"platform": platform.id, **fields}, {platform.id: platform}, [])
            found[model.model_id] = model
    return list(found.values())


def read_row(row: object) -> dict[str, Any] | None:
    if isinstance(row, str):
        return {"model_id": row}
    if not isinstance(row, dict):
        return None
    name = row.get("id") or row.get("name") or row.get("model")
    if not isinstance(name, str) or not name.isprintable() or not name:
        return None
    fields: dict[str, Any] = {"model_id": name.removeprefix("models/"), "discovered": True}
    meta = row.get("meta")
    for place in (row, meta if isinstance(meta, dict) else {}):
        for field in CONTEXT_FIELDS:
            size = place.get(field)
            if isinstance(size, int) and 0 < size <= CONTEXT_MAX:
                fields.setdefault("context_window", size)
    capabilities = row.get("capabilities")
    if isinstance(capabilities, list):
        fields["vision"] = "vision" in capabilities
    return fields


def merged(models: Sequence[Model], found: dict[str, list[Model]]) -> list[Model]:
    """The catalogue with these models in place of those found before; entries of the files stay as written."""
    kept = [model for model in models if not (model.discovered and model.platform.id in found)]
    known = {(model.platform.id, model.model_id) for model in kept}
    before = {(model.platform.id, model.model_id): model for model in models}
    for model in (model for listed in found.values() for model in listed):
        name = (model.platform.id, model.model_id)
        if name not in known:
            old = before.get(name)
            kept.append(old if old is not None and old.context_window == model.context_window else model)
    return kept
