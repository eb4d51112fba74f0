"""Responses and their events, judged by the openai client's own models: nothing missing, misspelt or of another type.

The client itself is lenient: it builds its objects unchecked, and a wrong field shows only where somebody reads it.
"""

import json
import typing
from functools import cache
from importlib import import_module
from types import ModuleType

from conftest import IN_ORDER, Stream
from pydantic import BaseModel

# What the API sends besides, as its documentation and earlier versions of the client say.
UNMODELLED = {("Response", "output_text"), ("Response", "store"), ("ResponseFunctionCallArgumentsDoneEvent", "name")}


def models() -> ModuleType:
    """Read when they are wanted: it takes a second, and each of the suite's processes reads every file of tests."""
    return import_module("openai.types")


@cache
def event_models() -> dict[str, type[BaseModel]]:
    members = typing.get_args(typing.get_args(models().responses.ResponseStreamEvent)[0])
    return {typing.get_args(member.model_fields["type"].annotation)[0]: member for member in members}


def assert_right(model: type[BaseModel], value: dict) -> None:
    read = model.model_validate_json(json.dumps(value), strict=True)
    assert unknown_fields(read) <= UNMODELLED


def assert_response(value: dict) -> None:
    assert_right(models().responses.Response, value)


def assert_event(value: dict) -> None:
    assert_right(event_models()[value["type"]], value)


def unknown_fields(value: object) -> set[tuple[str, str]]:
    """(model, field) of everything in it, however deep, that its model does not have."""
    if isinstance(value, BaseModel):
        found = {(type(value).__name__, name) for name in value.__pydantic_extra__ or {}}
        return found.union(*(unknown_fields(getattr(value, name)) for name in type(value).model_fields))
    if isinstance(value, list):
        return set().union(*map(unknown_fields, value))
    return set()


LAST = ("response.completed", "response.incomplete", "response.failed")


async def streamed_response(gateway, **fields) -> tuple[list[dict], Stream]:
    """The events of a raw stream, with what holds of every stream checked."""
    request = {"model": IN_ORDER, "input": "hi", "stream": True} | fields
    got = await gateway.send(request, path="/v1/responses")
    assert got.status == 200, got.body
    assert got.headers["content-type"].startswith("text/event-stream")
    stream = Stream(got.status, got.headers, got.body)
    events = stream.chunks
    assert "[DONE]" not in stream.data
    blocks = [block for block in got.body.decode().split("\n\n") if block and not block.startswith(":")]
    assert [block.split("\n")[0] for block in blocks] == [f"event: {e['type']}" for e in events]
    assert got.body.endswith(b"\n\n")
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    assert [e["type"] for e in events[:2]] == ["response.created", "response.in_progress"]
    assert [e["type"] for e in events if e["type"] in LAST] == [events[-1]["type"]]
    assert len({e["response"]["id"] for e in events if "response" in e}) == 1
    for e in events:
        assert_event(e)
    assert_items_add_up(events)
    return events, stream


def assert_items_add_up(events: list[dict]) -> None:
    """What was told in pieces is what the whole items say, and every item is announced once and in its place."""
    final = events[-1]["response"]["output"]
    added = [e for e in events if e["type"] == "response.output_item.added"]
    assert [e["output_index"] for e in added] == list(range(len(final)))
    assert [e["item"]["id"] for e in added] == [item["id"] for item in final]
    done = {e["output_index"]: e["item"] for e in events if e["type"] == "response.output_item.done"}
    if events[-1]["type"] != "response.failed":
        assert [done[index] for index in sorted(done)] == final
    told = dict.fromkeys(range(len(final)), "")
    for e in events:
        if e["type"].endswith(".delta"):
            assert e["item_id"] == final[e["output_index"]]["id"]
            told[e["output_index"]] += e["delta"]
    assert list(told.values()) == [text_of(item) for item in final]


def text_of(item: dict) -> str:
    parts = item.get("content") or item.get("summary") or []
    text = "".join(part.get("text") or part.get("refusal", "") for part in parts)
    return text or item.get("arguments") or item.get("input", "")
