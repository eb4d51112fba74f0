"""Why a request went where it went, and where one would go now (SPEC 21.1)."""

from __future__ import annotations

import time
from random import Random

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from admin.bodies import json_response, resource, unknown
from dialects.chat import ChatDialect
from engine.door import understood
from engine.exchange import Engine
from transport.client import read_body
from transport.siblings import Siblings

ID_QUOTED_CHARS_MAX = 100


class Explain:
    """/api/explain and /api/requests/{request_id}/explain."""

    def __init__(self, engine: Engine, siblings: Siblings | None) -> None:
        self._engine = engine
        self._siblings = siblings
        if siblings is not None:
            siblings.answers["explain"] = lambda id: orjson.dumps(engine.explanations.of(id), default=str)
        self._dialect = ChatDialect()

    def routes(self) -> list[Route]:
        return [
            resource("/api/requests/{request_id}/explain", GET=self.past),
            resource("/api/explain", POST=self.rehearse),
        ]

    async def past(self, request: Request) -> Response:
        id = request.path_params["request_id"]
        told = self._engine.explanations.of(id)
        if told is None and self._siblings is not None and id.isprintable():
            answers = await self._siblings.ask("explain", id[:ID_QUOTED_CHARS_MAX])
            told = next((told for told in map(orjson.loads, answers) if told is not None), None)
        if told is None:
            raise unknown("kept request", id[:ID_QUOTED_CHARS_MAX])
        return json_response(told)

    async def rehearse(self, request: Request) -> Response:
        """Takes a chat body, with the headers that a request would have."""
        engine, headers = self._engine, dict(request.scope["headers"])
        raw = await read_body(headers, request.receive, engine.settings.max_body_bytes)
        private = engine.settings.privacy is not None
        chat, session = understood(
            self._dialect.parse(raw, time.time()), headers, engine.router.catalog, private=private
        )
        return json_response(engine.explanations.rehearse(chat, session, Random()))  # draws of its own: traffic's go on
