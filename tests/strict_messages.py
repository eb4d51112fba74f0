"""Messages and their events, judged by the anthropic client's own models: nothing missing, misspelt or of another type.

The client itself is lenient: it builds its objects unchecked, and a wrong field shows only where somebody reads it.
"""

import json
import typing
from functools import cache
from importlib import import_module
from types import ModuleType

import aiohttp
from conftest import IN_ORDER, Answer, Stream
from multidict import CIMultiDict
from pydantic import BaseModel
from strict_models import unknown_fields

FIRST, LAST = "message_start", "message_stop"
DELTA_OF = {"text": "text_delta", "thinking": "thinking_delta", "tool_use": "input_json_delta"}
TEXT_IN = {"text": "text", "thinking": "thinking", "tool_use": "partial_json"}
ERROR_STATUS = {
    "invalid_request_error": {400, 405, 408, 415},
    "authentication_error": {401},
    "permission_error": {403},
    "not_found_error": {404},
    "request_too_large": {413},
    "rate_limit_error": {429},
    "api_error": {500},
    "overloaded_error": {529},
}


def models() -> ModuleType:
    """Read when they are wanted: it takes a second, and each of the suite's processes reads every file of tests."""
    return import_module("anthropic.types")


@cache
def event_models() -> dict[str, type[BaseModel]]:
    members = typing.get_args(typing.get_args(models().RawMessageStreamEvent)[0])
    by_type = {typing.get_args(member.model_fields["type"].annotation)[0]: member for member in members}
    return {**by_type, "error": models().shared.ErrorResponse}


def assert_right(model: type[BaseModel], value: dict) -> None:
    read = model.model_validate_json(json.dumps(value), strict=True)
    assert unknown_fields(read) == set()


def assert_message(value: dict, model: str) -> None:
    assert_right(models().Message, value)
    assert value["id"].startswith("msg_")
    assert value["model"] == model
    assert value["stop_reason"] is not None
    assert_usage(value["usage"])
    for block in value["content"]:
        assert_block(block)


def assert_block(block: dict) -> None:
    """A block that the API would take back in the next request."""
    if block["type"] == "tool_use":
        assert block["id"] and block["name"]
    else:
        assert block[block["type"]].strip()


def assert_usage(usage: dict) -> None:
    counts = [count for name, count in usage.items() if name.endswith("tokens")]
    assert counts and all(type(count) is int and count >= 0 for count in counts), usage


def assert_count(value: dict) -> int:
    assert_right(models().MessageTokensCount, value)
    return value["input_tokens"]


def assert_error(got: Answer, status: int, kind: str) -> str:
    """An error response in every respect; gives its message."""
    assert got.status == status, (got.status, got.body)
    assert got.headers["content-type"].startswith("application/json")
    told = got.json
    if kind != "request_too_large":  # which the client's models do not have
        assert_right(models().shared.ErrorResponse, told)
    assert told.keys() == {"type", "error", "request_id"}
    assert told["error"].keys() == {"type", "message"}
    assert told["error"]["type"] == kind
    assert status in ERROR_STATUS[kind]
    assert told["request_id"] == got.headers["request-id"] == got.headers["X-Request-Id"]
    return told["error"]["message"]


def events_of(got: Stream) -> list[dict]:
    """The events of a raw stream but for pings, each of them right and all of them in order, to whatever end."""
    assert got.status == 200, got.body
    assert got.headers["content-type"].startswith("text/event-stream")
    assert got.headers["request-id"] == got.headers["X-Request-Id"]
    blocks = [block for block in got.body.decode().split("\n\n") if block and not block.startswith(":")]
    events = [json.loads(block.split("\n")[1].removeprefix("data: ")) for block in blocks]
    assert [block.split("\n")[0] for block in blocks] == [f"event: {event['type']}" for event in events]
    events = [event for event in events if event != {"type": "ping"}]
    for event in events:
        assert_right(event_models()[event["type"]], event)
    return events


def assert_in_order(events: list[dict], model: str) -> list[dict]:
    """Block by block, without gaps and one at a time; gives the blocks that are complete."""
    if not events:
        return []
    assert events[0]["type"] == FIRST
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"], start["model"]) == ([], None, model)
    assert start["usage"]["input_tokens"] >= 1
    blocks: list[dict] = []
    opened: dict | None = None
    for event in events[1:]:
        match event["type"]:
            case "content_block_start":
                assert opened is None and event["index"] == len(blocks)
                opened, text = event["content_block"], ""
                assert opened[{"tool_use": "input"}.get(opened["type"], opened["type"])] in ("", {})
                assert opened.get("signature", "") == ""
            case "content_block_delta":
                assert event["index"] == len(blocks) and event["delta"]["type"] == DELTA_OF[opened["type"]]
                text += event["delta"][TEXT_IN[opened["type"]]]
            case "content_block_stop":
                assert event["index"] == len(blocks)
                told = {"input": json.loads(text or "{}")} if opened["type"] == "tool_use" else {opened["type"]: text}
                blocks.append(opened | told)
                assert_block(blocks[-1])
                opened = None
            case "message_delta":
                assert opened is None
                assert event["delta"]["stop_reason"] is not None
                assert_usage(event["usage"])
    names = [event["type"] for event in events]
    assert names.count(FIRST) == 1
    if "error" in names:
        assert names.index("error") == len(names) - 1 and blocks and LAST not in names
    elif LAST in names:
        assert names[-2:] == ["message_delta", LAST]
    assert names.count(LAST) == names.count("message_delta") <= 1
    return blocks


async def raw_message(gateway, **fields) -> Stream:
    """A stream to its end, whatever that is; `cut` in its headers says that its connection was closed within it."""
    request = {"model": IN_ORDER, "max_tokens": 4000, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    pieces, cut = [], ""
    async with gateway.post(request | fields, path="/v1/messages") as response:
        try:
            async for data in response.content.iter_any():
                pieces.append(data)
        except aiohttp.ClientPayloadError:
            cut = "yes"
        headers = CIMultiDict(response.headers, cut=cut)
        return Stream(response.status, headers, b"".join(pieces))


async def streamed_message(gateway, **fields) -> tuple[list[dict], list[dict]]:
    """All events and all blocks of a stream that ends as it should."""
    got = await raw_message(gateway, **fields)
    assert not got.headers["cut"]
    events = events_of(got)
    blocks = assert_in_order(events, fields.get("model", IN_ORDER))
    assert events[-1]["type"] == "message_stop"
    return events, blocks
