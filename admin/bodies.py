"""What every admin endpoint needs: JSON out, and JSON, labels and numbers in.

Whatever the operator sent wrong ends in an InvalidRequest that names the field.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from config.settings import spelled
from config.shapes import Shape
from records.database import DatabaseError
from transport.client import read_body
from wire.errors import GatewayError, InvalidRequest

BODY_BYTES_MAX = 1024 * 1024  # a whole chain of 10,000 models fits
LABEL_CHARS_MAX = 100
NAME_QUOTED_CHARS_MAX = 100  # of an unknown field's name in the error
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


async def read_json(request: Request) -> Any:
    raw = await read_body(dict(request.scope["headers"]), request.receive, BODY_BYTES_MAX)
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None


def fields(body: Any, shapes: Mapping[str, Shape], place: str = "") -> dict[str, Any]:
    """An object that has only these fields, each of its shape where it is given."""
    if not isinstance(body, dict):
        message = f"{place or 'The body'} must be a JSON object."
        raise InvalidRequest(message, param=place or None, code="invalid_type")
    for name, value in body.items():
        param = f"{place}.{name}" if place else name
        if name not in shapes:
            param = param[:NAME_QUOTED_CHARS_MAX]
            message = f"'{param}' is unknown here; expected {', '.join(shapes)}."
            raise InvalidRequest(message, param=param, code="unknown_field")
        if not shapes[name].fits(value):
            raise InvalidRequest(f"'{param}' must be {shapes[name].words}.", param=param, code="invalid_type")
    return body


def needed(body: dict[str, Any], *names: str) -> None:
    for name in names:
        if name not in body:
            raise InvalidRequest(f"'{name}' is missing.", param=name, code="missing_field")


def label(text: str, param: str = "label") -> str:
    """A name that the operator gives to something."""
    text = text.strip()
    if len(text) > LABEL_CHARS_MAX or not text.isprintable():
        message = f"'{param}' must be at most {LABEL_CHARS_MAX} printable characters."
        raise InvalidRequest(message, param=param, code="invalid_value")
    return text


def path_id(request: Request) -> int:
    text = request.path_params["id"]
    id = spelled(text)
    if id is None:
        raise unknown("entry", text[:NAME_QUOTED_CHARS_MAX])
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
