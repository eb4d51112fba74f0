"""A whole drill: every way of failing, played against the operator's own chain (SPEC 21.5).

Each case is one streamed request with a one-line prompt, served by the engine like any other. Bounded: at most two
calls to providers per case, one case after the other, one drill at a time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from admin.bodies import fields, json_response, read_json, resource
from config.shapes import TEXTS, Shape
from dialects.chat import ChatDialect
from engine.door import understood
from engine.drill import CALLS_MAX, CASES, Drill, parse_drill
from engine.exchange import Engine
from transport.client import Client, CutShort
from wire.errors import GatewayError, InvalidRequest

PROMPT = "Count from one to twenty in words, separated by commas. Nothing else."
BODY = {"model": "auto", "stream": True, "messages": [{"role": "user", "content": PROMPT}]}
CASES_MAX = 20  # of one drill
GOOD_ENDS = ("stop", "length")
FIELDS: Mapping[str, Shape] = {"cases": TEXTS.or_null()}


@dataclass(slots=True)
class Reader:
    """The client of one case: what it is sent, and what an ordinary client would make of that."""

    status: int = 0
    body: bytearray = field(default_factory=bytearray)

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.body += message.get("body", b"")

    def trouble(self) -> str | None:
        """What is wrong with the answer; None for a whole one."""
        frames = [line[6:] for line in bytes(self.body).split(b"\n") if line.startswith(b"data: ")]
        if not frames or frames[-1] != b"[DONE]":
            return "The stream just stopped."
        chunks = [orjson.loads(frame) for frame in frames[:-1]]
        for chunk in chunks:
            if chunk.get("error"):
                return str(chunk["error"]["message"])
        choices = [choice for chunk in chunks for choice in chunk.get("choices") or ()]
        if not any(choice["delta"].get("content") or choice["delta"].get("reasoning_content") for choice in choices):
            return "The answer was empty."
        ends = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
        return None if len(ends) == 1 and ends[0] in GOOD_ENDS else f"The answer ended with {ends}."


def has_body(request: Request) -> bool:
    return request.headers.get("content-length", "0") != "0" or "transfer-encoding" in request.headers


class Drills:
    """POST /api/drill."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._dialect = ChatDialect()
        self._running = False

    def routes(self) -> list[Route]:
        return [resource("/api/drill", POST=self.run)]

    async def run(self, request: Request) -> Response:
        body = fields(await read_json(request), FIELDS) if has_body(request) else {}
        named = body.get("cases")
        names = CASES if named is None else named
        if not 0 < len(names) <= CASES_MAX:
            raise InvalidRequest(f"'cases' must name 1 to {CASES_MAX} cases.", param="cases", code="invalid_value")
        drills = [parse_drill(name) for name in names]
        if self._running:
            message = "A drill is running already. Wait for its end."
            raise GatewayError(message, status=409, type="invalid_request_error", code="drill_running")
        self._running = True
        try:
            cases = [await self._case(drill) for drill in drills]
        finally:
            self._running = False
        passed = all(case["whole"] for case in cases)
        self._engine.log.write("info", "drill", passed=passed, cases=len(cases))
        return json_response({"cases": cases, "passed": passed})

    async def _case(self, drill: Drill) -> dict[str, Any]:
        """One request whose first attempt fails in this way."""
        engine, reader, began = self._engine, Reader(), time.monotonic()
        exchange = engine.exchange()
        private = engine.settings.privacy is not None
        chat = self._dialect.parse(orjson.dumps(BODY), exchange.utc)
        exchange.chat, _ = understood(chat, {}, engine.router.catalog, private=private)
        exchange.begin_drill(drill)
        exchange.attempts_max = CALLS_MAX if drill.asks else CALLS_MAX + 1  # where the broken one calls nobody
        error: str | None
        try:
            await engine.answer(exchange, self._dialect, Client(lambda: None), reader.send)
        except GatewayError as refused:
            engine.refuse(exchange, refused)
            error = refused.message
        except CutShort:
            error = "The stream just stopped."
        else:
            error = reader.trouble()
        route = exchange.route
        return {
            "case": str(drill),
            "whole": error is None,
            "platform": route.model.platform.id if route is not None else None,
            "model_id": route.model.model_id if route is not None else None,
            "calls": exchange.attempts - (0 if drill.asks else min(1, exchange.attempts)),
            "ms": round((time.monotonic() - began) * 1000),
            "error": error,
        }
