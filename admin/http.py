"""What the operator's endpoints have in common: how they answer, and how a path gets its methods."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from records.database import DatabaseError
from wire.errors import GatewayError

Endpoint = Callable[[Request], Awaitable[Response]]


def json_response(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json", headers={"cache-control": "no-store"})


def resource(path: str, **methods: Endpoint) -> Route:
    """One path with an endpoint for each method."""

    async def endpoint(request: Request) -> Response:
        try:
            return await methods["GET" if request.method == "HEAD" else request.method](request)
        except DatabaseError as error:
            message = f"The database cannot be used right now: {error}. Nothing was changed; try again."
            raise GatewayError(message, status=503, code="database_unavailable") from None

    return Route(path, endpoint, methods=list(methods))
