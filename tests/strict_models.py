"""Responses and their events, judged by the openai client's own models: nothing missing, misspelt or of another type.

The client itself is lenient: it builds its objects unchecked, and a wrong field shows only where somebody reads it.
"""

import json
import typing

from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel

# What the API sends besides, as its documentation and earlier versions of the client say.
UNMODELLED = {("Response", "output_text"), ("Response", "store"), ("ResponseFunctionCallArgumentsDoneEvent", "name")}


def event_models() -> dict[str, type[BaseModel]]:
    members = typing.get_args(typing.get_args(ResponseStreamEvent)[0])
    return {typing.get_args(member.model_fields["type"].annotation)[0]: member for member in members}


EVENT_MODELS = event_models()


def assert_right(model: type[BaseModel], value: dict) -> None:
    read = model.model_validate_json(json.dumps(value), strict=True)
    assert unknown_fields(read) <= UNMODELLED


def assert_response(value: dict) -> None:
    assert_right(Response, value)


def assert_event(value: dict) -> None:
    assert_right(EVENT_MODELS[value["type"]], value)


def unknown_fields(value: object) -> set[tuple[str, str]]:
    """(model, field) of everything in it, however deep, that its model does not have."""
    if isinstance(value, BaseModel):
        found = {(type(value).__name__, name) for name in value.__pydantic_extra__ or {}}
        return found.union(*(unknown_fields(getattr(value, name)) for name in type(value).model_fields))
    if isinstance(value, list):
        return set().union(*map(unknown_fields, value))
    return set()
